"""What a region is called in a PACS: coded concepts of DICOM (PS3.16, CID 7150 and 7151).

The preset has codes of its own, a hospital may give its own in `peer.toml`; a region of neither is "Lesion" where its
name says so, and else "Tissue", which claims nothing. The region's name and title are its label in any case.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from splitpeer.data.task import Region, Task

WRITTEN = re.compile(r"([A-Za-z0-9_-]{1,16}):([A-Za-z0-9._-]{1,16}):(\S(?:.{0,62}\S)?)")
"""Scheme, value and meaning as they are written in settings; lengths are those of DICOM's SH and LO."""


@dataclass(frozen=True)
class Concept:
    """One coded concept: ``SCT:108369006:Neoplasm``."""

    scheme: str
    value: str
    meaning: str

    @classmethod
    def parse(cls, written: str) -> Concept:
        """Raises ValueError, one line, for text of another form."""
        if (found := WRITTEN.fullmatch(written.strip())) is None:
            raise ValueError(
                f"{written[:60]!r} is no code: write scheme:value:meaning, as SCT:108369006:Neoplasm"
            )
        return cls(*found.groups())

    def __str__(self) -> str:
        return f"{self.scheme}:{self.value}:{self.meaning}"


ABNORMAL = Concept("SCT", "49755003", "Morphologically Abnormal Structure")
TISSUE = Concept("SCT", "85756007", "Tissue")
LESION = Concept("SCT", "52988006", "Lesion")
NEOPLASM = Concept("SCT", "108369006", "Neoplasm")
EDEMA = Concept("SCT", "79654002", "Edema")
NECROSIS = Concept("SCT", "6574001", "Necrosis")
ENHANCING = Concept("NCIt", "C113842", "Enhancing Lesion")
BRAIN_LESION = Concept("SCT", "301766008", "Lesion of Brain")


@dataclass(frozen=True)
class RegionCode:
    """The two concepts of a segment."""

    type: Concept
    """What it is (CID 7151)."""
    category: Concept = ABNORMAL
    """What kind of thing that is (CID 7150)."""


GLIOMA = {
    "WT": RegionCode(BRAIN_LESION),  # the tumour and the edema around it
    "TC": RegionCode(NEOPLASM),
    "ET": RegionCode(ENHANCING),
}
_WORDS = (
    (re.compile(r"o?edema"), RegionCode(EDEMA)),
    (re.compile(r"necro"), RegionCode(NECROSIS)),
    (re.compile(r"non-?_?enhanc"), RegionCode(LESION)),
    (re.compile(r"enhanc"), RegionCode(ENHANCING)),
    (re.compile(r"tumou?r|neoplasm|cancer|metasta"), RegionCode(NEOPLASM)),
    (re.compile(r"lesion"), RegionCode(LESION)),
)
_UNKNOWN = RegionCode(TISSUE, TISSUE)


def code_of(task: Task, region: Region, own: Mapping[str, RegionCode] | None = None) -> RegionCode:
    """The code of a region: the hospital's own, the preset's, or what its name says."""
    if own and region.name in own:
        return own[region.name]
    if task.convention and region.name in GLIOMA:
        return GLIOMA[region.name]
    text = f"{region.name} {region.title}".lower()
    return next((code for word, code in _WORDS if word.search(text)), _UNKNOWN)
