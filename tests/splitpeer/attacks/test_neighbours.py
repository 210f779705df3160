"""Slices next to a target are read with it: what noise hides in one slice, three show."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from splitpeer.attacks.base import Knowledge, Target
from splitpeer.attacks.image.inverse import InverseAttack
from splitpeer.attacks.neighbours import around, beside, neighbour_knowledge, neighbour_view, offsets
from splitpeer.attacks.runner import run
from splitpeer.errors import AttackImpossible
from splitproto.records import Sample

from .image_attacks import encoder, heads, likeness, look

NETWORK, COUNT = encoder(), 3


def stacks(count: int, seed: int) -> dict[int, np.ndarray]:
    """Three slices of each head, which differ a little."""
    middle = heads(count, seed)
    return {
        by: (0.98 * middle + 0.15 * heads(count, seed + 100 + by) * (middle != 0)).astype(np.float32) if by else middle
        for by in offsets(1)
    }  # fmt: skip


TRUTH, SHADOW = stacks(COUNT, 1), stacks(60, 2)


def seen(by: int, defence: str) -> tuple[Target, ...]:
    view = look(TRUTH[by], NETWORK, defences=[defence])
    return tuple(replace(t, sample=beside(t.sample, 5 + by)) for t in view.targets)


def scene(defence: str):
    view = replace(look(TRUTH[0], NETWORK, defences=[defence]), targets=seen(0, defence))
    knowledge = Knowledge(model=NETWORK, weights_step=5, shadow={"t1": SHADOW[0]})
    return view, [*seen(-1, defence), *seen(1, defence)], knowledge


def test_neighbours_show_more_than_one_slice() -> None:
    view, released, knowledge = scene("gaussian:6")
    small = InverseAttack(steps=30, width=(8,))
    alone = likeness(run(small, view, knowledge).images, TRUTH[0])
    together = run(small, neighbour_view(view, released), neighbour_knowledge(view, knowledge, SHADOW))
    assert together.images.shape == (COUNT, 3, 32, 32)
    assert likeness(together.images[:, :1], TRUTH[0]) > alone + 0.02


def test_each_slice_is_defended_by_itself() -> None:
    view, released, _ = scene("gaussian:2")
    joined = neighbour_view(view, released)
    assert joined.parts == 3 and joined.reads == "neighbouring slices"
    levels = joined.targets[0].shots[0].activations
    assert np.array_equal(levels["x0"][:8], view.targets[0].shots[0].activations["x0"])
    assert np.array_equal(levels["x0"][8:16], released[0].shots[0].activations["x0"])


def test_what_is_missing_is_replaced_or_refused() -> None:
    view, released, knowledge = scene("gaussian:1")
    without = neighbour_view(view, released[COUNT:])  # nothing below
    levels = without.targets[0].shots[0].activations
    assert np.array_equal(levels["x0"][8:16], levels["x0"][:8])
    with pytest.raises(AttackImpossible, match="no slice next to"):
        neighbour_view(view, [])
    turned = [replace(t, shots=tuple(replace(s, seed=3) for s in t.shots)) for t in released]
    with pytest.raises(AttackImpossible, match="without augmentation"):
        neighbour_view(view, turned)
    with pytest.raises(AttackImpossible, match="encoder"):
        neighbour_knowledge(view, replace(knowledge, model=None), SHADOW)
    flat = Sample(bytes(16), (0, 0, 1))
    assert [s.origin[2] for s in around([flat], 2, {flat.key: 3})] == [0, 2]
