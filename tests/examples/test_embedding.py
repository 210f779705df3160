"""examples/embedding: hospital software without torch, first with a small coordinator, then in a real federation."""

from __future__ import annotations

import asyncio
import errno
import importlib
import json
import os
import shutil
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from splitproto import AllowList, Credentials, Listener, LocalError, RemoteError, Session, pki
from splitproto.errors import Draining, PolicyRefused, SchemaMismatch, StepMismatch
from splitproto.messages import (
    Advance,
    Advanced,
    Applied,
    Begin,
    Checkpoint,
    Forward,
    Gradients,
    Inventory,
    JobAccept,
    JobOffer,
    Rollback,
    RolledBack,
    Unsaved,
    Withdraw,
    Withdrawn,
)
from splitproto.records import Job, Sample, Seat, Unusable
from splitproto.tensors import Descriptor, schema_digest
from tests.cuts import unet

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


@pytest.fixture
def service(federation: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """`hospital_service` in this process."""
    monkeypatch.chdir(federation)
    monkeypatch.syspath_prepend(FOLDER)
    monkeypatch.delitem(sys.modules, "hospital_service", raising=False)
    return importlib.import_module("hospital_service")


def offer_and_cut() -> tuple[JobOffer, list[Descriptor]]:
    features, window = (8, 8, 16, 32, 64, 8), (48, 48)
    job = Job("embedding", 2, *unet(features).values(), (1, 2, 3, 4), "f32", window, (), False,
              batch=2, steps=9, optimiser="sgd", learning_rate=0.5, weight_decay=0.0, schedule="constant",
              seconds_per_step=60.0)  # fmt: skip
    cut = [Descriptor(f"x{n}", "f32", (2, features[n], 48 >> n, 48 >> n)) for n in job.levels]
    return JobOffer(b"r" * 16, (Seat("flair", ("flair",)),), job, schema_digest(cut)), cut


async def joined(listener: Listener, offer: JobOffer, step: int) -> tuple[Session, JobAccept, Inventory]:
    """The coordinator's side of joining."""
    session = await listener.accept(30)
    await session.send(offer)
    accept, inventory = await session.receive(30), await session.receive(30)
    await session.send(Begin(step, len(inventory.patients)))
    return session, accept, inventory


async def test_a_lost_link_is_not_a_lost_run(federation: Path, service: ModuleType) -> None:
    """The pending step, the incarnation and what was applied go on over three links; checkpoints are the newest 3."""
    hub, north = (
        Credentials(Path("pki/ca.crt"), Path(f"pki/{site}.crt"), Path(f"pki/{site}.key"))
        for site in ("hub", "north")
    )
    site = service.Service("flair", frozenset(range(5)), b"s" * 32, service.invented(), Path("state"))
    offer, cut = offer_and_cut()
    async with Listener("tcp://127.0.0.1:0", hub, AllowList({"client": {"north"}}, "the test")) as listener:
        serving = asyncio.create_task(site.serve(listener.address, north, "hub", 30.0))

        def batch(step: int) -> Forward:
            samples = tuple(Sample(patient.key, (0, 0, 4)) for patient in inventory.patients[:2])
            return Forward("train", step, 0, samples, service.batch_digest(step, samples, None))

        session, first, inventory = await joined(listener, offer, 0)
        assert (first.applied, first.checkpoints) == (0, (0,))
        await session.send(batch(1))
        sent = await session.receive(30)
        pending = site.run.pending
        session.fail(Draining("the line is cut"))

        session, again, _ = await joined(listener, offer, 0)
        assert again.incarnation == first.incarnation
        await session.send(batch(1))
        answer = await session.receive(30)
        assert all((answer.tensors[name] == array).all() for name, array in sent.tensors.items())
        assert pending is site.run.pending  # not computed twice
        gradients = {d.name: np.full(d.shape, 0.01, np.float32) for d in cut}
        for step in range(1, 5):
            if step > 1:
                await session.send(batch(step))
                await session.receive(30)
            await session.send(Gradients(step, gradients))
            assert await session.receive(30) == Applied(step)
            await session.send(Checkpoint(step))
            assert (await session.receive(30)).step == step
        await session.close("drain")

        session, third, _ = await joined(listener, offer, 4)
        assert (third.incarnation, third.applied, third.checkpoints) == (first.incarnation, 4, (2, 3, 4))
        await session.send(Rollback(3))
        assert await session.receive(30) == RolledBack(3)
        assert site.run.saved() == [2, 3]
        # A new process has lost its memory, not its checkpoints.
        fresh = service.Run(offer, Path("state"))
        assert fresh.incarnation != first.incarnation and fresh.saved() == [2, 3]
        await session.close("complete")
        assert (await serving).reason == "complete"


async def test_absence_and_a_full_disk(
    federation: Path, service: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps made without it; a batch far ahead waits; what to keep; a checkpoint that cannot be written."""
    hub, north = (
        Credentials(Path("pki/ca.crt"), Path(f"pki/{site}.crt"), Path(f"pki/{site}.key"))
        for site in ("hub", "north")
    )
    site = service.Service("flair", frozenset(range(5)), b"s" * 32, service.invented(), Path("state"))
    offer, cut = offer_and_cut()
    gradients = {d.name: np.full(d.shape, 0.01, np.float32) for d in cut}
    async with Listener("tcp://127.0.0.1:0", hub, AllowList({"client": {"north"}}, "the test")) as listener:
        serving = asyncio.create_task(site.serve(listener.address, north, "hub", 30.0))
        session, _, inventory = await joined(listener, offer, 0)

        def batch(step: int, mode: str = "train") -> Forward:
            samples = tuple(Sample(patient.key, (0, 0, 4)) for patient in inventory.patients[:2])
            return Forward(mode, step, 0, samples, service.batch_digest(step, samples, None))

        # Step 1 was to be its own, 2 never was; what lies further ahead waits, and is void when it is passed over.
        await session.send(batch(1))
        assert (await session.receive(30)).step == 1
        await session.send(batch(3))
        gains = {level: gain.copy() for level, gain in site.run.encoder.gains.items()}
        await session.send(Advance(2))
        assert await session.receive(30) == Advanced(2)
        await session.send(batch(2, "evaluate"))
        await session.send(batch(3))
        assert [(await session.receive(30)).mode for _ in range(2)] == ["evaluate", "train"]
        await session.send(Advance(2))
        assert await session.receive(30) == Advanced(2)
        assert site.run.pending is None
        await session.send(batch(3))
        assert (await session.receive(30)).step == 3
        assert all((site.run.encoder.gains[level] == gain).all() for level, gain in gains.items())
        await session.send(Gradients(3, gradients))
        assert await session.receive(30) == Applied(3)
        assert site.run.applied == 3

        await session.send(Checkpoint(3, (0,)))
        assert (await session.receive(30)).name == "saved"
        assert site.run.saved() == [0, 3]
        await session.send(Advance(4))
        assert await session.receive(30) == Advanced(4)

        def full(descriptor: int) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        with monkeypatch.context() as patched:
            patched.setattr(os, "fsync", full)
            await session.send(Checkpoint(4, (3,)))
            assert await session.receive(30) == Unsaved(4, os.strerror(errno.ENOSPC))
        assert sorted(path.name for path in site.run.folder.iterdir()) == ["0.npz", "3.npz"]
        await session.send(Checkpoint(4, ()))
        assert (await session.receive(30)).step == 4
        assert site.run.saved() == [4]
        await session.send(Advance(10))  # the job has nine steps
        with pytest.raises(RemoteError, match="advance to step 10"):
            await session.receive(30)
        with pytest.raises(StepMismatch):
            await serving


async def test_a_bad_image_is_withdrawn(federation: Path, service: ModuleType) -> None:
    """SP-11.13-1: with its cause; then nothing counts until the coordinator says where to continue."""
    hub, north = (
        Credentials(Path("pki/ca.crt"), Path(f"pki/{site}.crt"), Path(f"pki/{site}.key"))
        for site in ("hub", "north")
    )
    volumes = service.invented()
    volumes["patient-0"].voxels[0, 0, 0] = np.nan
    volumes["patient-1"].voxels[:] = 0
    site = service.Service("flair", frozenset(range(5)), b"s" * 32, volumes, Path("state"))
    bad = {
        service.pseudonym(site.salt, f"patient-{n}"): cause for n, cause in enumerate(("not-finite", "empty"))
    }
    offer, _ = offer_and_cut()
    async with Listener("tcp://127.0.0.1:0", hub, AllowList({"client": {"north"}}, "the test")) as listener:
        serving = asyncio.create_task(site.serve(listener.address, north, "hub", 30.0))
        session, _, inventory = await joined(listener, offer, 0)

        def batch(*keys: bytes) -> Forward:
            samples = tuple(Sample(key, (0, 0, 4)) for key in keys)
            return Forward("train", 1, 0, samples, service.batch_digest(1, samples, None))

        good = [patient.key for patient in inventory.patients if patient.key not in bad]
        asked = batch(*bad)
        await session.send(asked)
        assert await session.receive(30) == Withdraw(
            "train", 1, 0, asked.digest, tuple(Unusable(key, cause) for key, cause in bad.items())
        )
        await session.send(batch(*good[:2]))  # announced before the coordinator knew
        await session.send(Advance(0))
        assert await session.receive(30) == Advanced(0)
        await session.send(Withdrawn(1, tuple(Unusable(key, cause) for key, cause in bad.items())))
        again = batch(*good[2:4])
        await session.send(again)
        assert (await session.receive(30)).digest == again.digest
        await session.close("complete")
        assert (await serving).reason == "complete"


def test_a_checkpoint_is_on_disk_before_its_name_is(
    service: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, synced = tmp_path / "run" / "1.npz", []
    monkeypatch.setattr(
        os, "fsync", lambda fd: synced.append((stat.S_ISDIR(os.fstat(fd).st_mode), path.exists()))
    )
    service.Encoder(offer_and_cut()[0].job).save(path)
    assert synced == [(False, False), (True, True)]


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        ({"name": "../up"}, "is not a name"),
        ({"learning_rate": 0.0}, "cannot be used"),
        ({"seconds_per_step": float("inf")}, "cannot be used"),
        ({"batch": 4096, "window": (2048, 2048)}, "more than this site computes"),
    ],
)
def test_terms_that_no_site_takes(service: ModuleType, change: dict[str, object], cause: str) -> None:
    site = service.Service("flair", frozenset(range(5)), b"s" * 32, {}, Path("state"))
    offer, _ = offer_and_cut()
    site.judge(offer)
    job = replace(offer.job, **change)
    with pytest.raises(LocalError, match=cause):
        site.judge(replace(offer, job=job))


def test_batches_that_no_site_computes(service: ModuleType) -> None:
    site = service.Service("flair", frozenset(range(5)), b"s" * 32, {}, Path("state"))
    job = offer_and_cut()[0].job

    def forward(mode: str, count: int) -> Forward:
        samples = (Sample(b"k" * 16, (0, 0, 0)),) * count
        return Forward(mode, 1, 0, samples, service.batch_digest(1, samples, None))

    site.check(forward("train", 2), job)
    site.check(forward("evaluate", 3), job)
    with pytest.raises(SchemaMismatch, match="the job says 2"):
        site.check(forward("train", 3), job)
    with pytest.raises(PolicyRefused, match="more than this site computes"):
        site.check(forward("evaluate", 4096), job)


def test_it_gives_up_when_patience_is_over(federation: Path) -> None:
    with process(*hospital(f"tcp://127.0.0.1:{free_port()}", "--patience", "2"), folder=federation) as north:
        code, said = result(north, 20)
    assert code == 1
    assert "trying again" in said and "Traceback" not in said


def test_only_the_named_coordinator_may_answer(federation: Path) -> None:
    address = f"tcp://127.0.0.1:{free_port()}"
    coordinator = [sys.executable, FOLDER / "coordinator.py", "--listen", address]
    with (
        process(*coordinator, folder=federation) as hub,
        process(*hospital(address, "--coordinator-site", "other"), folder=federation) as north,
    ):
        code, said = result(north)
        assert code == 1
        assert "not on our allow-list" in said
        hub.kill()


@pytest.mark.timeout(300)
def test_it_joins_a_real_coordinator_beside_a_real_client(federation: Path, no_torch: str) -> None:
    """Two sites: north runs the example, south runs splitpeer; pseudonyms, digests and grids must agree."""
    from splitpeer.data.phantom.cohort import write_phantom

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
