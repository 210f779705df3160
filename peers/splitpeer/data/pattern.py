"""Layout by a pattern, such as `{patient}/T1*.nii.gz`: where a patient's file is, as its owner writes it."""

from __future__ import annotations

import re
from pathlib import Path

from splitpeer.data.files import below, examples
from splitpeer.data.listing import CHOOSE, Listing
from splitpeer.data.modalities import ANY, kind_of
from splitpeer.errors import DataError

PATIENT, MODALITY = "{patient}", "{modality}"
_PARTS = re.compile(r"(\{patient\}|\{modality\}|\*\*/|\*|\?)")


def is_pattern(layout: str) -> bool:
    """Whether a layout is written as a pattern rather than named."""
    return any(mark in layout for mark in "{}*?/")


def checked(written: str) -> str:
    """`written`, if it is a pattern. Raises DataError with what is wrong with it.

    `{patient}` stands for the id, `{modality}` for what the file shows (letters and digits), `*` and `?` for anything
    within a name, `**/` for any folders. Case counts, as it does in names of files.
    """
    problem = ""
    if PATIENT not in written:
        problem = f"does not say where the id is: write {PATIENT} in its place"
    elif rest := re.search(r"[{}][^{}]*\}?", written.replace(PATIENT, "").replace(MODALITY, "")):
        problem = f"holds {rest[0]}: only {PATIENT} and {MODALITY} are known"
    elif written.startswith("/") or ".." in written.split("/") or "\\" in written:
        problem = "must be relative to the folder and stay below it: write folders with /, without .."
    elif "}{" in written:
        problem = "does not say where the id ends: write something between {patient} and {modality}"
    elif not written.endswith((".nii", ".nii.gz", "*")):
        problem = "names no NIfTI file: let it end in .nii.gz or .nii"
    if problem:
        raise DataError(f"pattern {written!r} {problem}")
    return written


def listed(root: Path, written: str) -> Listing:
    """The files below `root` that match. A name that can be read in two ways is left out."""
    greedy, lazy = _compiled(checked(written), ""), _compiled(written, "?")
    volumes, left_out = below(root)
    listing = Listing(root, left_out)
    for path in volumes:
        name = path.relative_to(root).as_posix()
        long, short = greedy.fullmatch(name), lazy.fullmatch(name)
        if long is None or short is None:
            listing.leave(path, f"does not match {written!r}")
        elif long.groupdict() != short.groupdict():
            ids = examples(sorted({repr(long["patient"]), repr(short["patient"])}))
            listing.leave(path, f"{written!r} can be read in two ways here ({ids}): {CHOOSE}")
        elif MODALITY not in written:
            listing.add(ANY, long["patient"], path)
        elif kind := kind_of(long["modality"]):
            listing.add(kind, long["patient"], path)
        else:
            listing.leave(path, f"{long['modality']!r} is not a valid name of a modality")
    return listing


def _compiled(written: str, lazy: str) -> re.Pattern[str]:
    """The pattern as an expression whose wild parts take as much as they can or, `lazy` = "?", as little."""
    known = {
        PATIENT: rf"(?P<patient>[^/]+{lazy})",
        MODALITY: r"(?P<modality>[A-Za-z0-9]+)",
        "**/": rf"(?:[^/]+/)*{lazy}",
        "*": rf"[^/]*{lazy}",
        "?": "[^/]",
    }
    out = ""
    for part in _PARTS.split(written):
        again = part in (PATIENT, MODALITY) and f"(?P<{part[1:-1]}>" in out
        out += f"(?P={part[1:-1]})" if again else known.get(part, re.escape(part))
    return re.compile(out)
