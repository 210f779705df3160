"""How an adversary trains: patients held out, the best weights kept, no longer than that helps."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from splitpeer.attacks.base import silent
from splitpeer.attacks.learning import PATIENCE, held_out, rounds, spread, steps_of, train, turned


def test_whole_patients_are_held_out_and_slices_only_where_nobody_is_named() -> None:
    patients = [f"p{n // 5}" for n in range(100)]
    held = held_out(patients, 100)
    assert {patients[n] for n in np.flatnonzero(held)} == {"p18", "p19"} and held.sum() == 10
    assert held_out(["a", "a", "b"], 3).tolist() == [False, False, True]
    for unnamed in ([], ["a"] * 20, ["a", "b"]):
        assert np.flatnonzero(held_out(unnamed, 20)).tolist() == [18, 19]
    assert held_out([], 2).tolist() == [False, True]
    assert len(spread(np.ones(100, dtype=bool))) == 24 and spread(held_out([], 20)).tolist() == [18, 19]
    assert spread(np.zeros(3, dtype=bool)).tolist() == []


def along(curve: list[float], steps: int) -> tuple[float, float, int]:
    """The kept weight, its error and the steps that were made, where the n-th judgement is `curve[n]`."""
    network = nn.Linear(1, 1, bias=False)
    made: list[int] = []
    errors = iter(curve)

    def loss(step: int) -> torch.Tensor:
        made.append(step)
        with torch.no_grad():
            network.weight.fill_(float(step))
        return 0 * network(torch.ones(1, 1)).sum()

    best = train(network, loss, lambda: next(errors), steps, rate=0.0, progress=silent, what="")
    assert not network.training and not any(p.requires_grad for p in network.parameters())
    return float(network.weight), best.error, len(made)


@pytest.mark.parametrize(
    ("curve", "steps", "kept", "error", "made"),
    [
        ([3.0, 1.0, 2.0, 4.0], 4, 1, 1.0, 4),  # it learned by heart after the second
        ([4.0, 3.0, 2.0, 1.0], 4, 3, 1.0, 4),
        ([1.0] + [2.0] * 9, 10, 0, 1.0, 1 + PATIENCE),
        ([2.0] * 4 + [1.0] + [2.0] * 5, 10, 4, 1.0, 10),
        ([10.0 - n for n in range(10)], 40, 39, 1.0, 40),  # judged ten times, whatever its length
    ],
)
def test_the_best_weights_are_kept_and_no_more_is_trained_than_helps(curve, steps, kept, error, made) -> None:
    assert along(curve, steps) == (float(kept), error, made)


def test_a_network_without_any_figure_keeps_what_it_has() -> None:
    kept, error, made = along([float("nan")] * 3, 3)
    assert (kept, made) == (2.0, 3) and error == float("inf")


def test_epochs_are_steps_unless_steps_are_given() -> None:
    assert steps_of(20, 90, 8, None) == 240 and steps_of(20, 90, 8, 7) == 7
    following = rounds(5, 2, np.random.default_rng(0))
    assert sorted(np.concatenate([following() for _ in range(5)])[:5].tolist()) == [0, 1, 2, 3, 4]


def test_heads_are_mirrored_left_to_right_or_turned_all_ways() -> None:
    images = np.arange(8 * 16, dtype=np.float32).reshape(8, 1, 4, 4)
    mirrored = turned(images, np.random.default_rng(0), mirrored=True)
    for image, before in zip(mirrored, images, strict=True):
        assert np.array_equal(image, before) or np.array_equal(image, before[:, ::-1])
    assert not np.array_equal(mirrored, images)
    every = turned(images, np.random.default_rng(0), mirrored=False)
    odd = [
        not np.array_equal(image, before) and not np.array_equal(image, before[:, ::-1])
        for image, before in zip(every, images, strict=True)
    ]
    assert any(odd) and np.array_equal(np.sort(every.reshape(8, -1)), images.reshape(8, -1))
