"""Who is refused, why, how soon, and that no other site notices."""

from __future__ import annotations

import asyncio
import logging
import time
from datetime import UTC, datetime

import pytest

from splitpeer.errors import ConfigError, ConnectionRefused, DeadlinePassed, JobFailed
from splitproto import AllowList, Credentials, Listener, RemoteError, dial, pki

SOON = 5.0


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture):
    """The log so far: `event {fields}`, one entry per line."""
    caplog.set_level(logging.INFO, "splitpeer")
    return lambda: [f"{r.getMessage()} {getattr(r, 'fields', {})}" for r in caplog.records]


async def refusal(scene, who: str) -> BaseException:
    began = time.monotonic()
    async with scene.running(only=[who]) as alone:
        await asyncio.wait((alone.tasks[who],), timeout=20)
        error = alone.tasks[who].exception()
    assert time.monotonic() - began < SOON
    assert error is not None
    assert "\n" not in str(error)
    return error


CASES = {
    "the site's certificate is of another CA": (
        "site-flair",
        "foreign",
        "does not know the CA of our certificate",
        "was not issued by our CA",
    ),
    "the site trusts another CA": (
        "site-flair",
        "distrust",
        "the certificate of the listening peer was not issued by our CA",
        "does not know the CA of our certificate",
    ),
    "expired": (
        "site-late",
        {},
        "our certificate, or its own revocation list (CRL), has expired",
        "has expired",
    ),
    "not yet valid": ("site-early", {}, "refuses our certificate", "is not yet valid"),
    "not in the job": ("stranger", {}, "not on our allow-list", "'stranger' is not on our allow-list"),
    "the site does not list the coordinator": (
        "site-flair",
        {"policy": {"coordinators": ["charite"]}},
        "coordinator 'hub' is not on our allow-list",
        "not on our allow-list",
    ),
}


@pytest.mark.parametrize("case", CASES)
async def test_a_refused_site_hears_why_and_the_others_go_on(scene, said, case: str) -> None:
    site, over, to_the_site, to_the_coordinator = CASES[case]
    scene.cast("flair", "t1", training={"steps": 2})
    elsewhere = scene.federation.folder / "elsewhere"
    if over == "foreign":
        over = {
            "tls": {
                "certificate": str(elsewhere / "site-flair.crt"),
                "key": str(elsewhere / "site-flair.key"),
            }
        }
    elif over == "distrust":
        over = {"tls": {"ca": str(elsewhere / "ca.crt")}}
    scene.client("flair", site, **over)
    async with scene.running(only=["hub", "site-t1"]) as on:
        while not any("site.joined" in line for line in said()):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        error = await refusal(scene, site)
        assert isinstance(error, ConnectionRefused), error
        assert error.exit_code == 2
        assert to_the_site in str(error)
        await asyncio.sleep(0.05)
        refused = [line for line in said() if line.startswith("link.refused")]
        assert len(refused) == 1, refused
        assert to_the_coordinator in refused[0]
        assert not on.tasks["hub"].done()
        scene.client("flair")
        async with scene.running(only=["site-flair"]) as late:
            await asyncio.wait((*on.tasks.values(), *late.tasks.values()), timeout=60)
            assert on.tasks["hub"].result().complete
            assert late.tasks["site-flair"].exception() is None
    assert not any("Traceback" in line for line in said())


async def test_a_certificate_of_another_role_is_refused_by_both_sides(scene, tmp_path) -> None:
    scene.cast("t1")
    own = scene.federation.pki
    hub = Credentials(own / "ca.crt", own / "other-hub.crt", own / "other-hub.key")
    async with scene.running(only=["hub"]):
        await asyncio.sleep(0.05)
        with pytest.raises(RemoteError, match="coordinator 'other-hub' is not on our allow-list"):
            await dial(f"tcp://127.0.0.1:{scene.port}", hub, AllowList({"coordinator": ["hub"]}, "test"))
    # A client's certificate, however it got that host name, makes no coordinator.
    site = pki.issue(
        own,
        "client",
        f"host-{tmp_path.name[-20:]}".replace("_", "-"),
        hosts=["127.0.0.1"],
        now=datetime.now(UTC),
    )
    everybody = AllowList({"client": ["site-t1"]}, "test")
    async with Listener(f"tcp://127.0.0.1:{scene.port}", site, everybody, refused=lambda *_: None):
        error = await refusal(scene, "site-t1")
    assert isinstance(error, ConnectionRefused)
    assert "is not on our allow-list" in str(error)


def test_a_peer_whose_file_and_certificate_disagree_does_not_start(scene) -> None:
    scene.cast("t1")
    scene.client(
        "t1",
        tls={
            "certificate": str(scene.federation.pki / "stranger.crt"),
            "key": str(scene.federation.pki / "stranger.key"),
        },
    )
    client = scene.start("site-t1")
    assert client.code() == 4
    assert "[peer] site is 'site-t1'" in client.said
    assert len([line for line in client.said.splitlines() if "peer.starting" not in line]) == 1


async def test_a_coordinator_under_another_name_is_refused(scene, said) -> None:
    scene.cast("t1")
    scene.coordinator("hub-elsewhere")
    async with scene.running(only=["hub"]) as on:
        error = await refusal(scene, "site-t1")
        assert isinstance(error, ConnectionRefused)
        assert "does not name the address that we dialled (127.0.0.1)" in str(error)
        await asyncio.sleep(0.05)
        assert not on.tasks["hub"].done()
    assert any("link.refused" in line and "refuses our certificate" in line for line in said())


async def test_a_missing_site_is_named(scene) -> None:
    scene.cast("flair", "t1", deadlines={"join_s": 1.0})
    ran = {}
    async with scene.running(only=["hub", "site-t1"]) as on:
        await asyncio.wait(on.tasks.values(), timeout=20)
        ran = {name: task.exception() for name, task in on.tasks.items()}
    assert isinstance(ran["hub"], DeadlinePassed), ran
    assert ran["hub"].exit_code == 3
    assert str(ran["hub"]).startswith("missing after 1 s: site-flair (flair)")
    assert "site-t1" not in str(ran["hub"])
    assert isinstance(ran["site-t1"], JobFailed)
    assert "missing after 1 s: site-flair (flair)" in str(ran["site-t1"])


async def test_a_site_that_holds_another_modality_declines(scene) -> None:
    scene.cast("t1", "t2")
    scene.client("t1", peer={"modality": "t2"})
    ran = await scene.together()
    assert isinstance(ran.error, JobFailed)
    assert "site site-t1 declined the job: the job wants t1 from us, this site holds t2" in str(ran.error)


def test_exit_codes_and_lines_of_refused_processes(scene) -> None:
    """The same through the command line: one line each, code 2, while the others complete their job."""
    elsewhere = scene.federation.folder / "elsewhere"
    scene.cast("t1", training={"steps": 2})
    scene.client(
        "flair",
        tls={"certificate": str(elsewhere / "site-flair.crt"), "key": str(elsewhere / "site-flair.key")},
    )
    scene.client("t2", "site-late")
    scene.client("t2", "stranger")
    hub = scene.start("hub")
    hub.until(r"peer\.start")
    for number, who in enumerate(("site-flair", "site-late", "stranger"), start=1):
        client = scene.start(who)
        assert client.code() == 2, client.said
        # SP-14-5: of one source and kind a line a second.
        hub.until(rf"(?s)(link\.refused.*){{{number}}}", timeout=10)
        time.sleep(1.1)
        errors = [line for line in client.said.splitlines() if line.startswith("splitpeer: ")]
        assert len(errors) == 1
        assert errors[0] == client.last
        assert "Traceback" not in client.said
    client = scene.start("site-t1")
    assert (hub.code(), client.code()) == (0, 0)
    assert "Traceback" not in hub.said


async def test_a_config_that_can_never_work_fails_before_it_listens(scene) -> None:
    scene.cast("t1")
    scene.coordinator(tls={"key": str(scene.federation.pki / "nowhere.key")})
    with pytest.raises(ConfigError, match=r"nowhere\.key: no such file"):
        async with scene.running(only=["hub"]):
            pass
