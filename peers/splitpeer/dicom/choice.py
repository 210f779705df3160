"""Which series of a patient is meant: by rules, never by a guess, and every series left out has its reason."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from splitpeer.data.geometry import edges
from splitpeer.data.rules import MAX_VOXELS
from splitpeer.dicom.contrasts import parameters, shown_by
from splitpeer.dicom.headers import DicomHeader
from splitpeer.dicom.rules import Prefer, SeriesRule
from splitpeer.dicom.stacks import SliceGrid, grid_of, stacks_of
from splitpeer.errors import DataError

_NOT_MAGNITUDE = frozenset({"P", "PHASE", "R", "REAL", "I", "IMAGINARY", "PHASE MAP"})
_PROJECTIONS = frozenset({"PROJECTION IMAGE", "MIP", "MNIP", "MPR", "CSA MPR", "SCREEN SAVE", "SUBTRACT"})


@dataclass(frozen=True)
class Candidate:
    """A stack that fits."""

    header: DicomHeader
    grid: SliceGrid

    @property
    def voxel_mm3(self) -> float:
        """Volume of a voxel."""
        return float(np.prod(edges(self.grid.affine)))


@dataclass(frozen=True)
class LeftOutSeries:
    """A series, or a stack of one, that was not taken."""

    series: str
    text: str
    """What it is and why it was not taken; names no patient."""


@dataclass(frozen=True)
class Choice:
    """What is taken of one patient."""

    taken: Candidate | None
    why: str
    """Why this one; or, where none is taken, why not, and what to do."""
    left_out: tuple[LeftOutSeries, ...]


def by_patient(headers: Iterable[DicomHeader]) -> tuple[dict[str, list[DicomHeader]], list[str]]:
    """Files by the hospital's id of the patient, and a line for each study that names several, whose files are none.

    A study is of one patient: where its files disagree, some carry a wrong id, and nobody here can tell which.
    """
    named: dict[str, set[str]] = defaultdict(set)
    every = list(headers)
    for header in every:
        named[header.study or header.series].add(header.patient)
    mixed = {study for study, patients in named.items() if len(patients) > 1}
    out: dict[str, list[DicomHeader]] = defaultdict(list)
    for header in every:
        if (header.study or header.series) not in mixed:
            out[header.patient].append(header)
    lines = [
        f"a study of {len(named[study])} patient ids ({', '.join(sorted(map(repr, named[study])))}): nothing of it is "
        "used: correct the ids in the PACS and export it again"
        for study in sorted(mixed)
    ]
    return dict(out), lines


def choose(
    headers: Sequence[DicomHeader], modality: str, rule: SeriesRule, max_voxels: int = MAX_VOXELS
) -> Choice:
    """The series of one patient that shows `modality`. Reads no voxels."""
    series: dict[str, list[DicomHeader]] = defaultdict(list)
    for header in headers:
        series[header.series or header.path].append(header)
    candidates: list[Candidate] = []
    left_out: list[LeftOutSeries] = []
    # What is the image asked for, but for a fault in it: nearer to the patient's problem than an unrelated series.
    faults: list[str] = []
    for files in series.values():
        for stack in stacks_of(files):
            first = stack.first
            name = _named(first, len(stack.slices))
            if reason := _unfit(first, len(stack.slices), modality, rule):
                left_out.append(LeftOutSeries(first.series, f"{name}: {reason}"))
                continue
            try:
                if reason := _damage([header for header, _ in stack.slices]):
                    raise DataError(reason)
                candidates.append(Candidate(first, grid_of(stack, max_voxels)))
            except DataError as error:
                faults.append(f"{name}: {error}")
                left_out.append(LeftOutSeries(first.series, f"{name}: {error}"))
    return _decided(candidates, faults, left_out, modality, rule)


# --- inside ------------------------------------------------------------------------------------------------


def _decided(
    candidates: list[Candidate],
    faults: list[str],
    left_out: list[LeftOutSeries],
    modality: str,
    rule: SeriesRule,
) -> Choice:
    if not candidates:
        if faults:
            return Choice(None, "; ".join(faults), tuple(left_out))
        seen = "; ".join(one.text for one in left_out[:3]) or "no series"
        return Choice(None, f"no series shows {modality} ({seen}): {_how(modality)}", tuple(left_out))
    if len(candidates) > 1 and rule.prefer == "only":
        names = " and ".join(_named(one.header, one.grid.shape[2]) for one in candidates)
        text = f"{len(candidates)} series show {modality}: {names}: {_how(modality)}"
        return Choice(None, text, tuple(left_out))
    first, *others = sorted(candidates, key=_ORDERS[rule.prefer])
    why = f"the {rule.prefer} of {len(candidates)} that fit" if others else "the only one that fits"
    for one in others:
        text = f"{_named(one.header, one.grid.shape[2])}: not {why}"
        left_out.append(LeftOutSeries(one.header.series, text))
    return Choice(first, f"{_named(first.header, first.grid.shape[2])}: {why}", tuple(left_out))


_ORDERS: Mapping[Prefer, Callable[[Candidate], tuple[float, ...]]] = {
    "only": lambda one: (),
    "newest": lambda one: (-_digits(one.header.when), -one.header.number),
    "oldest": lambda one: (_digits(one.header.when), one.header.number),
    "finest": lambda one: (one.voxel_mm3,),
}


def _digits(when: str) -> float:
    """Date and time as one number, 14 digits."""
    return float(when.ljust(14, "0")[:14]) if when.isdigit() else 0.0


def _how(modality: str) -> str:
    return f"say which in [prepare.series.{modality}] (description, but, prefer)"


def _named(header: DicomHeader, slices: int) -> str:
    return f"series {header.number} {header.description!r} ({slices} slices)"


def _unfit(header: DicomHeader, slices: int, modality: str, rule: SeriesRule) -> str:
    """Why a stack is not the image asked for; empty: it is."""
    kinds = set(header.kind)
    if header.modality != rule.dicom_modality:
        return f"modality {header.modality or '(none)'}, not {rule.dicom_modality}"
    if "LOCALIZER" in kinds or slices < rule.min_slices:
        return "a localizer" if "LOCALIZER" in kinds else f"fewer than {rule.min_slices} slices: a localizer?"
    if header.colour:
        return "a picture in colour or inverted, not grey values"
    # Some archive nothing but reformatted volumes: a rule that names them may have them.
    if found := sorted(kinds & (_NOT_MAGNITUDE if rule.description else _NOT_MAGNITUDE | _PROJECTIONS)):
        return f"{found[0]} image, not one that was measured"
    if rule.description or rule.but:
        if rule.description and not re.search(rule.description, header.description, re.IGNORECASE):
            return f"its description does not match {rule.description!r}"
        if rule.but and re.search(rule.but, header.description, re.IGNORECASE):
            return f"its description matches {rule.but!r}"
    if rule.shows and not rule.description:
        return _shows_another(header, modality, rule)
    return _agent_differs(header, rule)


def _shows_another(header: DicomHeader, modality: str, rule: SeriesRule) -> str:
    shown = shown_by(header)
    if shown.other:
        return f"{shown.other!r} in its description"
    if shown.contradiction and rule.shows in (shown.physics, shown.words):
        return (
            f"not what its description says: {shown.words} by name, {shown.physics} by its parameters "
            f"({parameters(header)}): {_how(modality)}"
        )
    seen = shown.physics or shown.words
    if not seen:
        return f"neither its description nor its parameters tell what it shows ({parameters(header)})"
    if seen != rule.shows:
        return f"shows {seen}"
    return _agent_differs(header, rule)


def _agent_differs(header: DicomHeader, rule: SeriesRule) -> str:
    if rule.agent == "any":
        return ""
    shown = shown_by(header)
    if shown.agent_conflict:
        return f"not what its description says: the header names a contrast agent ({header.agent})"
    if bool(shown.agent) != (rule.agent == "with"):
        return "after a contrast agent" if shown.agent else "no contrast agent is named"
    return ""


def _damage(headers: Sequence[DicomHeader]) -> str:
    """What makes the files of a series useless; empty: nothing that headers show."""
    short = sorted({header.path for header in headers if header.short})
    if short:
        return f"{len(short)} of its files end early (the first is {short[0]}): copy or export them again"
    if not headers[0].decodable:
        return (
            f"packed as {_syntax(headers[0].syntax)}, which this installation cannot decode: export it uncompressed "
            "(Explicit VR Little Endian), or pip install pylibjpeg pylibjpeg-libjpeg pylibjpeg-openjpeg"
        )
    return ""


def _syntax(uid: str) -> str:
    from pydicom.uid import UID

    return UID(uid).name.partition(",")[0]
