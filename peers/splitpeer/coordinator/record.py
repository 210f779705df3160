"""Which run of a job this is: `<job>.run.json` in the coordinator's `[peer] state`.

A restarted coordinator finds here what it was doing: the run to resume, its patients, and whether only the
byes are left.
"""

from __future__ import annotations

import hashlib
import json
import logging
import secrets
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from splitpeer.daemon import happenings as h
from splitpeer.daemon.sinks.log import LogSink
from splitpeer.errors import ConfigError
from splitpeer.federation.terms import Codings, leads_to, run_folder
from splitpeer.settings.job import JobConfig
from splitpeer.settings.peer import PeerConfig
from splitpeer.storage import durable, reading
from splitpeer.storage.bank import FOLDER as BANK
from splitpeer.storage.bank import INDEX
from splitpeer.training.forms import shown
from splitproto.causes import OF_A_PATIENT
from splitproto.errors import CodecError
from splitproto.partners import Keys
from splitproto.records import CODED

log = logging.getLogger(__name__)
SUFFIX = ".run.json"
State = Literal["new", "running", "serving", "farewell", "over"]


@dataclass(frozen=True)
class Withdrawal:
    """A patient without which a run continues."""

    key: bytes
    step: int
    """The first step without it."""
    site: str
    """Whose file it was; empty: the coordinator's own mask."""
    cause: str
    """From `splitproto.causes.OF_A_PATIENT`."""

    def written(self) -> dict[str, Any]:
        """As JSON has it."""
        return {**asdict(self), "key": self.key.hex()}

    @classmethod
    def read(cls, item: dict[str, Any]) -> Withdrawal:
        """The inverse. Raises ValueError, TypeError or KeyError."""
        if item["cause"] not in OF_A_PATIENT:
            raise ValueError
        return cls(bytes.fromhex(item["key"]), int(item["step"]), str(item["site"]), item["cause"])


class RunRecord:
    """One run's.

    Args:
        resume: True: the last run, or an error. False: a new one. None: the last one of the same terms, also one that
            is over; a new one where there is none.
        report: told which run was found.

    Raises:
        ConfigError: nothing to resume, or the job has changed since.
    """

    def __init__(self, config: PeerConfig, job: JobConfig, resume: bool | None, report: h.Reporter) -> None:
        self._report = report.to(LogSink(log))
        self._path = config.peer.state / f"{job.job.name}{SUFFIX}"
        self._terms, self._wire = terms_of(job), job.wire
        self.run = secrets.token_bytes(16)
        self.state: State = "new"
        """new: not begun. running. serving: trained and scored; sites stay. farewell: the same;
        sites are being told that it is over. over: nothing is left to do."""
        self.patients: Mapping[bytes, Mapping[str, str]] = {}
        """Patients of the run: which site fills which seat of each."""
        self.held_out: frozenset[bytes] = frozenset()
        """Those of them who are evaluated and never trained on."""
        self.withdrawn: tuple[Withdrawal, ...] = ()
        """What the run is made without."""
        self.holders: dict[str, bytes] = {}
        """By site, the key that its part in the run is bound to (SP-11.14)."""
        self.fusion_keys: dict[str, Keys] = {}
        """By site, its public keys for a secure sum: all are here when the run begins, and none changes
        (SP-11.18-9)."""
        self.trained = False
        """Whether sites were told that the key of training is not needed any more (SP-11.18-16)."""
        self.epoch = 1
        """Of the service (SP-11.18-18)."""
        self.epoch_since = time.time()
        """When it began, or, the first, before any site had a key for it."""
        self.told: tuple[str, ...] = ()
        """Sites that know that the run is complete."""
        self.codings: Codings | None = None
        """Of the run, from its beginning to its end; None: not decided yet."""
        if resume is None:
            self._go_on()
        elif resume:
            self._take(self._read())

    def begin(self, patients: Mapping[bytes, Mapping[str, str]], held_out: Collection[bytes] = ()) -> None:
        """SP-11-39: from now on there is something to resume. Raises ConfigError or DiskTrouble."""
        if self.state == "new":
            self._set_aside()
        self.patients = {key: dict(filled) for key, filled in patients.items()}
        self.held_out = frozenset(held_out)
        self._write("running")

    def withdraw(self, withdrawn: Sequence[Withdrawal]) -> None:
        """SP-11.13-4: these, and no others, count from here on. Raises ConfigError or DiskTrouble."""
        self.withdrawn = tuple(withdrawn)
        self._write(self.state)

    def bind(self, site: str, holder: bytes) -> None:
        """SP-11.14-3: the part of `site` is `holder`'s, also after a restart; before the run begins, until then."""
        if self.holders.get(site) != holder:
            self.holders[site] = holder
            if self.state in ("running", "serving", "farewell"):
                self._write(self.state)

    def readmit(self, site: str) -> None:
        """SP-11.14-5: the next to join as `site` takes its part in the run."""
        if self.holders.pop(site, None) is not None and self.state != "new":
            self._write(self.state)

    def serve(self) -> None:
        """The run is complete, and the sites may ask for segmentations."""
        self._write("serving")

    def farewell(self) -> None:
        """The run is complete except for saying so to the sites."""
        self._write("farewell")

    def settle(self, epoch: int, *, trained: bool, now: float) -> None:
        """SP-11.18-16, SP-11.18-18: before any site is told, as there is no way back from it."""
        self.epoch_since = now if epoch != self.epoch else self.epoch_since
        self.epoch, self.trained = epoch, trained
        self._write(self.state)

    def note_told(self, told: Sequence[str]) -> None:
        """These sites know that their part is over; with frozen encoders while the run goes on (SP-11.17-8)."""
        self.told = tuple(sorted({*self.told, *told}))
        if self.state != "new":
            self._write(self.state)

    def over(self) -> None:
        """Nothing is left to do."""
        self._write("over")

    # --- inside ----------------------------------------------------------------------------------------

    def _go_on(self) -> None:
        """The last run, if it is this job's."""
        if not self._path.exists():
            return
        last = self._read()
        over = last.get("state", "over") == "over"
        if last.get("terms") != self._terms:
            if over:
                return
            # What sites show once cannot be collected again: a line that was edited must not cost it.
            run = run_folder(
                self._path.parent, self._path.name.removesuffix(SUFFIX), bytes.fromhex(last["run"])
            )
            if (run / BANK / INDEX).exists():
                raise ConfigError(
                    f"job.toml has changed since run {last['run'][:12]}, which is not complete and has a feature "
                    "bank; change it back, or give the bank up with --fresh"
                )
            self._report(h.RunLeft(last["run"]))
            return
        self._take(last)
        if over:
            self.state = "over"
        else:
            self._report(h.RunFound(last["run"]))

    def _set_aside(self) -> None:
        """The record of a run that is given up stays, under the run's name: with it somebody can go back."""
        try:
            last = self._read()
        except ConfigError:
            return  # there is none, or it is worth nothing
        if last["run"] != self.run.hex() and last.get("state") != "over":
            kept = self._path.with_name(
                f"{self._path.name.removesuffix(SUFFIX)}-{bytes.fromhex(last['run']).hex()}{SUFFIX}"
            )
            try:
                durable.replace(kept, self._path.read_bytes())
            except OSError as error:
                raise durable.refusal(error, f"{kept}:", "[peer] state") from None
            self._report(h.RecordSetAside(kept.name))

    def _read(self) -> dict[str, Any]:
        try:
            last = reading.document(self._path)
            if len(bytes.fromhex(last["run"])) != 16:
                raise ValueError
        except FileNotFoundError:
            raise ConfigError(
                f"nothing to resume: {self._path} does not exist; start without --resume"
            ) from None
        except (OSError, ValueError, KeyError, TypeError):
            raise ConfigError(f"{self._path} cannot be read; start with --fresh") from None
        if last.get("state") != "over" and (
            isinstance(last.get("patients"), list) or (last.get("patients") and "held_out" not in last)
        ):
            raise ConfigError(
                f"{self._path} is of an older splitpeer: finish the run with that one, or start with --fresh"
            )
        return last

    def _take(self, last: dict[str, Any]) -> None:
        if last.get("terms") != self._terms:
            raise ConfigError(
                "job.toml has changed since the run that is to be resumed; change it back, "
                "or start with --fresh"
            )
        if self._wire.auto and last.get("codings") is None:
            raise ConfigError(
                '[wire] "auto" was written after the run that is to be resumed began: change it back, or start '
                "with --fresh"
            )
        try:
            self.run = bytes.fromhex(last["run"])
            # A run that is over can still be asked for: it ends at once, with the same results.
            said = last.get("state")
            self.state = said if said in ("serving", "farewell") else "running"
            self.patients = _patients(last.get("patients", {}))
            self.held_out = frozenset(map(bytes.fromhex, last.get("held_out", ())))
            self.withdrawn = tuple(Withdrawal.read(item) for item in last.get("withdrawn", ()))
            self.told = tuple(last.get("told", ()))
            self.holders = {site: bytes.fromhex(key) for site, key in last.get("holders", {}).items()}
            self.fusion_keys = {site: Keys.read(keys) for site, keys in last.get("fusion_keys", {}).items()}
            self.trained, self.epoch = bool(last.get("trained", False)), int(last.get("epoch", 1))
            self.epoch_since = float(last.get("epoch_since", self.epoch_since))
            self.codings = codings_in(last)
        except (ValueError, TypeError, KeyError, AttributeError):
            raise ConfigError(f"{self._path} cannot be read; start with --fresh") from None
        if self.codings is not None and not leads_to(self._wire, self.codings):
            # Its sites would decline it: SP-11-2.
            there, back = map(shown, self.codings)
            raise ConfigError(
                "[wire] has changed since the run that is to be resumed began, in which activations travel as "
                f"{there} and gradients as {back}: change it back, or start with --fresh"
            )

    def _write(self, state: State) -> None:
        self.state = state
        value = {
            "run": self.run.hex(),
            "terms": self._terms,
            "state": state,
            "told": self.told,
            "codings": None if self.codings is None else self.codings._asdict(),
            "holders": {site: key.hex() for site, key in self.holders.items()},
            "fusion_keys": {site: keys.written() for site, keys in self.fusion_keys.items()},
            "trained": self.trained,
            "epoch": self.epoch,
            "epoch_since": self.epoch_since,
            "patients": {key.hex(): filled for key, filled in self.patients.items()},
            "held_out": sorted(key.hex() for key in self.held_out),
            "withdrawn": [withdrawal.written() for withdrawal in self.withdrawn],
        }
        try:
            durable.make_folder(self._path.parent)
            durable.replace(self._path, (json.dumps(value, indent=1) + "\n").encode())
        except OSError as error:
            raise durable.refusal(error, f"{self._path}:", "[peer] state") from None


def _patients(written: Mapping[str, Mapping[str, str]]) -> dict[bytes, dict[str, str]]:
    """Raises ValueError, TypeError or AttributeError."""
    return {
        bytes.fromhex(key): {str(k): str(v) for k, v in filled.items()} for key, filled in written.items()
    }


def codings_in(record: Mapping[str, Any]) -> Codings | None:
    """Those of the run; None: it began before they were noted. Raises ValueError or TypeError."""
    if (written := record.get("codings")) is None:
        return None
    try:
        return Codings(**{
            way: None if one is None else CODED.read(one, way) for way, one in dict(written).items()
        })  # fmt: skip
    except CodecError as error:
        raise ValueError(str(error)) from None


def terms_of(job: JobConfig) -> str:
    """Digest of all that a run must keep from start to end: two halves of two jobs make no whole."""
    kept = job.model_dump(mode="json", include={"job", "sites", "seats", "task", "model", "data", "training"})
    for free in ("ahead", "checkpoint_every", "keep_checkpoints"):
        del kept["training"][free]
    del kept["data"]["max_withdrawn"]
    # As runs have it that began before there was anything else.
    if job.training.bank is None:
        del kept["training"]["bank"]
    if not job.training.frozen:
        del kept["training"]["encoders"]
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()
