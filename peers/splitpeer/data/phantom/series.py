"""A volume written as a scanner would send it: one DICOM series, classic or multi-frame, with oddities on demand.

Coordinates: volumes are [column, row, slice] with a RAS affine, as everywhere here; DICOM's patient axes are LPS.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from splitpeer.errors import needs

try:
    import pydicom
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.sequence import Sequence as Items
    from pydicom.uid import (
        UID,
        CTImageStorage,
        EnhancedMRImageStorage,
        ExplicitVRLittleEndian,
        ImplicitVRLittleEndian,
        JPEGLosslessSV1,
        MRImageStorage,
        RLELossless,
        generate_uid,
    )
except ModuleNotFoundError:
    raise needs("DICOM", "pydicom", "dicom") from None

RAS_TO_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])

Syntax = Literal["explicit", "implicit", "rle", "jpeg-lossless"]
_SYNTAXES: Mapping[Syntax, UID] = {
    "explicit": ExplicitVRLittleEndian,
    "implicit": ImplicitVRLittleEndian,
    "rle": RLELossless,
    # Said in the header only; the voxels are not decodable, as of an export that lost its codec.
    "jpeg-lossless": JPEGLosslessSV1,
}


@dataclass(frozen=True)
class Protocol:
    """How a contrast is acquired: what a header says beyond its description."""

    repetition_ms: float
    echo_ms: float
    inversion_ms: float | None = None
    sequence: str = "SE"
    agent: str = ""


PROTOCOLS: Mapping[str, Protocol] = {
    "t1": Protocol(1900.0, 2.9, 900.0, "GR"),
    "t1ce": Protocol(1900.0, 2.9, 900.0, "GR", "Gadobutrol"),
    "t2": Protocol(5200.0, 96.0),
    "flair": Protocol(9000.0, 120.0, 2500.0, "IR"),
}
"""Usual values at 3 T, as any textbook of MRI has them."""


@dataclass(frozen=True)
class Oddities:
    """What real exports do wrong, or unexpectedly right."""

    missing: Collection[int] = ()
    """Slices that were never exported."""
    copied: Collection[int] = ()
    """Slices that are there twice, as the same object in two files."""
    truncated: Collection[int] = ()
    """Slices whose file ends in the middle of its voxels."""
    reverse: bool = False
    """Files and instance numbers run against the slice axis."""
    slope: float = 1.0
    intercept: float = 0.0
    """Stored values are (voxel - intercept) / slope, rounded."""
    syntax: Syntax = "explicit"
    other_patient: Collection[int] = ()
    """Slices that carry another patient's id."""
    tags: Mapping[str, Any] = field(default_factory=dict)
    """More attributes of every file, by keyword; None removes one."""


def uid_of(*words: object) -> str:
    """A UID that is the same for the same words (and another for others)."""
    return str(generate_uid(entropy_srcs=[*map(str, words)]))


def write_series(
    folder: Path,
    volume: NDArray[np.generic],
    affine: NDArray[np.float64],
    *,
    patient_id: str,
    description: str,
    modality: str = "t1",
    number: int = 1,
    study: str | None = None,
    series: str | None = None,
    frame_of_reference: str | None = None,
    enhanced: bool = False,
    protocol: Protocol | None = None,
    kind: Sequence[str] = ("ORIGINAL", "PRIMARY", "M", "NONE"),
    date: str = "20260105",
    oddities: Oddities | None = None,
) -> list[Path]:
    """Write one series below `folder`: a file per slice, or with `enhanced` a single multi-frame file.

    Args:
        folder: made where it is missing.
        volume: [column, row, slice], whole numbers of -32768..65535.
        affine: float64 4x4, voxel to RAS millimetres; may be oblique, left-handed or sheared (a tilted gantry).
        patient_id: PatientID. No name is written.
        description: SeriesDescription.
        modality: chooses the `protocol` ("t1", "t1ce", "t2", "flair"); "ct" writes CT Image Storage.
        number: SeriesNumber.
        study, series, frame_of_reference: UIDs; by default the same for the same patient (study, frame of reference)
            and the same patient, description and number (series).
        protocol: how it was acquired, where it is not what `modality` says.
        kind: ImageType.
        date: StudyDate.
        oddities: see there; those of single files do not apply to a multi-frame one.

    Returns:
        The files, in the order of the slice axis.
    """
    odd = oddities or Oddities()
    uids = _Uids(
        study or uid_of("study", patient_id, date),
        series or uid_of("series", patient_id, date, description, number),
        frame_of_reference or uid_of("frame", patient_id, date),
    )
    stored = _stored(volume, odd)
    shared = _shared(patient_id, description, modality, number, uids, protocol, kind, date)
    folder.mkdir(parents=True, exist_ok=True)
    if enhanced:
        path = folder / f"{number:02d}-multiframe.dcm"
        _save(_enhanced(shared, stored, affine, odd, uids), path, odd, EnhancedMRImageStorage)
        return [path]
    return _classic(shared, stored, affine, odd, folder, number, uids)


def tilted(affine: NDArray[np.float64], degrees: float) -> NDArray[np.float64]:
    """The grid of a gantry that leans: slices keep their plane and move along the table, so the axes are not at right
    angles."""
    out = affine.copy()
    row = affine[:3, 1] / np.linalg.norm(affine[:3, 1])
    out[:3, 2] += row * np.linalg.norm(affine[:3, 2]) * np.tan(np.deg2rad(degrees))
    return out


# --- inside ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Uids:
    study: str
    series: str
    frame: str


def _stored(volume: NDArray[np.generic], odd: Oddities) -> NDArray[np.generic]:
    values = np.rint((volume.astype(np.float64) - odd.intercept) / odd.slope)
    low, high = float(values.min()), float(values.max())
    if not (low >= -(2**15) and high < (2**15 if low < 0 else 2**16)):
        raise ValueError(f"values of {low:g} to {high:g} do not fit 16 bits: choose another slope")
    return values.astype(np.int16 if low < 0 else np.uint16)


def _shared(
    patient_id: str,
    description: str,
    modality: str,
    number: int,
    uids: _Uids,
    protocol: Protocol | None,
    kind: Sequence[str],
    date: str,
) -> Dataset:
    data = Dataset()
    data.SpecificCharacterSet = "ISO_IR 192"
    data.ImageType = list(kind)
    data.StudyDate = data.SeriesDate = data.AcquisitionDate = date
    data.StudyTime = data.SeriesTime = data.AcquisitionTime = "090000"
    data.AccessionNumber = ""
    data.Modality = "CT" if modality == "ct" else "MR"
    data.Manufacturer = "phantom"
    data.SeriesDescription = description
    data.PatientName = ""
    data.PatientID = patient_id
    data.PatientBirthDate = data.PatientSex = ""
    data.BodyPartExamined = "HEAD"
    data.StudyInstanceUID, data.SeriesInstanceUID = uids.study, uids.series
    data.StudyID, data.SeriesNumber, data.AcquisitionNumber = "1", number, 1
    data.FrameOfReferenceUID, data.PositionReferenceIndicator = uids.frame, ""
    data.PatientPosition = "HFS"
    if modality != "ct":
        taken = protocol or PROTOCOLS.get(modality, PROTOCOLS["t1"])
        data.ScanningSequence, data.SequenceVariant, data.ScanOptions = taken.sequence, "NONE", ""
        data.MRAcquisitionType = "3D" if taken.sequence == "GR" else "2D"
        data.RepetitionTime, data.EchoTime = taken.repetition_ms, taken.echo_ms
        data.EchoTrainLength = 1
        if taken.inversion_ms is not None:
            data.InversionTime = taken.inversion_ms
        if taken.agent:
            data.ContrastBolusAgent = taken.agent
    return data


def _place(affine: NDArray[np.float64], k: int) -> tuple[list[float], list[float], list[float], float]:
    """Orientation, position and pixel spacing (rows, columns) of slice k, and the distance of slices along the normal;
    LPS, mm."""
    lps = RAS_TO_LPS @ affine
    across, down = np.linalg.norm(lps[:3, 0]), np.linalg.norm(lps[:3, 1])
    cosines = [*(lps[:3, 0] / across), *(lps[:3, 1] / down)]
    position = lps[:3, 3] + k * lps[:3, 2]
    normal = np.cross(lps[:3, 0] / across, lps[:3, 1] / down)
    step = abs(float(normal @ lps[:3, 2]))
    return _short(cosines), _short(position), _short([float(down), float(across)]), step


def _short(values: Sequence[float] | NDArray[np.float64]) -> list[float]:
    """As text of at most 16 characters holds them (value representation DS)."""
    return [float(f"{value:.9f}"[:16]) + 0.0 for value in values]


def _pixels(data: Dataset, stored: NDArray[np.generic]) -> None:
    data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
    data.Columns, data.Rows = stored.shape[:2]
    data.BitsAllocated = data.BitsStored = 16
    data.HighBit, data.PixelRepresentation = 15, int(stored.dtype == np.int16)


def _classic(
    shared: Dataset,
    stored: NDArray[np.generic],
    affine: NDArray[np.float64],
    odd: Oddities,
    folder: Path,
    number: int,
    uids: _Uids,
) -> list[Path]:
    """A file per slice."""
    storage = CTImageStorage if shared.Modality == "CT" else MRImageStorage
    paths = []
    for k in sorted(set(range(stored.shape[2])) - set(odd.missing)):
        instance = stored.shape[2] - k if odd.reverse else k + 1
        data = _slice(shared, stored, affine, k, instance, odd)
        data.SOPInstanceUID = uid_of(uids.series, k)
        if k in odd.other_patient:
            data.PatientID = f"{shared.PatientID}-other"
        names = [f"{number:02d}-{instance:04d}", *([f"{number:02d}-{instance:04d}-copy"] * (k in odd.copied))]
        for name in names:
            path = folder / f"{name}.dcm"
            _save(data, path, odd, storage)
            paths.append(path)
        if k in odd.truncated:
            content = path.read_bytes()
            path.write_bytes(content[: len(content) - stored[:, :, k].nbytes // 2])
    return paths


def _slice(
    shared: Dataset,
    stored: NDArray[np.generic],
    affine: NDArray[np.float64],
    k: int,
    instance: int,
    odd: Oddities,
) -> Dataset:
    data = Dataset()
    data.update(shared)
    cosines, position, spacing, step = _place(affine, k)
    data.InstanceNumber = instance
    data.ImageOrientationPatient, data.ImagePositionPatient = cosines, position
    data.PixelSpacing, data.SliceThickness, data.SpacingBetweenSlices = spacing, f"{step:.6g}", f"{step:.6g}"
    if (odd.slope, odd.intercept) != (1.0, 0.0) or shared.Modality == "CT":
        data.RescaleSlope, data.RescaleIntercept = f"{odd.slope:.10g}", f"{odd.intercept:.10g}"
        data.RescaleType = "HU" if shared.Modality == "CT" else "US"
    _pixels(data, stored)
    data.PixelData = np.ascontiguousarray(stored[:, :, k].T).astype("<" + stored.dtype.str[1:]).tobytes()
    return data


def _enhanced(
    shared: Dataset, stored: NDArray[np.generic], affine: NDArray[np.float64], odd: Oddities, uids: _Uids
) -> Dataset:
    """Enhanced MR Image Storage (PS3.3 A.36), as far as a reader of volumes looks."""
    data = Dataset()
    data.update(shared)
    data.SOPInstanceUID = uid_of(uids.series, "all")
    data.InstanceNumber = 1
    data.NumberOfFrames = stored.shape[2]
    data.ContentDate, data.ContentTime = shared.StudyDate, shared.StudyTime
    cosines, _, spacing, step = _place(affine, 0)
    common = Dataset()
    common.PlaneOrientationSequence = Items([_item(ImageOrientationPatient=cosines)])
    common.PixelMeasuresSequence = Items(
        [_item(PixelSpacing=spacing, SliceThickness=f"{step:.6g}", SpacingBetweenSlices=f"{step:.6g}")]
    )
    common.PixelValueTransformationSequence = Items(
        [_item(RescaleSlope=f"{odd.slope:.10g}", RescaleIntercept=f"{odd.intercept:.10g}", RescaleType="US")]
    )
    common.MREchoSequence = Items([_item(EffectiveEchoTime=float(shared.EchoTime))])
    timing = _item(RepetitionTime=float(shared.RepetitionTime))
    common.MRTimingAndRelatedParametersSequence = Items([timing])
    if "InversionTime" in shared:
        common.MRModifierSequence = Items([_item(InversionTimes=[float(shared.InversionTime)])])
    # These belong to frames in an enhanced object.
    for name in ("EchoTime", "RepetitionTime", "InversionTime", "ScanningSequence", "SequenceVariant"):
        if name in data:
            delattr(data, name)
    if "ContrastBolusAgent" in shared:
        del data.ContrastBolusAgent
        data.ContrastBolusAgentSequence = Items([_item(CodeMeaning=shared.ContrastBolusAgent)])
    data.SharedFunctionalGroupsSequence = Items([common])
    order = range(stored.shape[2] - 1, -1, -1) if odd.reverse else range(stored.shape[2])
    frames = []
    for count, k in enumerate(order, 1):
        frame = Dataset()
        frame.PlanePositionSequence = Items([_item(ImagePositionPatient=_place(affine, k)[1])])
        frame.FrameContentSequence = Items(
            [_item(StackID="1", InStackPositionNumber=count, DimensionIndexValues=[1, count])]
        )
        frames.append(frame)
    data.PerFrameFunctionalGroupsSequence = Items(frames)
    _pixels(data, stored)
    ordered = np.stack([stored[:, :, k].T for k in order])
    data.PixelData = ordered.astype("<" + stored.dtype.str[1:]).tobytes()
    return data


def _item(**attributes: Any) -> Dataset:
    item = Dataset()
    for name, value in attributes.items():
        setattr(item, name, value)
    return item


def _save(data: Dataset, path: Path, odd: Oddities, storage: UID) -> None:
    for name, value in odd.tags.items():
        if value is None:
            if name in data:
                delattr(data, name)
        else:
            setattr(data, name, value)
    data.SOPClassUID = storage
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = storage, data.SOPInstanceUID
    meta.TransferSyntaxUID = ImplicitVRLittleEndian if odd.syntax == "implicit" else ExplicitVRLittleEndian
    data.file_meta = meta
    if odd.syntax == "rle":
        data.compress(RLELossless, generate_instance_uid=False)
    elif odd.syntax == "jpeg-lossless":
        digest = hashlib.sha256(data.PixelData).digest() * 8
        data.PixelData = pydicom.encaps.encapsulate([digest])
        data["PixelData"].is_undefined_length = True
        meta.TransferSyntaxUID = _SYNTAXES[odd.syntax]
    data.save_as(path, enforce_file_format=True)
