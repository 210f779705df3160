"""What a run folder says: `attack.json`, field by field. `store.py` reads and writes it, `build.py` shows it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from splitpeer.defences.specs import placed
from splitpeer.leakage.scores import Score

FORMAT = 1
UNDEFENDED = "none"


class ReportPart(BaseModel):
    """Immutable; unknown keys are refused, since a misspelt one would silently be missing from the page."""

    model_config = ConfigDict(frozen=True, extra="forbid")


def configuration(defences: Iterable[str], gradient_defences: Iterable[str] = ()) -> str:
    """The name of a set of defences in tables: joined by " + ", those of gradients behind "gradients/"."""
    return " + ".join([*defences, *placed("gradients", gradient_defences)]) or UNDEFENDED


def _plain(value: Any) -> Any:
    """`value` in JSON's types: numbers of numpy as Python's, what is not finite as None, anything else as text."""
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(one) for one in value]
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


class Source(ReportPart):
    """The capture that was attacked."""

    file: str = ""
    digest: str = ""
    """Hex of its last chain, or SHA-256 of the file."""
    role: Literal["coordinator", "client"]
    """Who recorded it, which is who the adversary is."""
    site: str = ""
    """Name of who recorded."""
    federation: str = ""
    run: str = ""
    job: str = ""
    """Name or digest of the job."""
    created: float | None = None
    """Unix seconds."""
    records: int | None = None
    complete: bool = True
    """False: cut off; attacked up to the last whole record."""
    rehearsal: bool = False
    """True: made by an audit on the site's own data; nothing left the hospital."""
    averages: bool = False
    """Whether the job averages encoders: then the coordinator holds their weights, and so does its recording."""
    frozen: bool = False
    """Whether encoders stay as they are: no gradient is ever sent to a site."""
    summed: int | None = None
    """Over how many sites the coordinator reads sums (secure fusion); None: it reads each site's values."""
    steps: int | None = None
    """Training steps that it covers."""
    samples: int | None = None
    """Different samples that it holds."""


class RunLevel(ReportPart):
    """One tensor that crosses the wire for every sample."""

    name: str
    shape: tuple[int, ...]
    """[channels, *spatial] of one sample."""
    octets: int
    """Bytes of one sample, as sent; of a level that is withheld, as it would be."""
    precision: str
    sent: bool = True
    """False: withheld by the site's policy."""
    defences: tuple[str, ...] = ()
    gradient_precision: str = ""
    gradient_octets: int | None = None
    """None: no gradients of it come back."""
    gradient_defences: tuple[str, ...] = ()


class RunNetwork(ReportPart):
    """What the job exchanges."""

    dimensions: int = 2
    window: tuple[int, ...] = ()
    network: str = ""
    """Name of the network in the registry."""
    settings: dict[str, tuple[int, ...]] = Field(default_factory=dict)
    """Settings of the network."""
    fusion: str = ""
    sites: dict[str, str] = Field(default_factory=dict)
    """Site to what it holds."""
    levels: tuple[RunLevel, ...] = ()
    image_octets: int | None = None
    """Bytes of one sample's image as float32, for comparison."""


class Promise(ReportPart):
    """What one defence is, in words of its own class."""

    title: str
    promise: str
    guarantee: bool = False


class Effort(ReportPart):
    """What an attack was given."""

    told: str
    """In words, and why no more."""
    times: int = 1
    """How many times what its settings said."""
    curve: tuple[tuple[int, float], ...] = ()
    """(times, figure) of every effort that was tried: SSIM, or the mask's AUC."""
    stopped: Literal["converged", "limit", "fixed"] = "fixed"
    published: str = ""
    """The effort of the source."""


class Entry(ReportPart):
    """One attack in one variant against one configuration of defences."""

    id: str
    """Unique in its folder; key of its array in `reconstructions.npz`."""
    attack: str
    title: str
    plain: str = ""
    """What the adversary does, one sentence without technical words."""
    goal: Literal["image", "mask", "member"]
    modality: str
    """The modality attacked; for a mask, the modality of the site that attacks."""
    site: str = ""
    """The site attacked; for a mask the site that attacks."""
    adaptive: bool = True
    """Whether the adversary takes the defences into account."""
    defences: tuple[str, ...] = ()
    """Defences of activations, as written; "image/..." for those of the image."""
    gradient_defences: tuple[str, ...] = ()
    trained: bool = True
    """Whether the network was trained under these defences; False: applied to recorded clean traffic."""
    levels: tuple[str, ...] = ()
    """Levels that the attack used."""
    views: int = 1
    assumptions: tuple[str, ...] = ()
    settings: dict[str, Any] = Field(default_factory=dict)
    effort: Effort | None = None
    """None: more would change nothing."""
    seconds: float = 0.0
    notes: tuple[str, ...] = ()
    status: Literal["done", "interrupted", "impossible"] = "done"
    """interrupted: the images were recovered before the end. impossible: `reason` says what was lacking."""
    reason: str = ""
    scores: dict[str, Score] = Field(default_factory=dict)
    """As `splitpeer.leakage` names them (ssim, ..., tumour_dice; auc, dice_otsu, ...); empty without truth."""
    reads: str = ""
    """What the adversary reads beyond one seat's tensors; as in the title."""
    clear: tuple[str, ...] = ()
    """Modalities whose images hospitals that work with it showed it."""
    rows: tuple[int, ...] | None = None
    """Which rows of the truth arrays the attack's rows are, in order; None: all, or the first."""

    @field_validator("settings", mode="before")
    @classmethod
    def _plain_settings(cls, value: Any) -> Any:
        # A long attack must not be lost over a setting that JSON has no word for.
        return _plain(value)

    @property
    def configuration(self) -> str:
        """Its defences in one line."""
        return configuration(self.defences, self.gradient_defences)


class Point(ReportPart):
    """One configuration of a sweep, as `frontier.json` has it."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    name: str
    dice: float
    leakage: float
    """Highest mean SSIM inside the brain over all attacks."""
    by: str = ""
    views: int = 1
    floor: float | None = None
    tumour: float | None = None
    mask_auc: float | None = None
    advantage_auc: float | None = None
    """How far the best label attack exceeds the site's own image."""
    front: bool = False


class Frontier(ReportPart):
    """A sweep of configurations."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    points: tuple[Point, ...] = ()


class Privacy(ReportPart):
    """A differential privacy budget, or the statement that there is none."""

    guarantee: bool = False
    epsilon: float | None = None
    delta: float | None = None
    limit: float | None = None
    """Epsilon at which the site stops sending."""
    finds: float | None = Field(None, ge=0, le=1)
    """Largest true positive rate of any test for one person's images that has `alarms` false ones."""
    alarms: float | None = Field(None, ge=0, le=1)
    unit: str = "patient"
    """Whose presence or values are protected."""
    releases: int | None = None
    mechanism: str = ""
    accountant: str = ""
    statement: str = ""


class AuditRun(ReportPart):
    """A whole `attack.json`."""

    format: Literal[1] = 1
    made_by: str = ""
    """Program and version."""
    capture: Source
    network: RunNetwork = RunNetwork()
    entries: tuple[Entry, ...] = ()
    patients: tuple[str, ...] = ()
    """First digits of the pseudonyms, in the order in which figures are listed patient by patient."""
    dice: dict[str, dict[str, float | None]] = Field(default_factory=dict)
    """Configuration (see `configuration`) to Dice of each region and "mean", of the network trained under it."""
    hd95: dict[str, dict[str, float | None]] = Field(default_factory=dict)
    """The same of the 95 % Hausdorff distance, mm."""
    volume_ml: dict[str, dict[str, dict[str, float]]] = Field(default_factory=dict)
    """Configuration to region to {"predicted", "true"}, ml."""
    promises: dict[str, Promise] = Field(default_factory=dict)
    """Defence's name ("dropout") to what it promises."""
    frontier: Frontier | None = None
    privacy: Privacy | None = None
    not_tested: tuple[str, ...] = ()
    """One sentence each."""
    commands: tuple[str, ...] = ()
    """What to type to repeat this run."""
    digests: dict[str, str] = Field(default_factory=dict)
    """What was used (job, weights, truth, knowledge files) to hex SHA-256."""
    notes: tuple[str, ...] = ()
