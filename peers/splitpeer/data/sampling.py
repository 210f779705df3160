"""Which windows of which patients make a batch: drawn from the masks, named by patient key and origin."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np

from splitpeer.data.geometry import Geometry, Triple
from splitpeer.data.volumes import Box
from splitpeer.errors import ConfigError, JobFailed
from splitproto.records import Sample

DIGEST_CONTEXT = b"splitproto batch v1"
_TUMOUR_POINTS = 512  # per patient: enough to reach every part of a tumour, and small


def batch_digest(
    step: int, samples: Sequence[Sample], seed: int | None, places: Sequence[int] | None = None
) -> bytes:
    """SP-11.6-1: the commitment to a batch that every site checks: 32 octets.

    SHA-256 over "splitproto batch v1" (19 ASCII octets) | step, 8 octets | seed: one octet 0 for none, or one
    octet 1 and 8 octets | number of samples, 4 octets | for each sample in order: its key's length, 1 octet;
    the key; origin x, y, z, 4 octets each, two's complement; then each of `places`, 4 octets, if they are said.
    All numbers big-endian.
    """
    digest = hashlib.sha256(DIGEST_CONTEXT + step.to_bytes(8, "big"))
    digest.update(b"\0" if seed is None else b"\1" + seed.to_bytes(8, "big"))
    digest.update(len(samples).to_bytes(4, "big"))
    for sample in samples:
        digest.update(len(sample.key).to_bytes(1, "big") + sample.key)
        for voxel in sample.origin:
            digest.update(int(voxel).to_bytes(4, "big", signed=True))
    for place in places or ():
        digest.update(place.to_bytes(4, "big"))
    return digest.digest()


def split_patients(
    keys: Sequence[bytes],
    validation: float | int,
    seed: int,
    subjects: Mapping[bytes, str] | None = None,
) -> tuple[list[bytes], list[bytes]]:
    """(training, validation) keys, each ascending; whole patients only, whatever the order of `keys`.

    `validation`: a fraction (float, 0 to 1) or a number of patients (int). `subjects` names the person
    behind a key where one person has several (time points): then persons are counted and never split.
    Raises ConfigError if no patient would be left to train on.
    """
    groups: dict[object, list[bytes]] = {}
    for key in sorted(set(keys)):
        groups.setdefault(subjects.get(key, key) if subjects else key, []).append(key)
    people = list(groups.values())
    count = round(validation * len(people)) if isinstance(validation, float) else validation
    if not 0 <= count < len(people):
        raise ConfigError(
            f"validation = {validation} of {len(people)} patients leaves none to train on: "
            f"choose a smaller part"
        )
    order = np.random.Generator(np.random.PCG64(seed)).permutation(len(people))
    held = {key for index in order[:count] for key in people[index]}
    return sorted(set(keys) - held), sorted(held)


class Grids(Protocol):
    """The grids of masks by patient: all that windows depend on which are drawn without asking where a tumour is."""

    def geometry(self, key: bytes) -> Geometry:
        """Of a patient."""
        ...


@runtime_checkable
class _Masks(Grids, Protocol):
    def window(self, key: bytes, origin: Triple, size: Triple) -> np.ndarray: ...


@dataclass(frozen=True)
class _Tumour:
    """Where one mask is not empty: slices z (2-D windows) and some voxels [n, 3] (3-D windows)."""

    slices: np.ndarray
    points: np.ndarray


class TrainingSchedule:
    """Deterministic batches with random access: a batch depends on its number alone.

    The first `complete_first` steps draw from `complete` only, the patients with every seat.
    `window` (h, w, 1) draws axial slices centred in x and y; any other draws 3-D patches. Patients come in
    shuffled rounds, each once per round. A sample is drawn around tumour with probability `positive_fraction`
    (and then holds at least one tumour voxel, where the patient has any in reach), else anywhere in the
    volume, or in the box that `extents` gives for the patient (a site that sees the image knows where the
    head is; masks do not tell). `seed` of the augmentation is below 2**63.

    Masks are read when their patient is first drawn, once; with `positive_fraction` 0 none is, and grids are enough.
    Raises ConfigError for settings that cannot be.
    """

    def __init__(
        self,
        keys: Sequence[bytes],
        labels: Grids,
        *,
        window: Triple,
        batch: int,
        steps: int,
        seed: int,
        positive_fraction: float = 0.5,
        extents: Mapping[bytes, Box] | None = None,
        complete: Collection[bytes] | None = None,
        complete_first: int = 0,
    ) -> None:
        if not keys:
            raise ConfigError(
                "no patient to train on: give at least one that has enough of the job's seats ([data] min_seats)"
            )
        if min(window) < 1 or batch < 1 or steps < 0 or not 0 <= positive_fraction <= 1 or seed < 0:
            raise ConfigError(
                f"window {window}, batch {batch}, steps {steps}, seed {seed}, positive_fraction "
                f"{positive_fraction}: make sizes positive, the seed not negative, "
                f"the fraction 0 to 1"
            )
        self.keys = sorted(set(keys))
        self._complete = self.keys if complete is None else sorted(set(complete).intersection(keys))
        self._complete_first = complete_first
        if complete_first and not self._complete:
            raise ConfigError(
                f"complete_first = {complete_first}, but no patient to train on is complete: set it to 0"
            )
        self.window = window
        self.batch_size = batch
        self.steps = steps
        self._labels = labels
        self._seed = seed
        self._positive = positive_fraction
        self._extents = extents or {}
        self._tumours: dict[bytes, _Tumour] = {}
        self._round: tuple[tuple[int, int], np.ndarray] = ((0, 0), np.empty(0, int))

    def __len__(self) -> int:
        return self.steps

    def withdraw(self, keys: Iterable[bytes]) -> None:
        """SP-11.13-5: from now on batches are drawn as if these patients had never been there.

        Raises: JobFailed: no patient is left.
        """
        self.keys = sorted(set(self.keys) - set(keys))
        self._complete = sorted(set(self._complete) - set(keys))
        self._round = ((0, 0), np.empty(0, int))
        if not self.keys:
            raise JobFailed("no patient is left to train with: the files of all of them cannot be used")

    def batch(self, step: int) -> tuple[list[Sample], int]:
        """The samples of `step` (from 0) and the seed of their augmentation."""
        if not 0 <= step < self.steps:
            raise JobFailed(f"step {step} is outside this job's {self.steps} steps: start a longer job")
        rng = _generator(self._seed, 0, step)
        seed = int(rng.integers(2**63))
        first = step * self.batch_size
        return [self._draw(self._patient(first + i), rng) for i in range(self.batch_size)], seed

    def _patient(self, number: int) -> bytes:
        """The patient of the number-th sample of the whole training."""
        early = self._complete_first * self.batch_size
        purpose, pool = (2, self._complete) if number < early else (1, self.keys)
        if not pool:
            raise JobFailed(
                f"no complete patient is left to train with before step {self._complete_first + 1}: start a new run "
                "with a smaller [data] complete_first"
            )
        turn, place = divmod(number if number < early else number - early, len(pool))
        if self._round[0] != (purpose, turn):
            self._round = ((purpose, turn), _generator(self._seed, purpose, turn).permutation(len(pool)))
        return pool[int(self._round[1][place])]

    def _draw(self, key: bytes, rng: np.random.Generator) -> Sample:
        """A window of a patient; see the class."""
        shape = self._labels.geometry(key).shape
        positive = rng.random() < self._positive
        tumour = self._tumour(key) if positive else None
        box = self._extents.get(key, tuple((0, n) for n in shape))
        if self.window[2] == 1:
            slices = tumour.slices if tumour is not None and tumour.slices.size else np.arange(*box[2])
            z = int(slices[rng.integers(slices.size)])
            return Sample(key, (*self._centred(shape)[:2], z))
        if tumour is not None and len(tumour.points):
            # Anywhere in the window, not always in its middle: the network must not learn the place.
            point = tumour.points[rng.integers(len(tumour.points))]
            origin = point - rng.integers(0, self.window)
        else:
            centre = rng.integers([low for low, _ in box], [high for _, high in box])
            origin = centre - np.array(self.window) // 2
        return Sample(key, self._inside(origin, shape))

    def _inside(self, origin: np.ndarray, shape: Triple) -> Triple:
        """Moves a window into the volume (a voxel of both stays in both); centres the larger of the two."""
        x, y, z = (
            min(max(int(start), 0), n - size) if n >= size else centre
            for start, size, n, centre in zip(origin, self.window, shape, self._centred(shape), strict=True)
        )
        return x, y, z

    def _centred(self, shape: Triple) -> Triple:
        x, y, z = ((n - size) // 2 for n, size in zip(shape, self.window, strict=True))
        return x, y, z

    def _tumour(self, key: bytes) -> _Tumour:
        if key not in self._tumours:
            if not isinstance(self._labels, _Masks):
                # SP-11.20-4.
                raise ConfigError("windows around tumour need the masks: set [data] positive_fraction = 0")
            shape = self._labels.geometry(key).shape
            if self.window[2] == 1:  # only what the centred slices show counts
                x, y, _ = self._centred(shape)
                seen = self._labels.window(key, (x, y, 0), (*self.window[:2], shape[2]))
            else:
                seen = self._labels.window(key, (0, 0, 0), shape)
            tumour = np.asarray(seen.any(axis=0))
            points = np.argwhere(tumour) if self.window[2] != 1 else np.empty((0, 3), int)
            step = max(1, -(-len(points) // _TUMOUR_POINTS))
            self._tumours[key] = _Tumour(np.flatnonzero(tumour.any(axis=(0, 1))), points[::step].copy())
        return self._tumours[key]


def _generator(*entropy: int) -> np.random.Generator:
    """PCG64 from a seed, a purpose and a number: the same stream wherever a run is resumed."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(entropy)))
