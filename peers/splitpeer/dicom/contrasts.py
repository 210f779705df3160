"""What a series shows, by its parameters and by its description: two witnesses who must not contradict each other.

Parameters are physics, in milliseconds; a description is what somebody typed, or a protocol that was copied.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from splitpeer.dicom.headers import DicomHeader

SHORT_ECHO, LONG_ECHO = 18.0, 60.0
"""Below the first, T2 hardly counts; from the second on it decides. In between lie susceptibility images and others."""
SHORT_REPETITION, LONG_REPETITION = 1300.0, 1500.0
"""Below the first a spin echo shows T1; T2 wants at least the second."""
PREPARED_T1 = (300.0, 1300.0)
"""Inversion times of MPRAGE and its like."""
FLUID_INVERSION = 1500.0
"""From here on an inversion suppresses fluid."""

_FLAIR = re.compile(r"flair|dark.?fluid|\btirm\b", re.IGNORECASE)
_T1 = re.compile(r"(?<![a-z0-9])t1|mp-?rage|bravo|\btfl|f?spgr|\bvibe\b|\bmp2rage", re.IGNORECASE)
_T2 = re.compile(r"(?<![a-z0-9])t2(?![a-z]*\*|star)", re.IGNORECASE)
_OTHER = re.compile(
    r"\bswi\b|swan|\bdwi\b|diff|\badc\b|trace|perf|\bdsc\b|\bdce\b|\basl\b|\btof\b|angio|\bmra\b|\bmip\b|bold|fmri|"
    r"field.?map|scout|locali[sz]er|survey|t2\W*(?:\*|star)|hemo|phase|calib|shim|spectro|\bmpr\b",
    re.IGNORECASE,
)
_WITH = re.compile(
    r"post|\bgad|\bgd\b|[+]\s*(?:c|gd|km)\b|\bc\s*[+]|contrast|kontrast|\bkm\b|\bce\b|gadov|dotarem",
    re.IGNORECASE,
)
_WITHOUT = re.compile(
    r"\bpre\b|nativ|without|ohne|non.?contrast|unenhanced|[-]\s*c\b|no\s+contrast", re.IGNORECASE
)


@dataclass(frozen=True)
class ShownContrast:
    """What a series shows: "t1", "t2", "flair", "pd"; empty: cannot be told."""

    physics: str
    words: str
    other: str
    """The word in the description that says it is something else altogether."""
    agent: bool | None
    """With a contrast agent or without; None: neither header nor description says."""
    agent_conflict: bool
    """The header names an agent, and the description says without."""

    @property
    def contradiction(self) -> bool:
        """The parameters show something else than the description says."""
        return bool(self.physics and self.words and self.physics != self.words)


def shown_by(header: DicomHeader) -> ShownContrast:
    """What both witnesses say of a series."""
    said = header.description.replace("_", " ")
    other = _OTHER.search(said)
    without = _WITHOUT.search(said)
    # Taken away first: "non-contrast" holds "contrast".
    with_agent = _WITH.search(_WITHOUT.sub(" ", said))
    named = bool(header.agent)
    agent = True if named or (with_agent and not without) else False if without else None
    return ShownContrast(
        _by_physics(header), _by_words(said), other[0] if other else "", agent, named and bool(without)
    )


def parameters(header: DicomHeader) -> str:
    """Its times in words, such as "TE 2.9, TR 1900, TI 900 ms"."""
    times = (("TE", header.echo_ms), ("TR", header.repetition_ms), ("TI", header.inversion_ms))
    said = ", ".join(f"{name} {value:g}" for name, value in times if value)
    return f"{said} ms" if said else "no times in its header"


def _by_words(said: str) -> str:
    if _FLAIR.search(said):
        return "" if _T1.search(said) else "flair"  # T1 FLAIR is a T1 image by any name
    found = [name for name, words in (("t1", _T1), ("t2", _T2)) if words.search(said)]
    return found[0] if len(found) == 1 else ""


def _by_physics(header: DicomHeader) -> str:
    echo, repetition, inversion = header.echo_ms, header.repetition_ms, header.inversion_ms or 0.0
    if header.modality != "MR" or not echo or not repetition:
        return ""
    if echo >= LONG_ECHO:
        if inversion >= FLUID_INVERSION:
            return "flair"
        return "t2" if repetition >= LONG_REPETITION and not inversion else ""
    if echo > SHORT_ECHO:
        return ""
    low, high = PREPARED_T1
    if low <= inversion <= high or (not inversion and repetition <= SHORT_REPETITION):
        return "t1"
    return "pd" if not inversion and repetition >= LONG_REPETITION else ""
