"""A rehearsal is the wire: what it records is what five peers over TLS record, bit for bit, defences included."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from splitpeer.attacks import view
from splitpeer.attacks.view import coordinator_view, site_view
from splitpeer.audit.capture_audit import CaptureAudit
from splitpeer.audit.cohort import Cohort, most_tumour
from splitpeer.audit.rehearsal import Protection, Recording, Rehearsal
from splitpeer.captures.reader import open_capture
from splitpeer.data.pseudonym import load_salt
from splitpeer.errors import AttackImpossible, DataError
from splitpeer.training.dropout import left_out
from splitproto.capture import Recorded
from splitproto.messages import Forward

from . import gaps

DEFENCES = ("bottleneck:1@0", "dropout:0.3", "gaussian:0.5@0,1")
GRADIENTS = ("gaussian:2", "max-norm")


def training(records: Any, peer: str) -> list[Recorded]:
    return [r for r in records if r.peer == peer and r.name in ("activations", "gradients")
            and getattr(r.head, "mode", "train") == "train"]  # fmt: skip


async def test_a_rehearsal_sends_what_the_peers_send(scene, tmp_path) -> None:
    scene.cast(
        "flair", "t1", training={"steps": 3, "batch": 2}, defences={"gradients": list(GRADIENTS)},
        data={"complete_first": 2},
    )  # fmt: skip
    scene.coordinator(runtime={"initial_weights": 7})
    for modality in ("flair", "t1"):
        scene.client(modality, policy={"coordinators": ["hub"], "defences": list(DEFENCES)})
    ran = await scene.together(curious=("hub", "site-t1"))
    assert ran.result is not None and ran.result.complete, ran

    cohort = Cohort({m: scene.images(m) for m in ("flair", "t1")}, scene.masks())
    rehearsal = Rehearsal(
        scene.settings, cohort, Protection(DEFENCES, (), GRADIENTS), tmp_path / "rehearsal", seed=7
    )
    targets = most_tumour(cohort, rehearsal.validation, rehearsal.window)
    played = rehearsal.play(Recording(first=3, targets=tuple(targets), views=2))
    assert played.losses == scene.losses()
    assert played.dice == ran.result.dice

    for live, own, peer in (
        (scene.capture("hub"), played.capture, "site-t1"),
        (scene.capture("site-t1"), played.site_capture("t1"), "hub"),
    ):
        on_wire, rehearsed = (training(open_capture(path).records(), peer) for path in (live, own))
        assert len(on_wire) == len(rehearsed) == 6
        for one, other in zip(on_wire, rehearsed, strict=True):
            assert (one.name, one.direction) == (other.name, other.direction)
            assert one.message.tensors.keys() == other.message.tensors.keys()
            for name, tensor in one.message.tensors.items():
                assert np.array_equal(tensor.view(np.uint8), other.message.tensors[name].view(np.uint8)), name

    # What an adversary reads out of either is the same, too.
    wire, own = open_capture(scene.capture("hub")), open_capture(played.capture)
    views = [
        coordinator_view(c, "t1", mode="train", step=2, choose=lambda samples: samples) for c in (wire, own)
    ]
    assert views[0].defences == views[1].defences and views[0].gradient_defences == views[1].gradient_defences
    for one, other in zip(views[0].targets, views[1].targets, strict=True):
        assert one.sample == other.sample and one.shots[0].seed == other.shots[0].seed
        assert np.array_equal(one.shots[0].activations["x0"], other.shots[0].activations["x0"])
    flair = [
        coordinator_view(c, "flair", mode="train", step=2, choose=lambda samples: samples).targets
        for c in (wire, own)
    ]
    for one, other in zip(*flair, strict=True):
        assert np.array_equal(one.shots[0].activations["x1"], other.shots[0].activations["x1"])
    twice = coordinator_view(own, "t1", choose=lambda samples: targets)
    assert [len(target.shots) for target in twice.targets] == [2, 2]
    first, second = twice.targets[0].shots
    assert not np.array_equal(first.activations["x0"], second.activations["x0"]), "fresh noise"
    gradients = site_view(open_capture(played.site_capture("t1")), steps=(1,))
    assert all(set(t.shots[0].gradients) == {f"x{i}" for i in range(5)} for t in gradients.targets)

    # Truth on another grid is no truth of this capture: a site lists its grids when it joins.
    smaller = tmp_path / "truth" / "t1"
    smaller.mkdir(parents=True)
    for case in scene.federation.data.joinpath("t1").glob("*.nii.gz"):
        image = nib.load(case)
        nib.save(nib.Nifti1Image(np.asarray(image.dataobj)[:, :, :-3], image.affine), smaller / case.name)
    with pytest.raises(DataError, match="where the site listed 45x38x34"):
        CaptureAudit(
            scene.capture("hub"), seat="t1", truth=smaller, salt=scene.federation.pki / "federation.salt"
        ).experiment()
    asked = CaptureAudit(
        scene.capture("hub"), seat="t1", truth=scene.federation.data, samples=2,
        salt=scene.federation.pki / "federation.salt",
    )  # fmt: skip
    experiment = asked.experiment()
    truth = experiment.judge.truth
    assert truth is not None and len(truth.samples) == 2 and experiment.source.complete


async def test_a_site_of_several_seats_is_rehearsed_under_the_keys_that_it_has_live(scene, tmp_path) -> None:
    """The order of peer.toml is not that of the seats, and every seat's gradients have noise of their own."""
    held, images = ("t1", "flair"), scene.folder / "images"
    for modality in held:
        shutil.copytree(scene.federation.data / modality, images / modality)
    scene.cast("t1", training={"steps": 2, "batch": 2}, defences={"gradients": list(GRADIENTS)})
    scene.job(
        training={"steps": 2, "batch": 2},
        defences={"gradients": list(GRADIENTS)},
        sites={"site-t1": list(held)},
    )
    scene.coordinator(runtime={"initial_weights": 7})
    scene.client(
        "t1", peer={"modality": list(held)}, data={"images": str(images)},
        policy={"coordinators": ["hub"], "defences": list(DEFENCES)},
    )  # fmt: skip
    ran = await scene.together(curious=("hub",))
    assert ran.result is not None and ran.result.complete, ran

    salt, rule = load_salt(scene.federation.pki / "federation.salt"), scene.settings.task.rule
    cohort = Cohort(Cohort.read(images, held, salt=salt, rule=rule).images, scene.masks())
    protection = Protection(DEFENCES, (), GRADIENTS)
    played = Rehearsal(scene.settings, cohort, protection, tmp_path / "rehearsal", seed=7).play(
        Recording(first=2)
    )
    live, own = (
        training(open_capture(path).records(), "site-t1") for path in (scene.capture("hub"), played.capture)
    )
    assert len(live) == len(own) == 4
    for one, other in zip(live, own, strict=True):
        assert (one.name, one.message.tensors.keys()) == (other.name, other.message.tensors.keys())
        for name, tensor in one.message.tensors.items():
            assert np.array_equal(tensor.view(np.uint8), other.message.tensors[name].view(np.uint8)), (
                one.name,
                name,
            )


GAPS = {
    "site-flair": {"flair": (0, 1, 3, 4)},
    "site-t1": {"t1": (0, 1, 4), "t2": (0, 2, 4, 5)},
}


@pytest.mark.parametrize("fusion", ["concat", "mean"])
async def test_patients_with_gaps_are_rehearsed_as_they_are_trained(scene, tmp_path, fusion) -> None:
    """Batches, activations, gradients and Dice, with dropout and a defence that draws by sample."""
    gaps.cast(
        scene, GAPS, policy={"coordinators": ["hub"], "defences": ["gaussian:0.5"]},
        model={"fusion": fusion}, training={"steps": 8, "batch": 2, "seat_dropout": 0.3},
    )  # fmt: skip
    ran = await scene.together(only=gaps.who(GAPS), curious=("hub", "site-t1"))
    assert ran.result is not None and ran.result.complete, ran

    salt, rule = load_salt(scene.config("hub").data.salt), scene.settings.task.rule
    images = {
        modality: Cohort.read(scene.folder / "images" / site, (modality,), salt=salt, rule=rule).images[
            modality
        ]
        for site, held in GAPS.items()
        for modality in held
    }
    rehearsal = Rehearsal(
        scene.settings, Cohort(images, scene.masks()), Protection(("gaussian:0.5",)), tmp_path / "rehearsal", seed=7
    )  # fmt: skip
    played = rehearsal.play(Recording(first=8))
    assert played.losses == scene.losses()
    assert played.dice == ran.result.dice
    for live, own, peer in (
        (scene.capture("hub"), played.capture, "site-flair"),
        (scene.capture("hub"), played.capture, "site-t1"),
        (scene.capture("site-t1"), played.site_capture("t1"), "hub"),
    ):
        on_wire, rehearsed = (training(open_capture(path).records(), peer) for path in (live, own))
        assert len(on_wire) == len(rehearsed) > 4
        for one, other in zip(on_wire, rehearsed, strict=True):
            assert (one.name, one.head) == (other.name, other.head)
            assert one.message.tensors.keys() == other.message.tensors.keys()
            for name, tensor in one.message.tensors.items():
                assert np.array_equal(tensor.view(np.uint8), other.message.tensors[name].view(np.uint8)), name
        ordered, again = (
            [r.head for r in open_capture(path).records() if r.name == "forward" and r.peer == peer
             and r.head.mode == "train"]
            for path in (live, own)
        )  # fmt: skip
        assert {f.step: f for f in ordered if f.step in {g.step for g in again}} == {f.step: f for f in again}
    for seat in rehearsal.seats:
        views = [
            coordinator_view(
                open_capture(path), seat, mode="train", every_step=True, choose=lambda every: every
            )
            for path in (scene.capture("hub"), played.capture)
        ]
        assert [(t.sample, len(t.shots)) for t in views[0].targets] == [
            (t.sample, len(t.shots)) for t in views[1].targets
        ]


async def test_a_rehearsal_leaves_out_what_the_peers_leave_out(scene, tmp_path) -> None:
    scene.cast("flair", "t1", "t2", training={"steps": 8, "batch": 2, "seat_dropout": 0.4})
    ran = await scene.together(curious=("hub", "site-t1"))
    assert ran.result is not None and ran.result.complete, ran
    cohort = Cohort({m: scene.images(m) for m in scene.modalities}, scene.masks())
    rehearsal = Rehearsal(scene.settings, cohort, Protection(), tmp_path / "rehearsal", seed=7)
    played = rehearsal.play(Recording(first=8))
    assert played.losses == scene.losses()
    assert played.dice == ran.result.dice

    told = ("activations", "gradients", "applied", "advance", "advanced")
    live, own = (
        [(r.name, r.head.step) for r in open_capture(path).records()
         if r.name in told and getattr(r.head, "mode", "train") == "train"]
        for path in (scene.capture("site-t1"), played.site_capture("t1"))
    )  # fmt: skip
    assert live == own
    out = [line["step"] for line in scene.metrics() if "t1" in line.get("without", ())]
    assert [step for name, step in own if name == "advance"] == out
    assert 0 < len(out) < 8
    # What was never sent cannot be attacked.
    shots = [
        {
            seat: [
                s.step
                for t in coordinator_view(
                    open_capture(path), seat, mode="train", every_step=True, choose=lambda samples: samples
                ).targets
                for s in t.shots
            ]
            for seat in scene.modalities
        }
        for path in (scene.capture("hub"), played.capture)
    ]
    assert shots[0] == shots[1]
    assert {*shots[0]["t1"]} == {*range(1, 9)} - {*out}
    there = [sum(step in steps for steps in shots[0].values()) for step in {*shots[0]["t1"]}]
    assert {*there} > {3}
    for path in (scene.capture("site-t1"), played.site_capture("t1")):
        assert {s.step for t in site_view(open_capture(path)).targets for s in t.shots}.isdisjoint(out)


def test_a_rehearsal_records_steps_in_which_the_attacked_site_takes_part(scene, tmp_path) -> None:
    scene.cast("flair", "t1", "t2", training={"steps": 8, "batch": 2, "seat_dropout": 0.4})
    cohort = Cohort({m: scene.images(m) for m in scene.modalities}, scene.masks())
    rehearsal = Rehearsal(scene.settings, cohort, Protection(), tmp_path / "rehearsal", seed=7)
    targets = most_tumour(cohort, rehearsal.validation, rehearsal.window)
    played = rehearsal.play(Recording(first=2, last=2, targets=tuple(targets), seats=("t2",)))
    graded = [r.head.step for r in open_capture(played.site_capture("t2")).records() if r.name == "gradients"]
    there = [
        step
        for step in range(1, 9)
        if "t2" not in left_out(scene.settings.job.seed, step, scene.modalities, 0.4)
    ]
    assert graded == [*there[:2], *there[-2:]]
    with pytest.raises(
        AttackImpossible, match="no gradient of the steps asked for: it holds some of steps 1 to 8"
    ):
        site_view(open_capture(played.site_capture("t2")), steps=(2,))


def test_batches_that_a_site_sat_out_do_not_pile_up(scene, tmp_path, monkeypatch) -> None:
    """A capture is larger than memory: what all have answered who ever will is cut at once."""
    scene.cast("flair", "t1", "t2", training={"steps": 8, "batch": 2, "seat_dropout": 0.4})
    cohort = Cohort({m: scene.images(m) for m in scene.modalities}, scene.masks())
    played = Rehearsal(scene.settings, cohort, Protection(), tmp_path / "rehearsal", seed=7).play(
        Recording(first=8)
    )
    capture = open_capture(played.capture)
    read, late = [], []

    class Watched:
        header = capture.header

        def records(self) -> Iterator[Recorded]:
            for record in capture.records():
                if record.name == "activations":
                    read.append(record.head.step)
                yield record

    def cut(self: Any, forward: Forward, *args: Any) -> None:
        late.append(read[-1] - forward.step)

    monkeypatch.setattr(view._Taken, "_cut", cut)
    coordinator_view(Watched(), "t1", mode="train", every_step=True, choose=lambda samples: samples)
    assert len(late) > 3
    assert set(late) == {0}
