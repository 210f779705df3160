"""``[prepare]`` of peer.toml: how DICOM becomes images on the atlas. Read by `splitpeer data prepare` alone."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, ConfigDict, Field

from splitpeer.data.rules import MAX_VOXELS
from splitpeer.dicom.rules import FEWEST_SLICES, RULES, Prefer, SeriesRule
from splitpeer.errors import ConfigError
from splitpeer.prepare.bounds import QualityBounds
from splitpeer.prepare.templates import MNI152, checked
from splitpeer.settings.loading import Section, Settings
from splitpeer.settings.values import Location, Modality, PositiveInt, Seconds


def _expression(value: str) -> str:
    try:
        re.compile(value)
    except re.error as error:
        raise ValueError(f"{value!r} is no regular expression ({error.msg}): correct it") from None
    return value


def _bias_field(value: str) -> str:
    return value if value in ("none", "n4") else checked(value)


Expression = Annotated[str, AfterValidator(_expression), Field(max_length=500)]
Factor = Annotated[float, Field(gt=0)]


class SeriesSettings(Section):
    """``[prepare.series.MODALITY]``: which series shows it. What is not said is as built in, where that is known."""

    shows: Literal["t1", "t2", "flair", "pd", ""] | None = None
    """What parameters and description must tell."""
    agent: Literal["with", "without", "any"] | None = None
    """Contrast agent."""
    dicom_modality: Annotated[str, Field(pattern=r"^[A-Z]{2,16}$")] | None = None
    description: Expression = ""
    """Regular expression for the series' description; it is then believed whatever the parameters say."""
    but: Expression = ""
    """Regular expression that the description must not hold."""
    prefer: Prefer = "only"
    """Which of several that fit; only: none, and the patient is named."""
    min_slices: Annotated[int, Field(ge=2, le=4096)] = FEWEST_SLICES

    def rule(self, modality: str) -> SeriesRule:
        """With what is built in for `modality`."""
        base = RULES.get(modality, SeriesRule())
        return SeriesRule(
            base.shows if self.shows is None else self.shows,
            base.agent if self.agent is None else self.agent,
            self.dicom_modality or base.dicom_modality,
            self.description,
            self.but,
            self.prefer,
            self.min_slices,
        )


class PrepareSection(Section):
    """What `splitpeer data prepare` does where its flags do not say."""

    patient_id: Annotated[str, Field(pattern=r"^[A-Za-z0-9]{1,64}$")] = "PatientID"
    """DICOM keyword of what names the patient; ``folder``: the first folder below the one that is read."""
    ids: Location | None = None
    """List with the columns hospital,study, where the hospital's ids are not the study's."""
    atlas: str = MNI152
    """``mni152``, or a NIfTI file whose background is 0."""
    registration: Literal["affine", "rigid", "none"] = "affine"
    """none: the images lie in the atlas's space already, as their headers say."""
    spacing: tuple[Factor, Factor, Factor] | None = None
    """Millimetres of the voxels that are written; none: the atlas's."""
    bias_field: Annotated[str, AfterValidator(_bias_field)] = "none"
    """``none``, ``n4``, or a program: ``tool {in} {out}``."""
    skull_strip: Annotated[str, AfterValidator(checked)] | None = None
    """A program, ``tool {in} {out}``, that leaves the brain and writes 0 elsewhere."""
    deadline_s: Seconds = 600.0
    """For each run of a program."""
    max_voxels: PositiveInt = MAX_VOXELS
    """Largest series."""
    least_nmi: Annotated[float, Field(ge=0, le=2)] = QualityBounds.least_nmi
    least_peak: Annotated[float, Field(ge=-1, le=1)] = QualityBounds.least_peak
    least_overlap: Annotated[float, Field(ge=0, le=1)] = QualityBounds.least_overlap
    least_covered: Annotated[float, Field(ge=0, le=1)] = QualityBounds.least_covered
    most_scaled: Annotated[float, Field(ge=1)] = QualityBounds.most_scaled
    most_turned: Annotated[float, Field(ge=0, le=180)] = QualityBounds.most_turned
    """From where on an image is held back; see docs/clinical.md, Quality."""
    series: dict[Modality, SeriesSettings] = Field(default_factory=dict)

    def bounds(self) -> QualityBounds:
        """For `quality.suspicious`."""
        return QualityBounds(
            self.least_nmi,
            self.least_peak,
            self.least_overlap,
            self.least_covered,
            self.most_scaled,
            self.most_turned,
        )

    def rule(self, modality: str) -> SeriesRule:
        """Which series shows a modality. Raises ConfigError: nothing says how it is recognised."""
        own = self.series.get(modality, SeriesSettings())
        rule = own.rule(modality)
        if modality not in RULES and not (rule.shows or rule.description):
            raise ConfigError(
                f"{modality}: no rule says which series shows it: write [prepare.series.{modality}] with "
                'description = "..."'
            )
        return rule


class PrepareHead(Settings):
    """`[prepare]` of `peer.toml`; the rest may be missing or wrong: images are prepared before a site joins."""

    model_config = ConfigDict(frozen=True, extra="ignore")
    PATHS: ClassVar[frozenset[str]] = frozenset({"prepare.ids"})

    prepare: PrepareSection = PrepareSection()

    @classmethod
    def load(cls, path: Path | None, overrides: Mapping[str, Any] | None = None) -> Self:
        """Read ``peer.toml``; without one, only `overrides` and the environment count. Raises ConfigError."""
        if path is None:
            return cls.of_table({}, Path("peer.toml"), overrides, os.environ)
        return cls.read(path, overrides, os.environ)

    @property
    def atlas(self) -> str:
        """The atlas; a file's name counts from the settings' folder."""
        said = self.prepare.atlas
        return said if said == MNI152 else str(self.source.absolute().parent / Path(said).expanduser())
