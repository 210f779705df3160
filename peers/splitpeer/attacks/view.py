"""From a capture to a `View`: what one adversary saw of one site at one seat, sample by sample.

Two passes: the first reads heads only and finds which batches hold which samples; the second reads the tensors
of the batches that are wanted, so that a capture larger than memory can be attacked.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal, Protocol

import numpy as np

from splitpeer.attacks.base import Shot, Target, View
from splitpeer.attacks.evidence import weights_of
from splitpeer.defences.specs import by_place
from splitpeer.errors import AttackImpossible
from splitpeer.models.registry import backbone_of
from splitpeer.training.forms import activations_form, gradients_form
from splitproto.messages import Activations, Forward, Gradients, Inventory, Logits, LossGradients, Message
from splitproto.records import Sample, Seat
from splitproto.seats import Listed, by_seat

Ordered = tuple[str, int, int, bytes]
"""Mode, step and number of a batch, and its digest: after a withdrawal or a rollback other samples may stand there."""


class RecordedMessage(Protocol):
    """One message of a capture."""

    @property
    def peer(self) -> str:
        """Site of the other end."""
        ...

    @property
    def direction(self) -> str:
        """Seen from the recorder: "in" or "out"."""
        ...

    @property
    def head(self) -> Message:
        """Without its tensors, which `message` reads from the disk."""
        ...

    @property
    def message(self) -> Message:
        """The whole message. Raises DataError where the file cannot be read."""
        ...


class MessageSource(Protocol):
    """What a view needs of an open capture."""

    @property
    def header(self) -> Any:
        """The capture's `Header`."""
        ...

    def records(self) -> Iterable[RecordedMessage]:
        """All messages, in the order of the capture."""
        ...


MOST_TRAFFIC = 2**30
"""Octets of other samples' tensors that are read to learn from, at most."""
Choose = Callable[[Sequence[Sample]], Sequence[Sample]]


def one_per_patient(samples: Sequence[Sample]) -> list[Sample]:
    """For every patient, the sample in the middle (by z, y, x of its origin), where most of the head is."""
    by_key: dict[bytes, list[Sample]] = {}
    for sample in samples:
        by_key.setdefault(sample.key, []).append(sample)
    return [sorted(of, key=lambda s: s.origin[::-1])[len(of) // 2] for _, of in sorted(by_key.items())]


def gradient_steps(capture: MessageSource) -> list[int]:
    """The steps of which a site's capture holds gradients, ascending."""
    heads = ((record.direction, record.head) for record in capture.records())
    return sorted(
        {head.step for direction, head in heads if direction == "in" and isinstance(head, Gradients)}
    )


def most_released(capture: MessageSource) -> list[Sample]:
    """The training windows that were ordered, most often first; equal ones in the order of the capture."""
    counts = Counter(
        sample for record in capture.records() if isinstance(head := record.head, Forward) and head.mode == "train"
        for sample in head.samples
    )  # fmt: skip
    return [sample for sample, _ in counts.most_common()]


def coordinator_view(
    capture: MessageSource,
    seat: str,
    *,
    site: str | None = None,
    mode: str | None = None,
    step: int | None = None,
    every_step: bool = False,
    weights: int | None = None,
    choose: Choose = one_per_patient,
    limit: int | None = None,
) -> View:
    """What the coordinator saw of a site at `seat`.

    Args:
        site: which of those that fill the seat; default: the first by name.
        mode: only batches of this mode; default: evaluation where there is any, else releases of frozen encoders, else
            training.
        step: only batches of this step; default: the last one recorded in that mode (weights are known of one
            step at a time).
        every_step: all that were recorded in that mode instead (for attacks that know several sets of weights).
        weights: all that was sent with the weights of this step instead, in every mode: an evaluation, and the
            training steps for which they stood still.
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
    seats = {one.name: one for party in header.peers for one in party.seats}
    fill = {party.site: party for party in header.peers if seat in {one.name for one in party.seats}}
    if not fill:
        raise AttackImpossible(
            f"no site of this capture fills {seat}; its seats are {', '.join(sorted(seats))}"
        )
    if site is not None and site not in fill:
        raise AttackImpossible(f"{site} does not fill {seat} in this capture; {', '.join(sorted(fill))} does")
    party = fill[site or min(fill)]
    taken = _Taken(capture, party.site, Listed(party.seats), seat)
    places = taken.forwards()
    answered = {
        _ordered(m)
        for r in capture.records()
        if r.peer == party.site and r.direction == "in" and isinstance(m := r.head, Activations)
    }
    places = {place: forward for place, forward in places.items() if place in answered}
    targets = taken.targets(_of(places, mode, step, every=every_step, weights=weights), choose, limit)
    job_seats = tuple(seats[name] for name in sorted(seats))
    view = _view(
        capture, "coordinator", party.site, seats[seat], job_seats, targets,
        defences=tuple(party.defences), gradient_defences=tuple(header.defences),
    )  # fmt: skip
    return replace(view, traffic=partial(_traffic, taken, places, view))


def site_view(
    capture: MessageSource,
    seat: str | None = None,
    *,
    steps: Sequence[int] | None = None,
    choose: Choose = lambda samples: samples,
    limit: int | None = None,
) -> View:
    """What a site saw at a seat: its own activations and the gradients that came back, in training.

    Args:
        seat: default: the site's first.
        steps: only these; default: all that were recorded.

    Raises:
        AttackImpossible: recorded by a coordinator, without a gradient, or no such seat.
    """
    header = capture.header
    if header.role != "client":
        raise AttackImpossible(
            "this capture was recorded by a coordinator: a site's attack needs a site's capture"
        )
    seats = {one.name: one for one in header.seats}
    if not seats or seat not in (None, *seats):
        raise AttackImpossible(f"this site does not fill {seat}; its seats are {', '.join(seats)}")
    own = seats[seat] if seat is not None else next(iter(seats.values()))
    coordinator = next((party.site for party in header.peers), "")
    taken = _Taken(capture, coordinator, Listed(header.seats), own.name, graded=True)
    graded = set(gradient_steps(capture))
    places = {
        p: f
        for p, f in taken.forwards().items()
        if p[0] == "train" and p[1] in graded and (steps is None or p[1] in steps)
    }
    if not places and header.job is not None and header.job.frozen:
        raise AttackImpossible(
            "this capture is of a run with frozen encoders: no gradient came back that could show a label"
        )
    if not places:
        # A site may have been away, or have sat steps out.
        there = (
            f"it holds some of steps {min(graded)} to {max(graded)}"
            if graded
            else "record a site that trains"
        )
        raise AttackImpossible(f"this capture holds no gradient of the steps asked for: {there}")
    targets = taken.targets(places, choose, limit)
    return _view(
        capture, "client", header.site, own, (own,), targets,
        defences=tuple(header.defences), gradient_defences=tuple(header.peers[0].defences),
    )  # fmt: skip


def labels_view(
    capture: MessageSource,
    seat: str,
    *,
    steps: Sequence[int] | None = None,
    choose: Choose = one_per_patient,
    limit: int | None = None,
) -> View:
    """What the coordinator saw of the labels, where they are at a site: its logits, and their gradients.

    Args:
        seat: whose images the result is held against.
        steps: only these; default: all that were recorded.

    Raises:
        AttackImpossible: recorded by a site, or the labels were not at one.
    """
    header = capture.header
    if header.role != "coordinator":
        raise AttackImpossible("this capture was recorded by a site: logits are the coordinator's")
    pending: dict[tuple[str, int, bytes], RecordedMessage] = {}
    answered: list[tuple[RecordedMessage, RecordedMessage]] = []
    for record in capture.records():
        if isinstance(head := record.head, Logits) and (steps is None or head.step in steps):
            pending[record.peer, head.step, head.digest] = record
        elif isinstance(head, LossGradients):
            asked = pending.pop((record.peer, head.step, head.digest), None)
            if asked is not None:
                answered.append((asked, record))
    if not answered:
        raise AttackImpossible("this capture holds no gradient of logits: the labels were not at a site")
    place = answered[0][0].peer
    party = next((one for one in header.peers if one.site == place), None)
    seats = {one.name: one for other in header.peers for one in other.seats}
    if seat not in seats:
        raise AttackImpossible(
            f"no site of this capture fills {seat}; its seats are {', '.join(sorted(seats))}"
        )
    every = dict.fromkeys(
        sample for asked, _ in answered if isinstance(asked.head, Logits) for sample in asked.head.samples
    )
    chosen = list(choose(list(every)))[:limit]
    shots: dict[Sample, list[Shot]] = {sample: [] for sample in chosen}
    for asked, answer in answered:
        sent, back = asked.message, answer.message
        if not (isinstance(sent, Logits) and isinstance(back, LossGradients)):
            continue
        for row, sample in enumerate(sent.samples):
            if sample in shots:
                parts = [
                    {name: np.array(array[row]) for name, array in one.tensors.items()}
                    for one in (sent, back)
                ]
                shots[sample].append(Shot("train", sent.step, row, sent.seed, *parts))
    targets = tuple(Target(sample, tuple(shots[sample])) for sample in chosen if shots[sample])
    said = by_place(party.defences).gradients if party is not None else ()
    return _view(
        capture, "coordinator", place, seats[seat], tuple(seats[name] for name in sorted(seats)), targets,
        defences=(), gradient_defences=said,
    )  # fmt: skip


# --- inside --------------------------------------------------------------------------------------------------


def _traffic(taken: _Taken, places: Mapping[Ordered, Forward], view: View) -> tuple[Shot, ...]:
    """What was sent of all other samples by an encoder that had learned half to twice as long, the nearest first.

    What an encoder sent in its first steps is of another kind.
    """
    attacked = {target.sample for target in view.targets}
    shots = [shot for target in view.targets for shot in target.shots]
    if not shots:
        return ()
    now = max(map(weights_of, shots))
    steps = {place: place[1] - (place[0] == "train") for place in places}
    near = sorted(
        (place for place, step in steps.items() if now // 2 <= step <= 2 * now),
        key=lambda place: (abs(steps[place] - now), place[0], place[2]),
    )
    room = MOST_TRAFFIC // max(sum(array.nbytes for array in shots[0].activations.values()), 1)
    chosen = {}
    for place in near:
        room -= sum(sample not in attacked for sample in places[place].samples)
        if room < 0:
            break
        chosen[place] = places[place]
    others = taken.targets(chosen, lambda found: [one for one in found if one not in attacked], None)
    return tuple(shot for target in others for shot in target.shots)


def _ordered(head: Forward | Activations) -> Ordered:
    return head.mode, head.step, head.batch, head.digest


class _Taken:
    """What passed between the coordinator and one site, at one of its seats.

    Args:
        peer: the other end, as records name it.
        listed: the seats of the site; what it lists is heard as records pass.
        graded: whether gradients are wanted too.
    """

    def __init__(
        self, capture: MessageSource, peer: str, listed: Listed, seat: str, *, graded: bool = False
    ) -> None:
        self._capture, self._peer, self._listed, self._seat = capture, peer, listed, seat
        self._graded = graded

    def forwards(self) -> dict[Ordered, Forward]:
        """What was ordered of it."""
        found = {}
        for record in self._capture.records():
            if record.peer == self._peer and isinstance(record.head, Forward):
                found[_ordered(record.head)] = record.head
            elif record.peer == self._peer and isinstance(record.head, Inventory):
                self._listed.hear(record.head)
        return found

    def targets(
        self, places: Mapping[Ordered, Forward], choose: Choose, limit: int | None
    ) -> tuple[Target, ...]:
        """The samples under attack that were released at least once, and their releases in order of time."""
        every = list(dict.fromkeys(sample for forward in places.values() for sample in forward.samples))
        chosen = list(choose(every))[:limit]
        shots: dict[Sample, list[Shot]] = {sample: [] for sample in chosen}
        waiting: dict[int, tuple[Forward, Message]] = {}
        for record in self._capture.records():
            head = record.head
            if record.peer != self._peer:
                continue
            if isinstance(head, Activations):
                forward = places.get(_ordered(head))
                if self._graded and (former := waiting.pop(head.step, None)) is not None:
                    # Answered, and void: no gradient came back.
                    self._cut(*former, None, shots)
                if forward is None or not any(sample in shots for sample in forward.samples):
                    continue
                if self._graded:
                    waiting[head.step] = forward, record.message
                else:
                    self._cut(forward, record.message, None, shots)
            elif isinstance(head, Gradients) and head.step in waiting:
                self._cut(*waiting.pop(head.step), record.message, shots)
        for forward, message in waiting.values():
            self._cut(forward, message, None, shots)
        return tuple(Target(sample, tuple(shots[sample])) for sample in chosen if shots[sample])

    def _cut(
        self, forward: Forward, sent: Message, returned: Message | None, shots: dict[Sample, list[Shot]]
    ) -> None:
        rows = self._listed.rows(forward.samples).get(self._seat, ())
        activations, gradients = self._at(sent), self._at(returned)
        places = forward.places or range(len(forward.samples))
        for row, number in enumerate(rows):
            sample = forward.samples[number]
            if sample in shots and activations:
                shots[sample].append(
                    Shot(
                        forward.mode, forward.step, places[number], forward.seed,
                        {name: np.array(tensor[row]) for name, tensor in activations.items()},
                        {name: np.array(tensor[row]) for name, tensor in gradients.items()},
                    )
                )  # fmt: skip

    def _at(self, message: Message | None) -> dict[str, np.ndarray]:
        """Tensors of this seat, float32, as their receiver read them (SP-11.21-7)."""
        job = self._capture.header.job
        if not isinstance(message, Activations | Gradients) or job is None:
            return {}
        form = activations_form(job) if isinstance(message, Activations) else gradients_form(job)
        return form.from_wire(by_seat(message.tensors, self._listed.seats).get(self._seat, {}))


def _of(
    places: dict[Ordered, Forward], mode: str | None, step: int | None, *, every: bool, weights: int | None
) -> dict[Ordered, Forward]:
    if weights is not None:
        if found := {p: f for p, f in places.items() if p[1] - (p[0] == "train") == weights}:
            return found
        raise AttackImpossible(f"nothing was recorded with the weights of step {weights}")
    modes = {place[0] for place in places}
    if mode is None:
        mode = next((m for m in ("evaluate", "infer", "release", "train") if m in modes), "train")
    steps = sorted({place[1] for place in places if place[0] == mode})
    if not steps:
        raise AttackImpossible(
            f"nothing of mode {mode} was recorded; there is {', '.join(sorted(modes)) or 'nothing'}"
        )
    if step is not None and step not in steps:
        raise AttackImpossible(f"step {step} was not recorded; there are {steps[0]} to {steps[-1]}")
    wanted = steps if every else [steps[-1] if step is None else step]
    return {place: f for place, f in places.items() if place[0] == mode and place[1] in wanted}


def _view(
    capture: MessageSource, role: Literal["coordinator", "client"], site: str, seat: Seat, seats: tuple[Seat, ...],
    targets: tuple[Target, ...], *, defences: tuple[str, ...], gradient_defences: tuple[str, ...],
) -> View:  # fmt: skip
    job = capture.header.job
    if job is None:
        raise AttackImpossible("this capture ended before a job began: there is nothing to attack")
    return View(
        role=role, site=site, seat=seat, seats=seats, backbone=backbone_of(job), window=tuple(job.window),
        targets=targets, defences=defences, gradient_defences=gradient_defences, form=activations_form(job).form,
    )  # fmt: skip
