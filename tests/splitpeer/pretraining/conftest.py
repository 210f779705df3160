"""A small phantom on disk, a job for it, and a site's settings."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from splitpeer.cli import main
from splitpeer.data.phantom.cohort import write_phantom
from splitpeer.pretraining import encoder_file
from splitpeer.pretraining.encoder_file import EncoderFile
from splitpeer.settings.job import JobConfig
from splitpeer.settings.loading import to_toml

SALT = "ab" * 32
STEPS = 6
PATIENTS = 5
JOB: dict[str, dict[str, Any]] = {
    "job": {"name": "small", "seed": 3},
    "sites": {"north": "t1", "south": ["t2", "flair"]},
    "model": {"features": [2, 4, 4, 8, 8, 4]},
    "data": {"window": [32, 32], "validation": 1},
    "training": {"steps": STEPS, "batch": 2, "checkpoint_every": 2},
}


@pytest.fixture(scope="session")
def phantom(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("phantom") / "data"
    write_phantom(folder, PATIENTS, seed=5, shape=(40, 40, 8), spacing_mm=(5, 5, 18), workers=1)
    return folder


@dataclass
class Desk:
    """What somebody at a site has in front of them."""

    folder: Path
    data: Path
    capsys: pytest.CaptureFixture[str]

    def peer(self, modality: str | list[str] = "t1", **over: dict[str, Any]) -> Path:
        """Write peer.toml; sections given are added to."""
        site = "north" if modality == "t1" else "south"
        salt = self.folder / "federation.salt"
        salt.write_text(SALT)
        salt.chmod(0o600)
        sections: dict[str, dict[str, Any]] = {
            "peer": {"role": "client", "site": site, "federation": "test", "modality": modality},
            "tls": {"ca": "ca.crt", "certificate": "north.crt", "key": "north.key"},
            "network": {"coordinator": "tcp://hub.example.org:7443"},
            "data": {"images": str(self.data), "salt": str(salt)},
            "policy": {"coordinators": ["hub"]},
            "runtime": {"initial_weights": 7},
        }
        for section, values in over.items():
            sections.setdefault(section, {}).update(values)
        path = self.folder / "peer.toml"
        path.write_text(to_toml(sections))
        return path

    def job(self, **over: dict[str, Any]) -> Path:
        """Write job.toml; sections given are added to."""
        sections = {name: dict(values) for name, values in JOB.items()}
        for section, values in over.items():
            sections.setdefault(section, {}).update(values)
        path = self.folder / "job.toml"
        path.write_text(to_toml(sections))
        return path

    def run(self, *arguments: str, code: int = 0) -> str:
        """`splitpeer pretrain` with these files; what it says on standard output, or in an error's one line."""
        self.capsys.readouterr()
        files = ("--config", str(self.folder / "peer.toml"), "--job", str(self.folder / "job.toml"))
        with pytest.raises(SystemExit) as left:
            main(["pretrain", *files, "--out", str(self.out), *arguments])
        said, errors = self.capsys.readouterr()
        assert left.value.code == code, said + errors
        assert "Traceback" not in errors
        self.log = errors
        return said if code == 0 else errors.strip().rpartition("\n")[2]

    @property
    def out(self) -> Path:
        return self.folder / "encoder.safetensors"

    @property
    def made(self) -> EncoderFile:
        return encoder_file.read(self.out)

    @property
    def settings(self) -> JobConfig:
        return JobConfig.load(self.folder / "job.toml")

    def told(self, *arguments: str) -> dict[str, Any]:
        """With --json."""
        found: dict[str, Any] = json.loads(self.run(*arguments, "--json"))
        return found


@pytest.fixture
def desk(
    tmp_path: Path, phantom: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Desk:
    for name in [name for name in os.environ if name.startswith("SPLITPEER_")]:
        monkeypatch.delenv(name)
    torch.set_num_threads(1)
    made = Desk(tmp_path, phantom, capsys)
    made.peer()
    made.job()
    return made


@pytest.fixture
def ends_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """From now on Ctrl-C is pressed before step `step`; a negative one: never again."""
    from splitpeer.pretraining.examples import Examples

    usual = Examples.batch

    def press(at: int) -> None:
        def batch(self: Examples, step: int) -> Any:
            if step == at:
                raise KeyboardInterrupt
            return usual(self, step)

        monkeypatch.setattr(Examples, "batch", batch)

    return press
