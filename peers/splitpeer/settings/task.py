"""``[task]`` of ``job.toml``: what is segmented, and how images are normalised."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, StrictInt, model_validator

from splitpeer.data.modalities import canonical_modality
from splitpeer.data.normalisation import DEFAULT, Normaliser
from splitpeer.data.task import MAX_VALUE, Region, Task, glioma
from splitpeer.errors import ConfigError, DataError
from splitpeer.settings.loading import Section

CONVENTION_OF_TASK = "task"
"""``[data] convention`` of masks that hold the task's own values."""


def _rule(value: str) -> str:
    return str(Normaliser.parse(value))


def _by_modality(value: dict[str, str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for written, rule in value.items():
        try:
            modality = canonical_modality(written)
        except DataError as error:
            raise ValueError(str(error)) from None
        if modality in found:
            raise ValueError(f"{modality} is named twice")
        found[modality] = rule
    return found


Rule = Annotated[str, AfterValidator(_rule)]
MaskValue = Annotated[StrictInt, Field(ge=1, le=MAX_VALUE)]


class TaskSection(Section):
    """What the network learns to find in the images."""

    preset: Literal["glioma"] | None = None
    """``glioma``: WT, TC and ET, with masks of the convention that peer.toml names; without `values`, the default."""
    values: dict[str, MaskValue] = Field(default_factory=dict)
    """Mask values by name; 0 is the background."""
    regions: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    """Name to the values that make it up; without them, each value is a region."""
    exclusive: bool = False
    """Whether a voxel belongs to one region at most (softmax), or to any number of them (sigmoid)."""
    normalisation: Annotated[dict[str, Rule], AfterValidator(_by_modality)] = Field(default_factory=dict)
    """Modality to ``zscore-nonzero`` (of those that are not named), ``zscore``, ``percentile:0.5,99.5``,
    ``window:-100,300`` or ``none``."""

    @model_validator(mode="before")
    @classmethod
    def _glioma_by_default(cls, raw: Any) -> Any:
        if not isinstance(raw, dict):
            return raw
        for key in ("values", "regions", "normalisation"):
            if not isinstance(raw.get(key, {}), dict):
                raise ValueError(f"{key} is a table: write {key} = {{ name = ... }}")
        if not any(key in raw for key in ("preset", "values", "regions", "exclusive")):
            return {**raw, "preset": "glioma"}
        return raw

    @model_validator(mode="after")
    def _makes_a_task(self) -> Self:
        if self.preset is None:
            if not self.values:
                raise ValueError('values are missing: add values = { lesion = 1 }, or preset = "glioma"')
            self._own()
        elif self.values or self.regions or self.exclusive:
            raise ValueError(
                f"preset {self.preset} says what is segmented: remove it, or values, regions and exclusive"
            )
        return self

    def rule(self, modality: str) -> Normaliser:
        """How images of `modality` are normalised."""
        written = self.normalisation.get(modality)
        return DEFAULT if written is None else Normaliser.parse(written)

    def task(self, convention: str | None) -> Task:
        """The meaning of masks that follow `convention`: one of a glioma's, or "task".

        Raises:
            ConfigError: the two do not go together.
        """
        if self.preset is None:
            if convention != CONVENTION_OF_TASK:
                raise ConfigError(
                    f"[data] convention is {convention!r}, which is one of glioma masks, but [task] of the job names "
                    f'values of its own: write convention = "{CONVENTION_OF_TASK}"'
                )
            return self._own()
        if convention is None or convention == CONVENTION_OF_TASK:
            raise ConfigError(
                f"[task] of the job is {self.preset}, whose masks follow a convention: "
                'write [data] convention = "msd" or "brats" or ...'
            )
        return glioma(convention)

    def _own(self) -> Task:
        for region, names in self.regions.items():
            if strange := [name for name in names if name not in self.values]:
                raise ValueError(f"region {region} holds {strange[0]!r}, which is not one of values")
        if len(set(self.values.values())) < len(self.values):
            raise ValueError("two names have the same value: name each value once")
        regions = self.regions or {name: (name,) for name in self.values}
        return Task(
            names={value: name for name, value in self.values.items()},
            regions=tuple(
                Region(name, tuple(self.values[value] for value in held)) for name, held in regions.items()
            ),
            exclusive=self.exclusive,
        )
