"""A job played in one process: real sites (`SiteJob`), the real coordinator's half and batches; no link in between.

What the coordinator and each site would have seen is written into the same capture files that `--curious` writes,
so that every attack on a rehearsal is the attack on the wire.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np

from splitpeer.audit.cohort import Cohort
from splitpeer.audit.rehearsed_site import RehearsedSite
from splitpeer.captures.parts import PartWriter
from splitpeer.data.loader import SiteData
from splitpeer.data.sampling import batch_digest, split_patients
from splitpeer.defences.key import from_seed
from splitpeer.defences.randomness import Release
from splitpeer.defences.specs import placed
from splitpeer.errors import ConfigError, DataError
from splitpeer.federation.batches import TrainingStream
from splitpeer.federation.evaluation import Plan, Scoring
from splitpeer.federation.halves import at_places, coordinator_half, for_site, gradient_stacks
from splitpeer.federation.seating import Part, Seating
from splitpeer.federation.seats import seats_of
from splitpeer.federation.terms import cut_descriptors, job_on_wire, seat_descriptors, window_of
from splitpeer.models.registry import backbone_of
from splitpeer.settings.job import COORDINATOR, JobConfig
from splitpeer.storage import checkpoint
from splitpeer.training.dropout import left_out
from splitpeer.training.scores import Scores
from splitpeer.training.split_round import Place, fused_step
from splitpeer.training.split_step import Arrays
from splitproto import __version__
from splitproto.capture import Header, Party, Sampling
from splitproto.messages import Advance, Advanced, Applied, Forward, Gradients, Inventory, JobOffer, Message
from splitproto.records import Sample, Seat
from splitproto.tensors import schema_digest

Progress = Callable[[str, int, int], None]
HUB = "hub"
"""The coordinator's name as a site."""
FEDERATION = "rehearsal"
PIECE = 500
"""Patients in one message."""


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
    site_mib: int = 0
    """Further steps, the last ones, that the captures of the sites under attack hold alone, in MiB of one site. A
    defence of fresh noise is judged from all releases of a window, not from one."""
    targets: tuple[Sample, ...] = ()
    """Samples whose evaluation is recorded at the end."""
    views: int = 1
    """How often the coordinator asks for them; fresh noise differs each time."""
    further: tuple[Sample, ...] = ()
    """Samples whose evaluation is recorded once besides: slices next to the targets, other patients."""
    poses: int = 0
    """In how many poses it asks for them instead, where a site answers the same question the same every time."""
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
    posed: bool = False
    """Whether the samples were also asked for in other poses, with the weights before the last step."""

    @property
    def capture(self) -> Path:
        """The coordinator's."""
        return self.folder / f"{COORDINATOR}.cap"

    def site_capture(self, seat: str) -> Path:
        """The capture of the site that fills this seat; the file is named after all its seats."""
        found = [path for path in sorted(self.folder.glob("*.cap")) if seat in path.stem.split("+")]
        return found[0] if found else self.folder / f"{seat}.cap"

    def weights(self, party: str, step: int | None = None) -> Path:
        """Checkpoint of a step, by default the last: of the site that fills a seat, or of the coordinator."""
        name = f"step-{step:08d}" if step is not None else "step-*"
        found = sorted(self.folder.glob(f"weights-*/{name}.safetensors"), key=lambda path: path.name)
        return [path for path in found if party in path.parent.name.removeprefix("weights-").split("+")][-1]


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
        parties = tuple(Party(site.name, site.seats, site.job.defences, True) for site in r.sites)
        own = next((stack.specs for stack in r.gradient_stacks.values()), ())
        self._hub = opened(r.folder / f"{COORDINATOR}.cap", replace(common, peers=parties, defences=own))
        self._sites = {
            site.name: opened(
                r.folder / f"{site.label}.cap",
                replace(
                    common,
                    role="client",
                    site=site.name,
                    seats=site.seats,
                    schema=schema_digest(seat_descriptors(r.job, site.seats)),
                    peers=(Party(HUB, (), own, True),),
                    defences=site.job.defences,
                ),
            )
            for site in r.sites
        }

    def note(self, site: RehearsedSite, message: Message, to_site: bool) -> None:
        """One message that passed between the coordinator and `site`."""
        now = time.time()
        hub, own = self._hub, self._sites[site.name]
        hub.append(hub.packed(message, now, site.name, "out" if to_site else "in"))
        own.append(own.packed(message, now, HUB, "in" if to_site else "out"))

    def note_at(self, seats: Collection[str], site: RehearsedSite, message: Message, to_site: bool) -> None:
        """The same in the site's capture only, where it fills one of `seats`."""
        if not {seat.name for seat in site.seats}.isdisjoint(seats):
            own = self._sites[site.name]
            own.append(own.packed(message, time.time(), HUB, "in" if to_site else "out"))

    def close(self) -> None:
        """End all files."""
        for writer in (self._hub, *self._sites.values()):
            writer.end("closed", "")


Tap = Callable[[RehearsedSite, Message, bool], None]


def _silent(site: RehearsedSite, message: Message, to_site: bool) -> None:
    return


class Rehearsal:
    """All parties of one job on one cohort.

    Args:
        config: the job; its sites' modalities must be in the cohort.
        cohort: patients with masks (or the stand-in task: `audit/stand_in_task.py`); who has too few seats for
            the job takes no part.
        protection: the defences of all sites and of the label holder.
        seed: of all weights and defences: a rehearsal repeats.
        folder: captures and weights go here.

    Raises:
        ConfigError: a job with secure fusion.
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
        if self.job.fusion is not None:
            raise ConfigError(
                f'{config.source}: [model] fusion = "secure-sum": a rehearsal shows what single sites send, and nobody '
                'reads that in such a job: write "concat" or "mean", or audit it without a sweep'
            )
        self.window = window_of(self.job)
        self.run = hashlib.sha256(f"rehearsal\0{seed}\0{protection.label}".encode()).digest()[:16]
        # Sites that share a seat are rehearsed as one: the first by name.
        seats = seats_of(config)
        self.seats = seats.names
        labels = cohort.labels
        if labels is None or labels.labels is None:
            raise ValueError("a rehearsal needs masks")
        self.labels, task = labels, labels.labels
        self.sites = self._make_sites()
        least = config.data.min_seats or len(self.seats)
        lists = {site.name: site.lists for site in self.sites}
        self.seating = Seating.decide(self.job, seats, lists, labels.keys(), least)
        self.training, self.validation = split_patients(
            sorted(self.seating.filled), config.data.validation, config.job.seed, labels.subjects()
        )
        key = from_seed(seed, HUB)
        self.gradient_stacks = gradient_stacks(protection.gradients, self.job, seats, key)
        self.half = coordinator_half(config, self.job, self.seats, task, device)

    def filling(self, keys: Iterable[bytes], seat: Seat) -> list[bytes]:
        """Those of `keys` who fill a seat, in their order."""
        filled = self.seating.filled
        return [key for key in keys if seat.name in filled[key]]

    def play(self, recording: Recording, progress: Progress = lambda what, done, total: None) -> Rehearsed:
        """Train, evaluate, record.

        Raises:
            DataError: the folder cannot be written, or a volume not read.
        """
        played = Rehearsed(self.folder)
        try:
            for old in self.folder.glob("weights-*/step-*.safetensors"):
                old.unlink()
            captures = _Captures(self)
            try:
                for site in self.sites:
                    site.job.begin()
                self._list(captures)
                self._save(0)
                self._train(recording, captures, played, progress)
                self._save(self.job.steps)
                self._evaluate(played, progress)
                self._views(recording, captures, progress)
            finally:
                captures.close()
                for site in self.sites:
                    site.job.close()
        except OSError as error:
            raise DataError(
                f"{error.filename or self.folder}: cannot be written ({error.strerror})"
            ) from None
        return played

    def _train(
        self, recording: Recording, captures: _Captures, played: Rehearsed, progress: Progress
    ) -> None:
        stream = TrainingStream.of(self.config, self.job, self.training, self.labels, self.seating.complete)
        kept = self._kept(recording, stream)
        further = self._further(recording)
        at_sites = partial(captures.note_at, recording.seats or self.seats)
        for index in range(self.job.steps):
            if recording.poses and index + 1 == self.job.steps and self.job.augment:
                played.posed = self._poses(recording, captures, progress)
            tap = captures.note if index in kept else at_sites if index >= further else _silent
            played.losses.append(self._step(stream[index], tap))
            progress("training", index + 1, self.job.steps)
            if index + 1 in recording.also_after and index + 1 < self.job.steps:
                self._save(index + 1)
                self._ask(recording, captures.note, index + 1, 0)

    # --- inside ----------------------------------------------------------------------------------------------

    def _make_sites(self) -> list[RehearsedSite]:
        """Sites that share a seat are rehearsed as one: the first by name."""
        seats = seats_of(self.config)
        first = {seat.name: seats.sites(seat.name)[0] for seat in seats.seats}
        made = []
        for name in dict.fromkeys(first.values()):
            filled = tuple(seat for seat in seats.seats if first[seat.name] == name)
            offer = JobOffer(self.run, filled, self.job, schema_digest(seat_descriptors(self.job, filled)))
            made.append(
                RehearsedSite(
                    name, offer, self.config.sites[name], self.cohort, self.folder, seed=self.seed, device=self.device,
                    defences=self.protection.defences, image=self.protection.image,
                )
            )  # fmt: skip
        return made

    def _list(self, captures: _Captures) -> None:
        """SP-11-4: every site tells which of the patients it fills, and which seats of each."""
        for site in self.sites:
            patients = [site.job.channels.listed(key) for key in sorted(self.seating.of(site.name))]
            pieces = [patients[first : first + PIECE] for first in range(0, len(patients), PIECE)] or [[]]
            for piece in pieces:
                last = piece is pieces[-1]
                captures.note(site, Inventory(tuple(piece), last, site.job.channels.salt_check), False)

    def _kept(self, recording: Recording, stream: TrainingStream) -> set[int]:
        """Which training batches are recorded: the first and the last of each seat under attack."""
        kept: set[int] = set()
        for seat in recording.seats or self.seats:

            def of_seat(order: Iterable[int], seat: str = seat) -> Iterator[int]:
                return (index for index in order if seat in self._taking_part(stream[index]))

            steps = range(self.job.steps)
            kept.update(islice(of_seat(steps), recording.first))
            kept.update(islice(of_seat(reversed(steps)), recording.last))
        return kept

    def _parts(self, forward: Forward) -> dict[str, Part]:
        """A batch by site, of those that have samples of it."""
        parts = {site.name: self.seating.part(site.name, site.lists, forward) for site in self.sites}
        return {name: part for name, part in parts.items() if part is not None}

    def _taking_part(self, forward: Forward) -> frozenset[str]:
        """The seats that are filled in a batch, without those that are left out of the step (SP-11-37)."""
        filled = frozenset().union(*(part.seats() for part in self._parts(forward).values()))
        settings = self.config
        return filled - left_out(settings.job.seed, forward.step, filled, settings.training.seat_dropout)

    def _further(self, recording: Recording) -> int:
        """The first of the steps, counted from 0, that sites record alone."""
        cut = backbone_of(self.job).cut
        numbers: int = sum(math.prod(cut.shape(level, self.job.window)) for level in cut.sent)
        octets = 2 * 4 * self.job.batch * numbers  # activations and gradients, float32
        return self.job.steps - recording.site_mib * 2**20 // octets

    def _step(self, forward: Forward, tap: Tap) -> float:
        """One training step of all parties, as the messages of SP-11.3."""
        target = SiteData(self.labels).batch(forward.samples, self.window, forward.seed, None)
        parts, there = self._parts(forward), self._taking_part(forward)
        here = {name: part for name, part in parts.items() if part.seats() & there}
        arrived = self._asked(here, self.sites, tap)
        release = Release(self.run, forward.mode, forward.step, forward.batch, forward.samples)
        used = {place: arrays for place, arrays in arrived.items() if place.seat in there}
        rows = {Place(name, seat): of for name, part in here.items() for seat, of in part.rows.items()}
        loss, gradients = fused_step(self.half, used, target, release, self.gradient_stacks, rows=rows)
        for site in self.sites:
            if back := for_site(site.name, site.seats, gradients, self.job):
                message = Gradients(forward.step, back)
                tap(site, message, True)
                site.job.apply(message)
                tap(site, Applied(forward.step), False)
            else:
                tap(site, Advance(forward.step), True)
                site.job.advance(forward.step)
                tap(site, Advanced(forward.step), False)
        return loss

    def _asked(
        self, parts: Mapping[str, Part], sites: Sequence[RehearsedSite], tap: Tap
    ) -> dict[Place, Arrays]:
        """What these sites answer, as it arrives; one without a part is not asked."""
        arrived: dict[Place, Arrays] = {}
        for site in sites:
            if (part := parts.get(site.name)) is None:
                continue
            tap(site, part.forward, True)
            answer = site.answer(part.forward)
            tap(site, answer, False)
            arrived |= at_places(site.name, site.seats, answer.tensors, self.job)
        return arrived

    def _evaluate(self, played: Rehearsed, progress: Progress) -> None:
        settings = self.config.evaluation
        plan = Plan.of(
            self.validation, self.labels, self.window, settings.overlap, settings.batch, self.job.steps
        )
        scoring = Scoring(plan, self.labels, self.window, None, measure=True)
        for index, forward in enumerate(plan.forwards):
            arrived = self._asked(self._parts(forward), self.sites, _silent)
            found = {place.seat: levels for place, levels in arrived.items()}
            absent = [seat for seat in self.seats if seat not in found]
            scoring.add(index, self.half.predict(found, absent))
            progress("evaluating", index + 1, len(plan.forwards))
        if len(scoring.dice) and scoring.surfaces is not None:
            played.dice = scoring.dice.result()
            played.hd95, played.volume_ml = scoring.surfaces.distances(), scoring.surfaces.volumes()

    def _views(self, recording: Recording, captures: _Captures, progress: Progress) -> None:
        """The coordinator asks for the same samples again and again; the site draws fresh noise each time."""
        first = self._ask(recording, captures.note, self.job.steps, 0)
        if recording.further:
            self._ask(
                replace(recording, targets=recording.further), captures.note, self.job.steps, recording.views
            )
        for view in range(1, recording.views):
            again = self._ask(recording, captures.note, self.job.steps, view)
            if view == 1 and _same(again, first):
                return
            progress("asking again", view + 1, recording.views)

    def _poses(self, recording: Recording, captures: _Captures, progress: Progress) -> bool:
        """Ask for the samples in other poses, if the site answers the same question the same every time.

        The last step is ordered again and again with other seeds, as a run that goes on from a checkpoint (SP-11-14)
        may, and gets no gradients. Then every site goes back to before.
        """
        step = self.job.steps - 1
        self._save(step)
        first, again = (self._ask(recording, _silent, step, view) for view in (0, 1))
        same = _same(again, first)
        if same:
            self._ask(recording, captures.note, step, 2)
            for seed in range(1, recording.poses + 1):
                self._ask(recording, captures.note, step, 2 + seed, seed)
                progress("asking in other poses", seed, recording.poses)
        for site in self.sites:
            site.job.rollback(step)
        return same

    def _ask(
        self, recording: Recording, tap: Tap, step: int, view: int, seed: int | None = None
    ) -> dict[Place, Arrays]:
        """Ask for all targets, for the `view`-th time, of the weights after `step`; the first batch's answers.

        Args:
            seed: of the pose, which a training step has; None: an evaluation.
        """
        samples = recording.targets
        batch = self.config.evaluation.batch if seed is None else self.job.batch
        pieces = [tuple(samples[i : i + batch]) for i in range(0, len(samples), batch)]
        # All sites the first time; after that only those under attack, to keep the capture small.
        attacked = [site for site in self.sites if site.fills(recording.seats)] or self.sites
        first: dict[Place, Arrays] = {}
        for number, piece in enumerate(pieces):
            if seed is None:
                digest = batch_digest(step, piece, None)
                forward = Forward("evaluate", step, view * len(pieces) + number, piece, digest)
            else:
                forward = Forward("train", step + 1, 0, piece, batch_digest(step + 1, piece, seed), seed)
            answers = self._asked(self._parts(forward), attacked if view else self.sites, tap)
            first = first or answers
        return first

    def _save(self, step: int) -> None:
        tensors, meta = self.half.state()
        folder = self.folder / f"weights-{COORDINATOR}"
        checkpoint.save(folder, step, tensors, meta, checkpoint.available(folder))
        for site in self.sites:
            site.job.save(step, site.job.checkpoints())


def _same(answers: Mapping[Place, Arrays], first: Mapping[Place, Arrays]) -> bool:
    """Nothing fresh was drawn: a hundred views would be a hundred copies."""
    return all(
        np.array_equal(array, first[place][name])
        for place, arrays in answers.items()
        for name, array in arrays.items()
    )
