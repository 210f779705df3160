"""A coordinator on two ranks, as processes: the result of one, and an end with one line when a rank is lost."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from .scene import Daemon, Scene, free_port

ROUNDINGS = 1e-6
"""Sixteen times what float32 rounds off the largest value. Each rank adds up what its own samples contribute to the
gradient of a weight, and these sums are added: the same terms in another order, and each addition wrong by one rounding
(6e-8) at most. In twelve steps a weight moves by a hundredth of its gradients, so it differs by far less."""
JOB = {
    "training": {"optimiser": "sgd", "learning_rate": 0.01, "steps": 12, "batch": 3, "checkpoint_every": 5}
}


def start_ranks(scene: Scene) -> list[Daemon]:
    """The coordinator's two ranks, as torchrun starts them."""
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    shared |= {"MASTER_PORT": str(free_port())}
    return [scene.start("hub", environ={**shared, "RANK": n, "LOCAL_RANK": n}) for n in ("0", "1")]


def apart(scene: Scene, step: int) -> float:
    """Largest difference of a weight after a step from the whole network's in one process, over the largest weight."""
    split, whole = scene.weights(step), scene.whole(until=step)[1].state_dict()
    assert split.keys() == whole.keys()
    largest = max(float(tensor.abs().max()) for tensor in whole.values())
    return max(float((split[name] - whole[name]).abs().max()) for name in whole) / largest


def assert_close(scene: Scene) -> None:
    """Losses and all weights are those of the whole network in one process."""
    assert scene.losses() == pytest.approx(scene.whole()[0], rel=ROUNDINGS, abs=0)
    assert apart(scene, scene.settings.training.steps) <= ROUNDINGS


@pytest.mark.timeout(300)
def test_torchrun_starts_two_ranks_that_train_as_one_does(scene) -> None:
    """The batch of three is one sample and two. Evaluation, checkpoints and results are those of any run."""
    scene.cast("t1ce", "t2", **JOB)
    log = scene.folder / "hub.log"
    meet = ["--master-addr", "127.0.0.1", "--master-port", str(free_port())]
    command = ["-m", "torch.distributed.run", "--nproc-per-node", "2", *meet, "-m", "splitpeer.cli"]
    with log.open("wb") as written:
        process = subprocess.Popen(
            [sys.executable, *command, "serve", "--role", "coordinator", "--job", "job.toml"],
            cwd=scene.folder / "hub",
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=written,
            stderr=written,
            stdin=subprocess.DEVNULL,
        )
    hub = Daemon(process.pid, log, process=process)
    scene.started.append(hub)
    sites = [scene.start(f"site-{modality}") for modality in scene.modalities]
    assert hub.code(240) == 0, hub.said
    assert [site.code() for site in sites] == [0, 0]
    assert_close(scene)
    assert "rank=1 steps=12" in hub.said
    assert len(list((scene.output / "predictions").iterdir())) == 2


@pytest.mark.timeout(300)
def test_a_rank_that_is_killed_ends_the_run_with_one_line_and_the_next_start_resumes(scene) -> None:
    """Sites keep dialling meanwhile. Losses, and the weights of the first checkpoint after the kill, are those of a run
    that was never ended.

    All 120 cannot be compared: when a sum rounds otherwise, an activation next to zero may change its sign, and from
    then on the runs part. Weights of the whole network moved by one rounding at step 5 change a loss by at most 4e-7
    in the 35 steps after it, by 5e-5 at the end, and weights by 1e-3. Up to step 20 the weights differ by 3e-8 of the
    largest one, at step 25 by 5e-6. A rank that resumes without its moments changes a loss by 1e-3 within three
    steps and by 6e-3 within ten; the weights by 3e-5 at the first checkpoint, and by 3e-4 at the second.
    """
    scene.cast("t1ce", "t2", **JOB | {"training": JOB["training"] | {"steps": 120, "keep_checkpoints": 64}})
    hub, other = start_ranks(scene)
    sites = [scene.start(f"site-{modality}") for modality in scene.modalities]
    scene.until_step(8)
    other.signal(signal.SIGKILL)
    assert hub.code() == 3
    assert hub.last.startswith("splitpeer: rank 1 ended: its last line says why"), hub.said
    assert "Traceback" not in hub.said
    again = start_ranks(scene)
    assert [one.code() for one in (*again, *sites)] == [0, 0, 0, 0], again[0].said
    assert "run.resumed" in again[0].said
    resumed = next(line["step"] for line in scene.metrics() if line.get("rollback"))
    assert 5 <= resumed <= 15, "later, roundings alone part the runs"
    assert apart(scene, resumed + JOB["training"]["checkpoint_every"]) <= ROUNDINGS
    assert "rank=1 steps=120" in again[1].said
    assert scene.losses()[:30] == pytest.approx(scene.whole(until=30)[0], rel=1e-4, abs=0)


@pytest.mark.timeout(300)
def test_a_rank_that_hangs_ends_the_run_by_its_deadline(scene) -> None:
    scene.cast("t1ce", "t2", **JOB, deadlines={"join_s": 60, "step_s": 8, "return_s": 60})
    hub, other = start_ranks(scene)
    other.until("rank.met")
    other.signal(signal.SIGSTOP)
    sites = [scene.start(f"site-{modality}") for modality in scene.modalities]
    assert hub.code() == 3
    assert "rank 1 did not answer within 4 s" in hub.last
    for site in sites:
        site.code()
        assert "rank" in site.said
    other.signal(signal.SIGCONT)
    assert other.code() == 3
    assert other.last.startswith("splitpeer: rank 0 ended")


def test_ranks_without_the_first_end_with_one_line(scene) -> None:
    scene.cast("t1ce", "t2", **JOB)
    hub, other = start_ranks(scene)
    other.until("rank.met")
    hub.signal(signal.SIGKILL)
    assert other.code() == 3
    assert other.last.startswith("splitpeer: rank 0 ended: its last line says why")
    assert "Traceback" not in other.said


def test_ranks_with_other_settings_are_refused(scene) -> None:
    """Each says so itself. Also a batch with a sample too few, before anybody is waited for."""
    scene.cast("t1ce", "t2", **JOB)
    first = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    hub = scene.start("hub", environ={**first, "RANK": "0"})
    hub.until("peer.starting")
    time.sleep(0.2)
    scene.job(**JOB | {"training": JOB["training"] | {"learning_rate": 0.5}})
    other = scene.start("hub", environ={**first, "RANK": "1"})
    assert [hub.code(), other.code()] == [4, 4]
    for one in (hub, other):
        assert one.last == (
            "splitpeer: the ranks differ in job.toml, in [data] convention of peer.toml or in version: copy both files "
            "to every machine and install the same version"
        )
    scene.job(**JOB | {"training": JOB["training"] | {"batch": 1}})
    few = scene.start("hub", environ={**first, "RANK": "1"})
    assert few.code() == 4
    assert "batch = 1 for 2 ranks" in few.last


def test_a_site_is_no_rank(scene) -> None:
    scene.cast("t1ce", "t2")
    site = scene.start(
        "site-t2", environ={"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
    )
    assert site.code() == 4
    assert "only a coordinator runs on several ranks" in site.last
