"""`configs/metadata.json` and `configs/inference.json` of a bundle, from the facts of what it holds."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

from splitpeer.export.half import DECODER, DECODER_FILE, ENCODERS, MASKS, WHOLE, encoder_file
from splitpeer.results.segmentation import NOT_A_DEVICE
from splitpeer.training.windows import GAUSSIAN_SIGMA

Facts = Mapping[str, Any]
SCHEMA = (
    "https://github.com/Project-MONAI/MONAI-extra-test-data/releases/download/0.8.1/meta_schema_20240725.json"
)
KEY = "splitproto"
"""Of the facts in metadata.json."""
TITLES = {ENCODERS: "encoders", DECODER: "fusion and decoder", MASKS: "the masks' site", WHOLE: "network"}


def metadata(facts: Facts) -> dict[str, Any]:
    """MONAI's, with the facts under `KEY`; of a site without weights the facts alone."""
    if facts["kind"] == MASKS:
        return {"intended_use": NOT_A_DEVICE, KEY: dict(facts)}
    task = facts.get("task")
    what = f"{TITLES[facts['kind']]} of job {facts['job']}, step {facts['step']} of {facts['steps']}"
    regions = ", ".join(task["regions"]) if task else ""
    found: dict[str, Any] = {
        "schema": SCHEMA,
        "version": "1.0.0",
        "changelog": {"1.0.0": f"run {facts['run']}, step {facts['step']}"},
        "monai_version": version("monai"),
        "pytorch_version": version("torch").partition("+")[0],
        "numpy_version": version("numpy"),
        "required_packages_version": {name: version(name) for name in ("safetensors", "nibabel")}
        | ({"einops": version("einops")} if "Swin" in str(facts) else {}),
        "supported_apps": {},
        "name": f"{facts['job']} ({TITLES[facts['kind']]})",
        "task": f"Segmentation of {regions}" if task else "Encoding of images for a segmentation network",
        "description": f"The {what}, trained by the federation {facts['federation']} with splitproto: images stayed "
        "at the hospitals.",
        "authors": f"The sites of the federation {facts['federation']}",
        "copyright": "Of the parties that trained it; see docs/data_license.txt",
        "data_source": "Patients of the hospitals of the federation; not published",
        "data_type": "nifti",
        "image_classes": f"{', '.join(_modalities(facts))}, one volume each, on one grid",
        "intended_use": NOT_A_DEVICE,
        "network_data_format": {"inputs": _inputs(facts), "outputs": _outputs(facts)},
        KEY: dict(facts),
    }  # fmt: skip
    if task:
        named = ", ".join(f"{value} {name}" for name, value in task["values"].items())
        found["label_classes"] = f"0 background, {named}"
        found["pred_classes"] = f"a channel for each of {', '.join(_channels(task))}"
    return found


def inference(facts: Facts) -> dict[str, Any]:
    """What `python -m monai.bundle run --config_file configs/inference.json` does, from the bundle's folder."""
    common: dict[str, Any] = {
        # MONAI takes one name a line.
        "imports": [f"$import {name}" for name in ("torch", "numpy")]
        + [f"$from safetensors.torch import {name}" for name in ("load_file", "save_file")]
        + [f"$from scripts.inference import {name}" for name in ("cases", "encode", "segment")],
        "bundle_root": ".",
        "device": "$torch.device('cuda:0' if torch.cuda.is_available() else 'cpu')",
        "network": "$@network_def.to(@device).eval()",
    }  # fmt: skip
    if facts["kind"] == DECODER:
        return common | _of_decoder(facts)
    common |= _images(facts)
    return common | (_of_encoders(facts) if facts["kind"] == ENCODERS else _of_whole(facts))


def _of_decoder(facts: Facts) -> dict[str, Any]:
    """Feature maps from one file, logits into another."""
    return {
        "absent": [],
        "network_def": _decoder(facts),
        "levels_file": "$@bundle_root + '/levels.safetensors'",
        "logits_file": "$@bundle_root + '/logits.safetensors'",
        "levels": "$load_file(@levels_file)",
        "run": [
            "$save_file({'logits': @network({k: v.to(@device) for k, v in @levels.items()})"
            ".detach().cpu().contiguous()}, @logits_file)"
        ],
    }


def _of_encoders(facts: Facts) -> dict[str, Any]:
    """Images to feature maps."""
    return {
        "network_def": _encoders(facts),
        "inferer": _inferer(facts, 0.0, blend=False),
        "run": ["$encode(@dataloader, @inferer, @network, @output_dir, @device)"],
    }


def _of_whole(facts: Facts) -> dict[str, Any]:
    """Images to masks."""
    return {
        "network_def": {
            "_target_": "scripts.network.SplitNetwork",
            "encoders": _encoders(facts),
            "decoder": _decoder(facts),
            "precision": facts["precision"],
            "summed": facts["sum"],
        },
        "inferer": _inferer(facts, facts["overlap"], blend=facts["dimensions"] == 3),
        "postprocessing": {"_target_": "Compose", "transforms": _saving(facts["task"])},
        "run": [
            "$segment(@dataloader, @inferer, @network, @postprocessing, @device, "
            f"exclusive={facts['task']['exclusive']})"
        ],
    }


def _encoders(facts: Facts) -> dict[str, Any]:
    return {
        "_target_": "scripts.network.Encoders",
        "encoders": facts["encoders"],
        "channels": {seat: len(held) for seat, held in facts["seats"].items()},
        "weights": {seat: _at(encoder_file(seat)) for seat in facts["encoders"]},
        "absent": "@absent",
    }


def _decoder(facts: Facts) -> dict[str, Any]:
    return {**facts["decoder"], "weights": _at(DECODER_FILE), "absent": "@absent"}


def _saving(task: Mapping[str, Any]) -> list[dict[str, Any]]:
    """From probabilities to a file with the task's values, on the grid of the patient's own image."""
    widest = max(task["values"].values())
    return [
        {
            "_target_": "scripts.inference.TaskMaskd", "keys": "pred", "values": list(task["values"].values()),
            "regions": task["regions"], "exclusive": task["exclusive"],
        },
        {
            "_target_": "SaveImaged", "keys": "pred", "output_dir": "@output_dir", "separate_folder": False,
            "output_postfix": "", "resample": True, "mode": "nearest", "padding_mode": "border",
            "output_dtype": f"$numpy.{'uint8' if widest < 256 else 'uint16'}", "print_log": False,
        },
    ]  # fmt: skip


def _images(facts: Facts) -> dict[str, Any]:
    """Reading of images, on the job's grid and with its normalisation."""
    channels = {seat: list(held) for seat, held in facts["seats"].items()}
    rules = facts["normalisation"]
    transforms: list[dict[str, Any]] = [
        {"_target_": "LoadImaged", "keys": "@keys", "reader": "NibabelReader", "ensure_channel_first": True},
        {"_target_": "Orientationd", "keys": "@keys", "axcodes": "RAS", "labels": None},
    ]
    if facts["spacing"]:
        transforms.append(
            {"_target_": "scripts.inference.JobSpacingd", "keys": "@keys", "spacing": facts["spacing"]}
        )
    transforms += [
        {"_target_": "scripts.inference.JobIntensityd", "keys": "@keys", "rules": rules},
        {"_target_": "ConcatItemsd", "keys": "@keys", "name": "image"},
    ]
    return {
        "dataset_dir": "$@bundle_root + '/images'",
        "output_dir": "$@bundle_root + '/out'",
        "absent": [],
        "seats": channels,
        "modalities": "$[m for seat, held in @seats.items() if seat not in @absent for m in held]",
        "keys": "$['image-' + m for m in @modalities]",
        "datalist": "$cases(@dataset_dir, @modalities)",
        "preprocessing": {"_target_": "Compose", "transforms": transforms},
        "dataset": {"_target_": "Dataset", "data": "@datalist", "transform": "@preprocessing"},
        "dataloader": {"_target_": "DataLoader", "dataset": "@dataset", "batch_size": 1},
    }


def _inferer(facts: Facts, overlap: float, *, blend: bool) -> dict[str, Any]:
    inferer = {"roi_size": list(facts["window"]), "sw_batch_size": 4, "overlap": overlap}
    if facts["dimensions"] == 2:
        return {"_target_": "SliceInferer", "spatial_dim": 2, **inferer}
    if not blend:
        return {"_target_": "SlidingWindowInferer", **inferer}
    return {"_target_": "SlidingWindowInferer", **inferer, "mode": "gaussian", "sigma_scale": GAUSSIAN_SIGMA}


def _at(file: str) -> str:
    return f"$@bundle_root + '/{file}'"


def _modalities(facts: Facts) -> list[str]:
    return [modality for held in facts["seats"].values() for modality in held]


def _channels(task: Mapping[str, Any]) -> list[str]:
    return [*(["background"] if task["exclusive"] else []), *task["regions"]]


def _tensor(
    kind: str, shape: list[int], channels: int, names: list[str], spread: list[float]
) -> dict[str, Any]:
    return {
        "type": "image" if kind != "feature map" else "tuples",
        "format": kind,
        "num_channels": channels,
        "spatial_shape": shape,
        "dtype": "float32",
        "value_range": spread,
        "is_patch_data": True,
        "channel_def": {str(number): name for number, name in enumerate(names)},
    }


def _levels(facts: Facts, seats: list[str]) -> dict[str, Any]:
    found = {}
    for seat in seats:
        for name, (channels, shape) in facts["cut"].items():
            found[f"{seat}/{name}"] = _tensor(
                "feature map", list(shape), channels, [f"{name} {n}" for n in range(channels)], []
            )
    return found


def _inputs(facts: Facts) -> dict[str, Any]:
    if facts["kind"] == DECODER:
        return _levels(facts, facts["decoder"]["seats"])
    names = _modalities(facts)
    return {"image": _tensor("magnitude", facts["window"], len(names), names, [])}


def _outputs(facts: Facts) -> dict[str, Any]:
    if facts["kind"] == ENCODERS:
        return _levels(facts, list(facts["seats"]))
    names = _channels(facts["task"])
    return {"pred": _tensor("segmentation", facts["window"], len(names), names, [])}
