"""A journal: what was added is there whatever happens next, and what could not be added is not."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from splitpeer.errors import DataError, DiskTrouble
from splitpeer.storage import durable, journal
from splitpeer.storage.journal import Journal

from .training.power_loss import Disk, Killed, lay_out


def opened(path: Path, most_mib: int = 1) -> tuple[Journal, list[Any]]:
    """The journal, and the numbers that its lines hold."""
    one, found = Journal(path, most_mib, "so nobody knows"), []
    one.read(lambda said: found.append(said["number"]))
    return one, found


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "it.jsonl"


def test_lines_come_back_in_order(path: Path) -> None:
    first, found = opened(path)
    assert found == [] and not path.exists()
    for number in range(3):
        first.add(number=number, text="ü")
    assert path.stat().st_mode & 0o777 == 0o600
    assert opened(path)[1] == [0, 1, 2]


@pytest.mark.parametrize("torn", [b'{"num', b'{"number":7}', bytes(20), b'\0\0\0\0er":7}\n'])
def test_a_torn_last_line_is_cut_off_and_not_glued_to_the_next(path: Path, torn: bytes) -> None:
    opened(path)[0].add(number=1)
    path.write_bytes(path.read_bytes() + torn)
    again, found = opened(path)
    assert found == [1]
    again.add(number=2)
    assert opened(path)[1] == [1, 2]


@pytest.mark.parametrize(
    "damage", [b"half\n", b'{"other":1}\n', b"[1]\n", b'{"number":1}\n\0\n{"number":2}\n', b"\xff\n"]
)
def test_other_damage_is_not_guessed_at(path: Path, damage: bytes) -> None:
    path.write_bytes(damage + b'{"number":3}\n')
    with pytest.raises(DataError, match=r"it\.jsonl: damaged, so nobody knows; restore the file from") as one:
        opened(path)
    assert "\n" not in str(one.value)


def test_a_line_that_finds_no_room_leaves_nothing(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, _ = opened(path)
    one.add(number=1)
    before, honest, times = path.read_bytes(), os.write, iter([True, False])

    def write(file: int, octets: Any) -> int:
        if next(times):
            return honest(file, octets[:5])
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "write", write)
        with pytest.raises(DiskTrouble, match="make room"):
            one.add(number=2)
    assert path.read_bytes() == before
    one.add(number=3)
    assert opened(path)[1] == [1, 3]


def test_half_a_line_that_could_not_be_taken_back_is_overwritten(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, _ = opened(path)
    one.add(number=1)
    honest, broken = os.ftruncate, False

    def fsync(file: int) -> None:
        nonlocal broken
        broken = True
        raise OSError(errno.EIO, "Input/output error")

    def ftruncate(file: int, size: int) -> None:
        if broken:
            raise OSError(errno.EIO, "Input/output error")
        honest(file, size)

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", fsync)
        patched.setattr(os, "ftruncate", ftruncate)
        with pytest.raises(DiskTrouble):
            one.add(number=2)
    assert b"2" in path.read_bytes()
    one.add(number=3)
    assert opened(path)[1] == [1, 3]


def test_it_has_a_limit_that_is_met_before_memory_is_taken(path: Path) -> None:
    one, _ = opened(path)
    for number in range(2):
        one.add(number=number, text="x" * (500 << 10))
    with pytest.raises(DataError, match=r"reaches 1 MiB.*raise \[policy\] max_record_mib") as full:
        one.add(number=2, text="x" * (500 << 10))
    assert "\n" not in str(full.value)
    one.add(number=3)
    assert opened(path)[1] == [0, 1, 3]
    os.truncate(path, 2 << 40)
    with pytest.raises(DataError, match=r"reaches 1 MiB.*raise \[policy\] max_record_mib"):
        opened(path)


def test_somebody_who_cuts_it_meanwhile_is_noticed(path: Path) -> None:
    one, _ = opened(path)
    one.add(number=1)
    path.unlink()
    with pytest.raises(DataError, match="it was cut or removed while this process used it"):
        one.add(number=2)


def test_what_was_added_survives_a_loss_of_power_at_any_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SP-11.17-4, SP-11.18-13: whatever may lie there then, all lines whose `add` returned are read."""
    root = tmp_path / "disk"
    root.mkdir()
    looks = _looks(tmp_path)
    for killed_at in range(100):
        disk, kept = Disk(root), list[int]()
        disk.killed_at = killed_at
        with monkeypatch.context() as patched:
            for module in (journal, durable):
                patched.setattr(module, "os", disk)
            one = Journal(root / "it.jsonl", 1, "so nobody knows")
            one.read(lambda said: None)
            try:
                for number in range(2):
                    one.add(number=number, text="x" * 400)
                    kept.append(number)
            except Killed:
                pass
        for state in disk.states(len(disk.calls)):
            found = opened(lay_out(state, next(looks)) / "it.jsonl")[1]
            assert found[: len(kept)] == kept and len(found) <= len(kept) + 1
        (root / "it.jsonl").unlink(missing_ok=True)
        if len(kept) == 2:
            return
    raise AssertionError("it never came to its end")


def _looks(folder: Path) -> Iterator[Path]:
    number = 0
    while True:
        number += 1
        yield folder / f"look-{number}"
