"""What is kept of each prepared patient: where the image came from, and the way back. Beside the images, never sent.

`FOLDER/PATIENT.nii.gz` is an image on the atlas's grid, `FOLDER/prepared/PATIENT.json` its record. The record is
written last, and holds the digest of the image: an image that is not its record's is unfinished.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, Self, get_args

import numpy as np
from numpy.typing import NDArray

from splitpeer.data.files import RECORDS, stem
from splitpeer.data.geometry import Triple
from splitpeer.errors import DataError
from splitpeer.storage import durable, reading

FORMAT, VERSION = "splitpeer-prepared", 2
FOLDER = RECORDS
"""Beside the images."""
MAX_RECORD = 16 << 20
"""Bytes of one record: a hundred thousand slices with long names."""

Kind = Literal["rigid", "affine"]
Method = Literal[Kind, "none"]


@dataclass(frozen=True, eq=False)
class AtlasGrid:
    """The grid that an image was written on."""

    name: str
    sha256: str
    """Of the atlas's voxels and affine: which atlas it was, whatever its name."""
    shape: Triple
    affine: NDArray[np.float64]
    """Voxel to the atlas's RAS millimetres, 4x4."""


@dataclass(frozen=True, eq=False)
class PreparedRecord:
    """One patient's image of one modality."""

    patient: str
    """As the images are named: the study's id, not the hospital's."""
    modality: str
    study: str
    """Study instance UID."""
    series: str
    """Series instance UID."""
    frame_of_reference: str
    """Frame of reference UID; empty: the files have none."""
    files: tuple[str, ...]
    """Relative to the folder that was read, with /, in the order of the slices; a multi-frame file is there once."""
    frames: tuple[int, ...] | None
    """For a multi-frame file, the frame of each slice, from 0; None: a file per slice."""
    shape: Triple
    """Of the original grid: columns, rows, slices."""
    affine: NDArray[np.float64]
    """Of the original grid, 4x4: voxel [column, row, slice] to the patient's RAS millimetres, as in NIfTI."""
    atlas: AtlasGrid
    transform: NDArray[np.float64]
    """4x4, from the patient's millimetres to the atlas's, both RAS."""
    method: Method
    """As the settings say."""
    kept: Method
    """What `transform` is: rigid, where the affine registration that was asked for went astray."""
    quality: Mapping[str, float]
    reasons: tuple[str, ...]
    """Why the image was held back; () where nothing was suspicious."""
    accepted: bool
    """Somebody looked at it and took it in spite of `reasons`."""
    warnings: tuple[str, ...]
    software: Mapping[str, str]
    """Versions by package, and what was run for `bias_field` and `skull_strip`."""
    inputs: str
    """SHA-256 of everything the image was made from: names, sizes and times of files, settings, atlas."""
    image: str
    """SHA-256 of the image's file; empty: held back, so there is none."""
    mask: str
    """SHA-256 of the mask's file; empty: there is none."""

    @property
    def held_back(self) -> bool:
        """No image was written."""
        return bool(self.reasons) and not self.accepted

    def to_json(self) -> dict[str, Any]:
        """As written in the file."""
        out = {"format": FORMAT, "version": VERSION}
        return out | {one.name: _plain(getattr(self, one.name)) for one in fields(self)}

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> Self:
        """Strict: every field, of its type, and no other. Raises ValueError."""
        if raw.get("format") != FORMAT:
            raise ValueError("not a record of splitpeer data prepare")
        if raw.get("version") != VERSION:
            raise ValueError(f"version {raw.get('version')!r}, not {VERSION}: prepare the patient again")
        body = {key: value for key, value in raw.items() if key not in ("format", "version")}
        body.setdefault("kept", body.get("method"))  # older records: nothing else could be kept
        values = _checked(body, _FIELDS)
        if values["frames"] is not None:
            if len(values["files"]) != 1 or len(values["frames"]) != values["shape"][2]:
                raise ValueError("frames do not match the slices")
        elif len(values["files"]) != values["shape"][2]:
            raise ValueError("files do not match the slices")
        return cls(**values)


def is_of(path: Path, digest: str) -> bool:
    """Whether a file is the one with this SHA-256, as a record has it; an empty one is that of a missing file.

    Raises:
        DataError: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == digest
    except FileNotFoundError:
        return not digest
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}): check the file", "unreadable") from None


def record_of(image: Path) -> Path:
    """Where the record of an image lies."""
    return image.parent / FOLDER / f"{stem(image)}.json"


def read(path: Path) -> PreparedRecord:
    """A record. Raises DataError: missing, or no record."""
    try:
        return PreparedRecord.from_json(reading.document(path, MAX_RECORD))
    except FileNotFoundError:
        raise DataError(
            f"{path}: no record of where the image came from: make it with splitpeer data prepare", "missing"
        ) from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}): check the file", "unreadable") from None
    except ValueError as error:
        raise DataError(f"{path}: {error}: prepare the patient again") from None


def write(path: Path, record: PreparedRecord) -> None:
    """Write a record whole or not at all. Raises OSError."""
    text = json.dumps(record.to_json(), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    durable.replace(path, text.encode())


# --- inside ------------------------------------------------------------------------------------------------


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, AtlasGrid):
        return {one.name: _plain(getattr(value, one.name)) for one in fields(value)}
    if isinstance(value, tuple):
        return list(value)
    return dict(value) if isinstance(value, Mapping) else value


def _checked(raw: Mapping[str, Any], wanted: Mapping[str, Any]) -> dict[str, Any]:
    if lacking := sorted(wanted.keys() - raw.keys()):
        raise ValueError(f"{lacking[0]} is missing")
    if strange := sorted(raw.keys() - wanted.keys()):
        raise ValueError(f"{strange[0]} is unknown")
    out = {}
    for name, check in wanted.items():
        try:
            out[name] = check(raw[name])
        except (TypeError, ValueError):
            raise ValueError(f"{name} has a wrong value") from None
    return out


def _wrong() -> ValueError:
    return ValueError("wrong")


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise _wrong()
    return value


def _texts(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list):
        raise _wrong()
    return tuple(map(_text, value))


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise _wrong()
    return value


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 2**31:
        raise _wrong()
    return value


def _figure(value: Any) -> float:
    if type(value) not in (int, float) or not math.isfinite(value):
        raise _wrong()
    return float(value)


def _frames(value: Any) -> tuple[int, ...] | None:
    return None if value is None else tuple(map(_count, value))


def _shape(value: Sequence[Any]) -> Triple:
    x, y, z = map(_count, value)
    if min(x, y, z) < 1:
        raise _wrong()
    return x, y, z


def _matrix(value: Any) -> NDArray[np.float64]:
    """4x4, finite, with the last row of an affine map, and not singular."""
    matrix = np.array([[_figure(one) for one in row] for row in value], np.float64)
    if matrix.shape != (4, 4) or not np.array_equal(matrix[3], (0, 0, 0, 1)):
        raise _wrong()
    if abs(np.linalg.det(matrix)) < 1e-9:
        raise _wrong()
    return matrix


def _atlas(value: Any) -> AtlasGrid:
    wanted = {"name": _text, "sha256": _text, "shape": _shape, "affine": _matrix}
    return AtlasGrid(**_checked(value, wanted))


def _method(value: Any) -> Method:
    if value not in get_args(Method):
        raise _wrong()
    return value  # type: ignore[no-any-return]  # one of the literals, as just seen


def _quality(value: Any) -> dict[str, float]:
    return {_text(name): _figure(one) for name, one in dict(value).items()}


def _software(value: Any) -> dict[str, str]:
    return {_text(name): _text(one) for name, one in dict(value).items()}


_FIELDS: Mapping[str, Any] = {
    "patient": _text, "modality": _text, "study": _text, "series": _text, "frame_of_reference": _text,
    "files": _texts, "frames": _frames, "shape": _shape, "affine": _matrix, "atlas": _atlas, "transform": _matrix,
    "method": _method, "kept": _method, "quality": _quality, "reasons": _texts, "accepted": _flag, "warnings": _texts,
    "software": _software, "inputs": _text, "image": _text, "mask": _text,
}  # fmt: skip
