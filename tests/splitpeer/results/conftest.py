"""Patients whose regions are known as a formula in millimetres, on any grid, and series of images of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pydicom
import pytest
from pydicom import Dataset
from pydicom.dataset import FileMetaDataset
from pydicom.sequence import Sequence as Items
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

from splitpeer.data.task import Task, glioma
from splitpeer.results.segmentation import Origin, Segmentation

LPS = np.diag([-1.0, -1.0, 1.0])
MODEL = "9f" * 32
SHAPE = (18, 15, 11)
"""Columns, rows and frames."""
STEPS = (1.0, 1.3, 2.5)
"""Millimetres between columns, rows and frames."""
AXES = {
    "axial": ((1, 0, 0), (0, 1, 0), (0, 0, 1)),
    "sagittal": ((0, 1, 0), (0, 0, -1), (-1, 0, 0)),
    "coronal": ((1, 0, 0), (0, 0, -1), (0, 1, 0)),
}
"""Directions (LPS) of columns, rows and frames as scanners write them."""
_TILT = np.array([[np.cos(0.4), -np.sin(0.4), 0], [np.sin(0.4), np.cos(0.4), 0], [0, 0, 1]]) @ np.array(
    [[1, 0, 0], [0, np.cos(0.25), -np.sin(0.25)], [0, np.sin(0.25), np.cos(0.25)]]
)


def directions(view: str) -> np.ndarray:
    """float64 [3, 3], a row per direction; of "oblique" far from any axis."""
    return np.array(AXES.get(view, AXES["axial"]), float) @ (_TILT.T if view == "oblique" else np.eye(3))


def inside(points: np.ndarray) -> np.ndarray:
    """WT, TC and ET of a glioma at RAS millimetres [..., 3]: three ellipsoids inside each other, nowhere symmetric."""
    out = []
    for size in (1.0, 0.62, 0.3):
        apart = (points - np.array([2.13, -1.37, 3.71])) / (np.array([6.1, 8.3, 9.7]) * size)
        apart[..., 0] += 0.21 * apart[..., 1] * size
        out.append((apart**2).sum(-1) < 1)
    return np.stack(out)


def grid_points(shape: tuple[int, int, int], affine: np.ndarray) -> np.ndarray:
    """The millimetres of each voxel, [*shape, 3]."""
    index = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1)
    return index @ affine[:3, :3].T + affine[:3, 3]


def image_at(points: np.ndarray) -> np.ndarray:
    """What a scanner shows there: a head with the tumour in it, float64."""
    head = 400 * (((points / np.array([13.0, 14.0, 15.0])) ** 2).sum(-1) < 1)
    return head * (1 + 0.12 * np.sin(points[..., 0] * 0.8)) + 130 * inside(points).sum(0)


@dataclass(frozen=True)
class Scan:
    """A series on disk, and the grid of its voxels in the order of columns, rows and frames."""

    folder: Path
    paths: list[Path]
    affine: np.ndarray
    """From (column, row, frame) to RAS."""
    shape: tuple[int, int, int] = SHAPE


def series_affine(
    view: str, shape: tuple[int, int, int] = SHAPE, steps: tuple[float, float, float] = STEPS
) -> np.ndarray:
    """Centred a few millimetres off the origin; "tilted": the gantry was, so each slice is shifted along the rows."""
    affine = np.eye(4)
    affine[:3, :3] = LPS @ (directions(view) * np.array(steps)[:, None]).T
    if view == "tilted":
        affine[:3, 2] += 0.5 * affine[:3, 1]
    middle = affine[:3, :3] @ (np.array(shape) - 1) / 2
    affine[:3, 3] = np.array([1.0, -2.0, 2.0]) - middle
    return affine


def header(view: str = "axial", **more: Any) -> Dataset:
    """An MR image as a scanner writes it, without place and pixels."""
    one = Dataset()
    one.SOPClassUID = "1.2.840.10008.5.1.4.1.1.4"
    one.Modality, one.Manufacturer = "MR", "Phantom"
    one.PatientName, one.PatientID = "Phantom^One", "P-0001"
    one.PatientBirthDate, one.PatientSex = "19610203", "O"
    one.StudyInstanceUID, one.SeriesInstanceUID = "1.2.826.0.1.3680043.8.498.1", "1.2.826.0.1.3680043.8.498.2"
    one.FrameOfReferenceUID = "1.2.826.0.1.3680043.8.498.3"
    one.StudyDate, one.StudyTime, one.StudyID, one.AccessionNumber = "20260102", "101500", "7", "A1"
    one.SeriesNumber, one.SeriesDescription = 4, f"T1 {view}"
    one.ReferringPhysicianName = ""
    one.SamplesPerPixel, one.PhotometricInterpretation = 1, "MONOCHROME2"
    one.BitsAllocated, one.BitsStored, one.HighBit, one.PixelRepresentation = 16, 12, 11, 0
    for name, value in more.items():
        setattr(one, name, value)
    return one


def store(one: Dataset, path: Path) -> Path:
    """Write it with its file meta information."""
    one.file_meta = FileMetaDataset()
    one.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    one.file_meta.MediaStorageSOPClassUID = one.SOPClassUID
    one.file_meta.MediaStorageSOPInstanceUID = one.SOPInstanceUID
    path.parent.mkdir(parents=True, exist_ok=True)
    one.save_as(path, enforce_file_format=True)
    return path


def scan(
    folder: Path,
    view: str = "axial",
    order: str = "forward",
    steps: tuple[float, float, float] = STEPS,
    **more: Any,
) -> Scan:
    """A single-frame series; `order` of its files: forward, backward or mixed."""
    affine = series_affine(view, steps=steps)
    pixels = image_at(grid_points(SHAPE, affine)).round().astype(np.uint16)
    numbers = list(range(SHAPE[2]))
    if order == "backward":
        numbers.reverse()
    if order == "mixed":
        np.random.default_rng(3).shuffle(numbers)
    paths = []
    for place, frame in enumerate(numbers):
        one = header(view, **more)
        one.SOPInstanceUID = generate_uid(entropy_srcs=[str(folder), str(frame)])
        one.InstanceNumber = place + 1
        along = directions(view)
        one.ImageOrientationPatient = [f"{c:.9f}" for c in along[:2].ravel()]
        one.ImagePositionPatient = [
            f"{c:.9f}" for c in LPS @ (affine[:3, :3] @ [0, 0, frame] + affine[:3, 3])
        ]
        one.PixelSpacing, one.SliceThickness = [steps[1], steps[0]], steps[2]
        one.Rows, one.Columns = SHAPE[1], SHAPE[0]
        one.PixelData = pixels[:, :, frame].T.tobytes()
        paths.append(store(one, folder / f"{place:03d}.dcm"))
    return Scan(folder, paths, affine)


def multiframe(folder: Path, view: str = "axial", order: str = "forward") -> Scan:
    """The same as one enhanced MR image."""
    affine, along = series_affine(view), directions(view)
    pixels = image_at(grid_points(SHAPE, affine)).round().astype(np.uint16)
    one = header(view, SOPClassUID="1.2.840.10008.5.1.4.1.1.4.1")
    one.SOPInstanceUID, one.InstanceNumber, one.NumberOfFrames = (
        generate_uid(entropy_srcs=[str(folder)]),
        1,
        SHAPE[2],
    )
    one.Rows, one.Columns = SHAPE[1], SHAPE[0]
    shared, orientation, measures = Dataset(), Dataset(), Dataset()
    orientation.ImageOrientationPatient = [f"{c:.9f}" for c in along[:2].ravel()]
    measures.PixelSpacing, measures.SliceThickness = [STEPS[1], STEPS[0]], STEPS[2]
    shared.PlaneOrientationSequence, shared.PixelMeasuresSequence = Items([orientation]), Items([measures])
    one.SharedFunctionalGroupsSequence = Items([shared])
    numbers = list(range(SHAPE[2]))[:: -1 if order == "backward" else 1]
    frames = []
    for place, frame in enumerate(numbers):
        group, position, content = Dataset(), Dataset(), Dataset()
        position.ImagePositionPatient = [
            f"{c:.9f}" for c in LPS @ (affine[:3, :3] @ [0, 0, frame] + affine[:3, 3])
        ]
        content.DimensionIndexValues = [place + 1]
        group.PlanePositionSequence, group.FrameContentSequence = Items([position]), Items([content])
        frames.append(group)
    one.PerFrameFunctionalGroupsSequence = Items(frames)
    one.PixelData = b"".join(pixels[:, :, frame].T.tobytes() for frame in numbers)
    return Scan(folder, [store(one, folder / "enhanced.dcm")], affine)


def two_stacks(folder: Path, view: str, other: str) -> Scan:
    """One enhanced image whose frames are those of `other`, echo 10 ms, and of `view`, echo 80 ms, by turns."""
    frames, planes = [], []
    for name, echo in ((other, 10.0), (view, 80.0)):
        read = pydicom.dcmread(multiframe(folder.with_name(f"{name} {echo}"), name).paths[0])
        groups = list(read.PerFrameFunctionalGroupsSequence)
        for group in groups:
            measured = Dataset()
            measured.EffectiveEchoTime = echo
            group.MREchoSequence = Items([measured])
            group.PlaneOrientationSequence = read.SharedFunctionalGroupsSequence[0].PlaneOrientationSequence
        frames.append(groups)
        planes.append(read.pixel_array)
    del read.SharedFunctionalGroupsSequence[0].PlaneOrientationSequence
    read.NumberOfFrames = 2 * SHAPE[2]
    read.PerFrameFunctionalGroupsSequence = Items(
        [group for pair in zip(*frames, strict=True) for group in pair]
    )
    read.PixelData = b"".join(plane.tobytes() for pair in zip(*planes, strict=True) for plane in pair)
    return Scan(folder, [store(read, folder / "enhanced.dcm")], series_affine(view))


def stored(
    shape: tuple[int, int, int],
    affine: np.ndarray,
    order: tuple[int, int, int],
    flips: tuple[bool, bool, bool],
) -> tuple[tuple[int, int, int], np.ndarray]:
    """The same grid with its axes in another order, and some reversed: shape and affine."""
    turn = np.eye(4)
    turn[:3] = 0
    out = tuple(shape[source] for source in order)
    for axis, source in enumerate(order):
        turn[source, axis] = -1 if flips[axis] else 1
        turn[source, 3] = out[axis] - 1 if flips[axis] else 0
    return out, affine @ turn  # type: ignore[return-value]


ORIGIN = Origin(
    run="a1b2c3d4",
    name="glioma-demo",
    model=MODEL,
    used=("t1", "t2", "flair"),
    missing=("t1ce",),
    step=1200,
    created=datetime(2026, 3, 4, 5, 6, 7, tzinfo=UTC),
    software="splitproto 0.1.0",
)


def segmentation(
    shape: tuple[int, int, int],
    affine: np.ndarray,
    *,
    task: Task | None = None,
    masks: np.ndarray | None = None,
    probabilities: np.ndarray | None = None,
    origin: Origin = ORIGIN,
) -> Segmentation:
    """The patient's on a grid."""
    if masks is None:
        masks = inside(grid_points(shape, affine))
    return Segmentation("P-0001", task or glioma("brats"), masks, affine, origin, probabilities)


@pytest.fixture(scope="session")
def patients() -> SimpleNamespace:
    """The helpers above, for the tests of this folder."""
    return SimpleNamespace(
        scan=scan, multiframe=multiframe, two_stacks=two_stacks,
        inside=inside, grid_points=grid_points, image_at=image_at, stored=stored,
        segmentation=segmentation, header=header, store=store, LPS=LPS, SHAPE=SHAPE, STEPS=STEPS, ORIGIN=ORIGIN,
        MODEL=MODEL, affine=series_affine, turns=list(product([False, True], repeat=3)),
    )  # fmt: skip


Make = Callable[..., Scan]
