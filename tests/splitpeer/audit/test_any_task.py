"""Audits and attacks of tasks other than glioma: one region, and two classes that exclude each other."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from splitpeer.attacks.catalogue import CATALOGUE, attack_class
from splitpeer.audit.cohort import Cohort, most_tumour
from splitpeer.audit.rehearsal import Protection, Recording, Rehearsal, Rehearsed
from splitpeer.cli import main
from splitpeer.leakage.measure import INSIDE, OWN_IMAGE
from splitpeer.report.store import load_run
from splitpeer.settings.job import JobConfig
from tests.splitpeer.audit.conftest import MODALITIES, SALT

VALUES = "values = { rim = 1, core = 2, spot = 3 }\n"
TASKS = {
    "one region": f'[task]\n{VALUES}[task.regions]\nlesion = ["rim", "core", "spot"]\n',
    "two classes": f"[task]\nexclusive = true\n{VALUES}"
    '[task.regions]\nrind = ["rim"]\nkernel = ["core", "spot"]\n',
}
PARTS = {"one region": (), "two classes": ("rind", "kernel")}
LABEL_ATTACKS = [
    name for name in CATALOGUE if (attack_class(name).goal, attack_class(name).role) == ("mask", "client")
]


@dataclass(frozen=True)
class Played:
    """A task, its job on disk, and a rehearsal of it."""

    name: str
    job: Path
    rehearsed: Rehearsed

    @property
    def parts(self) -> tuple[str, ...]:
        return PARTS[self.name]


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as left:
        main([str(argument) for argument in arguments])
    return int(left.value.code or 0)


@pytest.fixture(scope="module", params=list(TASKS))
def played(request: pytest.FixtureRequest, place: Any, tmp_path_factory: pytest.TempPathFactory) -> Played:
    folder = tmp_path_factory.mktemp("task")
    job = folder / "job.toml"
    job.write_text(place.job.read_text() + TASKS[request.param])
    config = JobConfig.load(job)
    cohort = Cohort.read(place.data, MODALITIES, salt=SALT, convention=config.task.task("task"))
    rehearsal = Rehearsal(config, cohort, Protection(), folder / "played", seed=3)
    targets = most_tumour(cohort, rehearsal.validation, rehearsal.window)
    return Played(request.param, job, rehearsal.play(Recording(targets=tuple(targets), views=1)))


def truth(place: Any, played: Played) -> tuple[object, ...]:
    return ("--truth", place.data, "--salt", place.salt, "--convention", "task", "--job", played.job)


def figures(played: Played) -> set[str]:
    names, beyond = ("auc", "dice_otsu", "dice_oracle"), ("auc_window", "advantage_auc", "advantage_dice")
    return {*names, *beyond, *(f"{name}_{part}" for name in names for part in played.parts)}


def test_every_label_attack_is_scored_by_the_regions_of_the_task(
    place: Any, played: Played, tmp_path: Path
) -> None:
    small = {"gradient-network": ":batches=2,steps=2"}
    asked = [part for name in LABEL_ATTACKS for part in ("--attack", name + small.get(name, ""))]
    out = tmp_path / "run"
    assert run("attack", played.rehearsed.site_capture("t1"), "--first-step", "--out", out, *asked,
               "--knows", f"shadow={place.shadow}", "--shadow-images", 12, *truth(place, played)) == 0  # fmt: skip
    folder = load_run(out)
    found = {entry.attack: entry for entry in folder.run.entries}
    assert set(found) == set(LABEL_ATTACKS)
    for entry in found.values():
        assert entry.status == "done" and set(entry.scores) == figures(played), entry.attack
        assert OWN_IMAGE in entry.scores["auc"].floors and INSIDE in entry.scores["auc_window"].floors
    assert found["gradient-norm"].scores["auc"].mean > 0.9
    masks = np.asarray(folder.arrays["masks"])
    assert masks.shape[1] == 1 + len(played.parts)
    assert (masks[:, 0] == masks.max(axis=1)).all() and masks[:, 0].any()


def test_attacks_through_the_coordinators_decoder_learn_its_task(
    place: Any, played: Played, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    code = run("attack", played.rehearsed.capture, "--seat", "t1", "--samples", 2, "--budget", 1, "--out", out,
               "--attack", "pcat:steps=2", "--attack", "query-free:steps=2,iterations=2",
               "--knows", f"decoder={played.rehearsed.weights('coordinator')}", "--knows", f"shadow={place.shadow}",
               "--shadow-images", 12, *truth(place, played))  # fmt: skip
    assert code == 0
    entries = load_run(out).run.entries
    assert [(e.attack, e.status) for e in entries] == [("pcat", "done"), ("query-free", "done")]
    assert all(e.scores["tumour_dice"].ceiling is not None for e in entries)


def test_a_site_audits_a_job_of_any_task(place: Any, played: Played, tmp_path: Path) -> None:
    peer = tmp_path / "peer.toml"
    peer.write_text(PEER.format(data=place.data / "t1", salt=place.salt))
    out = tmp_path / "audit"
    code = run("audit", "--config", peer, "--job", played.job, "--attack", "pca", "--labels", place.data / "labels",
               "--quick", "--convention", "task", "--shadow", place.shadow, "--steps", 2, "--views", 1, "--samples", 2,
               "--out", out)  # fmt: skip
    assert code == 0
    found = json.loads((out / "0-undefended" / "attack.json").read_text())
    (dice,) = found["dice"].values()
    assert list(dice) == [*(played.parts or ("lesion",)), "mean"]
    assert "tumour_dice" in found["entries"][0]["scores"]
    (entry,) = json.loads((out / "0-undefended" / "labels" / "attack.json").read_text())["entries"]
    assert set(entry["scores"]) == figures(played)
    page = (out / "report.html").read_text()
    assert "Whole tumour" not in page and " brain" not in page


def test_a_sweep_compares_defences_of_any_task(place: Any, played: Played, tmp_path: Path) -> None:
    plan, out = tmp_path / "sweep.toml", tmp_path / "sweep"
    plan.write_text(SWEEP.format(data=place.data, shadow=place.shadow))
    assert run("audit", "--sweep", plan, "--job", played.job, "--out", out) == 0
    (point,) = (json.loads(path.read_text()) for path in out.glob("*/point.json"))
    assert list(point["regions"]) == [*(played.parts or ("lesion",)), "mean"] and point["mask_auc"] > 0.6


def test_what_masks_mean_is_never_guessed(
    place: Any, played: Played, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(said: str, *arguments: object) -> None:
        code = run("attack", played.rehearsed.site_capture("t1"), "--attack", "schedule", "--out", tmp_path / "x",
                   "--truth", place.data, "--salt", place.salt, *arguments)  # fmt: skip
        line = capsys.readouterr().err.strip().splitlines()[-1]
        assert code == 4 and said in line and line.startswith("splitpeer: "), line

    refused("needs --job", "--convention", "task")
    refused("add --convention task", "--job", played.job)
    refused("names values of its own", "--job", played.job, "--convention", "msd")


PEER = """\
[peer]
role = "client"
site = "site-t1"
federation = "test"
modality = "t1"
[tls]
ca = "ca.crt"
certificate = "a.crt"
key = "a.key"
[network]
coordinator = "tcp://localhost:7443"
[data]
images = "{data}"
salt = "{salt}"
[policy]
coordinators = ["hub"]
"""
SWEEP = """\
[sweep]
seat = "t1"
attacks = ["pca"]
label_attacks = ["gradient-norm"]
every = []
learned_label_attacks = ["gradient-network:batches=2,steps=2,width=4"]
budget = 1
views = [1]
targets = 2
shadow = 12
[data]
folder = "{data}"
shadow = "{shadow}"
convention = "task"
[[configuration]]
name = "max-norm"
gradients = ["marvell:0.1"]
"""
