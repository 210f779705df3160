"""Certificates of a small federation."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from splitproto import pki
from splitproto.identity import Credentials
from splitproto.states import Side


@pytest.fixture(scope="session")
def credentials(tmp_path_factory: pytest.TempPathFactory) -> dict[Side, Credentials]:
    folder, now = tmp_path_factory.mktemp("pki"), datetime.now(UTC)
    pki.create_ca(folder, "vectors", now=now)
    return {
        Side.CLIENT: pki.issue(folder, "client", "charite", now=now),
        Side.COORDINATOR: pki.issue(folder, "coordinator", "hub", hosts=["localhost"], now=now),
    }
