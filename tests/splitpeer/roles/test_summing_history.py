"""SP-11.18-12: masks of sites whose gradients differed do not cancel, in any mode whose weights have learnt."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from splitpeer.site import summing
from splitpeer.site.range_refusals import RangeRefusals
from splitpeer.site.summing import Summing
from splitproto import fusion
from splitproto.errors import FusionMismatch, SiteFailed
from splitproto.messages import Forward, Settled
from splitproto.records import Fusion, Sample

TERMS, SITES = Fusion(16, 4.0, 3), "abc"
ONES = {"t1": {"level": np.ones((1, 2, 4, 4), np.float32)}}


def opened(folder: Path, site: str) -> Summing:
    """As a process does."""
    offer = SimpleNamespace(run=bytes(16), job=SimpleNamespace(fusion=TERMS, frozen=False))
    refusals = RangeRefusals(folder / site, 3)
    return Summing(offer, folder / site / "run", None, site, print, 1, refusals, 30)  # type: ignore[arg-type]


def prove(sites: dict[str, Summing], name: str, epoch: int) -> None:
    keys = {other: one.keys.public for other, one in sites.items() if other != name}
    sites[name].keys.agree(bytes(16), name, keys)
    sites[name].keys.settle(Settled(False, epoch))
    sites[name]._proven = True


@pytest.fixture
def sites(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Summing]:
    """Three sites that have proven themselves to each other."""
    monkeypatch.setattr(summing.partners, "terms_digest", lambda job: bytes(32))
    made = {site: opened(tmp_path, site) for site in SITES}
    for site in SITES:
        prove(made, site, 1)
    return made


def asked(mode: str) -> Forward:
    return Forward(mode, 1, 0, (Sample(bytes(16), (0, 0, 0)),), bytes(32))


def sent(site: Summing, mode: str, values: dict[str, dict[str, np.ndarray]] = ONES) -> dict[str, np.ndarray]:
    question = asked(mode)
    return site.answer(question, site.rounded(question, values))


def total(sites: dict[str, Summing], mode: str) -> float:
    answers = {name: sent(site, mode) for name, site in sites.items()}
    return float(fusion.totals(answers, TERMS)["level"].mean())


@pytest.mark.parametrize("mode", ["train", "evaluate", "infer"])
def test_other_gradients_of_one_site_spoil_the_sum(sites: dict[str, Summing], mode: str) -> None:
    for name, site in sites.items():
        gradient = np.full(4, 2.0 if name == "a" else 1.0, np.float32)
        site.follow(1, bytes(32), {"level": gradient})
    with pytest.raises(FusionMismatch):
        total(sites, mode)


@pytest.mark.parametrize("mode", ["train", "evaluate", "infer"])
def test_the_same_gradients_of_all_sites_do_not(sites: dict[str, Summing], mode: str) -> None:
    for site in sites.values():
        site.follow(1, bytes(32), {"level": np.ones(4, np.float32)})
    assert total(sites, mode) == pytest.approx(3, abs=1e-3)


def test_a_question_that_comes_again_in_a_later_epoch_has_the_same_words(
    sites: dict[str, Summing], tmp_path: Path
) -> None:
    """SP-11.18-18: other masks are no other answer; other words are, whatever masks them."""
    one = sent(sites["a"], "infer")
    assert total(sites, "infer") == pytest.approx(3, abs=1e-3)
    sites["a"] = opened(tmp_path, "a")
    for name in SITES:
        prove(sites, name, 2)
    assert not np.array_equal(sent(sites["a"], "infer")["level"], one["level"])
    assert total(sites, "infer") == pytest.approx(3, abs=1e-3)
    others = {"t1": {"level": 2 * ONES["t1"]["level"]}}
    for site in (sites["a"], sites["b"]):
        with pytest.raises(SiteFailed, match="answer to infer 1, batch 0, is not the one"):
            sent(site, "infer", others)


@pytest.mark.parametrize("mode", ["train", "evaluate", "infer"])
def test_no_question_has_two_answers(sites: dict[str, Summing], tmp_path: Path, mode: str) -> None:
    """SP-11.18-13: also after a restart of the site."""
    one = sent(sites["a"], mode)
    sites["a"] = opened(tmp_path, "a")
    prove(sites, "a", 1)
    with pytest.raises(SiteFailed, match="is not the one that was given"):
        sent(sites["a"], mode, {"t1": {"level": 2 * ONES["t1"]["level"]}})
    assert np.array_equal(sent(sites["a"], mode)["level"], one["level"])
