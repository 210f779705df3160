"""examples/embedding: hospital software without torch, first with a small coordinator, then in a real federation."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path

import pytest

from splitproto import pki

FOLDER = Path(__file__).parents[2] / "examples" / "embedding"
SPLITPEER = Path(sys.executable).parent / "splitpeer"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def process(*command: str | Path, folder: Path, **variables: str) -> Iterator[subprocess.Popen[str]]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    with subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as running:
        try:
            yield running
        finally:
            running.kill()


def result(running: subprocess.Popen[str], timeout: float = 60) -> tuple[int, str]:
    output, _ = running.communicate(timeout=timeout)
    return running.returncode, output


@pytest.fixture
def federation(tmp_path: Path) -> Path:
    now = datetime.now(UTC)
    pki.create_ca(tmp_path / "pki", "embedding", now=now)
    pki.issue(tmp_path / "pki", "coordinator", "hub", hosts=["127.0.0.1"], now=now)
    for site in ("north", "south"):
        pki.issue(tmp_path / "pki", "client", site, hosts=[], now=now)
    return tmp_path


@pytest.fixture
def no_torch(tmp_path: Path) -> str:
    """A PYTHONPATH on which whoever imports torch or splitpeer fails."""
    blocked = tmp_path / "blocked"
    for name in ("torch", "splitpeer"):
        (blocked / name).mkdir(parents=True)
        (blocked / name / "__init__.py").write_text(f"raise ImportError('{name} is blocked here')\n")
    return str(blocked)


def hospital(address: str, *more: str | Path) -> list[str | Path]:
    return [
        sys.executable,
        FOLDER / "hospital_service.py",
        "--coordinator",
        address,
        "--site",
        "north",
        *more,
    ]


def test_three_steps_without_torch(federation: Path, no_torch: str) -> None:
    address = f"tcp://127.0.0.1:{free_port()}"
    coordinator = [sys.executable, FOLDER / "coordinator.py", "--listen", address]
    with (
        process(*coordinator, folder=federation, PYTHONPATH=no_torch) as hub,
        process(*hospital(address), folder=federation, PYTHONPATH=no_torch) as north,
    ):
        code, said = result(hub)
        assert code == 0, said
        assert "step 3: loss" in said
        code, said = result(north)
        assert code == 0, said
        assert "bye: complete after step 3" in said


def test_a_job_that_wants_more_than_the_policy_is_declined_with_the_reason(federation: Path) -> None:
    address = f"tcp://127.0.0.1:{free_port()}"
    coordinator = [sys.executable, FOLDER / "coordinator.py", "--listen", address]
    with (
        process(*coordinator, folder=federation) as hub,
        process(*hospital(address, "--levels", "3", "4"), folder=federation) as north,
    ):
        code, said = result(hub)
        assert code == 1
        assert "declined: levels [1, 2] may not leave this site" in said
        code, said = result(north)
        assert code == 1
        assert "may not leave" in said


@pytest.mark.timeout(300)
def test_it_joins_a_real_coordinator_beside_a_real_client(federation: Path, no_torch: str) -> None:
    """Two sites: north runs the example, south runs splitpeer; pseudonyms, digests and grids must agree."""
    from splitpeer.data.phantom import write_phantom

    write_phantom(federation / "data", 4, seed=3, workers=1)
    address = f"tcp://127.0.0.1:{free_port()}"
    (federation / "south.toml").write_text(
        '[peer]\nrole = "client"\nsite = "south"\nfederation = "embedding"\nmodality = "t1ce"\nstate = "south"\n'
        '[tls]\nca = "pki/ca.crt"\ncertificate = "pki/south.crt"\nkey = "pki/south.key"\n'
        f'[network]\ncoordinator = "{address}"\n[data]\nimages = "data/t1ce"\nsalt = "pki/federation.salt"\n'
        '[policy]\ncoordinators = ["hub"]\n'
    )
    (federation / "hub.toml").write_text(
        '[peer]\nrole = "coordinator"\nsite = "hub"\nfederation = "embedding"\nstate = "hub"\n'
        '[tls]\nca = "pki/ca.crt"\ncertificate = "pki/hub.crt"\nkey = "pki/hub.key"\n'
        f'[network]\nlisten = "{address}"\n'
        '[data]\nlabels = "data/labels"\nconvention = "msd"\nsalt = "pki/federation.salt"\n'
    )
    shutil.copy(FOLDER / "job.toml", federation)
    with ExitStack() as started:
        north = started.enter_context(
            process(*hospital(address, "--images", "data/flair"), folder=federation, PYTHONPATH=no_torch)
        )
        south, hub = (
            started.enter_context(process(SPLITPEER, "serve", *arguments, folder=federation))
            for arguments in (("--config", "south.toml"), ("--config", "hub.toml", "--job", "job.toml"))
        )
        code, said = result(hub, 200)
        assert code == 0, said
        for site in (north, south):
            code, said = result(site)
            assert code == 0, said
    outcome = json.loads((federation / "runs/embedding/result.json").read_text())
    assert outcome["complete"] and outcome["patients"] == 4 and outcome["sites"]["north"] == "flair"
