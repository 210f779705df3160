"""From a capture to a `View`: what one adversary saw of one site, sample by sample.

Two passes: the first reads heads only and finds which batches hold which samples; the second reads the tensors
of the batches that are wanted, so that a capture larger than memory can be attacked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from splitpeer.attacks.base import Shot, Target, View
from splitpeer.errors import AttackImpossible
from splitpeer.models.registry import backbone_of
from splitproto.messages import Activations, Forward, Gradients, Message, Sample

Place = tuple[str, int, int, bytes]
"""Mode, step and number of a batch, and its digest: after a withdrawal or a rollback it may hold other samples."""


class RecordedMessage(Protocol):
    """One message of a capture."""

    peer: str
    direction: str
    head: Message
    """Without its tensors, which `message` reads from the disk."""

    @property
    def message(self) -> Message:
        """The whole message. Raises DataError where the file cannot be read."""
        ...


class MessageSource(Protocol):
    """What a view needs of an open capture."""

    header: Any

    def records(self) -> Iterable[RecordedMessage]:
        """All messages, in the order of the capture."""
        ...


@dataclass
class _Batch:
    """What a capture holds of one batch."""

    forward: Forward | None = None
    activations: dict[str, Activations] = field(default_factory=dict)
    gradients: dict[str, Gradients] = field(default_factory=dict)


Choose = Callable[[Sequence[Sample]], Sequence[Sample]]


def one_per_patient(samples: Sequence[Sample]) -> list[Sample]:
    """For every patient, the sample in the middle (by z, y, x of its origin), where most of the head is."""
    by_key: dict[bytes, list[Sample]] = {}
    for sample in samples:
        by_key.setdefault(sample.key, []).append(sample)
    return [sorted(of, key=lambda s: s.origin[::-1])[len(of) // 2] for _, of in sorted(by_key.items())]


def coordinator_view(
    capture: MessageSource,
    modality: str,
    *,
    mode: str | None = None,
    step: int | None = None,
    every_step: bool = False,
    choose: Choose = one_per_patient,
    limit: int | None = None,
) -> View:
    """What the coordinator saw of the site that holds `modality`.

    Args:
        mode: only batches of this mode; default: evaluation where there is any, else training.
        step: only batches of this step; default: the last one recorded in that mode (weights are known of one
            step at a time).
        every_step: all that were recorded in that mode instead (for attacks that know several sets of weights).
        choose: which of the samples to attack.
        limit: at most so many.

    Raises:
        AttackImpossible: no such site, or nothing of it was recorded.
    """
    header = capture.header
    if header.role != "coordinator":
        raise AttackImpossible(
            f"this capture was recorded by a {header.role}: it holds no other site's activations"
        )
    parties = {party.site: party for party in header.peers}
    modalities = {site: party.modality for site, party in parties.items()}
    site = next((site for site, held in modalities.items() if held == modality), None)
    if site is None:
        raise AttackImpossible(
            f"no site of this capture holds {modality}; it has {', '.join(modalities.values())}"
        )
    places = _forwards(capture, site)
    answered = {
        _place(m)
        for r in capture.records()
        if r.peer == site and r.direction == "in" and isinstance(m := r.head, Activations)
    }
    places = {place: forward for place, forward in places.items() if place in answered}
    places = _of(places, mode, step, every=every_step)
    targets = _targets(capture, places, site, choose, limit, modalities)
    return _view(capture, "coordinator", site, modality, sorted(modalities.values()), targets,
                 defences=tuple(parties[site].defences),
                 gradient_defences=tuple(header.defences))  # fmt: skip


def site_view(
    capture: MessageSource,
    *,
    steps: Sequence[int] | None = None,
    choose: Choose = lambda samples: samples,
    limit: int | None = None,
) -> View:
    """What a site saw: its own activations and the gradients that came back, in training.

    Args:
        steps: only these; default: all that were recorded.

    Raises: AttackImpossible: recorded by a coordinator, or without a gradient.
    """
    header = capture.header
    if header.role != "client":
        raise AttackImpossible(
            "this capture was recorded by a coordinator: a site's attack needs a site's capture"
        )
    coordinator = next((party.site for party in header.peers), "")
    places = _forwards(capture, coordinator)
    graded = {r.head.step for r in capture.records() if r.direction == "in" and isinstance(r.head, Gradients)}
    places = {
        p: f
        for p, f in places.items()
        if p[0] == "train" and p[1] in graded and (steps is None or p[1] in steps)
    }
    if not places:
        # A site may have been away, or have sat steps out.
        there = (
            f"it holds some of steps {min(graded)} to {max(graded)}"
            if graded
            else "record a site that trains"
        )
        raise AttackImpossible(f"this capture holds no gradient of the steps asked for: {there}")
    modality = header.modality
    targets = _targets(capture, places, coordinator, choose, limit, {}, own=True)
    return _view(capture, "client", header.site, modality, [modality], targets,
                 defences=tuple(header.defences),
                 gradient_defences=tuple(header.peers[0].defences))  # fmt: skip


# --- inside --------------------------------------------------------------------------------------------------


def _forwards(capture: MessageSource, peer: str) -> dict[Place, Forward]:
    return {_place(m): m for r in capture.records() if r.peer == peer and isinstance(m := r.head, Forward)}


def _place(head: Forward | Activations) -> Place:
    return head.mode, head.step, head.batch, head.digest


def _of(
    places: dict[Place, Forward], mode: str | None, step: int | None, *, every: bool
) -> dict[Place, Forward]:
    found = {place[0] for place in places}
    if mode is None:
        mode = next((m for m in ("evaluate", "infer", "train") if m in found), "train")
    steps = sorted({place[1] for place in places if place[0] == mode})
    if not steps:
        raise AttackImpossible(
            f"nothing of mode {mode} was recorded; there is {', '.join(sorted(found)) or 'nothing'}"
        )
    if step is not None and step not in steps:
        raise AttackImpossible(f"step {step} was not recorded; there are {steps[0]} to {steps[-1]}")
    wanted = steps if every else [steps[-1] if step is None else step]
    return {place: f for place, f in places.items() if place[0] == mode and place[1] in wanted}


def _targets(
    capture: MessageSource,
    places: Mapping[Place, Forward],
    peer: str,
    choose: Choose,
    limit: int | None,
    modalities: Mapping[str, str],
    *,
    own: bool = False,
) -> tuple[Target, ...]:
    every = list(dict.fromkeys(sample for forward in places.values() for sample in forward.samples))
    chosen = list(choose(every))[:limit]
    wanted = set(chosen)
    needed = {place for place, forward in places.items() if wanted.intersection(forward.samples)}
    shots: dict[Sample, list[Shot]] = {sample: [] for sample in chosen}
    # Sites that were absent, or sat the step out, never answer.
    answer: dict[Place, set[str]] = {place: set() for place in needed}
    for record in capture.records():
        if isinstance(head := record.head, Activations) and _place(head) in answer:
            answer[_place(head)].add(record.peer)
    open_: dict[Place, _Batch] = {}
    newest: dict[int, Place] = {}
    """By step: the batch that its gradients answer."""
    # In order of time; a batch is cut into shots when all have answered it, so few are in memory at once.
    for record in capture.records():
        head = record.head
        if isinstance(head, Activations):
            place = _place(head)
            if head.mode == "train":
                newest[head.step] = place
            if place in needed:
                if place in open_ and record.peer in open_[place].activations:
                    # Ordered again after a rollback, before all had answered: both times it was seen.
                    _cut(open_.pop(place), peer, wanted, shots, modalities, own=own)
                batch = open_.setdefault(place, _Batch(places[place]))
                batch.activations[record.peer] = record.message
                if batch.activations.keys() == answer[place] and (head.mode != "train" or not own):
                    _cut(open_.pop(place), peer, wanted, shots, modalities, own=own)
        elif isinstance(head, Gradients) and own:
            graded = newest.get(head.step)
            if graded is not None and graded in open_:
                place = graded
                open_[place].gradients[record.peer] = record.message
                _cut(open_.pop(place), peer, wanted, shots, modalities, own=own)
    for batch in open_.values():
        _cut(batch, peer, wanted, shots, modalities, own=own)
    return tuple(Target(sample, tuple(shots[sample])) for sample in chosen if shots[sample])


def _cut(
    batch: _Batch,
    peer: str,
    wanted: set[Sample],
    shots: dict[Sample, list[Shot]],
    modalities: Mapping[str, str],
    *,
    own: bool,
) -> None:
    forward = batch.forward
    if forward is None or peer not in batch.activations:
        return
    sent = {site: _floats(message.tensors) for site, message in batch.activations.items()}
    gradients = _floats(batch.gradients[peer].tensors) if peer in batch.gradients else {}
    for index, sample in enumerate(forward.samples):
        if sample not in wanted:
            continue

        def at(tensors: Mapping[str, np.ndarray], index: int = index) -> dict[str, np.ndarray]:
            return {name: np.array(tensor[index]) for name, tensor in tensors.items()}

        others = {} if own else {modalities[s]: at(t) for s, t in sent.items() if s != peer}
        shots[sample].append(
            Shot(forward.mode, forward.step, index, forward.seed, at(sent[peer]), others, at(gradients))
        )


def _floats(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """float32; bfloat16 travels as its 16 bits, which are the upper half of a float32."""
    return {
        name: (array.astype(np.uint32) << 16).view(np.float32) if array.dtype == np.uint16 else array
        for name, array in tensors.items()
    }


def _view(
    capture: MessageSource, role: Any, site: str, modality: str, modalities: Sequence[str], targets: tuple[Target, ...],
    *, defences: tuple[str, ...], gradient_defences: tuple[str, ...],
) -> View:  # fmt: skip
    job = capture.header.job
    if job is None:
        raise AttackImpossible("this capture ended before a job began: there is nothing to attack")
    return View(
        role=role, site=site, modality=modality, modalities=tuple(modalities), backbone=backbone_of(job),
        window=tuple(job.window), targets=targets, defences=defences, gradient_defences=gradient_defences,
    )  # fmt: skip
