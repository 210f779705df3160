"""A segmentation as NIfTI on the patient's own grid, and a JSON next to it that says where it comes from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from splitpeer.data.files import SUFFIXES, stem
from splitpeer.data.geometry import shear
from splitpeer.data.nifti_write import DESCRIP, nifti, packed
from splitpeer.errors import ConfigError
from splitpeer.results.segmentation import NOT_A_DEVICE, SHORT_NOT_A_DEVICE, Segmentation
from splitpeer.storage import durable

Kind = Literal["values", "probabilities"]
"""One volume with the task's values, or one per region, float32 of 0 to 1."""

MAX_SHEAR = 0.01
"""mm; a quaternion can say no more than this of an affine's axes that are not at right angles."""


def write_nifti(segmentation: Segmentation, path: Path, kind: Kind = "values") -> Path:
    """Write the mask, and the JSON next to it; returns the path of the JSON.

    Args:
        segmentation: what is written.
        path: ends in .nii or .nii.gz; an older file is replaced. The JSON has the same name with .json.
        kind: what the voxels hold.

    Raises:
        ConfigError: the name has another ending, or probabilities were not kept, or the folder may not be written.
        DiskTrouble: full disk. There is no half file, and no mask without its JSON.
    """
    if not path.name.lower().endswith(SUFFIXES):
        raise ConfigError(f"{path}: a NIfTI file is called .nii.gz or .nii: choose another name")
    beside = path.with_name(f"{stem(path)}.json")
    voxels = _voxels(segmentation, kind)
    text = json.dumps(provenance(segmentation, kind), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    data = _file(segmentation, voxels)
    if path.name.lower().endswith(".gz"):
        data = packed(data)
    try:
        durable.replace(beside, text.encode())
        durable.replace(path, data)
    except OSError as error:
        raise durable.refusal(error, str(path), "--out") from None
    return beside


def provenance(segmentation: Segmentation, kind: Kind = "values") -> dict[str, Any]:
    """What stands next to a mask, for machines: plain JSON values."""
    origin, task = segmentation.origin, segmentation.task
    found: dict[str, Any] = {
        "format": 1,
        "notice": NOT_A_DEVICE,
        "patient": segmentation.patient,
        "created": origin.created.isoformat(timespec="seconds"),
        "software": origin.software,
        "run": {"id": origin.run, "name": origin.name, "step": origin.step, "model_sha256": origin.model},
        "modalities": {"used": list(origin.used), "missing": list(origin.missing)},
        "warnings": list(origin.cautions),
        "grid": {
            "shape": list(segmentation.shape),
            "affine_ras_mm": segmentation.affine.tolist(),
            "voxel_ml": segmentation.voxel_ml,
        },
        "values": {str(value): name for value, name in task.names.items()},
        "exclusive": task.exclusive,
        "regions": [
            {
                "name": region.name,
                "title": str(region),
                "values": list(region.values),
                "voxels": segmentation.voxels[region.name],
                "ml": round(segmentation.volumes[region.name], 4),
            }
            for region in task.regions
        ],
        "file": {"holds": kind},
    }
    if kind == "values":
        found["file"]["voxels_decided_by_the_smallest_region"] = undecided(segmentation)
    return found


def undecided(segmentation: Segmentation) -> int:
    """Voxels whose set of regions no value of the task stands for: a map of values says less of them than the
    regions do (see `Task.labels`).
    """
    again = segmentation.task.masks(segmentation.task.labels(segmentation.masks)).astype(bool)
    return int((again != segmentation.masks).any(axis=0).sum())


def _voxels(segmentation: Segmentation, kind: Kind) -> np.ndarray:
    if kind == "values":
        return segmentation.task.labels(segmentation.masks)
    if segmentation.probabilities is None:
        raise ConfigError("probabilities were not kept: ask for the segmentation again, with them")
    return np.moveaxis(segmentation.probabilities, 0, -1).astype(np.float32)


def _file(segmentation: Segmentation, voxels: np.ndarray) -> bytes:
    straight = shear(segmentation.shape, segmentation.affine) <= MAX_SHEAR
    return nifti(voxels, segmentation.affine, "scanner", quaternion=straight, descrip=descrip(segmentation))


def descrip(segmentation: Segmentation) -> str:
    """The header's description; no patient in it."""
    origin = segmentation.origin
    without = f" without {','.join(origin.missing)}" if origin.missing else ""
    tail = f"{without}, {SHORT_NOT_A_DEVICE}"
    head = f"{origin.software} {origin.name} {origin.model[:12]}".encode("ascii", "replace").decode()
    tail = tail.encode("ascii", "replace").decode()[:DESCRIP]
    return head[: DESCRIP - len(tail)] + tail


def in_one_line(volumes: Mapping[str, float]) -> str:
    """Volumes in one line, for a console: "WT 38.2 ml, TC 11.0 ml"."""
    return ", ".join(f"{name} {ml:.1f} ml" for name, ml in volumes.items())
