"""A job played in one process: the real halves, defences, messages and captures; no network.

What the coordinator and each site would have seen is written into the same capture files that `--curious` writes,
so that every attack on a rehearsal is the attack on the wire.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from splitpeer.audit.cohort import Cohort
from splitpeer.captures.parts import PartWriter
from splitpeer.data.channels import Channels
from splitpeer.data.geometry import Triple
from splitpeer.data.loader import SiteData
from splitpeer.data.sampling import TrainingSchedule, batch_digest, split_patients
from splitpeer.defences.image.stack import make_image_stack
from splitpeer.defences.key import for_peer, from_seed, key_of
from splitpeer.defences.network import Defended, build_network
from splitpeer.defences.randomness import Release
from splitpeer.defences.specs import placed
from splitpeer.defences.stack import Stack, make_stack
from splitpeer.errors import DataError
from splitpeer.federation.batches import TrainingStream
from splitpeer.federation.evaluation import Plan, Scoring
from splitpeer.federation.precision import from_wire, to_wire
from splitpeer.federation.seats import seats_of
from splitpeer.federation.terms import cut_descriptors, job_on_wire, seat_descriptors, window_of
from splitpeer.models import build_decoder, site_seed
from splitpeer.models.registry import backbone_of
from splitpeer.settings.job import JobConfig
from splitpeer.storage import checkpoint
from splitpeer.training.dropout import left_out
from splitpeer.training.optimiser import make_optimiser, make_schedule
from splitpeer.training.scores import Scores
from splitpeer.training.split_round import Parties, Place, Wire, split_round
from splitpeer.training.split_step import Arrays, ClientHalf, CoordinatorHalf
from splitproto import __version__
from splitproto.capture import Header, Party, Sampling
from splitproto.messages import (
    Activations,
    Advance,
    Advanced,
    Applied,
    Forward,
    Gradients,
    Message,
    Sample,
    Seat,
)
from splitproto.seats import by_seat, joined
from splitproto.tensors import schema_digest

Progress = Callable[[str, int, int], None]
COORDINATOR = "coordinator"
HUB = "hub"
"""The coordinator's name as a site."""
FEDERATION = "rehearsal"


@dataclass(frozen=True)
class Protection:
    """What the parties apply."""

    defences: tuple[str, ...] = ()
    """Defences of activations, at every site."""
    image: tuple[str, ...] = ()
    gradients: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        """For tables."""
        parts = (*self.defences, *placed("image", self.image), *placed("gradients", self.gradients))
        return " + ".join(parts) or "none"


@dataclass(frozen=True)
class Recording:
    """What of a rehearsal is recorded."""

    first: int = 1
    """Training steps at the beginning; where `seats` sit steps out, of those that they take part in."""
    last: int = 1
    """The same at the end."""
    targets: tuple[Sample, ...] = ()
    """Samples whose evaluation is recorded at the end."""
    views: int = 1
    """How often the coordinator asks for them; fresh noise differs each time."""
    seats: tuple[str, ...] = ()
    """Those under attack, whose sites are asked again; empty: all."""
    also_after: tuple[int, ...] = ()
    """Steps after which the targets are asked for as well, once, and weights are saved."""


@dataclass
class Rehearsed:
    """What a rehearsal left in its folder."""

    folder: Path
    dice: Scores = field(default_factory=dict)
    hd95: Scores = field(default_factory=dict)
    """In mm."""
    volume_ml: dict[str, dict[str, float]] = field(default_factory=dict)
    losses: list[float] = field(default_factory=list)

    @property
    def capture(self) -> Path:
        """The coordinator's."""
        return self.folder / f"{COORDINATOR}.cap"

    def site_capture(self, seat: str) -> Path:
        """The capture of the site that fills this seat; the file is named after all its seats."""
        found = [path for path in sorted(self.folder.glob("*.cap")) if seat in path.stem.split("+")]
        return found[0] if found else self.folder / f"{seat}.cap"

    def weights(self, party: str, step: int | None = None) -> Path:
        """Checkpoint of a step, by default the last: of the encoder at a seat, or of the coordinator."""
        folder = self.folder / f"weights-{party}"
        if step is not None:
            return folder / f"step-{step:08d}.safetensors"
        return sorted(folder.glob("step-*.safetensors"))[-1]


class _RehearsedSite:
    """One site's halves with their defences, one for each seat that it fills."""

    def __init__(self, name: str, seats: tuple[Seat, ...], rehearsal: Rehearsal) -> None:
        job, protection, seed = rehearsal.job, rehearsal.protection, rehearsal.seed
        self.name, self.seats = name, seats
        backbone, key = backbone_of(job), from_seed(seed, name)
        # In the order of peer.toml, as far as job.toml tells it: the first has the site's own key.
        held = rehearsal.config.sites[name]
        self.halves: dict[str, ClientHalf] = {}
        # What the label holder does to the gradients that this site is sent.
        self.gradient_stacks: dict[str, Stack] = {}
        written: tuple[str, ...] = ()
        for seat in seats:
            network = build_network(
                backbone, protection.defences, key=key_of(key, seat.modalities, held), seed=site_seed(seed, seat.name),
                in_channels=len(seat.modalities),
            )  # fmt: skip
            optimiser = make_optimiser(
                network.parameters(), job.optimiser, job.learning_rate, job.weight_decay
            )
            schedule = make_schedule(optimiser, job.schedule, job.steps)
            self.halves[seat.name] = ClientHalf(network, optimiser, schedule, rehearsal.device)
            written = network.stack.specs if isinstance(network, Defended) else ()
            receiver = seats_of(rehearsal.config).receiver(name, seat.name)
            self.gradient_stacks[seat.name] = make_stack(
                protection.gradients, key=for_peer(from_seed(seed, HUB), receiver), channels=backbone.cut.channels,
                dimensions=job.dimensions, place="gradients",
            )  # fmt: skip
        images = {
            m: make_image_stack(protection.image, key_of(key, (m,), held)) for seat in seats for m in seat.modalities
        }  # fmt: skip
        # As a site announces it when it accepts a job.
        self.announced = (*next(iter(images.values())).specs, *written)
        self.data = Channels(
            rehearsal.cohort.images, {seat.name: seat.modalities for seat in seats},
            images if protection.image else None,
        )  # fmt: skip

    def images(self, forward: Forward, window: Triple) -> dict[str, np.ndarray]:
        """By seat: float32 [B, channels, *spatial]."""
        return {seat: self.data.batch(seat, forward.samples, window, forward.seed) for seat in self.halves}


class _Captures:
    """The coordinator's capture and every site's, side by side."""

    def __init__(self, rehearsal: Rehearsal) -> None:
        r = rehearsal
        r.folder.mkdir(parents=True, exist_ok=True)

        def opened(path: Path, header: Header) -> PartWriter:
            path.unlink(missing_ok=True)
            return PartWriter(path, 0, None, header, None)

        common = Header(
            role="coordinator", site=HUB, federation=FEDERATION, agent=f"splitpeer-audit/{__version__}",
            created=time.time(), run=r.run, job=r.job, schema=schema_digest(cut_descriptors(r.job)),
            sampling=Sampling(),
        )  # fmt: skip
        parties = tuple(Party(site.name, site.seats, site.announced, True) for site in r.sites)
        own = next(iter(r.sites[0].gradient_stacks.values())).specs
        self._hub = opened(r.folder / f"{COORDINATOR}.cap", replace(common, peers=parties, defences=own))
        self._sites = {
            site.name: opened(
                r.folder / f"{'+'.join(site.halves)}.cap",
                replace(
                    common,
                    role="client",
                    site=site.name,
                    seats=site.seats,
                    schema=schema_digest(seat_descriptors(r.job, site.seats)),
                    peers=(Party(HUB, (), own, True),),
                    defences=site.announced,
                ),
            )
            for site in r.sites
        }

    def note(self, site: _RehearsedSite, message: Message, to_site: bool) -> None:
        """One message that passed between the coordinator and `site`."""
        now = time.time()
        hub, own = self._hub, self._sites[site.name]
        hub.append(hub.packed(message, now, site.name, "out" if to_site else "in"))
        own.append(own.packed(message, now, HUB, "in" if to_site else "out"))

    def close(self) -> None:
        """End all files."""
        for writer in (self._hub, *self._sites.values()):
            writer.end("closed", "")


Tap = Callable[[_RehearsedSite, Message, bool], None]


def _silent(site: _RehearsedSite, message: Message, to_site: bool) -> None:
    return


@dataclass(frozen=True)
class _RecordedWire(Wire):
    """The wire of one batch: rounds as the job says, and tells the captures."""

    sites: Mapping[str, _RehearsedSite]
    forward: Forward
    precision: str
    tap: Tap

    def ordered(self, site: str) -> None:
        self.tap(self.sites[site], self.forward, True)

    def up(self, site: str, activations: dict[str, Arrays]) -> dict[str, Arrays]:
        seats, forward = self.sites[site].seats, self.forward
        tensors = to_wire(joined(activations, seats), self.precision)
        message = Activations(forward.mode, forward.step, forward.batch, forward.digest, tensors)
        self.tap(self.sites[site], message, False)
        return by_seat(from_wire(tensors, self.precision), seats)

    def down(self, site: str, gradients: dict[str, Arrays]) -> dict[str, Arrays]:
        seats = self.sites[site].seats
        message = Gradients(self.forward.step, to_wire(joined(gradients, seats), self.precision))
        self.tap(self.sites[site], message, True)
        return by_seat(from_wire(message.tensors, self.precision), seats)

    def applied(self, site: str) -> None:
        self.tap(self.sites[site], Applied(self.forward.step), False)

    def passed_over(self, site: str) -> None:
        self.tap(self.sites[site], Advance(self.forward.step), True)
        self.tap(self.sites[site], Advanced(self.forward.step), False)


class Rehearsal:
    """All parties of one job on one cohort.

    Args:
        config: the job; its sites' modalities must be in the cohort.
        cohort: patients with masks (or the stand-in task: `audit/stand_in_task.py`).
        protection: the defences of all sites and of the label holder.
        seed: of all weights and defences: a rehearsal repeats.
        folder: captures and weights go here.
    """

    def __init__(
        self,
        config: JobConfig,
        cohort: Cohort,
        protection: Protection,
        folder: Path,
        *,
        seed: int = 0,
        device: str = "cpu",
    ) -> None:
        self.config, self.cohort, self.protection, self.seed, self.device = (
            config,
            cohort,
            protection,
            seed,
            device,
        )
        self.folder = folder
        self.job = job_on_wire(config)
        self.window = window_of(self.job)
        self.run = hashlib.sha256(f"rehearsal\0{seed}\0{protection.label}".encode()).digest()[:16]
        # Sites that share a seat are rehearsed as one: the first by name.
        seats = seats_of(config)
        self.seats = seats.names
        labels = cohort.labels
        if labels is None or labels.labels is None:
            raise ValueError("a rehearsal needs masks")
        self.labels, task = labels, labels.labels
        self.training, self.validation = split_patients(
            cohort.keys(), config.data.validation, config.job.seed, labels.subjects()
        )
        first = {seat.name: seats.sites(seat.name)[0] for seat in seats.seats}
        self.sites = [
            _RehearsedSite(name, tuple(seat for seat in seats.seats if first[seat.name] == name), self)
            for name in dict.fromkeys(first.values())
        ]
        decoder = build_decoder(
            backbone_of(self.job), self.seats, config.model.fusion,
            task.channels, exclusive=task.exclusive, seed=site_seed(config.job.seed, COORDINATOR),
        )  # fmt: skip
        optimiser = make_optimiser(
            decoder.parameters(), self.job.optimiser, self.job.learning_rate, self.job.weight_decay
        )
        self.half = CoordinatorHalf(
            decoder,
            optimiser,
            make_schedule(optimiser, self.job.schedule, self.job.steps),
            device,
            exclusive=task.exclusive,
        )

    def play(self, recording: Recording, progress: Progress = lambda what, done, total: None) -> Rehearsed:
        """Train, evaluate, record.

        Raises:
            DataError: the folder cannot be written, or a volume not read.
        """
        played = Rehearsed(self.folder)
        try:
            captures = _Captures(self)
            try:
                self._save(0)
                self._train(recording, captures, played, progress)
                self._save(self.job.steps)
                self._evaluate(played, progress)
                self._views(recording, captures, progress)
            finally:
                captures.close()
        except OSError as error:
            raise DataError(
                f"{error.filename or self.folder}: cannot be written ({error.strerror})"
            ) from None
        return played

    def _train(
        self, recording: Recording, captures: _Captures, played: Rehearsed, progress: Progress
    ) -> None:
        schedule = TrainingSchedule(
            self.training, self.labels, window=self.window, batch=self.job.batch, steps=self.job.steps,
            seed=self.config.job.seed, positive_fraction=self.config.data.positive_fraction,
        )  # fmt: skip
        stream = TrainingStream(schedule, self.config.data.augment)
        attacked = set(recording.seats)
        steps = [index for index in range(self.job.steps) if not attacked & self._left_out(index + 1)]
        kept = {*steps[: recording.first], *steps[max(0, len(steps) - recording.last) :]}
        for index in range(self.job.steps):
            recorded = index in kept
            played.losses.append(self._step(stream[index], captures.note if recorded else _silent))
            progress("training", index + 1, self.job.steps)
            if index + 1 in recording.also_after and index + 1 < self.job.steps:
                self._save(index + 1)
                self._ask(recording, captures, index + 1, 0)

    # --- inside ----------------------------------------------------------------------------------------------

    def _step(self, forward: Forward, tap: Tap) -> float:
        """One training step of all parties, as the messages of SP-11.3."""
        target = SiteData(self.labels).batch(forward.samples, self.window, forward.seed, None)
        out = self._left_out(forward.step)
        images = {
            Place(site.name, seat): array
            for site in self.sites
            if not out.issuperset(site.halves)
            for seat, array in site.images(forward, self.window).items()
        }
        parties = Parties(
            self.half,
            {Place(site.name, seat): half for site in self.sites for seat, half in site.halves.items()},
            {Place(site.name, seat): s for site in self.sites for seat, s in site.gradient_stacks.items()},
        )
        wire = _RecordedWire({site.name: site for site in self.sites}, forward, self.job.precision, tap)
        return split_round(parties, images, target, self._release(forward), wire, left_out=out)

    def _left_out(self, step: int) -> frozenset[str]:
        settings = self.config
        return left_out(settings.job.seed, step, self.seats, settings.training.seat_dropout)

    def _release(self, forward: Forward) -> Release:
        return Release(self.run, forward.mode, forward.step, forward.batch, forward.samples)

    def _asked(self, forward: Forward, sites: Sequence[_RehearsedSite], tap: Tap) -> dict[str, Arrays]:
        """Answers by seat."""
        release = self._release(forward)
        wire = _RecordedWire({site.name: site for site in sites}, forward, self.job.precision, tap)
        answers: dict[str, Arrays] = {}
        for site in sites:
            wire.ordered(site.name)
            shown = site.images(forward, self.window)
            sent = {seat: half.evaluate(shown[seat], release) for seat, half in site.halves.items()}
            answers |= wire.up(site.name, sent)
        return answers

    def _evaluate(self, played: Rehearsed, progress: Progress) -> None:
        settings = self.config.evaluation
        plan = Plan.of(
            self.validation, self.labels, self.window, settings.overlap, settings.batch, self.job.steps
        )
        scoring = Scoring(plan, self.labels, self.window, None, measure=True)
        for index, forward in enumerate(plan.forwards):
            scoring.add(index, self.half.predict(self._asked(forward, self.sites, _silent)))
            progress("evaluating", index + 1, len(plan.forwards))
        if len(scoring.dice) and scoring.surfaces is not None:
            played.dice = scoring.dice.result()
            played.hd95, played.volume_ml = scoring.surfaces.distances(), scoring.surfaces.volumes()

    def _views(self, recording: Recording, captures: _Captures, progress: Progress) -> None:
        """The coordinator asks for the same samples again and again; the site draws fresh noise each time."""
        first = self._ask(recording, captures, self.job.steps, 0)
        for view in range(1, recording.views):
            again = self._ask(recording, captures, self.job.steps, view)
            if view == 1 and _same(again, first):
                return
            progress("asking again", view + 1, recording.views)

    def _ask(self, recording: Recording, captures: _Captures, step: int, view: int) -> dict[str, Arrays]:
        """Ask for all targets, for the `view`-th time, of the weights after `step`; the first batch's answers."""
        samples, batch = recording.targets, self.config.evaluation.batch
        pieces = [tuple(samples[i : i + batch]) for i in range(0, len(samples), batch)]
        # All sites the first time; after that only those under attack, to keep the capture small.
        attacked = [site for site in self.sites if set(recording.seats) & set(site.halves)] or self.sites
        first: dict[str, Arrays] = {}
        for number, piece in enumerate(pieces, view * len(pieces)):
            digest = batch_digest(step, piece, None)
            forward = Forward("evaluate", step, number, piece, digest)
            answers = self._asked(forward, attacked if view else self.sites, captures.note)
            first = first or answers
        return first

    def _save(self, step: int) -> None:
        halves: dict[str, ClientHalf | CoordinatorHalf] = {COORDINATOR: self.half}
        for site in self.sites:
            halves |= site.halves
        for party, half in halves.items():
            tensors, meta = half.state()
            checkpoint.save(self.folder / f"weights-{party}", step, tensors, meta)


def _same(answers: Mapping[str, Arrays], first: Mapping[str, Arrays]) -> bool:
    """Nothing fresh was drawn: a hundred views would be a hundred copies."""
    return all(
        np.array_equal(array, first[seat][name])
        for seat, arrays in answers.items()
        for name, array in arrays.items()
    )
