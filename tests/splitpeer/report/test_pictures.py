"""Pictures: same window, same way up as everywhere else in the project, outlines where masks are."""

from __future__ import annotations

import base64
import io

import numpy as np
from PIL import Image

from splitpeer.report.pictures import FOUND_OUTLINE, SCALE, TRUE_OUTLINE, image_tiles, mask_tiles


def pixels(address: str) -> np.ndarray:
    kind, _, text = address.partition(",")
    assert kind == "data:image/png;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text))).convert("RGB")).astype(int)


def brain(size: int = 16) -> np.ndarray:
    x, y = np.mgrid[:size, :size] / size
    inside = (x - 0.5) ** 2 + (y - 0.5) ** 2 < 0.2
    return np.where(inside, x - 0.5 + 0.01, 0)[None, None]


def test_a_copy_up_to_gain_and_offset_looks_the_same_and_nan_does_no_harm() -> None:
    truth = brain()
    tiles = image_tiles(truth, -4 * truth + 7, None, None, None)
    np.testing.assert_allclose(pixels(tiles["truth"][0]), pixels(tiles["found"][0]), atol=1)
    assert set(tiles) == {"truth", "found"}
    assert len(image_tiles(truth, truth * np.nan, None, None, truth)["floor"]) == 1


def test_first_axis_to_the_right_second_upwards() -> None:
    image = np.zeros((1, 1, 12, 16))
    image[0, 0, 3, 2] = 1
    rows = pixels(image_tiles(None, image, None, None, None)["found"][0])
    assert rows.shape == (16 * SCALE, 12 * SCALE, 3)
    row, column = (int(where.mean()) // SCALE for where in np.nonzero(rows[..., 0] == rows.max()))
    assert (row, column) == (16 - 1 - 2, 3)


def test_outlines_are_drawn_in_their_colours_on_their_images() -> None:
    truth = brain()
    mask = np.zeros((1, 16, 16))
    mask[0, 6:9, 6:9] = 1
    tiles = image_tiles(truth, truth, mask, mask, None)
    for name, colour, other in (
        ("truth", TRUE_OUTLINE, FOUND_OUTLINE),
        ("found", FOUND_OUTLINE, TRUE_OUTLINE),
    ):
        rows = pixels(tiles[name][0])
        assert (rows == colour).all(axis=-1).any() and not (rows == other).all(axis=-1).any()
    maps = mask_tiles(None, mask, mask)
    assert (pixels(maps["truth"][0]) == TRUE_OUTLINE).all(axis=-1).any()
    assert pixels(maps["found"][0]).max() > 200


def test_of_volumes_the_level_with_most_tumour_is_shown() -> None:
    volume = np.random.default_rng(0).standard_normal((1, 1, 16, 16, 8))
    mask = np.zeros((1, 16, 16, 8))
    mask[0, 4:6, 4:6, 5] = 1
    tiles = image_tiles(volume, volume, mask, None, None)
    flat = image_tiles(volume[..., 5], volume[..., 5], mask[..., 5], None, None)
    np.testing.assert_allclose(pixels(tiles["truth"][0]), pixels(flat["truth"][0]), atol=1)
    assert pixels(mask_tiles(volume, mask, mask)["found"][0]).shape == (32, 32, 3)


def test_an_empty_image_is_black() -> None:
    empty = np.zeros((1, 1, 16, 16))
    assert pixels(image_tiles(empty, empty, None, None, None)["found"][0]).max() == 0
