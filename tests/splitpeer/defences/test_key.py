"""The defences' key is made once, only its owner may read it, and a damaged one is never replaced by a guess."""

from __future__ import annotations

from pathlib import Path

import pytest

from splitpeer.defences import key
from splitpeer.errors import ConfigError


def test_made_once_for_the_owner_alone(tmp_path: Path) -> None:
    made = key.load_or_make(tmp_path / "state")
    path = tmp_path / "state" / "defence.key"
    assert len(made) == 32
    assert path.stat().st_mode & 0o777 == 0o600
    assert [entry.name for entry in path.parent.iterdir()] == ["defence.key"]
    assert key.load_or_make(tmp_path / "state") == made == path.read_bytes()
    assert key.load_or_make(tmp_path / "other") != made


def test_what_is_wrong_with_it_is_said(tmp_path: Path) -> None:
    path = tmp_path / "defence.key"
    key.load_or_make(tmp_path)
    path.chmod(0o640)
    with pytest.raises(ConfigError, match="is open to group or others: chmod 600"):
        key.load_or_make(tmp_path)
    path.chmod(0o600)
    path.write_bytes(b"short")
    with pytest.raises(ConfigError, match="has 5 bytes instead of 32: restore it"):
        key.load_or_make(tmp_path)
    with pytest.raises(ConfigError, match=r"cannot be read or made .*check the folder"):
        key.load_or_make(path)


def test_peers_and_seeds_have_keys_of_their_own() -> None:
    secret = bytes(range(32))
    keys = {key.from_seed(7, "north"), key.from_seed(7, "south"), key.from_seed(8, "north"),
            key.for_peer(secret, "north"), key.for_peer(secret, "south"), key.for_peer(bytes(32), "north")}  # fmt: skip
    assert len(keys) == 6
    assert {len(one) for one in keys} == {32}
