"""What a site without labels can notice of a coordinator that cheats: gradients unlike those of a segmentation.

Tests that send random labels on purpose (SplitGuard) or simulate the whole job (SplitOut) need labels, which an
image site does not hold. But it can train on a task of its own: blobs that it paints into its own
images. The gradients of that training are what gradients of a segmentation look like, the coordinator's
included; a local outlier factor learned on them flags what looks different. It is a smoke detector, not a proof:
a coordinator that mixes honest gradients into its own is noticed later, or not at all.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Iterable, Iterator, Mapping

import numpy as np
import torch
from scipy.ndimage import gaussian_filter
from scipy.spatial import cKDTree

from splitpeer.errors import AttackImpossible
from splitpeer.models import Encoder, build_decoder, site_seed
from splitpeer.training.loss import region_loss
from splitpeer.training.optimiser import make_optimiser

_TINY = 1e-30


class GradientWatch:
    """A novelty detector over training steps: local outlier factor and a vote over the last steps.

    Fitted on the site's own simulated training (`fit`), then given each step's gradients (`tell`).

    Args:
        neighbours: of the local outlier factor (Breunig et al., SIGMOD 2000).
        tolerance: share of the site's own simulated steps that may look odd.
        margin: how far beyond those a step must score, since the coordinator's task is another.
        window: steps that vote.
        share: of them that must look odd for an alarm.
    """

    def __init__(
        self,
        *,
        neighbours: int = 20,
        tolerance: float = 0.02,
        margin: float = 2.0,
        window: int = 10,
        share: float = 0.6,
    ) -> None:
        self.neighbours, self.tolerance, self.margin, self.share = neighbours, tolerance, margin, share
        self._votes: deque[bool] = deque(maxlen=window)
        self._limit = np.inf

    def fit(self, steps: Iterable[tuple[Mapping[str, np.ndarray], np.ndarray]]) -> None:
        """Learn from (gradients, own images) of the site's own simulated training.

        Raises:
            AttackImpossible: fewer than four steps.
        """
        found = [describe(gradients, images) for gradients, images in steps]
        if len(found) < 4:
            raise AttackImpossible("a watch over gradients needs at least four simulated steps to learn from")
        rows = np.stack(found)
        # Every second step sets the limit for those that the factor learned from.
        learned, held = rows[::2], rows[1::2]
        self._middle, self._scale = learned.mean(axis=0), learned.std(axis=0) + 1e-6
        self._factor = _OutlierFactor((learned - self._middle) / self._scale, self.neighbours)
        self._limit = self.margin * float(np.quantile(self._score(held), 1 - self.tolerance))

    def odd(self, gradients: Mapping[str, np.ndarray], images: np.ndarray) -> float:
        """How odd one step looks: above 1 is beyond what the tolerance allows."""
        return float(self._score(describe(gradients, images)[None])[0] / self._limit)

    def tell(self, gradients: Mapping[str, np.ndarray], images: np.ndarray) -> bool:
        """One more step; True: alarm, most of the last steps look odd."""
        self._votes.append(self.odd(gradients, images) > 1)
        return len(self._votes) == self._votes.maxlen and sum(self._votes) >= self.share * len(self._votes)

    def _score(self, rows: np.ndarray) -> np.ndarray:
        return self._factor((rows - self._middle) / self._scale)


def honest_training(
    encoder: Encoder, images: np.ndarray, masks: np.ndarray, *, steps: int, batch: int = 8, rate: float = 5e-3,
    seed: int = 0,
) -> Iterator[tuple[dict[str, np.ndarray], np.ndarray]]:  # fmt: skip
    """What a site is sent in honest training of a copy of `encoder`, alone: (gradients, own images) of each step."""
    site = copy.deepcopy(encoder)
    decoder = build_decoder(
        encoder.backbone, ("own",), out_channels=masks.shape[1], seed=site_seed(seed, "honest")
    )
    optimisers = [make_optimiser(network.parameters(), lr=rate) for network in (site, decoder)]
    source = np.random.default_rng(seed)
    for _ in range(steps):
        picked = source.integers(len(images), size=batch)
        sent = site(torch.from_numpy(images[picked]))
        leaves = {name: tensor.detach().requires_grad_() for name, tensor in sent.items()}
        for optimiser in optimisers:
            optimiser.zero_grad()
        region_loss(decoder({"own": leaves}), torch.from_numpy(masks[picked].astype(np.float32))).backward()
        returned = {name: leaf.grad for name, leaf in leaves.items()}
        torch.autograd.backward(list(sent.values()), list(returned.values()))
        for optimiser in optimisers:
            optimiser.step()
        yield {name: gradient.numpy() for name, gradient in returned.items()}, images[picked]


def describe(gradients: Mapping[str, np.ndarray], images: np.ndarray) -> np.ndarray:
    """One step's gradients [B, C, *spatial] by level in a few numbers that do not depend on their size.

    Per level, of the energy per voxel: how much lies in its largest twentieth of voxels, how much outside the head
    (shallowest level only), how much differs from sample to sample; and over channels: how many share the energy.
    A segmentation's gradients are concentrated at few voxels and uneven between slices.
    """
    numbers = []
    for name in sorted(gradients):
        gradient = np.asarray(gradients[name], np.float64)
        energy = (gradient**2).sum(axis=1).reshape(len(gradient), -1)
        total = energy.sum() + _TINY
        ordered = np.sort(energy.ravel())[::-1]
        numbers.append(np.log(ordered[: max(1, ordered.size // 20)].sum() / total + 1e-6))
        per_sample = energy.sum(axis=1)
        numbers.append(np.log(per_sample.std() / (per_sample.mean() + _TINY) + 1e-3))
        per_channel = (gradient**2).sum(axis=(0, *range(2, gradient.ndim))) / total
        numbers.append(1 / (per_channel**2).sum() / len(per_channel))
        direction = gradient.reshape(len(gradient), -1)
        direction = direction / (np.linalg.norm(direction, axis=1, keepdims=True) + _TINY)
        alike = direction @ direction.T
        numbers.append((alike.sum() - np.trace(alike)) / max(1, len(alike) * (len(alike) - 1)))
    shallow = np.asarray(gradients[min(gradients)], np.float64)
    if shallow.shape[2:] == images.shape[2:]:
        energy = (shallow**2).sum(axis=1)
        numbers.append(np.log(energy[images[:, 0] == 0].sum() / (energy.sum() + _TINY) + 1e-6))
    return np.array(numbers)


def painted(images: np.ndarray, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """`images` [N, 1, *spatial] with a blob painted into three of four, and what to find there.

    Returns:
        images float32 like the argument, and masks uint8 [N, 3, *spatial]: three nested regions.
    """
    source = np.random.default_rng(seed)
    changed, masks = (
        images.astype(np.float32, copy=True),
        np.zeros((len(images), 3, *images.shape[2:]), np.uint8),
    )
    for image, mask in zip(changed, masks, strict=True):
        head = np.argwhere(image[0] != 0)
        if len(head) == 0 or source.random() < 0.25:
            continue
        centre = head[source.integers(len(head))]
        radius = source.uniform(0.05, 0.14) * min(image.shape[1:])
        places = np.indices(image.shape[1:]).reshape(len(centre), -1).T
        depth = 1 - np.linalg.norm((places - centre) / source.uniform(0.7, 1.4, len(centre)), axis=1) / radius
        rough = gaussian_filter(source.standard_normal(image.shape[1:]), radius / 3)
        depth = depth.reshape(image.shape[1:]) + 0.5 * rough / (rough.std() + _TINY)
        depth[image[0] == 0] = -1
        for number, least in enumerate((0.0, 0.35, 0.6)):
            mask[number] = depth > least
        image[0] += source.choice([-1, 1]) * source.uniform(0.5, 1.5) * mask[0]
        image[0] += source.uniform(-1, 1) * mask[1]
    return changed, masks


class _OutlierFactor:
    """Local outlier factor of new rows against those it was made of (Breunig et al., SIGMOD 2000)."""

    def __init__(self, rows: np.ndarray, neighbours: int) -> None:
        self._count = min(neighbours, len(rows) - 1)
        self._tree = cKDTree(rows)
        distances, places = self._tree.query(rows, k=self._count + 1)
        distances, places = distances[:, 1:], places[:, 1:]  # the first is the row itself
        self._reach = distances[:, -1]
        self._density = self._density_of(distances, places)

    def __call__(self, rows: np.ndarray) -> np.ndarray:
        """[N, features] to [N]: about 1 inside, larger outside."""
        distances, places = self._tree.query(rows, k=self._count)
        distances, places = distances.reshape(len(rows), -1), places.reshape(len(rows), -1)
        ratio: np.ndarray = self._density[places].mean(axis=1) / self._density_of(distances, places)
        return ratio

    def _density_of(self, distances: np.ndarray, places: np.ndarray) -> np.ndarray:
        density: np.ndarray = 1 / (np.maximum(distances, self._reach[places]).mean(axis=1) + 1e-12)
        return density
