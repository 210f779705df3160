"""The parts of `benchmarks/private.py` that decide what its figures mean, at toy size."""

from __future__ import annotations

import argparse

import numpy as np
import pytest
import torch

CONTRASTS = ("flair", "t1", "t1ce", "t2")


def known(slices: int, seed: int, size: int = 24) -> np.ndarray:
    """Labels of two regions and heights, [N, 3, size, size]: a square somewhere."""
    random, found = np.random.default_rng(seed), np.zeros((slices, 3, size, size), np.float32)
    for one in found:
        x, y, high = [*random.integers(0, size // 2, 2).tolist(), random.random()]
        one[0, x : x + 8, y : y + 8] = 1
        one[1, x : x + 4, y : y + 4] = 1
        one[2] = high
    return found


def values(of: np.ndarray, seed: int) -> np.ndarray:
    """Three channels that follow labels, place and height, and something of each patient's own."""
    random = np.random.default_rng(seed)
    ramp = np.linspace(-1, 1, of.shape[-1], dtype=np.float32)
    clean = np.stack(
        [of[:, 0] - 0.5 * of[:, 1], ramp[:, None] * of[:, 2], np.cos(3 * ramp) + of[:, 1]], axis=1
    )
    return (clean + 0.2 * random.standard_normal(clean.shape)).astype(np.float32)


def test_a_line_takes_surrogates_to_the_run_although_no_slice_is_on_both_sides() -> None:
    from private_outsider import line

    mixed = np.array([[0.0, -2.0, 0.0], [1.0, 0.0, 0.5], [0.0, 0.3, -1.0]], np.float32)
    ours, theirs = known(200, 1), known(200, 2)
    own = values(ours, 3)
    other = np.einsum("ij,njxy->nixy", mixed, values(theirs, 4)) + np.float32(0.7)
    taken = line(own, other, ours, theirs)
    with torch.no_grad():
        made = taken(torch.from_numpy(own)).numpy()
    wanted = np.einsum("ij,njxy->nixy", mixed, own) + np.float32(0.7)
    assert np.corrcoef(made.ravel(), wanted.ravel())[0, 1] > 0.97
    assert np.allclose(made.mean(axis=(0, 2, 3)), other.mean(axis=(0, 2, 3)), atol=1e-3)
    assert np.allclose(made.std(axis=(0, 2, 3)), other.std(axis=(0, 2, 3)), rtol=0.05)


def attack(figure: dict[str, float], presence: float = 0.5) -> dict[str, object]:
    scores = {
        name: {"mean": presence, "floors": {"guess": 0.4}}
        for name in ("tumour_presence", "tumour_volume", "tumour_side")
    }
    return {
        "patients": {c: [figure[c], figure[c] + 0.02] for c in CONTRASTS},
        "tumour": dict.fromkeys(CONTRASTS, scores),
    }


def test_the_figure_of_an_adversary_is_that_of_the_best_attack_on_each_contrast() -> None:
    from private_table import above_labels, readouts, worst

    low = dict.fromkeys(CONTRASTS, 0.1)
    results = {
        "row/7/inverse": attack(low | {"t1": 0.5, "t2": 0.3}),
        "row/7/search": attack(low | {"t1": 0.4, "t2": 0.45}, presence=0.8),
        "row/7/recipe": attack(low | {"flair": 0.2}),
        "labels/7": attack(low | {"flair": 0.15}),
        "other/7/inverse": attack(dict.fromkeys(CONTRASTS, 0.9)),
    }
    found = worst(results, "row", ("inverse", "neighbours", "search"), [7])
    assert found is not None
    assert (found.contrast, found.attack) == ("t1", "inverse")
    assert found.figure.mean == pytest.approx(0.51)
    assert found.average.mean == pytest.approx((0.51 + 0.46 + 2 * 0.11) / 4)
    assert above_labels(results, "row", [7]).startswith(".050 ")
    assert readouts(results, "row", ("inverse", "search"), [7]) == " / ".join([".800 (.400)"] * 3)
    assert worst(results, "row", ("neighbours",), [7]) is None


def test_the_table_has_a_line_for_each_row_and_says_what_was_not_made() -> None:
    from private_run import Row
    from private_table import markdown

    done = {"dice": {"mean": 0.85}, "patients": [0.8, 0.9], "octets_per_window": 1000, "seconds": 1.0}
    less = done | {"dice": {"mean": 0.84}, "patients": [0.79, 0.89]}
    results = {"joint/7": done, "sum/7": less, "sum/7/inverse": attack(dict.fromkeys(CONTRASTS, 0.3))}
    given = argparse.Namespace(
        seeds=[7], patients=4, validation=2, steps=3, pretraining_steps=3, strangers=4, shadow=4
    )
    head, _, joint, private, *_ = markdown(results, [Row("joint"), Row("sum")], given).splitlines()
    assert head.count("|") == joint.count("|") == private.count("|")
    assert joint.split("|")[3:7] == [" - ", " - ", " - ", " - "]
    assert " -.010 ± .000 " in private and ".310 ± " in private
