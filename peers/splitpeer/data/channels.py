"""A site's volumes by modality, and how its patients fill the seats of a job: a seat's modalities are its channels."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property

import numpy as np

from splitpeer.data.files import Case
from splitpeer.data.geometry import Geometry, Triple, differences
from splitpeer.data.loader import SiteData
from splitpeer.data.volumes import Volumes, not_held
from splitpeer.defences.image.stack import ImageStack
from splitpeer.errors import PatientUnusable
from splitproto.messages import Forward
from splitproto.records import Patient, Sample


class Channels:
    """The images of a site as the seats of a job want them.

    Safe to use from several threads. Errors name the file (PatientUnusable, DataError).

    Args:
        volumes: by modality; all under one salt.
        seats: by name, in the job's order: their modalities, in the order of the channels.
        defences: of the images, by modality; they act on each window before it is augmented.
        masks: where the labels are this site's: under the same salt, and on the images' grids.
    """

    def __init__(
        self,
        volumes: Mapping[str, Volumes],
        seats: Mapping[str, Sequence[str]],
        defences: Mapping[str, ImageStack] | None = None,
        masks: Volumes | None = None,
    ) -> None:
        self.masks = masks
        self.seats = {name: tuple(modalities) for name, modalities in seats.items()}
        self.volumes = {modality: volumes[modality] for held in self.seats.values() for modality in held}
        """The seats' volumes by modality."""
        self._data = {
            modality: SiteData(held, (defences or {}).get(modality))
            for modality, held in self.volumes.items()
        }
        self._geometries: dict[bytes, Geometry] = {}

    def learn(self, cases: Mapping[str, Iterable[Case]]) -> None:
        """Files that came after the start, by modality."""
        for modality, volumes in self.volumes.items():
            volumes.learn(cases.get(modality, ()))
        before = self._fills
        self.__dict__.pop("_fills", None)
        for key in [key for key, seats in before.items() if self._fills[key] != seats]:
            self._geometries.pop(key, None)

    @cached_property
    def _fills(self) -> dict[bytes, tuple[int, ...]]:
        """Seats by patient. One channel that is missing leaves the whole seat empty."""
        held = {modality: set(volumes.keys()) for modality, volumes in self.volumes.items()}
        found: dict[bytes, tuple[int, ...]] = {}
        for number, modalities in enumerate(self.seats.values()):
            for key in set.intersection(*(held[modality] for modality in modalities)):
                found[key] = (*found.get(key, ()), number)
        return found

    @property
    def salt_check(self) -> bytes:
        """Check value of the salt."""
        return next(iter(self._all())).salt_check

    @property
    def warnings(self) -> dict[bytes, list[str]]:
        """See `Volumes.warnings`."""
        found: dict[bytes, list[str]] = {}
        for volumes in self._all():
            for key, lines in volumes.warnings.items():
                found.setdefault(key, []).extend(lines)
        return found

    def keys(self) -> list[bytes]:
        """The patients that fill a seat or have a mask, ascending."""
        return sorted({*self._fills, *self._masked})

    def holds(self, key: bytes) -> bool:
        """Whether a patient is one of `keys`."""
        return key in self._fills or key in self._masked

    def masked(self, key: bytes) -> bool:
        """Whether the site has a mask of a patient that is asked for."""
        return key in self._masked

    def fills(self, key: bytes) -> tuple[int, ...]:
        """The numbers of the seats that a patient fills; () for a patient that fills none."""
        return self._fills.get(key, ())

    def modalities(self, key: bytes) -> list[str]:
        """All channels that a patient fills, seat by seat."""
        seats = list(self.seats.values())
        return [modality for number in self.fills(key) for modality in seats[number]]

    def rows(self, samples: Sequence[Sample]) -> dict[str, list[int]]:
        """SP-11.8-5: by seat, the numbers of the samples whose patients fill it; a seat without any is left out."""
        found: dict[str, list[int]] = {}
        for number, name in enumerate(self.seats):
            if rows := [row for row, sample in enumerate(samples) if number in self.fills(sample.key)]:
                found[name] = rows
        return found

    def case(self, key: bytes) -> Case:
        """The local case behind a key: that of the first channel. Raises DataError for a key this site lacks."""
        return self._of(key)[0].case(key)

    def geometry(self, key: bytes) -> Geometry:
        """The grid of all the patient's volumes, from the files' headers alone. Raises PatientUnusable: they differ."""
        if key not in self._geometries:
            first, *others = self._of(key)
            grid = first.geometry(key)
            for other in others:
                # SP-11.12-9 within one site: windows of all channels show the same anatomy, or none is taken.
                if found := differences(grid, other.geometry(key)):
                    paths = f"{other.case(key).path}: differs from {first.case(key).path}"
                    raise PatientUnusable(
                        key, "grid", f"{paths} in {'; '.join(found)}: resample both to one grid"
                    )
            self._geometries[key] = grid
        return self._geometries[key]

    def listed(self, key: bytes) -> Patient:
        """SP-11-4: a patient as the coordinator is told of it. Raises PatientUnusable, see `geometry`."""
        grid, fills = self.geometry(key), self.fills(key)
        seats = fills if len(fills) < len(self.seats) else None
        mask = True if self.masked(key) else None
        return Patient(key, grid.shape, grid.spacing, grid.directions, grid.origin, grid.stored, seats, mask)

    def read(self, key: bytes) -> None:
        """Read all the patient's volumes to their ends, for what is wrong with them."""
        for volumes in self._of(key):
            volumes.read(key)

    def batch(
        self,
        seat: str,
        samples: Sequence[Sample],
        window: Triple,
        seed: int | None,
        places: Sequence[int] | None = None,
    ) -> np.ndarray:
        """The windows of `samples` at one seat: float32 [B, channels, *spatial]; see `SiteData.batch`."""
        channels = [
            self._data[modality].batch(samples, window, seed, modality, places=places)
            for modality in self.seats[seat]
        ]
        return channels[0] if len(channels) == 1 else np.concatenate(channels, axis=1)

    def windows(self, forward: Forward, window: Triple) -> dict[str, np.ndarray]:
        """What a batch asks of this site, by seat: float32 [rows, channels, *spatial]; see `rows`."""
        samples, places = forward.samples, forward.places or range(len(forward.samples))
        return {
            seat: self.batch(
                seat, [samples[row] for row in rows], window, forward.seed, [places[row] for row in rows]
            )
            for seat, rows in self.rows(samples).items()
        }

    def _of(self, key: bytes) -> list[Volumes]:
        """The volumes of all channels that the patient fills, and the masks where one is its. Raises DataError where it
        has neither."""
        found = [self.volumes[modality] for modality in self.modalities(key)]
        if self.masks is not None and self.masked(key):
            found.append(self.masks)
        if not found:
            raise not_held(key)
        return found

    def _all(self) -> list[Volumes]:
        return [*self.volumes.values(), *([] if self.masks is None else [self.masks])]

    @cached_property
    def _masked(self) -> frozenset[bytes]:
        return frozenset(self.masks.keys() if self.masks is not None else ())
