"""One NIfTI file: its grid from the header, its voxels in RAS order, and one clear line when it is broken."""

from __future__ import annotations

import errno
import gzip
import math
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import IO, cast

import numpy as np

from splitpeer.data.files import Case
from splitpeer.data.nifti_header import HEADER_BYTES, NiftiHeader, kind_of, parse
from splitpeer.data.rules import Rules
from splitpeer.errors import DataError

__all__ = ["NiftiHeader", "Rules", "read_header", "read_voxels"]

MOST_TIMES_SMALLER = 1032
"""Deflate's best ratio: a compressed file that claims to hold more than this many times its size is refused unread."""
MOST_BEHIND = 2**20
"""Bytes tolerated after the last voxel (padding); a file with more is refused."""
_PIECE = 2**22

_UNREADABLE = (OSError, EOFError, zlib.error)


def read_header(case: Case, rules: Rules | None = None) -> NiftiHeader:
    """The grid of a case, from the header alone. Raises DataError for a file that cannot be used."""
    with _opened(case) as (file, size, packed):
        return _header(case, file, size, packed, rules or Rules())


def read_voxels(case: Case, rules: Rules | None = None) -> tuple[np.ndarray, NiftiHeader]:
    """Voxels float32 [x, y, z] in RAS order, scaled as the header asks. Reads the whole file.

    Takes no memory for what the file does not hold. Raises DataError for a truncated or corrupt file (a gzip's check
    sum is verified), a value that is not finite, a number of axes other than the case needs, or a channel that is not
    there.
    """
    with _opened(case) as (file, size, packed):
        header = _header(case, file, size, packed, rules or Rules())
        file.seek(header.offset)
        _skip(file, (case.channel or 0) * header.volume_bytes)
        stored = _values(file, header)
        _skip(file, (header.channels - 1 - (case.channel or 0)) * header.volume_bytes)
        _end(case, file)
    if not np.isfinite(stored).all():
        raise DataError(
            f"{case.path}: holds values that are not finite numbers: export it again without NaN or Inf",
            "not-finite",
        )
    return np.ascontiguousarray(header.turn.voxels(stored)), header


def _header(case: Case, file: IO[bytes], size: int, packed: bool, rules: Rules) -> NiftiHeader:
    block = _read(file, HEADER_BYTES, short=True)
    if (kind := kind_of(block)) is not None:
        if kind == "empty":
            raise DataError(f"{case.path}: empty: copy it again", "truncated")
        raise DataError(f"{case.path}: not a NIfTI file but {kind}: convert it, for instance with dcm2niix")
    try:
        header = parse(block, case.channel, rules)
    except DataError as error:
        raise DataError(f"{case.path}: {error}", error.cause) from None
    due = header.offset + header.channels * header.volume_bytes
    if due > (size * MOST_TIMES_SMALLER if packed else size):
        raise DataError(
            f"{case.path}: truncated or corrupt (its header claims {due} bytes, which a file of {size} cannot hold): "
            "copy or export it again",
            "truncated",
        )
    named = case.path.name.lower().endswith(".gz")
    if named is packed:
        return header
    what = "is compressed but not named .nii.gz" if packed else "is named .gz but not compressed"
    return replace(header, warnings=(*header.warnings, f"{what}: other programs may refuse it"))


def _values(file: IO[bytes], header: NiftiHeader) -> np.ndarray:
    """SP-11.12-2: one channel, float32, axes as stored; read and scaled piece by piece."""
    total = math.prod(header.stored_shape)
    flat = np.empty(total, np.float32)
    scaled = (header.slope, header.intercept) != (1.0, 0.0)
    step = _PIECE // header.dtype.itemsize
    for start in range(0, total, step):
        count = min(step, total - start)
        piece = np.frombuffer(_read(file, count * header.dtype.itemsize), header.dtype)
        # A sum or a value beyond float32 becomes infinite, which is refused with a name.
        with np.errstate(over="ignore", invalid="ignore"):
            flat[start : start + count] = (
                piece.astype(np.float64) * header.slope + header.intercept if scaled else piece
            )
    return flat.reshape(header.stored_shape, order="F")


def _read(file: IO[bytes], count: int, *, short: bool = False) -> bytes:
    pieces, left = [], count
    while left and (piece := file.read(left)):
        pieces.append(piece)
        left -= len(piece)
    if left and not short:
        raise EOFError(f"the file ends {left} bytes or more too early")
    return b"".join(pieces)


def _skip(file: IO[bytes], count: int) -> None:
    while count > 0:
        count -= len(_read(file, min(count, _PIECE)))


def _end(case: Case, file: IO[bytes]) -> None:
    """Read to the end, where a gzip's check sum is compared; but only so far."""
    behind = 0
    while piece := file.read(2**16):
        behind += len(piece)
        if behind > MOST_BEHIND:
            raise DataError(
                f"{case.path}: holds more than {MOST_BEHIND} bytes that its header does not describe: export it again",
                "too-large",
            )


@contextmanager
def _opened(case: Case) -> Iterator[tuple[IO[bytes], int, bool]]:
    """The file, its size on disk, and whether it is compressed: by content, whatever its name.

    Whatever a broken file makes zlib raise becomes one line that names the file.
    """
    try:
        with case.path.open("rb") as raw:
            size = os.fstat(raw.fileno()).st_size
            packed = raw.read(2) == b"\x1f\x8b"
            raw.seek(0)
            if packed:
                with gzip.GzipFile(fileobj=raw) as unpacked:
                    yield cast("IO[bytes]", unpacked), size, True
            else:
                yield raw, size, False
    except FileNotFoundError:
        raise DataError(f"{case.path}: no such file: check the path", "missing") from None
    except _UNREADABLE as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise _unread(case, error) from None
        cause = " ".join(str(error).split())[:200] or type(error).__name__
        text = f"{case.path}: truncated or corrupt ({cause}): copy or export it again"
        raise DataError(text, "truncated") from None


def _unread(case: Case, error: OSError) -> DataError:
    """A failed read as an error: caused by this file, or by a lack of resources of our own."""
    cause = {errno.EMFILE: "descriptors", errno.ENFILE: "descriptors", errno.ENOMEM: "memory"}
    return DataError(
        f"{case.path}: cannot be read ({error.strerror}): check the file and the disk",
        cause.get(error.errno or 0, "unreadable"),
    )
