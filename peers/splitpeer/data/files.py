"""Files below a folder: which of them are volumes, and why the others are not taken."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from splitproto.errors import printable

SUFFIXES = (".nii.gz", ".nii")
EXAMPLES = 3
"""File names that a summary shows for each reason."""

PREPARED, RECORDS, LABELS = "prepare.json", "prepared", "labels"
"""What `splitpeer data prepare` leaves in a folder of images: its report, and the folders of records and masks."""

_COMPANIONS = (
    ".json", ".csv", ".tsv", ".txt", ".md", ".rst", ".html", ".pdf", ".log", ".xml", ".yaml", ".yml", ".toml",
    ".xls", ".xlsx", ".doc", ".docx", ".bval", ".bvec", ".md5", ".sha256",
)  # fmt: skip
_COMPANION_NAMES = ("readme", "license", "changes", "citation.cff", "thumbs.db", "desktop.ini")
_OTHER_FORMATS = {
    (".hdr", ".img", ".hdr.gz", ".img.gz"): "an Analyze or NIfTI pair: convert it to one .nii.gz file",
    (".dcm", ".ima", "dicomdir"): "DICOM: convert it with dcm2niix",
    (".mgz", ".mgh"): "FreeSurfer's format: convert it with mri_convert",
    (".nrrd", ".nhdr", ".mha", ".mhd", ".raw", ".mnc", ".minc"): "not NIfTI: convert it to .nii.gz",
    (".bz2", ".xz", ".zst", ".zip", ".tar", ".tgz", ".7z"): "packed: unpack it, or pack the .nii as .nii.gz",
    (".part", ".crdownload", ".filepart", ".tmp"): "an unfinished copy: copy it again",
}


@dataclass(frozen=True, order=True)
class Case:
    """One volume of one patient. `channel` picks from the last axis of a 4-D file; None for a 3-D file."""

    patient: str
    path: Path
    channel: int | None = None


@dataclass(frozen=True, order=True)
class LeftOut:
    """A file or folder that was not taken, and why."""

    path: Path
    reason: str


@dataclass(frozen=True)
class Found:
    """The cases, sorted by patient, and what was not taken."""

    cases: tuple[Case, ...]
    left_out: tuple[LeftOut, ...] = ()
    lacking: tuple[str, ...] = ()
    """Patients with other files in the same tree, but none of the kind looked for."""
    problems: tuple[str, ...] = ()
    """Problems to correct before the cases can be used, one line each."""


def stem(path: Path) -> str:
    """The file name up to `.nii` or `.nii.gz`."""
    for suffix in SUFFIXES:
        if path.name.lower().endswith(suffix):
            return path.name[: -len(suffix)]
    return path.name


def in_folder(folder: Path) -> tuple[list[Path], list[LeftOut]]:
    """The volumes that lie in `folder` itself, and what else does. Hidden names are skipped: macOS leaves a
    `._name` next to every `name`; and so is what `splitpeer data prepare` leaves beside its images.
    """
    volumes, left_out = [], []
    entries = sorted(folder.iterdir())
    ours = (RECORDS, LABELS) if any(path.name == PREPARED for path in entries) else ()
    for path in entries:
        if path.name.startswith(".") or path.name in ours:
            continue
        if path.is_dir():
            left_out.append(LeftOut(path, "a folder: only files of one folder are taken in this layout"))
        elif reason := _why_not(path):
            left_out.append(LeftOut(path, reason))
        elif path.name.lower().endswith(SUFFIXES):
            volumes.append(path)
    return volumes, left_out


def below(folder: Path) -> tuple[list[Path], list[LeftOut]]:
    """The same for `folder` and all folders in it. Links to folders are followed, each folder is entered once."""
    volumes: list[Path] = []
    left_out: list[LeftOut] = []
    waiting, entered = [folder], set()
    while waiting:
        here = waiting.pop()
        try:
            status = here.stat()
            if (status.st_dev, status.st_ino) in entered:
                continue
            entered.add((status.st_dev, status.st_ino))
            files, others = in_folder(here)
        except OSError as error:
            left_out.append(LeftOut(here, f"cannot be listed ({error.strerror})"))
            continue
        volumes += files
        for other in others:
            if other.path.is_dir():
                waiting.append(other.path)
            else:
                left_out.append(other)
    return sorted(volumes), sorted(left_out)


def summary(left_out: Sequence[LeftOut], root: Path) -> list[str]:
    """One line for each reason: how many files, the names of some, and the reason."""
    by_reason: dict[str, list[Path]] = {}
    for one in left_out:
        by_reason.setdefault(one.reason, []).append(one.path)
    return [
        f"{len(paths)} not taken: {examples(_shown(path, root) for path in paths)}: {reason}"
        for reason, paths in by_reason.items()
    ]


def examples(names: Iterable[str]) -> str:
    """The first few of `names`, printable, and how many more there are."""
    every = [printable(name) for name in names]
    more = f" and {len(every) - EXAMPLES} more" if len(every) > EXAMPLES else ""
    return ", ".join(every[:EXAMPLES]) + more


def _shown(path: Path, root: Path) -> str:
    return str(path.relative_to(root)) if path.is_relative_to(root) else str(path)


def _why_not(path: Path) -> str:
    """Why a file is not taken as a volume; empty if it is one, or is expected next to images."""
    name = path.name.lower()
    if path.is_symlink() and not path.exists():
        return "a link to a file that does not exist"
    if not path.is_file():
        return "not a regular file"
    if name.endswith((*SUFFIXES, *_COMPANIONS)) or name in _COMPANION_NAMES:
        return ""
    for endings, reason in _OTHER_FORMATS.items():
        if name.endswith(endings):
            return reason
    return "its name does not end in .nii or .nii.gz"
