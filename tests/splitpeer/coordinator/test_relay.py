"""Which keys of a secure sum a coordinator passes on (SP-11.18-7)."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from splitpeer.coordinator import relay as module
from splitpeer.coordinator.relay import Relay
from splitpeer.errors import DeadlinePassed
from splitproto import partners, pki
from splitproto.errors import CertificateEnded, FusionMismatch
from splitproto.partners import Keys, Trust
from splitproto.records import Fusion, Job, KeyOffer, Level

RUN = bytes(range(16))
NOW = datetime(2026, 11, 28, 12, tzinfo=UTC)
SITES = ("a", "b", "c")
KEYS = {site: Keys(bytes([n + 9]) * 32, bytes([n + 19]) * 32) for n, site in enumerate(SITES)}
NEW = Keys(bytes([1]) * 32, bytes([2]) * 32)
JOB = Job(
    name="try", dimensions=2, network="basic-unet", settings=(), cut=(Level("x0", 4, (1, 1)),), levels=(0,),
    precision="f32", window=(32, 32), spacing=(), augment=False, batch=1, steps=1, optimiser="adam", learning_rate=0.1,
    weight_decay=0.0, schedule="constant", seconds_per_step=10.0, fusion=Fusion(16, 4.0, 3),
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("relay")
    pki.create_ca(made, "glioma", now=NOW)
    for site in (*SITES, "gone"):
        pki.issue(made, "client", site, now=NOW)
    return made


def offer(folder: Path, site: str, **changed: Any) -> KeyOffer:
    signed = {"run": RUN, "terms": partners.terms_digest(JOB), "keys": KEYS.get(site, NEW)}
    key, chain = ((folder / f"{site}.{ending}").read_bytes() for ending in ("key", "crt"))
    return partners.sign(key, chain, **{**signed, **changed})


def relay(folder: Path, known: dict[str, Keys] | None = None, crl: Path | None = None) -> Relay:
    listed = None if crl is None else crl.read_bytes()
    ours = Trust.read("glioma", (folder / "ca.crt").read_bytes(), listed, {*SITES, "gone", "brief"})
    return Relay(RUN, JOB, lambda: ours, {} if known is None else known)


def test_it_passes_on_what_it_took_and_to_each_site_the_others(folder: Path) -> None:
    one, made = relay(folder), {site: offer(folder, site) for site in SITES}
    for site in reversed(SITES):
        one.check(site, made[site], NOW)
        one.take(site, made[site])
    assert one.others("b").partners == (made["a"], made["c"])


def test_files_that_are_just_being_replaced_end_nobody(folder: Path) -> None:
    ca, reads = (folder / "ca.crt").read_bytes(), list[bytes]()

    def trust() -> Trust:
        reads.append(ca if not reads else ca[:200])
        return Trust.read("glioma", reads[-1], None, SITES)

    one = Relay(RUN, JOB, trust, {})
    one.check("a", offer(folder, "a"), NOW)
    assert len(reads) == 2


def test_it_refuses_what_partners_would(folder: Path) -> None:
    """SP-11.18-7, SP-11.18-8."""
    good, b = offer(folder, "a"), offer(folder, "b")
    revoked = offer(folder, "gone")
    pki.revoke(folder, "gone", now=NOW)
    for site, wrong, words in (
        ("a", replace(good, public=bytes([7]) * 32), "is not signed by it"),
        ("a", offer(folder, "a", run=bytes(16)), "is not signed by it"),
        ("a", offer(folder, "a", terms=bytes(32)), "is not signed by it"),
        ("a", replace(good, chain=(*good.chain, b"nothing")), "does not hold"),
        ("a", replace(good, chain=(b"nothing",)), "does not hold"),
        ("a", offer(folder, "a", keys=KEYS["a"]._replace(training=bytes(32))), "small order"),
        ("a", offer(folder, "a", keys=KEYS["a"]._replace(service=bytes(32))), "small order"),
        ("a", b, "a sent the fusion key of site b"),
        ("gone", revoked, "has been revoked"),
    ):
        with pytest.raises(FusionMismatch, match=words):
            relay(folder, crl=folder / "ca.crl").check(site, wrong, NOW)
    with pytest.raises(CertificateEnded, match="has ended since"):
        relay(folder).check("a", good, NOW.replace(year=2099))


async def test_a_partner_whose_certificate_ends_while_it_is_away_is_waited_for(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SP-11.18-7: nobody is sent its old offer; it is sent those of the others, and all are once it is back."""
    one, late = relay(folder), NOW + timedelta(days=4)
    pki.issue(folder, "client", "brief", days=3, now=NOW)
    for site in ("a", "brief"):
        one.take(site, offer(folder, site))
    monkeypatch.setattr(module, "datetime", SimpleNamespace(now=lambda zone: late))
    assert (one.ended("a", NOW), one.ended("a", late), one.ended("brief", late)) == (None, "brief", None)
    waiting = asyncio.create_task(one.await_fresh("a", 60.0))
    await one.await_fresh("brief", 60.0)
    one.take("b", offer(folder, "b"))
    await asyncio.sleep(0)
    assert not waiting.done()
    with pytest.raises(CertificateEnded, match="the certificate of site brief has ended since") as error:
        one.check("brief", offer(folder, "brief"), late)
    assert error.value.retry
    with pytest.raises(
        DeadlinePassed, match=r"^site brief: its certificate ended while it was away, [^\n]*$"
    ):
        await one.await_fresh("a", 0.01)
    for ending in ("crt", "key"):
        (folder / f"brief.{ending}").unlink()
    pki.issue(folder, "client", "brief", days=300, now=late)
    one.check("brief", offer(folder, "brief"), late)
    one.take("brief", offer(folder, "brief"))
    await waiting


async def test_a_partner_that_is_wrong_is_not_waited_for(folder: Path) -> None:
    """Though its certificate has ended as well: it is passed on as before, so that the partners refuse and name it."""
    one, late = relay(folder), NOW + timedelta(days=500)
    for site, wrong in (
        ("a", replace(offer(folder, "a"), public=bytes([7]) * 32)),
        ("b", offer(folder, "b", run=bytes(16))),
    ):
        one.take(site, wrong)
        assert one.ended("c", late) is None
        with pytest.raises(FusionMismatch, match="is not signed by it"):
            partners.verify(wrong, RUN, partners.terms_digest(JOB), one._trusted, late)
    one.take("c", offer(folder, "c"))
    assert one.ended("gone", late) == "c"


def test_a_key_stays_a_sites_and_no_other_sites(folder: Path) -> None:
    """SP-11.18-7, SP-11.18-9: after a restart of the coordinator, too."""
    known: dict[str, Keys] = {}
    first = relay(folder, known)
    first.take("a", offer(folder, "a"))
    for one in (first, relay(folder, dict(known))):
        one.check("a", offer(folder, "a"), NOW)
        for changed in ({"training": bytes([7]) * 32}, {"service": bytes([7]) * 32}):
            with pytest.raises(FusionMismatch, match="a has another fusion key than before"):
                one.check("a", offer(folder, "a", keys=KEYS["a"]._replace(**changed)), NOW)
        for half in (
            KEYS["a"],
            KEYS["b"]._replace(service=KEYS["a"].service),
            KEYS["b"]._replace(service=KEYS["a"].training),
        ):
            stolen = offer(folder, "b", keys=half)
            # Of two that join at the same moment, both are checked before one is taken.
            with pytest.raises(FusionMismatch, match="b sent the fusion key of a as its own"):
                one.check("b", stolen, NOW)
            with pytest.raises(FusionMismatch, match="b sent the fusion key of a as its own"):
                one.take("b", stolen)
