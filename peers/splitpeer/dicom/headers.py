"""What the files below a folder say of themselves. Voxels stay on the disk, names of patients are never read."""

from __future__ import annotations

import logging
import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from splitpeer.errors import DataError, needs

try:
    import pydicom
    from pydicom.dataset import Dataset
    from pydicom.errors import InvalidDicomError
    from pydicom.pixels.decoders.base import get_decoder
except ModuleNotFoundError:
    raise needs("DICOM", "pydicom", "dicom") from None

MAX_FILES = 500_000
"""Files below one folder; the headers of so many take about a gigabyte."""
MAX_FILE_BYTES = 4 << 30
"""A larger file is not opened."""
MAX_FRAMES = 16384
"""Frames of one multi-frame file."""
BY_FOLDER = "folder"
"""Instead of an attribute's keyword: the patient is called as the first folder below the one that is read."""

Three = tuple[float, float, float]
Six = tuple[float, float, float, float, float, float]

Progress = Callable[[int, int], None]
"""Called with (files read, files)."""


@dataclass(frozen=True, slots=True)
class Frame:
    """One slice. Positions and cosines are DICOM's: LPS, mm."""

    index: int
    """Within its file, from 0."""
    position: Three | None
    orientation: Six | None
    """Along a row, then along a column."""
    spacing: tuple[float, float] | None
    """Between rows, then between columns, mm."""
    slope: float
    intercept: float
    apart: tuple[str, ...]
    """What tells volumes of one series from each other: echo, time point, diffusion weighting, kind of image."""


@dataclass(frozen=True, slots=True)
class DicomHeader:
    """One file."""

    path: str
    """Relative to the folder that was read, with /."""
    size: int
    changed_ns: int
    patient: str
    """As the hospital calls the patient; empty where the file does not say."""
    study: str
    series: str
    frame_of_reference: str
    instance: str
    modality: str
    description: str
    number: int
    when: str
    """Of the acquisition or else the series: date and time, digits."""
    kind: tuple[str, ...]
    agent: str
    """Contrast agent; empty: none is named."""
    echo_ms: float | None
    repetition_ms: float | None
    inversion_ms: float | None
    syntax: str
    """Transfer syntax UID."""
    rows: int
    columns: int
    colour: bool
    short: bool
    """The file ends before its voxels do."""
    frames: tuple[Frame, ...]

    @property
    def decodable(self) -> bool:
        """Whether this installation can decode its voxels."""
        try:
            return bool(get_decoder(self.syntax).is_available)
        except NotImplementedError:
            return False


@dataclass(frozen=True)
class DicomFolder:
    """What lies below a folder."""

    root: Path
    headers: tuple[DicomHeader, ...]
    passed: dict[str, int]
    """Files that were passed over: reason -> how many."""


class NotAnImage(Exception):
    """Why a file is no image of a series, without its name."""


def read_folder(root: Path, patient_id: str = "PatientID", progress: Progress | None = None) -> DicomFolder:
    """All DICOM images below `root`, headers only, in the order of their paths.

    Args:
        root: a folder; links to folders are not followed.
        patient_id: keyword of the attribute that names the patient, or `BY_FOLDER`.
        progress: see `Progress`.

    Raises:
        DataError: no such folder, too many files, or no image among them.
    """
    if patient_id != BY_FOLDER and pydicom.datadict.tag_for_keyword(patient_id) is None:
        raise DataError(
            f"patient_id {patient_id!r} is no attribute of DICOM: write PatientID, another keyword, or {BY_FOLDER}"
        )
    paths = _files(root)
    headers: list[DicomHeader] = []
    passed: Counter[str] = Counter()
    for count, path in enumerate(paths, 1):
        try:
            headers.append(read_file(path, path.relative_to(root).as_posix(), patient_id)[0])
        except NotAnImage as reason:
            passed[str(reason)] += 1
        if progress:
            progress(count, len(paths))
    if not headers:
        others = "; ".join(f"{number} {reason}" for reason, number in passed.items()) or "it is empty"
        raise DataError(f"{root}: no DICOM image ({others}): name the folder of an export")
    return DicomFolder(root, tuple(headers), dict(passed))


def read_file(path: Path, name: str, patient_id: str = "PatientID") -> tuple[DicomHeader, Dataset]:
    """One image: what its header says, and the header itself, without voxels.

    Args:
        path: the file.
        name: `DicomHeader.path`.
        patient_id: as for `read_folder`.

    Raises:
        NotAnImage: it is none, or damaged.
    """
    # Its warnings quote values, and values name patients.
    logging.getLogger("pydicom").setLevel(logging.CRITICAL)
    try:
        status = path.stat()
        if not path.is_file():
            raise NotAnImage("not a regular file")
        if status.st_size > MAX_FILE_BYTES:
            raise NotAnImage(f"larger than {MAX_FILE_BYTES >> 30} GiB")
        data, behind = _dataset(path)
    except OSError as error:
        raise NotAnImage(f"cannot be read ({error.strerror or 'it ends early'})") from None
    if "Rows" not in data or "Columns" not in data:
        image = "Image Storage" in pydicom.uid.UID(str(data.get("SOPClassUID", ""))).name
        raise NotAnImage(_CUT if image else "no image (a report, a directory or the like)")
    folder = name.partition("/")[0] if patient_id == BY_FOLDER and "/" in name else ""
    try:
        header = _filled(data, name, status, folder or _text(data, patient_id))
    except NotAnImage:
        raise
    except Exception:  # whatever pydicom makes of a value that is none
        raise NotAnImage("a header that cannot be understood: export it again") from None
    # Eight bytes: tag and length of the voxels' element, at least.
    return replace(
        header, short=header.short or status.st_size < behind + 8 + _voxel_bytes(data, header)
    ), data


# --- inside ------------------------------------------------------------------------------------------------


def _files(root: Path) -> list[Path]:
    if not root.is_dir():
        raise DataError(f"{root}: no such folder: check the path")
    found: list[Path] = []
    for here, folders, names in os.walk(root):
        folders.sort()
        found += [Path(here) / name for name in sorted(names) if not name.startswith(".")]
        if len(found) > MAX_FILES:
            raise DataError(
                f"{root}: more than {MAX_FILES} files: prepare the folders below it one after another"
            )
    return found


_CUT = "a header that ends early: copy or export it again"


def _voxel_bytes(data: Dataset, header: DicomHeader) -> int:
    """What the voxels need if they are not packed; 1 if they are."""
    if pydicom.uid.UID(header.syntax).is_compressed:
        return 1
    samples, bits = int(data.get("SamplesPerPixel") or 1), int(data.get("BitsAllocated") or 16)
    return header.rows * header.columns * samples * len(header.frames) * bits // 8


def _dataset(path: Path) -> tuple[Dataset, int]:
    """The header, and where it ends."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with path.open("rb") as file:
                return pydicom.dcmread(file, stop_before_pixels=True), file.tell()
        except InvalidDicomError:
            raise NotAnImage("not DICOM") from None
        except OSError:
            raise
        except Exception:
            raise NotAnImage(_CUT) from None


def _filled(data: Dataset, path: str, status: os.stat_result, patient: str) -> DicomHeader:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rows, columns = int(data.Rows), int(data.Columns)
        frames = tuple(_frames(data))
        first = _group(data, 0)
        syntax = str(data.file_meta.get("TransferSyntaxUID", "1.2.840.10008.1.2"))
        return DicomHeader(
            path=path,
            size=status.st_size,
            changed_ns=status.st_mtime_ns,
            patient=patient.strip(),
            study=_text(data, "StudyInstanceUID"),
            series=_text(data, "SeriesInstanceUID"),
            frame_of_reference=_text(data, "FrameOfReferenceUID"),
            instance=_text(data, "SOPInstanceUID"),
            modality=_text(data, "Modality"),
            description=_text(data, "SeriesDescription") or _text(data, "ProtocolName"),
            number=int(data.get("SeriesNumber") or 0),
            when=_when(data),
            kind=tuple(str(one).upper() for one in data.get("ImageType") or ()),
            agent=_agent(data),
            echo_ms=_number(first, "EchoTime", "EffectiveEchoTime"),
            repetition_ms=_number(first, "RepetitionTime"),
            inversion_ms=_number(first, "InversionTime", "InversionTimes"),
            syntax=syntax,
            rows=rows,
            columns=columns,
            colour=int(data.get("SamplesPerPixel") or 1) != 1
            or str(data.get("PhotometricInterpretation", "MONOCHROME2")) != "MONOCHROME2",
            short=rows < 1 or columns < 1,
            frames=frames,
        )


def _frames(data: Dataset) -> Iterator[Frame]:
    count = int(data.get("NumberOfFrames") or 1)
    if count > MAX_FRAMES:
        raise NotAnImage(f"more than {MAX_FRAMES} frames in one file")
    per_frame = data.get("PerFrameFunctionalGroupsSequence")
    if per_frame is not None and len(per_frame) < count:
        raise NotAnImage("frames without a description: export it again")
    for index in range(count if per_frame is not None else 1):
        group = _group(data, index)
        slope, intercept = _number(group, "RescaleSlope"), _number(group, "RescaleIntercept")
        yield Frame(
            index,
            _floats(group, "ImagePositionPatient", 3),
            _floats(group, "ImageOrientationPatient", 6),
            _floats(group, "PixelSpacing", 2),
            1.0 if slope is None else slope,
            0.0 if intercept is None else intercept,
            _apart(group),
        )


_APART = (
    "EchoNumbers", "EchoTime", "EffectiveEchoTime", "InversionTime", "TemporalPositionIdentifier",
    "TemporalPositionIndex", "DiffusionBValue", "DiffusionGradientOrientation", "StackID", "ComplexImageComponent",
)  # fmt: skip
_KINDS = 2
"""The first values of ImageType say how an image came about, not what it shows."""


def _apart(group: dict[str, Any]) -> tuple[str, ...]:
    kind = [str(one) for one in group.get("ImageType") or group.get("FrameType") or ()][_KINDS:]
    return (*(str(group.get(name, "")) for name in _APART), *kind)


def _group(data: Dataset, index: int) -> dict[str, Any]:
    """The attributes of a frame: its own before those that all frames share before those of the file."""
    # By name: to walk through all elements of a file would decode them.
    out: dict[str, Any] = {name: data[name].value for name in _WANTED if name in data}
    for name in ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"):
        items = data.get(name)
        if items:
            _gather(items[index if name.startswith("Per") else 0], out)
    return out


def _gather(data: Dataset, out: dict[str, Any]) -> None:
    for element in data:
        if element.VR == "SQ":
            if element.value:
                _gather(element.value[0], out)
        elif element.keyword in _WANTED:
            out[element.keyword] = element.value


_WANTED = frozenset(
    {
        *_APART, "ImageType", "FrameType", "ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing",
        "RescaleSlope", "RescaleIntercept", "RepetitionTime", "InversionTimes",
    }
)  # fmt: skip


def _floats(group: dict[str, Any], name: str, count: int) -> Any:
    value = group.get(name)
    if value is None or len(value) != count:
        return None
    return tuple(float(one) for one in value)


def _number(group: dict[str, Any], *names: str) -> float | None:
    for name in names:
        value = group.get(name)
        if value is not None and value != "":
            return float(value[0] if isinstance(value, list | pydicom.multival.MultiValue) else value)
    return None


def _text(data: Dataset, name: str) -> str:
    value = data.get(name)
    return "" if value is None else " ".join(str(value).split())


def _when(data: Dataset) -> str:
    for name in ("Acquisition", "Series", "Study"):
        if date := _text(data, f"{name}Date"):
            return date + _text(data, f"{name}Time").partition(".")[0]
    return _text(data, "AcquisitionDateTime").partition(".")[0]


_NO_AGENT = frozenset({"", "NO", "NONE", "N", "NATIV", "WITHOUT"})


def _agent(data: Dataset) -> str:
    named = _text(data, "ContrastBolusAgent")
    for item in data.get("ContrastBolusAgentSequence") or ():
        named = named or _text(item, "CodeMeaning") or "unnamed"
    return "" if named.upper() in _NO_AGENT else named
