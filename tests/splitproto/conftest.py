"""A federation with real certificates, and pairs of connections without sockets."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from itertools import count
from pathlib import Path

import numpy as np
import pytest

from splitproto import envelope, messages, pki, records
from splitproto.connection import Connection, Timing
from splitproto.envelope import Kind
from splitproto.events import Closed, Established, Event, Received
from splitproto.identity import AllowList, Credentials
from splitproto.messages import Message
from splitproto.negotiation import Offer
from splitproto.probes import filling
from splitproto.states import Side
from tests.cuts import unet
from tests.splitproto.links import Hub, hub_of, quiet

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
    pki.issue(folder, "client", "late", hosts=[], days=30, now=now - timedelta(days=60))
    return Federation(folder)


@pytest.fixture(scope="session")
def outsider(federation: Federation, tmp_path_factory: pytest.TempPathFactory) -> Credentials:
    """Says it is charite, trusts our CA, but another CA of the same name issued its certificate."""
    folder = tmp_path_factory.mktemp("elsewhere")
    now = datetime.now(UTC)
    pki.create_ca(folder, "test", now=now)
    pki.issue(folder, "client", "charite", hosts=[], now=now)
    return Credentials(federation.folder / "ca.crt", folder / "charite.crt", folder / "charite.key")


@pytest.fixture
async def hub(federation: Federation) -> AsyncIterator[Hub]:
    """A listener of the federation."""
    async with hub_of(federation) as hub:
        yield hub
    await quiet()


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

    def of(self, side: Side) -> Connection:
        return self.client if side is Side.CLIENT else self.coordinator

    def take(self, side: Side) -> list[Event]:
        events, self.heard[side] = self.heard[side], []
        return events

    def messages(self, side: Side) -> list[Message]:
        return [event.message for event in self.heard[side] if isinstance(event, Received)]

    def closed(self, side: Side) -> Closed | None:
        """The one Closed event of a side; no event may follow it."""
        events = self.heard[side]
        found = [event for event in events if isinstance(event, Closed)]
        assert len(found) <= 1
        assert not found or events[-1] is found[0]
        return found[0] if found else None

    def establish(self, now: float = 0.0) -> Pair:
        self.exchange(now)
        for side in Side:
            (event,) = self.take(side)
            assert isinstance(event, Established)
        return self

    def work(self, now: float = 0.0) -> Pair:
        """Both in WORKING, nothing left to hear."""
        self.establish(now)
        for side, name in (
            (Side.COORDINATOR, "job-offer"),
            (Side.CLIENT, "job-accept"),
            (Side.CLIENT, "inventory"),
            (Side.COORDINATOR, "begin"),
        ):
            self.of(side).send(example(name))
            self.exchange(now)
        for side in Side:
            assert len(self.take(side)) == 2
        return self


class Recut:
    """The same TLS octets in other envelopes: pieces of `size` octets, or several envelopes joined."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._numbers = {side: count() for side in Side}

    def __call__(self, side: Side, data: bytes) -> list[bytes]:
        arrived = envelope.decode(data)
        result = []
        for start in range(0, len(arrived.body), self.size):
            number = next(self._numbers[side])
            kind = Kind.OPEN if number == 0 and side is Side.CLIENT else Kind.DATA
            piece = arrived.body[start : start + self.size]
            result.append(envelope.encode(kind, arrived.link, number, piece))
        return result


def example(name: str) -> Message:
    """One valid message of each type."""
    key, digest = bytes(16), bytes(32)
    tensors = {
        "level0": np.arange(24, dtype=np.float32).reshape(2, 3, 4),
        "level1": np.ones((1, 7), np.float32),
    }
    job = records.Job(
        name="glioma",
        dimensions=3,
        **unet((32, 32, 64, 128, 256, 32), 3),
        levels=(0, 1, 2, 3, 4),
        precision="f32",
        window=(64, 64, 64),
        spacing=(1.0, 1.0, 1.0),
        augment=True,
        batch=2,
        steps=100,
        optimiser="adamw",
        learning_rate=1e-3,
        weight_decay=0.0,
        schedule="cosine",
        seconds_per_step=60.0,
    )
    patient = records.Patient(
        key,
        (240, 240, 155),
        (1.0, 1.0, 1.0),
        (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0),
        (0.0, -239.0, 0.0),
        (1.0, 1.0, 1.0),
    )
    offer = records.KeyOffer(digest, digest[::-1], b"signature", (b"certificate", b"issuer"))
    every: dict[str, Message] = {
        "hello": messages.Hello((1,), ("dtype.f32",), (), 1 << 20, "test", digest, {"x": 1}),
        "welcome": messages.Welcome(1, ("dtype.f32",), 1 << 20, "test", digest),
        "probe": messages.Probe(1, 5, filling(3)),
        "probed": messages.Probed(1, filling(5)),
        "job-offer": messages.JobOffer(
            key, (records.Seat("T1", ("T1",)),), job, digest, False, ("max-norm",)
        ),
        "job-accept": messages.JobAccept(key, 0, (0, 10), 5, True, ()),
        "job-decline": messages.JobDecline(0x0505, "levels 0 and 1 may not leave this site"),
        "inventory": messages.Inventory((patient,), True, key[:8]),
        "fusion-key": messages.FusionKey(offer),
        "fusion-keys": messages.FusionKeys((offer, offer)),
        "begin": messages.Begin(0, 5),
        "forward": messages.Forward("train", 1, 0, (records.Sample(key, (0, -3, 7)),), digest, 7),
        "activations": messages.Activations("train", 1, 0, digest, tensors),
        "withdraw": messages.Withdraw("train", 1, 0, digest, (records.Unusable(key, "truncated"),)),
        "revoked": messages.Revoked((key,)),
        "withdrawn": messages.Withdrawn(1, (records.Unusable(key, "truncated"),)),
        "gradients": messages.Gradients(1, tensors),
        "applied": messages.Applied(1),
        "advance": messages.Advance(1),
        "advanced": messages.Advanced(1),
        "share": messages.Share(1, 2),
        "shared": messages.Shared(1, 0, tensors),
        "average": messages.Average(1, 0, tensors),
        "averaged": messages.Averaged(1, 0),
        "logits": messages.Logits(1, (records.Sample(key, (0, -3, 7)),), digest, 7, tensors),
        "loss-gradients": messages.LossGradients(1, digest, 1.5, tensors),
        "prediction": messages.Prediction(
            1,
            0,
            records.Sample(key, (0, 0, 0)),
            digest,
            ("t1",),
            "t2",
            {"mask": np.ones((1, 2, 2, 2), "u1")},
        ),
        "conclude": messages.Conclude(1, 1),
        "scores": messages.Scores(1, 1, {"dice": 0.5}),
        "checkpoint": messages.Checkpoint(3, (1, 2)),
        "saved": messages.Saved(1, digest),
        "unsaved": messages.Unsaved(1, "no room"),
        "rollback": messages.Rollback(1),
        "rolled-back": messages.RolledBack(1),
        "settled": messages.Settled(True, 2),
        "progress": messages.Progress(1, {"dice": 0.5, "loss": 1.0}, (records.Missing("t1", "away"),)),
        "segment": messages.Segment(key, key, "mask", 2),
        "cancel": messages.Cancel(key),
        "locate": messages.Locate(key, key, "charite"),
        "located": messages.Located(key, patient),
        "segmenting": messages.Segmenting(key, "queued", 0, 0, 1),
        "segmented": messages.Segmented(
            key,
            3,
            digest,
            (records.Seat("t1", ("t1",)), records.Seat("t2", ("t2",))),
            (records.Missing("t2", "away"),),
            patient,
            records.TaskTerms((records.Label(1, "lesion"),), (records.MaskRegion("all", (1,)),), True, ""),
            tensors,
        ),
        "unsegmented": messages.Unsegmented(key, "busy", "16 requests of this site wait already"),
        "bye": messages.Bye("complete", "", key),
        "error": messages.Error(0x0506, "out of memory"),
    }
    differ = sorted(every.keys() ^ messages.MESSAGES.keys())
    assert not differ, f"messages without an example in {__file__}, or the reverse: {differ}"
    return every[name]


@pytest.fixture(scope="session", name="example")
def example_fixture() -> Callable[[str], Message]:
    return example


@pytest.fixture(scope="session")
def recut() -> type[Recut]:
    return Recut


@pytest.fixture(scope="session")
def make_pair(federation: Federation) -> Callable[..., Pair]:
    def make(
        client: str | Credentials = "charite",
        coordinator: str | Credentials = "hub",
        *,
        client_offer: Offer | None = None,
        coordinator_offer: Offer | None = None,
        timing: Timing | None = None,
        hostname: str = "localhost",
        clients: AllowList = CLIENTS,
        coordinators: AllowList = COORDINATORS,
    ) -> Pair:
        ours, theirs = (
            federation.credentials(who) if isinstance(who, str) else who for who in (client, coordinator)
        )
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
