"""Can what is segmented, such as a tumour, be found in a reconstruction? A network trained on other patients answers.

A blurred picture with a low SSIM may still show where a tumour is and how large. The small network is fixed before it
sees any reconstruction, trained on blurred and noisy copies too so that it does not fail for their look alone,
and judged on the true images as well: that Dice is the ceiling.
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
from splitpeer.leakage.metrics import Image, align, brain_mask
from splitpeer.leakage.scores import Score, summarise
from splitpeer.training.loss import region_loss

FEATURES = (8, 8, 16, 32, 64, 8)
BLURS = (0.0, 0.7, 1.5)  # voxels; a half of all batches stays sharp
NOISE = 0.5  # at most, in standard deviations of the body
BATCH = 8
LEARNING_RATE = 5e-3


@dataclass(frozen=True)
class Segmenter:
    """A trained network: images in normalised intensities to masks of all regions."""

    network: nn.Module

    def __call__(self, images: Image) -> NDArray[np.bool_]:
        """[N, 1, *spatial] to bool [N, regions, *spatial]."""
        device = next(self.network.parameters()).device
        found = []
        with torch.inference_mode():
            for start in range(0, len(images), 4 * BATCH):
                batch = torch.as_tensor(np.asarray(images[start : start + 4 * BATCH], dtype=np.float32))
                found.append((self.network(batch.to(device)) > 0).cpu().numpy())
        return np.concatenate(found)


def train_segmenter(
    images: Image, masks: NDArray[Any], *, steps: int = 300, seed: int = 0, device: str = "cpu"
) -> Segmenter:
    """Train on patients that no attack is judged on. About 40 ms a step of one core for 96 x 96.

    Args:
        images: [N, 1, *spatial], one modality, normalised; every axis a multiple of 16.
        masks: 0/1 [N, regions, *spatial].
        steps: of `BATCH` images each.
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
        network = BasicUNet(dimensions, 1, y.shape[1], FEATURES, act=("LeakyReLU", {"negative_slope": 0.1}))
    network.to(device).train()
    blurs = [GaussianFilter(dimensions, sigma).to(device) if sigma else nn.Identity() for sigma in BLURS]
    optimiser = torch.optim.Adam(network.parameters(), LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, LEARNING_RATE, total_steps=max(steps, 2))
    random = np.random.default_rng(seed)
    for _ in range(steps):
        rows = torch.as_tensor(random.choice(len(x), min(BATCH, len(x)), replace=False))
        flips = [2 + axis for axis in range(dimensions) if random.random() < 0.5]
        image, target = (t[rows].flip(flips).to(device) for t in (x, y))
        loss = region_loss(network(_worn(image, blurs, random)), target)
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

    Unlike `align` it keeps the contrast of a poor reconstruction, which is what an adversary would look at. Only the
    sign is taken from the truth.
    """
    shown = np.zeros(truth.shape, dtype=np.float32)
    for out, image, true in zip(shown[:, 0], reconstructed[:, 0], truth[:, 0], strict=True):
        mask = brain_mask(true)
        if not mask.any():
            continue
        inside = align(image, true, mask)[mask]  # finite, and with the truth's sign
        spread = inside.std()
        wanted = true[mask].astype(np.float64)
        out[mask] = (inside - inside.mean()) * (wanted.std() / spread if spread > 0 else 0.0) + wanted.mean()
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
) -> tuple[Score, NDArray[np.bool_]]:
    """Dice of all that is segmented as found in the reconstructions, and the masks found.

    Args:
        truth, reconstructed: float [N, 1, *spatial].
        masks: 0/1 [N, 1 + parts, *spatial], all that is segmented first. Samples without any of it do not count.
        patients: [N].
        floors: of the same truth; the network looks at their images too.

    Returns:
        The score, its ceiling the Dice on the true images; bool [N, *spatial] for pictures.

    Raises:
        ValueError: shapes or counts differ.
    """
    whole = np.asarray(masks)[:, 0] != 0
    if truth.shape != reconstructed.shape or whole.shape != truth[:, 0].shape:
        raise ValueError(
            f"truth {truth.shape}, reconstructions {reconstructed.shape}, masks {masks.shape} do not fit"
        )

    def dice(images: Image) -> tuple[list[float], NDArray[np.bool_]]:
        found = segmenter(presentable(images, truth))[:, 0] & (truth[:, 0] != 0)
        return [mask_scores.dice(t, f) for t, f in zip(whole, found, strict=True)], found

    values, found = dice(reconstructed)
    low = {
        name: summarise(dice(images)[0], patients).mean
        for name, images in (floors.images if floors else {}).items()
    }
    ceiling = summarise(dice(truth)[0], patients).mean
    return summarise(values, patients, floors=low, ceiling=ceiling, seed=seed), found
