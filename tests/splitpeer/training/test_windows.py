"""A volume that is cut, predicted elsewhere and merged equals the result of MONAI's sliding window."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from monai.data.utils import compute_importance_map, dense_patch_slices
from monai.inferers import sliding_window_inference

from splitpeer.training.windows import WindowMerger, _importance, _overlap, window_origins


def predict(x: torch.Tensor) -> torch.Tensor:
    """A stand-in network [B, 1, ...] -> [B, 3, ...] whose output depends on the window's position and content."""
    ramp = torch.linspace(0, 1, x.shape[2]).reshape(1, 1, -1, *[1] * (x.dim() - 3))
    mean = x.mean(dim=tuple(range(1, x.dim())), keepdim=True)
    return torch.cat([x.sigmoid(), x * ramp, x - mean], dim=1)


def cut_window(volume: np.ndarray, origin: tuple[int, ...], window: tuple[int, ...]) -> np.ndarray:
    """The window [..., h, w, d] at `origin` of a volume [..., H, W, D], zero where it exceeds the volume."""
    inside, within = _overlap(volume.shape[-3:], origin, window)
    cut = np.zeros((*volume.shape[:-3], *window), dtype=volume.dtype)
    cut[..., *within] = volume[..., *inside]
    return cut


@pytest.mark.parametrize(
    ("shape", "window", "overlap"),
    [
        ((40, 37, 29), (16, 16, 16), 0.5),
        ((40, 37, 29), (16, 32, 16), 0.25),
        ((33, 50, 21), (32, 48, 32), 0.0),
        ((13, 18, 7), (16, 16, 16), 0.5),  # smaller than the window on two axes
        ((15, 15, 15), (16, 32, 48), 0.5),
        ((16, 16, 16), (16, 16, 16), 0.7),
        ((50, 41, 5), (32, 32, 1), 0.5),  # slices
        ((30, 41, 3), (32, 32, 1), 0.0),
    ],
)
def test_as_monai_does(shape, window, overlap) -> None:
    image = np.random.default_rng(3).standard_normal((1, *shape), dtype=np.float32)
    mode = "constant" if window[2] == 1 else "gaussian"
    expected = sliding_window_inference(
        torch.from_numpy(image)[None], window, 2, predict, overlap=overlap, mode=mode, sigma_scale=0.125
    )[0]
    merger = WindowMerger(shape, window, 3)
    origins = window_origins(shape, window, overlap)
    for origin in origins:
        cut = cut_window(image, origin, window)
        assert cut.shape == (1, *window)
        if window[2] == 1:  # a site feeds slices to a 2-D network
            merger.add(origin, predict(torch.from_numpy(cut[..., 0])[None])[0].numpy()[..., None])
        else:
            merger.add(origin, predict(torch.from_numpy(cut)[None])[0].numpy())
    np.testing.assert_allclose(merger.result(), expected.numpy(), rtol=0, atol=1e-5)
    assert len(set(origins)) == len(origins)


def test_the_grid_is_monais_to_the_voxel() -> None:
    source = np.random.default_rng(4)
    for _ in range(200):
        window, shape = source.integers(1, 40, 3), source.integers(1, 90, 3)
        overlap = source.choice([0.0, 0.25, 0.5, 0.7, 0.9])
        padded = np.maximum(shape, window).tolist()
        stride = [
            n if n == w else max(1, int(w * (1 - overlap))) for n, w in zip(padded, window, strict=True)
        ]
        margin = np.maximum(window - shape, 0) // 2
        theirs = [
            tuple(p.start for p in place) for place in dense_patch_slices(padded, window.tolist(), stride)
        ]
        ours = window_origins(shape.tolist(), window.tolist(), float(overlap))
        assert ours == [tuple((corner - margin).tolist()) for corner in np.array(theirs)]


@pytest.mark.parametrize("window", [(16, 16, 16), (32, 48, 5), (96, 96, 96), (2, 3, 4), (240, 240, 1)])
def test_the_weights_are_monais(window: tuple[int, int, int]) -> None:
    mode = "constant" if 1 in window else "gaussian"
    theirs = compute_importance_map(window, mode, 0.125, "cpu", torch.float32).numpy()
    # float32 there, float64 here. An exponent of up to 24 is rounded to 2^-24 of itself: 24 * 2^-24 for each factor.
    np.testing.assert_allclose(_importance(window), theirs, rtol=3 * 24 * 2**-24)


def test_small_volumes_are_centred() -> None:
    assert window_origins((10, 40, 16), (16, 32, 16), 0.5) == [(-3, 0, 0), (-3, 8, 0)]
    cut = cut_window(np.ones((10, 40, 16)), (-3, 8, 0), (16, 32, 16))
    assert cut[:3].sum() == cut[13:].sum() == 0
    assert cut[3:13].all()


def test_slices_of_a_volume_are_one_window_each() -> None:
    origins = window_origins((240, 240, 155), (240, 240, 1), 0.5)
    assert origins == [(0, 0, z) for z in range(155)]


def test_misuse() -> None:
    with pytest.raises(ValueError, match="overlap"):
        window_origins((8, 8, 8), (8, 8, 8), 1.0)
    with pytest.raises(ValueError, match="three positive"):
        window_origins((8, 8), (8, 8, 8))
    merger = WindowMerger((20, 20, 20), (16, 16, 16), 3)
    with pytest.raises(ValueError, match="outside"):
        merger.add((20, 0, 0), np.zeros((3, 16, 16, 16)))
    with pytest.raises(ValueError, match="expected"):
        merger.add((0, 0, 0), np.zeros((3, 16, 16)))
    merger.add((0, 0, 0), np.zeros((3, 16, 16, 16), dtype=np.float32))
    with pytest.raises(ValueError, match="3904 voxels"):
        merger.result()
