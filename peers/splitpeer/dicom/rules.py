"""Which series show a modality: the rules, as settings have them. Needs no DICOM library."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

FEWEST_SLICES = 12
"""A series with fewer is a localizer, whatever it is called."""

Prefer = Literal["only", "newest", "oldest", "finest"]


@dataclass(frozen=True)
class SeriesRule:
    """Which series show a modality."""

    shows: str = ""
    """t1, t2, flair or pd, as parameters and description tell it; empty: they are not asked."""
    agent: Literal["with", "without", "any"] = "any"
    """Contrast agent."""
    dicom_modality: str = "MR"
    description: str = ""
    """Regular expression that the description must hold, case ignored. Its author is believed: the description
    is then not held against the parameters."""
    but: str = ""
    """The same that it must not hold."""
    prefer: Prefer = "only"
    """Of several that fit: none (only), the newest, the oldest, or the one with the smallest voxels."""
    min_slices: int = FEWEST_SLICES


RULES: Mapping[str, SeriesRule] = {
    "t1": SeriesRule("t1", "without"),
    "t1ce": SeriesRule("t1", "with"),
    "t2": SeriesRule("t2"),
    "flair": SeriesRule("flair"),
    "pd": SeriesRule("pd", "without"),
    "ct": SeriesRule(dicom_modality="CT"),
    "pet": SeriesRule(dicom_modality="PT"),
}
"""For modalities without a rule of their own; others need one."""
