"""What a daemon is doing, for people: `status.json` in `[peer] state`.

`Board` is written to by the roles and never holds them up; `splitpeer status` reads what it leaves. `Duty` has it
written. Moments are given twice, as UTC and on this machine's monotonic clock: ages are the reader's to compute. Never
in it: patients, names of image files.
"""

from __future__ import annotations

import json
import logging
import math
import numbers
import os
import socket
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Unpack, cast

from splitpeer.daemon.status_schema import (
    NAME,
    VERSION,
    Document,
    Ended,
    InferenceCounts,
    Moment,
    ServedCounts,
    SiteFigures,
    SiteStatus,
    StatusHead,
    Wait,
    Work,
    WorkStatus,
)
from splitpeer.logs import event
from splitpeer.settings.peer import PeerConfig
from splitpeer.storage import durable
from splitproto import __version__
from splitproto.errors import printable

log = logging.getLogger(__name__)

TICK_S, BEAT_S = 0.5, 5.0
"""It is written on change, at most once a tick, and with every beat, so that a hanging daemon can be distinguished
from a waiting one."""
RATE_S = 30.0
"""Rates are averages over this many seconds."""
LAST_WORD_S = 2.0
"""How long the last status may take to be written: a disk that hangs must not keep the process."""
_LONGEST = 300  # characters of a text
_COUNTERS = ("step", "octets_in", "octets_out")
_BOOT = Path("/proc/sys/kernel/random/boot_id")


class Board:
    """What one daemon shows. Everything here only remembers: it never raises and never waits.

    Args:
        config: `peer.toml`.
    """

    def __init__(self, config: PeerConfig) -> None:
        peer = config.peer
        self._path = peer.state / NAME
        self._head: StatusHead = {
            "version": VERSION,
            "agent": f"splitpeer/{__version__}",
            "role": peer.role,
            "site": peer.site,
            "federation": peer.federation,
            "modality": peer.held,
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "boot": boot(),
            "started": _moment(),
        }
        self.now = "starting"
        """What it does: the phase."""
        self._phase_since = _moment()
        self.is_ready = False
        self._work: Work = {}
        self._waits: dict[str, Wait] = {}
        self._sites: dict[str, SiteStatus] = {}
        self._ended: Ended | None = None
        self._paces: dict[tuple[str, str], _Pace] = {}
        self.changed = False
        """There is something to write."""
        self._pen: _Pen | None = None
        self._failed = False

    # --- reported by the roles -------------------------------------------------------------------------------

    def ready(self) -> None:
        """It works: a coordinator listens, a client has read its settings and data and dials."""
        self.is_ready = self.changed = True

    def phase(self, phase: str, **fields: Unpack[Work]) -> None:
        """What it does from now on, such as "gathering", "training", "draining"; and `fields` as in `set`."""
        self.set(**fields)
        if phase != self.now:
            self.now, self._phase_since = phase, _moment()

    def set(self, **fields: Unpack[Work]) -> None:
        """Figures of the work; counters become rates."""
        self._work.update(fields)
        self.changed = True

    def serving(
        self, run: str, step: int, last: float | None, *, serves: bool, **counts: Unpack[ServedCounts]
    ) -> None:
        """Segmentations; `last`: when one ended last, seconds since 1970."""
        self.set(serving={"run": run, "step": step, "serves": serves, "last": _past(last), **counts})

    def inference(
        self, last: float | None, answered_last: float | None, **counts: Unpack[InferenceCounts]
    ) -> None:
        """A site's part in segmentations; seconds since 1970."""
        self.set(inference={"last": _past(last), "answered_last": _past(answered_last), **counts})

    def pause(self) -> None:
        """The work has stopped; rates start again with it."""
        self._paces.clear()
        self.changed = True

    def waits(self, what: str | None, *, who: str = "", deadline_s: float | None = None) -> None:
        """What is waited for; since when is noted when `what` changes.

        Args:
            what: such as "activations of step 7"; None: nothing any more.
            who: at a coordinator, the site.
            deadline_s: how long from now; None: not known, or without end.
        """
        self.changed = True
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
        self.changed = True

    # --- the file --------------------------------------------------------------------------------------------

    def open(self) -> None:
        """From now on `write` writes. The folder must be held."""
        self._pen = _Pen(self._path)
        self.write()

    def end(self, cause: str) -> str:
        """The last word: how it stopped, in one line.

        Args:
            cause: empty: in good order.
        """
        self._ended = {"at": _moment(), "phase": self.now, "cause": cause}
        self.write()
        return f"stopped while {self.now}: {cause}" if cause else "stopped"

    def close(self) -> None:
        """No more; what was written last may take `LAST_WORD_S`."""
        if self._pen is not None:
            self._pen.close(LAST_WORD_S)
            self._pen = None

    def line(self) -> str:
        """All in one line."""
        step, steps = self._work.get("step"), self._work.get("steps")
        parts = [self.now, f"step {step} of {steps}" if steps is not None else ""]
        parts += [
            f"waits for {who + ': ' if who else ''}{one['what']}" for who, one in list(self._waits.items())
        ]
        return ", ".join(part for part in parts if part)

    def write(self) -> None:
        """Have the file replaced, soon, by a thread of its own."""
        self.changed = False
        if self._pen is None:
            return
        try:
            self._pen.write(json.dumps(_clean(self._document()), ensure_ascii=False, indent=1).encode())
        except Exception as error:  # whatever a caller reported: the work continues
            if not self._failed:
                event(log, "status.failed", logging.WARNING, cause=type(error).__name__)
            self._failed = True

    def _document(self) -> Document:
        return {
            **self._head,
            "written": _moment(),
            "ready": self.is_ready,
            "phase": self.now,
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
        """Write the remaining changes, for at most `timeout` seconds."""
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
                # Not synced: nobody needs it after a power loss.
                durable.replace(self._path, text, sync=False)
            except OSError as error:
                # Changing the time needs no room on a full disk: readers see a live daemon with old figures.
                with suppress(OSError):
                    os.utime(self._path)
                if not self._warned:
                    event(log, "status.failed", logging.WARNING, cause=f"{self._path}: {error.strerror}")
                self._warned = True


def boot() -> str:
    """Id of this boot of the machine, within which monotonic clocks compare. Empty if unknown."""
    try:
        return _BOOT.read_text().strip()
    except OSError:
        return ""


def _moment(ahead: float = 0.0) -> Moment:
    """`ahead` seconds from now, on both clocks."""
    at = time.time() + ahead
    text = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(at)) + f".{int(at % 1 * 1000):03d}Z"
    return {"at": text, "monotonic": round(time.monotonic() + ahead, 3)}


def _past(wall: float | None) -> Moment | None:
    """A moment of the wall clock."""
    return None if wall is None else _moment(wall - time.time())


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
