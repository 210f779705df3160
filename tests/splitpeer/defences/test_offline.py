"""Defences applied to recorded traffic: each seat under the key that it has live, where that is known."""

from __future__ import annotations

import numpy as np
import pytest

from splitpeer.defences.key import key_of
from splitpeer.defences.offline import OfflineDefences, offline_defences
from splitpeer.defences.randomness import Release
from splitpeer.defences.stack import defend, make_stack
from splitpeer.federation.terms import on_wire
from splitpeer.models import unet_backbone
from splitproto.capture import Header
from splitproto.messages import Forward
from splitproto.records import Job, Sample, Seat

BASE, RUN = bytes(range(32)), bytes(16)
BACKBONE = unet_backbone(2, (4, 4, 8, 8, 16, 4))
JOB = Job(
    name="j", **on_wire(BACKBONE), precision="f32", window=(32, 32), spacing=(), augment=False, batch=2, steps=10,
    optimiser="adam", learning_rate=0.01, weight_decay=0.0, schedule="constant", seconds_per_step=10.0,
)  # fmt: skip
FORWARD = Forward(
    mode="train",
    step=1,
    batch=0,
    digest=bytes(32),
    samples=(Sample(key=bytes(16), origin=(0, 0, 0)),),
)
SENT = {"x0": np.random.default_rng(0).standard_normal((1, 4, 32, 32)).astype(np.float32)}


def header(*seats: str) -> Header:
    return Header(
        role="client", site="clinic", federation="f", agent="a", created=0.0, run=RUN, job=JOB,
        seats=tuple(Seat(name, (name,)) for name in seats),
    )  # fmt: skip


def live(shown: str, held: tuple[str, ...]) -> bytes:
    """What the site sends for the seat of modality `shown`, with `held` in its peer.toml."""
    stack = make_stack(
        "gaussian:1", key=key_of(BASE, (shown,), held), channels=BACKBONE.cut.channels,
        dimensions=2,
    )  # fmt: skip
    release = Release(RUN, FORWARD.mode, FORWARD.step, FORWARD.batch, FORWARD.samples, nonce=bytes(16))
    return defend(stack, SENT, release)["x0"].tobytes()


def offline(one: OfflineDefences, seat: str) -> bytes:
    return one(SENT, RUN, FORWARD, seat)["x0"].tobytes()


@pytest.mark.parametrize("held", [("t1", "flair"), ("flair", "t1")])
def test_of_several_seats_the_first_of_peer_toml_has_the_sites_own_key(held: tuple[str, ...]) -> None:
    """The seats are in the job's order, which is not that of peer.toml."""
    recorded = header("flair", "t1")
    one = offline_defences(recorded, "gaussian:1", lambda site: BASE, first={"clinic": held[0]})["clinic"]
    assert one.certain and one.repeats
    for seat in ("flair", "t1"):
        assert offline(one, seat) == live(seat, held)


def test_where_nobody_tells_the_first_no_seat_is_taken_for_it() -> None:
    one = offline_defences(header("flair", "t1"), "gaussian:1", lambda site: BASE)["clinic"]
    assert not one.certain and not one.repeats
    found = {offline(one, "flair"), offline(one, "t1")}
    assert len(found) == 2 and not found & {live("flair", ("flair",)), live("t1", ("t1",))}


def test_a_site_of_one_seat_needs_no_telling() -> None:
    one = offline_defences(header("t1"), "gaussian:1", lambda site: BASE)["clinic"]
    assert one.certain and one.repeats and offline(one, "t1") == live("t1", ("t1",))
