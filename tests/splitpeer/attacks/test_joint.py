"""What all sites sent is read at once, and a sum of many channels hides nothing."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from splitpeer.attacks.base import Knowledge
from splitpeer.attacks.image.inverse import InverseAttack
from splitpeer.attacks.image.whitebox import WhiteBox
from splitpeer.attacks.joint import NAME, joint_knowledge, joint_view
from splitpeer.attacks.runner import run
from splitpeer.errors import AttackImpossible
from splitproto.fusion import greatest
from splitproto.records import Fusion, Seat

from .image_attacks import encoder, heads, likeness, look

ENCODERS = (encoder(1), encoder(2))


def contrasts(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Two contrasts of the same heads, which share most of their anatomy."""
    first = heads(count, seed)
    return first, (0.98 * first + 0.1 * heads(count, seed + 50) * (first != 0)).astype(np.float32)


TRUTH, SHADOW = contrasts(2, 1), contrasts(60, 2)


def scene(defence: str):
    views = [
        replace(
            look(images, network, defences=[defence] if defence else []),
            site=f"site-{name}",
            seat=Seat(name, (name,)),
        )
        for name, images, network in zip(("t1", "t2"), TRUTH, ENCODERS, strict=True)
    ]
    known = [
        Knowledge(model=network, weights_step=5, shadow={name: images})
        for name, images, network in zip(("t1", "t2"), SHADOW, ENCODERS, strict=True)
    ]
    return views, known


def test_one_network_reads_what_all_sites_sent() -> None:
    views, known = scene("gaussian:4")
    small = InverseAttack(steps=60, width=(8,))
    together = run(small, joint_view(views), joint_knowledge(views, known))
    assert together.images.shape == (2, 2, 32, 32)
    assert min(likeness(together.images[:, n : n + 1], TRUTH[n]) for n in range(2)) > 0.65


def test_a_sum_of_many_channels_hides_neither_image() -> None:
    views, known = scene("")
    terms = Fusion(16, 64.0, 2)
    view, granted = joint_view(views, terms), joint_knowledge(views, known, terms)
    levels = view.targets[0].shots[0].activations
    parts = [v.targets[0].shots[0].activations["x0"] for v in views]
    # Integers, never floats: what the coordinator reads lies on the grid of the terms.
    words = levels["x0"].astype(np.float64) * (greatest(terms) / terms.range)
    assert np.allclose(words, np.rint(words), atol=1e-3)
    assert np.allclose(levels["x0"], parts[0] + parts[1], atol=64 / greatest(terms))
    assert not np.array_equal(levels["x0"], parts[0] + parts[1])
    found = run(WhiteBox(iterations=120, schedules="joint"), view, granted).images
    assert min(likeness(found[:, n : n + 1], TRUTH[n]) for n in range(2)) > 0.8
    assert view.seat == Seat(NAME, ("t1", "t2"))


@pytest.mark.parametrize("limit", [64.0, 0.25])
def test_the_adversary_sums_as_the_coordinator_reads(limit: float) -> None:
    """Clipped and rounded for each site, of which one may fill two seats."""
    views, known = scene("")
    views.append(replace(views[1], seat=Seat("again", ("t2",))))
    terms = Fusion(16, limit, 2)
    view, granted = joint_view(views, terms), joint_knowledge(views, [*known, known[1]], terms)
    images = torch.from_numpy(np.concatenate([TRUTH[0], TRUTH[1], TRUTH[1]], 1))
    assert granted.model is not None
    with torch.no_grad():
        expected = granted.model(images)
    for n, target in enumerate(view.targets):
        for name, array in target.shots[0].activations.items():
            assert np.allclose(array, expected[name][n].numpy(), atol=1.5 * limit / greatest(terms)), name
            assert np.abs(array).max() <= 2 * limit + 1e-6


def test_what_it_cannot_join_it_says() -> None:
    views, known = scene("")
    with pytest.raises(AttackImpossible, match="different defences"):
        joint_view([views[0], replace(views[1], defences=("gaussian:1",))])
    with pytest.raises(AttackImpossible, match="not sent by all"):
        joint_view([views[0], replace(views[1], targets=views[1].targets[:1])])
    with pytest.raises(AttackImpossible, match="encoders of all"):
        joint_knowledge(views, [known[0], replace(known[1], model=None)])
