"""What an attack is given and what it gives back: `View` + `Knowledge` -> `Recovered`, in the end a `Result`.

A view is what one adversary legitimately saw, taken from a capture. Knowledge is everything else it is granted,
and every part of it is an argument, so that each figure can say under which assumption it was obtained.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from math import prod
from typing import Any, ClassVar, Literal

import numpy as np
from torch import nn

from splitpeer.models import Decoder
from splitpeer.models.cut import Backbone
from splitproto.codings import Form
from splitproto.records import Level, Sample, Seat

Levels = Mapping[str, np.ndarray]
"""Level name to float32 [channels, *spatial] of one sample."""
EVERYTHING = frozenset(
    (
        "model",
        "models",
        "initial_model",
        "shadow",
        "shadow_masks",
        "labels",
        "shadow_patients",
        "own_images",
        "decoder",
        "architecture",
        "adaptive",
    )
)
"""The fields of `Knowledge` that `Attack.uses` may name."""
Goal = Literal["image", "mask", "member"]


@dataclass(frozen=True)
class Shot:
    """One release of one sample, as the adversary saw it."""

    mode: str
    """train, evaluate or infer."""
    step: int
    index: int
    """Place of the sample in the whole batch: together with `seed` it tells how the sample was augmented."""
    seed: int | None
    """Augmentation of the batch; None: none."""
    activations: Levels = field(default_factory=dict)
    """What this site sent (a coordinator's view: received; a site's own view: what it sent itself)."""
    gradients: Levels = field(default_factory=dict)
    """Gradient of the loss with respect to `activations`; empty where none was sent (evaluation)."""


@dataclass(frozen=True)
class Target:
    """One sample under attack, with all its releases in order of time."""

    sample: Sample
    shots: tuple[Shot, ...]


@dataclass(frozen=True)
class View:
    """What one adversary saw of one site at one seat."""

    role: Literal["coordinator", "client"]
    site: str
    seat: Seat
    """The one under attack (coordinator), or the adversary's own (client): its modalities are an image's channels."""
    seats: tuple[Seat, ...]
    """All seats of the job, by name: the order in which the decoder concatenates."""
    backbone: Backbone
    """The network that the job names, and its cut."""
    window: tuple[int, ...]
    """Spatial size of a sample: (x, y) or (x, y, z)."""
    targets: tuple[Target, ...]
    defences: tuple[str, ...] = ()
    """What the site said it applies to its activations (with "image/" before defences of the image)."""
    gradient_defences: tuple[str, ...] = ()
    traffic: Callable[[], Sequence[Shot]] = tuple
    """Reads what the site sent of other samples under nearly the same weights, release by release: to learn from."""
    fusion: str = ""
    """How the decoder joins the sites, where it is known."""
    reads: str = ""
    """What is read together, where that is not one seat's tensors alone: behind an attack's name in tables."""
    parts: int = 1
    """Equal parts of each level's channels that were defended one by one (joint views, neighbouring slices)."""
    clear: tuple[str, ...] = ()
    """Modalities that the adversary holds in clear: the last channels of its images (`collusion.py`)."""
    form: Form = "f32"
    """The precision or coding in which values travelled, which may differ by level: public, as the job names it."""
    summed: str = ""
    """How tables name the sum that a coordinator reads in place of a site's own values; empty: it reads those."""

    @property
    def dimensions(self) -> int:
        """2 (slices) or 3 (volumes)."""
        return self.backbone.dimensions

    @property
    def levels(self) -> tuple[int, ...]:
        """The levels that are sent."""
        return self.backbone.levels

    @property
    def channels(self) -> dict[str, int]:
        """Level name to channels."""
        return self.backbone.cut.channels

    @property
    def shallowest(self) -> Level:
        """Of the levels that are sent."""
        return self.backbone.cut.levels[min(self.backbone.cut.sent)]

    @property
    def clear_channels(self) -> dict[str, int]:
        """How many of a level's channels, the last ones, hold what is known in clear: images on the level's grid."""
        return {self.shallowest.name: len(self.clear) * prod(self.shallowest.stride)} if self.clear else {}

    @property
    def defended(self) -> bool:
        """Whether what the adversary reads (a site: gradients) was defended."""
        return bool(self.gradient_defences if self.role == "client" else self.defences)


@dataclass(frozen=True)
class Knowledge:
    """What the adversary is granted in addition to its view. By default it has only the capture."""

    model: nn.Module | None = None
    """The site's encoder with its weights (of `weights_step`) and the trained parts of its defences: an image
    [B, channels, *spatial] to {"x0": ...} before any random defence."""
    weights_step: int | None = None
    models: Mapping[int, nn.Module] = field(default_factory=dict)
    """The same of several steps, for attacks that compare releases under different weights."""
    encoders: int = 1
    """How many sites' encoders `model` is made of."""
    architecture: bool = True
    """Knows which network it is (it is named in the job); attacks that need it say so."""
    shadow: Mapping[str, np.ndarray] = field(default_factory=dict)
    """Other patients' samples by seat: float32 [N, channels, *spatial], all seats the same N in order."""
    shadow_masks: np.ndarray | None = None
    """Their masks: uint8 [N, regions, *spatial]."""
    labels: np.ndarray | None = None
    """Masks of the targets, which a coordinator may hold: uint8 [N, regions, *spatial]."""
    shadow_patients: tuple[str, ...] = ()
    """Who each of their samples is of; empty: not known."""
    own_images: np.ndarray | None = None
    """A site's own images of the targets: float32 [N, channels, *spatial], unaugmented."""
    decoder: Decoder | None = None
    """The coordinator's own half at `weights_step`."""
    queries: bool = False
    """May run images of its choice through the site's encoder (through `model`, seeing only outputs)."""
    initial_model: nn.Module | None = None
    """Weights that the coordinator handed out itself (first-step attack)."""
    adaptive: bool = True
    """Knows which defences run, with their parameters but not their keys, and attacks accordingly."""
    trained: dict[bytes, Any] = field(default_factory=dict, compare=False, repr=False)
    """Networks that this adversary has trained, by what they depend on: several attacks start from the same one."""

    def assumptions(self, uses: frozenset[str] = EVERYTHING) -> tuple[str, ...]:
        """What of it an attack that uses these fields relied on, in words for the report."""
        words = []
        if "model" in uses and self.model is not None:
            of = "the site's encoder" if self.encoders == 1 else f"all {self.encoders} encoders"
            words.append("the encoder's outputs for images of its choice" if self.queries
                         else f"the weights of {of}")  # fmt: skip
        if "initial_model" in uses and self.initial_model is not None:
            words.append("the initial weights, handed out by the coordinator")
        if "shadow" in uses and self.shadow:
            count = len(next(iter(self.shadow.values())))
            words.append(f"{count} similar images of other patients")
        if "shadow_masks" in uses and self.shadow_masks is not None:
            words.append("their masks")
        if "labels" in uses and self.labels is not None:
            words.append("the patients' labels")
        if "own_images" in uses and self.own_images is not None:
            words.append("its own images of the patients")
        if "decoder" in uses and self.decoder is not None:
            words.append("the coordinator's own half of the network")
        if "architecture" in uses and self.architecture:
            words.append("the architecture named in the job")
        if "adaptive" in uses:
            words.append(
                "which defences run, with their parameters" if self.adaptive else "nothing of the defences"
            )
        if "models" in uses and self.models:
            words.append(f"the encoder's weights at steps {', '.join(map(str, sorted(self.models)))}")
        return tuple(words)


@dataclass(frozen=True)
class Recovered:
    """What one attack hands to the runner."""

    images: np.ndarray
    """See `Result.images`."""
    views: int
    """Releases of each sample that were used."""
    notes: tuple[str, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    """What only the run decided, such as the levels that were there."""
    history: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    """Losses of its own, step by step."""
    merit: float | None = None
    """How well it did in the adversary's own eyes, without the truth; higher is better, one deviation of an image is
    about 1. None: it cannot tell."""
    saved: float = 0.0
    """Seconds that it would have taken longer, had no other attack trained its network already."""


Stopped = Literal["converged", "limit", "fixed"]
_WHY: dict[Stopped, str] = {
    "converged": "more gains less than .01",
    "limit": "at the limit: more may gain",
    "fixed": "fixed: more may gain",
}


@dataclass(frozen=True)
class Spending:
    """The effort that an attack was given in the end; see `budget.py`."""

    effort: str
    """In words: "steps 600, iterations 400"."""
    times: int
    """How many times what its settings said; of the result that was kept."""
    curve: tuple[tuple[int, float], ...]
    """(times, figure of merit) of every budget that was tried; empty where nobody could judge."""
    stopped: Stopped
    """converged: the last doubling gained too little. limit: it might have gained more. fixed: not doubled."""
    published: str = ""
    """The effort of the source, where there is one."""

    def told(self) -> str:
        """For a table: what was spent, and why no more."""
        return f"{self.effort} ({_WHY[self.stopped]})"


@dataclass
class Result:
    """What an attack recovered, in the order of `view.targets`."""

    attack: str
    goal: Goal
    images: np.ndarray
    """goal image: float32 [N, channels, *spatial] in the site's own intensities where the attack can know them, else
    up to gain and offset. goal mask: float32 [N, *spatial], a score that is higher where the target is likely. goal
    member: float32 [N], higher for patients that the network was trained on."""
    adaptive: bool
    assumptions: tuple[str, ...]
    settings: dict[str, Any]
    """All that is needed to run it again: iterations, rates, seed."""
    views: int = 1
    """Releases of each sample that were used."""
    seconds: float = 0.0
    notes: tuple[str, ...] = ()
    history: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    merit: float | None = None
    """See `Recovered.merit`."""
    spent: Spending | None = None
    """None: more effort would change nothing, the attack has no budget."""


Progress = Callable[[str, int, int], None]
"""Told (what, done, total); may raise KeyboardInterrupt, which attacks let pass."""


def silent(what: str, done: int, total: int) -> None:
    """No progress shown."""


@dataclass(frozen=True, kw_only=True)
class Attack:
    """One attack. Its fields are its settings, with the published defaults scaled to the data; `runner.run` runs it."""

    name: ClassVar[str]
    title: ClassVar[str]
    """For tables."""
    source: ClassVar[str]
    """Paper, or what it derives from."""
    goal: ClassVar[Goal]
    role: ClassVar[Literal["coordinator", "client"]]
    """Whose view it works on."""
    plain: ClassVar[str]
    """One sentence for a privacy officer: what the adversary does."""
    needs: ClassVar[tuple[str, ...]] = ()
    """What must be granted: names of `runner.NEEDS`, in the order in which they are asked for."""
    uses: ClassVar[frozenset[str]] = frozenset({"adaptive"})
    """Fields of `Knowledge` that it relies on where they are there: the assumptions of its result."""
    evidence: ClassVar[str] = ""
    """What it reads, where that is not the activations."""
    budget: ClassVar[tuple[str, ...]] = ()
    """Its settings that are effort and are doubled together; empty: more effort would change nothing."""
    published: ClassVar[str] = ""
    """The effort of the paper or its code."""
    reads_traffic: ClassVar[bool] = False
    """Whether it learns from what was sent of other samples: the more is recorded, the better."""
    has_naive_form: ClassVar[bool] = True
    """Whether it can also ignore the defences."""

    seed: int = 0
    device: str = "cpu"

    def settings(self) -> dict[str, Any]:
        """All that is needed to run it again."""
        return {one.name: getattr(self, one.name) for one in fields(self) if one.name != "device"}

    def recover(self, view: View, knowledge: Knowledge, progress: Progress) -> Recovered:
        """Attack all targets of `view` at once, batched. Everything that `needs` names is granted.

        Raises:
            AttackImpossible: what is granted does not fit the view; the text says why.
        """
        raise NotImplementedError
