"""``job.toml``, which belongs to the coordinator: what is trained, by whom and how. It asks, ``peer.toml`` decides."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from splitpeer.data.normalisation import OF_A_SUM
from splitpeer.models.cut import MAX_LEVELS, Backbone
from splitpeer.models.registry import DEFAULT, NETWORKS, make_backbone
from splitpeer.settings.loading import Section, Settings
from splitpeer.settings.network import NetworkSettings, listed
from splitpeer.settings.task import TaskSection
from splitpeer.settings.values import (
    AUTO,
    MAX_COUNT,
    Count,
    CountOrFraction,
    GradientDefences,
    Levels,
    Location,
    Modalities,
    Modality,
    Name,
    PositiveInt,
    Precision,
    Seconds,
    Seed,
    Width,
    WireCoding,
)
from splitproto.codings import CODINGS
from splitproto.identity import AllowList
from splitproto.messages import MOST_SEATS_OF_A_JOB
from splitproto.records import MOST_SEATS

__all__ = ["JobConfig"]

MAX_STEPS = 99_999_999
"""Checkpoints are named by step, in eight digits."""
COORDINATOR = "coordinator"
"""Not allowed as a seat's name: weights and seeds of the decoder use it."""
MOST_CHANNELS = 8
"""Most channels of one seat (SP-8.4, Seat)."""


class JobHead(Section):
    """The job's name and seed."""

    name: Name
    seed: Seed = 0
    """Seeds the order of batches, the augmentation and the decoder; known to all."""


class Model(NetworkSettings):
    """The network, and what of it leaves the sites. Settings that are not written are the network's defaults."""

    network: str = DEFAULT
    """A name of `models.registry.NETWORKS`."""
    dimensions: Literal[2, 3] = 2
    levels: Levels | None = None
    """Levels whose activations the sites send; without it, all of the network's."""
    fusion: Literal["concat", "mean", "secure-sum"] = "concat"
    """secure-sum: sites mask what they send, and the coordinator can read only the sum over all of them."""
    sum_bits: Literal[16, 32] = 16
    """Size of one word of a secure sum."""
    sum_range: Annotated[float, Field(ge=2**-20, le=2**20)] = 4.0
    """What a site adds to a secure sum is clipped to between minus and plus this."""
    widths: Annotated[tuple[Width, ...], Field(max_length=MAX_LEVELS)] = ()
    """Channels to which sites narrow the levels that they send, the finest first; without it, none is narrowed."""

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_the_network(cls, raw: Any) -> Any:
        network = NETWORKS.get(raw.get("network", DEFAULT)) if isinstance(raw, dict) else None
        if network is None:
            return raw
        raw = {**network.defaults, **raw}
        try:
            whole = {name: tuple(listed(raw[name])) for name in network.defaults}
            count = len(network.levels(raw.get("dimensions", 2), whole))
        except (TypeError, ValueError):  # reported where the value is checked
            return raw
        return {"levels": tuple(range(count)), **raw}

    @model_validator(mode="after")
    def _possible(self) -> Self:
        self.backbone()
        return self

    @property
    def decoder_fusion(self) -> Literal["concat", "mean", "sum"]:
        """What the decoder does with the seats that it has."""
        return "sum" if self.fusion == "secure-sum" else self.fusion

    def backbone(self) -> Backbone:
        """The network and its cut."""
        return make_backbone(self.network, self.dimensions, self.given, self.levels, self.widths)


class JobData(Section):
    """What a sample is, and who is held out."""

    window: Annotated[tuple[Annotated[int, Field(ge=16, le=4096)], ...], Field(min_length=2, max_length=3)]
    """Voxels; default 96 x 96, or 128 x 128 x 128."""
    spacing: (
        Annotated[tuple[Annotated[float, Field(gt=0)], ...], Field(min_length=3, max_length=3)] | None
    ) = None
    """Millimetres to resample to; without it, as stored."""
    positive_fraction: Annotated[float, Field(ge=0, le=1)] = 0.75
    """Share of windows centred on tumour."""
    augment: bool = True
    validation: CountOrFraction = 0.2
    """Patients held out: a whole number, or a fraction."""
    min_patients: PositiveInt = 2
    """With fewer patients of `min_seats` seats the job fails."""
    min_seats: PositiveInt | None = None
    """Patients with at least this many seats are used; by default those with all."""
    complete_first: Count = 0
    """Steps at the start that draw complete patients only."""
    max_withdrawn: CountOrFraction = 0.1
    """Patients that one site may withdraw in the middle of a run: a whole number, or a fraction (then at least one)."""

    def most_withdrawn(self, patients: int) -> int:
        """`max_withdrawn` of so many patients."""
        most = self.max_withdrawn
        return max(1, int(most * patients)) if isinstance(most, float) else most


class Training(Section):
    """The optimisation, the same at all parties."""

    steps: Annotated[int, Field(gt=0, le=MAX_STEPS)] = 1000
    batch: Annotated[int, Field(ge=1, le=4096)] = 4
    precision: Precision = "f32"
    """Precision of activations and gradients on the wire, where `[wire]` does not code them."""
    optimiser: Literal["adam", "adamw", "sgd"] = "adam"
    learning_rate: Annotated[float, Field(gt=0)] = 5e-3
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    schedule: Literal["one-cycle", "cosine", "constant"] = "one-cycle"
    ahead: Annotated[int, Field(ge=1, le=64)] = 4
    """Batches announced before they are needed, so that sites prefetch."""
    checkpoint_every: PositiveInt = 100
    keep_checkpoints: Annotated[int, Field(ge=1, le=64)] = 2
    """How many of the newest are kept, at all peers."""
    seat_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Probability that a seat is left out of a step, so that the network learns to do without one."""
    encoders: Literal["joint", "frozen"] = "joint"
    """joint: encoders and decoder are trained together. frozen: each site's encoder stays as it is and releases every
    window once; the decoder is trained from what the coordinator keeps, with no site online."""
    bank: Location | None = None
    """Folder of the feature bank of an earlier run with frozen encoders: the decoder is trained from it, and no site is
    asked."""
    average_every: Count = 0
    """Steps after which encoders of one seat are averaged; 0: each site keeps its own. Sites must allow it."""

    @property
    def frozen(self) -> bool:
        """Whether the sites' encoders stay as they are."""
        return self.encoders == "frozen"


class Pretraining(Section):
    """A recipe for the sites' first weights, which each follows by itself: ``splitpeer pretrain --recipe``."""

    data: Name
    """Whose images: ``phantom``, which the command renders, or the name of a public data set that each site has."""
    patients: Annotated[int, Field(ge=1, le=10_000)] = 240
    """How many patients the phantom has."""
    cohort: Annotated[int, Field(ge=0, le=MAX_COUNT)] = 1000
    """Which phantom patients: its seed."""
    labels: Literal["regions", "none"] = "regions"
    """With the masks of the job's task, or of images alone."""
    encoders: Literal["apart", "together"] = "apart"
    """together: those of all seats as one network with the job's fusion, of which each site keeps its own; wants
    data with all modalities of the job, and masks."""
    steps: Annotated[int, Field(gt=0, le=MAX_STEPS)] = 1000
    noise: Annotated[float, Field(ge=0, le=10)] = 0.0
    """Gaussian noise on what leaves an encoder, in root mean squares of a level: the same that the sites add in the
    run, as their defence ``gaussian:NOISE``. Wants masks."""
    rate: Annotated[float, Field(ge=0, le=1000)] = 0.0
    """Loss per nat and voxel that gets through the noise: the more, the less encoders show besides the task."""
    seed: Seed | None = None
    """All sites of one modality start alike, from weights that anybody can compute; without it, from a secret that they
    share, or from entropy of their own."""
    own_steps: Annotated[int, Field(ge=0, le=MAX_STEPS)] = 0
    """After that so many steps on the site's own images, without masks."""

    @model_validator(mode="after")
    def _goes_together(self) -> Self:
        if self.encoders == "together" and self.labels == "none":
            raise ValueError('encoders = "together" learns from masks: set labels = "regions"')
        if self.noise and self.labels == "none":
            raise ValueError('noise is for encoders that learn from masks: set labels = "regions"')
        if self.noise and self.own_steps:
            raise ValueError(
                "own_steps would teach encoders to show images again: set own_steps = 0 with noise"
            )
        if self.rate and not self.noise:
            raise ValueError("rate is the price of what gets through noise: set noise too")
        return self


class Wire(Section):
    """How tensors travel where `[training] precision` would take more bytes than there is bandwidth for."""

    activations: WireCoding | None = None
    """One for all levels that are sent, or a list with one for each, the finest first. Default: not coded."""
    gradients: WireCoding | None = None
    """As `activations`."""
    auto_s: Seconds = 0.1
    """With "auto", seconds that the tensors of one step may take in one direction on the slowest link: the least lossy
    form with which they do is chosen, none, f16, int8 or int4."""
    gradients_in_turns: Literal["auto", "always", "never"] = "auto"
    """Whether gradients go to one site after the other; "auto": both ways are tried, and the faster one is kept."""

    @property
    def coded(self) -> bool:
        """Whether anything is, or may be."""
        return (self.activations, self.gradients) != (None, None)

    @property
    def auto(self) -> bool:
        """Whether links are to be measured."""
        return AUTO in (self.activations, self.gradients)


class JobDefences(Section):
    """Defences that the coordinator, which holds the labels, applies to gradients before sending them."""

    gradients: GradientDefences = ()
    """In order: ``marvell:0.3``, ``max-norm``; to each site's gradients on their own."""


class Evaluation(Section):
    """Sliding windows over the patients held out."""

    every: Count = 0
    """Steps; 0: only at the end."""
    sample: Count = 0
    """How many of the held-out patients the evaluations before the last score; 0: all."""
    overlap: Annotated[float, Field(ge=0, lt=1)] = 0.5
    batch: Annotated[int, Field(ge=1, le=4096)] = 4
    missing: bool = False
    """Score the patients held out once more without each seat."""


class Inference(Section):
    """A service: sites ask for segmentations of their patients (``splitpeer segment``). Without it there is none."""

    serve: Literal["always", "after"] = "after"
    """after: when the run is complete. always: between two steps of the training, too."""
    overlap: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Of the windows; default: [evaluation] overlap."""
    batch: Annotated[int, Field(ge=1, le=4096)] | None = None
    """Windows that are asked for at once; default: [evaluation] batch."""
    share: Annotated[float, Field(gt=0, le=1)] = 0.25
    """Of the time, at most, while the run trains."""
    max_queue: Annotated[int, Field(ge=1, le=1000)] = 32
    """Requests of one site that may wait; more are refused."""
    deadline_s: Seconds = 600.0
    """How long one request may be worked on."""
    max_kept_mib: PositiveInt = 65536
    """Most MiB on disk of what sites with frozen encoders release for requests. For a new request, patients who were
    asked about longest ago make room; one who needs more than all of it is refused."""
    keep_s: Annotated[float, Field(ge=0)] = 604_800.0
    """What was released of a patient is removed when nobody has asked for so long; 0: as soon as a request is over."""


class Labels(Section):
    """Where the masks are."""

    at: Name | None = None
    """Site that holds them: it computes the loss and the scores, and no mask leaves it. Without it they are the
    coordinator's."""


class Deadlines(Section):
    """How long the coordinator waits, in seconds; `Absence` says what happens then."""

    join_s: Seconds = 600.0
    step_s: Seconds = 120.0
    return_s: Seconds = 60.0


class Absence(Section):
    """What happens when a site does not return in time."""

    mode: Literal["pause", "skip", "drop"] = "pause"
    """pause: the run waits, then the job fails. skip: the step is made without the site, and the next waits
    again. drop: steps are made without it until it is back."""
    least_sites: PositiveInt = 1
    """With fewer it ends (exit code 3)."""
    per_site_s: dict[Name, Seconds] = Field(default_factory=dict)
    """How long a particular site may be away; default: [deadlines] return_s."""


class Output(Section):
    """Where results go."""

    folder: Location
    """Default ``runs/<name>``."""


class JobConfig(Settings):
    """``job.toml``."""

    PATHS: ClassVar[frozenset[str]] = frozenset({"output.folder"})

    job: JobHead
    sites: Annotated[dict[Name, Modalities], Field(min_length=1)]
    """Site to the modality or modalities it holds: who takes part, and the coordinator's allow-list."""
    seats: dict[Modality, Modalities] = Field(default_factory=dict)
    """Seats of several modalities, which become its channels; a modality in none is a seat of its own name."""
    task: TaskSection = TaskSection(preset="glioma")
    model: Model = Model()
    data: JobData
    training: Training = Training()
    wire: Wire = Wire()
    pretraining: Pretraining | None = None
    defences: JobDefences = JobDefences()
    evaluation: Evaluation = Evaluation()
    inference: Inference | None = None
    labels: Labels = Labels()
    deadlines: Deadlines = Deadlines()
    absence: Absence = Absence()
    output: Output

    @classmethod
    def load(cls, path: Path, overrides: Mapping[str, Any] | None = None) -> Self:
        """Read ``job.toml``. Raises ConfigError, see `Settings.read`. Environment variables do not apply to a job."""
        return cls.read(path, overrides)

    @classmethod
    def path_defaults(cls, raw: Mapping[str, Any]) -> dict[str, str]:
        job = raw.get("job")
        name = job.get("name") if isinstance(job, dict) else None
        return {"output.folder": f"runs/{name}"}

    @model_validator(mode="before")
    @classmethod
    def _window_by_dimensions(cls, raw: Any) -> Any:
        model, data, labels = raw.get("model", {}), raw.setdefault("data", {}), raw.get("labels", {})
        if isinstance(data, dict) and isinstance(labels, dict) and labels.get("at"):
            # SP-11.20-4: nobody may be told where a tumour is, so windows are drawn without asking.
            data.setdefault("positive_fraction", 0.0)
        if isinstance(model, dict) and isinstance(data, dict):
            data.setdefault("window", (128,) * 3 if model.get("dimensions") == 3 else (96,) * 2)
        return raw

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        problems = self._problems_of_seats()
        held = {modality for one in self.sites.values() for modality in one}
        unheld = [modality for modality in self.task.normalisation if modality not in held]
        problems += [f"[task] normalisation: {modality} is at none of [sites]" for modality in unheld]
        strangers = [site for site in self.absence.per_site_s if site not in self.taking_part]
        problems += [f"[absence] per_site_s: {site!r} is not one of [sites]" for site in strangers]
        problems += self._problems_of_frozen() + self._problems_of_labels()
        problems += [
            f"[defences] gradients: {spec.brief} is undone by the next step, which has other weights: remove kept=true"
            for spec in self.defences.gradients
            if spec.kept
        ]
        if self.absence.least_sites > len(self.sites):
            problems.append(
                f"[absence] least_sites = {self.absence.least_sites}, but [sites] names {len(self.sites)}"
            )
        problems += self._problems_of_a_secure_sum() + self._problems_of_codings()
        problems += self._problems_of_inference()
        window, dimensions = self.data.window, self.model.dimensions
        if len(window) != dimensions:
            problems.append(f"[data] window has {len(window)} sizes but [model] dimensions is {dimensions}")
        else:
            try:
                self.model.backbone().cut.check_window(window)
            except ValueError as error:
                problems.append(f"[data] {error}")
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def channels(self) -> dict[str, tuple[str, ...]]:
        """Every seat by name, in this order, and the modalities that are its channels."""
        held = {modality for one in self.sites.values() for modality in one}
        alone = held.difference(*self.seats.values())
        return dict(sorted({**{modality: (modality,) for modality in alone}, **self.seats}.items()))

    def filled_by(self, site: str) -> tuple[str, ...]:
        """Names of the seats of which this site holds every modality, in their order."""
        held = set(self.sites.get(site, ()))
        return tuple(seat for seat, modalities in self.channels().items() if held.issuperset(modalities))

    def fillers(self, seat: str) -> tuple[str, ...]:
        """The sites that fill a seat."""
        return tuple(site for site in self.sites if seat in self.filled_by(site))

    def unused(self) -> list[str]:
        """What sites hold and no step will use, one line each: a part of a seat counts only with the rest of it."""
        lines = []
        for site, held in self.sites.items():
            used = {modality for seat in self.filled_by(site) for modality in self.channels()[seat]}
            for modality in held:
                if modality in used:
                    continue
                seat, whole = next((s, m) for s, m in self.seats.items() if modality in m)
                rest = ", ".join(one for one in whole if one not in held)
                lines.append(
                    f"[sites] {site} holds {modality}, which only counts together with {rest} (seat {seat}): "
                    f"remove it, or add {rest}"
                )
        return lines

    def _problems_of_seats(self) -> list[str]:
        seats, held = self.channels(), {modality for one in self.sites.values() for modality in one}
        filled = {site: self.filled_by(site) for site in self.sites}
        named = Counter(modality for modalities in self.seats.values() for modality in modalities)
        problems = [
            f"[seats] {name} is in two seats: name it in one" for name, times in named.items() if times > 1
        ]
        problems += [
            f"[seats] {seat} is also a modality at one of [sites], and so a seat of its own: choose another name"
            for seat, modalities in self.seats.items()
            if seat in held.difference(*self.seats.values()) and seat not in modalities
        ]
        if COORDINATOR in seats:
            problems.append(f"[seats] no seat may be called {COORDINATOR}: choose another name")
        problems += [
            f"[seats] {seat}: no site holds all of {', '.join(modalities)}"
            for seat, modalities in seats.items()
            if not any(seat in fills for fills in filled.values())
        ]
        problems += [
            f"[sites] {site} holds {', '.join(self.sites[site])} and fills no seat: give it all modalities of one"
            for site, fills in filled.items()
            if not fills
        ]
        problems += [
            f"[seats] {seat} has {len(modalities)} modalities, at most {MOST_CHANNELS} are possible"
            for seat, modalities in seats.items()
            if len(modalities) > MOST_CHANNELS
        ]
        problems += [
            f"[sites] {site} fills {len(fills)} seats, at most {MOST_SEATS} are possible"
            for site, fills in filled.items()
            if len(fills) > MOST_SEATS
        ]
        if self.data.min_seats is not None and self.data.min_seats > len(seats):
            problems.append(f"[data] min_seats = {self.data.min_seats}, but the job has {len(seats)} seats")
        return problems

    def _problems_of_a_secure_sum(self) -> list[str]:
        """SP-11.18-1, SP-11.18-14: one set of sites, all of them, from the first step to the last."""
        if self.model.fusion != "secure-sum":
            return []
        seats, training = self.channels(), self.training
        fillers = {seat: self.fillers(seat) for seat in seats}
        wrong = {
            f"[sites] names {len(self.sites)} site: there is no sum of one": len(self.sites) < 2,
            f'[absence] mode = "{self.absence.mode}": a sum without a site shows what it holds; use "pause"': (
                self.absence.mode != "pause"
            ),
            "[training] seat_dropout: a sum without a seat shows what it holds; remove it": training.seat_dropout
            > 0,
            "[evaluation] missing: a sum without a seat shows what it holds; remove it": self.evaluation.missing,
            "[data] min_seats: patients of a sum have all seats; remove it": (
                self.data.min_seats not in (None, len(seats))
            ),
            "[training] average_every: the sites of a sum fill different seats; remove it": training.average_every
            > 0,
            f'[training] precision = "{training.precision}": gradients of a sum are f32': training.precision
            != "f32",
            "[wire]: what travels of a sum is not coded; remove it": self.wire.coded,
            f"[task] normalisation: in a secure sum only {' and '.join(OF_A_SUM)} lose no image": any(
                rule.partition(":")[0] not in OF_A_SUM for rule in self.task.normalisation.values()
            ),
        }
        several = [
            f"[sites] {' and '.join(sites)} fill seat {seat}: in a sum each seat is one site's"
            for seat, sites in fillers.items()
            if len(sites) > 1
        ]
        return [
            f'{problem} ([model] fusion = "secure-sum")' for problem, holds in wrong.items() if holds
        ] + several

    def _problems_of_inference(self) -> list[str]:
        if self.inference is None:
            return []
        wrong = {
            f"[inference] is for at most {MOST_SEATS_OF_A_JOB} seats, and the job has {len(self.channels())}": (
                len(self.channels()) > MOST_SEATS_OF_A_JOB
            ),
            "[inference] needs the sites of its run, and [training] bank is of another: remove one of the two": (
                self.training.bank is not None
            ),
            '[inference] serve = "always" is not for a job with [training] encoders = "frozen": write "after"': (
                self.training.frozen and self.inference.serve == "always"
            ),
            # SP-11.19-14: windows on another grid would show the same places again.
            "[inference] overlap and batch are those of [evaluation] where encoders are frozen: remove them": (
                self.training.frozen and (self.inference.overlap, self.inference.batch) != (None, None)
            ),
        }
        return [problem for problem, holds in wrong.items() if holds]

    def windows_of_inference(self) -> tuple[float, int]:
        """Overlap of the windows, and how many are asked for at once."""
        service = self.inference or Inference()
        overlap = self.evaluation.overlap if service.overlap is None else service.overlap
        return overlap, service.batch or self.evaluation.batch

    def _problems_of_frozen(self) -> list[str]:
        """What cannot be where no step is made with a site."""
        if not self.training.frozen:
            lost = self.training.bank is not None
            return ['[training] bank is for a job with encoders = "frozen": remove it'] if lost else []
        wrong = {
            "[training] average_every": self.training.average_every != 0,
            "[defences] gradients": bool(self.defences.gradients),
            "[wire] gradients": self.wire.gradients is not None,
            f'[absence] mode = "{self.absence.mode}"': self.absence.mode != "pause",
        }
        problems = [
            f'{name} is not for a job with [training] encoders = "frozen": remove it'
            for name, written in wrong.items()
            if written
        ]
        if self.training.bank is not None and self.wire.activations == AUTO:
            problems.append(
                '[wire] activations = "auto" asks sites, and [training] bank is of another run: write what that run has'
            )
        return problems

    def _problems_of_codings(self) -> list[str]:
        """SP-11.21-8: what a list in `[wire]` cannot say of this network."""
        precision, problems = self.training.precision, []
        for name in ("activations", "gradients"):
            listed = getattr(self.wire, name)
            if not isinstance(listed, tuple):
                continue
            if len(listed) != (levels := len(self.model.backbone().cut.sent)):
                problems.append(
                    f"[wire] {name} lists {len(listed)} codings, and {levels} levels are sent: write one for each, the "
                    "finest first"
                )
            problems += [
                f'[wire] {name}: "{one}" is not [training] precision, as which a level travels that is not coded: '
                f'write "{precision}"'
                for one in dict.fromkeys(listed)
                if one not in (precision, *CODINGS)
            ]
        return problems

    def _problems_of_labels(self) -> list[str]:
        """SP-11.20-1, SP-11.20-4: what cannot be where the masks are at a site."""
        if (at := self.labels.at) is None:
            return []
        blind = [spec.brief for spec in self.defences.gradients if spec.kind.needs_labels]
        wrong = {
            f"[data] positive_fraction = {self.data.positive_fraction:g}: windows around tumour would tell the "
            "coordinator where it is; write 0": self.data.positive_fraction > 0,
            '[training] encoders = "frozen": the decoder would ask for losses with no site online; use "joint"': (
                self.training.frozen
            ),
            f'[absence] mode = "{self.absence.mode}": no step can be made without the masks; use "pause"': (
                self.absence.mode != "pause"
            ),
            f'[model] fusion = "secure-sum": {at} would be in no sum; give it a modality in [sites]': (
                self.model.fusion == "secure-sum" and at not in self.sites
            ),
            f"[defences] gradients: {', '.join(blind)} acts on what the masks say, which the coordinator lacks; "
            "remove it": bool(blind),
        }
        return [f'{problem} ([labels] at = "{at}")' for problem, holds in wrong.items() if holds]

    @property
    def taking_part(self) -> tuple[str, ...]:
        """All sites: those of [sites], and the one that holds the masks."""
        at = self.labels.at
        return (*self.sites, at) if at is not None and at not in self.sites else tuple(self.sites)

    def allow_list(self) -> AllowList:
        """The coordinator's: the clients of [sites] and [labels]."""
        return AllowList({"client": self.taking_part}, f"{self.source} [sites]")
