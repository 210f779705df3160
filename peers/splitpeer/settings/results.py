"""``[results]`` of ``peer.toml``: how segmentations are written at this hospital."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field, PlainSerializer, StringConstraints

from splitpeer.data.task import NAME
from splitpeer.results.codes import ABNORMAL, Concept, RegionCode
from splitpeer.settings.loading import Section


def _code(value: Any) -> Any:
    """A type alone, or a table of type and category."""
    if isinstance(value, RegionCode):
        return value
    if isinstance(value, str):
        return RegionCode(Concept.parse(value))
    if not isinstance(value, dict) or not {"type"} <= set(value) <= {"type", "category"}:
        raise ValueError('write "SCT:10200004:Liver", or { type = "...", category = "..." }')
    if strange := [one for one in value.values() if not isinstance(one, str)]:
        raise ValueError(f"{strange[0]!r} is no code: write scheme:value:meaning, as SCT:108369006:Neoplasm")
    category = Concept.parse(value["category"]) if "category" in value else ABNORMAL
    return RegionCode(Concept.parse(value["type"]), category)


def _as_written(code: RegionCode) -> str | dict[str, str]:
    if code.category == ABNORMAL:
        return str(code.type)
    return {"type": str(code.type), "category": str(code.category)}


Code = Annotated[RegionCode, BeforeValidator(_code), PlainSerializer(_as_written)]
RegionName = Annotated[str, StringConstraints(pattern=f"^{NAME.pattern}$")]


class ResultsSection(Section):
    """What is made of segmentations that this hospital asked for."""

    codes: dict[RegionName, Code] = Field(default_factory=dict)
    """Region to what a PACS calls it, for DICOM SEG; others have a default (`results.codes`)."""
