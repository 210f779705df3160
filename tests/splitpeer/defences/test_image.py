"""Noise on the image: the same wherever and whenever a voxel is sent."""

from __future__ import annotations

import numpy as np
import pytest

from splitpeer.data.loader import SiteData
from splitpeer.defences.image.stack import make_image_stack
from splitpeer.errors import ConfigError
from splitproto.records import Sample

KEY = bytes(range(32))
SHAPE = (40, 36, 20)


class Site:
    """Two patients' volumes, as `Volumes` serves them."""

    def __init__(self) -> None:
        source = np.random.default_rng(2)
        self.volumes = {}
        for key in (b"a" * 16, b"b" * 16):
            voxels = source.standard_normal((1, *SHAPE), dtype=np.float32)
            voxels[:, :8] = voxels[:, :, :5] = 0
            self.volumes[key] = voxels

    def window(self, key: bytes, origin: tuple[int, int, int], size: tuple[int, int, int]) -> np.ndarray:
        padded = np.pad(self.volumes[key], [(0, 0)] + [(64, 64)] * 3)
        return padded[
            (slice(None), *(slice(o + 64, o + 64 + n) for o, n in zip(origin, size, strict=True)))
        ].copy()

    def geometry(self, key: bytes):
        from types import SimpleNamespace

        return SimpleNamespace(shape=self.volumes[key].shape[1:])


def noise_of(written: str, key: bytes = KEY, patient: bytes = b"a" * 16) -> np.ndarray:
    site = Site()
    whole = site.window(patient, (0, 0, 0), SHAPE)
    return (make_image_stack(written, key).window(whole, patient, (0, 0, 0), SHAPE) - whole)[0]


def test_noise_has_the_width_written_and_spares_the_background() -> None:
    noise, brain = noise_of("voxel-noise:0.5"), Site().volumes[b"a" * 16][0] != 0
    assert noise[brain].std() == pytest.approx(0.5, rel=0.03)
    assert abs(noise[brain].mean()) < 0.02
    assert not noise[~brain].any()
    assert noise_of("voxel-noise:0.5,background=true")[~brain].std() == pytest.approx(0.5, rel=0.03)
    assert noise_of("voxel-noise:0.3+voxel-noise:0.4")[brain].std() == pytest.approx(0.5, rel=0.03)
    first, second = noise[..., 10][brain[..., 10]], noise[..., 11][brain[..., 10]]
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.1


def test_it_depends_on_key_and_patient_alone() -> None:
    once = noise_of("voxel-noise:1")
    assert np.array_equal(once, noise_of("voxel-noise:1"))
    brain = once != 0
    assert abs(np.corrcoef(once[brain], noise_of("voxel-noise:1", bytes(32))[brain])[0, 1]) < 0.05
    assert abs(np.corrcoef(once[brain], noise_of("voxel-noise:1", patient=b"b" * 16)[brain])[0, 1]) < 0.05


@pytest.mark.parametrize(
    "origin", [(0, 0, 0), (5, 3, 2), (-4, -6, -2), (20, 20, 10), (-40, 0, 0), (0, 0, 30)]
)
@pytest.mark.parametrize("size", [(16, 16, 1), (32, 48, 12)])
def test_overlapping_windows_show_the_same_noise(
    origin: tuple[int, int, int], size: tuple[int, int, int]
) -> None:
    site, patient = Site(), b"a" * 16
    stack = make_image_stack("voxel-noise:1,background=true", KEY)
    cut = site.window(patient, origin, size)
    shown = stack.window(cut, patient, origin, SHAPE)
    site.volumes[patient] = stack.window(site.volumes[patient], patient, (0, 0, 0), SHAPE)
    assert np.array_equal(shown, site.window(patient, origin, size)), "outside the volume: zeros"


def test_augmentation_acts_on_the_noisy_image() -> None:
    """In whatever pose it is shown, it is one noisy image."""
    site, stack = Site(), make_image_stack("voxel-noise:1", KEY)
    sample, window = Sample(b"a" * 16, (2, 1, 7)), (32, 32, 1)
    noisy = Site()
    for key in noisy.volumes:
        noisy.volumes[key] = stack.window(noisy.volumes[key], key, (0, 0, 0), SHAPE)
    for seed in (None, 1, 2, 3):
        live = SiteData(site, stack).batch([sample], window, seed, "t1")
        assert np.array_equal(live, SiteData(noisy).batch([sample], window, seed, "t1"))
        assert not np.array_equal(live, SiteData(site).batch([sample], window, seed, "t1"))


def test_announced_apart_from_activations() -> None:
    assert make_image_stack("voxel-noise:0.5", KEY).specs == ("image/voxel-noise:scale=0.5,background=false",)
    assert not make_image_stack([], KEY)
    with pytest.raises(ConfigError, match="gaussian defends activations and gradients, not image"):
        make_image_stack(["gaussian:1"], KEY)
