"""Folders whose names say what they contain: one per modality, one per patient, BraTS, BIDS.

Each function lists a folder; `wanted`, the kind that is looked for, is understood in names whatever it is called.
"""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

from splitpeer.data.files import LABELS, below, in_folder, stem
from splitpeer.data.listing import Listing
from splitpeer.data.modalities import ANY, CANONICAL, MASK, MASK_NAMES, USUAL, kind_of

# BraTS 2020's mask of case 355 kept the name of its source; the patient is the name of its folder.
_ODD_MASKS = ("W39_1998.09.19_Segm",)
_BRATS_NAME = re.compile(r"(?P<patient>.+)[-_](?P<kind>[A-Za-z0-9]+)")
_BIDS_NAME = re.compile(
    r"(?P<patient>sub-[^_]+(?:_ses-[^_]+)?)(?P<entities>(?:_[a-zA-Z]+-[^_]+)*)_(?P<suffix>[A-Za-z0-9]+)"
)
_BIDS_FOLDERS: dict[str, tuple[str, ...]] = {
    "anat": (),
    "ct": ("ct",),
    "dwi": ("ADC",),
    "pet": ("pet",),
}
"""Folder of a subject -> the endings accepted there; (): any ending is a modality, or a mask."""


def folder(root: Path, wanted: str) -> Listing:
    """`ID.nii.gz` in `root` itself, or in a folder below it that is called like the modality (masks: `labels`)."""
    volumes, left_out = in_folder(root)
    fitting = [
        one.path for one in left_out if one.path.is_dir() and kind_of(one.path.name) in (wanted, *USUAL, MASK)
    ]
    named = [path for path in fitting if kind_of(path.name) == wanted]
    if wanted == MASK and not named and (root / LABELS).is_dir():
        named = [root / LABELS]  # of data prepare, beside its images
    if volumes or not fitting:
        listing = Listing(root, left_out)
        for path in volumes:
            listing.add(ANY, stem(path), path)
        if volumes and named:
            text = f"{root}: images here and in {named[0].name}/: name the folder that is meant, or tidy up"
            listing.problems.append((ANY, text))
    else:
        listing = Listing(root, [one for one in left_out if one.path not in fitting])
        for path in fitting:
            _take_folder(listing, path)
    listing.refuse_twins()
    return listing


def _take_folder(listing: Listing, path: Path) -> None:
    """All volumes of a folder that is called like what they show."""
    volumes, left_out = in_folder(path)
    listing.left_out += left_out
    for volume in volumes:
        listing.add(kind_of(path.name) or ANY, stem(volume), volume)


def patient_folders(root: Path, wanted: str) -> Listing:
    """`PATIENT/<modality>.nii.gz` (or a name that ends in it), masks as `seg` or `mask`; or one file per folder."""
    volumes, left_out = below(root)
    listing = Listing(root, left_out)
    alone = Counter(path.parent for path in volumes)
    for path in volumes:
        if path.parent == root:
            listing.leave(path, "not in the folder of a patient")
        elif path.parent.parent != root:
            listing.leave(path, "deeper than the folder of a patient")
        elif kind := ending(path, wanted):
            listing.add(kind, path.parent.name, path)
        elif alone[path.parent] == 1:
            listing.add(ANY, path.parent.name, path)
        else:
            listing.leave(
                path, "one of several files of a patient, and its name is neither a modality nor 'seg'"
            )
    return listing


def ending(path: Path, wanted: str) -> str:
    """The kind that a file's name is, or ends in after a mark; `ANY` where it is no known one."""
    name = stem(path).lower()
    for known in sorted({*USUAL, *MASK_NAMES, wanted} - {ANY}, key=len, reverse=True):
        if name == known or name.endswith(tuple(f"{mark}{known}" for mark in "_-. ")):
            return kind_of(known) or ANY
    return ANY


def brats(root: Path, wanted: str) -> Listing:
    """`PATIENT/PATIENT_<modality>.nii.gz` and `_seg`, below HGG and LGG folders or not; `-` or `_` before the kind."""
    volumes, left_out = below(root)
    listing = Listing(root, left_out)
    for path in volumes:
        if split := split_brats(path):
            listing.add(split[1], split[0], path)
        else:
            listing.leave(path, "its name ends in neither a modality nor 'seg'")
    listing.refuse_twins()
    return listing


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


def bids(root: Path, wanted: str) -> Listing:
    """`sub-X/[ses-Y/]anat/sub-X[_ses-Y][...]_<T1w, T2w, FLAIR, dseg or any other>.nii.gz`, and PET, CT, ADC in theirs.

    T1w with `ce-` is after contrast.
    """
    volumes, left_out = below(root)
    listing = Listing(root, left_out)
    for path in volumes:
        match = _BIDS_NAME.fullmatch(stem(path))
        *place, last = ("", *path.parent.relative_to(root).parts)
        taken = _BIDS_FOLDERS.get(last)
        if taken is None or (match and taken and match["suffix"] not in taken):
            listing.leave(path, "not in the anat folder of a subject")
        elif match is None or match["patient"] != "_".join(place[1:]):
            listing.leave(path, "not named as BIDS asks for this folder")
        elif match["suffix"] in MASK_NAMES and match["suffix"] != "dseg":
            listing.leave(path, "a mask of something else: BIDS calls a segmentation dseg")
        elif "_ce-" in match["entities"] and match["suffix"] != "T1w":
            listing.leave(path, "after a contrast agent, but not T1w")
        else:
            kind = "t1ce" if "_ce-" in match["entities"] else kind_of(match["suffix"])
            listing.add(kind or ANY, match["patient"], path)
    return listing
