"""Gradients to one site after the other: who is sent them when, the same result to the bit, and a site that is lost."""

from __future__ import annotations

import asyncio

import pytest

from splitpeer.coordinator import trainer, turns
from splitpeer.coordinator.site_link import SiteLink
from splitproto.errors import LinkLost
from splitproto.messages import Gradients

from .test_misbehaviour import peer

ALWAYS = {"gradients_in_turns": "always"}
STEPS = 8
TRAINING = {"steps": STEPS, "checkpoint_every": 4}
PAUSES = (4, 8)
"""Steps after which no batch is announced."""


async def test_each_site_is_sent_to_when_the_one_before_it_has_half(scene, monkeypatch) -> None:
    """And the training is that of the whole network, bit for bit."""
    told: list[tuple[int, str, str]] = []
    send = SiteLink.send

    async def telling(link, message, halfway=None):
        if not isinstance(message, Gradients):
            return await send(link, message, halfway)
        told.append((message.step, link.site, "begins"))

        def half() -> None:
            told.append((message.step, link.site, "has half"))
            halfway()

        return await send(link, message, half if halfway is not None else None)

    monkeypatch.setattr(SiteLink, "send", telling)
    # These exchanges take milliseconds: on a busy machine one takes many times as long as another.
    monkeypatch.setattr(turns.Exchanges, "most_s", 30.0)
    scene.cast("flair", "t1", "t2", training=TRAINING, wire=ALWAYS)
    ran = await scene.together()
    assert ran.result.complete, ran
    scene.assert_exact()
    sites = [f"site-{modality}" for modality in scene.modalities]
    in_turn = [(site, what) for site in sites for what in ("begins", "has half")]
    for step in range(1, STEPS + 1):
        of_step = [(site, what) for number, site, what in told if number == step]
        assert of_step == ([(site, "begins") for site in sites] if step in PAUSES else in_turn), step
    rows = {row["step"]: row.get("turns", False) for row in scene.metrics() if "loss" in row}
    assert rows == {step: step not in PAUSES for step in range(1, STEPS + 1)}


@pytest.mark.parametrize("setting", ["auto", "never"])
async def test_what_is_tried_changes_no_result(scene, setting: str) -> None:
    scene.cast(
        "flair", "t1", training={"steps": 12, "checkpoint_every": 12}, wire={"gradients_in_turns": setting}
    )
    ran = await scene.together()
    assert ran.result.complete, ran
    scene.assert_exact()
    tried = sum(row.get("turns", False) for row in scene.metrics())
    assert tried >= turns.TRIALS if setting == "auto" else tried == 0


@pytest.mark.parametrize("when", ["in its turn", "before its turn"])
async def test_a_site_that_is_lost_does_not_hold_up_the_others(scene, monkeypatch, when: str) -> None:
    """It is the first in turn, has nothing yet, and does not come back."""
    send, encoded = SiteLink.send, trainer.for_site
    links: dict[str, SiteLink] = {}

    async def cutting(link, message, halfway=None):
        links[link.site] = link
        if isinstance(message, Gradients) and link.site == "site-t1":
            cut(link)
        await send(link, message, halfway)

    def cutting_early(site, *rest):
        if site == "site-t1":
            cut(links[site])
        return encoded(site, *rest)

    def cut(link: SiteLink) -> None:
        link.session.carrier_lost(LinkLost("cut by the test"))

    monkeypatch.setattr(SiteLink, "send", cutting)
    if when == "before its turn":
        monkeypatch.setattr(trainer, "for_site", cutting_early)
    scene.cast(
        "t1",
        "t2",
        training={"steps": STEPS, "checkpoint_every": STEPS},
        absence={"mode": "drop", "least_sites": 1},
        deadlines={"step_s": 30.0, "return_s": 1.0},
        wire=ALWAYS,
    )
    async with scene.running(only=["hub", "site-t2"]) as on:
        await asyncio.sleep(0.05)
        await peer(scene, lambda message: [message])
        hub = on.tasks["hub"]
        await asyncio.wait([hub], timeout=60)
        assert hub.done() and hub.result().complete
    first = next(row for row in scene.metrics() if "loss" in row)
    applied = first["timing"]["answers"]["apply"]
    assert first["turns"] and applied.keys() == {"site-t2"}
    # From when the gradients leave, not from when the step began: the machine may be slow.
    waited = applied["site-t2"] - first["waited"] - first["computed"]
    assert waited < 0.5, "return_s had passed by then"
