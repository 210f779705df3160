"""Links that make way for new ones, and certificates that change, end or are revoked while a job trains."""

from __future__ import annotations

import asyncio
import os
import shutil
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from splitpeer.federation.terms import cut_descriptors, job_on_wire
from splitpeer.site.client import Client
from splitproto import AllowList, Listener, Session, pki
from splitproto.messages import Begin, Bye, JobAccept, JobOffer, Progress
from splitproto.records import Seat
from splitproto.tensors import schema_digest

from .scene import JOINT, Federation, Scene

LONG = {"steps": 80, "checkpoint_every": 20}
OFTEN = {"recheck_s": 0.1}


@pytest.fixture
def live(scene: Scene, tmp_path: Path) -> Scene:
    """The scene with a CA of its own, whose revocation list the coordinator checks."""
    folder = tmp_path / "federation"
    shutil.copytree(scene.federation.pki, folder / "pki")
    (folder / "data").symlink_to(scene.federation.data)
    scene.federation = Federation(folder)
    pki.write_crl(scene.federation.pki, now=datetime.now(UTC))
    return scene


def cast(scene: Scene, network: dict[str, Any], steps: int = LONG["steps"], **job: Any) -> None:
    scene.cast("flair", "t1", training={**LONG, "steps": steps}, **job)
    keys, here = scene.federation.pki, f"tcp://127.0.0.1:{scene.port}"
    files = {"ca": "ca.crt", "certificate": "hub.crt", "key": "hub.key", "crl": "ca.crl"}
    scene.coordinator(
        tls={name: str(keys / file) for name, file in files.items()}, network={"listen": here, **network}
    )
    for modality in scene.modalities:
        scene.client(modality, network={"coordinator": here, **network})


def issue(scene: Scene, site: str, seconds: float) -> None:
    """A new pair, put in place by renaming."""
    keys, aside = scene.federation.pki, scene.folder / "aside"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    for name in ("ca.crt", "ca.key"):
        shutil.copy(keys / name, aside)
    now = datetime.now(UTC)
    role, hosts = ("coordinator", ["127.0.0.1"]) if site == "hub" else ("client", [])
    pki.issue(
        aside, role, site, hosts=hosts, days=seconds / 86_400, now=now, not_before=now - timedelta(seconds=2)
    )
    for ending in ("key", "crt"):
        os.replace(aside / f"{site}.{ending}", keys / f"{site}.{ending}")


@pytest.mark.timeout(400)  # on a busy machine each link carries one question, and its handshake is the work
@pytest.mark.parametrize(
    ("worn", "steps"), [({"rotate_s": 0.3}, 60), ({"rotate_mib": 1}, 80)], ids=["age", "octets"]
)
def test_links_that_wear_out_all_the_time_change_nothing(
    live: Scene, worn: dict[str, Any], steps: int
) -> None:
    """SP-6-10, SP-11-16, SP-11-43."""
    cast(live, worn, steps)
    hub, clients = live.start_all()
    assert hub.code(300) == 0, hub.said
    assert [client.code() for client in clients.values()] == [0, 0]
    links = [client.said.count("link.up") for client in clients.values()]
    assert min(links) >= 3, links
    assert "rollback" not in hub.said
    live.assert_exact()


def test_certificates_that_are_renewed_while_they_train(live: Scene) -> None:
    cast(live, OFTEN)
    hub, clients = live.start_all()
    for number, site in enumerate(("site-t1", "hub", "site-flair")):
        live.until_step(10 * (number + 1))
        issue(live, site, 3600)
    assert hub.code() == 0, hub.said
    assert [client.code() for client in clients.values()] == [0, 0]
    assert all(client.said.count("link.up") >= 2 for client in clients.values())
    live.assert_exact()


def test_a_site_that_is_revoked_is_cut_off_and_the_rest_go_on(live: Scene) -> None:
    """SP-6-12."""
    cast(live, OFTEN, absence={"mode": "drop"})
    hub, clients = live.start_all()
    live.until_step(10)
    pki.revoke(live.federation.pki, "site-t1", now=datetime.now(UTC))
    assert clients["t1"].code() not in (0, 1, 5), clients["t1"].said
    assert "revoked" in clients["t1"].last and "Traceback" not in clients["t1"].said
    assert hub.code() == 0, hub.said
    assert clients["flair"].code() == 0, clients["flair"].said
    assert "has been revoked" in hub.said
    assert [line["step"] for line in live.metrics() if line.get("without") == ["t1"]][-1] == LONG["steps"]


async def hub_of_one(scene: Scene, listener: Listener) -> Session:
    """A coordinator's side of joining, played by hand."""
    session = await listener.accept(20)
    job = job_on_wire(scene.settings)
    await session.send(JobOffer(bytes(16), (Seat("t1", ("t1",)),), job, schema_digest(cut_descriptors(job))))
    accept = await session.receive(20)
    assert isinstance(accept, JobAccept)
    while not (await session.receive(20)).last:  # type: ignore[attr-defined]
        pass
    await session.send(Begin(0, accept.patients))
    return session


async def test_a_job_that_is_complete_while_the_site_changes_its_link(scene: Scene) -> None:
    """SP-11-20: its `rotate` and the coordinator's `complete` cross: nobody would say the latter again."""
    scene.cast("t1")
    scene.client("t1", network={"coordinator": f"tcp://127.0.0.1:{scene.port}", "rotate_s": 0.01})
    hub = scene.config("hub")
    allowed = AllowList({"client": ("site-t1",)}, "the test")
    async with Listener(f"tcp://127.0.0.1:{scene.port}", hub.credentials(), allowed, JOINT) as listener:
        client = asyncio.create_task(Client(scene.config("site-t1"), asyncio.Event()).run())
        session = await hub_of_one(scene, listener)
        await asyncio.sleep(0.5)
        assert session.farewell is None, "the link was worn before it had joined, and has carried no work"
        # It rotates when it hears something, and by then the bye is on its way.
        await session.send(Progress(0, {}))
        await session.close("complete")
        assert isinstance(session.farewell, Bye) and session.farewell.reason == "rotate"
        await asyncio.wait_for(client, 20)


async def test_a_coordinator_that_leaves_before_it_offers_anything_is_dialled_again(scene: Scene) -> None:
    """SP-11-20."""
    scene.cast("t1")
    hub = scene.config("hub")
    allowed = AllowList({"client": ("site-t1",)}, "the test")
    async with Listener(f"tcp://127.0.0.1:{scene.port}", hub.credentials(), allowed, JOINT) as listener:
        client = asyncio.create_task(Client(scene.config("site-t1"), asyncio.Event()).run())
        await (await listener.accept(20)).close("drain")
        session = await hub_of_one(scene, listener)
        await session.close("complete")
        await asyncio.wait_for(client, 20)
