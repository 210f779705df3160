"""Can what is segmented, such as a tumour, be found in a reconstruction? A network trained on other patients answers.

A blurred picture with a low SSIM may still show where a tumour is and how large. The small network is fixed before it
sees any reconstruction, trained on blurred and noisy copies too so that it does not fail for their look alone,
and judged on the true images as well: that Dice is the ceiling. What one would tell a patient is read off the same
finding: whether there is a tumour, how large it is, and on which side.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from monai.networks.layers import GaussianFilter
from monai.networks.nets import BasicUNet
from numpy.typing import NDArray
from torch import Tensor, nn

from splitpeer.leakage import masks as mask_scores
from splitpeer.leakage.floors import Floors
from splitpeer.leakage.metrics import Image, brain_mask, match
from splitpeer.leakage.scores import Score, summarise
from splitpeer.training.loss import region_loss
from splitpeer.training.optimiser import Adam

FEATURES = (8, 8, 16, 32, 64, 8)
BLURS = (0.0, 0.7, 1.5)  # voxels; a half of all batches stays sharp
NOISE = 0.5  # at most, in standard deviations of the body
BATCH = 8
LEARNING_RATE = 5e-3
LEAST = 5  # voxels that count as a finding
SAME_ANSWER = "the same answer for all"
OTHER_SIZES = "mean size of other patients"


@dataclass(frozen=True)
class Segmenter:
    """A trained network: images in normalised intensities to masks of all regions."""

    network: nn.Module

    def __call__(self, images: Image) -> NDArray[np.bool_]:
        """[N, channels, *spatial] to bool [N, regions, *spatial]."""
        return self.logits(images) > 0

    def logits(self, images: Image) -> NDArray[np.float32]:
        """[N, channels, *spatial] to float32 [N, regions, *spatial]; above 0 where a region is more likely than not."""
        device = next(self.network.parameters()).device
        found = []
        with torch.inference_mode():
            for start in range(0, len(images), 4 * BATCH):
                batch = torch.as_tensor(np.asarray(images[start : start + 4 * BATCH], dtype=np.float32))
                found.append(self.network(batch.to(device)).float().cpu().numpy())
        return np.concatenate(found)


def train_segmenter(
    images: Image, masks: NDArray[Any], *, steps: int = 300, worn: bool = True, seed: int = 0, device: str = "cpu"
) -> Segmenter:  # fmt: skip
    """Train on patients that no attack is judged on. About 40 ms a step of one core for 96 x 96.

    Args:
        images: [N, channels, *spatial], normalised; every axis a multiple of 16.
        masks: 0/1 [N, regions, *spatial].
        steps: of `BATCH` images each.
        worn: blur and noise half of the images, for a network that is to look at reconstructions.
        seed: of weights and batches; the global generators are left as they were.

    Raises:
        ValueError: counts or shapes differ.
    """
    if len(images) != len(masks) or images.shape[2:] != masks.shape[2:] or not len(images):
        raise ValueError(f"images {images.shape} and masks {masks.shape} do not fit")
    x = torch.as_tensor(np.asarray(images, dtype=np.float32))
    y = torch.as_tensor((np.asarray(masks) != 0).astype(np.float32))
    dimensions = x.ndim - 2
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = BasicUNet(
            dimensions, x.shape[1], y.shape[1], FEATURES, act=("LeakyReLU", {"negative_slope": 0.1})
        )
    network.to(device).train()
    blurs = [GaussianFilter(dimensions, sigma).to(device) if sigma else nn.Identity() for sigma in BLURS]
    optimiser = Adam(network.parameters(), LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, LEARNING_RATE, total_steps=max(steps, 2))
    random = np.random.default_rng(seed)
    for _ in range(steps):
        rows = torch.as_tensor(random.choice(len(x), min(BATCH, len(x)), replace=False))
        flips = [2 + axis for axis in range(dimensions) if random.random() < 0.5]
        image, target = (t[rows].flip(flips).to(device) for t in (x, y))
        loss = region_loss(network(_worn(image, blurs, random) if worn else image), target)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        schedule.step()
    return Segmenter(network.eval())


def _worn(image: Tensor, blurs: Sequence[nn.Module], random: np.random.Generator) -> Tensor:
    """Half of the time as it is; else blurred and noisy, with the background kept at 0."""
    if random.random() < 0.5:
        return image
    blurred: Tensor = blurs[int(random.integers(len(blurs)))](image)
    noise = torch.as_tensor(random.standard_normal(image.shape, dtype=np.float32)).to(image)
    return (blurred + random.uniform(0, NOISE) * noise) * (image != 0)


def presentable(reconstructed: Image, truth: Image) -> NDArray[np.float32]:
    """Reconstructions with the truth's mean and deviation inside the body and 0 outside, [N, 1, *spatial].

    It keeps the contrast of a poor reconstruction, which is what an adversary would look at. Only the sign is taken
    from the truth.
    """
    shown = np.zeros(truth.shape, dtype=np.float32)
    for out, image, true in zip(shown[:, 0], reconstructed[:, 0], truth[:, 0], strict=True):
        mask = brain_mask(true)
        if mask.any():
            out[mask] = match(image, true, mask)[mask]
    return shown


def score_tumour(
    segmenter: Segmenter,
    truth: Image,
    reconstructed: Image,
    masks: NDArray[Any],
    patients: Sequence[Any],
    *,
    floors: Floors | None = None,
    seed: int = 0,
) -> tuple[dict[str, Score], NDArray[np.bool_]]:
    """All that is segmented as found in the reconstructions: its overlap, and what one would tell the patient.

    Args:
        truth, reconstructed: float [N, 1, *spatial].
        masks: 0/1 [N, 1 + parts, *spatial], all that is segmented first.
        patients: [N].
        floors: of the same truth; the network looks at their images too.

    Returns:
        tumour_dice, tumour_volume and tumour_side of the samples that hold any of it, tumour_presence of all (see
        `_told`), their ceilings what is found in the true images; and the masks found, bool [N, *spatial], for
        pictures.

    Raises:
        ValueError: shapes or counts differ.
    """
    whole = np.asarray(masks)[:, 0] != 0
    if truth.shape != reconstructed.shape or whole.shape != truth[:, 0].shape:
        raise ValueError(
            f"truth {truth.shape}, reconstructions {reconstructed.shape}, masks {masks.shape} do not fit"
        )

    def found_in(images: Image) -> NDArray[np.bool_]:
        found: NDArray[np.bool_] = segmenter(presentable(images, truth))[:, 0] & (truth[:, 0] != 0)
        return found

    found = found_in(reconstructed)
    told, best = _told(whole, found, truth), _told(whole, found_in(truth), truth)
    low: dict[str, dict[str, float | None]] = {name: _guesses(name, whole, patients) for name in told}
    for floor, images in (floors.images if floors else {}).items():
        for name, values in _told(whole, found_in(images), truth).items():
            low[name][floor] = summarise(values, patients).mean
    scores = {
        name: summarise(
            values, patients, floors=low[name], ceiling=summarise(best[name], patients).mean, most=1.0,
            shares=name in ("tumour_presence", "tumour_side"), seed=seed,
        )
        for name, values in told.items()
    }  # fmt: skip
    return scores, found


def _told(whole: NDArray[np.bool_], found: NDArray[np.bool_], truth: Image) -> dict[str, NDArray[np.float64]]:
    """By figure, float64 [N], 1 at best, NaN where a sample has none.

    tumour_dice: overlap. tumour_volume: the smaller volume over the larger one. tumour_side: whether it lies in the
    true half of the body along the first axis; a half where nothing is found. tumour_presence: whether there is any.
    """
    axes = tuple(range(1, whole.ndim))
    size, seen = whole.sum(axis=axes), found.sum(axis=axes)
    there = size > 0
    side = [
        np.nan if not any_ else 0.5 if not many else float(_side(t, body) == _side(f, body))
        for t, f, body, any_, many in zip(whole, found, truth[:, 0] != 0, there, seen, strict=True)
    ]
    return {
        "tumour_dice": np.asarray([mask_scores.dice(t, f) for t, f in zip(whole, found, strict=True)]),
        "tumour_volume": np.where(there, np.minimum(size, seen) / np.maximum(np.maximum(size, seen), 1), np.nan),
        "tumour_side": np.asarray(side),
        "tumour_presence": ((seen >= LEAST) == there).astype(np.float64),
    }  # fmt: skip


def _side(mask: NDArray[np.bool_], body: NDArray[np.bool_]) -> bool:
    """Whether the middle of `mask` lies in the upper half of `body` along the first axis."""
    return bool(np.nonzero(mask)[0].mean() > np.nonzero(body)[0].mean())


def _guesses(name: str, whole: NDArray[np.bool_], patients: Sequence[Any]) -> dict[str, float | None]:
    """What is reached without looking at any image."""
    axes = tuple(range(1, whole.ndim))
    there, size = whole.any(axis=axes), whole.sum(axis=axes).astype(np.float64)
    if name == "tumour_presence":
        return {SAME_ANSWER: max(float(there.mean()), 1 - float(there.mean()))}
    if name == "tumour_side":
        return {SAME_ANSWER: 0.5}
    if name != "tumour_volume":
        return {}
    names = np.asarray([str(patient) for patient in patients])
    guessed = np.full(len(size), np.nan)
    for row in np.flatnonzero(there):
        others = size[(names != names[row]) & there]
        if len(others):
            guessed[row] = min(size[row], others.mean()) / max(size[row], others.mean())
    return {OTHER_SIZES: summarise(guessed, patients).mean}
