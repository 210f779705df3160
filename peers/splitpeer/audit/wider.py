"""Experiments on more than one seat's tensors: with neighbouring slices, with sites that help, on who was trained on.

All of them start from an experiment on one seat (or on a joint view), and are run and judged like it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

import numpy as np

from splitpeer.attacks.collusion import colluding_knowledge, colluding_view
from splitpeer.attacks.neighbours import around, neighbour_knowledge, neighbour_view, offsets
from splitpeer.attacks.view import MessageSource, coordinator_view
from splitpeer.audit.cohort import Cohort, Samples, cut, most_tumour
from splitpeer.audit.experiment import Experiment
from splitpeer.audit.judge import Judge
from splitpeer.data.geometry import Triple
from splitpeer.errors import AttackImpossible
from splitproto.messages import Sample, Seat

REACH = 1
"""Slices above and below a target that are read with it."""


# --- neighbouring slices ---------------------------------------------------------------------------------


def slices_around(cohort: Cohort, samples: Sequence[Sample], reach: int = REACH) -> tuple[Sample, ...]:
    """What must be recorded besides the targets; in a job of volumes nothing needs to be."""
    volumes = next(iter(cohort.images.values()))
    return around(samples, reach, {sample.key: volumes.geometry(sample.key).shape[2] for sample in samples})


def shadow_beside(
    cohort: Cohort, samples: Sequence[Sample], window: Triple, seat: Seat, reach: int = REACH
) -> dict[int, np.ndarray]:
    """The adversary's own images at each distance from its windows (see `neighbours.offsets`).

    Where a volume ends its last slice is repeated, as the view does.
    """
    own = cohort.at(seat.modalities)
    depth = {key: next(iter(own.images.values())).geometry(key).shape[2] for key in {s.key for s in samples}}
    found = {}
    for by in offsets(reach):
        moved = [
            Sample(s.key, (*s.origin[:2], min(max(s.origin[2] + by, 0), depth[s.key] - 1))) for s in samples
        ]
        images = cut(own, moved, window).at(seat)
        if images is not None:
            found[by] = images
    return found


def neighbour_experiment(
    experiment: Experiment, capture: MessageSource, beside: Mapping[int, np.ndarray], reach: int = REACH
) -> Experiment:
    """`experiment` on one seat, with the slices around each target that the capture holds.

    Raises:
        AttackImpossible: see `neighbour_view` and `neighbour_knowledge`.
    """
    view = experiment.view
    wanted = {target.sample for target in view.targets}
    near = {s for w in wanted for s in around([w], reach, {w.key: 1 << 30})}
    released = coordinator_view(
        capture, view.seat.name, site=view.site, mode="evaluate",
        choose=lambda found: [sample for sample in found if sample in near],
    )  # fmt: skip
    return replace(
        experiment,
        view=neighbour_view(view, released.targets, reach),
        knowledge=neighbour_knowledge(view, experiment.knowledge, beside, reach),
    )


# --- sites that work with the coordinator ----------------------------------------------------------------


def colluding_experiment(experiment: Experiment, known: Seat) -> Experiment:
    """`experiment` of a coordinator to whom the site at `known` shows its images of the patients.

    Raises:
        AttackImpossible: these images are not among the truth; see `colluding_view` and `colluding_knowledge`.
    """
    view, truth = experiment.view, experiment.judge.truth
    images = truth.at(known) if truth is not None else None
    if images is None:
        raise AttackImpossible(
            f"no {' and '.join(known.modalities)} of these patients: grant their folder too"
        )
    others = experiment.judge.others
    shadow = experiment.knowledge.shadow.get(known.name)
    if shadow is None and others is not None:
        shadow = others.at(known)
    return replace(
        experiment,
        view=colluding_view(view, known, images),
        knowledge=colluding_knowledge(view, experiment.knowledge, known, shadow),
    )


def helpers(experiment: Experiment) -> list[Seat]:
    """With whom the coordinator does best without any traffic: one other seat, then all others together.

    Chosen by what their images say of the contrast under attack (the floor of such a collusion).
    """
    view, judge = experiment.view, experiment.judge
    wanted = view.seat.modalities[0]
    single = [seat for seat in view.seats if set(seat.modalities).isdisjoint(view.seat.modalities)]
    if not single or judge.truth is None or wanted not in judge.truth.images:
        return []
    likeness = {seat: judge.drawn_likeness(seat.modalities, wanted) or 0.0 for seat in single}
    best = max(single, key=lambda seat: likeness[seat])
    together = Seat("all others", tuple(m for seat in single for m in seat.modalities))
    return [best] if len(single) == 1 else [best, together]


# --- who was trained on ----------------------------------------------------------------------------------


def members_and_others(
    cohort: Cohort, training: Sequence[bytes], held_out: Sequence[bytes], window: Triple, most: int
) -> tuple[Sample, ...]:
    """As many training patients as others, at most `most` of each: the slice with most tumour of each."""
    count = min(most, len(training), len(held_out))
    return tuple(most_tumour(cohort, [*training[:count], *held_out[:count]], window))


def membership_experiment(
    experiment: Experiment, capture: MessageSource, cohort: Cohort, samples: Collection[Sample],
    members: Collection[bytes], window: Triple,
) -> Experiment:  # fmt: skip
    """Who of the patients of `samples`, whose evaluation the capture holds, the network was trained on.

    Args:
        members: pseudonyms of those who were, among others.

    Raises:
        AttackImpossible: nothing of them was recorded.
    """
    view = coordinator_view(
        capture, experiment.view.seat.name, site=experiment.view.site, mode="evaluate",
        choose=lambda found: [sample for sample in found if sample in samples],
    )  # fmt: skip
    truth: Samples = cut(cohort.at(()), [target.sample for target in view.targets], window)
    return replace(
        experiment,
        view=view,
        knowledge=replace(experiment.knowledge, labels=truth.masks),
        judge=Judge(members=frozenset(members)),
    )
