"""Secure fusion: what the sum shows, what one answer shows, and what is refused. Octets are in the vectors `fusion`."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest

from splitproto import fusion
from splitproto.errors import FusionMismatch, SchemaMismatch, SiteFailed, TensorError
from splitproto.fusion import CHECK, CHECK_WORDS, Asked, Given, Masking
from splitproto.records import Fusion
from splitproto.tensors import Array

RUN = bytes(range(16))
SITES = ("a", "b", "c", "d")
SECRETS = {site: bytes([n + 1]) * 32 for n, site in enumerate(SITES)}
TERMS = Fusion(16, 4.0, 4)
ASKED = Asked("train", 3, 0, b"d" * 32, b"h" * 32)
LEVELS = {"x0": (2, 2, 8, 8), "x4": (2, 3, 2, 2)}


def masks(site: str, among: tuple[str, ...] = SITES, run: bytes = RUN) -> Masking:
    others = {other: fusion.public_of(SECRETS[other]) for other in among if other != site}
    return Masking.agreed(run, site, SECRETS[site], others)


def values(site: str) -> dict[str, Array]:
    chance = np.random.default_rng(SITES.index(site))
    return {level: chance.normal(0, 1, shape).astype("<f4") for level, shape in LEVELS.items()}


def answers(terms: Fusion = TERMS, **asked: Asked) -> dict[str, dict[str, Array]]:
    """What all sites send; those named in `asked` hear another question."""
    return {
        site: fusion.answer(masks(site), asked.get(site, ASKED), values(site), terms)[0] for site in SITES
    }


@pytest.mark.parametrize("bits", [16, 32])
def test_the_sum_is_that_of_the_integers_exactly(bits: int) -> None:
    """SP-11.18-3, SP-11.18-4, SP-11.18-11."""
    terms = replace(TERMS, bits=bits)
    read = fusion.totals(answers(terms), terms)
    for level in LEVELS:
        plain = [fusion.quantise(values(site)[level], terms)[0].astype(np.int64) for site in SITES]
        scale = fusion.greatest(terms) / terms.range
        assert np.array_equal(read[level], (sum(plain) / scale).astype("f4"))
        close = np.sum([values(site)[level] for site in SITES], axis=0, dtype="f8")
        assert np.abs(read[level] - close).max() <= len(SITES) / scale + 2.0**-21  # and the rounding of f32
    assert list(read) == list(LEVELS)


def test_the_largest_values_of_all_sites_do_not_wrap() -> None:
    """SP-11.18-3: "The sum of all parties cannot leave the type"."""
    for bits, parties in ((16, 2), (16, 64), (32, 3), (32, 64)):
        terms = Fusion(bits, 4.0, parties)
        top, clipped = fusion.quantise(np.array([1e6, -1e6, 4.0], "f4"), terms)
        assert clipped == 2
        total = fusion.add_up([top] * parties)
        assert total.tolist() == [
            parties * fusion.greatest(terms),
            -parties * fusion.greatest(terms),
            total[0],
        ]
        assert abs(fusion.restore(total, terms) / parties).max() == pytest.approx(4.0)


def test_one_answer_and_every_smaller_set_shows_nothing() -> None:
    """Uniform words: neither a site's own, nor a sum of fewer than all, nor its check words have structure."""
    levels = {"x0": np.zeros((1, 1, 256, 256), "f4")}
    sent = {site: fusion.answer(masks(site), ASKED, levels, TERMS)[0]["x0"] for site in SITES}
    for size in (1, 2, 3):
        for some in combinations(SITES, size):
            total = fusion.add_up([sent[site] for site in some]).view("<u2").ravel()
            counts = np.bincount(total >> 8, minlength=256)
            expected = total.size / 256
            # 255 degrees of freedom: 400 is nine standard deviations; the octets are always the same
            assert ((counts - expected) ** 2 / expected).sum() < 400, some
    assert not fusion.add_up(list(sent.values())).any()


@pytest.mark.parametrize(
    "other",
    [
        replace(ASKED, mode="evaluate"),
        replace(ASKED, step=4),
        replace(ASKED, batch=1),
        replace(ASKED, digest=bytes(32)),
        replace(ASKED, history=bytes(32)),
    ],
)
def test_masks_of_another_question_do_not_cancel(other: Asked) -> None:
    """SP-11.18-10, SP-11.18-12, SP-11.18-14."""
    with pytest.raises(FusionMismatch, match="do not cancel"):
        fusion.totals(answers(b=other), TERMS)


def test_masks_of_another_run_or_set_do_not_cancel() -> None:
    """SP-11.18-14."""
    for wrong in (masks("c", run=bytes(16)), masks("c", among=("a", "b", "c"))):
        sent = answers()
        sent["c"] = fusion.answer(wrong, ASKED, values("c"), TERMS)[0]
        with pytest.raises(FusionMismatch, match="do not cancel"):
            fusion.totals(sent, TERMS)


def test_a_damaged_word_of_a_check_is_found_at_every_level() -> None:
    for level in range(len(LEVELS)):
        sent = answers()
        sent["a"][CHECK][level, CHECK_WORDS - 1] ^= 1
        with pytest.raises(FusionMismatch):
            fusion.totals(sent, TERMS)


def test_a_sum_without_a_site_is_refused_before_it_is_made() -> None:
    """SP-11.18-14: "none is left out"."""
    sent = answers()
    del sent["d"]
    with pytest.raises(FusionMismatch, match="3 sites"):
        fusion.totals(sent, TERMS)


def test_the_same_question_gives_the_same_octets_and_another_gives_others() -> None:
    """SP-11.18-13: a restarted site sends again what it sent."""
    again, first = answers(), answers()
    for site in SITES:
        assert all(np.array_equal(first[site][name], again[site][name]) for name in first[site])
    other = answers(a=replace(ASKED, history=bytes(32)))["a"]
    assert not any(np.array_equal(first["a"][name], other[name]) for name in other)


def test_a_second_answer_to_one_question_is_not_given() -> None:
    """SP-11.18-13, in this process or an earlier one."""
    given, sent = Given(), answers()["a"]
    kept: dict[str, str] = {}
    given.record(ASKED, sent, kept.__setitem__)
    assert len(kept) == 1
    changed = {**sent, "x0": sent["x0"] + np.int16(1)}
    for later in (given, Given(kept)):
        later.record(ASKED, sent, no_more)
        with pytest.raises(SiteFailed, match="train 3, batch 0"):
            later.record(ASKED, changed, no_more)
    given.record(replace(ASKED, history=bytes(32)), changed, kept.__setitem__)
    assert len(kept) == 2


def no_more(asked: str, answer: str) -> None:
    raise AssertionError("it was kept before")


def test_an_answer_that_could_not_be_kept_was_not_given() -> None:
    """SP-11.18-13: "durably before": the next attempt keeps it, or fails again."""
    given, sent = Given(), answers()["a"]

    def full(asked: str, answer: str) -> None:
        raise OSError("full")

    for _ in range(2):
        with pytest.raises(OSError, match="full"):
            given.record(ASKED, sent, full)
    kept: dict[str, str] = {}
    given.record(ASKED, sent, kept.__setitem__)
    assert kept


def test_the_history_depends_on_every_gradient_before() -> None:
    """SP-11.18-12."""
    one, other = {"x0": np.zeros(3, "f4")}, {"x0": np.ones(3, "f4")}
    start = fusion.BEGINNING
    batch = b"b" * 32
    same = fusion.follow(fusion.follow(start, 1, batch, one), 2, batch, one)
    assert same == fusion.follow(fusion.follow(start, 1, batch, one), 2, batch, one)
    assert same != fusion.follow(fusion.follow(start, 1, batch, other), 2, batch, one)
    assert same != fusion.follow(fusion.follow(start, 1, batch, one), 3, batch, one)


def test_the_history_depends_on_what_the_gradients_are_of() -> None:
    """SP-11.18-12: weights differ where a step has another batch, or the same octets are of other tensors."""
    start, octets = fusion.BEGINNING, np.arange(4, dtype="f4")
    histories = {
        fusion.follow(start, 1, batch, tensors)
        for batch in (b"a" * 32, b"b" * 32)
        for tensors in (
            {"x0": octets[:1], "x1": octets[1:]},
            {"x0": octets[:2], "x1": octets[2:]},
            {"x1": octets[:2], "x0": octets[2:]},
            {"x0": octets},
        )
    }
    assert len(histories) == 8


def test_what_a_site_sends_is_named_and_shaped_as_agreed() -> None:
    """SP-11.18-2."""
    sent, clipped = fusion.answer(
        masks("a"), ASKED, {"x0": np.full((1, 2), 9, "f4")}, replace(TERMS, bits=32)
    )
    assert clipped == 2
    assert [(name, one.shape, one.dtype.str) for name, one in sent.items()] == [
        ("x0", (1, 2), "<i4"), (CHECK, (1, CHECK_WORDS), "<i4"),
    ]  # fmt: skip


def test_values_that_are_not_finite_are_refused() -> None:
    """SP-11.18-3."""
    for wrong in (np.nan, np.inf, -np.inf):
        with pytest.raises(TensorError, match="not finite"):
            fusion.quantise(np.array([0, wrong], "f4"), TERMS)


@pytest.mark.parametrize(
    ("terms", "words"),
    [
        (replace(TERMS, bits=17), "17 bits"),
        (replace(TERMS, range=0.0), "range 0"),
        (replace(TERMS, range=-4.0), "range -4"),
        (replace(TERMS, range=float("nan")), "range nan"),
    ],
)
def test_terms_that_nobody_can_keep_to(terms: Fusion, words: str) -> None:
    """SP-11.18-1."""
    with pytest.raises(SchemaMismatch, match=words):
        fusion.check_terms(terms)


def test_a_key_of_small_order_is_refused() -> None:
    """SP-11.18-8: "X25519 yields no zeros"."""
    with pytest.raises(FusionMismatch, match="partner b"):
        Masking.agreed(RUN, "a", SECRETS["a"], {"b": bytes(32)})


def test_secrets_are_not_shown() -> None:
    """SP-11.18-5, SP-14-1."""
    assert str(masks("a").shared["b"]) not in repr(masks("a"))
    assert "shared" not in repr(masks("a"))
