"""Grids: which differences count, from what size, and in which words (SP-11.12-4 to SP-11.12-9)."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitpeer.data.geometry import (
    GRID_TOLERANCE,
    Geometry,
    Turn,
    angle,
    compare_geometry,
    differences,
    shear,
)
from splitpeer.errors import DataError
from splitpeer.logs import handle

UPRIGHT = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0)
ONE = Geometry((240, 240, 155), (1.0, 1.0, 1.0), UPRIGHT, (0.0, -239.0, 0.0), (1.0, 1.0, 1.0))
KEY = bytes(range(16))
CODES = [
    "".join(letters[side] for letters, side in zip(order, sides, strict=True))
    for order in itertools.permutations(("LR", "PA", "IS"))
    for sides in itertools.product((0, 1), repeat=3)
]


def turned(degrees: float, axis: int = 2) -> np.ndarray:
    """A rotation about one axis."""
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    rotation = np.eye(4)
    a, b = (other for other in range(3) if other != axis)
    rotation[[a, a, b, b], [a, b, a, b]] = c, -s, s, c
    return rotation


def stored_as(codes: str, shape: tuple[int, ...], affine: np.ndarray) -> tuple[tuple[int, ...], np.ndarray]:
    """Shape and affine of the RAS grid (shape, affine) in a file of axis `codes`, built without the code under test."""
    columns, sizes, start = [], [], affine[:3, 3].copy()
    for letter in codes:
        axis = next(n for n, pair in enumerate(("LR", "PA", "IS")) if letter in pair)
        step = affine[:3, axis]
        if letter in "LPI":
            start += step * (shape[axis] - 1)
            step = -step
        columns.append(step)
        sizes.append(shape[axis])
    out = np.eye(4)
    out[:3, :3], out[:3, 3] = np.array(columns).T, start
    return tuple(sizes), out


def grid(
    degrees: float = 0, axis: int = 2, spacing: tuple[float, ...] = (3.0, 3.0, 3.0), origin=(-90, -126, -72)
):
    affine = turned(degrees, axis) @ np.diag([*spacing, 1.0])
    affine[:3, 3] = origin
    return Geometry.of((61, 73, 61), affine)


def test_there_are_48_ways_to_store_axes() -> None:
    assert len(set(CODES)) == 48


@pytest.mark.parametrize("tilt", [(0, 0), (15, 10), (-25, 30), (40, -20)])
@pytest.mark.parametrize("codes", CODES)
def test_every_stored_order_of_one_grid_is_the_same_grid(codes: str, tilt: tuple[float, float]) -> None:
    """SP-11.12-5: LAS, LPS and PSR files of one grid agree, oblique or not."""
    shape = (11, 12, 13)
    ras = turned(tilt[0], 0) @ turned(tilt[1], 2) @ np.diag([1.0, 1.5, 2.0, 1.0])
    ras[:3, 3] = (-5, 7, 30)
    sizes, affine = stored_as(codes, shape, ras)
    turn = Turn.of(affine)
    assert turn.codes == codes
    back_shape, back = turn.grid(sizes, affine)
    assert back_shape == shape
    np.testing.assert_allclose(back, ras, atol=1e-12)
    assert differences(Geometry.of(shape, ras), Geometry.of(back_shape, back)) == []
    # The voxels move with their places.
    voxels = np.random.default_rng(0).random(sizes)
    moved = turn.voxels(voxels)
    for index in ((0, 0, 0), (3, 4, 5), (10, 11, 12)):
        place = np.linalg.solve(affine, back @ (*index, 1))[:3]
        assert moved[index] == voxels[tuple(np.rint(place).astype(int))]


@given(st.lists(st.floats(-1, 1), min_size=4, max_size=4), st.sampled_from(CODES))
def test_the_ras_grid_does_not_depend_on_how_any_rotation_was_stored(quaternion, codes: str) -> None:
    """A greedy choice of axes would: of a volume turned by 50 degrees about two axes, say."""
    norm = math.sqrt(sum(q * q for q in quaternion))
    if norm < 0.1:
        return
    a, b, c, d = (q / norm for q in quaternion)
    affine = np.eye(4)
    affine[:3, :3] = [
        [1 - 2 * (c * c + d * d), 2 * (b * c - a * d), 2 * (b * d + a * c)],
        [2 * (b * c + a * d), 1 - 2 * (b * b + d * d), 2 * (c * d - a * b)],
        [2 * (b * d - a * c), 2 * (c * d + a * b), 1 - 2 * (b * b + c * c)],
    ]
    sums = sorted(
        sum(abs(affine[axis, source]) for axis, source in enumerate(order))
        for order in itertools.permutations(range(3))
    )
    if sums[-1] - sums[-2] < 1e-6 or np.abs(affine[:3, :3]).min() < 1e-9:
        return  # a tie, where the text names a rule that follows the storage
    shape, ras = Turn.of(affine).grid((4, 5, 6), affine)
    sizes, stored = stored_as(codes, shape, ras)
    again_shape, again = Turn.of(stored).grid(sizes, stored)
    assert again_shape == shape
    np.testing.assert_allclose(again, ras, atol=1e-9)


def test_a_geometry_keeps_its_affine() -> None:
    affine = turned(15, 0) @ turned(10, 2) @ np.diag([0.9, 1.1, 4.0, 1.0])
    affine[:3, 3] = (-91.5, 126, -72)
    np.testing.assert_allclose(Geometry.of((4, 5, 6), affine).affine, affine, atol=1e-12)


# --- what is compared ----------------------------------------------------------------------------------------


def test_sites_that_agree_pass_within_tolerance() -> None:
    near = replace(ONE, spacing=(1.0005, 1.0, 1.0), origin=(0.001, -239.0, 0.0))
    near = replace(near, stored=near.spacing)
    assert compare_geometry({"a": {KEY: ONE}, "b": {KEY: near}, "c": {b"x": ONE}}) is None


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"shape": (240, 240, 154)}, "shape 240x240x155 against 240x240x154"),
        ({"spacing": (1.0, 1.0, 1.002)}, "spacing 1x1x1 against 1x1x1.002 mm"),
        ({"spacing": (1.0, 1.0, float("nan"))}, "spacing"),
        ({"directions": (0.0,) * 9}, "direction: turned by"),
        ({"directions": (1e308,) * 9}, "direction: turned by"),
        ({"origin": (0.0, -238.0, 0.0)}, "origin 0x-239x0 against 0x-238x0 mm"),
    ],
)
def test_a_difference_names_the_patient_the_sites_and_what(change: dict, said: str) -> None:
    with pytest.raises(DataError) as caught:
        compare_geometry({"t1": {KEY: ONE, b"y": ONE}, "t2": {KEY: ONE}, "zz": {KEY: replace(ONE, **change)}})
    assert f"patient {handle(KEY)}: t1 and zz differ in {said}" in str(caught.value)


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("degrees", [10, 15, 40, -12.5, 0.4])
def test_a_turned_grid_is_refused_with_its_angle(degrees: float, axis: int) -> None:
    """The same origin, spacing and shape: only the direction cosines tell."""
    (*_, direction, position) = differences(grid(), grid(degrees, axis))
    assert direction == f"direction: turned by {abs(degrees):.3g} degrees"
    assert position.startswith("position: equal voxels lie up to ") and "0.75 mm is allowed" in position


def test_a_turn_that_only_rounding_explains_is_accepted() -> None:
    assert differences(grid(), grid(0.01)) == []
    assert angle(grid().affine, grid(1e-5).affine) == pytest.approx(1e-5, rel=1e-3)


@pytest.mark.parametrize(
    ("shift", "accepted"),
    [(0.02, True), (0.3, True), (0.74, True), (0.76, False), (3.0, False), (-1.0, False)],
)
def test_origins_may_differ_by_a_quarter_of_a_voxel(shift: float, accepted: bool) -> None:
    """SP-11.12-9: of the shortest edge, here 3 mm."""
    assert GRID_TOLERANCE == 0.25
    assert (differences(grid(), grid(origin=(-90, -126, -72 + shift))) == []) is accepted


def test_a_spacing_that_adds_up_over_the_volume_is_refused() -> None:
    """0.02 mm in 3 are 1.2 mm at the last of 61 voxels."""
    assert differences(grid(), grid(spacing=(3.0, 3.0, 3.004))) == []
    assert "spacing 3x3x3 against 3x3x3.02 mm" in differences(grid(), grid(spacing=(3.0, 3.0, 3.02)))[0]


def test_lengths_may_differ_only_where_a_volume_was_resampled() -> None:
    """SP-11.12-9."""

    def of(length: int, stored: float, spacing: float = 3.0) -> Geometry:
        size = (spacing,) * 3
        return Geometry((40, 40, length), size, UPRIGHT, (0.0, 0.0, 0.0), (3.0, 3.0, stored))

    assert differences(of(40, 3.0), of(39, 6.0)) == []
    assert differences(of(40, 3.0), of(38, 6.0)) == []
    assert differences(of(40, 3.0), of(37, 6.0)) == ["shape 40x40x40 against 40x40x37"]
    assert differences(of(40, 3.0), of(39, 3.0)) == ["shape 40x40x40 against 40x40x39"]
    fine = replace(of(53, 1.0), stored=(1.0, 1.0, 1.0))
    assert differences(fine, replace(of(52, 1.5), stored=(1.5, 1.5, 1.5))) == []


def test_shear_is_the_shift_of_the_far_side() -> None:
    affine = np.diag([3.0, 3.0, 6.0, 1.0])
    affine[0, 2] = 2 / 20  # 2 mm to the right over 20 slices
    assert shear((61, 73, 20), affine) == pytest.approx(2 * 61 * 3 / 120, rel=1e-3)
    assert shear((10, 10, 20), affine) == pytest.approx(2, rel=1e-3)
    assert shear((61, 73, 20), turned(15, 0) @ turned(10) @ np.diag([3.0, 3.0, 6.0, 1.0])) < 1e-9
