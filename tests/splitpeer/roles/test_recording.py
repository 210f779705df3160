"""Recording a live run: training does not notice, others are told, a policy can forbid it, the trail has everything."""

from __future__ import annotations

import errno
import json
import logging
import os
import secrets
import signal
from typing import Any

import numpy as np
import pytest
import torch

from splitpeer.captures import appended
from splitpeer.captures.reader import open_capture
from splitpeer.cli import main
from splitpeer.daemon import trail
from splitpeer.data.pseudonym import load_salt, pseudonym
from splitpeer.errors import ConfigError, DataError, JobFailed
from splitpeer.site.client import Client
from splitproto.capture import Recorded
from splitproto.messages import Activations, Gradients
from splitproto.records import Seat

SHORT = {"steps": 4, "batch": 2, "checkpoint_every": 2}


def said(records: list[Recorded], name: str, peer: str = "") -> list[Recorded]:
    return [r for r in records if r.name == name and (not peer or r.peer == peer)]


def noted(scene: Any, who: str) -> list[dict[str, Any]]:
    path = scene.folder / who / "state" / trail.NAME
    assert trail.verify(path).whole
    return trail.entries(path)


def first(entries: list[dict[str, Any]], event: str) -> dict[str, Any]:
    return next(e for e in entries if e["event"] == event)


def same(one: Any, other: Any) -> bool:
    tensors, others = one.message.tensors, other.message.tensors
    return tensors.keys() == others.keys() and all(
        np.array_equal(tensors[n].view(np.uint8), others[n].view(np.uint8)) for n in tensors
    )


async def test_a_recorded_run_is_the_unrecorded_run_bit_for_bit_and_the_captures_agree(scene, caplog) -> None:
    scene.cast("flair", "t1", training=SHORT)
    ran = await scene.together()
    assert ran.result.complete, ran
    losses, weights, dice = scene.losses(), scene.weights(4), ran.result.dice
    for who in ("hub", "site-flair", "site-t1"):
        (scene.folder / who / "state").rename(scene.folder / who / "before")
    with caplog.at_level(logging.INFO, "splitpeer"):
        ran = await scene.together(curious=("hub", "site-t1"))
    assert ran.result.complete, ran
    assert scene.losses() == losses and ran.result.dice == dice
    again = scene.weights(4)
    assert [name for name in weights if not torch.equal(weights[name], again[name])] == []

    hub, site = open_capture(scene.capture("hub")), open_capture(scene.capture("site-t1"))
    for capture in (hub, site):
        verdict = capture.verify()
        assert verdict.whole and verdict.ended and not verdict.lost, verdict
        assert capture.header.job.name == "try" and capture.header.run.hex() == ran.result.run
    at_hub, at_site = list(hub.records()), list(site.records())
    assert len(said(at_hub, "gradients")) == 8 and len(said(at_site, "gradients")) == 4
    for name in ("activations", "gradients"):
        ours, theirs = said(at_site, name), said(at_hub, name, "site-t1")
        assert len(ours) == len(theirs) > 3
        assert all(same(a, b) for a, b in zip(ours, theirs, strict=True))
        assert {r.direction for r in ours} != {r.direction for r in theirs}
    modes = {r.head.mode for r in at_hub if isinstance(r.head, Activations)}
    assert modes == {"train", "evaluate"}, "evaluation is recorded too"
    for name in ("job-offer", "job-accept", "inventory", "begin", "forward", "bye"):
        assert said(at_hub, name, "site-flair") and said(at_site, name), name

    # What each said of itself is in the other's header, log and trail.
    assert [(p.site, p.seats, p.recorded, p.defences) for p in hub.header.peers] == [
        ("site-flair", (Seat("flair", ("flair",)),), False, ()), ("site-t1", (Seat("t1", ("t1",)),), True, ())
    ]  # fmt: skip
    assert site.header.seats == (Seat("t1", ("t1",)),) and not hub.header.seats
    assert [(p.site, p.recorded) for p in site.header.peers] == [("hub", True)]
    announced = {
        (r.fields["peer"], r.fields["recorded"]) for r in caplog.records if r.message == "peer.announced"
    }
    assert announced == {("hub", "yes"), ("site-flair", "no"), ("site-t1", "yes")}
    assert first(noted(scene, "site-flair"), "peer.announced")["recorded"] is True
    entries = noted(scene, "hub")
    ended = first(entries, "capture.ended")
    assert ended["last_chain"] == hub.verify().last_chain.hex() and ended["reason"] == "closed"
    events = [e["event"] for e in entries]
    for event in (
        "peer.start",
        "link.up",
        "peer.announced",
        "capture.started",
        "job.checkpoint",
        "job.ended",
    ):
        assert event in events, event
    assert events.index("capture.started") < events.index("capture.ended") < events.index("peer.stop")
    assert first(entries, "link.up")["tls"].startswith("TLSv1.3 ")
    accepted = first(noted(scene, "site-t1"), "job.accepted")
    assert accepted["run"] == ran.result.run and accepted["recorded"] is True and len(accepted["terms"]) == 64


async def test_the_trail_names_no_patient(scene, make) -> None:
    scene.cast("flair", "t1", training={"steps": 1, "batch": 1})
    ran = await scene.together(curious=("hub", "site-t1"))
    assert ran.result.complete, ran
    salt = load_salt(scene.federation.pki / "federation.salt")
    for who in ("hub", "site-t1", "site-flair"):
        text = (scene.folder / who / "state" / trail.NAME).read_text()
        for patient in make.PATIENTS:
            assert patient not in text and pseudonym(salt, patient).hex() not in text


async def test_a_site_that_is_not_to_be_recorded_declines(scene) -> None:
    """SP-11-2, SP-11-29."""
    scene.cast("flair", "t1", training={"steps": 1, "batch": 1})
    scene.client("t1", policy={"recorded_by_coordinator": False})
    ran = await scene.together(curious=("hub",))
    assert isinstance(ran.error, JobFailed)
    assert "site-t1 declined the job: the coordinator records what it receives" in str(ran.error)
    assert not scene.capture("hub").exists(), "nothing began, nothing is recorded"
    assert "records what it receives" in first(noted(scene, "site-t1"), "job.declined")["cause"]
    assert first(noted(scene, "hub"), "job.declined")["site"] == "site-t1"
    ran = await scene.together(curious=("site-flair",))
    assert ran.result.complete, ran


@pytest.mark.parametrize(
    ("capture", "policy", "error", "words"),
    [
        ({}, {"may_record": False}, ConfigError, r"\[policy\] may_record is false: start without --curious"),
        ({"key": "none.key"}, {}, ConfigError, r"none.key: no such key: make one with \(umask 077; openssl rand"),
        ({"key": "open.key"}, {}, ConfigError, r"open to group or others: chmod 600"),
        ({"key": "short.key"}, {}, DataError, r"file of 32 bytes"),
    ],
)  # fmt: skip
def test_what_cannot_be_recorded_is_said_at_once(scene, capture, policy, error, words) -> None:
    here = scene.client("t1", capture=capture, policy={"coordinators": ["hub"], **policy})
    (here / "open.key").write_bytes(secrets.token_bytes(32))
    (here / "open.key").chmod(0o644)
    (here / "short.key").touch(0o600)
    with pytest.raises(error, match=words):
        Client(scene.config("site-t1"), None, curious=scene.capture("site-t1"))
    with pytest.raises((ConfigError, DataError)) as missing:
        Client(scene.config("site-t1"), None, curious=scene.folder / "no" / "such" / "run.cap")
    assert "\n" not in str(missing.value)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--curious-key", "k"), "--curious-key is for a capture: add --curious FILE"),
        (("--curious", "c.cap", "--curious-key", "k"), "k: no such key: make one with"),
        (("--curious", "c.cap", "--set", "policy.may_record=false"), "may_record is false: start without --curious"),
        (("--curious", "no/such/c.cap"), "no/such/c.cap: cannot record there"),
        (("--curious", "c.cap", "--set", "capture.keys=[\"xyz\"]"), "[capture] keys"),
        (("--curious", "c.cap", "--set", "capture.every=0"), "[capture] every"),
    ],
)  # fmt: skip
def test_serve_says_it_in_one_line(scene, capsys, monkeypatch, arguments, words) -> None:
    monkeypatch.chdir(scene.client("t1"))
    before = os.umask(0o077)  # serve sets it for its own process
    try:
        with pytest.raises(SystemExit) as left:
            main(["serve", *arguments])
    finally:
        os.umask(before)
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("splitpeer: ")]
    assert (left.value.code, len(said)) == (4, 1), said
    assert words in said[0]


async def test_a_disk_that_fills_ends_the_capture_and_not_the_training(scene, caplog, monkeypatch) -> None:
    scene.cast("flair", "t1", training=SHORT)
    room = [30]

    def full(write: Any) -> Any:
        def call(*arguments: Any) -> int:
            room[0] -= 1
            if room[0] < 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            return int(write(*arguments))

        return call

    for name in ("_write_directly", "_write_cached"):
        monkeypatch.setattr(appended.AppendedFile, name, full(getattr(appended.AppendedFile, name)))
    with caplog.at_level(logging.INFO, "splitpeer"):
        ran = await scene.together(curious=("hub",))
    assert ran.result.complete, ran
    scene.assert_exact()
    warned = [r.fields["cause"] for r in caplog.records if r.message == "capture.ended"]
    assert warned == ["disk"], "one warning"
    verdict = open_capture(scene.capture("hub")).verify()
    assert verdict.whole and verdict.records > 10, verdict
    ended = first(noted(scene, "hub"), "capture.ended")
    assert (ended["reason"], ended["last_chain"]) == ("disk", verdict.last_chain.hex())
    assert ended["lost"] > 0


def test_a_coordinator_that_is_killed_goes_on_recording_in_a_new_part(scene) -> None:
    scene.cast("t1", "t2", training={"steps": 14, "checkpoint_every": 4}, data={"window": [48, 48]})
    key = scene.folder / "hub" / "capture.key"
    key.touch(0o600)
    key.write_bytes(secrets.token_bytes(32))
    recording = ("--curious", "coord.cap", "--curious-key", "capture.key")
    hub, clients = scene.start("hub", *recording), [scene.start(f"site-{m}") for m in scene.modalities]
    scene.until_step(5)
    hub.signal(signal.SIGKILL)
    hub.code()
    hub = scene.start("hub", "--resume", *recording)
    assert hub.code() == 0, hub.said
    assert [client.code() for client in clients] == [0, 0]
    scene.assert_exact()
    first_file = scene.folder / "hub" / "coord.cap"
    assert os.stat(first_file).st_mode & 0o777 == 0o600
    blind = open_capture(first_file).verify()
    capture = open_capture(first_file, key.read_bytes())
    verdict = capture.verify()
    assert [part.path.name for part in capture.parts] == ["coord.cap", "coord.1.cap"]
    assert blind.whole and verdict.whole and verdict.ended, (blind, verdict)
    steps = {r.head.step for r in capture.records() if isinstance(r.head, Gradients)}
    assert steps == set(range(1, 15))
    entries = noted(scene, "hub")
    assert [e["event"] for e in entries].count("peer.start") == 2
    assert json.dumps(entries).count(verdict.last_chain.hex()) == 1
