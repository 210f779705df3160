"""Fixtures that several of these modules share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

PEER = """
[peer]
role = "client"
site = "ukm"
federation = "test"
modality = "flair"

[tls]
ca = "ca.crt"
certificate = "ukm.crt"
key = "ukm.key"

[network]
coordinator = "tcp://hub.example.org:7443"

[data]
images = "images"
salt = "federation.salt"

[policy]
coordinators = ["hub"]
"""


@pytest.fixture
def peer_toml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A client's settings, without the files they name; nothing of this environment counts."""
    for name in [name for name in os.environ if name.startswith("SPLITPEER_")]:
        monkeypatch.delenv(name)
    path = tmp_path / "peer.toml"
    path.write_text(PEER)
    return path
