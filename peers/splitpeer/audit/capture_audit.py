"""An audit of one capture with the files that the adversary is granted: what `splitpeer attack` does."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from splitpeer.attacks.base import View
from splitpeer.attacks.budget import FIXED, Budget
from splitpeer.attacks.evidence import weights_of
from splitpeer.attacks.view import MessageSource, coordinator_view, labels_view, one_per_patient, site_view
from splitpeer.audit.cohort import Cohort, cut, most_tumour, shadow
from splitpeer.audit.experiment import Experiment, VerifiedCapture, first_views
from splitpeer.audit.judge import Judge, make_judge, own_image
from splitpeer.audit.knowledge import grant, parse_knows
from splitpeer.audit.run_folder import RunFolder, sha256_of
from splitpeer.audit.wider import (
    colluding_experiment,
    neighbour_experiment,
    recorded_around,
    shadow_beside,
)
from splitpeer.captures.reader import Capture
from splitpeer.captures.recorder import read_key
from splitpeer.captures.redefend import defended
from splitpeer.data.geometry import Triple, spacing_of
from splitpeer.data.modalities import canonical_modality
from splitpeer.data.normalisation import DEFAULT, Normaliser
from splitpeer.data.pseudonym import load_salt
from splitpeer.data.task import Task
from splitpeer.data.volumes import Volumes
from splitpeer.defences.key import from_seed
from splitpeer.defences.offline import offline_defences
from splitpeer.errors import AttackImpossible, ConfigError, DataError
from splitpeer.federation.terms import normalisation_of
from splitpeer.storage import checkpoint
from splitproto.messages import Inventory
from splitproto.records import Sample, Seat

SHADOW_SALT = bytes(32)
"""The adversary's own patients need names of no federation."""


@dataclass(frozen=True)
class CaptureAudit:
    """What `splitpeer attack` is asked; its help explains each argument."""

    path: Path
    key_file: Path | None = None
    seat: str | None = None
    site: str | None = None
    knows: tuple[str, ...] = ()
    queries: bool = False
    shadow_images: int = 600
    truth: Path | None = None
    salt: Path | None = None
    layout: str = "folder"
    convention: Task | str | None = None
    """Convention of the masks, by its name, or their task."""
    defence: str | None = None
    first: Mapping[str, str] = field(default_factory=dict)
    """By site, the first modality of its peer.toml, which has the site's own key."""
    views: int | None = None
    samples: int = 24
    step: int | None = None
    seed: int = 0
    device: str = "cpu"
    budget: Budget = FIXED
    neighbours: int = 0
    """Slices above and below each sample that are read with it."""
    helpers: tuple[str, ...] = ()
    """Modalities of sites that work with the coordinator; their images of the patients are read from `truth`."""
    labels: bool = False
    """Attack what a coordinator saw of labels that are at a site, not what it saw of images."""
    finder_steps: int = 300
    """Of the network that looks for what is segmented in reconstructions."""

    def experiment(self) -> Experiment:
        """Open and verify the capture, read the granted files and the truth, and train the judge's tumour finder.

        Raises:
            AttackImpossible: the capture does not hold what is asked for.
            ConfigError, DataError: a file or setting that cannot be used.
        """
        opened = VerifiedCapture.open(self.path, read_key(self.key_file) if self.key_file else None)
        files = parse_knows(self.knows)
        seat, window = self._seat(opened), _window(opened)
        cohort = self._cohort(opened, seat)
        view = self._view(opened, seat.name, cohort, window, files.get("weights", ()))
        truth = None
        if cohort is not None:
            _check_grid(opened, view, next(iter(cohort.images.values())))
            truth = cut(cohort, [target.sample for target in view.targets], window)
        strangers = self._strangers(files.get("shadow"), view, _spacing(opened), _rule(opened))
        others = shadow(strangers, window, self.shadow_images, self.seed) if strangers is not None else None
        knowledge = grant(view, files, others, queries=self.queries)
        if view.role == "client":
            knowledge = replace(knowledge, own_images=truth.at(view.seat) if truth is not None else None)
            judge = Judge(truth, own=own_image(view.seat, others, self.device) if truth is not None else None)
        elif self.labels:
            judge = Judge(truth)
        else:
            judge = make_judge(seat.modalities, truth, others, finder_steps=self.finder_steps)
        made = Experiment(view, knowledge, judge, opened.source(view), opened.network(view), self.seed, self.device,
                          self.budget)  # fmt: skip
        if self.neighbours:
            beside = {}
            if strangers is not None and others is not None:
                beside = shadow_beside(strangers, others.samples, window, view.seat, self.neighbours)
            around = recorded_around(view, self._defended(opened.capture), self.neighbours)
            made = neighbour_experiment(made, around, beside, self.neighbours)
        if self.helpers:
            made = colluding_experiment(made, Seat("+".join(self.helpers), self.helpers))
        return made

    def open_folder(self, experiment: Experiment, out: Path, commands: tuple[str, ...] = ()) -> RunFolder:
        """The run folder of `experiment`, with the digests of the granted files."""
        files = parse_knows(self.knows)
        digests = {kind: sha256_of(paths[-1]) for kind, paths in files.items() if paths[-1].is_file()}
        return experiment.open_folder(out, commands=commands, digests=digests, trained=not self.defence)

    # --- inside ----------------------------------------------------------------------------------------------

    def _seat(self, opened: VerifiedCapture) -> Seat:
        """The one that is asked for, by its name or by that of its only modality."""
        header = opened.capture.header
        seats = {
            seat.name: seat for seat in (*header.seats, *(s for party in header.peers for s in party.seats))
        }
        if self.seat is None:
            return next(iter(seats.values()))
        name = self.seat if self.seat in seats else canonical_modality(self.seat)
        return seats.get(name, Seat(name, (name,)))

    def _cohort(self, opened: VerifiedCapture, seat: Seat) -> Cohort | None:
        if self.truth is None or self.salt is None:
            return None
        return Cohort.read(
            self.truth, (*seat.modalities, *self.helpers), salt=load_salt(self.salt), layout=self.layout,
            convention=self.convention, spacing=_spacing(opened), rule=_rule(opened),
        )  # fmt: skip

    def _view(
        self,
        opened: VerifiedCapture,
        seat: str,
        cohort: Cohort | None,
        window: Triple,
        weights: Sequence[Path],
    ) -> View:
        capture = self._defended(opened.capture)
        if self.labels:
            if self.defence:
                raise ConfigError(
                    "--defence is of activations: gradients of logits are defended by [policy] label_defences"
                )
            return labels_view(
                capture,
                seat,
                steps=None if self.step is None else (self.step,),
                choose=lambda recorded: _most_telling(recorded, cohort, window),
                limit=self.samples,
            )
        if capture.header.role == "client":
            steps = None if self.step is None else (self.step,)
            view = site_view(capture, seat, steps=steps, limit=self.samples)
        else:

            def choose(recorded: Sequence[Sample]) -> list[Sample]:
                return _most_telling(recorded, cohort, window)

            mode = "train" if self.step == 1 else None
            view = coordinator_view(capture, seat, site=self.site, mode=mode, step=self.step, choose=choose,
                                    limit=self.samples, every_step=len(weights) > 1)  # fmt: skip
            if view.defended and len(weights) < 2 and self.step is None:
                view = _all_poses(capture, view, weights)
        # With a defence, this many views were made.
        return view if self.views is None or self.defence else first_views(view, self.views)

    def _defended(self, capture: Capture) -> MessageSource:
        """The capture under the defences that are tried; the keys are those of `splitpeer replay --seed --config`."""
        if not self.defence:
            return capture
        header = capture.header
        sent = header.defences if header.role == "client" else [d for p in header.peers for d in p.defences]
        if sent:
            raise ConfigError(
                f"this capture was recorded under {' + '.join(dict.fromkeys(sent))}: "
                "a defence can be tried offline on clean traffic only"
            )
        applied = offline_defences(
            header, self.defence, lambda site: from_seed(self.seed, site), first=self.first
        )
        return defended(capture, applied, self.views or 1)

    def _strangers(
        self,
        shadow_folder: tuple[Path, ...] | None,
        view: View,
        spacing: tuple[float, float, float] | None,
        rule: Callable[[str], Normaliser],
    ) -> Cohort | None:
        if shadow_folder is None:
            return None
        (folder,) = shadow_folder
        as_folder = self.layout == "folder"
        with_labels = self.convention if (folder / "labels").is_dir() or not as_folder else None
        # Attacks through the coordinator's decoder need all modalities of the same people.
        wanted = list(dict.fromkeys(m for seat in (view.seat, *view.seats) for m in seat.modalities))
        present = [m for m in wanted if not as_folder or (folder / m).is_dir()]
        return Cohort.read(
            folder, present or list(view.seat.modalities), salt=SHADOW_SALT, layout=self.layout, convention=with_labels,
            spacing=spacing, rule=rule,
        )  # fmt: skip


def _all_poses(capture: MessageSource, view: View, weights: Sequence[Path]) -> View:
    """`view` with all that was sent of its samples with one set of weights: poses undo kept noise and rounding.

    Training sends a window in another pose each time; weights stand still while a step is repeated after a fault, and
    between the last step and an evaluation.

    Args:
        weights: what is granted of the site's; none: those of the view's first release.
    """
    step = weights_of(view.targets[0].shots[0]) if view.targets else 0
    if weights:
        step = int(checkpoint.read(weights[0])[1].get("step", 0))
    samples = [target.sample for target in view.targets]
    try:
        found = coordinator_view(
            capture, view.seat.name, site=view.site, weights=step, choose=lambda _: samples
        )
    except AttackImpossible:
        return view
    return found if len(found.targets) == len(samples) else view


def _rule(opened: VerifiedCapture) -> Callable[[str], Normaliser]:
    """How the recorded job has images normalised, by modality."""
    job = opened.capture.header.job
    return (lambda modality: normalisation_of(job, modality)) if job else (lambda modality: DEFAULT)


def _spacing(opened: VerifiedCapture) -> tuple[float, float, float] | None:
    """The grid of the recorded job, mm; None: the files' own."""
    job = opened.capture.header.job
    return spacing_of(job.spacing if job else None)


def _window(opened: VerifiedCapture) -> Triple:
    job = opened.capture.header.job
    return (*(job.window if job else ()), 1)[:3]  # type: ignore[return-value]


def _most_telling(recorded: Sequence[Sample], cohort: Cohort | None, window: Triple) -> list[Sample]:
    """The slice with most tumour of each patient, where the masks are known: the one that matters."""
    if cohort is None or cohort.labels is None:
        return one_per_patient(recorded)
    held, there = set(cohort.keys()), set(recorded)
    keys = list(dict.fromkeys(sample.key for sample in recorded if sample.key in held))
    best = [sample for sample in most_tumour(cohort, keys, window) if sample in there]
    return best or one_per_patient(recorded)


def _check_grid(opened: VerifiedCapture, view: View, truth: Volumes) -> None:
    """Raise DataError where the truth's volumes are not those that the site listed when it joined."""
    listed = {
        patient.key: patient.shape
        for record in opened.capture.records()
        if isinstance(record.head, Inventory) and record.peer in (view.site, "")
        for patient in record.head.patients
    }
    held = set(truth.keys())
    for target in view.targets:
        key = target.sample.key
        if key in held and key in listed and truth.geometry(key).shape != listed[key]:
            shape = "x".join(map(str, truth.geometry(key).shape))
            raise DataError(
                f"the truth has volumes of {shape} voxels where the site listed "
                f"{'x'.join(map(str, listed[key]))}: give the site's own images, in its own resolution"
            )
