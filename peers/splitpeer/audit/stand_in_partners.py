"""Partners for a site that has only its own images: other people's, from a folder or the phantom.

They take the partners' places in a secure sum. And as all contrasts of some people are at hand then, they show what a
partner's image says of this site's: the same person's, which a site does not have of its own patients.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from splitpeer.audit.cohort import Cohort, cut
from splitpeer.audit.released import FrozenSeat
from splitpeer.data.geometry import Triple, spacing_of
from splitpeer.data.modalities import MODALITIES
from splitpeer.data.pseudonym import load_salt
from splitpeer.data.volumes import Volumes
from splitpeer.defences.key import from_seed, key_of
from splitpeer.errors import ConfigError, DataError
from splitpeer.federation.halves import client_half
from splitpeer.federation.seats import seats_of
from splitpeer.federation.terms import job_on_wire
from splitpeer.models.registry import backbone_of
from splitpeer.settings.job import JobConfig
from splitpeer.settings.peer import PeerConfig
from splitpeer.site import first_weights
from splitproto.records import Sample, Seat

PATIENTS = 24
"""Phantom patients that are rendered where no folder is given."""
PHANTOM = "phantom patients"


@dataclass
class StandIns:
    """Stand-ins for all sites of a job but one.

    Args:
        seats: of each other site.
        cohort: images of all their modalities.
        source: where they are from, in words.
        encoders: folder that may hold SEAT.safetensors, from `splitpeer pretrain`.
        own: images of the audited site's modalities of these people.
    """

    job: JobConfig
    seats: dict[str, tuple[Seat, ...]]
    cohort: Cohort
    source: str
    encoders: Path | None = None
    own: Cohort | None = None
    """What they show of this site's own modalities; None: nothing."""
    given: dict[bytes, bytes] = field(default_factory=dict)
    """Own patient to the one who stands in; the same person where ids are the same."""

    @classmethod
    def find(cls, job: JobConfig, config: PeerConfig, site: str, folder: Path | None, out: Path) -> StandIns:
        """Those in `folder`, which holds a folder per modality; without one, phantom patients below `out`.

        `folder` need not have the site's own modalities.

        Raises:
            ConfigError, DataError: no salt; or a modality or every patient is missing, or a file cannot be read.
        """
        every = seats_of(job)
        seats = {name: every.of(name) for name in every.filled if name != site}
        modalities = [m for of in seats.values() for seat in of for m in seat.modalities]
        own = [m for seat in every.of(site) for m in seat.modalities]
        spacing, rule = spacing_of(job.data.spacing), job.task.rule
        if config.data.salt is None:
            raise ConfigError("an audit needs [data] salt")
        if folder is None:
            drawn = _phantom(job, [*own, *modalities], out)
            return cls(job, seats, drawn.at(modalities), PHANTOM, own=drawn.at(own))
        read = partial(
            Cohort.read, folder, salt=load_salt(config.data.salt), layout=config.data.layout, spacing=spacing, rule=rule
        )  # fmt: skip
        found = read(modalities)
        if not found.keys():
            raise DataError(f"{folder}: no patient has images of all of {', '.join(modalities)}")
        try:
            shown = read(own)
        except DataError:
            shown = None
        return cls(job, seats, found, folder.name, folder, own=shown)

    @property
    def strangers(self) -> bool:
        """Whether anybody stood in for another person."""
        return any(own != other for own, other in self.given.items())

    def parts(self, defences: Sequence[str], seed: int, device: str) -> list[FrozenSeat]:
        """Their encoders, from the folder or random, under the same defences as the site's own.

        Raises:
            ConfigError, DataError: a defence cannot be, or a file of weights does not fit.
        """
        job = job_on_wire(self.job)
        backbone, found = backbone_of(job), []
        for site, seats in self.seats.items():
            held = [modality for seat in seats for modality in seat.modalities]
            for seat in seats:
                key = key_of(from_seed(seed, site), seat.modalities, held)
                half = client_half(job, backbone, seat, defences, key=key, seed=seed, device=device)
                path = self.encoders / f"{seat.name}.safetensors" if self.encoders is not None else None
                if path is not None and path.is_file():
                    first_weights.give(half.network, path, job, backbone, seat)
                found.append(FrozenSeat(site, seat, half))
        return found

    def images(self, samples: Sequence[Sample], own: Volumes, window: Triple) -> dict[str, np.ndarray]:
        """By modality, what they show in place of these windows: float32 [N, 1, *spatial].

        Args:
            own: volumes of the samples' patients.
        """
        return dict(cut(self.cohort, self.places(samples, own, window), window).images)

    def places(self, samples: Sequence[Sample], own: Volumes, window: Triple) -> list[Sample]:
        """The windows that they show in place of these; see `images`."""
        return [self._place(sample, own, window) for sample in samples]

    def _place(self, sample: Sample, own: Volumes, window: Triple) -> Sample:
        keys = self.cohort.keys()
        mine = sample.key if sample.key in keys else keys[len(self.given) % len(keys)]
        other = self.given.setdefault(sample.key, mine)
        if other == sample.key:
            return sample
        shape = next(iter(self.cohort.images.values())).geometry(other).shape
        x, y, z = ((size - wide) // 2 for size, wide in zip(shape, window, strict=True))
        if window[2] == 1:
            # As high in the other head.
            height = (sample.origin[2] + 0.5) / own.geometry(sample.key).shape[2]
            z = min(max(int(height * shape[2]), 0), shape[2] - 1)
        return Sample(other, (x, y, z))


def _phantom(job: JobConfig, modalities: Sequence[str], out: Path) -> Cohort:
    """A modality that the phantom has not is shown by one of its contrasts; two of them by the same only where there
    are more than it has."""
    from splitpeer.data.phantom.cohort import write_phantom

    write_phantom(out, PATIENTS, seed=job.job.seed + 1)
    contrasts = drawn_as(modalities)
    read = {
        m: Cohort.read(
            out, (contrast,), salt=bytes(32), spacing=spacing_of(job.data.spacing), rule=job.task.rule
        )
        for m, contrast in contrasts.items()
    }
    return Cohort({m: one.images[contrasts[m]] for m, one in read.items()})


def drawn_as(modalities: Sequence[str]) -> dict[str, str]:
    """Which contrast of the phantom shows each modality."""
    free = [contrast for contrast in MODALITIES if contrast not in modalities]
    others = [m for m in dict.fromkeys(modalities) if m not in MODALITIES]
    given = {m: (free or MODALITIES)[n % len(free or MODALITIES)] for n, m in enumerate(others)}
    return {m: given.get(m, m) for m in modalities}
