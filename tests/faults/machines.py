"""Machines that fail: a process at a time, and a service manager that starts it again."""

from __future__ import annotations

import asyncio
from contextvars import Context
from typing import TYPE_CHECKING, Any

from .federation import HUB
from .virtual import Life

if TYPE_CHECKING:
    from .laboratory import Laboratory


MANAGER_S, NOT_AGAIN, HUB_NOT_AGAIN, TIRED = 30.0, (2, 4), (1, 2, 4), 20
"""RestartSec and RestartPreventExitStatus of the units in examples/lan; no machine is started more often than this."""


class Node:
    """One party's machine: a process at a time, and a supervisor that starts it again."""

    def __init__(self, lab: Laboratory, name: str) -> None:
        self.lab, self.name = lab, name
        self.life: Life | None = None
        self.stop: asyncio.Event | None = None
        self.starts = 0
        self.error: BaseException | None = None
        """How it ended for good."""
        self.done = False
        """It ended for good."""
        self.gave_up: list[BaseException] = []
        """What it ended with before its service manager started it again."""
        self.left_alone = False
        """It had failed when the run was over: its service manager need not start it again."""
        self.asked_to_stop = False

    def start(self) -> None:
        """A new process on the same folders."""
        if self.done or self.life is not None:
            return
        lab = self.lab
        self.starts += 1
        self.asked_to_stop = False
        self.life = Life(self.name)
        lab.network.powered(self.name)
        lab.tell(f"{self.name} starts")
        life, context = self.life, self.life.context
        task = lab.loop.create_task(self._main(), context=context)
        lab.keep.append(task)
        task.add_done_callback(lambda task: self._ended(life, task), context=Context())

    async def _main(self) -> Any:
        self.stop = asyncio.Event()
        me = asyncio.current_task()
        try:
            peer = await asyncio.to_thread(self.lab.make, self.name, self.stop)
            return await peer.run()
        finally:
            # As asyncio.run does it.
            others = [t for t in asyncio.all_tasks() if t is not me and getattr(t, "life", None) is self.life]
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)

    def _ended(self, life: Life, task: asyncio.Task[Any]) -> None:
        if not life.alive:
            return
        lab = self.lab
        life.alive = False
        lab.network.ended(life, power=False)
        lab.disks.release(life)
        self.life = None
        error = task.exception() if not task.cancelled() else asyncio.CancelledError()
        finished = error is None and not self.asked_to_stop
        if error is None and self.name == HUB:
            finished = task.result().complete
        if error is None and not finished:
            lab.tell(f"{self.name} has left, as it was asked to")
            lab.later(lab.draw(0.1, 5.0), self.start)
            return
        self.done, self.error = True, error
        code = (
            f"exit {getattr(error, 'exit_code', 5)}: {type(error).__name__}: {error}" if error else "exit 0"
        )
        lab.tell(f"{self.name} ends: {code}")
        if (
            error is not None
            and lab.manager
            and getattr(error, "exit_code", 5) not in NOT_AGAIN
            and self.starts < TIRED
        ):
            self.done = False
            self.gave_up.append(error)
            lab.later(MANAGER_S, self._once_more)
            return
        lab.check()

    def _once_more(self) -> None:
        """The service manager starts what failed, unless nothing is left to do."""
        if self.lab.nodes[HUB].done:
            self.done = self.left_alone = True
            self.lab.check()
        else:
            self.start()

    def kill(self, back_s: float, *, power: bool = False) -> None:
        """SIGKILL, or the machine loses power; it starts again after `back_s`."""
        life = self.life
        if life is None or self.done:
            return
        self.lab.tell(f"{self.name} {'loses power' if power else 'is killed'}, back in {back_s:.2f} s")
        life.alive = False
        life.held.clear()
        self.life = None
        self.lab.network.ended(life, power=power)
        self.lab.disks.release(life)
        if power:
            self.lab.disks.power_lost(self.name)
        self.lab.later(back_s, self.start)

    def hold(self, seconds: float) -> None:
        """SIGSTOP, and SIGCONT after so long."""
        life = self.life
        if life is None or life.stopped:
            return
        self.lab.tell(f"{self.name} is stopped for {seconds:.2f} s")
        life.stopped = True
        self.lab.network.stopped(life)

        def go_on() -> None:
            if life.alive:
                self.lab.tell(f"{self.name} goes on")
                self.lab.loop.resume(life)
                self.lab.network.resumed(life, seconds)

        self.lab.later(seconds, go_on)

    def drain(self) -> None:
        """SIGTERM; the service manager starts it again."""
        if self.life is not None and self.stop is not None:
            self.lab.tell(f"{self.name} is asked to stop")
            self.asked_to_stop = True
            self.lab.loop.call_soon(self.stop.set, context=self.life.context.copy())
