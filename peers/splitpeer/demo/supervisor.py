"""What a service manager does in a hospital, for a demonstration: a daemon that dies is started again."""

from __future__ import annotations

import signal
import subprocess
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

PAUSE_S = 1.0
"""Before a start: what died may have left a port or a lock behind."""
MOST, WITHIN_S = 5, 60.0
"""This many restarts within this many seconds; then the supervisor gives up."""
STOP_S = 20.0
"""How long daemons may take to leave in good order."""
AGAIN = (3, 5)
"""Exit codes after which a new start may help: a wait that ended, a bug. With the others a person must look."""


@dataclass
class _Daemon:
    command: Sequence[str]
    log: Path
    terminal: bool
    process: subprocess.Popen[bytes]
    starts: deque[float] = field(default_factory=deque)
    due: float | None = None
    """When it is started again."""
    ended: int | None = None
    """Its exit code, once it stays down."""


class Supervisor:
    """Starts daemons, and again those that die. It ends nothing but its own children, by their pid.

    Args:
        environment: of all daemons.
        tell: called with one line for each that died.
        again: (name, exit code; negative: the signal that ended it) -> whether it is started again.
    """

    def __init__(
        self,
        environment: Mapping[str, str],
        tell: Callable[[str], None],
        again: Callable[[str, int], bool] = lambda name, code: code < 0 or code in AGAIN,
    ) -> None:
        self._environment, self._tell, self._again = environment, tell, again
        self._daemons: dict[str, _Daemon] = {}

    def start(
        self, name: str, first: Sequence[str], later: Sequence[str], log: Path, *, terminal: bool = False
    ) -> None:
        """Start a daemon.

        Args:
            first: its command.
            later: the command with which it is started again.
            log: takes its output; truncated now, and continued by later starts.
            terminal: its standard error goes to ours instead.
        """
        log.write_bytes(b"")
        self._daemons[name] = _Daemon(later, log, terminal, self._spawn(first, log, terminal))

    def pids(self) -> dict[str, int]:
        """Process ids of those that run."""
        return {name: d.process.pid for name, d in self._daemons.items() if d.process.poll() is None}

    def ended(self, name: str) -> int | None:
        """The exit code of a daemon that stays down; None: it runs, or soon will."""
        return self._daemons[name].ended

    def tend(self) -> None:
        """See who died, and start again whose time has come. To be called a few times a second."""
        now = time.monotonic()
        for name, daemon in self._daemons.items():
            code = daemon.process.poll()
            if code is None or daemon.ended is not None:
                continue
            if daemon.due is None:
                while daemon.starts and daemon.starts[0] < now - WITHIN_S:
                    daemon.starts.popleft()
                if not self._again(name, code):
                    daemon.ended = code
                elif len(daemon.starts) >= MOST:
                    daemon.ended = code
                    self._tell(
                        f"{name} {cause(code)}: started {MOST} times within {WITHIN_S:g} s, so no more"
                    )
                else:
                    daemon.due = now + PAUSE_S
            elif now >= daemon.due:
                before = daemon.process.pid
                daemon.process = self._spawn(daemon.command, daemon.log, daemon.terminal)
                daemon.due = None
                daemon.starts.append(now)
                self._tell(f"{name} (pid {before}) {cause(code)}: started again as pid {daemon.process.pid}")

    def stop(self, within: float = STOP_S) -> None:
        """End who still runs: first kindly, then by force. A Ctrl-C meanwhile is a wish for force."""
        processes = [daemon.process for daemon in self._daemons.values()]
        for process in processes:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + within
        try:
            for process in processes:
                process.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            pass
        finally:
            for process in processes:
                process.kill()
            for process in processes:
                process.wait()
            for daemon in self._daemons.values():
                daemon.ended = daemon.process.returncode

    def _spawn(self, command: Sequence[str], log: Path, terminal: bool) -> subprocess.Popen[bytes]:
        with log.open("ab") as file:
            return subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=None if terminal else file,
                env=self._environment,
                # Ctrl-C in the terminal is for the supervisor, which passes it on once: a second would mean "at once".
                process_group=0,
            )


def cause(code: int) -> str:
    """What became of a process, in words."""
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        return f"was killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"was killed by signal {-code}"
