"""Modalities: free names, and known spellings of the usual ones."""

from __future__ import annotations

import re

from splitpeer.errors import DataError

MODALITIES = ("flair", "t1", "t1ce", "t2")
"""The four contrasts of a brain tumour: BraTS, MSD Task01 and the phantom have them."""
ALIASES = {
    "flair": ("flair", "t2f", "t2flair", "t2-flair", "t2_flair"),
    "t1": ("t1", "t1w", "t1n", "t1-native"),
    "t1ce": ("t1ce", "t1c", "t1gd", "t1-gd", "t1+c", "t1-ce", "t1post"),
    "t2": ("t2", "t2w"),
}
CANONICAL = {alias: name for name, aliases in ALIASES.items() for alias in aliases}
USUAL = (*CANONICAL, "adc", "ct", "dwi", "pd", "pet", "swi")
"""Spellings understood in names of files and folders when no modality was asked for."""

MASK = "seg"
"""The kind of a mask."""
MASK_NAMES = ("seg", "mask", "label", "labels", "segmentation", "dseg")
ANY = ""
"""The kind of a patient's only file: it fits whatever is looked for."""

_NAME = re.compile(r"[a-z0-9][a-z0-9+._-]{0,31}")


def canonical_modality(name: str) -> str:
    """The one name of a modality: in lower case, and `t1ce` for T1Gd, `flair` for T2F and so on.

    SP-11.12-12: any name of up to 32 letters, digits and `+ . _ -` is one. Raises DataError for others, and for what
    masks are called.
    """
    plain = name.strip().lower()
    if not _NAME.fullmatch(plain):
        raise DataError(
            f"{name!r} is not a valid name of a modality: "
            "write 1 to 32 letters, digits, '+', '.', '_' or '-', such as adc"
        )
    if plain in MASK_NAMES:
        raise DataError(f"{name!r} is what masks are called: give the modality another name")
    return CANONICAL.get(plain, plain)


def kind_of(word: str) -> str | None:
    """`MASK`, or the modality that `word` names; None where it cannot name one."""
    if word.strip().lower() in MASK_NAMES:
        return MASK
    try:
        return canonical_modality(word)
    except DataError:
        return None
