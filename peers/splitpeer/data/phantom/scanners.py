"""The phantom's patients, as hospitals scan them: each in another pose, on another grid, as DICOM.

Every hospital images the same people. What differs is where the head lies in its scanner, how its slices run and how
thick they are, and what its export does to the files.
"""

from __future__ import annotations

import csv
import gzip
import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from splitpeer.data.geometry import Triple
from splitpeer.data.phantom.anatomy import Shape, Spacing
from splitpeer.data.phantom.cohort import patient_name
from splitpeer.data.phantom.render import render_patient
from splitpeer.data.phantom.series import PROTOCOLS, Oddities, write_series
from splitpeer.data.regrid import onto
from splitpeer.errors import ConfigError, DataError
from splitpeer.storage import durable


@dataclass(frozen=True)
class Scanner:
    """How one hospital images a head."""

    shape: Shape
    """Voxels along left-right, back-front and feet-head of the head."""
    spacing_mm: Spacing
    plane: str = "axial"
    """Which way the slices lie: axial, sagittal or coronal."""
    turned: tuple[float, float, float] = (8.0, 6.0, 6.0)
    """Standard deviation of the head's pitch, roll and yaw, in degrees."""
    shifted_mm: float = 20.0
    """The same of its position, along each axis."""
    follows: bool = True
    """Whether the slices are planned along the head (oblique in the scanner), or run straight through the scanner."""
    enhanced: bool = False
    oddities: Oddities = field(default_factory=Oddities)
    own_ids: bool = False
    """Whether this hospital has ids of its own, for which it keeps a list."""


SCANNERS: Mapping[str, Scanner] = {
    "t1": Scanner((58, 104, 84), (3.0, 2.0, 2.0), "sagittal"),
    "t1ce": Scanner((100, 100, 40), (2.0, 2.0, 4.0), enhanced=True),
    "t2": Scanner(
        (108, 108, 40), (1.8, 1.8, 4.2), oddities=Oddities(reverse=True, syntax="rle"), own_ids=True
    ),
    "flair": Scanner(
        (96, 50, 92), (2.0, 4.0, 2.0), "coronal", follows=False, oddities=Oddities(slope=0.5, intercept=-7)
    ),
}
"""One hospital per contrast, no two alike."""

_AXES: Mapping[str, tuple[tuple[int, int], tuple[int, int], tuple[int, int]]] = {
    "axial": ((0, -1), (1, -1), (2, 1)),
    "sagittal": ((1, -1), (2, -1), (0, -1)),
    "coronal": ((0, -1), (2, -1), (1, -1)),
}
"""Head axis (x, y, z) and direction of columns, rows and slices, as radiologists look at them."""


@dataclass(frozen=True)
class Scan:
    """`voxels`: int16 [column, row, slice]; `label`: uint8, the same grid, MSD convention; `affine`: voxel to the
    scanner's RAS millimetres; `pose`: rigid 4x4, from the head's millimetres (those of `render_patient`, so that all
    hospitals share them) to the scanner's."""

    voxels: NDArray[np.int16]
    label: NDArray[np.uint8]
    affine: NDArray[np.float64]
    pose: NDArray[np.float64]


def scan(seed: int, index: int, modality: str, scanner: Scanner) -> Scan:
    """Image patient `index` of the cohort `seed`; the same arguments give the same voxels."""
    patient = render_patient(seed, index, scanner.shape, scanner.spacing_mm)
    pose = _pose(seed, index, modality, scanner)
    axes = _AXES[scanner.plane]
    turned = _turn(patient.images[modality], patient.affine, axes)
    label, _ = _turn(patient.labels, patient.affine, axes)
    voxels, affine = turned[0], pose @ turned[1]
    if not scanner.follows:
        shape, straight = _straight(voxels.shape, affine)
        voxels = onto(voxels, affine, shape, straight, order=1)
        label, affine = onto(label, affine, shape, straight, order=0), straight
    return Scan(np.rint(voxels).astype(np.int16), label.astype(np.uint8), affine, pose)


def write_dicom_phantom(
    folder: Path | str,
    patients: int,
    *,
    seed: int = 0,
    scanners: Mapping[str, Scanner] = SCANNERS,
    labels: str = "t1ce",
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Write `patients` patients below `folder`, as each hospital's PACS would export them.

    `MODALITY/dicom/PATIENT/...` has a localizer and the series of that hospital; `labels/PATIENT.nii.gz` are masks on
    the grid of the hospital `labels`; `MODALITY/ids.csv` (columns hospital,study) is the list of one that has own ids.
    The people are those of `splitpeer data phantom` with the same seed, and so are their names (`phantom-001`).

    Returns:
        A summary: folder, patients, seed, files (how many there are), and the poses, "modality/patient" -> 4x4 list.

    Raises:
        ConfigError: an argument is impossible.
        DataError: nilearn is missing, or the folder cannot be written.
    """
    if patients < 1:
        raise ConfigError(f"patients = {patients}: a phantom needs at least 1")
    if labels not in scanners:
        raise ConfigError(f"labels = {labels!r}: name one of {', '.join(scanners)}")
    root, files, poses = Path(folder), 0, {}
    try:
        for index in range(patients):
            name = patient_name(index, patients)
            for modality, scanner in scanners.items():
                taken = scan(seed, index, modality, scanner)
                files += len(write_patient(root / modality / "dicom", name, modality, scanner, taken))
                poses[f"{modality}/{name}"] = taken.pose.tolist()
                if modality == labels:
                    _write_label(root / "labels" / f"{name}.nii.gz", taken)
            if progress:
                progress(index + 1, patients)
        for modality, scanner in scanners.items():
            if scanner.own_ids:
                _write_ids(root / modality / "ids.csv", modality, patients)
    except OSError as error:
        raise DataError(
            f"{error.filename or root}: cannot be written ({error.strerror}): check the folder"
        ) from None
    return {"folder": str(root), "patients": patients, "seed": seed, "files": files, "poses": poses}


def write_patient(folder: Path, name: str, modality: str, scanner: Scanner, taken: Scan) -> list[Path]:
    """One patient's study at one hospital: a localizer of three slices, and the series. Returns the files."""
    own = hospital_id(modality, name) if scanner.own_ids else name
    if modality not in PROTOCOLS:
        raise ConfigError(f"modality {modality!r}: the phantom has {', '.join(PROTOCOLS)}")
    middle = taken.voxels.shape[2] // 2
    localizer = taken.affine.copy()
    localizer[:3, 3] += (middle - 5) * localizer[:3, 2]
    localizer[:3, 2] *= 5
    described = {
        "t1": "t1_mprage_sag_p2_iso",
        "t1ce": "T1 3D tra post KM",
        "t2": "T2w TSE axial",
        "flair": "t2_FLAIR_cor dark-fluid",
    }
    first = write_series(
        folder / own / "0001",
        taken.voxels[:, :, [middle - 5, middle, middle + 5]],
        localizer,
        patient_id=own,
        description="localizer",
        modality="t1",
        kind=("ORIGINAL", "PRIMARY", "LOCALIZER", "NONE"),
    )
    return first + write_series(
        folder / own / "0002",
        taken.voxels,
        taken.affine,
        patient_id=own,
        description=described[modality],
        modality=modality,
        number=2,
        enhanced=scanner.enhanced,
        oddities=scanner.oddities,
    )


def hospital_id(modality: str, name: str) -> str:
    """A patient's id at a hospital that has ids of its own."""
    return f"{modality.upper()}{700000 + 137 * int(name.rpartition('-')[2])}"


# --- inside ------------------------------------------------------------------------------------------------


def _pose(seed: int, index: int, modality: str, scanner: Scanner) -> NDArray[np.float64]:
    rng = np.random.default_rng([seed, index, *modality.encode()])
    pose = np.eye(4)
    for degrees, (i, j) in zip(rng.normal(0, scanner.turned), ((1, 2), (0, 2), (0, 1)), strict=True):
        turn = np.eye(4)
        angle = np.deg2rad(degrees)
        turn[i, i] = turn[j, j] = np.cos(angle)
        turn[i, j], turn[j, i] = -np.sin(angle), np.sin(angle)
        pose = turn @ pose
    pose[:3, 3] = rng.normal(0, scanner.shifted_mm, 3)
    return pose


def _turn(
    voxels: NDArray[Any],
    affine: NDArray[np.float64],
    axes: tuple[tuple[int, int], tuple[int, int], tuple[int, int]],
) -> tuple[NDArray[Any], NDArray[np.float64]]:
    """The same voxels with other axes first, some of them reversed."""
    out, turned = voxels.transpose([axis for axis, _ in axes]), affine.copy()
    for place, (axis, direction) in enumerate(axes):
        turned[:3, place] = affine[:3, axis] * direction
        if direction < 0:
            turned[:3, 3] += affine[:3, axis] * (voxels.shape[axis] - 1)
            out = np.flip(out, place)
    return np.ascontiguousarray(out), turned


def _straight(shape: tuple[int, ...], affine: NDArray[np.float64]) -> tuple[Triple, NDArray[np.float64]]:
    """A grid along the scanner's own axes with the same spacing, centre and, a little larger, extent."""
    lengths = np.linalg.norm(affine[:3, :3], axis=0)
    straight = np.eye(4)
    straight[:3, :3] = np.rint(affine[:3, :3] / lengths) * lengths
    if abs(np.linalg.det(straight)) < 1e-6:
        raise ConfigError("turned by more than 45 degrees: a straight grid needs less")
    x, y, z = (int(n * 1.08) for n in shape)
    centre = affine[:3, :3] @ ((np.array(shape) - 1) / 2) + affine[:3, 3]
    straight[:3, 3] = centre - straight[:3, :3] @ ((np.array([x, y, z]) - 1) / 2)
    return (x, y, z), straight


def _write_label(path: Path, taken: Scan) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nib.Nifti1Image(taken.label, taken.affine)
    image.header.set_xyzt_units("mm")
    durable.replace(path, gzip.compress(image.to_bytes(), 1, mtime=0), mode=0o666, sync=False)


def _write_ids(path: Path, modality: str, patients: int) -> None:
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(("hospital", "study"))
    names = [patient_name(index, patients) for index in range(patients)]
    rows.writerows((hospital_id(modality, name), name) for name in names)
    durable.replace(path, text.getvalue().encode(), mode=0o666, sync=False)
