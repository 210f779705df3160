"""Images for the page: slices as PNG data, truth and reconstruction in the same grey window."""

from __future__ import annotations

import base64
import io
from typing import Any

import numpy as np
from matplotlib import colormaps
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from splitpeer.leakage.metrics import align, brain_mask

SCALE = 2  # pixels a voxel, so that outlines are thin
TRUE_OUTLINE = (
    86,
    180,
    233,
)  # sky blue and orange of Okabe and Ito: distinguishable for colour-blind readers
FOUND_OUTLINE = (230, 159, 0)

Slice = NDArray[np.float64]


def level_of(volume: NDArray[Any], mask: NDArray[Any] | None) -> int:
    """The slice of a volume [X, Y, Z] to show: where the tumour is largest, else the middle."""
    if mask is not None and mask.any():
        return int(np.argmax(mask.reshape(-1, mask.shape[-1]).sum(axis=0)))
    return int(volume.shape[-1]) // 2


def flat(sample: NDArray[Any], level: int) -> NDArray[Any]:
    """[X, Y] of [X, Y] or of level `level` of [X, Y, Z]."""
    return sample if sample.ndim == 2 else sample[..., level]


def grey(
    image: Slice, window: tuple[float, float], inside: NDArray[np.bool_] | None = None
) -> NDArray[np.uint8]:
    """[X, Y] in a window, black outside the brain, as uint8 RGB rows for the screen."""
    low, high = window
    values = np.clip((np.nan_to_num(image, nan=low) - low) / (high - low), 0, 1)
    if inside is not None:
        values = np.where(inside, 0.06 + 0.94 * values, 0)
    return _screen(np.repeat((255 * values).astype(np.uint8)[..., None], 3, axis=2))


def window_of(image: Slice, inside: NDArray[np.bool_] | None) -> tuple[float, float]:
    """Grey window [low, high] of an image: its 1st and 99.5th percentile inside the body."""
    values = (
        np.asarray(image, dtype=np.float64)[inside]
        if inside is not None and inside.any()
        else np.ravel(image)
    )
    values = values[np.isfinite(values)]
    if not len(values):
        return 0.0, 1.0
    low, high = (float(v) for v in np.percentile(values, [1, 99.5]))
    return (low, high) if high > low else (low - 0.5, low + 0.5)


def heat(scores: Slice) -> NDArray[np.uint8]:
    """A map [X, Y] in colours from black over violet to yellow (magma), as uint8 RGB rows."""
    low, high = window_of(scores, None)
    values = np.clip(
        (np.nan_to_num(np.asarray(scores, dtype=np.float64), nan=low) - low) / (high - low), 0, 1
    )
    return _screen((255 * colormaps["magma"](values)[..., :3]).astype(np.uint8))


def outlined(rows: NDArray[np.uint8], mask: NDArray[Any], colour: tuple[int, int, int]) -> NDArray[np.uint8]:
    """The same picture with the mask's border [X, Y] drawn one pixel wide."""
    large = _screen((np.asarray(mask) != 0)[..., None])[..., 0]
    edge = ndimage.binary_dilation(large) & ~large
    drawn = rows.copy()
    drawn[edge] = colour
    return drawn


def _screen(image: NDArray[Any]) -> NDArray[Any]:
    """First axis to the right, second upwards (NIfTI's RAS seen from below), magnified."""
    turned = image.transpose(1, 0, 2)[::-1]
    return turned.repeat(SCALE, axis=0).repeat(SCALE, axis=1)


def png(rows: NDArray[np.uint8]) -> str:
    """RGB rows as the data: address of a PNG; grey where all is grey."""
    picture = Image.fromarray(rows)
    if (rows == rows[..., :1]).all():
        picture = picture.convert("L")
    file = io.BytesIO()
    picture.save(file, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def image_tiles(
    truth: NDArray[Any] | None,
    found: NDArray[Any],
    masks: NDArray[Any] | None,
    tumour: NDArray[Any] | None,
    floor: NDArray[Any] | None,
) -> dict[str, list[str]]:
    """Pictures "truth", "found" and "floor" as data: addresses, where their arrays are given.

    Args:
        truth, found, floor: [n, 1, *spatial], the same rows.
        masks: true whole tumour [n, *spatial], drawn on the truth.
        tumour: tumour found in the reconstruction [n, *spatial], drawn on it.
    """
    tiles: dict[str, list[str]] = {}
    for i, image in enumerate(found[:, 0]):
        level = level_of(image, None if masks is None else masks[i])
        shown = flat(np.asarray(image, dtype=np.float64), level)
        inside, window = None, window_of(shown, None)
        if truth is not None:
            true = np.asarray(truth[i, 0], dtype=np.float64)
            mask = brain_mask(true)
            inside = flat(mask, level)
            window = window_of(flat(true, level), inside)
            if mask.any():
                shown = flat(align(image, true, mask), level)
            picture = grey(flat(true, level), window, inside)
            if masks is not None:
                picture = outlined(picture, flat(masks[i], level), TRUE_OUTLINE)
            tiles.setdefault("truth", []).append(png(picture))
            if floor is not None and mask.any():
                mean = flat(align(floor[i, 0], true, mask), level)
                tiles.setdefault("floor", []).append(png(grey(mean, window, inside)))
        picture = grey(shown, window, inside)
        if tumour is not None:
            picture = outlined(picture, flat(tumour[i], level), FOUND_OUTLINE)
        tiles.setdefault("found", []).append(png(picture))
    return tiles


def mask_tiles(
    truth: NDArray[Any] | None, found: NDArray[Any], masks: NDArray[Any] | None
) -> dict[str, list[str]]:
    """Pictures "truth" (the image, if there, with the true outline) and "found" (the recovered map).

    Args:
        truth: [n, 1, *spatial] images.
        found: maps [n, *spatial].
        masks: true whole tumour [n, *spatial].
    """
    tiles: dict[str, list[str]] = {}
    for i, scores in enumerate(found):
        level = level_of(scores, None if masks is None else masks[i])
        if masks is not None:
            mask = flat(masks[i], level)
            if truth is not None:
                true = flat(np.asarray(truth[i, 0], dtype=np.float64), level)
                inside = brain_mask(true)
                picture = grey(true, window_of(true, inside), inside)
            else:
                picture = grey(np.zeros(mask.shape), (0.0, 1.0))
            tiles.setdefault("truth", []).append(png(outlined(picture, mask, TRUE_OUTLINE)))
        tiles.setdefault("found", []).append(png(heat(flat(scores, level))))
    return tiles
