"""The records that messages carry: patients, samples, seats, tasks and a job's terms (SP-8.4).

A record is a frozen dataclass; on the wire it is a map of its fields, inside the map of a message.
"""

from __future__ import annotations

from dataclasses import dataclass

from .causes import OF_A_PATIENT
from .codings import CODINGS, LEVEL_FORMS, Coding
from .fields import Bool, Int, ListOf, Octets, OctetsUpTo, OneOrList, Real, Record, Text, wire
from .tensors import DTYPES

KEY = Octets(16)
MOST_SEATS = 16
SEAT = Int(0, MOST_SEATS - 1)
"""Place of a seat in the offer's `seats`."""
ENCODERS = ("joint", "frozen")
CODED = OneOrList(Text(8, CODINGS), ListOf(Text(8, LEVEL_FORMS), 16, 1))
"""One coding for all levels, or a form for each level that is sent (SP-11.21-8)."""


@dataclass(frozen=True, slots=True)
class Sample:
    """A window into one patient's volume."""

    key: bytes = wire(KEY)
    """Pseudonym of the patient."""
    origin: tuple[int, int, int] = wire(ListOf(Int(-(1 << 31), (1 << 31) - 1), 3, 3))
    """First voxel (x, y, z) of the window; outside the volume is zero."""


@dataclass(frozen=True, slots=True)
class Patient:
    """What a site tells about one patient's volume after orientation and resampling."""

    key: bytes = wire(KEY)
    shape: tuple[int, int, int] = wire(ListOf(Int(1, 1 << 16), 3, 3))
    spacing: tuple[float, float, float] = wire(ListOf(Real(), 3, 3))
    """Millimetres."""
    directions: tuple[float, ...] = wire(ListOf(Real(), 9, 9))
    """Direction cosines in RAS: of the x axis, then y, then z."""
    origin: tuple[float, float, float] = wire(ListOf(Real(), 3, 3))
    """Position of voxel (0, 0, 0) in scanner coordinates, millimetres."""
    stored: tuple[float, float, float] = wire(ListOf(Real(), 3, 3))
    """Millimetres before resampling; equal to `spacing` where the volume is not resampled."""
    seats: tuple[int, ...] | None = wire(ListOf(SEAT, MOST_SEATS), default=None)
    """Places in the offer's `seats` of those that the site can fill for this patient, ascending; absent: all."""
    mask: bool | None = wire(Bool(), default=None)
    """Whether the site holds a mask of this patient, where the offer asks for masks (SP-11.20-3); absent: no."""
    person: bytes | None = wire(KEY, default=None)
    """Of a patient with a mask: pseudonym of the person, who may have several scans; absent: `key`."""


@dataclass(frozen=True, slots=True)
class Unusable:
    """A patient whose file a site holds and cannot use."""

    key: bytes = wire(KEY)
    cause: str = wire(Text(16, tuple(OF_A_PATIENT)))


@dataclass(frozen=True, slots=True)
class Normalisation:
    """What is done to the intensities of one modality's images."""

    modality: str = wire(Text(32))
    rule: str = wire(Text(64))
    """Such as zscore-nonzero or window:-100,300 (SP-11.12-10)."""


@dataclass(frozen=True, slots=True)
class Seat:
    """One input of the fused network: one modality, or several stacked as channels in this order."""

    name: str = wire(Text(32))
    modalities: tuple[str, ...] = wire(ListOf(Text(32), 8, 1))


@dataclass(frozen=True, slots=True)
class MaskRegion:
    """A part of the patient that the network learns to find."""

    name: str = wire(Text(24))
    values: tuple[int, ...] = wire(ListOf(Int(1, 65535), 256))
    """Mask values that make it up; empty where `preset` of `Masks` says which."""
    title: str | None = wire(Text(100), default=None)
    """For people; absent: the name."""


@dataclass(frozen=True, slots=True)
class Masks:
    """What a site of the labels is asked for: SP-11.20-1, SP-11.20-2."""

    regions: tuple[MaskRegion, ...] = wire(ListOf(Record(MaskRegion), 32, 1))
    """In the order of the channels."""
    values: tuple[int, ...] = wire(ListOf(Int(1, 65535), 256))
    """Every value that a mask may hold besides 0; empty where `preset` says which."""
    exclusive: bool = wire(Bool())
    """Whether a voxel is of one region at most (softmax, the background first), or of any number (sigmoid)."""
    preset: str | None = wire(Text(32), default=None)
    """A named task whose masks follow a convention that the site knows, such as glioma; absent: the values say it."""


@dataclass(frozen=True, slots=True)
class Missing:
    """A seat that steps are made without."""

    seat: str = wire(Text(32))
    cause: str = wire(Text(200))
    """One line for people; it names no patient, file or address."""


@dataclass(frozen=True, slots=True)
class Level:
    """One tensor [samples, channels, *(window / stride)] that an encoder yields."""

    name: str = wire(Text(32))
    channels: int = wire(Int(1, 4096))
    stride: tuple[int, ...] = wire(ListOf(Int(1, 4096), 3, 2))
    """Voxels of the image per value, along each axis."""


@dataclass(frozen=True, slots=True)
class Setting:
    """One setting of a network."""

    name: str = wire(Text(32))
    values: tuple[int, ...] = wire(ListOf(Int(0, 1 << 16), 64, 1))


@dataclass(frozen=True, slots=True)
class Fusion:
    """How the sites' values become one sum that nobody can take apart (SP-11.18)."""

    bits: int = wire(Int(16, 32))
    """Size of one word: 16 or 32."""
    range: float = wire(Real())
    """Values are clipped to between minus and plus this."""
    parties: int = wire(Int(2, 64))
    """Sites in the sum."""


@dataclass(frozen=True, slots=True)
class KeyOffer:
    """The keys that a site uses in one run, as its partners must be able to check them."""

    public: bytes = wire(Octets(32))
    """X25519 public key for training."""
    service: bytes = wire(Octets(32))
    """X25519 public key for inference (SP-11.18-5)."""
    signature: bytes = wire(OctetsUpTo(1024))
    """With the key of the site's certificate (SP-11.18-6)."""
    chain: tuple[bytes, ...] = wire(ListOf(OctetsUpTo(8192), 4, 1))
    """DER: the site's certificate, then intermediates."""


@dataclass(frozen=True, slots=True)
class Label:
    """A value that masks hold."""

    value: int = wire(Int(1, 0xFFFF))
    name: str = wire(Text(24))


@dataclass(frozen=True, slots=True)
class TaskTerms:
    """What is segmented."""

    labels: tuple[Label, ...] = wire(ListOf(Record(Label), 256, 1))
    """Every value of a mask but 0, the background."""
    regions: tuple[MaskRegion, ...] = wire(ListOf(Record(MaskRegion), 32, 1))
    """In the order of the channels."""
    exclusive: bool = wire(Bool())
    """One class per voxel, and the background is the first channel of probabilities."""
    convention: str = wire(Text(32))
    """Where the values come from, for people; may be empty."""


@dataclass(frozen=True, slots=True)
class Job:
    """The part of a job that a site must know to take part."""

    name: str = wire(Text(63))
    dimensions: int = wire(Int(2, 3))
    network: str = wire(Text(32))
    """Which encoder the coordinator has in mind; a site may run its own that yields the same cut."""
    settings: tuple[Setting, ...] = wire(ListOf(Record(Setting), 16))
    """Settings of that network."""
    cut: tuple[Level, ...] = wire(ListOf(Record(Level), 16, 1))
    """All levels of an encoder, the finest first."""
    levels: tuple[int, ...] = wire(ListOf(Int(0, 15), 16, 1))
    """Those of the cut whose activations leave the site."""
    precision: str = wire(Text(8, tuple(DTYPES)))
    """Dtype of activations and gradients."""
    window: tuple[int, ...] = wire(ListOf(Int(16, 1 << 12), 3, 2))
    """Size of a sample in voxels."""
    spacing: tuple[float, ...] = wire(ListOf(Real(), 3, 0))
    """Millimetres to resample to; empty: as stored."""
    augment: bool = wire(Bool())
    batch: int = wire(Int(1, 4096))
    steps: int = wire(Int(1))
    optimiser: str = wire(Text(16))
    learning_rate: float = wire(Real())
    weight_decay: float = wire(Real())
    schedule: str = wire(Text(16))
    seconds_per_step: float = wire(Real())
    """How long an answer is waited for, and a message with tensors to be taken."""
    normalisation: tuple[Normalisation, ...] | None = wire(ListOf(Record(Normalisation), 64), default=None)
    """Rules of modalities other than zscore-nonzero; absent: none."""
    average_every: int | None = wire(Int(1), default=None)
    """Encoders of one seat are averaged before steps 1, 1 + this, ... (SP-11.16); absent: never."""
    encoders: str | None = wire(Text(8, ENCODERS), default=None)
    """frozen: the sites' encoders never change, and each window is released once (SP-11.17); absent: joint."""

    @property
    def frozen(self) -> bool:
        """Whether nothing but releases is asked of a site."""
        return self.encoders == "frozen"

    fusion: Fusion | None = wire(Record(Fusion), default=None)
    """Only a sum over all sites can be read (SP-11.18); absent: each site's values can."""
    activations: Coding | None = wire(CODED, default=None)
    """How activations are coded (SP-11.21); absent: they travel as `precision` says."""
    gradients: Coding | None = wire(CODED, default=None)
    """The same of gradients."""
