"""Patients as arrays: the truth that an attack is scored with, and the adversary's own similar patients."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from splitpeer.data.geometry import Triple
from splitpeer.data.layouts import find_images, find_labels
from splitpeer.data.normalisation import DEFAULT, Normaliser
from splitpeer.data.task import Task
from splitpeer.data.volumes import Volumes
from splitpeer.errors import ConfigError, DataError
from splitproto.records import Sample, Seat


@dataclass(frozen=True)
class Cohort:
    """Volumes of patients, by modality, and their masks where there are any; a patient may lack some."""

    images: Mapping[str, Volumes]
    labels: Volumes | None = None

    @classmethod
    def read(
        cls,
        folder: Path,
        modalities: Sequence[str],
        *,
        salt: bytes,
        layout: str = "folder",
        convention: Task | str | None = None,
        spacing: tuple[float, float, float] | None = None,
        rule: Callable[[str], Normaliser] = lambda modality: DEFAULT,
    ) -> Cohort:
        """`folder` holds a folder per modality (t1/, flair/ ...) and, with `convention`, labels/; any other layout is
        searched for each modality in `folder` itself. A folder that itself holds the images of the one modality
        asked for will do too. `convention`: what the masks mean, by its name, or their task. `rule`: how the images of
        a modality are normalised.

        Raises:
            DataError: images or masks are missing or unreadable.
        """

        def where(name: str) -> Path:
            below = folder / name
            return below if layout == "folder" and below.is_dir() else folder

        images = {
            m: Volumes(find_images(where(m), layout, m), salt=salt, spacing=spacing, normalisation=rule(m))
            for m in modalities
        }
        labels = None
        if convention is not None:
            labels = Volumes(
                find_labels(where("labels"), layout), salt=salt, spacing=spacing, labels=convention
            )
        return cls(images, labels)

    def at(self, modalities: Sequence[str]) -> Cohort:
        """The same with these images only."""
        return Cohort({modality: self.images[modality] for modality in modalities}, self.labels)

    def keys(self) -> list[bytes]:
        """Patients that all modalities, and the masks, hold; ascending."""
        held = [set(volumes.keys()) for volumes in self.images.values()]
        held += [set(self.labels.keys())] if self.labels is not None else []
        return sorted(set.intersection(*held))


@dataclass(frozen=True)
class Samples:
    """Windows as arrays, in one order."""

    samples: tuple[Sample, ...]
    images: Mapping[str, np.ndarray] = field(default_factory=dict)
    """By modality: float32 [N, 1, *spatial]."""
    masks: np.ndarray | None = None
    """uint8 [N, regions, *spatial]."""
    task: Task | None = None
    """What the masks hold."""

    @property
    def parts(self) -> tuple[str, ...]:
        """Regions that are less than all that is segmented, by name."""
        return () if self.task is None else tuple(self.task.region_names[n] for n in self._parts())

    @property
    def outlines(self) -> np.ndarray | None:
        """All that is segmented together, then each of `parts`: uint8 [N, 1 + parts, *spatial]; None without masks.

        In a task of nested regions the largest of them comes first anyway; classes that exclude each other have
        nothing in common but this.
        """
        if self.masks is None:
            return None
        return np.concatenate(
            [self.masks.max(axis=1, keepdims=True), self.masks[:, list(self._parts())]], axis=1
        )

    def _parts(self) -> tuple[int, ...]:
        if self.task is None:
            return ()
        everything = {value for region in self.task.regions for value in region.values}
        return tuple(n for n, region in enumerate(self.task.regions) if set(region.values) != everything)

    def at(self, seat: Seat) -> np.ndarray | None:
        """Its images, float32 [N, channels, *spatial]; None where a channel is missing."""
        found = [self.images[modality] for modality in seat.modalities if modality in self.images]
        return np.concatenate(found, axis=1) if len(found) == len(seat.modalities) else None

    @property
    def patients(self) -> list[str]:
        """A name for each sample's patient, to group by: the pseudonym's first digits."""
        return [sample.key.hex()[:8] for sample in self.samples]

    @property
    def heights(self) -> list[int]:
        """The slice (or first slice) of each sample."""
        return [sample.origin[2] for sample in self.samples]


def cut(cohort: Cohort, samples: Sequence[Sample], window: Triple) -> Samples:
    """The windows of `samples`, without augmentation.

    Raises:
        DataError: none of their patients, or not all, are in the cohort.
    """
    held = set(cohort.keys())
    if missing := {sample.key for sample in samples} - held:
        raise DataError(
            f"{len(missing)} of the patients under attack are not in the folder of the truth: "
            "it needs the same images and the same federation.salt as the site"
        )

    def windows(volumes: Volumes) -> np.ndarray:
        out = np.stack([volumes.window(s.key, s.origin, window) for s in samples])
        return out[..., 0] if window[2] == 1 else out

    images = {modality: windows(volumes) for modality, volumes in cohort.images.items()}
    masks = windows(cohort.labels) if cohort.labels is not None else None
    task = cohort.labels.labels if cohort.labels is not None else None
    return Samples(tuple(samples), images, masks, task)


def shadow(
    cohort: Cohort, window: Triple, count: int, seed: int = 0, keys: Sequence[bytes] | None = None
) -> Samples:
    """The adversary's own patients: `count` windows, spread evenly over patients and over the height of the head.

    Raises:
        ConfigError: there are no patients.
    """
    keys = cohort.keys() if keys is None else list(keys)
    if not keys:
        raise ConfigError("no patient in the folder of similar images: name another")
    rng = np.random.Generator(np.random.PCG64(seed))
    reference = next(iter(cohort.images.values()))
    per_patient = -(-count // len(keys))
    chosen = []
    for key in keys:
        shape, box = reference.geometry(key).shape, reference.extent(key)
        origin = [(size - width) // 2 for size, width in zip(shape, window, strict=True)]
        low, high = box[2]
        heights = np.linspace(low, max(high - 1, low), per_patient + 2)[1:-1] + rng.uniform(
            -0.5, 0.5, per_patient
        )
        if window[2] == 1:
            zs = np.unique(np.clip(np.rint(heights).astype(int), low, max(high - 1, low)))
            chosen += [Sample(key, (origin[0], origin[1], int(z))) for z in zs]
        else:
            chosen.append(Sample(key, (origin[0], origin[1], origin[2])))
    return cut(cohort, chosen[:count] if len(chosen) <= count else _thinned(chosen, count), window)


def most_tumour(cohort: Cohort, keys: Sequence[bytes], window: Triple, per_patient: int = 1) -> list[Sample]:
    """For every patient the slices (2-D) with most tumour, or the centred window (3-D): the samples worth
    attacking."""
    if cohort.labels is None:
        raise ConfigError("the slices with most tumour are asked for, but there are no masks")
    chosen = []
    for key in keys:
        shape = cohort.labels.geometry(key).shape
        origin = [(size - width) // 2 for size, width in zip(shape, window, strict=True)]
        if window[2] == 1:
            area = cohort.labels.window(key, (0, 0, 0), shape).any(axis=0).sum(axis=(0, 1), dtype=np.int64)
            best = np.argsort(-area, kind="stable")[:per_patient]
            chosen += [Sample(key, (origin[0], origin[1], int(z))) for z in best]
        else:
            chosen.append(Sample(key, (origin[0], origin[1], origin[2])))
    return chosen


def _thinned(samples: list[Sample], count: int) -> list[Sample]:
    return [samples[i] for i in np.linspace(0, len(samples) - 1, count).astype(int)]
