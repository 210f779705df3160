"""Hostile files: bombs, false sizes, links and pipes end in one line, before memory is allocated for them."""

from __future__ import annotations

import os
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch

from splitpeer import cli
from splitpeer.daemon import observe as seen
from splitpeer.daemon.board import NAME as STATUS
from splitpeer.daemon.trail import NAME as TRAIL
from splitpeer.daemon.trail import Trail, verify
from splitpeer.errors import ConfigError, DataError, PeerError
from splitpeer.privacy import ledger
from splitpeer.storage import checkpoint, durable, reading
from splitpeer.storage.lines import Lines

DEEP = "[" * 100_000
DEEP_OBJECT = '{"a":' * 100_000
LITTLE = 8 << 20
"""Bytes that a refusal may take; every bomb here is many times larger."""


def memory(act: Callable[[], object]) -> int:
    """Peak of the bytes allocated while `act` raises PeerError, OSError or ValueError, which it must."""
    tracemalloc.start()
    try:
        with pytest.raises((PeerError, OSError, ValueError)):
            act()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


# --- sizes -------------------------------------------------------------------------------------------------


def sparse(path: Path, size: int) -> Path:
    with path.open("wb") as file:
        file.truncate(size)
    return path


def test_a_large_file_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = sparse(tmp_path / "a.json", reading.MAX_JSON + 1)
    assert memory(lambda: reading.read(path, reading.MAX_JSON)) < LITTLE
    assert memory(lambda: reading.document(path)) < LITTLE
    assert reading.read(sparse(tmp_path / "b", 10), 10) == bytes(10)
    with pytest.raises(OSError, match="larger than 9 bytes"):
        reading.read(tmp_path / "b", 9)


def test_a_file_that_grows_is_refused_unless_it_may(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"one\n")
    stat = os.fstat

    def fstat(number: int) -> os.stat_result:
        found = stat(number)
        with path.open("ab") as file:
            file.write(b"two\n")
        return found

    monkeypatch.setattr(reading.os, "fstat", fstat)
    with pytest.raises(OSError, match="it grew while it was read"):
        reading.read(path, 100)
    assert reading.read(path, 100, growing=True) == b"one\ntwo\n"


def test_a_checkpoint_larger_than_any_is_refused(tmp_path: Path) -> None:
    path = sparse(tmp_path / "step-00000001.safetensors", checkpoint.MAX_BYTES + 1)
    assert memory(lambda: checkpoint.read(path)) < LITTLE
    with pytest.raises(DataError, match="larger than 16 GiB"):
        checkpoint.read(path)


def test_a_ledger_and_a_status_larger_than_any_are_refused(tmp_path: Path) -> None:
    sparse(tmp_path / ledger.NAME, ledger.MAX_BYTES + 1)
    assert memory(lambda: ledger._read(tmp_path / ledger.NAME)) < LITTLE
    sparse(tmp_path / STATUS, reading.MAX_JSON + 1)
    assert memory(lambda: seen._read(tmp_path / STATUS)) < LITTLE


# --- depth and numbers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [DEEP, DEEP_OBJECT, "1" * 5000, "{", "\xff", '{"a": 1}{'])
def test_json_that_cannot_be_read_is_a_value_error(text: str) -> None:
    with pytest.raises(ValueError):
        reading.parse(text.encode("latin-1"))


def metadata(described: str) -> bytes:
    return safetensors.torch.save(
        {"a": torch.zeros(1)}, {checkpoint._META: described, checkpoint._DIGEST: ""}
    )


@pytest.mark.parametrize("described", [DEEP, DEEP_OBJECT, "[1]", "1", "null", "1" * 5000])
def test_a_checkpoint_whose_description_is_hostile(tmp_path: Path, described: str) -> None:
    path = tmp_path / "step-00000001.safetensors"
    path.write_bytes(metadata(described))
    with pytest.raises(DataError, match="torn or altered"):
        checkpoint.read(path)
    assert checkpoint.available(tmp_path) == {}


def test_deep_lines_and_documents_of_a_state_folder(tmp_path: Path) -> None:
    (tmp_path / TRAIL).write_text(DEEP + "\n")
    assert verify(tmp_path / TRAIL).entries == 0
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n' + DEEP_OBJECT + "\n")
    Lines(tmp_path / "metrics.jsonl").resume()
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n'
    (tmp_path / STATUS).write_text(DEEP_OBJECT)
    assert seen._read(tmp_path / STATUS) == {}
    (tmp_path / ledger.NAME).write_text(DEEP_OBJECT)
    with pytest.raises(DataError, match="not a whole privacy ledger"):
        ledger._read(tmp_path / ledger.NAME)


# --- links and pipes ---------------------------------------------------------------------------------------


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    path = tmp_path / "victim"
    path.write_text("precious")
    return path


@pytest.fixture
def state(tmp_path: Path) -> Path:
    path = tmp_path / "state"
    path.mkdir()
    return path


def test_no_write_in_the_state_folder_follows_a_link(state: Path, victim: Path) -> None:
    (state / "status.part").symlink_to(victim)
    (state / "status.json.part").symlink_to(victim)
    (state / STATUS).symlink_to(victim)
    durable.replace(state / STATUS, b"{}", sync=False)
    assert not (state / STATUS).is_symlink()

    (state / TRAIL).symlink_to(victim)
    with pytest.raises(ConfigError, match="audit trail"):
        Trail(state).note("test")
    (state / "metrics.jsonl").symlink_to(victim)
    lines = Lines(state / "metrics.jsonl")
    lines.add(step=1)
    assert lines.waiting == 1
    (state / f"{ledger.NAME}.lock").symlink_to(victim)
    with pytest.raises(ConfigError, match="ledger"):
        ledger._lock(state)
    assert victim.read_text() == "precious"


def test_no_read_follows_a_link_or_waits_for_a_pipe(tmp_path: Path, victim: Path) -> None:
    (tmp_path / "link").symlink_to(victim)
    with pytest.raises(OSError):
        reading.read(tmp_path / "link", 100)
    assert reading.read(tmp_path / "link", 100, follow=True) == b"precious"
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="not a regular file"):
        reading.read(tmp_path / "pipe", 100)
    with pytest.raises(OSError):
        reading.read(tmp_path, 100)


# --- what is printed ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["\x1b[31mred", "two\nlines", "b\u202eack", "\x9b2J", "raw\udcff"])
def test_an_error_that_holds_a_file_name_is_one_printable_line(name: str) -> None:
    text = str(DataError(f"{name}: cannot be read"))
    assert text.isprintable() and "cannot be read" in text


@pytest.mark.parametrize("name", ["\x1b[31mred.nii.gz", "two\nlines.nii.gz", "b\u202eack.nii.gz"])
def test_data_check_prints_no_control_of_a_file_name(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"nothing")
    done = subprocess.run(
        [sys.executable, "-m", "splitpeer.cli", "data", "check", str(tmp_path)],
        capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert done.returncode == 4
    assert all(line.isprintable() for line in (done.stdout + done.stderr).split("\n"))
    assert not any(line.startswith("lines.nii") for line in done.stdout.split("\n"))


def test_every_line_of_a_command_goes_through_one_door() -> None:
    """Whole documents of our own making, escaped JSON and TOML, are the exceptions."""
    allowed = {
        "terminal.py": 1,
        "outcome.py": 1,
        "options.py": 1,
        "config.py": 1,
        "data.py": 1,
        "status.py": 1,
    }
    folder = Path(cli.__file__).parent
    direct = {path.name: path.read_text().count("click.echo(") for path in folder.glob("*.py")}
    assert {name: count for name, count in direct.items() if count} == allowed
