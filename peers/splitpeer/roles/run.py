"""What one run of a job leaves on the coordinator's disk: which run it was, how it went, what came out.

`[peer] state` holds `<job>.run.json` (the run to resume) and the checkpoints; `[output] folder` holds
`metrics.jsonl`, `result.json` and `predictions/`. What an earlier run left is given up when a new one opens.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from splitpeer.config import JobConfig, PeerConfig
from splitpeer.errors import ConfigError
from splitpeer.roles.terms import run_folder


@dataclass
class Result:
    """What a run of a job came to; `result.json`."""

    job: str
    run: str
    complete: bool = False
    step: int = 0
    steps: int = 0
    patients: int = 0
    validation: int = 0
    dice: dict[str, float] = field(default_factory=dict)
    sites: dict[str, str] = field(default_factory=dict)
    tls: str = ""
    bytes_per_step: int = 0
    """Octets on the wire in both directions, all sites, envelopes and TLS included; evaluation apart."""
    seconds: float = 0.0


class RunFiles:
    """The files of one run.

    Args:
        resume: take the job's last run instead of a new one.

    Raises:
        ConfigError: nothing to resume, or the job has changed since.
    """

    def __init__(self, config: PeerConfig, job: JobConfig, *, resume: bool) -> None:
        self._job = job
        self._record = config.peer.state / f"{job.job.name}.run.json"
        self.output: Path = job.output.folder
        self.run = self._last() if resume else secrets.token_bytes(16)
        self.checkpoints = run_folder(config.peer.state, job.job.name, self.run)
        self.opened = False
        """From here on there is something to resume."""

    @property
    def predictions(self) -> Path:
        """Folder of the masks of patients held out."""
        return self.output / "predictions"

    def prepare(self) -> None:
        """Find out before sites wait whether results can be written."""
        with _writing(self.output, "[output] folder"):
            self.output.mkdir(parents=True, exist_ok=True)

    def open(self, *, resumed: bool) -> None:
        """Note the run as the one to resume; a new one removes the results of the one before."""
        with _writing(self._record, "[peer] state"):
            self._record.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            _replace(self._record, {"run": self.run.hex(), "terms": self._terms()})
        if not resumed:
            with _writing(self.output, "[output] folder"):
                for old in (
                    self.output / "result.json",
                    self.output / "training.png",
                    *self.predictions.glob("*.nii.gz"),
                ):
                    old.unlink(missing_ok=True)
                (self.output / "metrics.jsonl").write_text("")
        self.opened = True

    def metric(self, **values: Any) -> None:
        """One line of `metrics.jsonl`."""
        path = self.output / "metrics.jsonl"
        with _writing(path, "[output] folder"), open(path, "a") as file:
            file.write(json.dumps(values) + "\n")

    def write(self, result: Result) -> None:
        """`result.json`, whole or not at all."""
        path = self.output / "result.json"
        with _writing(path, "[output] folder"):
            _replace(path, asdict(result))

    def _last(self) -> bytes:
        try:
            last = json.loads(self._record.read_text())
            run = bytes.fromhex(last["run"])
        except FileNotFoundError:
            raise ConfigError(
                f"nothing to resume: {self._record} does not exist; start without --resume"
            ) from None
        except (OSError, ValueError, KeyError, TypeError):
            raise ConfigError(f"{self._record} cannot be read; start without --resume") from None
        if last.get("terms") != self._terms():
            raise ConfigError(
                "job.toml has changed since the run that is to be resumed; change it back, "
                "or start without --resume"
            )
        return run

    def _terms(self) -> str:
        """Digest of all that a run must keep from start to end: two halves of two jobs make no whole."""
        kept = self._job.model_dump(mode="json", include={"job", "sites", "model", "data", "training"})
        for free in ("ahead", "checkpoint_every", "keep_checkpoints"):
            del kept["training"][free]
        return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def _replace(path: Path, value: dict[str, Any]) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(value, indent=2) + "\n")
    temporary.replace(path)


@contextmanager
def _writing(path: Path, key: str) -> Iterator[None]:
    """A disk that is full or closed to us is no bug: one line that names the path and the key."""
    try:
        yield
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written ({error.strerror}): change {key}") from None
