"""The coordinator together with sites: what they know in clear in addition to what it received.

A site that works with the coordinator tells it its own images, and in a secure sum its own part. Its image says much
of another contrast of the same head without anything that was sent (`leakage/synthesis.py` is that floor). Here both
are read together: the known image becomes further channels of the shallowest level, and the usual attacks run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from splitpeer.attacks.base import Knowledge, Levels, Shot, Target, View
from splitpeer.errors import AttackImpossible
from splitproto.fusion import add_up, greatest, quantise, restore
from splitproto.records import Fusion, Level, Seat

IN_CLEAR = "in clear"
"""In `View.reads` of a collusion."""


def remaining(total: Levels, known: Sequence[Levels], terms: Fusion) -> dict[str, np.ndarray]:
    """The sum of all sites without the parts of those that work with the coordinator: the sum of the others.

    With all parts but one this is that one's part, to the last bit for words of 16 bits (of 32, to what a float32 of
    the sum holds): masks hide a site from the coordinator, not from it and all partners together.

    Args:
        total: what the coordinator read (SP-11.18-4), float32 by level.
        known: what each of these sites had before it was rounded and masked, of the same samples.
    """
    scale = greatest(terms) / terms.range
    left = {}
    for name, values in total.items():
        word = quantise(np.zeros(1), terms)[0].dtype
        words = np.rint(np.asarray(values, np.float64) * scale).astype(word)
        taken = [(-quantise(part[name], terms)[0]).astype(word) for part in known]
        left[name] = restore(add_up([words, *taken]), terms)
    return left


class _WithClear(nn.Module):
    """Images [B, own + known channels, *spatial] to the levels of the encoder, the known ones put behind `level`."""

    def __init__(self, encoder: nn.Module, widths: tuple[int, int], level: Level) -> None:
        super().__init__()
        self.encoder, self.widths, self.level = encoder, widths, level

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Level name to [B, channels, *spatial]."""
        own, known = torch.split(x, list(self.widths), 1)
        levels = dict(self.encoder(own))
        name = self.level.name
        levels[name] = torch.cat([levels[name], folded(known, self.level.stride)], 1)
        return levels


def folded(images: Tensor, step: tuple[int, ...]) -> Tensor:
    """[B, C, *spatial] on the grid of a level, nothing lost: the voxels of each cell become channels."""
    batch, channels, *spatial = images.shape
    cells = [n for size, by in zip(spatial, step, strict=True) for n in (size // by, by)]
    within = [3 + 2 * axis for axis in range(len(step))]
    places = [2 + 2 * axis for axis in range(len(step))]
    split = images.reshape(batch, channels, *cells).permute(0, 1, *within, *places)
    return split.reshape(batch, -1, *split.shape[-len(step) :])


def colluding_view(view: View, known: Seat, images: np.ndarray) -> View:
    """`view` of a coordinator that also holds the images at another seat in clear.

    Args:
        view: of one seat, or joint; releases that were augmented are left out.
        known: the seat of the site that works with it.
        images: its images of the targets, float32 [N, channels, *spatial], not augmented.

    Raises:
        AttackImpossible: the counts differ, or every release was augmented.
    """
    if len(images) != len(view.targets) or images.shape[2:] != view.window:
        raise AttackImpossible(f"images {images.shape} of {len(view.targets)} targets of {view.window}")
    level = view.shallowest
    targets = []
    for target, image in zip(view.targets, images, strict=True):
        clear = folded(torch.from_numpy(np.ascontiguousarray(image, np.float32))[None], level.stride)[
            0
        ].numpy()
        shots = tuple(
            _with(shot, level.name, clear) for shot in target.shots if shot.seed is None and shot.activations
        )
        if not shots:
            raise AttackImpossible(
                "every release of a sample was augmented: attack evaluation or frozen features"
            )
        targets.append(Target(target.sample, shots))
    seat = Seat(f"{view.seat.name} with {known.name}", (*view.seat.modalities, *known.modalities))
    with_site = f"with {' and '.join(known.modalities)} {IN_CLEAR}"
    return replace(
        view, seat=seat, targets=tuple(targets), traffic=tuple, reads=", ".join(filter(None, (view.reads, with_site))),
        clear=(*view.clear, *known.modalities),
    )  # fmt: skip


def colluding_knowledge(
    view: View, knowledge: Knowledge, known: Seat, shadow: np.ndarray | None
) -> Knowledge:
    """What the adversary of `colluding_view(view, known, ...)` knows who knows `knowledge` of `view`.

    Args:
        shadow: the other patients' images at the known seat, as many as there are at the seat under attack.

    Raises:
        AttackImpossible: the encoder is not known.
    """
    if knowledge.model is None:
        raise AttackImpossible(
            "with a site's images the encoder under attack is needed: --knows weights=FILE"
        )
    level = view.shallowest
    widths = (len(view.seat.modalities), len(known.modalities))
    own, images = knowledge.shadow.get(view.seat.name), {}
    if own is not None and shadow is not None and len(own) == len(shadow):
        images = {f"{view.seat.name} with {known.name}": np.concatenate([own, shadow], 1)}
    return replace(knowledge, model=_WithClear(knowledge.model, widths, level), models={}, shadow=images)


def _with(shot: Shot, name: str, clear: np.ndarray) -> Shot:
    levels = {**shot.activations, name: np.concatenate([shot.activations[name], clear])}
    return replace(shot, activations=levels, gradients={})
