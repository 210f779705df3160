"""Evaluation over the wire is evaluation of the same weights in one process."""

from __future__ import annotations

import json
import logging

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.inferers import sliding_window_inference

from splitpeer import logs
from splitpeer.daemon.console import dice_line
from splitpeer.report.charts import dice_bars, draw_curve
from splitpeer.site import client
from splitpeer.training.metrics import VolumeDice
from splitproto.negotiation import Offer

REGION_OF = {"WT": (1, 2, 3), "TC": (2, 3), "ET": (3,)}  # convention "msd"


@pytest.fixture
def tall(scene, make, tmp_path):
    """Patients of 155 slices, of sizes that 16 does not divide, one narrower than the window."""
    for number, shape in enumerate([(41, 37, 155), (50, 22, 31), (33, 35, 33), (45, 38, 34)]):
        make.patient(tmp_path / "data", f"P{number}", 50 + number, shape)

    def cast(*modalities: str, **job):
        scene.cast(*modalities, **job)
        scene.coordinator(data={"labels": str(tmp_path / "data" / "labels")})
        for modality in modalities:
            scene.client(modality, data={"images": str(tmp_path / "data" / modality)})
        return scene

    return cast


@pytest.mark.parametrize(
    ("dimensions", "window", "overlap", "batch"), [(2, [32, 32], 0.25, 31), (3, [32, 32, 32], 0.5, 3)]
)
async def test_dice_and_masks_are_those_of_one_process(
    tall, caplog, dimensions, window, overlap, batch
) -> None:
    caplog.set_level(logging.INFO, "splitpeer")
    held_out, steps = (2, 12) if dimensions == 3 else (3, 6)
    scene = tall(
        "t1ce",
        "t2",
        model={"dimensions": dimensions},
        data={"window": window, "validation": held_out},
        training={"steps": steps, "batch": 1, "checkpoint_every": steps, "learning_rate": 0.05},
        evaluation={"overlap": overlap, "batch": batch},
    )
    ran = await scene.together()
    assert ran.result is not None, ran.error
    network = scene.network()
    network.load_state_dict(scene.weights(steps))
    network.eval()
    masks, names = scene.masks(), sorted(scene.modalities)
    images = {m: scene.images(m) for m in names}
    dice = VolumeDice()
    flat = dimensions == 2

    def predict(x: torch.Tensor) -> torch.Tensor:
        x = x[..., 0] if flat else x
        logits = network({m: x[:, i : i + 1] for i, m in enumerate(names)}).sigmoid()
        return logits[..., None] if flat else logits

    keys = scene.patients()[1]
    assert len(keys) == ran.result.validation == held_out
    for key in keys:
        shape = masks.geometry(key).shape
        x = torch.from_numpy(np.stack([images[m].window(key, (0, 0, 0), shape)[0] for m in names]))
        with torch.no_grad():
            whole = sliding_window_inference(
                x[None],
                (*window, 1) if flat else window,
                batch,
                predict,
                overlap=overlap,
                mode="constant" if flat else "gaussian",
            )[0].numpy()
        mask = whole > 0.5
        dice.add(mask, masks.window(key, (0, 0, 0), shape))
        saved = np.asarray(
            nib.load(scene.output / "predictions" / f"{masks.case(key).patient}.nii.gz").dataobj
        )
        assert saved.shape == shape
        # A tie of a rounding error apart may fall either way; windows are summed in another order.
        doubtful = np.abs(whole - 0.5) < 1e-5
        # A label map nests its regions; what the network says need not.
        nested = mask.copy()
        nested[1] |= mask[2]
        nested[0] |= nested[1]
        for index, values in enumerate(REGION_OF.values()):
            differ = (np.isin(saved, values) != nested[index]) & ~doubtful.any(axis=0)
            assert not differ.any(), (masks.case(key).patient, index, int(differ.sum()))
    for region, value in dice.result().items():
        assert ran.result.dice[region] == pytest.approx(value, abs=1e-4)
    assert 0.005 < ran.result.dice["mean"] < 1
    (evaluated,) = [r.fields for r in caplog.records if r.getMessage() == "job.evaluated"]
    assert evaluated["volumes"] == held_out


async def test_evaluation_on_the_way_changes_nothing_of_the_training(scene) -> None:
    """SP-11-17."""
    scene.cast("t1", "t2", training={"steps": 7, "checkpoint_every": 3}, evaluation={"every": 2, "batch": 64})
    ran = await scene.together()
    assert ran.result is not None, ran.error
    assert [line["step"] for line in scene.metrics() if "dice" in line] == [2, 4, 6, 7]
    scene.assert_exact()


async def test_nobody_held_out(scene) -> None:
    scene.cast("t1", training={"steps": 1}, data={"validation": 0})
    ran = await scene.together()
    assert ran.result is not None, ran.error
    assert ran.result.complete
    assert ran.result.dice == {}


async def test_a_region_that_no_mask_holds_scores_null_everywhere(scene, tmp_path, caplog) -> None:
    """In result.json, metrics.jsonl, logs and pictures; the sites hear the figures that there are."""
    caplog.set_level(logging.INFO, "splitpeer")
    scene.cast("t1", "t2", training={"steps": 2}, evaluation={"missing": True})
    labels = tmp_path / "labels"
    labels.mkdir()
    for path in (scene.federation.data / "labels").iterdir():
        mask = nib.load(path)
        voxels = np.asarray(mask.dataobj)
        nib.save(
            nib.Nifti1Image(np.where(voxels == 3, 2, voxels).astype(np.uint8), mask.affine),
            labels / path.name,
        )
    scene.coordinator(data={"labels": str(labels)})
    ran = await scene.together()
    assert ran.result is not None and ran.result.complete, ran.error
    dice = json.loads((scene.output / "result.json").read_text())["dice"]
    assert dice["ET"] is None
    assert dice["mean"] == pytest.approx((dice["WT"] + dice["TC"]) / 2)
    assert all(without["ET"] is None for without in ran.result.missing.values())
    (line,) = [line for line in scene.metrics() if "dice" in line]
    assert line["dice"] == dice
    assert "ET -" in dice_line(ran.result.dice)
    (evaluated,) = [r for r in caplog.records if r.getMessage() == "job.evaluated"]
    assert " ET=- " in logs.TextFormatter().format(evaluated)
    draw_curve(scene.output)
    dice_bars({"split": dice}, tmp_path / "bars.png")
    told = [r.fields["figures"] for r in caplog.records if r.getMessage() == "job.progress"]
    assert any("dice_WT" in figures for figures in told)
    assert not any("dice_ET" in figures for figures in told)


@pytest.mark.parametrize("lacking", [1, 2], ids=["one of two", "both"])
async def test_a_site_without_the_feature_trains_and_is_left_out_of_evaluations(
    scene, monkeypatch, caplog, lacking
) -> None:
    """SP-10-5, SP-10-8: what is optional is not required."""
    caplog.set_level(logging.INFO, "splitpeer")
    scene.cast("t1ce", "t2", training={"steps": 4, "batch": 1, "checkpoint_every": 4})
    made = []

    def offer(**given):
        made.append(given)
        few = ("train", "dtype.f32")
        return Offer(**{**given, "features": few}) if len(made) <= lacking else Offer(**given)

    monkeypatch.setattr(client, "Offer", offer)
    ran = await scene.together()
    assert ran.result is not None, ran.error
    assert ran.result.step == 4
    assert len(ran.result.made_from) == 2 - lacking
    assert bool(ran.result.dice) == (lacking == 1)
    assert ("job.not_evaluated" in caplog.text) == (lacking == 2)


async def test_evaluations_before_the_last_may_score_a_few(scene) -> None:
    """The same few each time; the last one scores all. Training does not notice."""
    scene.cast(
        "t1",
        "t2",
        training={"steps": 5},
        data={"validation": 3},
        evaluation={"every": 2, "sample": 2, "batch": 64},
    )
    ran = await scene.together()
    assert ran.result is not None, ran.error
    assert [(line["step"], line["volumes"]) for line in scene.metrics() if "dice" in line] == [
        (2, 2),
        (4, 2),
        (5, 3),
    ]
    scene.assert_exact()
