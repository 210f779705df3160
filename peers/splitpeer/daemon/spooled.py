"""What lies in a spool folder: requests for a segmentation, their states and their results, read strictly.

Hospital software reads and writes these files as well, so each is checked whole before it is believed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Annotated, Any, Literal, Self

import numpy as np
import safetensors
import safetensors.numpy
from pydantic import AfterValidator, AwareDatetime, BaseModel, ConfigDict, Field, ValidationError

from splitpeer.data.geometry import Geometry
from splitpeer.data.patients import patient_id
from splitpeer.data.task import Region, Task
from splitpeer.errors import (
    ConfigError,
    ConnectionRefused,
    DataError,
    DeadlinePassed,
    JobFailed,
    PeerError,
)
from splitpeer.storage import reading
from splitproto.text import is_printable, printable

VERSION = 1
LONGEST = 300
"""Characters of a text for people."""
ID = re.compile(r"[0-9a-f]{32}")
"""The name of a request: 16 random bytes, which are also its name on the wire."""

# --- the states of a request ----------------------------------------------------------------------------------

State = Literal["waiting", "queued", "working", "done", "failed", "cancelled"]
TRANSITIONS: Mapping[str, frozenset[str]] = {
    "waiting": frozenset({"waiting", "queued", "working", "done", "failed", "cancelled"}),
    # Back to waiting: the coordinator, or this daemon, was started again.
    "queued": frozenset({"waiting", "queued", "working", "done", "failed", "cancelled"}),
    "working": frozenset({"waiting", "queued", "working", "done", "failed", "cancelled"}),
    "done": frozenset(),
    "failed": frozenset(),
    "cancelled": frozenset(),
}
"""From each state, those that may follow. A request without a status file is waiting."""
FINAL = frozenset(state for state, after in TRANSITIONS.items() if not after)

CAUSES: Mapping[str, type[PeerError]] = {
    "request": ConfigError,  # the file of the request is not valid
    "unknown": DataError,  # this site has no such patient
    "absent": JobFailed,  # no site of the run has the patient
    "incomplete": JobFailed,  # fewer seats than `require`
    "refused": JobFailed,  # by the policy of a site
    "misaligned": JobFailed,  # the sites' images of the patient are on different grids
    "unusable": JobFailed,  # the file of the patient at a site
    "not-served": JobFailed,  # the run has no [inference]
    "lost": ConnectionRefused,  # a site, or the coordinator, went away and did not come back
    "busy": DeadlinePassed,  # too many requests wait
    "deadline": DeadlinePassed,
    "disk": DeadlinePassed,  # the disk of this site is full or fails
    "internal": JobFailed,  # a bug: the log of the peer that failed says more
}
"""Why a request failed, and the kind of error that it is for the command line, which decides the exit code."""


def _one_line(text: str) -> str:
    if not is_printable(text):
        raise ValueError("it holds characters that are not printable")
    return text


Line = Annotated[str, Field(max_length=LONGEST), AfterValidator(_one_line)]
Words = Annotated[str, Field(min_length=1, max_length=64), AfterValidator(_one_line)]
Cause = Annotated[str, Field(max_length=200), AfterValidator(_one_line)]
Patient = Annotated[
    str, Field(min_length=1, max_length=255), AfterValidator(_one_line), AfterValidator(patient_id)
]
Version = Annotated[int, Field(ge=VERSION, le=VERSION)]
Kind = Literal["mask", "probabilities"]
Count = Annotated[int, Field(ge=0, le=1 << 48)]
Row = Annotated[tuple[float, ...], Field(min_length=4, max_length=4)]


class Form(BaseModel):
    """A document whose every field is checked: no unknown ones, no conversions."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)

    @classmethod
    def read(cls, data: bytes) -> Self:
        """The document in JSON. Raises ValueError: one line that says what is wrong with it."""
        try:
            return cls.model_validate_json(data)
        except ValidationError as error:
            raise ValueError(_first(error)) from None
        except DataError as error:
            raise ValueError(str(error)) from None

    def write(self) -> bytes:
        """As JSON."""
        return self.model_dump_json(indent=1).encode() + b"\n"


class SpoolRequest(Form):
    """``<id>.request.json``: who is to be segmented."""

    version: Version = VERSION
    patient: Patient
    """As this site writes the id."""
    want: Kind = "mask"
    require: Literal["all"] | Annotated[int, Field(ge=1, le=64)] | None = None
    """Least number of seats, or all of the run's; None: as many as there are."""
    created: AwareDatetime
    until: AwareDatetime | None = None
    """Nobody waits for it after that."""
    asker: Words
    """Who asks: a user of the operating system."""


class Status(Form):
    """``<id>.status.json``: how far it is. The daemon writes it."""

    version: Version = VERSION
    state: State
    done: Count = 0
    """Windows."""
    total: Count = 0
    """Windows; 0: not known yet."""
    ahead: Count = 0
    """Requests that are answered before this one."""
    cause: str = ""
    """Of `failed`: one of `CAUSES`."""
    reason: Line = ""
    """One line: of `failed` why; before, what is waited for."""
    exit: int | None = None
    """Of `failed`: the exit code of the command that asked."""
    written: AwareDatetime | None = None

    @classmethod
    def failed(cls, cause: str, reason: str) -> Self:
        """It failed. Raises KeyError for a cause that is not in `CAUSES`."""
        text = printable(" ".join(reason.split()))[:LONGEST]
        return cls(state="failed", cause=cause, reason=text, exit=CAUSES[cause].exit_code)

    @property
    def final(self) -> bool:
        """Nothing follows."""
        return self.state in FINAL

    def error(self) -> PeerError:
        """Of `failed`: what the command that asked raises."""
        return CAUSES.get(self.cause, JobFailed)(self.reason or "it failed, and the daemon did not say why")


class TaskForm(Form):
    """What was segmented: `splitpeer.data.task.Task` as JSON."""

    values: tuple[tuple[int, str], ...]
    """Mask values and their names."""
    regions: tuple[tuple[str, tuple[int, ...], str], ...]
    """Name, mask values and title."""
    exclusive: bool = False
    convention: str = ""

    @classmethod
    def of(cls, task: Task) -> Self:
        """The form of a task."""
        return cls(
            values=tuple(task.names.items()),
            regions=tuple((region.name, region.values, region.title) for region in task.regions),
            exclusive=task.exclusive,
            convention=task.convention,
        )

    def task(self) -> Task:
        """The task. Raises ValueError: it makes none."""
        return Task(
            dict(self.values),
            tuple(Region(*region) for region in self.regions),
            self.exclusive,
            self.convention,
        )


class Provenance(Form):
    """What a segmentation was made from: the metadata of ``<id>.result.safetensors``."""

    version: Version = VERSION
    patient: Patient
    run: Annotated[str, Field(pattern=r"^[0-9a-f]{1,64}$")]
    """The run's id, in hexadecimal."""
    job: Words
    """The job's name."""
    step: Count
    """The weights are those after so many steps."""
    digest: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    """Of the decoder's tensors, `model` of `segmented`: SHA-256, equal exactly if they are. No file has it."""
    used: tuple[Words, ...]
    """Seats that took part."""
    missing: tuple[Words, ...]
    """Seats of the run that did not."""
    causes: dict[str, Cause] = Field(default_factory=dict)
    """By missing seat, why, as far as another site may know it."""
    modalities: dict[str, tuple[Words, ...]]
    """Of every seat, used or missing."""
    task: TaskForm
    affine: Annotated[tuple[Row, ...], Field(min_length=4, max_length=4)]
    """From voxel to scanner coordinates (RAS, mm), of the grid that the tensor is on."""
    asked: AwareDatetime
    created: AwareDatetime


@dataclass(frozen=True)
class SpoolResult:
    """A segmentation on the grid of the run: RAS order, resampled where the job says a spacing."""

    provenance: Provenance
    kind: Kind
    values: np.ndarray
    """mask: uint8 [regions, x, y, z] of 0 and 1; probabilities: float32 [channels, x, y, z] (`Task.channels`)."""

    @property
    def task(self) -> Task:
        """What was segmented."""
        return self.provenance.task.task()

    @property
    def grid(self) -> Geometry:
        """The grid of the tensor."""
        x, y, z = self.values.shape[1:]
        return Geometry.of((x, y, z), np.array(self.provenance.affine))

    @property
    def regions(self) -> np.ndarray:
        """bool [regions, x, y, z]."""
        if self.kind == "mask":
            return self.values.astype(bool)
        return self.task.decide(self.values)

    def encode(self) -> bytes:
        """The bytes of the file."""
        text = self.provenance.model_dump_json()
        return safetensors.numpy.save({self.kind: np.ascontiguousarray(self.values)}, {_META: text})

    @classmethod
    def decode(cls, data: bytes) -> Self:
        """The result in the bytes of a file. Raises ValueError: one line that says what is wrong with it."""
        try:
            tensors = safetensors.numpy.load(data)
            text = _metadata(data)[_META]
        except (ValueError, TypeError, LookupError, AttributeError, safetensors.SafetensorError):
            raise ValueError("it is no result of splitpeer, or torn") from None
        provenance = Provenance.read(text.encode())
        kinds: tuple[Kind, Kind] = ("mask", "probabilities")
        if not (kind := [one for one in kinds if tensors.keys() == {one}]):
            raise ValueError("it holds neither a mask nor probabilities")
        result = cls(provenance, kind[0], tensors[kind[0]])
        result.check()
        return result

    def check(self) -> None:
        """Whether it fits together. Raises ValueError: one line."""
        task, values = self.task, self.values
        channels = len(task.regions) if self.kind == "mask" else task.channels
        if values.dtype != _DTYPES[self.kind] or values.ndim != 4 or values.shape[0] != channels:
            raise ValueError(f"its tensor is {values.dtype} {list(values.shape)}, for {channels} channels")
        if not values.size or (self.kind == "mask" and values.max() > 1):
            raise ValueError("its mask holds something else than 0 and 1")
        if self.kind == "probabilities" and not np.isfinite(values).all():
            raise ValueError("its probabilities are not finite")
        affine = np.array(self.provenance.affine)
        if not np.array_equal(affine[3], (0, 0, 0, 1)) or abs(np.linalg.det(affine[:3, :3])) < 1e-9:
            raise ValueError("its affine places no voxel")


_META = "splitpeer.segmentation"
_DTYPES: Mapping[str, Any] = {"mask": np.uint8, "probabilities": np.float32}


def now() -> datetime:
    """This moment, for `created`, `until` and `written`."""
    return datetime.now(UTC)


def _metadata(data: bytes) -> Mapping[str, str]:
    header = reading.parse(data[8 : 8 + int.from_bytes(data[:8], "little")])
    found: Mapping[str, str] = header["__metadata__"]
    return found


def _first(error: ValidationError) -> str:
    """The first thing that is wrong; the value itself is not repeated, as it may name a patient."""
    one = error.errors(include_url=False, include_context=False, include_input=False)[0]
    where = ".".join(str(part) for part in one["loc"])
    return printable(f"{where}: {one['msg']}" if where else str(one["msg"]))
