"""Laws that know more than a scatter: rounding gives an interval, values left out under noise give a mixture."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.stats import norm

from splitpeer.attacks.base import Knowledge
from splitpeer.attacks.evidence import AveragedLevel, gather
from splitpeer.attacks.image.whitebox import WhiteBox
from splitpeer.attacks.likelihood import MOST_VIEWS, Effect, minus_log, minus_log_scale, tells
from splitpeer.attacks.runner import run
from splitpeer.attacks.simulated_defences import SimulatedDefences

from .image_attacks import encoder, heads, likeness, look

IMAGES = heads(2, 1)
FLOOR = torch.tensor([0.1], dtype=torch.float64)


def level(values: list[float], count: float = 1.0) -> AveragedLevel:
    """One sample, one channel."""
    mean = torch.tensor(values, dtype=torch.float64).reshape(1, 1, -1)
    return AveragedLevel(mean, torch.full_like(mean, count), False)


def law(scatter: float = 0.0, left: float = 1.0, steps: int = 0) -> Effect:
    return Effect(torch.ones(1), torch.tensor([scatter], dtype=torch.float64), left, steps)


@pytest.mark.parametrize(
    "defences",
    [("quantise:2",), ("dropout:0.5", "gaussian:0.3"), ("dropout:0.5,kept=true", "gaussian:1,kept=true")],
)
def test_it_recovers_more_than_the_scatter_alone(defences: tuple[str, ...]) -> None:
    view = look(IMAGES, encoder(), defences=defences)
    alone, exact = (
        likeness(run(WhiteBox(iterations=30, schedules="joint", law=law), view, Knowledge(model=encoder())).images,
                 IMAGES)
        for law in ("scatter", "exact")
    )  # fmt: skip
    assert 1 - exact < 0.9 * (1 - alone)


def test_the_interval_finds_back_from_a_poor_start() -> None:
    view = look(IMAGES, encoder(), defences=["quantise:2"])
    granted = Knowledge(model=encoder(), shadow={"t1": heads(12, 2)})
    assert likeness(run(WhiteBox(iterations=40, schedules="joint"), view, granted).images, IMAGES) > 0.7


def test_a_rounded_value_was_anywhere_in_its_interval() -> None:
    seen = level([-1.0, 0.0, 0.5, 1.0])  # steps of .5 up to 1, beyond which nothing lay
    low, high = np.array([-1.0, -0.25, 0.25, 0.75]), np.array([-0.75, 0.25, 0.75, 1.0])
    expected = torch.tensor([[[-0.8, 0.3, 0.5, 2.0]]], dtype=torch.float64)
    width = np.hypot(0.2, 0.1)
    meant = np.log(
        norm.cdf((high - expected[0, 0].numpy()) / width) - norm.cdf((low - expected[0, 0].numpy()) / width)
    )
    found = minus_log(expected, seen, law(0.2, steps=2), FLOOR)
    assert float(found) == pytest.approx(-meant.sum(), rel=1e-9)
    inside = torch.tensor([[[-0.9, 0.1, 0.4, 0.9]]], dtype=torch.float64)
    assert float(minus_log(inside, seen, law(steps=2), FLOOR / 100)) == pytest.approx(0, abs=1e-9)


def test_far_from_its_interval_there_is_still_a_way_back() -> None:
    seen = level([0.0, 1.0])
    for far in (1e3, -1e3):
        expected = torch.full((1, 1, 2), far, dtype=torch.float32, requires_grad=True)
        value = minus_log(expected, seen, law(steps=1), FLOOR)
        (slope,) = torch.autograd.grad(value.sum(), expected)
        assert torch.isfinite(value).all() and bool((slope.sign() == np.sign(far)).all())


def test_a_channel_of_zeros_says_nothing() -> None:
    assert float(minus_log(torch.ones(1, 1, 2).double(), level([0.0, 0.0]), law(steps=1), FLOOR)) == 0


@pytest.mark.parametrize("views", [1, 3])
def test_left_out_and_noise_is_a_mixture_over_how_often(views: int) -> None:
    seen = level([0.1, 0.9, -2.0], views)
    expected = torch.tensor([[[1.0, 1.0, -2.5]]], dtype=torch.float64)
    width = np.hypot(0.3, 0.1) / views**0.5
    shares = [math.comb(views, k) * 0.6**k * 0.4 ** (views - k) for k in range(views + 1)]
    parts = sum(
        share * np.exp(-(((seen.mean - expected * k / views) / width).numpy() ** 2) / 2)
        for k, share in enumerate(shares)
    )
    assert float(minus_log(expected, seen, law(0.3, left=0.6), FLOOR)) == pytest.approx(
        -np.log(parts).sum(), rel=1e-9
    )


def test_where_more_can_be_said() -> None:
    assert tells(level([0.5, 1.0]), 1.0, 2) and not tells(
        level([0.45, 1.0]), 1.0, 2
    )  # of a sum, or noise after
    assert not tells(level([0.5, 1.0], 2), 1.0, 2)  # a mean of rounded values
    assert tells(level([0.3], MOST_VIEWS), 0.5, 0) and not tells(level([0.3], MOST_VIEWS + 1), 0.5, 0)
    assert not tells(level([0.3]), 1.0, 0) and not tells(level([0.3]), 0.0, 0)


@pytest.mark.parametrize(
    ("defences", "left", "steps", "zeros_show"),
    [
        (("quantise:2",), 1.0, 1, False),
        (("gaussian:1", "quantise:4"), 1.0, 7, False),
        (("dropout:0.2", "gaussian:1"), 0.8, 0, True),
        (("dropout:0.2", "dropout:0.5", "laplace:1"), 0.4, 0, True),
        (("gaussian:1", "dropout:0.2"), 1.0, 0, True),
        (("dropout:0.2", "projection:0.5", "gaussian:1"), 1.0, 0, True),
        (("dropout:0.2", "quantise:3"), 0.8, 3, False),
        (("topk:0.1", "quantise:3"), 1.0, 3, True),
        (("quantise:8@1", "dropout:0.5@1"), 1.0, 0, True),
    ],
)  # fmt: skip
def test_traits_tell_which_law_it_is(
    defences: tuple[str, ...], left: float, steps: int, zeros_show: bool
) -> None:
    view = look(IMAGES, encoder(), defences=defences)
    simulation = SimulatedDefences(view, None, 0)
    evidence = gather([t.shots for t in view.targets], ("t1",), masked=True)
    assert simulation.left("x0") == pytest.approx(left)
    assert simulation.steps("x0") == steps
    assert simulation.zeros_show("x0", evidence) == zeros_show


def test_the_scatter_beside_the_law_is_the_noise_alone() -> None:
    view = look(IMAGES, encoder(), defences=["dropout:0.5,rescale=true", "gaussian:0.5", "quantise:2"])
    with torch.no_grad():
        clean = encoder()(torch.from_numpy(IMAGES))
    simulation = SimulatedDefences(view, None, 0)
    effect, blurred = simulation.effects(clean, ["x0"])["x0"], simulation.effects(clean)["x0"]
    power = float(clean["x0"][0].square().mean().sqrt())
    # Of half the values, twice as large: root mean square 2^.5 of the clean one's.
    assert float(effect.gain[0]) == pytest.approx(2, rel=0.02)
    assert float(effect.scatter[0]) == pytest.approx(0.5 * 2**0.5 * power, rel=0.05)
    assert (effect.left, effect.steps) == (0.5, 1) and (blurred.left, blurred.steps) == (1, 0)
    assert float(blurred.scatter[0]) > 1.3 * float(effect.scatter[0])


def test_two_scatters_are_compared_with_what_they_leave_out() -> None:
    """Together they are minus the logarithm of a normal density, up to a constant of the data alone."""
    source = np.random.default_rng(3)
    values, count = source.normal(0, 0.7, (1, 2, 5, 5)), source.integers(0, 3, (1, 2, 5, 5))
    values[count == 0] = 0
    seen = AveragedLevel(torch.from_numpy(values), torch.from_numpy(count).double(), True)
    floor = torch.tensor([0.1], dtype=torch.float64)

    def unlikely(scatter: float) -> float:
        effect = law(scatter)
        return float(
            minus_log(torch.zeros_like(seen.mean), seen, effect, floor) + minus_log_scale(seen, effect, floor)
        )

    def by_hand(scatter: float) -> float:
        deviation = np.sqrt((scatter**2 + 0.01) / np.maximum(count, 1))
        return -float(norm.logpdf(values, 0, deviation)[count > 0].sum())

    for scatter in (0.1, 0.5, 2.0):
        assert unlikely(scatter) - unlikely(0.3) == pytest.approx(by_hand(scatter) - by_hand(0.3))
