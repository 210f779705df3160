"""The first principal component of what was sent: an attack that needs no knowledge at all."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy.ndimage import gaussian_filter
from skimage.filters import threshold_otsu
from torch import Tensor
from torch.nn import functional

from splitpeer.attacks.base import Attack, Knowledge, Progress, Recovered, Shot, View, silent
from splitpeer.attacks.evidence import Evidence, gather, require_shots, weights_of
from splitpeer.attacks.pose import turn_back
from splitpeer.errors import AttackImpossible
from splitpeer.models.cut import level_name


@dataclass(frozen=True, kw_only=True)
class PrincipalComponent(Attack):
    """Shows the first principal component over channels of the shallowest level that was sent.

    The first layers of an encoder keep the picture; what all channels have in common is mostly it. Channels are
    standardised over what looks unlike the window's edge. Sign, gain and offset stay unknown. Several shots are
    turned back and taken together, as more channels.

    Args:
        level: which level; None: the shallowest that holds anything.
    """

    name = "pca"
    title = "principal component"
    source = "Pearson, Phil. Mag. 2(11), 1901; measured for this project on skips of a U-Net"
    goal = "image"
    role = "coordinator"
    plain = "Looks at what arrived and shows what its channels have in common; knows nothing else."

    level: int | None = None

    def recover(self, view: View, knowledge: Knowledge, progress: Progress) -> Recovered:
        """See `Attack.recover`. Raises AttackImpossible where the level asked for was not sent."""
        chosen: list[list[Shot]] = [[s for s in t.shots if s.activations] for t in view.targets]
        require_shots(chosen)
        groups = gather(
            chosen, view.seat.modalities, masked=knowledge.adaptive, device=self.device, same=weights_of
        )
        # It finds only one picture, which represents every channel.
        images = component(groups, view.window, self.level, progress)
        images = images.expand(-1, len(view.seat.modalities), *images.shape[2:])
        notes = ("sign, gain and offset are unknown to it",)
        return Recovered(images.cpu().numpy(), max(map(len, chosen)), notes)


def component(
    groups: list[Evidence],
    window: tuple[int, ...],
    level: int | None = None,
    progress: Progress = silent,
) -> Tensor:
    """[B, 1, *window], mean 0 and standard deviation 1 of each sample; one unknown sign for all of them."""
    sent = sorted(groups[0].levels)
    name = sent[0] if level is None else level_name(level)
    if name not in sent:
        raise AttackImpossible(f"level {level} was not sent, or only zeros: there are {', '.join(sent)}")
    images = []
    first: Tensor | None = None
    targets = len(groups[0].poses)
    for target in range(targets):
        values, counts = [], []
        for group in groups:
            if group.views[target] > 0:
                pose, seen = group.poses[target], group.levels[name]
                values.append(turn_back(seen.mean[target], pose).flatten(1))
                counts.append(turn_back(seen.count[target], pose).flatten(1))
        spatial = groups[0].levels[name].mean.shape[2:]
        flat, axis = _first(torch.cat(values), torch.cat(counts), tuple(spatial))
        # An eigenvector's sign is the linear-algebra library's whim: each follows the first, and that one its own sum.
        like = torch.ones_like(axis) if first is None or axis.shape != first.shape else first
        if float((axis * like).sum()) < 0:
            flat, axis = -flat, -axis
        first = axis if first is None else first
        images.append(flat.view(1, *spatial))
        progress("principal components", target + 1, targets)
    stacked = torch.stack(images)
    if tuple(stacked.shape[2:]) != tuple(window):
        mode = "bilinear" if len(window) == 2 else "trilinear"
        stacked = functional.interpolate(stacked, size=tuple(window), mode=mode, align_corners=False)
    return stacked


def _first(values: Tensor, counts: Tensor, spatial: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """First component's scores [voxels] and axis [channels, 1] of `values` [channels, voxels], seen `counts` times
    (0: a gap)."""
    known = counts > 0
    filled = values if bool(known.all()) else _fill(values, known, spatial)
    head = head_of(filled, spatial)
    mean, spread = filled[:, head].mean(1, keepdim=True), filled[:, head].std(1, keepdim=True)
    scaled = (filled - mean) / spread.clamp_min(1e-12)
    inside = scaled[:, head].double()
    axis = torch.linalg.eigh(inside @ inside.T)[1][:, -1:].to(values.dtype)
    scores = axis.T @ scaled
    return ((scores - scores.mean()) / scores.std().clamp_min(1e-12))[0], axis


def _fill(values: Tensor, known: Tensor, spatial: tuple[int, ...], width: float = 1.0) -> Tensor:
    """Fill gaps from their neighbourhood in the same channel."""
    sigma = (0.0, *[width] * len(spatial))
    weight = known.cpu().numpy().reshape(-1, *spatial).astype(np.float32)
    around = gaussian_filter(values.cpu().numpy().reshape(weight.shape) * weight, sigma)
    mean = torch.from_numpy(around / np.maximum(gaussian_filter(weight, sigma), 1e-6)).to(values.device)
    return torch.where(known, values, mean.flatten(1))


def head_of(values: Tensor, spatial: tuple[int, ...]) -> Tensor:
    """Which voxels of [channels, voxels] look unlike the window's edge: bool [voxels]. Air would otherwise be the
    first component's main business."""
    scaled = (values - values.mean(1, keepdim=True)) / values.std(1, keepdim=True).clamp_min(1e-12)
    grid = scaled.cpu().numpy().reshape(-1, *spatial)
    edge = np.concatenate([np.take(grid, (0, -1), axis).reshape(len(grid), -1) for axis in (1, 2)], axis=1)
    air = np.median(edge, axis=1).reshape(-1, *[1] * len(spatial))
    distance = np.sqrt(gaussian_filter(np.square(grid - air).mean(0), 1.0))
    head = torch.from_numpy((distance > threshold_otsu(distance)).ravel()).to(values.device)
    return head if int(head.sum()) > len(values) else torch.ones_like(head)
