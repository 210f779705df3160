"""Where the cases are: which layouts there are, and what each of them takes from a folder."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

from splitpeer.data.files import (
    Case,  # what others know it by
    Found,
    LeftOut,
    below,
    examples,
    in_folder,
    stem,
    summary,
)
from splitpeer.data.patient_list import read_list
from splitpeer.data.patients import patient_id
from splitpeer.data.trees import (
    CANONICAL,
    MASK,
    MODALITIES,
    Tree,
    bids,
    brats,
    patient_folders,
    split_brats,
)
from splitpeer.errors import DataError

LAYOUTS = ("folder", "patient-folders", "bids", "brats", "msd", "csv")
_TREES = {"brats": brats, "bids": bids, "patient-folders": patient_folders}

_TIME_POINT = re.compile(r"(?P<subject>BraTS-[A-Za-z]+-\d{5})-\d{3}|(?P<bids>sub-[^_]+)_ses-[^_]+")


def canonical_modality(name: str) -> str:
    """`flair`, `t1`, `t1ce` or `t2` for any known spelling in any case. Raises DataError for others."""
    try:
        return CANONICAL[name.strip().lower()]
    except KeyError:
        raise DataError(
            f"unknown modality {name!r}: name one of {', '.join(MODALITIES)} (or an alias: "
            f"{', '.join(sorted(set(CANONICAL) - set(MODALITIES)))})"
        ) from None


def find(root: Path | str, layout: str, modality: str | None) -> Found:
    """The cases under `root` that have `modality` (None: the masks), and what was left out.

    Raises:
        DataError: there is none, or the folder does not follow the layout.
    """
    wanted = MASK if modality is None else canonical_modality(modality)
    root = _root(root, layout)
    if layout == "csv":
        found = read_list(root)
    elif layout == "msd":
        found = (
            _msd(root, "label", None) if wanted == MASK else _msd(root, "image", _msd_channel(root, wanted))
        )
    elif layout == "folder":
        found = _folder(root)
    else:
        found = _TREES[layout](root).pick(wanted)
    if not found.cases:
        what = "NIfTI" if layout in ("folder", "csv") else wanted
        others = f" ({'; '.join(summary(found.left_out, root)[:2])})" if found.left_out else ""
        raise DataError(
            f"{root}: no {what} file (.nii or .nii.gz) found{others}: check the path and the layout"
        )
    return found


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
    if (root / "dataset.json").is_file():
        return "msd"
    volumes, left_out = below(root)
    flat = [path for path in volumes if path.parent == root]
    nested = [path for path in volumes if path.parent != root]
    if nested and all(path.relative_to(root).parts[0].startswith("sub-") for path in nested):
        return "bids" if any(path.parent.name == "anat" for path in nested) else _nested(nested)
    if nested and not flat:
        return _nested(nested)
    if flat and not nested:
        if any(split_brats(path) for path in flat):
            raise DataError(
                f"{root}: could be layout 'brats' (names patient_modality) "
                f"or 'folder' (names patient): say which"
            )
        return "folder"
    if flat:
        raise DataError(
            f"{root}: NIfTI files both here ({examples(path.name for path in flat)}) and in folders below: "
            f"name the layout or tidy up"
        )
    others = f" ({'; '.join(summary(left_out, root)[:2])})" if left_out else ""
    raise DataError(f"{root}: no .nii or .nii.gz file here or below{others}: check the path")


def found_modalities(root: Path | str, layout: str) -> tuple[str, ...]:
    """The canonical modalities that a tree holds; () for a "folder" or a "csv": they do not say."""
    root = _root(root, layout)
    if layout == "msd":
        return tuple(
            sorted({CANONICAL[name] for name in _msd_modalities(root).values() if name in CANONICAL})
        )
    if layout in _TREES:
        return tuple(sorted({kind for kind, _ in _TREES[layout](root).kinds} & set(MODALITIES)))
    return ()


def subject(patient: str) -> str:
    """The person behind a patient id: BraTS 2023's `BraTS-GLI-00005-001` is a time point of
    `BraTS-GLI-00005`, `sub-01_ses-2` of BIDS one of `sub-01`.

    Splits must not put two time points of one person on two sides; other ids are returned as they are.
    """
    match = _TIME_POINT.fullmatch(patient)
    return match["subject"] or match["bids"] if match else patient


def _root(root: Path | str, layout: str) -> Path:
    root = Path(root)
    if layout not in LAYOUTS:
        raise DataError(f"unknown layout {layout!r}: name one of {', '.join(LAYOUTS)}")
    if layout == "csv":
        if not root.is_file():
            raise DataError(
                f"{root}: layout 'csv' needs a file with the columns patient,path: check the path"
            )
    elif not root.is_dir():
        raise DataError(f"{root}: no such folder: check the path")
    return root


def _nested(volumes: list[Path]) -> str:
    return "brats" if any(split_brats(path) for path in volumes) else "patient-folders"


def _folder(root: Path) -> Found:
    volumes, left_out = in_folder(root)
    tree = Tree(root, left_out=left_out)
    for path in volumes:
        tree.add(MASK, stem(path), path)
    return Found(_unique(case for _, case in tree.kinds), tuple(tree.left_out))


def _unique(cases: Iterable[Case]) -> tuple[Case, ...]:
    found = sorted(cases)
    for one, other in pairwise(found):
        if one.patient == other.patient:
            raise DataError(
                f"{one.path} and {other.path} are the same patient: keep one of the two files"
                f"{_why_one(one.path, other.path)}"
            )
    return tuple(found)


def _why_one(one: Path, other: Path) -> str:
    """Two names that look alike need a word: what differs in them is not part of an id."""
    if stem(one) == stem(other):
        return ""
    return f" ({stem(one)!a} and {stem(other)!a} differ only in Unicode form or in spaces at the ends)"


def _msd_json(root: Path) -> dict[str, object]:
    path = root / "dataset.json"
    try:
        content = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise DataError(
            f"{path}: missing: layout 'msd' needs it; point to the folder that holds it"
        ) from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not readable JSON ({error}): fetch the archive again") from None
    if not isinstance(content, dict):
        raise DataError(f"{path}: not a Medical Segmentation Decathlon description: fetch the archive again")
    return content


def _msd_modalities(root: Path) -> dict[int, str]:
    table = _msd_json(root).get("modality")
    try:
        return {int(channel): str(name).strip().lower() for channel, name in table.items()}
    except (AttributeError, ValueError):
        raise DataError(
            f'{root / "dataset.json"}: no "modality" table of channel numbers: fetch it again'
        ) from None


def _msd_channel(root: Path, wanted: str) -> int:
    names = _msd_modalities(root)
    channels = [channel for channel, name in names.items() if CANONICAL.get(name) == wanted]
    if len(channels) != 1:
        raise DataError(
            f"{root / 'dataset.json'}: {len(channels)} channels are {wanted!r} (it lists "
            f"{', '.join(names.values())}): name a modality that is there once"
        )
    return channels[0]


def _msd(root: Path, what: str, channel: int | None) -> Found:
    """The `training` entries of dataset.json; the patient is named by the image, so that its mask matches."""
    listed = _msd_json(root).get("training")
    cases = []
    for entry in listed if isinstance(listed, list) else []:
        try:
            image, path = root / entry["image"], root / entry[what]
        except (TypeError, KeyError):
            raise DataError(
                f'{root / "dataset.json"}: a "training" entry lacks "{what}": fetch the archive again'
            ) from None
        if path.name.startswith("."):
            continue
        if ".." in path.relative_to(root).parts or not path.is_file():
            raise DataError(f"{path}: listed in dataset.json but not in {root}: unpack the archive again")
        cases.append(Case(patient_id(stem(image)), path, channel))
    taken = {case.path for case in cases}
    left_out: list[LeftOut] = []
    for folder in sorted({path.parent for path in taken}):
        volumes, others = in_folder(folder)
        unlisted = "not listed under training in dataset.json"
        left_out += [LeftOut(path, unlisted) for path in volumes if path not in taken] + others
    return Found(_unique(cases), tuple(left_out))
