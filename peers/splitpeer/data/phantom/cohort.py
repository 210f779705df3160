"""A cohort of phantom patients on disk: what the demo trains on, and a stand-in wherever real patients may not go.

One folder holds the same patients twice: as MSD Task01 (one 4-D file per patient), and as four hospitals and a label
holder would have them (one 3-D file per patient and contrast). Nothing in it comes from a person: the anatomy is the
MNI152 average, everything else is drawn from a seed.
"""

from __future__ import annotations

import gzip
import json
import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from splitpeer.data.modalities import MODALITIES
from splitpeer.data.phantom.anatomy import Shape, Spacing, TissueMaps
from splitpeer.data.phantom.render import (
    DEFAULT_SHAPE,
    DEFAULT_SPACING_MM,
    Phantom,
    render_patient,
    tissue_maps,
)
from splitpeer.errors import ConfigError, DataError
from splitpeer.storage import durable

__all__ = ["DEFAULT_SHAPE", "DEFAULT_SPACING_MM", "Phantom", "render_patient", "write_phantom"]

MARKER = "phantom.json"
# Raise whenever the same seed gives other images: a folder of an older rendering is then not taken for complete.
RENDERING = 1
_MSD_NAMES = {"flair": "FLAIR", "t1": "T1w", "t1ce": "t1gd", "t2": "T2w"}
_MSD_LABELS = {"0": "background", "1": "edema", "2": "non-enhancing tumor", "3": "enhancing tumour"}

Progress = Callable[[int, int], None]


def write_phantom(
    folder: Path | str,
    patients: int,
    *,
    seed: int = 0,
    shape: Shape = DEFAULT_SHAPE,
    spacing_mm: Spacing = DEFAULT_SPACING_MM,
    progress: Progress | None = None,
    workers: int | None = None,
) -> dict[str, object]:
    """Writes `patients` patients below `folder`; files that are already there are left as they are.

    Layout: `msd/` (dataset.json, imagesTr/BRATS_001.nii.gz with the modality last, labelsTr/), and `flair/`, `t1/`,
    `t1ce/`, `t2/`, `labels/` with `phantom-001.nii.gz`; BRATS_n and phantom-n are one patient. Images int16, labels
    uint8 in the MSD convention. The bytes depend on the arguments and library versions alone, not on `workers`.

    Args:
        shape: voxels along x, y, z.
        spacing_mm: size of a voxel.
        progress: called with (patients done, patients) after each patient.
        workers: processes; None for as many as this process may use cores.

    Returns:
        A summary for a person or a log: folder, patients, written (how many were not there yet), seed, shape,
        spacing_mm.

    Raises:
        ConfigError: an argument is impossible.
        DataError: the folder holds something else, cannot be written, or nilearn is missing.
    """
    _check(patients, seed, shape, spacing_mm, workers)
    root = Path(folder)
    plan = {
        "phantom": RENDERING,
        "seed": seed,
        "patients": patients,
        "shape": [*map(int, shape)],
        "spacing_mm": [*map(float, spacing_mm)],
    }
    try:
        _claim(root, plan)
        missing = [
            index
            for index in range(patients)
            if not all(p.exists() for p in _PatientFiles.of(root, patients, index))
        ]
        jobs = [_Job(root, patients, index, seed, shape, spacing_mm) for index in missing]
        _run(jobs, patients, workers or len(os.sched_getaffinity(0)), progress)
        _write(root / "msd" / "dataset.json", _dataset_json(patients))
    except OSError as error:
        raise DataError(
            f"{error.filename or root}: cannot be written ({error.strerror}): check the folder"
        ) from None
    summary = {key: value for key, value in plan.items() if key != "phantom"}
    return {"folder": str(root), **summary, "written": len(missing)}


def patient_name(index: int, patients: int) -> str:
    """The file stem (and patient id) of patient `index`, counted from 0, in the folders of the sites."""
    return f"phantom-{_number(index, patients)}"


@dataclass(frozen=True)
class _PatientFiles:
    """Where one patient's files are."""

    images: dict[str, Path]
    labels: Path
    msd_image: Path
    msd_label: Path

    @classmethod
    def of(cls, root: Path, patients: int, index: int) -> _PatientFiles:
        site, msd = f"{patient_name(index, patients)}.nii.gz", f"BRATS_{_number(index, patients)}.nii.gz"
        return cls(
            {modality: root / modality / site for modality in MODALITIES},
            root / "labels" / site,
            root / "msd" / "imagesTr" / msd,
            root / "msd" / "labelsTr" / msd,
        )

    def __iter__(self) -> Iterator[Path]:
        return iter((*self.images.values(), self.labels, self.msd_image, self.msd_label))


@dataclass(frozen=True)
class _Job:
    root: Path
    patients: int
    index: int
    seed: int
    shape: Shape
    spacing_mm: Spacing


def _check(patients: int, seed: int, shape: Shape, spacing_mm: Spacing, workers: int | None) -> None:
    if patients < 1:
        raise ConfigError(f"patients = {patients}: a phantom needs at least 1")
    if seed < 0:
        raise ConfigError(f"seed = {seed}: must be 0 or more")
    if len(shape) != 3 or min(shape) < 8 or max(shape) > 512:
        raise ConfigError(f"shape = {tuple(shape)}: three sizes of 8 to 512 voxels, such as 96 96 24")
    if len(spacing_mm) != 3 or not all(0.5 <= step <= 20 for step in spacing_mm):
        raise ConfigError(f"spacing_mm = {tuple(spacing_mm)}: three sizes of 0.5 to 20 mm, such as 2.1 2.1 6")
    if workers is not None and workers < 1:
        raise ConfigError(f"workers = {workers}: at least 1 process")


def _claim(root: Path, plan: dict[str, object]) -> None:
    """Marks the folder as ours before anything else is in it; refuses one that holds anything else."""
    marker = root / MARKER
    if marker.is_file():
        try:
            found = json.loads(marker.read_text("utf-8"))
        except ValueError:
            found = None
        if found != plan:
            raise DataError(
                f"{marker}: another phantom is here already: name another folder or delete this one"
            )
    else:
        root.mkdir(parents=True, exist_ok=True)
        if any(root.iterdir()):
            raise DataError(f"{root}: not empty and not a phantom: name another folder")
        _write(marker, _json(plan))
    for name in (*MODALITIES, "labels", "msd/imagesTr", "msd/labelsTr"):
        (root / name).mkdir(parents=True, exist_ok=True)


def _run(jobs: list[_Job], patients: int, workers: int, progress: Progress | None) -> None:
    if not jobs:
        return
    maps = tissue_maps()
    done = patients - len(jobs)
    if min(workers, len(jobs)) == 1:
        for job in jobs:
            _write_patient(job, maps)
            done += 1
            if progress:
                progress(done, patients)
        return
    # Spawned: forking a process that has threads (torch, ZeroMQ) may deadlock.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(workers, len(jobs)), context, _set_maps, (maps,)) as pool:
        futures = [pool.submit(_write_patient, job) for job in jobs]
        try:
            for future in as_completed(futures):
                future.result()
                done += 1
                if progress:
                    progress(done, patients)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


_maps: TissueMaps | None = None


def _set_maps(maps: TissueMaps) -> None:
    """In a worker: the maps come from the parent, because importing nilearn takes longer than ten patients."""
    global _maps
    _maps = maps


def _write_patient(job: _Job, maps: TissueMaps | None = None) -> None:
    patient = render_patient(job.seed, job.index, job.shape, job.spacing_mm, maps=maps or _maps)
    files = _PatientFiles.of(job.root, job.patients, job.index)
    images = {name: image.astype(np.int16) for name, image in patient.images.items()}
    for name, path in files.images.items():
        _write(path, _nifti(images[name], patient.affine))
    _write(files.labels, label := _nifti(patient.labels, patient.affine))
    _write(files.msd_label, label)
    _write(files.msd_image, _nifti(np.stack([images[name] for name in MODALITIES], axis=-1), patient.affine))


def _nifti(voxels: NDArray[np.generic], affine: NDArray[np.float64]) -> bytes:
    image = nib.Nifti1Image(voxels, affine)
    image.set_sform(affine, code="aligned")
    image.set_qform(affine, code="aligned")
    image.header.set_xyzt_units("mm")
    # Level 1: noise hardly compresses, higher levels only cost time. Without a time stamp, so that bytes repeat.
    return gzip.compress(image.to_bytes(), compresslevel=1, mtime=0)


def _dataset_json(patients: int) -> bytes:
    names = [f"BRATS_{_number(index, patients)}.nii.gz" for index in range(patients)]
    return _json(
        {
            "name": "phantom",
            "description": "Synthetic gliomas in the MNI152 average brain; no patient's data",
            "licence": "as the software that made it",
            "tensorImageSize": "4D",
            "modality": {str(k): _MSD_NAMES[name] for k, name in enumerate(MODALITIES)},
            "labels": _MSD_LABELS,
            "numTraining": patients,
            "numTest": 0,
            "training": [{"image": f"./imagesTr/{name}", "label": f"./labelsTr/{name}"} for name in names],
            "test": [],
        }
    )


def _json(content: dict[str, object]) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode()


def _number(index: int, patients: int) -> str:
    return str(index + 1).zfill(max(3, len(str(patients))))


def _write(path: Path, content: bytes) -> None:
    """All or nothing: a file under its final name is complete."""
    durable.replace(path, content, mode=0o666, sync=False)
