"""Certificates that expire, are renewed or are revoked while real processes train (SP-6-12 to SP-6-14)."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from pathlib import Path

import pytest

from splitproto import pki
from tests.splitpeer.roles.scene import Daemon, Scene

ENDLESS = {"steps": 100_000, "checkpoint_every": 50, "schedule": "constant"}
BRIEF_S = 4.0
PATIENCE_S = 2.0


@pytest.fixture
def training(scene: Scene, tmp_path: Path) -> Scene:
    """Two sites and a coordinator that look at their certificates all the time, for a job without an end."""
    scene.federation = scene.federation.copy(tmp_path / "federation")
    scene.cast("flair", "t1", training=ENDLESS, deadlines={"return_s": PATIENCE_S})
    keys, here = scene.federation.pki, f"tcp://127.0.0.1:{scene.port}"

    def tls(who: str) -> dict[str, str]:
        names = {"ca": "ca.crt", "certificate": f"{who}.crt", "key": f"{who}.key", "crl": "ca.crl"}
        return {key: str(keys / name) for key, name in names.items()}

    scene.coordinator(tls=tls("hub"), network={"listen": here, "recheck_s": 0.1})
    for modality in scene.modalities:
        network = {"coordinator": here, "recheck_s": 0.1, "reconnect_s": 60}
        scene.client(modality, tls=tls(f"site-{modality}"), network=network)
    return scene


def steps(scene: Scene) -> int:
    return max(line["step"] for line in scene.metrics())


def refused(daemon: Daemon, code: int, *texts: str) -> None:
    """It ended so, and its last line says all of this."""
    assert daemon.code() == code, daemon.said
    assert all(text in daemon.last for text in texts), daemon.last
    assert "Traceback" not in daemon.said


def test_some_that_are_renewed_before_their_end_cost_nothing(training: Scene) -> None:
    """With one of a second or two of life left as much as with one that is good for an hour."""
    hub, clients = training.start_all()
    training.until_step(3)
    for who in ("site-t1", "hub"):
        training.federation.renew(who, BRIEF_S)
    ends = time.monotonic() + BRIEF_S + 1.5
    training.until_step(steps(training) + 3)
    for who in ("site-t1", "hub"):
        training.federation.renew(who, 3600)
    while time.monotonic() < ends:
        time.sleep(0.05)
    # The first ones are over, and so is what was made with them.
    training.until_step(steps(training) + 3)
    assert all(client.said.count("link.up") >= 2 for client in clients.values())
    assert not any(line.get("rollback") for line in training.metrics())
    training.stop(hub, *clients.values())


def test_one_that_ends_ends_the_job_for_all(training: Scene) -> None:
    hub, clients = training.start_all()
    training.until_step(3)
    training.federation.renew("site-t1", BRIEF_S)
    refused(clients["t1"], 2, "certificate", "renew")
    refused(hub, 3, "site-t1", f"did not come back within {PATIENCE_S:g} s")
    refused(clients["flair"], 1, "site-t1", "did not come back")


def test_a_revoked_site_is_cut_off_and_a_job_that_needs_it_ends(training: Scene) -> None:
    """[absence] mode "pause", the default; with "drop" the others go on: `test_live_links.py`."""
    hub, clients = training.start_all()
    training.until_step(3)
    pki.revoke(training.federation.pki, "site-t1", now=datetime.now(UTC))
    refused(clients["t1"], 2, "revoked")
    # Nobody waits for what cannot come back.
    refused(hub, 1, "site-t1", "revoked by the CA")
    refused(clients["flair"], 1, "site-t1", "revoked by the CA")


def test_a_revoked_coordinator_is_left_by_its_sites(training: Scene) -> None:
    hub, clients = training.start_all()
    training.until_step(3)
    pki.revoke(training.federation.pki, "hub", now=datetime.now(UTC))
    # The site that looks first tells the coordinator, which may tell the other one before that looks (exit code 1).
    codes = [client.code() for client in clients.values()]
    assert 2 in codes and set(codes) <= {1, 2}, codes
    for client, code in zip(clients.values(), codes, strict=True):
        refused(client, code, "certificate of coordinator hub", "revoked by the CA")
    refused(hub, 1, "the certificate of coordinator hub", "revoked by the CA")
