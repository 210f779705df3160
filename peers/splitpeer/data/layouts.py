"""Where the cases are: the folder layouts of MSD, BraTS 2017 to 2024, and a plain folder of NIfTI files."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from splitpeer.errors import DataError

LAYOUTS = ("msd", "brats", "folder")

MODALITIES = ("flair", "t1", "t1ce", "t2")
"""Canonical names: these and no others appear on the wire."""

ALIASES = {
    "flair": ("flair", "t2f", "t2flair", "t2-flair", "t2_flair"),
    "t1": ("t1", "t1w", "t1n", "t1-native"),
    "t1ce": ("t1ce", "t1c", "t1gd", "t1-gd", "t1+c", "t1-ce", "t1post"),
    "t2": ("t2", "t2w"),
}
_CANONICAL = {alias: name for name, aliases in ALIASES.items() for alias in aliases}

# BraTS 2020's mask of case 355 kept the name of its source; the patient is the name of its folder.
_ODD_MASKS = ("W39_1998.09.19_Segm",)
_BRATS_NAME = re.compile(r"(?P<patient>.+)[-_](?P<kind>[A-Za-z0-9]+)")
_TIME_POINT = re.compile(r"(?P<subject>BraTS-[A-Za-z]+-\d{5})-\d{3}")
_SUFFIXES = (".nii.gz", ".nii")


@dataclass(frozen=True, order=True)
class Case:
    """One volume of one patient. `channel` picks from the last axis of a 4-D file; None for a 3-D file."""

    patient: str
    path: Path
    channel: int | None = None


def canonical_modality(name: str) -> str:
    """`flair`, `t1`, `t1ce` or `t2` for any known spelling in any case. Raises DataError for others."""
    try:
        return _CANONICAL[name.strip().lower()]
    except KeyError:
        raise DataError(
            f"unknown modality {name!r}: name one of {', '.join(MODALITIES)} (or an alias: "
            f"{', '.join(sorted(set(_CANONICAL) - set(MODALITIES)))})"
        ) from None


def find_images(root: Path | str, layout: str, modality: str) -> list[Case]:
    """The cases under `root` that have `modality`, sorted by patient. Raises DataError if there are none."""
    wanted = canonical_modality(modality)
    root = _root(root, layout)
    if layout == "msd":
        return _msd(root, "image", _msd_channel(root, wanted))
    if layout == "brats":
        return _sorted_unique(root, (case for kind, case in _brats(root) if kind == wanted), wanted)
    return _folder(root)


def find_labels(root: Path | str, layout: str) -> list[Case]:
    """The masks under `root`, sorted by patient. Raises DataError if there are none."""
    root = _root(root, layout)
    if layout == "msd":
        return _msd(root, "label", None)
    if layout == "brats":
        return _sorted_unique(root, (case for kind, case in _brats(root) if kind == "seg"), "seg")
    return _folder(root)


def detect_layout(root: Path | str) -> str:
    """The layout of `root` where only one fits. Raises DataError where two fit or none."""
    root = _root(root, "folder")
    if (root / "dataset.json").is_file():
        return "msd"
    flat = list(_nifti(root.iterdir()))
    nested = [path for path in _nifti(root.rglob("*")) if path.parent != root]
    if nested and not flat:
        return "brats"
    if flat and not nested:
        if any((parts := _split_brats(path)) and parts[1] in {*_CANONICAL, "seg"} for path in flat):
            raise DataError(
                f"{root}: could be layout 'brats' (names patient_modality) "
                f"or 'folder' (names patient): say which"
            )
        return "folder"
    if flat:
        raise DataError(f"{root}: NIfTI files both here and in folders below: name the layout or tidy up")
    raise DataError(f"{root}: no .nii or .nii.gz file here or below: check the path")


def found_modalities(root: Path | str, layout: str) -> tuple[str, ...]:
    """The canonical modalities that an "msd" or "brats" tree holds; () for a "folder": it does not say."""
    root = _root(root, layout)
    if layout == "msd":
        return tuple(
            sorted({_CANONICAL[name] for name in _msd_modalities(root).values() if name in _CANONICAL})
        )
    if layout == "brats":
        return tuple(sorted({kind for kind, _ in _brats(root)} - {"seg"}))
    return ()


def subject(patient: str) -> str:
    """The person behind a patient id: BraTS 2023's `BraTS-GLI-00005-001` is a time point of
    `BraTS-GLI-00005`.

    Splits must not put two time points of one person on two sides; other ids are returned as they are.
    """
    match = _TIME_POINT.fullmatch(patient)
    return match["subject"] if match else patient


def stem(path: Path) -> str:
    """The file name up to `.nii` or `.nii.gz`."""
    for suffix in _SUFFIXES:
        if path.name.lower().endswith(suffix):
            return path.name[: -len(suffix)]
    return path.name


def _root(root: Path | str, layout: str) -> Path:
    root = Path(root)
    if layout not in LAYOUTS:
        raise DataError(f"unknown layout {layout!r}: name one of {', '.join(LAYOUTS)}")
    if not root.is_dir():
        raise DataError(f"{root}: no such folder: check the path")
    return root


def _nifti(paths: Iterable[Path]) -> Iterator[Path]:
    """The NIfTI files among `paths`, without hidden ones: macOS leaves `._name` beside every `name`."""
    for path in sorted(paths):
        if not path.name.startswith(".") and path.name.lower().endswith(_SUFFIXES) and path.is_file():
            yield path


def _sorted_unique(root: Path, cases: Iterable[Case], what: str) -> list[Case]:
    found = sorted(cases)
    for one, other in pairwise(found):
        if one.patient == other.patient:
            raise DataError(f"{one.path} and {other.path} are the same patient: keep one of the two files")
    if not found:
        raise DataError(f"{root}: no {what} file (.nii or .nii.gz) found: check the path and the layout")
    return found


def _folder(root: Path) -> list[Case]:
    return _sorted_unique(root, (Case(stem(path), path) for path in _nifti(root.iterdir())), "NIfTI")


def _split_brats(path: Path) -> tuple[str, str] | None:
    """Patient id and kind (lower-case suffix) of a BraTS file name, or None where the name has no suffix."""
    name = stem(path)
    if name in _ODD_MASKS:
        return path.parent.name, "seg"
    match = _BRATS_NAME.fullmatch(name)
    return (match["patient"], match["kind"].lower()) if match else None


def _brats(root: Path) -> Iterator[tuple[str, Case]]:
    """(canonical modality or "seg", case) of every NIfTI file below `root`, HGG/LGG folders or not."""
    for path in _nifti(root.rglob("*")):
        patient, kind = _split_brats(path) or (stem(path), "")
        if kind != "seg" and kind not in _CANONICAL:
            raise DataError(
                f"{path}: not a BraTS file name (ends in neither a modality nor 'seg'): move it away, "
                f"or use layout 'folder'"
            )
        yield _CANONICAL.get(kind, kind), Case(patient, path)


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
    channels = [channel for channel, name in names.items() if _CANONICAL.get(name) == wanted]
    if len(channels) != 1:
        raise DataError(
            f"{root / 'dataset.json'}: {len(channels)} channels are {wanted!r} (it lists "
            f"{', '.join(names.values())}): name a modality that is there once"
        )
    return channels[0]


def _msd(root: Path, what: str, channel: int | None) -> list[Case]:
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
        cases.append(Case(stem(image), path, channel))
    return _sorted_unique(root, cases, what)
