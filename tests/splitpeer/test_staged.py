"""Files that appear together, or not at all, whatever ends the block."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from splitpeer.errors import ConfigError, DataError, DiskTrouble
from splitpeer.storage.staged import Staged


def test_nothing_is_seen_before_all_are_whole(tmp_path: Path) -> None:
    one, two = tmp_path / "a" / "one", tmp_path / "b" / "two"
    for path in (one, two):
        path.parent.mkdir()
    one.write_text("older")
    with Staged() as staged:
        staged.at(one).write_text("newer")
        staged.at(two).write_text("new")
        assert one.read_text() == "older" and not two.exists()
        assert [path.name for path in staged.written] == ["one", "two"]
    assert (one.read_text(), two.read_text()) == ("newer", "new")
    assert staged.final == [one, two]
    assert [os.listdir(path.parent) for path in (one, two)] == [["one"], ["two"]]


def broken_off(path: Path, error: BaseException) -> None:
    with Staged() as staged:
        staged.at(path).write_text("newer")
        raise error


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, DataError])
def test_a_block_that_fails_changes_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "one"
    path.write_text("older")
    with pytest.raises(error):
        broken_off(path, error("broken off"))
    assert path.read_text() == "older" and os.listdir(tmp_path) == ["one"]


def test_an_error_names_the_place(tmp_path: Path) -> None:
    path, staged = tmp_path / "mask.nii.gz", Staged()
    with pytest.raises(DiskTrouble) as caught, staged:
        raise DiskTrouble(f"{staged.at(path)} cannot be written (full): make room", "disk-full")
    assert str(caught.value) == f"{path} cannot be written (full): make room"
    assert (caught.value.cause, caught.value.exit_code) == ("disk-full", 3)


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="one cannot be written"), Staged() as staged:
        staged.at(tmp_path / "no" / "one")
