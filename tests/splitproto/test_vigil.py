"""Links over real sockets whose certificates end, are revoked or are replaced while they are open."""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from splitproto import pki
from splitproto.connection import Timing
from splitproto.errors import (
    CertificateEnded,
    IdentityError,
    RemoteError,
    SecureChannelError,
    SplitprotoError,
)
from splitproto.identity import Credentials
from splitproto.recheck import Recheck
from splitproto.session import Session
from tests.splitproto.links import SOON, Hub, hub_of, over, part, quiet

EVERY = 0.1
LOOKS = 5 * EVERY
"""Long enough for several looks."""


@dataclass(frozen=True)
class Pki:
    """A federation whose files change while it works; everybody checks the same CRL."""

    folder: Path

    def credentials(self, site: str) -> Credentials:
        folder = self.folder
        return Credentials(
            folder / "ca.crt", folder / f"{site}.crt", folder / f"{site}.key", folder / "ca.crl"
        )

    def issue(self, site: str, seconds: float = 3600, age: float = 2) -> None:
        """A new pair, in place of the old one as an operator would put it there: by renaming.

        Args:
            seconds: until it ends.
            age: how many seconds ago it began.
        """
        aside = self.folder / "aside"
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        for name in ("ca.crt", "ca.key"):
            shutil.copy(self.folder / name, aside)
        role, hosts = ("coordinator", ["127.0.0.1"]) if site == "hub" else ("client", [])
        now = datetime.now(UTC)
        start = now - timedelta(seconds=age)
        pki.issue(aside, role, site, hosts=hosts, days=seconds / 86_400, now=now, not_before=start)
        for ending in ("key", "crt"):
            os.replace(aside / f"{site}.{ending}", self.folder / f"{site}.{ending}")


@pytest.fixture
def live(tmp_path: Path) -> Pki:
    made = Pki(tmp_path / "pki")
    now = datetime.now(UTC)
    pki.create_ca(made.folder, "test", now=now)
    pki.write_crl(made.folder, now=now)
    for site in ("hub", "charite", "ukm"):
        made.issue(site)
    return made


@asynccontextmanager
async def looking(live: Pki, every: float = EVERY) -> AsyncIterator[Hub]:
    """A listener that looks often; so do those who dial it."""
    async with hub_of(live, timing=Timing(recheck=every)) as hub:
        yield hub
    await quiet()


async def link(hub: Hub, site: str = "charite", every: float = EVERY) -> tuple[Session, Session]:
    """The dialler's session, and the listener's."""
    return await hub.link(site, timing=Timing(recheck=every))


async def soon(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(SOON):
        while not condition():  # noqa: ASYNC110 - a flag of the library, which has no event
            await asyncio.sleep(0.01)


# --- revoked -------------------------------------------------------------------------------------------------


async def test_a_revoked_site_is_cut_off_and_the_others_go_on(live: Pki) -> None:
    async with looking(live) as hub:
        charite, at_hub = await link(hub)
        ukm, ukm_at_hub = await link(hub, "ukm")
        pki.revoke(live.folder, "charite", now=datetime.now(UTC))
        found, told = await over(at_hub), await over(charite)
        assert type(found) is IdentityError and not found.retry
        assert isinstance(told, RemoteError) and told.name == "identity-malformed" and not told.retry
        assert "client charite" in told.reason and "revoked" in told.reason
        assert [str(error) for error in hub.refused] == [str(found)]
        await asyncio.sleep(LOOKS)
        assert ukm.alive and ukm_at_hub.alive and not ukm.rotation_due and not ukm_at_hub.rotation_due
        (old,) = live.folder.glob("charite.*.revoked.crt")
        revoked = replace(live.credentials("ukm"), certificate=old, key=old.with_suffix(".key"), crl=None)
        with pytest.raises(SecureChannelError, match="revoked"):
            await hub.dial(revoked)
        live.issue("charite")
        again = await link(hub)
        await part(*again, ukm, ukm_at_hub)


async def test_a_revoked_coordinator_is_left(live: Pki) -> None:
    async with looking(live, every=60) as hub:
        client, coordinator = await link(hub)
        pki.revoke(live.folder, "hub", now=datetime.now(UTC))
        found = await over(client)
        assert type(found) is IdentityError and "coordinator hub" in found.reason
        assert isinstance(await over(coordinator), RemoteError)


async def test_a_list_that_is_lost_or_outdated_keeps_what_is_open_and_lets_nobody_in(
    live: Pki, caplog: pytest.LogCaptureFixture
) -> None:
    async with looking(live) as hub:
        sessions = await link(hub)
        pki.write_crl(live.folder, now=datetime.now(UTC), days=-0.01)
        with caplog.at_level(logging.WARNING):
            await asyncio.sleep(LOOKS)
        assert any("outdated" in record.message for record in caplog.records)
        assert all(session.alive and not session.rotation_due for session in sessions)
        with pytest.raises(SplitprotoError, match=r"CRL|revocation"):
            await hub.dial("ukm")
        (live.folder / "ca.crl").unlink()
        await asyncio.sleep(LOOKS)
        assert all(session.alive for session in sessions)
        pki.write_crl(live.folder, now=datetime.now(UTC))
        await part(*await link(hub, "ukm"), *sessions)


async def test_a_callback_that_fails_spares_nobody(live: Pki) -> None:
    failures: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: failures.append(context))

    def refused(source: str, error: SplitprotoError) -> None:
        raise RuntimeError("a defect of the application")

    async with hub_of(live, timing=Timing(recheck=EVERY), refused=refused) as hub:
        (charite, _), (ukm, _) = await link(hub), await link(hub, "ukm")
        for site in ("charite", "ukm"):
            pki.revoke(live.folder, site, now=datetime.now(UTC))
        await asyncio.gather(over(charite), over(ukm))
    assert failures, "the defect is not hidden either"


async def test_a_look_that_fails_spares_nobody(
    live: Pki, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with looking(live) as hub:
        charite, _ = await link(hub)
        pki.revoke(live.folder, "charite", now=datetime.now(UTC))
        look, looks = Recheck.look, []

        def once(self: Recheck, now: datetime) -> None:
            looks.append(now)
            if len(looks) > 1:
                raise RuntimeError("a defect")
            look(self, now)

        monkeypatch.setattr(Recheck, "look", once)
        await over(charite)
    assert len(looks) == 1 or "could not be checked" in caplog.text


# --- ended ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("whose", ["charite", "hub"])
async def test_an_open_link_ends_with_the_certificate_it_was_made_with(whose: str, live: Pki) -> None:
    async with looking(live) as hub:
        live.issue(whose, seconds=2.5)
        client, coordinator = await link(hub)
        ended = await asyncio.gather(over(client), over(coordinator))
        assert {error.name for error in ended if error} == {"certificate-ended"}
        assert any(isinstance(error, CertificateEnded) for error in ended)
        assert all(
            error is not None and error.retry and f" {whose} ended at" in str(error) for error in ended
        )
        # The handshake judges what lies there now: nothing new, or a new one.
        with pytest.raises(SecureChannelError, match="expired"):
            await hub.dial("charite")
        live.issue(whose)
        await part(*await link(hub))


# --- replaced ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("whose", ["charite", "hub"])
async def test_a_renewed_certificate_is_shown_on_a_new_link_and_the_matter_rests(
    whose: str, live: Pki
) -> None:
    async with looking(live) as hub:
        client, coordinator = await link(hub)
        before = client.peer.sha256, coordinator.peer.sha256
        live.issue(whose)
        one = client if whose == "charite" else coordinator
        await soon(lambda: one.rotation_due)
        assert "replaced" in one.rotation_cause
        assert client.alive and coordinator.alive, "when to rotate is the application's choice"
        await asyncio.gather(client.close("rotate"), coordinator.close("rotate"))
        client, coordinator = await link(hub)
        after = client.peer.sha256, coordinator.peer.sha256
        assert [old == new for old, new in zip(before, after, strict=True)] == [
            whose == "charite",
            whose == "hub",
        ]
        await asyncio.sleep(LOOKS)
        assert not client.rotation_due and not coordinator.rotation_due
        await part(client, coordinator)


async def test_a_certificate_that_ends_soon_costs_a_few_links_and_not_one_every_look(live: Pki) -> None:
    """Both sides ask in the last twentieth of its life; nobody brings a new one."""
    every = 0.05
    async with looking(live, every) as hub:
        live.issue("charite", seconds=4.5, age=56)
        links, error = 0, None
        while not isinstance(error, SecureChannelError):
            assert links < 15
            try:
                client = await hub.dial("charite", timing=Timing(recheck=every))
                coordinator = await hub.listener.accept(SOON)
            except SplitprotoError as refused:
                error = refused
                continue
            links += 1
            await soon(
                lambda one=client, other=coordinator: one.rotation_due or other.rotation_due or not one.alive
            )
            await asyncio.gather(client.close("rotate"), coordinator.close("rotate"))
        assert "expired" in str(error)
        assert 3 <= links <= 9


async def test_nothing_is_left_behind(live: Pki) -> None:
    """A link that ends takes its vigil with it."""
    loop = asyncio.get_running_loop()
    async with looking(live, every=3600) as hub:
        for _ in range(3):
            client, coordinator = await link(hub, every=3600)
            await part(client, coordinator)
        await asyncio.sleep(0)
        assert not hub.listener._vigil._links
    waiting = [
        timer for timer in loop._scheduled if not timer.cancelled() and timer.when() > loop.time() + 1000
    ]  # type: ignore[attr-defined]
    assert waiting == []
