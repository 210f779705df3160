"""Run folders: `attack.json`, `reconstructions.npz`, and `frontier.json` of a sweep; never a pickle."""

from __future__ import annotations

import io
import math
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray
from pydantic import ValidationError

from splitpeer.errors import DataError
from splitpeer.report.model import AuditRun, Frontier
from splitpeer.storage import durable, reading

ATTACK, ARRAYS, FRONTIER = "attack.json", "reconstructions.npz", "frontier.json"
Arrays = Mapping[str, NDArray[Any]]


MAX_ARRAYS = 1 << 30
"""Bytes of all arrays of a run folder, unpacked; they are read one at a time."""
LARGEST = 1e15
"""Largest number that a description may hold."""
MAX_NPY_HEADER = 10_000
"""Characters of one array's description (numpy's own limit)."""


@dataclass(frozen=True)
class Folder:
    """One run folder, read."""

    path: Path
    run: AuditRun | None
    """None: a sweep's folder with nothing but a frontier."""
    arrays: Arrays = field(default_factory=dict)
    frontier: Frontier | None = None


def save_run(folder: Path, run: AuditRun, arrays: Arrays) -> None:
    """Write a run folder; an older one of that name is replaced file by file, each whole or not at all.

    Args:
        folder: made if it is not there.
        run: see `AuditRun`.
        arrays: numbers or truth values by name:
            truth_<modality> [N, 1, *spatial] normalised intensities; masks [N, regions, *spatial] 0/1;
            floor_<modality> [N, 1, *spatial] what one would show without seeing anything;
            <entry id> [n, 1, *spatial] images or [n, *spatial] maps, rows as the entry says;
            tumour_<entry id> [n, *spatial] 0/1, the tumour found in the reconstruction. All optional.

    Raises:
        DataError: the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        packed = io.BytesIO()
        plain: dict[str, Any] = dict(_plain(arrays))
        np.savez_compressed(packed, **plain)
        durable.replace(folder / ARRAYS, packed.getvalue(), sync=False)
        # pydantic writes NaN and infinity as null.
        durable.replace(folder / ATTACK, run.model_dump_json(indent=2).encode() + b"\n", sync=False)
    except OSError as error:
        raise DataError(f"{folder}: cannot be written: {error.strerror}") from None


def _plain(arrays: Arrays) -> dict[str, NDArray[Any]]:
    for name, array in arrays.items():
        if array.dtype.kind not in "fiub":
            raise ValueError(f"{name} is {array.dtype}: only numbers and truth values are kept")
    return {
        name: array.astype(np.float32) if array.dtype == np.float64 else array
        for name, array in arrays.items()
    }


def load_run(folder: Path) -> Folder:
    """Read a run folder. Arrays are read when they are asked for.

    Raises:
        DataError: no such folder, nothing of a run in it, or a file that is damaged or of another version.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; name a folder that splitpeer attack or audit wrote")
    run = frontier = None
    if (folder / ATTACK).exists():
        run = _parse(folder / ATTACK, AuditRun)
    if (folder / FRONTIER).exists():
        frontier = _parse(folder / FRONTIER, Frontier)
    if run is None and frontier is None:
        raise DataError(f"{folder}: holds no {ATTACK}; name a folder that splitpeer attack or audit wrote")
    arrays: Arrays = {}
    if run is not None and (folder / ARRAYS).exists():
        arrays = _Lazy(folder / ARRAYS)
    return Folder(folder, run, arrays, frontier or (run.frontier if run else None))


def _parse(path: Path, kind: Any) -> Any:
    try:
        data = reading.read(path, reading.MAX_JSON, follow=True)
        _check_numbers(reading.parse(data))
        return kind.model_validate_json(data)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        if place == "format":
            raise DataError(f"{path}: of another version of splitpeer; run the attack again") from None
        raise DataError(f"{path}: {place + ': ' if place else ''}{first['msg']}") from None
    except ValueError as error:
        raise DataError(f"{path}: not a description of a run: {_line(error)}") from None


def _check_numbers(value: Any, place: str = "") -> None:
    """No figure of a report is near the end of the float range, where drawing and rounding overflow.

    Raises:
        ValueError: NaN, infinity, or beyond `LARGEST`.
    """
    if isinstance(value, dict):
        for name, one in value.items():
            _check_numbers(one, f"{place}.{name}" if place else name)
    elif isinstance(value, list):
        for index, one in enumerate(value):
            _check_numbers(one, f"{place}.{index}")
    elif isinstance(value, int | float) and not abs(value) <= LARGEST:
        raise ValueError(f"{place} is {value:.3g}" if isinstance(value, float) else f"{place} is too large")


class _Lazy(Mapping[str, NDArray[Any]]):
    """The arrays of an .npz, each read and checked when it is asked for."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._names: tuple[str, ...] = self._read("", lambda archive: tuple(archive.files))

    def __getitem__(self, name: str) -> NDArray[Any]:
        if name not in self._names:
            raise KeyError(name)
        array: NDArray[Any] = self._read(f"{name} ", lambda archive: _array(archive, name))
        return array

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def _read(self, what: str, take: Callable[[Any], Any]) -> Any:
        try:
            # Opened here: numpy leaves its own handle open where the archive is damaged.
            with self._path.open("rb") as file:
                archive = np.load(file, allow_pickle=False)
                if not isinstance(archive, np.lib.npyio.NpzFile):
                    raise ValueError("no archive of arrays")
                # Before memory is taken: an archive of zeros unpacks to a thousand times its size.
                if sum(member.file_size for member in _zip(archive).infolist()) > MAX_ARRAYS:
                    raise ValueError(f"its arrays take more than {reading.size(MAX_ARRAYS)} unpacked")
                return take(archive)
        except (
            OSError, ValueError, EOFError, MemoryError, RuntimeError, zipfile.BadZipFile, zlib.error,
        ) as error:  # fmt: skip
            raise DataError(f"{self._path}: {what}cannot be read: {_line(error)}") from None


def _zip(archive: np.lib.npyio.NpzFile) -> zipfile.ZipFile:
    if archive.zip is None:
        raise ValueError("the archive is closed")
    return archive.zip


def _array(archive: np.lib.npyio.NpzFile, name: str) -> NDArray[Any]:
    """One array; numpy would allocate what the array's header claims, so the claim is checked against its bytes."""
    member = f"{name}.npy"
    with _zip(archive).open(member) as file:
        read = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}.get(
            npy.read_magic(file)
        )
        if read is None:
            raise ValueError("of an unknown version of numpy's format")
        shape, _, dtype = read(file, max_header_size=MAX_NPY_HEADER)
        if dtype.kind not in "fiub":
            raise ValueError(f"holds {dtype}, not numbers")
        if math.prod(shape) * dtype.itemsize != _zip(archive).getinfo(member).file_size - file.tell():
            raise ValueError(
                f"its header claims {'x'.join(map(str, shape))} values of {dtype}, its size does not"
            )
    array: NDArray[Any] = archive[name]
    return array


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
