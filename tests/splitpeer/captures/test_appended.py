"""A file that only grows: the same octets past the cache and through it, all of a record or nothing."""

from __future__ import annotations

import errno
import fcntl
import os
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from splitpeer.captures.appended import BLOCK, AppendedFile

OCTETS = np.random.default_rng(0).integers(0, 256, 1400 * BLOCK, np.uint8).tobytes()


def direct(file: AppendedFile) -> bool:
    return bool(fcntl.fcntl(file._file, fcntl.F_GETFL) & os.O_DIRECT)


def cut(octets: bytes, *sizes: int) -> list[bytes | memoryview]:
    """In buffers of these sizes, and one with the rest."""
    places = [0, *np.cumsum(sizes), len(octets)]
    return [memoryview(octets)[a:b] for a, b in pairwise(places)]


def test_past_the_cache_and_through_it(tmp_path: Path) -> None:
    file = AppendedFile(tmp_path / "a")
    whole = b""
    for blocks, past in ((1, True), (3, False), (1200, True), (1, False), (512, True), (2, True)):
        octets = OCTETS[: blocks * BLOCK]
        file.append(cut(octets, 12, 1000, 5), direct=past)
        whole += octets
        assert file.octets == len(whole)
        assert (tmp_path / "a").read_bytes() == whole
    file.sync()
    file.close()
    file.close()
    assert (tmp_path / "a").read_bytes() == whole


def test_only_what_is_asked_to_goes_past_the_cache(tmp_path: Path) -> None:
    file = AppendedFile(tmp_path / "a")
    file.append([OCTETS[:BLOCK]], direct=True)
    if file._refused:
        pytest.skip("this file system has no direct writes")
    assert direct(file)
    file.append([OCTETS[:BLOCK]])
    assert not direct(file)
    file.close()


@pytest.mark.parametrize("refuses", ["fcntl", "write"])
def test_a_file_system_that_cannot_is_written_through_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refuses: str
) -> None:
    control, write = fcntl.fcntl, os.write
    refusals: list[int] = []

    def no_flag(file: int, what: int, flags: int = 0) -> int:
        if refuses == "fcntl" and flags & os.O_DIRECT:
            refusals.append(what)
            raise OSError(errno.EINVAL, "cannot")
        return control(file, what, flags)

    def no_write(file: int, octets: Any) -> int:
        if refuses == "write" and control(file, fcntl.F_GETFL) & os.O_DIRECT:
            refusals.append(file)
            raise OSError(errno.EINVAL, "cannot")
        return write(file, octets)

    monkeypatch.setattr(fcntl, "fcntl", no_flag)
    monkeypatch.setattr(os, "write", no_write)
    file = AppendedFile(tmp_path / "a")
    for _ in range(2):
        file.append(cut(OCTETS, 7, 4089), direct=True)
    assert not direct(file)
    assert (tmp_path / "a").read_bytes() == OCTETS * 2
    assert len(refusals) == 1, "not asked again"
    file.close()


@pytest.mark.parametrize("past", [True, False])
def test_what_fails_half_way_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, past: bool
) -> None:
    file = AppendedFile(tmp_path / "a")
    file.append([OCTETS[:BLOCK]], direct=past)
    written = 0

    def full(write: Any) -> Any:
        def short(descriptor: int, what: Any) -> int:
            nonlocal written
            if written >= 300 * BLOCK:
                raise OSError(errno.ENOSPC, "full")
            first = what if past else what[0]
            written += (size := write(descriptor, first[: 100 * BLOCK] if past else [first[: 100 * BLOCK]]))
            return int(size)

        return short

    monkeypatch.setattr(os, "write", full(os.write))
    monkeypatch.setattr(os, "writev", full(os.writev))
    with pytest.raises(OSError, match="full"):
        file.append([OCTETS], direct=past)
    monkeypatch.undo()
    assert written >= 300 * BLOCK
    assert (file.octets, (tmp_path / "a").read_bytes()) == (BLOCK, OCTETS[:BLOCK])
    file.append([OCTETS], direct=past)
    assert (tmp_path / "a").read_bytes() == OCTETS[:BLOCK] + OCTETS
    file.close()


def test_never_over_another_file(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("a diary")
    with pytest.raises(FileExistsError):
        AppendedFile(tmp_path / "a")
    assert (tmp_path / "a").read_text() == "a diary"
