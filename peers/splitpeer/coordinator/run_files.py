"""What one run of a job leaves on the coordinator's disk: how it went, what came out.

`[output] folder` holds `metrics.jsonl`, `result.json` and `predictions/`; `[peer] state` the checkpoints and the
`RunRecord` of which run it is. What an earlier run left is given up when a new one opens.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from splitpeer.coordinator.record import RunRecord
from splitpeer.daemon import happenings as h
from splitpeer.errors import ConfigError, DataError
from splitpeer.federation.terms import run_folder
from splitpeer.settings.job import JobConfig
from splitpeer.settings.peer import PeerConfig
from splitpeer.storage import durable, reading
from splitpeer.storage.lines import Lines
from splitpeer.training.scores import Scores


@dataclass
class RunResult:
    """What a run of a job came to; `result.json`."""

    job: str
    run: str
    complete: bool = False
    step: int = 0
    steps: int = 0
    patients: int = 0
    validation: int = 0
    dice: Scores = field(default_factory=dict)
    """Dice of the last evaluation, with `made_from`."""
    made_from: list[str] = field(default_factory=list)
    """Seats that the last evaluation, and the masks in `predictions/`, were made from; of each patient, what it has."""
    scored: int = 0
    """Patients of the last evaluation."""
    scored_complete: int = 0
    """Those of them with every seat of the job."""
    hd95: Scores = field(default_factory=dict)
    """95 % Hausdorff distance in mm, of the evaluation after the last step."""
    volume_ml: dict[str, dict[str, float]] = field(default_factory=dict)
    """Mean volume of each region over the same patients, ml: "predicted" and "true"."""
    missing: dict[str, Scores] = field(default_factory=dict)
    """Dice without the seat named, where the job asks for it."""
    absences: dict[str, int] = field(default_factory=dict)
    """By site, the steps that this process of the coordinator made without it."""
    withdrawn: list[dict[str, Any]] = field(default_factory=list)
    """Patients that the run was made without: a handle, the first step without it, the site, the cause. No site: it was
    the coordinator's own mask, or (cause consent) somebody dropped the patient from the feature bank."""
    sites: dict[str, str] = field(default_factory=dict)
    """By site, the seats that it fills, in words."""
    seats: list[str] = field(default_factory=list)
    """Seats of the network, in order."""
    tls: str = ""
    bytes_per_step: int = 0
    """Octets on the wire in both directions, all sites, envelopes and TLS included; evaluation apart."""
    released_bytes: int = 0
    """With frozen encoders: octets on the wire in both directions, all sites, while this process collected releases;
    nothing is sent after that."""
    seconds: float = 0.0
    labels_at: str = ""
    """Site that holds the masks; empty: they are the coordinator's own."""
    told: list[str] = field(default_factory=list)
    """What that site told of its last evaluation, by name."""


class RunFiles:
    """The files of one run.

    Args:
        resume: take the job's last run (True), a new one (False), or the last if there is one of these terms (None).
        report: told which run was found.

    Raises:
        ConfigError: nothing to resume, the job has changed since, or results of another complete run are in the way.
    """

    def __init__(
        self, config: PeerConfig, job: JobConfig, *, resume: bool | None, report: h.Reporter
    ) -> None:
        self.record = RunRecord(config, job, resume, report)
        self.output: Path = job.output.folder
        if self.record.state == "over" and self.result() is None:
            # Its results were removed: somebody makes room for others.
            self.record = RunRecord(config, job, False, report)
        if resume is None and self.record.state == "new" and (lying := self._read()) and lying.complete:
            # Weeks of training are not removed because a line of job.toml changed.
            raise ConfigError(
                f"{self.output / 'result.json'}: the results of a complete run of another job.toml: "
                "name another [output] folder, or let --fresh remove them"
            )
        self.run = self.record.run
        self.checkpoints = run_folder(config.peer.state, job.job.name, self.run)
        self._metrics = Lines(self.output / "metrics.jsonl")
        self.opened = False
        """From now on there is something to resume."""

    @property
    def predictions(self) -> Path:
        """Folder of the masks of patients held out."""
        return self.output / "predictions"

    def prepare(self) -> None:
        """Find out before sites wait whether results can be written."""
        with _writing(self.output, "[output] folder"):
            self.output.mkdir(parents=True, exist_ok=True)

    def insist_on(self, held: Collection[int]) -> None:
        """SP-11-39: a run is not begun again under its name.

        Args:
            held: steps of the coordinator's own checkpoints.

        Raises:
            DataError: the run had begun, and none is left.
        """
        if self.record.patients and not held:
            raise DataError(
                f"no whole checkpoint of the run is left in {self.checkpoints}: bring one back, or start "
                "with --fresh"
            )

    def open(
        self, *, resumed: bool, patients: Mapping[bytes, Mapping[str, str]], held_out: Collection[bytes]
    ) -> None:
        """Note the run as the one to resume, with its patients; a new one removes the results of the one before."""
        self.record.begin(patients, held_out)
        if resumed:
            self._metrics.resume()
        else:
            with _writing(self.output, "[output] folder"):
                for old in (
                    self.output / "result.json",
                    self.output / "training.png",
                    *self.predictions.glob("*.nii.gz"),
                ):
                    old.unlink(missing_ok=True)
                self._metrics.begin()
        self.opened = True

    def metric(self, **values: Any) -> None:
        """One line of `metrics.jsonl`; on a full disk it waits, and the run continues."""
        self._metrics.add(**values)

    def sync(self) -> None:
        """Lines written so far survive a loss of power from here on, where the disk takes them."""
        self._metrics.sync()

    def write(self, result: RunResult) -> None:
        """`result.json`, whole or not at all, also after a loss of power. Raises ConfigError or DiskTrouble."""
        self._metrics.flush()
        self._metrics.sync()
        path = self.output / "result.json"
        with _writing(path, "[output] folder"):
            durable.replace(path, (json.dumps(asdict(result), indent=2) + "\n").encode(), mode=0o666)

    def result(self) -> RunResult | None:
        """What `result.json` says of this run, if it does."""
        result = self._read()
        return result if result is not None and result.run == self.record.run.hex() else None

    def _read(self) -> RunResult | None:
        try:
            found = reading.document(self.output / "result.json")
            # Another version may have written figures without a name here; its results count all the same.
            return RunResult(
                **{field.name: found[field.name] for field in fields(RunResult) if field.name in found}
            )
        except (OSError, ValueError, TypeError):
            return None


@contextmanager
def _writing(path: Path, key: str) -> Iterator[None]:
    """A disk that is full or closed to us is no bug: one line that names the path and the key."""
    try:
        yield
    except OSError as error:
        raise durable.refusal(error, f"{path}:", key) from None
