"""A federation with real certificates, and pairs of connections without sockets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import pytest

from splitproto import pki
from splitproto.connection import Connection, Timing
from splitproto.events import Event
from splitproto.identity import AllowList, Credentials
from splitproto.negotiation import Offer
from splitproto.states import Side

CLIENTS = AllowList({"client": {"charite", "ukm"}}, "job")
COORDINATORS = AllowList({"coordinator": {"hub"}}, "peer.toml")


@dataclass(frozen=True)
class Federation:
    folder: Path

    def credentials(self, site: str) -> Credentials:
        return Credentials(self.folder / "ca.crt", self.folder / f"{site}.crt", self.folder / f"{site}.key")


@pytest.fixture(scope="session")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Federation:
    folder = tmp_path_factory.mktemp("pki")
    now = datetime.now(UTC)
    pki.create_ca(folder, "test", now=now)
    pki.issue(folder, "coordinator", "hub", hosts=["localhost", "127.0.0.1"], now=now)
    for site in ("charite", "ukm", "stranger"):
        pki.issue(folder, "client", site, hosts=[], now=now)
    return Federation(folder)


@dataclass
class Pair:
    """Two connections and the wire between them; `tamper` may change, drop or repeat envelopes."""

    client: Connection
    coordinator: Connection
    tamper: Callable[[Side, bytes], list[bytes]] = lambda side, data: [data]
    heard: dict[Side, list[Event]] = field(default_factory=lambda: {side: [] for side in Side})
    wire: list[tuple[Side, bytes]] = field(default_factory=list)

    def exchange(self, now: float = 0.0) -> None:
        """Carry envelopes until both are silent."""
        moved = True
        while moved:
            moved = False
            for sender, receiver in ((self.client, self.coordinator), (self.coordinator, self.client)):
                while (data := sender.next_envelope(now)) is not None:
                    moved = True
                    self.wire.append((sender.side, data))
                    for arriving in self.tamper(sender.side, data):
                        receiver.receive(arriving, now)
                self.heard[sender.side] += sender.events()
                self.heard[receiver.side] += receiver.events()

    def take(self, side: Side) -> list[Event]:
        events, self.heard[side] = self.heard[side], []
        return events


@pytest.fixture
def make_pair(federation: Federation) -> Callable[..., Pair]:
    def make(
        client: str = "charite",
        coordinator: str = "hub",
        *,
        client_offer: Offer | None = None,
        coordinator_offer: Offer | None = None,
        timing: Timing | None = None,
        hostname: str = "localhost",
        clients: AllowList = CLIENTS,
        coordinators: AllowList = COORDINATORS,
    ) -> Pair:
        ours, theirs = federation.credentials(client), federation.credentials(coordinator)
        link = b"link-link-link-1"
        return Pair(
            Connection(
                Side.CLIENT,
                link,
                ours.client_context(),
                ours.identity.sha256,
                lambda peer: coordinators.check(peer, "test"),
                client_offer or Offer(),
                0.0,
                hostname=hostname,
                timing=timing,
            ),
            Connection(
                Side.COORDINATOR,
                link,
                theirs.server_context(),
                theirs.identity.sha256,
                lambda peer: clients.check(peer, "test"),
                coordinator_offer or Offer(),
                0.0,
                timing=timing,
            ),
        )

    return make
