"""Experiments on more than one seat's tensors: with neighbouring slices, with sites that help, on who was trained on.

All of them start from an experiment on one seat (or on a joint view), and are run and judged like it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

import numpy as np

from splitpeer.attacks.base import Target, View
from splitpeer.attacks.catalogue import attack_class
from splitpeer.attacks.collusion import colluding_knowledge, colluding_view
from splitpeer.attacks.membership import ANY, UPRIGHT
from splitpeer.attacks.neighbours import around, neighbour_knowledge, neighbour_view, offsets
from splitpeer.attacks.view import MessageSource, coordinator_view
from splitpeer.audit.cohort import Cohort, Samples, cut, most_tumour
from splitpeer.audit.experiment import Experiment, Order, parse_order
from splitpeer.audit.judge import Judge, Outcome
from splitpeer.data.geometry import Triple
from splitpeer.data.volumes import Volumes
from splitpeer.errors import AttackImpossible
from splitpeer.models import Decoder
from splitpeer.settings.job import JobConfig
from splitproto.records import Sample, Seat

ALL_OTHERS = "all others"
"""Seat of all channels that other sites hold."""
REACH = 1
"""Slices above and below a target that are read with it."""
REFERENCE_STEPS = 300
"""Steps of each encoder that an attack on membership trains itself, at most; it trains four."""
WIDER = ("inverse", "refined")
"""Attacks that learn how tensors and images go together: a search alone gains nothing from what it is not asked for."""


def wider_orders(written: Sequence[str], done: Sequence[Outcome]) -> list[Order]:
    """Attacks on a wider view; what their settings leave open is as it was when they, or what they build on, had
    read the samples alone: the effort that was found to be worth it there."""
    return [_carried(parse_order(one), done) for one in written]


def _carried(order: Order, done: Sequence[Outcome]) -> Order:
    kind, known = attack_class(order.attack), dict[str, object]()
    for result in (outcome.result for outcome in done if outcome.result.adaptive):
        if issubclass(kind, base := attack_class(result.attack)):
            settings = {field.name for field in fields(base)} - {"seed", "device"}
            known |= {name: result.settings[name] for name in settings}
    return replace(order, settings=known | dict(order.settings))


# --- neighbouring slices ---------------------------------------------------------------------------------


def slices_around(cohort: Cohort, samples: Sequence[Sample], reach: int = REACH) -> tuple[Sample, ...]:
    """What must be recorded besides the targets; in a job of volumes nothing needs to be."""
    volumes = next(iter(cohort.images.values()))
    return around(samples, reach, {sample.key: volumes.geometry(sample.key).shape[2] for sample in samples})


def moved(samples: Sequence[Sample], by: int, volumes: Volumes) -> list[Sample]:
    """The slices `by` further up; where a volume ends its last slice is repeated, as the view does."""
    depth = {key: volumes.geometry(key).shape[2] for key in {sample.key for sample in samples}}
    return [Sample(s.key, (*s.origin[:2], min(max(s.origin[2] + by, 0), depth[s.key] - 1))) for s in samples]


def shadow_beside(
    cohort: Cohort, samples: Sequence[Sample], window: Triple, seat: Seat, reach: int = REACH
) -> dict[int, np.ndarray]:
    """The adversary's own images at each distance from its windows (see `neighbours.offsets`)."""
    own = cohort.at(seat.modalities)
    volumes, found = next(iter(own.images.values())), {}
    for by in offsets(reach):
        images = cut(own, moved(samples, by, volumes), window).at(seat)
        if images is not None:
            found[by] = images
    return found


def recorded_around(view: View, capture: MessageSource, reach: int = REACH) -> tuple[Target, ...]:
    """What a capture holds of the targets of a view and of the slices around them."""
    wanted = {target.sample for target in view.targets}
    near = {s for w in wanted for s in around([w], reach, {w.key: 1 << 30})}
    return coordinator_view(
        capture, view.seat.name, site=view.site, mode="evaluate",
        choose=lambda found: [sample for sample in found if sample in near],
    ).targets  # fmt: skip


def neighbour_experiment(
    experiment: Experiment, released: Sequence[Target], beside: Mapping[int, np.ndarray], reach: int = REACH
) -> Experiment:
    """`experiment` on one seat, with the slices around each target.

    Args:
        released: what was read of them (`recorded_around`).
        beside: see `shadow_beside`.

    Raises:
        AttackImpossible: see `neighbour_view` and `neighbour_knowledge`.
    """
    view = experiment.view
    return replace(
        experiment,
        view=neighbour_view(view, released, reach),
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
    view = experiment.view
    single = [seat for seat in view.seats if set(seat.modalities).isdisjoint(view.seat.modalities)]
    return best_and_all(experiment.judge, view.seat.modalities[0], single)


def best_and_all(judge: Judge, wanted: str, single: Sequence[Seat]) -> list[Seat]:
    """Of several seats the one whose images say most of a modality, and all of them as one; none without the truth."""
    if not single or judge.truth is None or wanted not in judge.truth.images:
        return []
    likeness = {seat: judge.drawn_likeness(seat.modalities, wanted) or 0.0 for seat in single}
    best = max(single, key=lambda seat: likeness[seat])
    together = Seat(ALL_OTHERS, tuple(m for seat in single for m in seat.modalities))
    return [best] if len(single) == 1 else [best, together]


# --- who was trained on ----------------------------------------------------------------------------------


def members_and_others(
    cohort: Cohort, training: Sequence[bytes], held_out: Sequence[bytes], window: Triple, most: int, slices: int = 1
) -> tuple[Sample, ...]:  # fmt: skip
    """As many training patients as others, at most `most` of each: the slices with most tumour of each."""
    count = min(most, len(training), len(held_out))
    return tuple(most_tumour(cohort, [*training[:count], *held_out[:count]], window, slices))


def recorded_of(view: View, capture: MessageSource, samples: Collection[Sample]) -> tuple[Target, ...]:
    """What a capture holds of the evaluation of these samples at the seat of a view."""
    return coordinator_view(
        capture, view.seat.name, site=view.site, mode="evaluate",
        choose=lambda found: [sample for sample in found if sample in samples],
    ).targets  # fmt: skip


def membership_order(job: JobConfig) -> Order:
    """The attack on membership, whose reference encoders learn as those of a job do."""
    learned = job.training
    settings: dict[str, Any] = {
        "steps": min(learned.steps, REFERENCE_STEPS), "batch": learned.batch, "rate": learned.learning_rate,
        "poses": ANY if job.data.augment else UPRIGHT,
    }  # fmt: skip
    return Order("membership", settings)


def membership_experiment(
    experiment: Experiment, released: tuple[Target, ...], cohort: Cohort, members: Collection[bytes],
    window: Triple, decoder: Decoder | None = None,
) -> Experiment:  # fmt: skip
    """Who of the patients of `released` (`recorded_of`) the network was trained on.

    Args:
        cohort: with their masks.
        members: pseudonyms of those who were, among others.
        decoder: the coordinator's half, where it is known and not yet granted.
    """
    truth: Samples = cut(cohort.at(()), [target.sample for target in released], window)
    return replace(
        experiment,
        view=replace(experiment.view, targets=released),
        knowledge=replace(
            experiment.knowledge, labels=truth.masks, decoder=decoder or experiment.knowledge.decoder
        ),
        judge=Judge(members=frozenset(members)),
    )
