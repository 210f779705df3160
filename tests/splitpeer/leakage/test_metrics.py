"""Each figure against the library it is based on, or against a value computed by hand."""

from __future__ import annotations

import numpy as np
import pytest
from skimage.metrics import normalized_mutual_information, peak_signal_noise_ratio, structural_similarity

from splitpeer.leakage.metrics import (
    DATA_RANGE,
    PSNR_MOST,
    align,
    brain_mask,
    distance_correlation,
    match,
    similarities,
    ssim,
)
from tests.splitpeer.leakage.oracles import explained


def brain(seed: int = 0, size: int = 48) -> np.ndarray:
    """A disc of smooth structure, mean 0 and deviation 1 inside, exactly 0 outside."""
    from scipy.ndimage import gaussian_filter

    x, y = np.mgrid[:size, :size] - size / 2 + 0.5
    disc = x**2 + y**2 < (0.4 * size) ** 2
    image = gaussian_filter(np.random.default_rng(seed).standard_normal((size, size)), 2)
    image = np.where(disc, (image - image[disc].mean()) / image[disc].std(), 0)
    return image.astype(np.float32)


def test_plain_figures_are_those_of_scikit_image() -> None:
    truth = brain()
    image = truth + 0.3 * brain(1)
    aligned = align(image, truth, brain_mask(truth))
    found = similarities(truth, image)
    window = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "K1": 0.01, "K2": 0.03}
    truth = truth.astype(np.float64)
    matched = match(image, truth, brain_mask(truth))
    assert found["ssim_plain"] == max(
        structural_similarity(truth, shown, data_range=DATA_RANGE, **window) for shown in (aligned, matched)
    )
    assert found["psnr_plain"] == pytest.approx(
        peak_signal_noise_ratio(truth, aligned, data_range=DATA_RANGE)
    )
    assert found["nmi_plain"] == normalized_mutual_information(truth, aligned)


def test_without_background_masked_and_plain_differ_by_the_border_alone() -> None:
    truth, image = brain(size=48)[14:34, 14:34], brain(1)[14:34, 14:34]
    assert brain_mask(truth).all()
    found = similarities(truth, image)
    assert found["psnr"] == pytest.approx(found["psnr_plain"])
    assert found["nmi"] == pytest.approx(found["nmi_plain"])


def test_gain_offset_and_sign_do_not_hide_a_copy() -> None:
    truth = brain()
    for image in (truth, -7 * truth + 300, (0.001 * truth - 4).astype(np.float32)):
        found = similarities(truth, image)
        assert found["ssim"] == pytest.approx(1, abs=1e-3)
        assert found["psnr"] > 50
    assert similarities(truth, truth)["psnr"] == PSNR_MOST
    assert similarities(truth, truth)["nmi"] == pytest.approx(2)


def test_what_lies_outside_the_brain_does_not_count_inside() -> None:
    truth = brain()
    messy = np.where(brain_mask(truth), truth, 50)
    found = similarities(truth, messy)
    assert found["ssim"] == pytest.approx(1)
    assert found["psnr"] == PSNR_MOST
    assert found["ssim_plain"] < 0.5


def test_black_background_flatters_the_plain_figure_only() -> None:
    """Trap 3 of every such table: an image that knows the background alone."""
    truth = brain()
    nothing = np.zeros_like(truth)
    found = similarities(truth, nothing)
    assert found["ssim"] < 0.1 < found["ssim_plain"]


def test_holes_belong_to_the_brain() -> None:
    truth = brain()
    truth[24, 24] = 0
    assert brain_mask(truth)[24, 24]
    assert not brain_mask(truth)[0, 0]


@pytest.mark.parametrize("value", [0.0, 3.0, 1e6, np.nan, np.inf])
def test_an_image_of_one_value_tells_nothing(value: float) -> None:
    truth = brain()
    found = similarities(truth, np.full_like(truth, value))
    assert found["nmi"] == found["nmi_plain"] == 1
    assert found["ssim"] < 0.1
    # The truth's own mean is what is left: the error is its variance, 1.
    assert found["psnr"] == pytest.approx(10 * np.log10(DATA_RANGE**2 / 1), abs=1e-3)


def test_single_values_of_nan_do_not_spoil_the_rest() -> None:
    truth = brain()
    image = truth.copy()
    image[20, 20] = np.nan
    assert similarities(truth, image)["ssim"] > 0.9
    assert all(np.isfinite(value) for value in similarities(truth, image).values())


def test_align_is_least_squares() -> None:
    truth, image = brain(), brain(1) + 2
    mask = brain_mask(truth)
    gain, offset = np.polyfit(image[mask].astype(float), truth[mask].astype(float), 1)
    np.testing.assert_allclose(align(image, truth, mask), gain * image.astype(float) + offset, atol=1e-6)
    r = np.corrcoef(truth[mask], image[mask])[0, 1]
    assert explained(truth, image, mask) == pytest.approx(r**2, abs=1e-6)


def test_a_noisy_image_is_judged_at_full_contrast() -> None:
    """Least squares shrink it, and SSIM counts the contrast that is lost: the larger figure is the attacker's."""
    truth = brain()
    mask = brain_mask(truth)
    noisy = truth + np.random.default_rng(0).standard_normal(truth.shape)
    shrunk, matched = align(noisy, truth, mask), match(noisy, truth, mask)
    assert shrunk[mask].std() < 0.8 and matched[mask].std() == pytest.approx(1)
    least = ssim(truth.astype(float), shrunk, mask)[0]
    assert similarities(truth, noisy)["ssim"] == ssim(truth.astype(float), matched, mask)[0] > least + 0.005
    np.testing.assert_allclose(match(-3 * truth + 1, truth, mask), truth, atol=1e-5)  # the sign is told
    blurred = match(np.full_like(truth, 7.0), truth, mask)
    np.testing.assert_allclose(blurred, truth[mask].mean(), atol=1e-6)


def test_deep_inside_no_background_is_right_for_free() -> None:
    truth = brain()
    # Right at the border of the body, and wrong within.
    rim = np.hypot(*(np.mgrid[:48, :48] - 23.5)) > 15
    found = similarities(truth, np.where(rim, truth, brain(1)))
    assert found["ssim_deep"] < found["ssim"] - 0.1
    assert similarities(truth, truth)["ssim_deep"] == pytest.approx(1)
    inner = truth[14:34, 14:34]  # no background at all: nothing is taken away
    assert brain_mask(inner).all()
    shown = similarities(inner, brain(1)[14:34, 14:34])
    assert shown["ssim_deep"] == pytest.approx(shown["ssim"])
    small = np.where(np.hypot(*(np.mgrid[:48, :48] - 23.5)) < 4, truth, 0)
    assert np.isnan(similarities(small, small)["ssim_deep"])


def test_volumes_work_as_slices_do() -> None:
    truth = np.stack([brain(seed, 32) for seed in range(16)])
    assert similarities(truth, 2 * truth)["ssim"] == pytest.approx(1)


def test_misuse_is_named() -> None:
    with pytest.raises(ValueError, match="11 voxels"):
        similarities(np.ones((8, 8)), np.ones((8, 8)))
    with pytest.raises(ValueError, match="empty"):
        similarities(np.zeros((16, 16)), np.ones((16, 16)))
    with pytest.raises(ValueError, match="the reconstruction"):
        similarities(np.ones((16, 16)), np.ones((16, 17)))


def test_distance_correlation_by_hand() -> None:
    # Two points: both centred matrices are [[-d/2, d/2], [d/2, -d/2]], proportional, so 1.
    assert distance_correlation(np.array([[0.0], [1.0]]), np.array([[5.0], [9.0]])) == pytest.approx(1)
    # Three points of a line against (0, 1, 0): distances 0 1 2 / 1 0 1 / 2 1 0, and 0 1 0 / 1 0 1 / 0 1 0.
    a = np.array([[-10 / 9, 2 / 9, 8 / 9], [2 / 9, -4 / 9, 2 / 9], [8 / 9, 2 / 9, -10 / 9]])
    b = np.array([[-2 / 9, 4 / 9, -2 / 9], [4 / 9, -8 / 9, 4 / 9], [-2 / 9, 4 / 9, -2 / 9]])
    expected = np.sqrt((a * b).mean() / np.sqrt((a * a).mean() * (b * b).mean()))
    assert distance_correlation(np.array([0.0, 1, 2]), np.array([0.0, 1, 0])) == pytest.approx(expected)


def test_distance_correlation_sees_what_correlation_does_not() -> None:
    x = np.random.default_rng(0).standard_normal(400)
    assert abs(np.corrcoef(x, x**2)[0, 1]) < 0.2
    shuffled = np.random.default_rng(1).permutation(x**2)
    assert distance_correlation(x, x**2) > 0.4 > 0.2 > distance_correlation(x, shuffled)
    assert distance_correlation(x, np.ones(400)) == 0
    with pytest.raises(ValueError, match="two or more"):
        distance_correlation(x[:1], x[:1])
