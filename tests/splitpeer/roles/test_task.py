"""Any task over the wire: classes, custom regions, normalisation by modality, modalities of any name."""

from __future__ import annotations

import json
import logging

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.inferers import sliding_window_inference
from monai.metrics import compute_hausdorff_distance

from splitpeer.report.charts import draw_curve
from splitpeer.training.metrics import VolumeDice

CLASSES = {"values": {"shell": 1, "core": 2, "rim": 3}, "regions": {"rind": ["shell"], "kernel": ["core", "rim"]},
           "exclusive": True}  # fmt: skip
RULES = {"t1": "window:50,150", "t2": "percentile:1,99"}


async def test_a_task_of_two_exclusive_classes_from_end_to_end(scene, caplog) -> None:
    """Bit for bit the training of one process; masks hold the task's values; figures are those of MONAI."""
    caplog.set_level(logging.INFO, "splitpeer")
    scene.cast(
        "t1",
        "t2",
        task={**CLASSES, "normalisation": RULES},
        model={"dimensions": 3},
        data={"window": [32, 32, 32], "validation": 2},
        training={"steps": 8, "batch": 1, "checkpoint_every": 8, "learning_rate": 0.03},
        evaluation={"batch": 4},
    )
    scene.coordinator(data={"convention": "task"})
    ran = await scene.together()
    assert ran.result is not None, ran.error
    scene.assert_exact()
    result = json.loads((scene.output / "result.json").read_text())
    assert list(result["dice"]) == list(result["hd95"]) == ["rind", "kernel", "mean"]

    network, masks, task = scene.network(), scene.masks(), scene.task()
    network.load_state_dict(scene.weights(8))
    network.eval()
    dice, distances, volumes = VolumeDice(task.region_names), [], []
    for key in scene.patients()[1]:
        shape = masks.geometry(key).shape
        x = np.stack([scene.images(m).window(key, (0, 0, 0), shape)[0] for m in ("t1", "t2")])
        with torch.no_grad():
            whole = sliding_window_inference(
                torch.from_numpy(x)[None],
                (32, 32, 32),
                4,
                lambda x: network({"t1": x[:, :1], "t2": x[:, 1:]}).softmax(1),
                overlap=0.25,
                mode="gaussian",
            )[0].numpy()
        classes = whole.argmax(0)
        found = np.stack([classes == 1, classes == 2])
        truth = masks.window(key, (0, 0, 0), shape)
        dice.add(found, truth)
        saved = nib.load(scene.output / "predictions" / f"{masks.case(key).patient}.nii.gz")
        assert np.array_equal(np.asarray(saved.dataobj), np.array([0, 1, 2], np.uint8)[classes])
        both = [torch.from_numpy(m.astype(np.float32))[None] for m in (found, truth)]
        distances.append(
            compute_hausdorff_distance(*both, include_background=True, percentile=95)[0].tolist()
        )
        volumes.append([found[0].sum() / 1000, truth[0].sum() / 1000])
    for region, value in dice.result().items():
        assert result["dice"][region] == pytest.approx(value, abs=1e-6)
    if np.isfinite(distances).all():
        assert [result["hd95"][r] for r in task.region_names] == pytest.approx(
            np.mean(distances, axis=0).tolist()
        )
    assert list(result["volume_ml"]["rind"].values()) == pytest.approx(np.mean(volumes, axis=0).tolist())
    (measured,) = [r.fields for r in caplog.records if r.getMessage() == "job.distances"]
    assert measured["unit"] == "mm" and "kernel" in measured
    told = [r.fields["figures"] for r in caplog.records if r.getMessage() == "job.progress"]
    assert any("dice_rind" in figures for figures in told)
    assert draw_curve(scene.output).stat().st_size > 1000


async def test_overlapping_regions_of_ones_own_and_modalities_of_any_name(scene) -> None:
    """SP-11.12-12: what the sites normalise by is what the job says of the names that they have."""
    task = {"values": {"a": 1, "b": 2, "c": 3}, "regions": {"all": ["a", "b", "c"], "inner": ["b"]},
            "normalisation": {"adc": "zscore", "pet-fdg": "none"}}  # fmt: skip
    scene.cast("t1", "t2", sites={"site-t1": "adc", "site-t2": "pet-fdg"}, task=task, training={"steps": 2})
    scene.coordinator(data={"convention": "task"})
    scene.client("t1", peer={"modality": "ADC"})
    scene.client("t2", peer={"modality": "pet-fdg"})
    ran = await scene.together()
    assert ran.result is not None and ran.result.complete, (ran.error, ran.clients)
    assert list(ran.result.dice) == ["all", "inner", "mean"]
    assert ran.result.made_from == ["adc", "pet-fdg"]
    values = {
        int(value)
        for path in (scene.output / "predictions").glob("*.nii.gz")
        for value in np.unique(np.asarray(nib.load(path).dataobj))
    }
    assert values <= {0, 1, 2}  # c is in `all` alone, as a is, and a is named first


async def test_a_site_whose_policy_forbids_the_normalisation_declines(scene) -> None:
    """SP-11.12-11."""
    scene.cast("t1", "t2", task={"normalisation": {"t2": "none"}}, training={"steps": 1})
    scene.client("t2", policy={"normalisation": ["zscore-nonzero", "zscore"]})
    ran = await scene.together()
    assert ran.result is None
    assert "normalisation none is not allowed here" in str(ran.error)
