"""What all sites sent, attacked together: as one seat whose channels are all contrasts, and one encoder over them.

Contrasts of one head share its anatomy, so each site's tensors say something of every image. Attacks that know the
encoders (`whitebox`, `inverse`, `refined`) run on such a view as on any other. Under secure fusion a coordinator reads
only the sum of all sites' integers: with the job's terms, views are added up as it reads them (SP-11.18).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from splitpeer.attacks.base import Knowledge, Levels, Shot, Target, View
from splitpeer.errors import AttackImpossible
from splitpeer.training.split_step import Arrays
from splitpeer.training.sums import fused
from splitproto.fusion import greatest
from splitproto.records import Fusion, Seat

NAME = "all"
"""The seat of a joint view."""


class JointEncoder(nn.Module):
    """Images [B, all channels, *spatial] to the levels of all seats: one after the other, or their sum.

    Args:
        encoders: of every seat, in the order of the channels.
        widths: channels of an image of each.
        sites: who fills each seat; only of a sum, whose parts are sites.
        terms: of a sum: each site's values are clipped and rounded as they are before masks are added; None: no sum.
    """

    def __init__(
        self,
        encoders: Sequence[nn.Module],
        widths: Sequence[int],
        sites: Sequence[str] = (),
        terms: Fusion | None = None,
    ) -> None:
        super().__init__()
        self.encoders = nn.ModuleList(encoders)
        self.widths, self.sites, self.terms = list(widths), list(sites), terms

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Level name to [B, channels, *spatial]."""
        parts = torch.split(x, self.widths, 1)
        sent = [encoder(part) for encoder, part in zip(self.encoders, parts, strict=True)]
        if self.terms is None:
            return {name: torch.cat([levels[name] for levels in sent], 1) for name in sent[0]}
        total: dict[str, Tensor] = {}
        for site in dict.fromkeys(self.sites):
            own = [levels for levels, of in zip(sent, self.sites, strict=True) if of == site]
            for name in own[0]:
                part = _rounded(torch.stack([levels[name] for levels in own]).sum(0), self.terms)
                total[name] = total[name] + part if name in total else part
        return total


def _rounded(values: Tensor, terms: Fusion) -> Tensor:
    """SP-11.18-3, in floats; the gradient passes the rounding, and stops where values are clipped."""
    scale = greatest(terms) / terms.range
    held = values.clamp(-terms.range, terms.range)
    return held + (torch.round(held.detach() * scale) / scale - held.detach())


def joint_view(views: Sequence[View], terms: Fusion | None = None) -> View:
    """One view of a coordinator's views of several seats, over the releases that all of them have.

    Defences are simulated on the joint levels: right for those whose strength is alike at all sites.

    Args:
        terms: the adversary reads the sum of what the sites sent, quantised by these; None: all of it.

    Raises:
        AttackImpossible: the sites defend themselves differently, or no release of a sample is of all.
    """
    first = views[0]
    if len({view.defences for view in views}) > 1:
        raise AttackImpossible("the sites have different defences: attack each by itself")
    targets = []
    for target in first.targets:
        others = [{t.sample: t for t in view.targets}.get(target.sample) for view in views]
        shots = _together([t.shots if t is not None else () for t in others], views, terms)
        if not shots:
            raise AttackImpossible("a sample was not sent by all sites at once: choose others, or one site")
        targets.append(Target(target.sample, shots))
    modalities = tuple(modality for view in views for modality in view.seat.modalities)
    site = "+".join(dict.fromkeys(view.site for view in views))
    reads, parts = ("the sum over sites", 1) if terms else ("all sites", len(views))
    form = "f32" if terms else first.form
    seat = Seat(NAME, modalities)
    return replace(
        first,
        site=site,
        seat=seat,
        targets=tuple(targets),
        traffic=tuple,
        reads=reads,
        parts=parts,
        form=form,
    )


def joint_knowledge(
    views: Sequence[View], knowledges: Sequence[Knowledge], terms: Fusion | None = None
) -> Knowledge:
    """What the adversary of `joint_view` knows who knows `knowledges` of each view: all encoders, all other patients.

    Raises:
        AttackImpossible: an encoder is not known, or they are of different steps.
    """
    models = [knowledge.model for knowledge in knowledges if knowledge.model is not None]
    if len(models) < len(views) or len({knowledge.weights_step for knowledge in knowledges}) > 1:
        raise AttackImpossible("a joint attack needs the encoders of all sites, of one step")
    widths = [len(view.seat.modalities) for view in views]
    held = [k.shadow.get(view.seat.name) for view, k in zip(views, knowledges, strict=True)]
    found = [images for images in held if images is not None]
    shadow: Mapping[str, np.ndarray] = {}
    if len(found) == len(views) and len({len(images) for images in found}) == 1:
        shadow = {NAME: np.concatenate(found, 1)}
    model = JointEncoder(models, widths, [view.site for view in views], terms)
    return replace(knowledges[0], model=model, models={}, encoders=len(models), shadow=shadow)


def _together(
    of_seats: Sequence[Sequence[Shot]], views: Sequence[View], terms: Fusion | None
) -> tuple[Shot, ...]:
    """The n-th releases of the same order, of all seats."""
    numbered: list[dict[tuple[object, ...], Shot]] = []
    for shots in of_seats:
        found: dict[tuple[object, ...], Shot] = {}
        for shot in shots:
            order = (shot.mode, shot.step, shot.index, shot.seed)
            found[(*order, sum(key[:-1] == order for key in found))] = shot
        numbered.append(found)
    common = [key for key in numbered[0] if all(key in found for found in numbered)]
    return tuple(
        replace(numbered[0][key], activations=_joined([f[key].activations for f in numbered], views, terms),
                gradients={})
        for key in common
    )  # fmt: skip


def _joined(sent: Sequence[Levels], views: Sequence[View], terms: Fusion | None) -> Levels:
    if terms is None:
        return {name: np.concatenate([levels[name] for levels in sent]) for name in sent[0]}
    by_site: dict[str, dict[str, Arrays]] = {}
    for view, levels in zip(views, sent, strict=True):
        by_site.setdefault(view.site, {})[view.seat.name] = dict(levels)
    return fused(by_site, terms)
