"""Disks that are full, and what a loss of power leaves."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from .disk import Crash, Disks
from .virtual import Dead, Life


class Machine:
    def __init__(self, folder: Path) -> None:
        self.folder = folder / "hub"
        self.folder.mkdir()
        self.story: list[str] = []
        self.life = Life("hub")
        self.disks = Disks(folder, 1, self.die, self.story.append)
        self.disks.remember = True

    def die(self, life: Life, power: bool) -> None:
        life.alive = False
        self.disks.release(life)
        if power:
            self.disks.power_lost(life.name)

    def do(self, function, *args):
        """As a process of this machine."""
        return self.life.context.run(function, *args)


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    made = Machine(tmp_path)
    with made.disks.installed():
        yield made


def write(path: Path, data: bytes) -> None:
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    os.write(file, data)
    os.close(file)


def sync(path: Path) -> None:
    file = os.open(path, os.O_RDONLY)
    os.fsync(file)
    os.close(file)


@pytest.mark.parametrize("how", ["os", "open", "path"])
def test_a_full_disk(machine, how: str) -> None:
    def attempt() -> None:
        path = machine.folder / "x"
        if how == "os":
            write(path, b"1")
        elif how == "path":
            path.write_text("1")
        else:
            with open(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600), "wb") as file:
                file.write(b"1")

    machine.disks.full("hub", True)
    with pytest.raises(OSError) as caught:
        machine.do(attempt)
    assert caught.value.errno == errno.ENOSPC
    attempt()  # not of that machine
    (machine.folder / "x").unlink()
    machine.disks.full("hub", False)
    machine.do(attempt)
    assert (machine.folder / "x").read_bytes() == b"1"


def test_a_dead_process_writes_nothing(machine) -> None:
    path = machine.folder / "x"
    machine.do(write, path, b"1")
    held = machine.do(os.open, path, os.O_WRONLY)
    machine.life.alive = False
    for attempt in (
        lambda: write(path, b"2"),
        lambda: path.write_text("2"),
        lambda: os.write(held, b"2"),
        lambda: os.replace(path, machine.folder / "y"),
        path.unlink,
        (machine.folder / "z").mkdir,
    ):
        with pytest.raises(Dead):
            machine.do(attempt)
    assert os.listdir(machine.folder) == ["x"] and path.read_bytes() == b"1"


def test_locks_end_with_their_process(machine) -> None:
    path = machine.folder / "lock"

    def lock() -> None:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)

    machine.do(lock)
    with pytest.raises(BlockingIOError):
        machine.do(lock)
    machine.die(machine.life, False)
    machine.life = Life("hub")
    machine.do(lock)


def test_a_process_dies_in_the_middle_of_a_write(machine) -> None:
    machine.disks.crashes.append(Crash("hub", "write", "step-"))
    with pytest.raises(Dead):
        machine.do(write, machine.folder / "step-1.part", b"12345678")
    assert not machine.life.alive
    assert (machine.folder / "step-1.part").read_bytes() == b"1234"


def outcomes(tmp_path: Path, steps) -> set[bytes | None]:
    """What `x` may be after power went, over many draws."""
    found: set[bytes | None] = set()
    for number in range(60):
        (tmp_path / str(number)).mkdir()
        machine = Machine(tmp_path / str(number))
        machine.disks._random.seed(number)
        with machine.disks.installed():
            machine.do(steps, machine.folder)
            machine.disks.power_lost("hub")
        path = machine.folder / "x"
        found.add(path.read_bytes() if path.exists() else None)
    return found


def test_power_takes_what_was_not_synced(tmp_path) -> None:
    def unsynced(folder: Path) -> None:
        write(folder / "x", b"12")

    assert outcomes(tmp_path, unsynced) == {None, b"", b"1", b"12"}


def test_power_takes_a_name_that_was_not_synced(tmp_path) -> None:
    def name_unsynced(folder: Path) -> None:
        write(folder / "x", b"12")
        sync(folder / "x")

    assert outcomes(tmp_path, name_unsynced) == {None, b"12"}


def test_power_undoes_a_rename_that_was_not_synced(tmp_path) -> None:
    def renamed(folder: Path) -> None:
        write(folder / "x", b"old")
        sync(folder / "x")
        sync(folder)
        write(folder / "part", b"new")
        sync(folder / "part")
        os.replace(folder / "part", folder / "x")

    assert outcomes(tmp_path, renamed) == {b"old", b"new"}


def test_power_leaves_what_was_synced(tmp_path) -> None:
    def durably(folder: Path) -> None:
        write(folder / "part", b"new")
        sync(folder / "part")
        os.replace(folder / "part", folder / "x")
        sync(folder)

    assert outcomes(tmp_path, durably) == {b"new"}


def test_power_takes_the_end_of_what_was_appended(tmp_path) -> None:
    def append(folder: Path) -> None:
        write(folder / "x", b"12")
        sync(folder / "x")
        sync(folder)
        with (folder / "x").open("ab") as file:
            file.write(b"34")

    assert outcomes(tmp_path, append) == {b"12", b"123", b"1234"}
