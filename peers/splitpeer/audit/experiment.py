"""The audit, once: a verified capture, one adversary's view of it and knowledge, a run folder, and the outcomes.

`splitpeer attack`, `splitpeer audit` and `splitpeer audit --sweep` differ in where captures and patients come from;
from there on all of them are an `Experiment`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from splitpeer.attacks import runner
from splitpeer.attacks.base import Knowledge, Progress, Target, View, silent
from splitpeer.attacks.budget import FIXED, Budget, scaled
from splitpeer.attacks.catalogue import make_attack
from splitpeer.attacks.joint import joint_knowledge, joint_view
from splitpeer.attacks.view import coordinator_view, gradient_steps, most_released, site_view
from splitpeer.audit.bound import gaussian_bound
from splitpeer.audit.cohort import Samples, cut
from splitpeer.audit.judge import Judge, Outcome, own_image
from splitpeer.audit.knowledge import grant, with_model, with_shadow
from splitpeer.audit.rehearsal import Rehearsal, Rehearsed
from splitpeer.audit.run_folder import RunFolder, network_of
from splitpeer.captures.reader import Capture, Verdict, open_capture
from splitpeer.errors import AttackImpossible, ConfigError, DataError
from splitpeer.leakage.own_image import OwnImage
from splitpeer.report.model import Privacy, RunNetwork, Source
from splitpeer.settings.job import COORDINATOR
from splitpeer.training.forms import activations_form, gradients_form
from splitproto.records import Fusion, Sample, Seat

ALL_STEPS = "all-steps"
MOST_RELEASED = 48
"""Samples that are attacked with all their releases."""


@dataclass(frozen=True)
class Order:
    """One attack to run."""

    attack: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    views: int | None = None
    """Use at most this many releases of each sample; None: all."""


def parse_order(written: str) -> Order:
    """`whitebox`, or with settings `whitebox:iterations=200,tv=0.01`. Raises ConfigError."""
    name, _, text = written.partition(":")
    settings: dict[str, Any] = {}
    for part in filter(None, text.split(",")):
        key, equals, value = part.partition("=")
        if not equals:
            raise ConfigError(f"--attack {written}: write {part!r} as setting=value")
        settings[key] = value
    return Order(name, settings)


@dataclass(frozen=True)
class VerifiedCapture:
    """A capture that is what its recorder wrote, up to its last whole record at least."""

    path: Path
    capture: Capture
    verdict: Verdict

    @classmethod
    def open(cls, path: Path, key: bytes | None = None) -> VerifiedCapture:
        """Open and verify.

        Raises:
            DataError: it cannot be read, or was changed. One that a crash cut off is accepted.
            AttackImpossible: it ended before a job began, or holds masked values.
        """
        capture = open_capture(path, key)
        verdict = capture.verify()
        if verdict.problem is not None and not verdict.cut_off:
            raise DataError(f"{path}: {verdict.problem}")
        if capture.header.job is None:
            raise AttackImpossible(f"{path}: ended before a job began, there is nothing to attack")
        if capture.header.job.fusion is not None:
            raise AttackImpossible(
                f"{path}: of a run with secure fusion: what sites sent is masked, and no attack here reads the sum"
            )
        return cls(path, capture, verdict)

    def source(self, view: View) -> Source:
        """What the report says of it."""
        header = self.capture.header
        return Source(
            file=self.path.name, digest=self.verdict.last_chain.hex(), role=view.role, site=header.site,
            federation=header.federation, run=(header.run or b"").hex(), job=header.job.name if header.job else "",
            created=header.created, records=self.verdict.records, complete=bool(self.verdict.ended),
            averages=bool(header.job and header.job.average_every), samples=len(view.targets),
        )  # fmt: skip

    def network(self, view: View) -> RunNetwork:
        """What its job exchanges."""
        header = self.capture.header
        filled = {party.site: party.seats for party in header.peers} | {header.site: header.seats}
        sites = {
            site: ", ".join(modality for seat in seats for modality in seat.modalities)
            for site, seats in filled.items()
            if seats
        }
        if header.job is None:
            return network_of(view, sites, "f32")
        there, back = activations_form(header.job), gradients_form(header.job)
        return network_of(view, sites, there.form, back=back.form)


@dataclass(frozen=True)
class Experiment:
    """One adversary: what it saw, what it is granted, and the judge of what it recovers."""

    view: View
    knowledge: Knowledge
    judge: Judge
    source: Source
    network: RunNetwork
    seed: int = 0
    device: str = "cpu"
    budget: Budget = FIXED
    """How much more effort than their settings say attacks are given where that gains."""

    def open_folder(
        self, folder: Path, *, commands: tuple[str, ...] = (), notes: Sequence[str] = (),
        digests: Mapping[str, str] | None = None, trained: bool = True,
        reached: Mapping[str, Rehearsed] | None = None,
        privacy: Privacy | None = None,
    ) -> RunFolder:  # fmt: skip
        """The run folder, with the truth and with what Gaussian noise alone bounds; see `RunFolder`."""
        truth, bound = self.judge.truth, None
        if truth is not None and (images := truth.at(self.view.seat)) is not None:
            bound = gaussian_bound(self.view, self.knowledge, images)
        made = RunFolder(
            folder, self.source, self.network, commands=commands, digests=dict(digests or {}), trained=trained,
            reached=dict(reached or {}), privacy=privacy, notes=(*notes, *([bound] if bound else [])),
        )  # fmt: skip
        made.keep_truth(self.judge)
        return made

    def open_below(self, other: RunFolder, name: str) -> RunFolder:
        """A run folder inside that of `other`, with the same notes, Dice and commands."""
        made = replace(other, folder=other.folder / name, source=self.source, entries=[], arrays={})
        made.keep_truth(self.judge)
        return made

    def run(
        self, orders: Sequence[Order], folder: RunFolder, *, naive: bool = True, progress: Progress = silent
    ) -> Iterator[Outcome]:
        """Each attack, in the folder as soon as it is scored. One that is impossible is entered as such.

        Args:
            naive: besides every adaptive attack on a defended view, run the one that does not know the defence. A
                naive result is never kept alone: it says nothing about a defence that it ignores.

        Raises:
            ConfigError: an attack or setting that does not exist.
            KeyboardInterrupt: what was done is kept.
        """
        for order in orders:
            try:
                for outcome in self._outcomes(order, naive, progress):
                    folder.enter(outcome)
                    yield outcome
            except AttackImpossible as error:
                folder.could_not(order.attack, self.view, str(error))
            except KeyboardInterrupt:
                folder.could_not(
                    order.attack, self.view, "interrupted from the keyboard", status="interrupted"
                )
                raise

    def _outcomes(self, order: Order, naive: bool, progress: Progress) -> Iterator[Outcome]:
        seen = first_views(self.view, order.views) if order.views is not None else self.view
        attack = make_attack(order.attack, seed=self.seed, device=self.device, **order.settings)
        result = runner.run_doubled(
            attack, seen, replace(self.knowledge, adaptive=True), self.budget, partial(self.judge.merit, seen),
            progress,
        )  # fmt: skip
        yield from self.judge.outcomes(seen, result)
        if naive and seen.defended and attack.has_naive_form:
            # With the effort that the adaptive one was given.
            attack = scaled(attack, result.spent.times if result.spent else 1)
            result = runner.run(attack, seen, replace(self.knowledge, adaptive=False), progress)
            yield from self.judge.outcomes(seen, result)


def first_views(view: View, count: int) -> View:
    """`view` with at most the first `count` releases of each sample."""
    targets = tuple(Target(target.sample, target.shots[:count]) for target in view.targets)
    return replace(view, targets=targets)


def image_experiment(
    rehearsal: Rehearsal, played: Rehearsed, seat: str, judge: Judge, others: Samples, device: str = "cpu"
) -> Experiment:
    """A coordinator that holds the weights and similar images, and attacks the samples that `judge` knows.

    Raises:
        AttackImpossible: the rehearsal did not record the samples.
    """
    opened = VerifiedCapture.open(played.capture)
    truth = judge.truth
    view = coordinator_view(
        opened.capture,
        seat,
        mode="evaluate",
        choose=lambda found: truth.samples if truth else found,
    )
    files = {"weights": (played.weights(seat),), "decoder": (played.weights(COORDINATOR),)}
    return Experiment(
        view, grant(view, files, others), judge, _rehearsed(opened.source(view), rehearsal.job.steps),
        opened.network(view), rehearsal.seed, device,
    )  # fmt: skip


def joint_experiment(experiment: Experiment, played: Rehearsed, terms: Fusion | None = None) -> Experiment:
    """`experiment` on what all seats sent together, or on the sum of it under a job's terms.

    Raises:
        AttackImpossible: see `joint_view` and `joint_knowledge`.
    """
    samples = [target.sample for target in experiment.view.targets]
    capture = open_capture(played.capture)
    views = [
        coordinator_view(capture, seat.name, mode="evaluate", choose=lambda _: samples)
        for seat in experiment.view.seats
    ]
    known = [with_model(experiment.knowledge, v, played.weights(v.seat.name)) for v in views]
    return replace(
        experiment,
        view=joint_view(views, terms),
        knowledge=joint_knowledge(views, known, terms),
    )


def posed_experiment(
    experiment: Experiment, rehearsal: Rehearsal, played: Rehearsed, seat: str
) -> Experiment | None:
    """`experiment` on the poses that a site was asked for before its last step; None where it was not."""
    if not played.posed:
        return None
    samples = [target.sample for target in experiment.view.targets]
    step = rehearsal.job.steps - 1
    view = coordinator_view(open_capture(played.capture), seat, weights=step, choose=lambda _: samples)
    knowledge = with_model(experiment.knowledge, view, played.weights(seat, step))
    return replace(experiment, view=view, knowledge=knowledge)


def label_experiment(
    rehearsal: Rehearsal, played: Rehearsed, seat: str, step: int | None = None,
    strangers: Strangers | None = None, device: str = "cpu", *, every: bool = False,
) -> Experiment:  # fmt: skip
    """A site that has the gradients it was sent at one step, its own images, and perhaps labelled strangers.

    Args:
        step: None: the first time that it was sent any.
        every: instead of one step all releases of the `MOST_RELEASED` samples with target that were sent most often.

    Raises:
        AttackImpossible: the site was sent none then.
    """
    opened = VerifiedCapture.open(played.site_capture(seat))
    if every:
        released = most_released(opened.capture)
        chosen = _with_target(rehearsal, released) or released[:MOST_RELEASED]
        view, reached = site_view(opened.capture, seat, choose=lambda _: chosen), rehearsal.job.steps
    else:
        reached = graded_steps(opened.capture, seat)[0] if step is None else step
        view = site_view(opened.capture, seat, steps=(reached,))
    truth = cut(
        rehearsal.cohort.at(view.seat.modalities),
        [target.sample for target in view.targets],
        rehearsal.window,
    )
    source = _rehearsed(opened.source(view), reached)
    return Experiment(
        view, site_knowledge(view, truth, strangers.samples if strangers else None),
        Judge(truth, own=strangers.own if strangers else None), source, opened.network(view), rehearsal.seed, device,
    )  # fmt: skip


def graded_steps(capture: Capture, seat: str) -> tuple[int, int]:
    """The first and the last recorded step in which a site was sent gradients for a seat.

    Raises:
        AttackImpossible: there is none.
    """

    def sent(step: int) -> bool:
        targets = site_view(capture, seat, steps=(step,)).targets
        return any(shot.gradients for target in targets for shot in target.shots)

    # One step at a time: a capture of all steps does not fit the memory.
    steps = gradient_steps(capture)
    first, last = next(filter(sent, steps), None), next(filter(sent, reversed(steps)), None)
    if first is None or last is None:
        raise AttackImpossible(f"the site was sent no gradient for {seat}: rehearse more steps")
    return first, last


@dataclass(frozen=True)
class Strangers:
    """Patients whose labels are public, and what a site has learned from them of its own modality."""

    samples: Samples
    own: OwnImage | None

    @classmethod
    def met(cls, seat: Seat, samples: Samples, device: str = "cpu") -> Strangers:
        """Learn from them."""
        return cls(samples, own_image(seat, samples, device))


def site_knowledge(view: View, truth: Samples | None, others: Samples | None) -> Knowledge:
    """What a site knows besides its gradients: its own images, and the strangers that it is granted."""
    knowledge = Knowledge(own_images=truth.at(view.seat) if truth is not None else None)
    return knowledge if others is None else with_shadow(knowledge, view, others)


def _with_target(rehearsal: Rehearsal, samples: Sequence[Sample]) -> list[Sample]:
    """The first `MOST_RELEASED` that hold any of what is segmented."""
    held = (s for s in samples if rehearsal.labels.window(s.key, s.origin, rehearsal.window).any())
    return list(islice(held, MOST_RELEASED))


def _rehearsed(source: Source, steps: int) -> Source:
    return source.model_copy(update={"rehearsal": True, "steps": steps})
