"""The bound of Gaussian noise, stated where it holds and only there."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from splitpeer.attacks.base import Knowledge
from splitpeer.audit.bound import gaussian_bound
from splitpeer.audit.capture_audit import CaptureAudit
from splitpeer.audit.knowledge import with_model
from splitpeer.audit.rehearsal import Rehearsed


@pytest.mark.parametrize(
    ("written", "said"),
    [
        (["gaussian:2"], "after 4 releases"),
        (["gaussian:2,kept=true"], "after 1 release ("),
        (["gaussian:2@0"], None),
        (["laplace:2"], None),
        (["dropout:0.5", "gaussian:2"], "after 4 releases"),
        (["quantise:8", "gaussian:2"], None),
        (["topk:0.5", "gaussian:2"], None),
        (["gaussian:2", "quantise:8"], "after 4 releases"),
    ],
)
def test_where_noise_covers_every_level(
    place: Any, clean: Rehearsed, written: list[str], said: str | None
) -> None:
    asked = CaptureAudit(clean.capture, seat="t1", samples=2, defence="+".join(written), seed=1, views=2)
    view = asked.experiment().view
    assert len(view.targets[0].shots) == 4
    knowledge = with_model(Knowledge(), view, clean.weights("t1"))
    images = np.random.default_rng(0).standard_normal((2, 1, 32, 32)).astype(np.float32)
    bound = gaussian_bound(view, knowledge, images)
    assert bound is None if said is None else bound is not None and said in bound
    assert gaussian_bound(view, Knowledge(), images) is None


def test_it_holds_for_the_patient_with_the_weakest_protection(
    place: Any, clean: Rehearsed, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = CaptureAudit(clean.capture, seat="t1", samples=2, defence="gaussian:2", seed=1, views=2)
    view = asked.experiment().view
    knowledge = with_model(Knowledge(), view, clean.weights("t1"))
    found = iter((3.0, 0.5, 1.0))
    monkeypatch.setattr(
        "splitpeer.audit.bound.dfil", lambda model, images, sigma, **how: np.array([next(found)])
    )
    images = np.random.default_rng(0).standard_normal((3, 1, 32, 32)).astype(np.float32)
    bound = gaussian_bound(view, knowledge, images)
    assert bound is not None and "(dFIL 3;" in bound


def test_an_attacker_who_knows_brains_is_bound_too_and_lower(place: Any, clean: Rehearsed) -> None:
    asked = CaptureAudit(clean.capture, seat="t1", samples=2, defence="gaussian:2", seed=1, views=2)
    view = asked.experiment().view
    source = np.random.default_rng(0)
    images, others = (source.standard_normal((n, 1, 32, 32)).astype(np.float32) for n in (2, 8))
    knowledge = with_model(Knowledge(), view, clean.weights("t1"))
    alone = gaussian_bound(view, knowledge, images)
    assert alone is not None and "needs images of other patients" in alone
    said = gaussian_bound(view, replace(knowledge, shadow={"t1": others}), images)
    assert said is not None and "van Trees" in said and "from 8 images" in said
    unbiased, any_attacker = (float(found) for found in re.findall(r"at least ([0-9.e-]+) per voxel", said))
    # Each voxel by itself, of variance 1: information 1, so no attacker needs to be further off than 1.
    assert any_attacker < min(unbiased, 1)
