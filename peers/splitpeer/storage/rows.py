"""Rows of a safetensors file that was verified as a whole: read alone, as long as the file has not changed."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from splitpeer.storage import descriptors, reading

Stamp = tuple[int, ...]
"""Of a file: another one, or a changed one, has another."""


def stamp(path: Path) -> Stamp:
    """As the file is now. Raises OSError."""
    return _stamp(os.stat(path, follow_symlinks=False))


@dataclass(frozen=True)
class VerifiedFile:
    """A file as it was when it was verified."""

    stamp: Stamp
    begin: int
    """Where the tensors begin."""
    offsets: Mapping[str, int]
    """Of each tensor, from there."""

    @classmethod
    def of(cls, stamp: Stamp, octets: bytes) -> VerifiedFile:
        """From the octets of the whole file, which are those of a safetensors file."""
        begin = 8 + int.from_bytes(octets[:8], "little")
        header: dict[str, Any] = dict(reading.parse(octets[8:begin]))
        return cls(
            stamp,
            begin,
            {name: said["data_offsets"][0] for name, said in header.items() if "data_offsets" in said},
        )

    def row(
        self, path: Path, row: int, shapes: Mapping[str, tuple[int, ...]], dtypes: Mapping[str, str]
    ) -> dict[str, np.ndarray] | None:
        """Row `row` of each tensor, without its first axis; None: the file is not the one that was verified.

        Args:
            shapes: of the whole tensors.
            dtypes: of each.

        Raises:
            OSError: it cannot be read.
        """
        flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW
        file = descriptors.spared(lambda: os.open(path, flags))
        try:
            if _stamp(os.fstat(file)) != self.stamp:
                return None
            found = {name: np.empty(shape[1:], dtypes[name]) for name, shape in shapes.items()}
            for name, array in found.items():
                at = self.begin + self.offsets[name] + row * array.nbytes
                if os.preadv(file, [array.reshape(-1).view(np.uint8).data], at) != array.nbytes:
                    return None
            return found
        finally:
            os.close(file)


def _stamp(found: os.stat_result) -> Stamp:
    # Who writes a file sets its times of change, and only the system sets the second.
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns
