"""One training step among all peers: in one process, or with a network in between.

The coordinator of a run calls `fused_step`, as its sites are elsewhere; `split_round` is the whole step, with a `Wire`
between the halves. A rehearsal's wire rounds and records; that of the centralised baselines does nothing.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from splitpeer.defences.randomness import Release
from splitpeer.defences.stack import Stack, defend
from splitpeer.training.split_step import Activations, Arrays, ClientHalf, CoordinatorHalf


@dataclass(frozen=True)
class Parties:
    """All halves of one network."""

    coordinator: CoordinatorHalf
    sites: Mapping[str, ClientHalf]
    """By modality."""
    gradient_defences: Mapping[str, Stack] = field(default_factory=dict)
    """What the label holder does to the gradients of a modality; missing: nothing."""


class Wire:
    """What lies between a site and the coordinator; this one changes nothing. All arrays are float32 by level."""

    def ordered(self, modality: str) -> None:
        """The site was sent the batch."""

    def up(self, modality: str, activations: Arrays) -> Arrays:
        """Activations as they arrive."""
        return activations

    def down(self, modality: str, gradients: Arrays) -> Arrays:
        """Gradients as they arrive."""
        return gradients

    def applied(self, modality: str) -> None:
        """The site has applied the gradients."""

    def passed_over(self, modality: str) -> None:
        """The site, which does not take part, has counted on (SP-11-31)."""


def split_round(
    parties: Parties, images: Mapping[str, np.ndarray], target: np.ndarray, release: Release, wire: Wire
) -> float:
    """Make one step; returns the loss.

    Args:
        images: float32 [B, 1, *spatial] by modality, of the sites that take part; the others count on.
        target: [B, regions, *spatial], zeros and ones.
        release: what is released; defences draw from it.

    Raises:
        JobFailed: a loss or gradient is not finite (SP-11-10).
        PolicyRefused: see `ClientHalf.backward`.
    """
    arrived: dict[str, Arrays] = {}
    for modality, half in parties.sites.items():
        if modality in images:
            wire.ordered(modality)
            arrived[modality] = wire.up(modality, half.forward(images[modality], release))
    loss, gradients = fused_step(
        parties.coordinator, arrived, target, release, parties.sites, parties.gradient_defences
    )
    for modality, half in parties.sites.items():
        if modality in gradients:
            half.backward(wire.down(modality, gradients[modality]))
            wire.applied(modality)
        else:
            half.advance(release.step)
            wire.passed_over(modality)
    return loss


def fused_step(
    half: CoordinatorHalf,
    arrived: Activations,
    target: np.ndarray,
    release: Release,
    modalities: Collection[str],
    gradient_defences: Mapping[str, Stack],
) -> tuple[float, dict[str, Arrays]]:
    """The coordinator's part: the loss, and what each site that took part is sent.

    Args:
        arrived: activations by modality, {"x0": float32 [B, C, *spatial], ...}.
        target: [B, regions, *spatial], zeros and ones.
        modalities: of the whole network; the decoder goes without those that have not arrived.
        gradient_defences: by modality.

    Raises:
        JobFailed: the loss or its gradient is not finite (SP-11-10); the decoder is unchanged.
    """
    if not arrived:
        # All who would have taken part are absent: nobody learns from this step.
        half.advance(release.step)
        return math.nan, {}
    absent = [modality for modality in modalities if modality not in arrived]
    loss, gradients = half.step(arrived, target, absent)
    # The decoder has learned from the true ones; what leaves is defended, for each site on its own.
    marked = replace(release, target=target)
    for modality, stack in gradient_defences.items():
        if modality in gradients and stack:
            gradients[modality] = defend(stack, gradients[modality], marked)
    return loss, gradients
