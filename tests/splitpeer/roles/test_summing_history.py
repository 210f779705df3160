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
from splitproto.errors import FusionMismatch
from splitproto.messages import Forward, Fusion, Sample, Settled

TERMS, SITES = Fusion(16, 4.0, 3), "abc"
ONES = {"t1": {"level": np.ones((1, 2, 4, 4), np.float32)}}


@pytest.fixture
def sites(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Summing]:
    """Three sites that have proven themselves to each other."""
    monkeypatch.setattr(summing.partners, "terms_digest", lambda job: bytes(32))
    offer = SimpleNamespace(run=bytes(16), job=SimpleNamespace(fusion=TERMS, frozen=False))
    made = {}
    for site in SITES:
        refusals = RangeRefusals(tmp_path / site, 3)
        one = Summing(offer, tmp_path / site / "run", None, site, print, 1, refusals, 30)  # type: ignore[arg-type]
        made[site] = one
    for site, one in made.items():
        one.keys.agree(
            bytes(16), site, {name: other.keys.public for name, other in made.items() if name != site}
        )
        one.keys.settle(Settled(False, 1))
        one._proven = True
    return made


def total(sites: dict[str, Summing], mode: str) -> float:
    asked = Forward(mode, 1, 0, (Sample(bytes(16), (0, 0, 0)),), bytes(32))
    answers = {name: site.answer(asked, site.rounded(asked, ONES)) for name, site in sites.items()}
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
