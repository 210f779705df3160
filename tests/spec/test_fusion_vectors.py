"""Test vectors of secure fusion, of releases that are made once, and of inference."""

from __future__ import annotations

from datetime import datetime
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from splitproto import codec, fusion, messages, partners, records, tensors
from splitproto.fields import read_map
from tests.spec.reading import (
    Case,
    cases,
    check,
    of_the_peer,
    value_of,
)


def terms_of(case: Case) -> records.Fusion:
    terms = case["terms"]
    return records.Fusion(terms["bits"], terms["range"], terms["parties"])


def question_of(case: Case) -> fusion.Asked:
    asked = case["question"]
    digest, history = bytes.fromhex(asked["digest"]), bytes.fromhex(asked["history"])
    return fusion.Asked(asked["mode"], asked["step"], asked["batch"], digest, history)


def words_of(octets: str, bits: int) -> tensors.Array:
    return np.frombuffer(bytes.fromhex(octets), f"<i{bits // 8}")


@pytest.mark.parametrize("case", cases("fusion", "terms"))
def test_fusion_terms(case: Case) -> None:
    """SP-11.18-1, SP-11.18-6."""
    terms = terms_of(case)
    check(case, lambda: fusion.check_terms(terms))
    if "job" in case:
        agreed = read_map(records.Job, codec.decode(bytes.fromhex(case["job"])), "job")
        job = records.Job(**agreed)
        assert job.fusion == terms
        assert partners.terms_digest(job).hex() == case["expect"]["sha256"]


@pytest.mark.parametrize("case", cases("fusion", "quantise"))
def test_fusion_quantise(case: Case) -> None:
    """SP-11.18-3."""
    values = np.frombuffer(bytes.fromhex(case["values"]), "<f4")
    result = check(case, lambda: fusion.quantise(values, terms_of(case)))
    if result is not None:
        words, clipped = result
        assert {"words": words.tobytes().hex(), "clipped": clipped} == case["expect"]


@pytest.mark.parametrize("case", cases("fusion", "restore"))
def test_fusion_restore(case: Case) -> None:
    """SP-11.18-4."""
    words = words_of(case["words"], case["terms"]["bits"])
    assert fusion.restore(words, terms_of(case)).tobytes().hex() == case["expect"]["values"]


@pytest.mark.parametrize("case", cases("fusion", "history"))
def test_fusion_history(case: Case) -> None:
    """SP-11.18-12."""
    arrays = {one["name"]: np.frombuffer(bytes.fromhex(one["octets"]), "<f4") for one in case["gradients"]}
    history, batch = bytes.fromhex(case["history"]), bytes.fromhex(case["digest"])
    after = fusion.follow(history, case["step"], batch, arrays)
    assert after.hex() == case["expect"]["history"]


@pytest.mark.parametrize("case", cases("fusion", "key"))
def test_fusion_key(case: Case) -> None:
    """SP-11.18-10."""
    run, secret, public = (bytes.fromhex(case[name]) for name in ("run", "secret", "public"))

    def work() -> dict[str, str]:
        masks = fusion.Masking.agreed(run, case["site"], secret, {case["partner"]: public})
        key = masks.key(case["partner"], question_of(case), case["level"])
        return {"key": key.hex(), "public": fusion.public_of(secret).hex()}

    if (made := check(case, work)) is not None:
        assert made == case["expect"]


@pytest.mark.parametrize("case", cases("fusion", "epoch"))
def test_fusion_epoch(case: Case) -> None:
    """SP-11.18-17."""
    run, secret, public = (bytes.fromhex(case[name]) for name in ("run", "secret", "public"))
    masks = fusion.Masking.agreed(run, case["site"], secret, {case["partner"]: public})
    for number in range(1, case["epoch"] + 1):
        masks = masks.following(number)
    key = masks.key(case["partner"], question_of(case), case["level"])
    assert {"shared": masks.shared[case["partner"]].hex(), "key": key.hex()} == case["expect"]


@pytest.mark.parametrize("case", cases("fusion", "mask"))
def test_fusion_mask(case: Case) -> None:
    """SP-11.18-11."""
    others = {site: bytes.fromhex(public) for site, public in case["partners"].items()}
    run, secret = bytes.fromhex(case["run"]), bytes.fromhex(case["secret"])
    masks = fusion.Masking.agreed(run, case["site"], secret, others)
    words, checks = masks.conceal(question_of(case), case["level"], words_of(case["words"], case["bits"]))
    assert {"words": words.tobytes().hex(), "check": checks.tobytes().hex()} == case["expect"]


@pytest.mark.parametrize("case", cases("fusion", "sum"))
def test_fusion_sum(case: Case) -> None:
    """SP-11.18-4, SP-11.18-14."""
    bits = case["terms"]["bits"]
    answers = {
        site: {name: words_of(octets, bits) for name, octets in sent.items()}
        for site, sent in case["answers"].items()
    }
    if (read := check(case, lambda: fusion.totals(answers, terms_of(case)))) is not None:
        assert {name: array.tobytes().hex() for name, array in read.items()} == case["expect"]["values"]


@pytest.mark.parametrize("case", cases("fusion", "offer"))
def test_fusion_offer(case: Case) -> None:
    """SP-11.18-6, SP-11.18-8."""
    shown, run, terms = case["offer"], bytes.fromhex(case["run"]), bytes.fromhex(case["terms"])
    octets = (bytes.fromhex(shown[name]) for name in ("public", "service", "signature"))
    offer = records.KeyOffer(*octets, tuple(map(bytes.fromhex, shown["chain"])))
    crl = case["crl"].encode() if "crl" in case else None
    trust = partners.Trust.read(case["federation"], case["ca"].encode(), crl, case["partners"])
    now = datetime.fromisoformat(case["now"])
    identity = check(case, lambda: partners.verify(offer, run, terms, trust, now))
    if identity is not None:
        assert {"site": identity.site, "public": offer.public.hex()} == case["expect"]


@pytest.mark.parametrize("case", cases("releases"))
def test_releases(case: Case) -> None:
    """SP-11.17-3, SP-11.17-4, SP-11.17-5, SP-11.17-9, SP-11.17-10, SP-11.17-11."""
    once = case.get("once")
    shown, tiling = of_the_peer("site.shown"), of_the_peer("site.tiling")
    rule = tiling.Rule(tuple(once["window"]), lambda key: tuple(once["volume"]), 0.5) if once else None
    offers = {
        "run": {"run": bytes(16), "terms": "ours"},
        "other-run": {"run": bytes(range(16)), "terms": "ours"},
        "other-terms": {"run": bytes(16), "terms": "others"},
    }

    def showing(offer: str, weights: str) -> Any:
        most = case.get("most_runs")
        return shown.Showing(**offers[offer], encoders=frozenset({weights}), once=bool(once), most_runs=most)

    people = shown.Shown(None, showing("run", "ours"))
    for before in case.get("before", ()):
        earlier = showing(before["offer"], before["weights"])
        people.learn(earlier.run.hex(), earlier.terms, earlier.encoders, [before["key"]])
    released = of_the_peer("site.released").Released(None, people, rule=rule)

    def forward(asked: dict[str, Any]) -> messages.Forward:
        samples = tuple(records.Sample(bytes.fromhex(s["key"]), tuple(s["origin"])) for s in asked["samples"])
        places = tuple(asked["places"]) if asked["places"] is not None else None
        return messages.Forward(
            "release", asked["step"], asked["batch"], samples, bytes(32), value_of(asked["seed"]), places
        )

    def answer(asked: list[dict[str, Any]]) -> dict[str, int]:
        for question in map(forward, asked):
            released.check(question)
            released.note(question, {})
        return {"answered": released.windows}

    if "error" in case["expect"]:
        answer(case["asked"][:-1])
    assert check(case, lambda: answer(case["asked"])) in (None, case["expect"])


@pytest.mark.parametrize("case", cases("inference", "admission"))
def test_admission(case: Case, tmp_path: Path) -> None:
    """SP-11.19-4."""
    answering, asker = of_the_peer("site.inference.answering"), of_the_peer("site.inference.asking")
    own = {one["request"]: SimpleNamespace(key=bytes.fromhex(one["key"])) for one in case["own"]}
    site = answering.Answering(
        answering.Terms(case["policy"], case["listed"]),
        of_the_peer("settings.bounds").Bounds(),
        tmp_path / case["name"],
    )
    asked = case["locate"]
    locate = messages.Locate(bytes.fromhex(asked["request"]), bytes.fromhex(asked["key"]), asked["asker"])
    admitted = site.admit(locate, partial(asker.InferenceAsker.owns, SimpleNamespace(_asked=own)))
    assert {"admitted": admitted} == case["expect"]


@pytest.mark.parametrize("case", cases("inference", "questions"))
def test_questions_of_a_request(case: Case, tmp_path: Path) -> None:
    """SP-11.19-8."""
    answering = of_the_peer("site.inference.answering")
    site = answering.Answering(answering.Terms(), of_the_peer("settings.bounds").Bounds(), tmp_path)

    def hear(said: dict[str, Any]) -> int:
        if "locate" in said:
            site.open(bytes.fromhex(said["locate"]))
            return 0
        if "link" in said:
            site.close()
            return 0
        samples = tuple(records.Sample(bytes.fromhex(s["key"]), tuple(s["origin"])) for s in said["samples"])
        places = tuple(said["places"]) if said["places"] is not None else None
        site.check(messages.Forward("infer", 3, 7, samples, bytes(32), value_of(said["seed"]), places))
        return len(samples)

    if "error" in case["expect"]:
        for said in case["said"][:-1]:
            hear(said)
        check(case, lambda: hear(case["said"][-1]))
    else:
        assert {"windows": sum(map(hear, case["said"]))} == case["expect"]
