"""What happens to images before the network of a bundle and to its output after it, as in the run that it comes from.

A job's grid and normalisation rules are computed in float64 on the whole volume; MONAI's own transforms round
otherwise, so these stand in for `Spacingd` and `NormalizeIntensityd`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import MapTransform
from safetensors.torch import save_file
from torch import Tensor, nn

FINENESS = 2.0**16
ENDINGS = (".nii.gz", ".nii")


def cases(folder: str, modalities: Sequence[str]) -> list[dict[str, str]]:
    """Every patient of FOLDER/MODALITY/PATIENT.nii.gz, by name; one without a modality is an error."""
    found: dict[str, dict[str, str]] = {}
    for modality in modalities:
        for path in sorted((Path(folder) / modality).iterdir()):
            for ending in ENDINGS:
                if path.name.endswith(ending):
                    found.setdefault(path.name.removesuffix(ending), {})[f"image-{modality}"] = str(path)
                    break
    for patient, files in found.items():
        if lacking := [name for name in modalities if f"image-{name}" not in files]:
            raise ValueError(f"{patient} has no {lacking[0]}: add the file, or name the seat in `absent`")
    return [files for _, files in sorted(found.items())]


class JobSpacingd(MapTransform):
    """A volume [C, x, y, z] in RAS order on a grid of another spacing, in mm: trilinear, the same first voxel.

    Positions count in steps of 1/65536 voxel; beyond the last voxel they have its value.
    """

    tolerance = 1e-3
    """A volume whose spacing differs by no more, in mm, stays as it is."""

    def __init__(self, keys: Collection[Hashable] | Hashable, spacing: Sequence[float]) -> None:
        super().__init__(keys)
        self.spacing = tuple(spacing)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """The volumes of `keys` are replaced."""
        found = dict(data)
        for key in self.keys:
            found[key] = self._resampled(found[key])
        return found

    def _resampled(self, image: MetaTensor) -> MetaTensor:
        affine = np.array(image.affine, np.float64)
        edges = np.sqrt(np.square(affine[:3, :3]).sum(axis=0))
        if np.abs(edges - self.spacing).max() <= self.tolerance:
            return image
        out = np.array(image, np.float32)
        for axis, (old, new) in enumerate(zip(edges, self.spacing, strict=True), start=1):
            last = out.shape[axis] - 1
            length = int(np.rint(_fine(last * old / new))) + 1
            places = np.minimum(_fine(np.arange(length) * (new / old)), last)
            below = np.floor(places).astype(int)
            share = (places - below).reshape([-1 if a == axis else 1 for a in range(4)])
            low = np.take(out, below, axis).astype(np.float64)
            out = low + share * (np.take(out, np.minimum(below + 1, last), axis).astype(np.float64) - low)
        affine[:3, :3] = affine[:3, :3] / edges * self.spacing
        made = MetaTensor(torch.from_numpy(out.astype(np.float32)), meta=dict(image.meta))
        made.affine = torch.from_numpy(affine)
        return made


def _fine(position: Any) -> Any:
    return np.rint(np.asarray(position) * FINENESS) / FINENESS


class JobIntensityd(MapTransform):
    """Intensities of a whole volume by the job's rule for its modality; the key is "image-MODALITY".

    zscore-nonzero: mean 0, deviation 1 over voxels that are not zero, which stay zero. zscore: over all.
    percentile:LOW,HIGH: clipped to two percentiles, which become 0 and 1. window:LOW,HIGH: to two intensities.
    none: as stored.
    """

    def __init__(self, keys: Collection[Hashable] | Hashable, rules: Mapping[str, str]) -> None:
        super().__init__(keys)
        self.rules = dict(rules)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """The volumes of `keys` are replaced."""
        found = dict(data)
        for key in self.keys:
            voxels = np.array(found[key], np.float32)
            if not np.isfinite(voxels).all() or not voxels.any():
                raise ValueError(f"{key}: not finite, or every voxel is zero")
            normalised = _normalised(voxels, self.rules[str(key).removeprefix("image-")])
            made = MetaTensor(torch.from_numpy(normalised), meta=dict(found[key].meta))
            made.affine = found[key].affine
            found[key] = made
        return found


def _normalised(voxels: np.ndarray, rule: str) -> np.ndarray:
    kind, _, written = rule.partition(":")
    if kind == "none":
        return voxels
    if kind.startswith("zscore"):
        chosen = voxels != 0 if kind == "zscore-nonzero" else np.ones(voxels.shape, bool)
        values = voxels[chosen].astype(np.float64)
        values -= values.mean()
        values /= np.sqrt(np.square(values).mean()) or 1.0
        out = np.zeros_like(voxels)
        out[chosen] = values
        return out
    exact, (low, high) = voxels.astype(np.float64), map(float, written.split(","))
    if kind == "percentile":
        low, high = np.percentile(exact, (low, high))
    return ((np.clip(exact, low, high) - low) / ((high - low) or 1.0)).astype(np.float32)


class TaskMaskd(MapTransform):
    """Probabilities [channels, x, y, z] as a mask with the task's own values, [1, x, y, z].

    Args:
        values: mask values, in the task's order.
        regions: name to the values that make it up, in the order of the channels.
        exclusive: one class per voxel, of which channel 0 is the background; else each region where it is above .5.
    """

    threshold = 0.5

    def __init__(
        self,
        keys: Collection[Hashable] | Hashable,
        values: Sequence[int],
        regions: Mapping[str, Sequence[int]],
        exclusive: bool,
    ) -> None:
        super().__init__(keys)
        self.values, self.regions, self.exclusive = list(values), list(regions.values()), exclusive

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """The volumes of `keys` are replaced."""
        found = dict(data)
        for key in self.keys:
            mask = self._values(np.asarray(found[key]))[None]
            found[key] = MetaTensor(torch.from_numpy(mask.astype(np.int32)), meta=dict(found[key].meta))
        return found

    def _values(self, probabilities: np.ndarray) -> np.ndarray:
        if self.exclusive:
            chosen = probabilities.argmax(axis=0)
            masks = np.stack([chosen == number for number in range(1, len(self.regions) + 1)])
        else:
            masks = probabilities > self.threshold
        held = [value for region in self.regions for value in region]
        out = np.zeros(masks.shape[1:], np.uint16)
        # A voxel gets the value that lies in exactly the regions which hold it; where there is none, the smallest
        # region decides.
        for region, mask in sorted(zip(self.regions, masks, strict=True), key=lambda pair: -len(pair[0])):
            out[mask] = min(region, key=held.count)
        for value in reversed(self.values):
            inside = np.array([value in region for region in self.regions])
            if inside.any():
                out[(masks == inside.reshape(-1, *(1,) * (masks.ndim - 1))).all(axis=0)] = value
        return out


def segment(
    loader: Iterable[dict[str, Any]],
    inferer: Callable[..., Tensor],
    network: nn.Module,
    post: Callable[[dict[str, Any]], Any],
    device: torch.device,
    *,
    exclusive: bool,
) -> None:
    """A mask for every patient of the loader, written by `post`.

    Windows are merged as probabilities.
    """

    def probabilities(windows: Tensor) -> Tensor:
        logits: Tensor = network(windows).float()
        return logits.softmax(1) if exclusive else logits.sigmoid()

    for batch in loader:
        with torch.no_grad():
            pred = inferer(batch["image"].to(device), probabilities)
        for image, one in zip(batch["image"], pred, strict=True):
            post({"image": image, "pred": MetaTensor(one.cpu(), meta=dict(image.meta))})


def encode(
    loader: Iterable[dict[str, Any]],
    inferer: Callable[..., Mapping[str, Tensor]],
    network: nn.Module,
    folder: str,
    device: torch.device,
) -> None:
    """The levels of every patient, window beside window, as FOLDER/PATIENT.safetensors: "SEAT/x0" [C, x, y, z]."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    for batch in loader:
        with torch.no_grad():
            levels = inferer(batch["image"].to(device), network)
        name = Path(str(batch["image"].meta["filename_or_obj"][0])).name.partition(".nii")[0]
        made = {level: torch.as_tensor(tensor[0].cpu()).contiguous() for level, tensor in levels.items()}
        save_file(made, Path(folder) / f"{name}.safetensors")
