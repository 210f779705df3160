"""What can be seen of a daemon from outside: its lock, and the `status.json` that its `Board` left."""

from __future__ import annotations

import calendar
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import ConfigDict

from splitpeer.daemon import status_schema as schema
from splitpeer.daemon.board import BEAT_S, boot
from splitpeer.daemon.lock import Holder, holder
from splitpeer.daemon.status_schema import NAME, VERSION, Document, SiteStatus, Wait, WorkStatus
from splitpeer.errors import ConfigError
from splitpeer.settings.loading import Settings
from splitpeer.settings.peer import Peer
from splitpeer.storage import reading
from splitproto.errors import printable

SILENT_S = 3 * BEAT_S
"""A daemon that has written nothing for so long does not answer."""
STALE_S = 2.0
"""A file touched this much later than its content says could not be replaced by a newer one."""
State = Literal["running", "silent", "stopped", "died", "never"]


class PeerHead(Settings):
    """The parts of `peer.toml` that say who and where; the rest may be wrong by now, or need torch to be checked."""

    model_config = ConfigDict(frozen=True, extra="ignore")
    PATHS: ClassVar[frozenset[str]] = frozenset({"peer.state"})

    peer: Peer

    @classmethod
    def load(cls, path: Path, overrides: Mapping[str, Any] | None = None) -> Self:
        """Read ``peer.toml``. Raises ConfigError: `Settings.read`."""
        return cls.read(path, overrides, os.environ)

    @classmethod
    def path_defaults(cls, raw: Mapping[str, Any]) -> dict[str, str]:
        return {"peer.state": "state"}


@dataclass(frozen=True)
class Seen:
    """One daemon at one moment."""

    config: Path
    site: str
    role: str
    state: State
    """`silent`: it holds its folder but does not report; `died`: it is gone and did not say why."""
    holder: Holder | None
    document: Mapping[str, Any]
    """`status.json`; empty if there is none."""
    now: float
    """Wall clock, seconds."""
    monotonic: float | None
    """Monotonic time in this boot of the machine; None if the document is from another boot."""
    touched: float | None = None
    """When the daemon last tried to write, wall clock; None: it never wrote."""
    other_version: int | None = None
    """That of a `status.json` which is not read, since another version of splitpeer wrote it; None: there is none."""

    @property
    def runs(self) -> bool:
        """A process holds the folder."""
        return self.holder is not None

    @property
    def pid(self) -> int | None:
        """Process id of the holder of the folder."""
        return self.holder.pid if self.holder is not None else None

    @property
    def phase(self) -> str:
        """As the daemon said."""
        return str(self.whole["phase"] or "")

    @property
    def whole(self) -> Document:
        """The document with every key; None where it says nothing."""
        return schema.document(self.document)

    @property
    def work(self) -> WorkStatus:
        """Figures of the job, with every key."""
        return schema.work(self.whole["work"])

    @property
    def further(self) -> Mapping[str, Any]:
        """Figures of the job that have no name here: another version wrote them."""
        return {key: value for key, value in _map(self.whole["work"]).items() if key not in self.work}

    @property
    def sites(self) -> Mapping[str, SiteStatus]:
        """A coordinator's sites by name."""
        return {name: schema.site(known) for name, known in _map(self.whole["sites"]).items()}

    @property
    def waits(self) -> Sequence[Wait]:
        """The waits, each with the peer it depends on."""
        listed: object = self.whole["waits"]
        return [schema.wait(one) for one in listed] if isinstance(listed, list) else []

    @property
    def cause(self) -> str:
        """Why it stopped; empty if in good order."""
        return str(schema.ended(self.whole["ended"])["cause"] or "")

    @property
    def step(self) -> str:
        """Such as `step 12 of 300`; empty if there is none."""
        step, steps = self.work["step"], self.work["steps"]
        if step is None:
            return ""
        return f"step {step}" if steps is None else f"step {step} of {steps}"

    def age(self, moment: object) -> float | None:
        """Seconds since a moment of the document; negative: until it. None if there is none."""
        then = schema.moment(moment)["monotonic"]
        if self.monotonic is not None and isinstance(then, int | float):
            return self.monotonic - then
        # Until the clock is set after a reboot, or after it was changed, this is the best available.
        at = _wall(moment)
        return None if at is None else self.now - at

    @property
    def last_sign(self) -> float | None:
        """Seconds since the daemon wrote last, or tried to."""
        written = self.age(self.whole["written"])
        return written if self.stale is None or self.touched is None else max(0.0, self.now - self.touched)

    @property
    def stale(self) -> float | None:
        """Age in seconds of what is shown, where a newer status found no room on the disk; None: it is up to date."""
        # Both by the wall clock of the daemon's own moment, whatever that clock did since.
        at = _wall(self.whole["written"])
        if at is None or self.touched is None or self.touched - at <= STALE_S:
            return None
        return self.age(self.whole["written"])

    def as_json(self) -> dict[str, Any]:
        """For programs: the document, the findings, and an age in seconds for every moment."""
        return {
            "config": str(self.config),
            "site": self.site,
            "role": self.role,
            "state": self.state,
            "pid": self.pid,
            "last_sign_s": _rounded(self.last_sign),
            "stale_s": _rounded(self.stale),
            **({} if self.other_version is None else {"other_version": self.other_version}),
            **{
                key: self._aged(value)
                for key, value in self.document.items()
                if key not in ("site", "role", "pid")
            },
        }

    def _aged(self, value: Any) -> Any:
        if isinstance(value, dict):
            if value.keys() == schema.Moment.__annotations__.keys():
                return {"at": value["at"], "age_s": _rounded(self.age(value))}
            return {key: self._aged(item) for key, item in value.items()}
        return [self._aged(item) for item in value] if isinstance(value, list) else value


def look(head: PeerHead) -> Seen:
    """See one daemon.

    Raises:
        ConfigError: its state folder may not be read.
    """
    folder = head.peer.state
    # A daemon that starts or ends while we look is checked again.
    for _ in range(3):
        held, document, touched = holder(folder), _read(folder / NAME), _touched(folder / NAME)
        if holder(folder) == held:
            break
    if held is not None and held.pid not in (None, document.get("pid")):
        document = {}  # of the one before
    version = document.get("version", VERSION)
    if version != VERSION:
        document = {}
    now, same = time.time(), document.get("boot") == boot()
    seen = Seen(
        head.source,
        head.peer.site,
        head.peer.role,
        "never",
        held,
        document,
        now,
        time.monotonic() if same else None,
        touched,
        version if type(version) is int and version != VERSION else None,
    )
    return replace(seen, state=_state(seen))


def _state(seen: Seen) -> State:
    if seen.holder is None:
        if not seen.document:
            return "never"
        return "stopped" if seen.document.get("ended") else "died"
    quiet = seen.last_sign
    if quiet is None and seen.other_version is not None and seen.touched is not None:
        quiet = seen.now - seen.touched
    if quiet is None:
        quiet = seen.now - seen.holder.since
    return "running" if quiet <= SILENT_S else "silent"


def _touched(path: Path) -> float | None:
    try:
        return path.lstat().st_mtime
    except OSError:
        return None


def _read(path: Path) -> dict[str, Any]:
    try:
        found = _printable(reading.document(path))
    except (FileNotFoundError, ValueError):
        return {}
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be read ({error.strerror}): run this as the daemon's user, or as root"
        ) from None
    return found if isinstance(found, dict) and "version" in found else {}


def _printable(value: Any) -> Any:
    """Text that cannot control the reader's terminal: peers, and the file's owner, choose some of it."""
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, list):
        return [_printable(item) for item in value]
    return {printable(k): _printable(v) for k, v in value.items()} if isinstance(value, dict) else value


def _wall(moment: object) -> float | None:
    try:
        return float(
            calendar.timegm(time.strptime(str(schema.moment(moment)["at"])[:19], "%Y-%m-%dT%H:%M:%S"))
        )
    except ValueError:
        return None


def _map(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 1)
