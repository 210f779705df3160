"""Volumes of a site by patient key: read when needed, on the job's grid, normalised, in a bounded cache."""

from __future__ import annotations

import logging
import math
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import numpy as np

from splitpeer.data.files import Case
from splitpeer.data.geometry import SPACING_TOLERANCE, Geometry, Millimetres, Triple
from splitpeer.data.labels import regions, task_of, whole
from splitpeer.data.layouts import subject
from splitpeer.data.mask_values import MaskCensus
from splitpeer.data.nifti import NiftiHeader, Rules, read_header, read_voxels
from splitpeer.data.normalisation import DEFAULT, Normaliser
from splitpeer.data.pseudonym import keyed, pseudonym, salt_check
from splitpeer.data.quality import image_warnings
from splitpeer.data.resampling import resample, resampled_grid
from splitpeer.data.task import Task
from splitpeer.errors import DataError, PatientUnusable
from splitpeer.logs import event, handle
from splitproto.causes import OF_A_PATIENT

log = logging.getLogger(__name__)

Box = tuple[tuple[int, int], tuple[int, int], tuple[int, int]]
"""Half-open ranges of voxels in x, y, z."""


def prepare(
    case: Case,
    voxels: np.ndarray,
    header: NiftiHeader,
    *,
    labels: Task | str | None = None,
    normalisation: Normaliser = DEFAULT,
    spacing: Millimetres | None = None,
    rules: Rules | None = None,
) -> np.ndarray:
    """What training gets of a case that was read: the one code path for training and for checks.

    SP-11-21: on the job's grid, that is, resampled to `spacing` (mm; None keeps the file's own) where it differs.
    SP-11-22: an image is normalised, float32 [1, x, y, z]; a mask, where `labels` is its task (or names the convention
    of a glioma's), becomes regions, uint8 [regions, x, y, z].

    Raises DataError that names the file.
    """
    stored, wanted = header.geometry, grid_of(case, header, spacing, rules)
    if wanted != stored:
        voxels = resample(voxels, stored, wanted, nearest=labels is not None)
    try:
        return normalisation.apply(voxels)[None] if labels is None else regions(voxels, labels)
    except DataError as error:
        cause = error.cause if labels is None else "mask-values"
        raise DataError(f"{case.path}: {error}", cause) from None


def grid_of(
    case: Case, header: NiftiHeader, spacing: Millimetres | None = None, rules: Rules | None = None
) -> Geometry:
    """The grid on which a case is trained: its own, or resampled to `spacing` where that differs.

    Raises DataError where that would take more voxels than are allowed.
    """
    grid, most = header.geometry, (rules or Rules()).max_voxels
    if spacing is None or np.abs(np.subtract(grid.spacing, spacing)).max() <= SPACING_TOLERANCE:
        return grid
    grid = resampled_grid(grid, spacing)
    if math.prod(grid.shape) > most:
        shape = "x".join(map(str, grid.shape))
        raise DataError(
            f"{case.path}: {shape} voxels when resampled to {spacing} mm, more than {most}: "
            "choose a larger spacing, or raise [data] max_voxels",
            "too-large",
        )
    return grid


class Volumes:
    """The images of one modality, or the masks, of a site, as `prepare` makes them.

    `labels`: the task of the masks, or the convention of a glioma's; None: these are images, which `normalisation` is
    for. Safe to use from several threads. Errors name the file (DataError); nothing about a patient is logged.
    """

    def __init__(
        self,
        cases: Iterable[Case],
        *,
        salt: bytes,
        spacing: Millimetres | None = None,
        labels: Task | str | None = None,
        normalisation: Normaliser = DEFAULT,
        cache_mib: int = 1024,
        rules: Rules | None = None,
        census: MaskCensus | None = None,
    ) -> None:
        if spacing is not None and not (len(spacing) == 3 and all(0 < mm < 1000 for mm in spacing)):
            raise DataError(f"spacing {spacing}: give three positive numbers of millimetres")
        self.labels = task_of(labels) if labels is not None else None
        self.normalisation = normalisation
        self._salt, self._cases = salt, keyed(salt, cases)
        self.salt_check = salt_check(salt)
        self.spacing, self.rules = spacing, rules or Rules()
        self._lock = threading.Lock()
        self._cache: OrderedDict[bytes, np.ndarray] = OrderedDict()
        self._cached_bytes = 0
        self._warned = self._rounds = False
        self._census = census
        self._capacity = cache_mib * 2**20
        self._geometries: dict[bytes, Geometry] = {}
        self.warnings: dict[bytes, list[str]] = {}
        """Warnings, with the file's name, about the volumes that `geometry` or `read` looked at."""

    def learn(self, cases: Iterable[Case]) -> None:
        """Patients who came after the start; of those who are known, nothing changes."""
        self._cases = {**keyed(self._salt, cases), **self._cases}

    def keys(self) -> list[bytes]:
        """The patient keys, ascending: an order that reveals nothing about the patients."""
        return sorted(self._cases)

    @property
    def cases(self) -> Mapping[bytes, Case]:
        """The local case behind each key."""
        return self._cases

    def case(self, key: bytes) -> Case:
        """The local case behind a key. Raises DataError for a key this site does not hold."""
        try:
            return self._cases[key]
        except KeyError:
            raise not_held(key) from None

    def key_of(self, patient: str) -> bytes:
        """The key of a patient's id, whether there is a file or not."""
        return pseudonym(self._salt, patient)

    def subjects(self) -> dict[bytes, str]:
        """The person behind each key: BraTS 2023 holds several time points of one person. Local knowledge."""
        return {key: subject(case.patient) for key, case in self._cases.items()}

    def geometry(self, key: bytes) -> Geometry:
        """The grid of a volume as `window` cuts it, from the file's header alone."""
        if key not in self._geometries:
            case = self.case(key)
            with _blaming(key):
                header = read_header(case, self.rules)
                self.warnings[key] = [f"{case.path}: {text}" for text in header.warnings]
                self._geometries[key] = grid_of(case, header, self.spacing, self.rules)
        return self._geometries[key]

    def window(self, key: bytes, origin: Triple, size: Triple) -> np.ndarray:
        """SP-11-23: a copy of the voxels from `origin` (may be negative) on, zero outside the volume.

        Returns float32 [1, *size], for masks uint8 [regions, *size].
        """
        volume = self._volume(key)
        if min(size) < 1:
            raise DataError(f"window {size}: give three sizes of at least one voxel")
        out = np.zeros((volume.shape[0], *size), volume.dtype)
        inside, taken = [slice(None)], [slice(None)]
        for start, length, extent in zip(origin, size, volume.shape[1:], strict=True):
            low, high = max(start, 0), min(start + length, extent)
            if low >= high:
                return out
            inside.append(slice(low - start, high - start))
            taken.append(slice(low, high))
        out[tuple(inside)] = volume[tuple(taken)]
        return out

    def read(self, key: bytes) -> None:
        """Read a volume to its end, as training will, for what is wrong with it."""
        case = self.case(key)
        with _blaming(key):
            voxels, header = self._read(key, case)
            self._prepare(case, voxels, header)
        if self.labels is None:
            texts = (*header.warnings, *image_warnings(voxels, self.normalisation))
            self.warnings[key] = [f"{case.path}: {text}" for text in texts]

    def extent(self, key: bytes) -> Box:
        """The smallest box around the non-zero voxels: the brain of an image, the tumour of a mask.

        The whole volume where all voxels are zero.
        """
        filled = np.asarray(self._volume(key).any(axis=0))
        x, y, z = (_span(np.asarray(filled.any(axis=others))) for others in ((1, 2), (0, 2), (0, 1)))
        return x, y, z

    def _volume(self, key: bytes) -> np.ndarray:
        with self._lock:
            if key in self._cache:
                self._cache.move_to_end(key)
                return self._cache[key]
        # Read without the lock: others continue meanwhile. Two threads may read one file twice, with equal
        # results.
        case = self.case(key)
        with _blaming(key):
            volume = self._prepare(case, *self._read(key, case))
        volume.setflags(write=False)
        with self._lock:
            if volume.nbytes > self._capacity:
                level = logging.DEBUG if self._warned else logging.WARNING
                self._warned = True
                log.log(
                    level, "a volume of %d MiB does not fit the cache: raise cache_mib", volume.nbytes >> 20
                )
            elif key not in self._cache:
                self._cache[key] = volume
                self._cached_bytes += volume.nbytes
                while self._cached_bytes > self._capacity:
                    self._cached_bytes -= self._cache.popitem(last=False)[1].nbytes
        return volume

    def _read(self, key: bytes, case: Case) -> tuple[np.ndarray, NiftiHeader]:
        voxels, header = read_voxels(case, self.rules)
        if self._geometries.get(key, grid := grid_of(case, header, self.spacing, self.rules)) != grid:
            # Windows were agreed on the grid that was listed.
            raise DataError(f"{case.path}: its grid has changed since it was listed: put it back", "grid")
        if self._census is not None:
            self._census.add(case.path, voxels)
        if self.labels is not None and not self._rounds and whole(voxels)[1]:
            self._rounds = True
            event(log, "labels.rounded", logging.WARNING, file=str(case.path), hint="save masks as integers")
        return voxels, header

    def _prepare(self, case: Case, voxels: np.ndarray, header: NiftiHeader) -> np.ndarray:
        return prepare(
            case,
            voxels,
            header,
            labels=self.labels,
            normalisation=self.normalisation,
            spacing=self.spacing,
            rules=self.rules,
        )


def not_held(key: bytes) -> DataError:
    """The error for a patient that this site does not have."""
    text = "not in this site's data: compare the patient salts and lists of the sites"
    return DataError(f"patient {handle(key)}: {text}")


def _span(filled: np.ndarray) -> tuple[int, int]:
    """From the first to one past the last that is set of bool [n]; all if none is."""
    hits = np.flatnonzero(filled)
    return (int(hits[0]), int(hits[-1]) + 1) if len(hits) else (0, len(filled))


@contextmanager
def _blaming(key: bytes) -> Iterator[None]:
    """A problem of one patient's file, as an error that names the patient."""
    try:
        yield
    except DataError as error:
        cause = "malformed" if error.cause == "data" else error.cause
        if cause not in OF_A_PATIENT:
            raise
        raise PatientUnusable(key, cause, str(error)) from None
