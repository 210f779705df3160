"""Neighbouring slices, read together: a head changes little from one slice to the next, noise does not.

The slices around each target become further parts of its levels, and of its image. Attacks that know the encoder
(`whitebox`, `inverse`, `refined`) run on such a view as on any other; the target's own image comes first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from splitpeer.attacks.base import Knowledge, Shot, Target, View
from splitpeer.attacks.joint import JointEncoder
from splitpeer.errors import AttackImpossible
from splitproto.records import Sample, Seat


def offsets(reach: int) -> tuple[int, ...]:
    """Distances in slices, the target's own first: 0, -1, 1, -2, 2 ..."""
    return (0, *(side * distance for distance in range(1, reach + 1) for side in (-1, 1)))


def beside(sample: Sample, by: int) -> Sample:
    """The slice `by` further up; the volume may end before."""
    x, y, z = sample.origin
    return Sample(sample.key, (x, y, z + by))


def around(samples: Sequence[Sample], reach: int, depths: Mapping[bytes, int]) -> tuple[Sample, ...]:
    """The slices that a view of `samples` with their neighbours reads besides them, each once.

    Args:
        depths: slices of each patient's volume.
    """
    every = (beside(sample, by) for sample in samples for by in offsets(reach))
    inside = (one for one in every if 0 <= one.origin[2] < depths[one.key])
    return tuple(one for one in dict.fromkeys(inside) if one not in set(samples))


def neighbour_view(view: View, released: Sequence[Target], reach: int = 1) -> View:
    """`view` with the slices up to `reach` above and below each target.

    Only releases that were not augmented are read: slices of one batch are turned each in its own way. Where a
    slice is missing, at the end of a volume too, the next one towards the target stands in for it.

    Args:
        released: what the adversary saw of other slices at the same seat, in any order.

    Raises:
        AttackImpossible: the job sends volumes, or nothing around any target was released.
    """
    if view.dimensions != 2:
        raise AttackImpossible("neighbouring slices need a job of slices: here a window is a volume")
    known = {target.sample: _plain(target.shots) for target in (*released, *view.targets)}
    found = [_targets(target, known, reach) for target in view.targets]
    if not any(several for _, several in found):
        raise AttackImpossible(
            "no slice next to a target was released without augmentation: record evaluation"
        )
    count = len(offsets(reach))
    reads = " and ".join(filter(None, (view.reads, "neighbouring slices")))
    return replace(
        view, seat=_named(view.seat, reach), targets=tuple(target for target, _ in found), traffic=tuple, reads=reads,
        parts=view.parts * count,
    )  # fmt: skip


def neighbour_knowledge(
    view: View, knowledge: Knowledge, beside: Mapping[int, np.ndarray], reach: int = 1
) -> Knowledge:
    """What the adversary of `neighbour_view(view, ..., reach)` knows who knows `knowledge` of `view`.

    Args:
        beside: by distance (see `offsets`), the shadow images there: float32 [N, channels, *spatial] each.

    Raises:
        AttackImpossible: the encoder is not known.
    """
    if knowledge.model is None:
        raise AttackImpossible("neighbouring slices are read with the site's encoder: --knows weights=FILE")
    every, width = offsets(reach), len(view.seat.modalities)
    model = JointEncoder([knowledge.model] * len(every), [width] * len(every))
    images = [beside[by] for by in every if by in beside]
    shadow = {_named(view.seat, reach).name: np.concatenate(images, 1)} if len(images) == len(every) else {}
    return replace(knowledge, model=model, models={}, shadow=shadow)


def _named(seat: Seat, reach: int) -> Seat:
    further = [f"{m} {by:+d}" for by in offsets(reach)[1:] for m in seat.modalities]
    return Seat(f"{seat.name} -{reach} to +{reach}", (*seat.modalities, *further))


def _plain(shots: Sequence[Shot]) -> tuple[Shot, ...]:
    return tuple(shot for shot in shots if shot.seed is None and shot.activations)


def _targets(target: Target, known: Mapping[Sample, tuple[Shot, ...]], reach: int) -> tuple[Target, bool]:
    """The target with its neighbours, and whether it has any."""
    sources = [_nearest(target.sample, by, known) for by in offsets(reach)]
    numbered = [_numbered(known[source]) for source in sources]
    common = [key for key in numbered[0] if all(key in found for found in numbered)]
    shots = tuple(
        replace(numbered[0][key], gradients={}, activations={
            name: np.concatenate([found[key].activations[name] for found in numbered])
            for name in numbered[0][key].activations
        })
        for key in common
    )  # fmt: skip
    return Target(target.sample, shots), len(set(sources)) > 1


def _nearest(sample: Sample, by: int, known: Mapping[Sample, tuple[Shot, ...]]) -> Sample:
    side = 1 if by > 0 else -1
    tried = (beside(sample, side * distance) for distance in range(abs(by), 0, -1))
    return next((one for one in tried if known.get(one)), sample)


def _numbered(shots: Sequence[Shot]) -> dict[tuple[str, int, int], Shot]:
    """Releases by mode, step, and which of them it is: the order in a batch is another for each slice."""
    found: dict[tuple[str, int, int], Shot] = {}
    for shot in shots:
        count = sum(key[:2] == (shot.mode, shot.step) for key in found)
        found[shot.mode, shot.step, count] = shot
    return found
