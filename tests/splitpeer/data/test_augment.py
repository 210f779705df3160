"""Augmentation: the digests come from `printf ... | sha256sum`, the arrays were turned by hand, not by our code."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from splitpeer.data.augment import augment, derive

SEED = 0x0102030405060708


@pytest.mark.parametrize(
    ("seed", "index", "base", "grey", "flips", "turns", "u", "v"),
    [
        (0, 0, "028fb83b43e2", "ac2f6018262e", (False, True, False), 3, 0x6018, 0x262E),
        (SEED, 0, "ec049572a40f", "4108ee789869", (False, False, True), 0, 0xEE78, 0x9869),
        (SEED, 5, "9f0552c2f597", "e591759f6f66", (True, True, True), 1, 0x759F, 0x6F66),
    ],
)
def test_the_octets_decide_as_written(seed, index, base, grey, flips, turns, u, v) -> None:
    """SP-11.7-1."""
    material = b"splitproto augment v1" + bytes.fromhex(f"{seed:016x}{index:08x}")
    assert hashlib.sha256(material).hexdigest().startswith(base)
    assert hashlib.sha256(material + b"t1ce").hexdigest().startswith(grey)
    plan = derive(seed, index, "t1ce")
    assert (plan.flips, plan.turns) == (flips, turns)
    assert plan.scale == pytest.approx(0.9 + 0.2 * u / 65535, abs=1e-15)
    assert plan.shift == pytest.approx(-0.1 + 0.2 * v / 65535, abs=1e-15)


@pytest.mark.parametrize(
    ("seed", "index", "turned"),
    [(0, 0, [[4, 2], [3, 1]]), (0, 1, [[2, 1], [4, 3]]), (SEED, 5, [[3, 1], [4, 2]])],
)
def test_flips_then_quarter_turns(seed: int, index: int, turned: list[list[int]]) -> None:
    array = np.array([[[1, 2], [3, 4]]], np.uint8)
    out = augment(array, seed, index, None)
    assert out.tolist() == [turned] and out.dtype == np.uint8 and out.flags.c_contiguous


def test_z_flips_in_3d_and_is_ignored_in_2d() -> None:
    volume = np.arange(2 * 2 * 3, dtype=np.uint8).reshape(1, 2, 2, 3)
    np.testing.assert_array_equal(augment(volume, SEED, 0, None), volume[..., ::-1])
    np.testing.assert_array_equal(augment(volume[..., 0], SEED, 0, None), volume[..., 0])


def test_no_quarter_turn_where_x_and_y_differ() -> None:
    array = np.arange(6, dtype=np.uint8).reshape(1, 2, 3)
    np.testing.assert_array_equal(augment(array, SEED, 5, None), array[:, ::-1, ::-1])


def test_grey_values_scale_and_shift_but_zero_stays_zero() -> None:
    """SP-11.7-2."""
    image = np.array([[[0.0, 1.0], [-2.0, 0.5]]], np.float32)
    scale = np.float32(0.9 + 0.2 * 0x6018 / 65535)
    shift = np.float32(-0.1 + 0.2 * 0x262E / 65535)
    out = augment(image, 0, 0, "t1ce")
    expected = np.array([[[0.5, 1.0], [-2.0, 0.0]]], np.float32)
    expected = np.where(expected != 0, expected * scale + shift, np.float32(0))
    assert out.dtype == np.float32
    np.testing.assert_array_equal(out, expected)


def test_contrasts_and_masks_move_together() -> None:
    array = np.random.default_rng(0).uniform(1, 2, (1, 4, 4, 5)).astype(np.float32)
    marks = (array > 1.5).astype(np.uint8)
    for index in range(20):
        moved = augment(marks, 7, index, None)
        for modality in ("flair", "t1", "t1ce", "t2"):
            plan = derive(7, index, modality)
            back = (augment(array, 7, index, modality) - plan.shift) / plan.scale
            np.testing.assert_array_equal(back > 1.5, moved.astype(bool))
    assert derive(7, 0, "t1").scale != derive(7, 0, "t2").scale


def test_the_input_is_left_alone() -> None:
    array = np.ones((1, 4, 4), np.float32)
    array.setflags(write=False)
    for index in range(8):
        augment(array, 1, index, "t1")[...] = 0
    assert (array == 1).all()
