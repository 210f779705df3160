"""Trees of folders: BraTS, BIDS, one folder per patient. Each file gets a patient and a kind, or is left out."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from splitpeer.data.files import Case, Found, LeftOut, below, stem
from splitpeer.data.patients import patient_id
from splitpeer.errors import DataError

MODALITIES = ("flair", "t1", "t1ce", "t2")
"""Canonical names: these and no others appear on the wire."""
ALIASES = {
    "flair": ("flair", "t2f", "t2flair", "t2-flair", "t2_flair"),
    "t1": ("t1", "t1w", "t1n", "t1-native"),
    "t1ce": ("t1ce", "t1c", "t1gd", "t1-gd", "t1+c", "t1-ce", "t1post"),
    "t2": ("t2", "t2w"),
}
CANONICAL = {alias: name for name, aliases in ALIASES.items() for alias in aliases}

MASK = "seg"
"""The kind of a mask."""
ANY = ""
"""The kind of a patient's only file: whatever is looked for."""
_MASK_NAMES = ("seg", "mask", "label", "labels", "segmentation", "dseg")

# BraTS 2020's mask of case 355 kept the name of its source; the patient is the name of its folder.
_ODD_MASKS = ("W39_1998.09.19_Segm",)
_BRATS_NAME = re.compile(r"(?P<patient>.+)[-_](?P<kind>[A-Za-z0-9]+)")
_BIDS_NAME = re.compile(
    r"(?P<patient>sub-[^_]+(?:_ses-[^_]+)?)(?P<entities>(?:_[a-zA-Z]+-[^_]+)*)_(?P<suffix>[A-Za-z0-9]+)"
)
_BIDS_KINDS = {"T1w": "t1", "T2w": "t2", "FLAIR": "flair", "dseg": MASK}


@dataclass
class Tree:
    """The files of a tree by kind: a canonical modality, `MASK` or `ANY`."""

    root: Path
    kinds: list[tuple[str, Case]] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)

    def add(self, kind: str, name: str, path: Path) -> None:
        """Take `path` for the `kind` of the patient called `name`."""
        try:
            self.kinds.append((kind, Case(patient_id(name), path)))
        except DataError as error:
            self.left_out.append(LeftOut(path, str(error)))

    def pick(self, wanted: str) -> Found:
        """The cases of one kind. A patient with two files of it is left out: which one is meant, nobody said."""
        cases = sorted(case for kind, case in self.kinds if kind in (wanted, ANY))
        counts = Counter(case.patient for case in cases)
        left_out = list(self.left_out)
        for case in cases:
            if counts[case.patient] > 1:
                what = "masks" if wanted == MASK else f"{wanted} images"
                reason = f"one of several {what} of a patient: choose one in a list (layout 'csv')"
                left_out.append(LeftOut(case.path, reason))
        lacking = {case.patient for _, case in self.kinds if case.patient not in counts}
        return Found(
            tuple(case for case in cases if counts[case.patient] == 1),
            tuple(sorted(left_out)),
            tuple(sorted(lacking)),
        )


def split_brats(path: Path) -> tuple[str, str] | None:
    """Patient id and kind of a BraTS file name; None where it ends in neither a modality nor `seg`."""
    name = stem(path)
    if name in _ODD_MASKS:
        return path.parent.name, MASK
    match = _BRATS_NAME.fullmatch(name)
    kind = match["kind"].lower() if match else ""
    if match is None or (kind != MASK and kind not in CANONICAL):
        return None
    return match["patient"], CANONICAL.get(kind, kind)


def brats(root: Path) -> Tree:
    """`PATIENT/PATIENT_<modality>.nii.gz` and `_seg`, below HGG and LGG folders or not.

    Raises:
        DataError: one patient lies in two folders.
    """
    volumes, left_out = below(root)
    tree = Tree(root, left_out=left_out)
    for path in volumes:
        if split := split_brats(path):
            tree.add(split[1], split[0], path)
        else:
            tree.left_out.append(LeftOut(path, "its name ends in neither a modality nor 'seg'"))
    for (kind, one), (other_kind, other) in pairwise(sorted(tree.kinds)):
        if (kind, one.patient) == (other_kind, other.patient):
            raise DataError(f"{one.path} and {other.path} are the same patient: keep one of the two files")
    return tree


def patient_folders(root: Path) -> Tree:
    """`PATIENT/<modality>.nii.gz` (or a name that ends in it), masks as `seg` or `mask`; or one file per folder."""
    volumes, left_out = below(root)
    tree = Tree(root, left_out=left_out)
    alone = Counter(path.parent for path in volumes)
    for path in volumes:
        if path.parent == root:
            tree.left_out.append(LeftOut(path, "not in the folder of a patient"))
        elif path.parent.parent != root:
            tree.left_out.append(LeftOut(path, "deeper than the folder of a patient"))
        elif kind := _kind_of(path):
            tree.add(kind, path.parent.name, path)
        elif alone[path.parent] == 1:
            tree.add(ANY, path.parent.name, path)
        else:
            reason = "one of several files of a patient, and its name is neither a modality nor 'seg'"
            tree.left_out.append(LeftOut(path, reason))
    return tree


def bids(root: Path) -> Tree:
    """`sub-X/[ses-Y/]anat/sub-X[_ses-Y][...]_<T1w, T2w, FLAIR or dseg>.nii.gz`; T1w with `ce-` is after contrast."""
    volumes, left_out = below(root)
    tree = Tree(root, left_out=left_out)
    for path in volumes:
        match = _BIDS_NAME.fullmatch(stem(path))
        *place, last = ("", *path.parent.relative_to(root).parts)
        if last != "anat":
            tree.left_out.append(LeftOut(path, "not in the anat folder of a subject"))
        elif match is None or match["patient"] != "_".join(place[1:]):
            tree.left_out.append(LeftOut(path, "not named as BIDS asks for this folder"))
        elif kind := _bids_kind(match):
            tree.add(kind, match["patient"], path)
        else:
            tree.left_out.append(LeftOut(path, "neither T1w, T2w, FLAIR nor dseg"))
    return tree


def _bids_kind(match: re.Match[str]) -> str | None:
    kind = _BIDS_KINDS.get(match["suffix"])
    if "_ce-" in match["entities"]:
        return "t1ce" if kind == "t1" else None
    return kind


def _kind_of(path: Path) -> str:
    name = stem(path).lower()
    for known in sorted((*CANONICAL, *_MASK_NAMES), key=len, reverse=True):
        if name == known or name.endswith(tuple(f"{mark}{known}" for mark in "_-. ")):
            return CANONICAL.get(known, MASK)
    return ANY
