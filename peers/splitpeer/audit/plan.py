"""`sweep.toml`: which defences, at which strengths, against which attacks."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, PositiveInt, model_validator

from splitpeer.settings.job import Wire
from splitpeer.settings.loading import Section, Settings
from splitpeer.settings.values import Levels, Location, Modality, Seed

LABEL_ATTACKS = (
    "gradient-norm",
    "gradient-field",
    "gradient-field:together=8",
    "gradient-projector",
)
"""Every form of the gradient's size and axis; the largest figure counts."""
LEARNED_LABEL_ATTACKS = ("gradient-network",)
"""A network that has learned from gradients. It costs as much as all others together, so it runs once."""
_SLUG = re.compile(r"[^a-z0-9.]+")


class SweepHead(Section):
    """What all configurations share."""

    seat: Modality = "t1"
    """The seat under attack; where a job names none, each modality is one."""
    attacks: Annotated[tuple[str, ...], Field(min_length=1)] = ("pca", "whitebox", "inverse")
    """On images, by the coordinator."""
    naive: tuple[str, ...] = ("whitebox",)
    """Those of them also shown in the form that does not know the defence."""
    label_attacks: tuple[str, ...] = LABEL_ATTACKS
    """On labels, by a site: of one step, and of all steps that it recorded."""
    learned_label_attacks: tuple[str, ...] = LEARNED_LABEL_ATTACKS
    """The same, of all steps together only."""
    budget: Literal["auto"] | PositiveInt = "auto"
    """How the effort of attacks grows: doubled while that gains .01, or at most so many times what is written."""
    site_capture_mib: Annotated[int, Field(ge=0)] = 2048
    """Of the training steps that the attacking site records, the last ones; 0: the first and last two alone."""
    traffic_steps: Annotated[int, Field(ge=2)] = 100
    """Training steps, the last ones, that are recorded where an attack learns from all traffic (sdar, fora)."""
    views: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = (1, 100)
    """How often the coordinator sees each sample; attacks are run for each number, where fresh noise differs."""
    poses: Annotated[int, Field(ge=0)] = 8
    """In how many poses it sees each sample instead, where a site answers the same question the same every time."""
    joint: tuple[str, ...] = ()
    """Attacks on what all sites sent together, all contrasts at once; judged for those that the judge knows."""
    every: tuple[str, ...] = ("inverse:steps=150,width=16",)
    """Quick attacks on one release of each seat; the seat that shows most is then attacked by `attacks` as well."""
    neighbours: tuple[str, ...] = ()
    """Attacks on the slices above and below too (jobs of slices)."""
    collusion: tuple[str, ...] = ()
    """Attacks by the coordinator with one other site, and with all others; these figures do not enter "worst"."""
    members: Annotated[int, Field(ge=0)] = 0
    """Training patients, and as many others, of whom it is asked who was trained on; 0: not asked."""
    many: tuple[str, ...] = ()
    """Attacks for all but the smallest number of views; default: the same as for one."""
    targets: PositiveInt = 12
    """Patients held out whose slice with most tumour is attacked."""
    shadow: PositiveInt = 600
    """Similar images of other patients that the adversary holds."""
    seeds: Annotated[tuple[Seed, ...], Field(min_length=1)] = (7,)


class SweepConfiguration(Section):
    """One way for all sites to defend themselves; with `strengths`, one for each of them in place of `{}`."""

    name: str
    defences: tuple[str, ...] = ()
    image: tuple[str, ...] = ()
    gradients: tuple[str, ...] = ()
    levels: Levels | None = None
    """Levels that the job asks for; default: those of job.toml."""
    wire: Wire | None = None
    """Codings of activations and gradients; default: those of job.toml."""
    attacks: tuple[str, ...] = ()
    """Instead of those of [sweep]."""
    also_after: tuple[PositiveInt, ...] = ()
    """Training steps after which the targets are asked for as well, and whose weights the adversary holds too."""
    strengths: tuple[float, ...] = ()

    @model_validator(mode="after")
    def _coding_is_named(self) -> Self:
        if self.wire is not None and self.wire.auto:
            raise ValueError('wire = "auto" measures links, and a sweep has none: name a coding')
        return self

    def expanded(self) -> list[SweepConfiguration]:
        """One configuration for each strength."""
        if not self.strengths:
            return [self]

        def put(texts: tuple[str, ...], strength: float) -> tuple[str, ...]:
            return tuple(text.replace("{}", f"{strength:g}") for text in texts)

        return [
            SweepConfiguration(
                name=put((self.name,), s)[0], defences=put(self.defences, s), image=put(self.image, s),
                gradients=put(self.gradients, s), levels=self.levels, wire=self.wire, attacks=self.attacks,
                also_after=self.also_after,
            )
            for s in self.strengths
        ]  # fmt: skip

    @property
    def slug(self) -> str:
        """The name as a folder."""
        return _SLUG.sub("-", self.name.lower()).strip("-")


class SweepData(Section):
    """Whose images: a folder, or by default the phantom, rendered into the output folder."""

    folder: Location | None = None
    """A folder per modality, and labels/."""
    shadow: Location | None = None
    """The adversary's own patients, likewise."""
    convention: Literal["msd", "brats", "brats2023", "nnunet", "task"] = "msd"
    patients: Annotated[int, Field(ge=4)] = 124
    """Phantom patients."""
    seed: Seed = 7
    shadow_patients: Annotated[int, Field(ge=4)] = 100
    shadow_seed: Seed = 1007


class SweepPlan(Settings):
    """`sweep.toml`."""

    PATHS: ClassVar[frozenset[str]] = frozenset({"data.folder", "data.shadow"})

    sweep: SweepHead = SweepHead()
    data: SweepData = SweepData()
    configuration: Annotated[tuple[SweepConfiguration, ...], Field(min_length=1)]

    @classmethod
    def load(cls, path: Path, overrides: Mapping[str, Any] | None = None) -> Self:
        """Read it. Raises ConfigError: `Settings.read`."""
        return cls.read(path, overrides)

    @model_validator(mode="after")
    def _names_differ(self) -> Self:
        slugs = [configuration.slug for configuration in self.all()]
        if twice := {slug for slug in slugs if slugs.count(slug) > 1}:
            raise ValueError(
                f"[configuration] name {sorted(twice)[0]!r} is used twice: folders are named after it"
            )
        return self

    def all(self) -> list[SweepConfiguration]:
        """Every configuration, strengths spelled out, in the file's order."""
        return [one for configuration in self.configuration for one in configuration.expanded()]


def fingerprint(*parts: Any) -> str:
    """A digest by which a result is known to belong to these settings."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()
