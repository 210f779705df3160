"""The layouts: where a patient's file of a modality is, and what each layout takes from a folder."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from splitpeer.data import pattern, trees
from splitpeer.data.files import (
    Case,  # its other names
    Found,
    below,
    examples,
    summary,
)
from splitpeer.data.listing import CHOOSE, Listing
from splitpeer.data.modalities import MASK, USUAL, canonical_modality, kind_of
from splitpeer.data.msd import DESCRIPTION, msd
from splitpeer.data.patient_list import read_list
from splitpeer.errors import DataError

LAYOUTS: dict[str, Callable[[Path, str], Listing]] = {
    "folder": trees.folder,
    "patient-folders": trees.patient_folders,
    "bids": trees.bids,
    "brats": trees.brats,
    "msd": msd,
    "csv": read_list,
}
"""A layout lists the files of a folder (of a list, for "csv"), given the kind that is looked for, which may be ''."""

_TIME_POINT = re.compile(r"(?P<subject>BraTS-[A-Za-z]+-\d{5})-\d{3}|(?P<bids>sub-[^_]+)_ses-[^_]+")


def checked_layout(layout: str) -> str:
    """A layout's name, or a pattern such as `{patient}/T1*.nii.gz`. Raises DataError for anything else."""
    if layout in LAYOUTS:
        return layout
    if pattern.is_pattern(layout):
        return pattern.checked(layout)
    raise DataError(f"unknown layout {layout!r}: name one of {', '.join(LAYOUTS)}, or write a pattern")


def listing(root: Path | str, layout: str, wanted: str = "") -> Listing:
    """All files of `root` by kind. Raises DataError where there is no such folder or layout, or no list."""
    root = _root(root, layout)
    if pattern.is_pattern(layout):
        return pattern.listed(root, layout)
    return LAYOUTS[layout](root, wanted)


def look(root: Path | str, layout: str, modality: str | None, used: Collection[Path] = ()) -> Found:
    """The cases under `root` that have `modality` (None: the masks), files left out that are not `used`, and problems.

    Raises:
        DataError: there is none, or the folder does not follow the layout.
    """
    wanted = MASK if modality is None else canonical_modality(modality)
    listed = listing(root, layout, wanted)
    found = _but(listed.pick(wanted), used)
    if not found.cases and not found.problems:
        what = wanted if listed.modalities() or layout in ("brats", "bids", "patient-folders") else "NIfTI"
        others = f" ({'; '.join(summary(found.left_out, listed.root)[:2])})" if found.left_out else ""
        raise DataError(
            f"{root}: no {what} file (.nii or .nii.gz) found{others}: check the path and the layout"
        )
    return found


def find(root: Path | str, layout: str, modality: str | None) -> Found:
    """The same for work that depends on it. Raises DataError also where a problem was found."""
    found = look(root, layout, modality)
    if found.problems:
        first, *others = found.problems
        more = f" ({len(others)} more: splitpeer data check lists them)" if others else ""
        raise DataError(first + more)
    return found


def find_all(root: Path | str, layout: str, modalities: Sequence[str]) -> dict[str, Found]:
    """`find` for each of several modalities. Raises DataError also where one file would be two of them."""
    found = {modality: find(root, layout, modality) for modality in modalities}
    owners: dict[tuple[Path, int | None], str] = {}
    for modality, kind in found.items():
        for case in kind.cases:
            if (first := owners.setdefault((case.path, case.channel), modality)) != modality:
                raise DataError(
                    f"{case.path}: its name does not say whether it is {first} or {modality}: choose a layout that "
                    "does, or write a list (layout 'csv') with the column modality"
                )
    return without_taken(found)


def without_taken(found: Mapping[str, Found]) -> dict[str, Found]:
    """The same without files and folders that one kind left out and another took: nobody has to look at them."""
    used = taken(found)
    return {kind: _but(one, used) for kind, one in found.items()}


def taken(found: Mapping[str, Found]) -> set[Path]:
    """The files of all cases, and the folders that they are in."""
    return {path for one in found.values() for case in one.cases for path in (case.path, *case.path.parents)}


def _but(found: Found, used: Collection[Path]) -> Found:
    """Without what was left out and used elsewhere; one of several files of a patient stays, since it is a choice."""
    return replace(
        found,
        left_out=tuple(one for one in found.left_out if one.path not in used or one.reason.endswith(CHOOSE)),
    )


def find_images(root: Path | str, layout: str, modality: str) -> list[Case]:
    """The cases under `root` that have `modality`, sorted by patient. Raises DataError: see `find`."""
    return list(find(root, layout, modality).cases)


def find_labels(root: Path | str, layout: str) -> list[Case]:
    """The masks under `root`, sorted by patient. Raises DataError: see `find`."""
    return list(find(root, layout, None).cases)


def detect_layout(root: Path | str) -> str:
    """The layout of `root` where only one fits. Raises DataError where two fit or none."""
    if Path(root).name.lower().endswith(".csv") and Path(root).is_file():
        return "csv"
    root = _root(root, "folder")
    if (root / DESCRIPTION).is_file():
        return "msd"
    volumes, left_out = below(root)
    flat = [path for path in volumes if path.parent == root]
    nested = [path for path in volumes if path.parent != root]
    if not volumes:
        others = f" ({'; '.join(summary(left_out, root)[:2])})" if left_out else ""
        raise DataError(f"{root}: no .nii or .nii.gz file here or below{others}: check the path")
    if flat and nested:
        raise DataError(
            f"{root}: NIfTI files both here ({examples(path.name for path in flat)}) and in folders below: "
            f"name the layout or tidy up"
        )
    if flat and any(trees.split_brats(path) for path in flat):
        raise DataError(
            f"{root}: could be layout 'brats' (names patient_modality) or 'folder' (names patient): say which"
        )
    return _nested(root, nested) if nested else "folder"


def _nested(root: Path, volumes: list[Path]) -> str:
    """The layout of a tree without files at its top."""
    tops = {path.relative_to(root).parts[0] for path in volumes} - {"derivatives", "sourcedata"}
    if any(path.parent.name == "anat" for path in volumes) and all(top.startswith("sub-") for top in tops):
        return "bids"
    usual = {kind_of(top) for top in tops} <= {*USUAL, MASK}
    if usual and all(path.parent.parent == root for path in volumes):
        return "folder"
    return "brats" if any(trees.split_brats(path) for path in volumes) else "patient-folders"


def subject(patient: str) -> str:
    """The person behind a patient id: BraTS 2023's `BraTS-GLI-00005-001` is a time point of
    `BraTS-GLI-00005`, `sub-01_ses-2` of BIDS one of `sub-01`.

    Splits must not put two time points of one person on two sides; other ids are returned as they are.
    """
    match = _TIME_POINT.fullmatch(patient)
    return match["subject"] or match["bids"] if match else patient


def _root(root: Path | str, layout: str) -> Path:
    root = Path(root)
    if checked_layout(layout) == "csv":
        if not root.is_file():
            raise DataError(
                f"{root}: layout 'csv' needs a file with the columns patient,path: check the path"
            )
    elif not root.is_dir():
        raise DataError(f"{root}: no such folder: check the path")
    return root
