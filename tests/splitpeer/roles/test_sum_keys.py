"""Keys of a secure sum among real roles: proven to partners, or nothing leaves (SP-11.18-6 to -8)."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest

from splitpeer.coordinator.relay import Relay
from splitpeer.errors import JobFailed, PeerError
from splitpeer.site import summing
from splitpeer.site.answers import ANSWERS
from splitpeer.site.summing import PARTNERS, Allowed, Summing
from splitproto import fusion, partners
from splitproto.errors import FusionMismatch, IdentityError
from splitproto.identity import OWN_UNUSABLE
from splitproto.messages import FusionKeys
from splitproto.partners import Trust
from splitproto.records import KeyOffer

from .scene import Ran, Scene
from .test_secure_sum import BRISK, SITES, cast, folder, site, until


async def refused(scene: Scene, error: type[Exception], words: str) -> Ran:
    """The run fails; at least one site says why, in one line, and nothing has left it."""
    ran = await scene.together()
    assert isinstance(ran.error, JobFailed), ran.error
    assert any(isinstance(one, error) and words in str(one) for one in ran.clients.values()), ran.clients
    assert all("\n" not in str(one) for one in (ran.error, *ran.clients.values()))
    assert not [one for one in scene.folder.glob(f"site-*/state/*/{ANSWERS}") if one.read_bytes()]
    return ran


def relayed(monkeypatch: pytest.MonkeyPatch, change: Callable[[str, list[KeyOffer]], list[KeyOffer]]) -> None:
    """A coordinator that passes on something else."""
    honest = Relay.others
    monkeypatch.setattr(
        Relay, "others", lambda self, site: FusionKeys(tuple(change(site, list(honest(self, site).partners))))
    )


async def test_a_coordinator_that_puts_its_own_key_in_place_of_a_partners(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SP-11.18-8."""
    mine = fusion.public_of(bytes(range(32)))
    relayed(monkeypatch, lambda site, offers: [replace(offers[0], public=mine), *offers[1:]])
    ran = await refused(cast(scene), FusionMismatch, "is not signed by it for this run and its terms")
    assert "not signed by it" in str(ran.error)


async def test_an_offer_that_partners_would_refuse_ends_its_maker_and_nobody_else(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SP-11.18-7: the others never see it; they wait."""
    honest, words = Summing.offer, "certificate does not hold"

    def offer(self: Summing) -> KeyOffer:
        made = honest(self)
        return replace(made, chain=(*made.chain, b"nothing")) if self._site == "site-t1" else made

    monkeypatch.setattr(Summing, "offer", offer)
    async with cast(scene, deadlines={**BRISK, "join_s": 4}).running() as on:
        await asyncio.wait([on.tasks["site-t1"]], timeout=30)
        assert words in str(on.tasks["site-t1"].exception())
        assert not on.tasks["site-flair"].done() and not on.tasks["site-t2"].done()
        with pytest.raises(PeerError, match="site-t1") as failed:
            await on.tasks["hub"]
        assert words in str(failed.value) and "\n" not in str(failed.value)
        await asyncio.wait([on.tasks["site-flair"], on.tasks["site-t2"]], timeout=30)
        for name in ("site-flair", "site-t2"):
            assert not isinstance(on.tasks[name].exception(), FusionMismatch)


async def test_a_coordinator_that_passes_a_key_on_twice(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SP-11.18-8."""
    relayed(monkeypatch, lambda site, offers: [offers[0], offers[0]])
    await refused(cast(scene), FusionMismatch, "came twice")


async def test_a_coordinator_that_keeps_a_key_back(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """SP-11.18-8."""
    relayed(monkeypatch, lambda site, offers: offers[:1])
    await refused(cast(scene), FusionMismatch, "1 fusion keys came for a sum of 3 sites: 2 are needed")


async def test_a_key_of_another_run_is_refused(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """SP-11.18-6: by the coordinator, and by the partners if it passes it on."""
    honest = partners.sign
    monkeypatch.setattr(
        partners, "sign", lambda key, chain, run, terms, keys: honest(key, chain, run[::-1], terms, keys)
    )
    ran = await cast(scene, deadlines={**BRISK, "join_s": 3}).together()
    assert ran.error is not None and "is not signed by it for this run" in str(ran.error)
    monkeypatch.setattr(Relay, "check", lambda self, site, offer, now: None)
    await refused(scene, FusionMismatch, "is not signed by it for this run")


@pytest.mark.parametrize(
    ("policy", "words"),
    [
        ({"partners": ["site-t1", "somebody"]}, "site site-t2 is not among our partners"),
        ({"partners": ["site-t1"]}, "of which this site knows 1 (policy partners)"),
        ({"partners": []}, "of which this site knows 0 (policy partners)"),
        ({"min_partners": 3}, "where this site wants 3 (policy min_partners)"),
    ],
    ids=["stranger", "few", "none", "least"],
)
async def test_a_policy_decides_who_may_be_in_a_sum(
    scene: Scene, policy: Mapping[str, Any], words: str
) -> None:
    """SP-11.18-1, SP-11.18-8."""
    cast(scene)
    site(scene, "flair", **policy)
    ran = await scene.together()
    assert words in str(ran.clients["site-flair"])
    assert words.split(" (")[0] in str(ran.error)


async def test_partners_that_changed_within_a_run_are_refused(scene: Scene) -> None:
    """SP-11.18-9."""
    cast(scene)
    async with scene.running() as on:
        ended = await until(on, "site-flair", lambda: scene.metrics())
        assert not ended
    kept = folder(scene, "site-flair") / PARTNERS
    kept.write_text(json.dumps({**json.loads(kept.read_text()), "site-t2": bytes(64).hex()}))
    ran = await scene.together(resume=True)
    assert "partner site-t2 has another key" in str(ran.clients["site-flair"])
    assert isinstance(ran.clients["site-flair"], FusionMismatch)


# --- files that are just being replaced --------------------------------------------------------------------


async def test_a_certificate_renewed_at_the_wrong_moment_ends_nobody(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SP-11.18-6: the files are read once a link, and again on the next one where they were not whole."""
    reads, whole = [], partners.sign

    def sign(*args: Any) -> KeyOffer:
        reads.append(args)
        if len(reads) == 1:
            raise IdentityError(OWN_UNUSABLE)
        return whole(*args)

    monkeypatch.setattr(partners, "sign", sign)
    ran = await cast(scene, steps=1, every=1).together()
    assert ran.error is None and ran.result.complete, ran
    assert len(reads) == 1 + len(SITES), "proving the partners reads no file of our own"


def test_a_ca_file_that_is_just_being_replaced_is_read_again(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(summing, "PAUSE_S", 0.0)
    cast(scene)
    config, reads, whole = scene.config("site-t1"), list[bytes](), Trust.read

    def read(federation: str, ca: bytes, *rest: Any) -> Trust:
        reads.append(ca)
        return whole(federation, ca if len(reads) % 4 == 0 else ca[:100], *rest)

    monkeypatch.setattr(Trust, "read", read)
    allowed = Allowed(config.credentials(), "test", SITES, 2)
    assert allowed.trust().least == 2 and len(reads) == 4
    monkeypatch.setattr(summing, "TRIES", 1)
    with pytest.raises(IdentityError, match=OWN_UNUSABLE) as one:
        allowed.trust()
    assert "\n" not in str(one.value)
