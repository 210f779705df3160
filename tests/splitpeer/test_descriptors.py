"""When connections have taken every file descriptor, a run still writes its files, or names the cause."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from splitpeer.errors import DiskTrouble
from splitpeer.storage import checkpoint, descriptors, durable

STATE = {"weight": torch.ones(3)}


@pytest.fixture
def none_left(tmp_path: Path) -> Iterator[int]:
    """Everything up to the soft limit is open, as after a flood of connections; how much that is."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken: list[int] = []
    checkpoint.save(tmp_path / "first", 1, STATE, {})  # what is imported by the first one is imported
    limit = max(int(name) for name in os.listdir("/proc/self/fd")) + 20
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    try:
        with suppress(OSError):
            while True:
                taken.append(os.open(os.devnull, os.O_RDONLY))
        yield limit
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for file in taken:
            os.close(file)


def test_a_checkpoint_is_written_from_the_reserve(none_left: int, tmp_path: Path) -> None:
    for step in range(3):
        checkpoint.save(tmp_path / "checkpoints", step, STATE, {})
    assert max(checkpoint.available(tmp_path / "checkpoints")) == 2
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == none_left, "connections get none of it afterwards"
    with pytest.raises(OSError, match="Too many open files"):
        os.open(os.devnull, os.O_RDONLY)


def test_other_files_of_a_run_are_written_from_the_reserve(none_left: int, tmp_path: Path) -> None:
    durable.replace(tmp_path / "status.json", b"{}")
    durable.make_folder(tmp_path / "a" / "b")
    assert (tmp_path / "status.json").stat().st_size == 2


def test_without_a_reserve_the_cause_is_named(
    none_left: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(descriptors.resource, "setrlimit", lambda *_: None)
    with pytest.raises(DiskTrouble, match=r"Too many open files\); raise the limit .*LimitNOFILE") as caught:
        checkpoint.save(tmp_path, 1, STATE, {})
    assert "change the folder" not in str(caught.value)
    assert caught.value.exit_code == 3, "a service manager may start it again"
    with pytest.raises(OSError, match="Too many open files") as failed:
        durable.replace(tmp_path / "result.json", b"{}")
    told = durable.refusal(failed.value, "result.json", "--out")
    assert isinstance(told, DiskTrouble)
    assert "LimitNOFILE" in str(told)
    assert "--out" not in str(told)


@pytest.mark.parametrize(
    ("hard", "soft"), [(1024, 1024 - descriptors.RESERVE), (256, 256 - descriptors.RESERVE), (100, 100)]
)
def test_the_soft_limit_is_raised_and_leaves_a_reserve(
    hard: int, soft: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[tuple[int, int]] = []
    monkeypatch.setattr(descriptors.resource, "getrlimit", lambda _: (64, hard))
    monkeypatch.setattr(descriptors.resource, "setrlimit", lambda _, limits: given.append(limits))
    assert descriptors.raise_limit() == soft
    assert given == [(soft, hard)]


def test_another_error_is_not_about_descriptors(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        descriptors.spared(lambda: os.open(tmp_path / "missing", os.O_RDONLY))
