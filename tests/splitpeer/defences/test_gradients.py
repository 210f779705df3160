"""Defences of gradients against the best detector there is, on classes whose distribution is known."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from splitpeer.defences.base import Defence
from splitpeer.defences.gradient.marvell import Classes, Covariance, allowed_divergence, cheapest, strongest
from splitpeer.defences.gradient.voxels import estimate, labels_at
from splitpeer.defences.kinds import parse_all
from splitpeer.defences.randomness import Draw, Release
from splitproto.records import Sample

KEY = bytes(range(32))
CHANNELS, SIZE, BATCH = 4, 64, 3
SCALE = 1e-7
"""Of real gradients."""


def release(target: np.ndarray | None, step: int = 1) -> Release:
    samples = tuple(Sample(bytes([n]) * 16, (0, 0, n)) for n in range(BATCH))
    return Release(b"r" * 16, "train", step, 0, samples, target)


def mask(source: np.random.Generator) -> np.ndarray:
    target = np.zeros((BATCH, 3, SIZE, SIZE), np.uint8)
    target[:, 0] = source.random((BATCH, SIZE, SIZE)) < 0.1
    return target


def two_classes(source: np.random.Generator, target: np.ndarray, gap: float = 3.0) -> torch.Tensor:
    """Voxels of tumour: another mean and a larger spread."""
    positive = target[:, 0][:, None] > 0
    direction = np.zeros((1, CHANNELS, 1, 1))
    direction[0, 1] = gap
    noise = source.normal(size=(BATCH, CHANNELS, SIZE, SIZE))
    return torch.from_numpy(((1 + positive) * noise + positive * direction) * SCALE).float()


def auc(score: np.ndarray, positive: np.ndarray) -> float:
    ranks = score.ravel().argsort().argsort() + 1
    n1 = int(positive.sum())
    return (ranks[positive.ravel()].sum() - n1 * (n1 + 1) / 2) / (n1 * (positive.size - n1))


def likelihood_ratio(vectors: np.ndarray, positive: np.ndarray) -> np.ndarray:
    """The optimal detector's score, both classes' Gaussians fitted to what was sent."""
    score = np.zeros(len(vectors))
    for sign, group in ((1, vectors[positive]), (-1, vectors[~positive])):
        covariance, away = np.cov(group.T), vectors - group.mean(0)
        distance = np.einsum("ij,jk,ik->i", away, np.linalg.inv(covariance), away)
        score -= sign * (distance + np.linalg.slogdet(covariance)[1]) / 2
    return score


def made(written: str) -> Defence:
    (spec,) = parse_all(written, "gradients")
    defence: Defence = spec.kind.load()(spec)
    return defence


def sent(defence, tensor: torch.Tensor, target: np.ndarray | None, step: int = 1) -> torch.Tensor:
    defence.prepare({"x0": tensor.shape[1]}, 2)
    return defence({"x0": tensor}, Draw(KEY, release(target, step)))["x0"]


def leak(tensor: torch.Tensor, target: np.ndarray) -> float:
    positive = target[:, 0].ravel() > 0
    return auc(
        likelihood_ratio(tensor.double().movedim(1, -1).reshape(-1, CHANNELS).numpy(), positive), positive
    )


@pytest.mark.parametrize("error", [0.1, 0.2, 0.3, 0.4])
def test_marvell_holds_the_best_detector_to_its_bound(error: float) -> None:
    source = np.random.default_rng(5)
    target = mask(source)
    clear = two_classes(source, target)
    assert leak(clear, target) > 0.95
    noisy = sent(made(f"marvell:{error}"), clear, target)
    total = (2 - 4 * error) ** 2
    # Li et al. 2021, Theorem 2: AUC <= 1/2 + sqrt(sumKL)/2 - sumKL/8, where sumKL < 4.
    assert leak(noisy, target) <= 0.5 + total**0.5 / 2 - total / 8 + 0.01
    # And costs no more than it must: the bound is not met by drowning everything.
    assert leak(noisy, target) > 0.5 + 0.3 * (0.5 - error)


def test_marvell_is_cheaper_than_noise_alike_in_all_directions() -> None:
    classes = Classes(8, 0.05, 1.0, 4.0, 9.0)
    found = cheapest(classes, 0.3)
    assert found.divergence(classes) <= allowed_divergence(0.3)
    variance = next(v for v in np.geomspace(0.1, 1e4, 500)
                    if Covariance(v, v, v, v).divergence(classes) <= allowed_divergence(0.3))  # fmt: skip
    assert found.power(classes) < 0.5 * classes.dimensions * variance
    # Nor does any nearby feasible noise cost less.
    best, source = found.power(classes), np.random.default_rng(0)
    point = np.array([found.along0, found.across0, found.along1, found.across1])
    for _ in range(3000):
        other = np.abs(point * source.normal(1, 0.05, 4) + source.normal(0, 0.02, 4))
        nearby = Covariance(max(other[:2]), min(other[:2]), max(other[2:]), min(other[2:]))
        if nearby.divergence(classes) <= allowed_divergence(0.3):
            assert nearby.power(classes) > best * (1 - 1e-3)


@pytest.mark.parametrize("classes", [
    Classes(8, 0.05, 1.0, 4.0, 9.0), Classes(8, 0.02, 3.0, 1.0, 0.1), Classes(2, 0.5, 1e-16, 2e-16, 1e-14),
    Classes(1, 0.3, 1.0, 2.0, 5.0), Classes(64, 0.001, 1e-18, 1e-13, 1e-15), Classes(4, 0.2, 0.0, 1.0, 1.0),
])  # fmt: skip
def test_any_classes_get_noise_that_keeps_its_word(classes: Classes) -> None:
    powers = []
    for error in (0.1, 0.25, 0.4, 0.49):
        found = cheapest(classes, error)
        assert found.divergence(classes) <= allowed_divergence(error)
        assert found.along0 >= found.across0 >= 0
        assert found.along1 >= found.across1 >= 0
        powers.append(found.power(classes))
    assert powers == sorted(powers)
    # The two questions are each other's inverse.
    again = strongest(classes, powers[1])
    assert again.power(classes) <= powers[1] * (1 + 1e-9)
    assert again.divergence(classes) <= allowed_divergence(0.25) * (1 + 1e-9)
    left = [strongest(classes, power).divergence(classes) for power in (0.0, *powers)]
    assert all(b <= a * (1 + 1e-6) for a, b in itertools.pairwise(left))


def test_marvell_by_power_spends_what_it_was_given() -> None:
    source = np.random.default_rng(6)
    target = mask(source)
    clear = two_classes(source, target)
    noise = sent(made("marvell:power=4"), clear, target) - clear
    classes, _ = estimate(clear.double().movedim(1, -1), labels_at(target, (BATCH, SIZE, SIZE)))
    # (Ratios: next to 1e-14, approx would take anything.)
    assert float((noise**2).sum(1).mean()) / classes.gap == pytest.approx(4.0, rel=0.1)


def test_a_batch_without_tumour_is_not_given_away_by_clean_gradients() -> None:
    source = np.random.default_rng(7)
    clear = two_classes(source, np.zeros((BATCH, 3, SIZE, SIZE), np.uint8))
    noise = sent(made("marvell"), clear, np.zeros((BATCH, 3, SIZE, SIZE), np.uint8)) - clear
    longest = float((clear**2).sum(1).max())
    assert float((noise**2).sum(1).mean()) / longest == pytest.approx(1, rel=0.05)


def test_after_max_norm_length_says_nothing() -> None:
    source = np.random.default_rng(8)
    target = mask(source)
    # One class: directions all alike, so that length alone differs.
    positive = target[:, 0][:, None] > 0
    clear = torch.from_numpy(
        np.where(positive, 5.0, 1.0) * source.normal(1, 0.05, (BATCH, CHANNELS, SIZE, SIZE))
    )
    clear[0, :, 0, 0] = 0.0
    lengths = lambda t: t.norm(dim=1).numpy()  # noqa: E731
    assert auc(lengths(clear), target[:, 0] > 0) > 0.99
    kept = np.zeros((BATCH, SIZE, SIZE))
    for step in range(200):
        kept += lengths(sent(made("max-norm"), clear, None, step)) ** 2 / 200
    longest = float((clear**2).sum(1).max())
    # On average over draws every voxel is as long as the longest, a vector of zeros included.
    assert kept[positive[:, 0]].mean() == pytest.approx(longest, rel=0.05)
    assert kept[~positive[:, 0]].mean() == pytest.approx(longest, rel=0.05)
    assert kept[0, 0, 0] == pytest.approx(longest, rel=0.6)
    one = sent(made("max-norm"), clear, None)
    assert abs(auc(lengths(one), target[:, 0] > 0) - 0.5) < 0.35


@pytest.mark.parametrize("written", ["max-norm", "iso", "marvell"])
def test_noise_has_mean_zero_and_repeats_only_where_it_may(written: str) -> None:
    source = np.random.default_rng(9)
    target = mask(source)
    clear = two_classes(source, target)
    first = sent(made(written), clear, target)
    assert torch.equal(first, sent(made(written), clear, target))
    assert not torch.equal(first, sent(made(written), clear, target, step=2))
    assert first.dtype == clear.dtype and first.shape == clear.shape
    noise = (first - clear).double()
    assert float(noise.std()) > 0.1 * float(clear.std())
    for positive in (target[:, 0] > 0, target[:, 0] == 0):
        of_class = noise.movedim(1, -1)[torch.from_numpy(positive)]
        standard_error = of_class.std(0) / len(of_class) ** 0.5
        assert (of_class.mean(0).abs() < 4.5 * standard_error).all()


def test_levels_that_are_not_named_pass() -> None:
    source = np.random.default_rng(10)
    clear = two_classes(source, mask(source))
    defence = made("iso@1")
    defence.prepare({"x0": CHANNELS, "x1": CHANNELS}, 2)
    changed = defence({"x0": clear, "x1": clear}, Draw(KEY, release(None)))
    assert torch.equal(changed["x0"], clear)
    assert not torch.equal(changed["x1"], clear)


def test_labels_follow_to_coarse_levels_in_two_and_three_dimensions() -> None:
    target = np.zeros((2, 3, 8, 8, 4), np.uint8)
    target[1, 0, 7, 0, 3] = 1
    coarse = labels_at(target, (2, 4, 4, 2))
    assert coarse.sum() == 1 and coarse[1, 3, 0, 1]
    flat = labels_at(target[..., 0], (2, 8, 8))
    assert flat.shape == (2, 8, 8) and not flat.any()
    with pytest.raises(ValueError, match="labels"):
        labels_at(None, (2, 8, 8))


def test_three_dimensions() -> None:
    source = np.random.default_rng(11)
    target = (source.random((BATCH, 3, 8, 8, 8)) < 0.2).astype(np.uint8)
    defence = made("marvell")
    defence.prepare({"x1": 6}, 3)
    clear = torch.from_numpy(source.normal(size=(BATCH, 6, 4, 4, 4))).float()
    assert defence({"x1": clear}, Draw(KEY, release(target)))["x1"].shape == clear.shape


def test_a_detection_error_bounds_both_divergences() -> None:
    """Error >= 1/2 - sqrt(sumKL)/4, by Pinsker; a half is blindness."""
    for error in (0.0, 0.1, 0.4, 0.5):
        assert 0.5 - allowed_divergence(error) ** 0.5 / 4 == pytest.approx(error)


def test_nothing_at_all_stays_nothing() -> None:
    clear = torch.zeros(BATCH, CHANNELS, SIZE, SIZE)
    target = mask(np.random.default_rng(12))
    for defence in (made("max-norm"), made("iso"), made("marvell"), made("marvell:power=2")):
        assert torch.equal(sent(defence, clear, target), clear)


def test_classes_that_exclude_each_other_are_all_positive() -> None:
    """None of them is the whole: a defence that looked at the first would leave the others bare."""
    target = np.zeros((1, 2, 8, 8), np.float32)
    target[0, 0, :2, :2] = target[0, 1, 6:, 6:] = 1
    positive = labels_at(target, (1, 4, 4))[0]
    assert positive[0, 0] and positive[3, 3] and int(positive.sum()) == 2
