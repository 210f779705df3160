"""What a daemon is doing, for people: `status.json` in `[peer] state`, and a line for systemd.

`Board` is written to by the roles and never holds them up; `splitpeer status` reads what it leaves. The file is
replaced as a whole, on change at most every half second and every five seconds anyway, so that a daemon that hangs
can be told from one that waits. Moments are given twice, as UTC and on this machine's monotonic clock: ages are the
reader's to compute. Never in it: patients, names of image files.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import numbers
import os
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any, Self, Unpack, cast

from splitpeer.daemon.lock import StateLock, holder
from splitpeer.daemon.status_schema import (
    NAME,
    VERSION,
    Document,
    Ended,
    Head,
    Moment,
    SiteFigures,
    SiteStatus,
    Wait,
    Work,
    WorkStatus,
)
from splitpeer.daemon.systemd import Notifier
from splitpeer.errors import ConfigError, ConnectionRefused, DeadlinePassed, JobFailed
from splitpeer.logs import event
from splitpeer.settings.peer import PeerConfig
from splitpeer.storage import durable
from splitproto import SplitprotoError, __version__
from splitproto.errors import printable

log = logging.getLogger(__name__)

TICK_S, BEAT_S = 0.5, 5.0
RATE_S = 30.0
"""Rates are those of the last so many seconds."""
LAST_WORD_S = 2.0
"""How long the last status may take to be written: a disk that hangs must not keep the process."""
_SAYABLE = (ConnectionRefused, DeadlinePassed, JobFailed, SplitprotoError)
"""Errors whose text names no file, hence no patient."""
_LONGEST = 300  # characters of a text
_COUNTERS = ("step", "octets_in", "octets_out")
_BOOT = Path("/proc/sys/kernel/random/boot_id")


class Board:
    """What one daemon shows. Everything but `on_duty` only remembers: it never raises and never waits.

    Args:
        config: `peer.toml`.
    """

    def __init__(self, config: PeerConfig) -> None:
        peer = config.peer
        self._folder = peer.state
        self._lock = StateLock(peer.state)
        self._notifier = Notifier()
        self._head: Head = {
            "version": VERSION,
            "agent": f"splitpeer/{__version__}",
            "role": peer.role,
            "site": peer.site,
            "federation": peer.federation,
            "modality": peer.modality,
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "boot": boot(),
            "started": _moment(),
        }
        self._phase, self._phase_since = "starting", _moment()
        self._ready = False
        self._work: Work = {}
        self._waits: dict[str, Wait] = {}
        self._sites: dict[str, SiteStatus] = {}
        self._ended: Ended | None = None
        self._paces: dict[tuple[str, str], _Pace] = {}
        self._changed = False
        self._pen: _Pen | None = None
        self._failed = False

    # --- told by the roles -------------------------------------------------------------------------------

    def ready(self) -> None:
        """It works: a coordinator listens, a client has read its settings and data and dials."""
        self._ready = self._changed = True
        self._notifier.ready()

    def phase(self, phase: str, **fields: Unpack[Work]) -> None:
        """What it does from now on, such as "gathering", "training", "draining"; and `fields` as in `set`."""
        self.set(**fields)
        if phase != self._phase:
            self._phase, self._phase_since = phase, _moment()
            if phase == "draining":
                self._notifier.stopping()
            self._notifier.status(self.line())

    def set(self, **fields: Unpack[Work]) -> None:
        """Figures of the work; counters become rates."""
        self._work.update(fields)
        self._changed = True

    def pause(self) -> None:
        """The work stands still; rates start again with it."""
        self._paces.clear()
        self._changed = True

    def waits(self, what: str | None, *, who: str = "", deadline_s: float | None = None) -> None:
        """What is waited for; since when is noted when `what` changes.

        Args:
            what: such as "activations of step 7"; None: nothing any more.
            who: at a coordinator, the site.
            deadline_s: how long from now; None: not known, or without end.
        """
        self._changed = True
        if what is None:
            self._waits.pop(who, None)
            return
        before = self._waits.get(who)
        since = before["since"] if before is not None and before["what"] == what else _moment()
        until = None if deadline_s is None else _moment(deadline_s)
        self._waits[who] = {"who": who, "what": what, "since": since, "until": until}

    def site(self, name: str, **fields: Unpack[SiteFigures]) -> None:
        """A coordinator's: what is known of a site. Since when it is in its `state` is noted when that changes;
        octets_in and octets_out count over all links.
        """
        known = self._sites.setdefault(name, {})
        if "state" in fields and fields["state"] != known.get("state"):
            known["state_since"] = _moment()
        if "link_since" in fields:
            known["link_since"] = _instant(fields.pop("link_since"))
        if "absent_since" in fields:
            known["absent_since"] = _instant(fields.pop("absent_since"))
        known.update(cast("SiteStatus", fields))
        self._changed = True

    # --- on duty -------------------------------------------------------------------------------------------

    @contextmanager
    def held(self) -> Iterator[Self]:
        """Hold the state folder, and show what is told, until the block is left; a block in a block changes nothing.

        Raises:
            ConfigError: another splitpeer holds the folder, or it cannot be used.
        """
        if self._pen is not None:
            yield self
            return
        self._take()
        self._pen = _Pen(self._folder / NAME)
        self._write()
        cause = ""
        try:
            yield self
        except BaseException as error:
            cause = str(error) if isinstance(error, _SAYABLE) else type(error).__name__
            raise
        finally:
            self._ended = {"at": _moment(), "phase": self._phase, "cause": cause}
            self._notifier.stopping()
            self._notifier.status(f"stopped while {self._phase}: {cause}" if cause else "stopped")
            self._write()
            self.forsake()

    @asynccontextmanager
    async def on_duty(self) -> AsyncIterator[None]:
        """`held`, and give a sign of life from the event loop once a tick."""
        with self.held():
            self._notifier.explain_hangs()
            beating = asyncio.create_task(self._beat())
            try:
                yield
            finally:
                beating.cancel()
                await asyncio.wait((beating,))

    def forsake(self) -> None:
        """Let go of the folder as it is, as the kernel does for a process that died. `held` ends with it."""
        if self._pen is not None:
            self._pen.close(LAST_WORD_S)
            self._pen = None
        self._lock.release()

    def _take(self) -> None:
        # Somebody who only looks (`holder`) keeps it for a moment.
        for _ in range(10):
            if self._lock.take():
                return
            time.sleep(0.05)
        held = holder(self._folder)
        who = f" (pid {held.pid})" if held and held.pid else ""
        raise ConfigError(
            f"another splitpeer{who} uses this state folder: {self._folder}: stop it (splitpeer drain), "
            "or give this peer a [peer] state of its own"
        )

    async def _beat(self) -> None:
        """In the event loop, so that what stops the loop stops the signs of life."""
        watchdog = self._notifier.watchdog_s
        tick = min(TICK_S, watchdog) if watchdog else TICK_S
        written = fed = told = time.monotonic()
        self._notifier.alive()
        while True:
            await asyncio.sleep(tick)
            now = time.monotonic()
            if watchdog and now - fed >= watchdog - tick:
                self._notifier.alive()
                fed = now
            if self._changed or now - written >= BEAT_S:
                self._write()
                written = now
            if now - told >= BEAT_S:
                self._notifier.status(self.line())
                told = now

    def line(self) -> str:
        """All in one line."""
        step, steps = self._work.get("step"), self._work.get("steps")
        parts = [self._phase, f"step {step} of {steps}" if steps is not None else ""]
        parts += [
            f"waits for {who + ': ' if who else ''}{one['what']}" for who, one in list(self._waits.items())
        ]
        return ", ".join(part for part in parts if part)

    def _write(self) -> None:
        self._changed = False
        if self._pen is None:
            return
        try:
            self._pen.write(json.dumps(_clean(self._document()), ensure_ascii=False, indent=1).encode())
        except Exception as error:  # whatever a caller told us: the work goes on
            if not self._failed:
                event(log, "status.failed", logging.WARNING, cause=type(error).__name__)
            self._failed = True

    def _document(self) -> Document:
        return {
            **self._head,
            "written": _moment(),
            "ready": self._ready,
            "phase": self._phase,
            "phase_since": self._phase_since,
            "work": cast("WorkStatus", self._with_rates("", self._work)),
            "waits": [one for _, one in sorted(self._waits.items())],
            "sites": {
                name: cast("SiteStatus", self._with_rates(name, known))
                for name, known in sorted(self._sites.items())
            },
            "ended": self._ended,
        }

    def _with_rates(self, whose: str, figures: Mapping[str, Any]) -> dict[str, Any]:
        shown = dict(figures)
        for name in _COUNTERS:
            if isinstance(value := shown.get(name), int):
                pace = self._paces.setdefault((whose, name), _Pace())
                shown[f"{name}_per_s"] = pace.rate(value)
        return shown


class _Pace:
    """How fast a counter grows."""

    def __init__(self) -> None:
        self._marks: list[tuple[float, int]] = []

    def rate(self, value: int) -> float | None:
        """Per second, now that the counter is at `value`; None: not known yet."""
        now, marks = time.monotonic(), self._marks
        if marks and value < marks[-1][1]:  # a rollback
            marks.clear()
        if not marks or value != marks[-1][1]:
            marks.append((now, value))
        # One mark older than the window stays: a step may take longer than that.
        while len(marks) > 2 and marks[1][0] < now - RATE_S:
            del marks[0]
        if len(marks) < 2:
            return None
        (first, low), (last, high) = marks[0], marks[-1]
        # A pause that is long for this pace counts, a usual one does not.
        idle = now - last
        span = last - first + (idle if idle > max(3 * TICK_S, 3 * (last - first) / (len(marks) - 1)) else 0.0)
        return (high - low) / max(span, 1e-3)


class _Pen:
    """Replaces one file by the newest of what it was given, in a thread: a slow disk must not hold up heartbeats."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._condition = threading.Condition()
        self._text: bytes | None = None
        self._closing = self._warned = False
        # A daemon thread: the interpreter does not wait for a disk that hangs.
        self._thread = threading.Thread(target=self._run, name="status", daemon=True)
        self._thread.start()

    def write(self, text: bytes) -> None:
        with self._condition:
            self._text = text
            self._condition.notify()

    def close(self, timeout: float) -> None:
        """Write what is left, for at most `timeout` seconds."""
        with self._condition:
            self._closing = True
            self._condition.notify()
        self._thread.join(timeout)

    def _run(self) -> None:
        while True:
            with self._condition:
                self._condition.wait_for(lambda: self._text is not None or self._closing)
                text, self._text = self._text, None
            if text is None:
                return
            try:
                # Not synced: after a power loss nobody asks for it.
                durable.replace(self._path, text, sync=False)
            except OSError as error:
                # A new time needs no room on a full disk: whoever looks sees a daemon that lives, and old figures.
                with suppress(OSError):
                    os.utime(self._path)
                if not self._warned:
                    event(log, "status.failed", logging.WARNING, cause=f"{self._path}: {error.strerror}")
                self._warned = True


def boot() -> str:
    """Of this start of the machine: monotonic clocks compare within one only. Empty if it cannot be known."""
    try:
        return _BOOT.read_text().strip()
    except OSError:
        return ""


def _moment(ahead: float = 0.0) -> Moment:
    """`ahead` seconds from now, on both clocks."""
    at = time.time() + ahead
    text = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(at)) + f".{int(at % 1 * 1000):03d}Z"
    return {"at": text, "monotonic": round(time.monotonic() + ahead, 3)}


def _instant(monotonic: float) -> Moment:
    return _moment(monotonic - time.monotonic())


def _clean(value: Any) -> Any:
    """As JSON has it; texts that peers chose steer no terminal."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {printable(str(key)): _clean(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_clean(item) for item in value]
    return printable(str(value))[:_LONGEST]
