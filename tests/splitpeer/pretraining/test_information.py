"""Noise on what would leave, and the price of what gets through: closed forms, and a pretraining that pays it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from splitpeer.pretraining.information import InformationBottleneck

from .conftest import Desk

SHAPES = {"x0": (2, 3, 6, 5), "x1": (2, 1, 3, 2)}
SEATS = 3
NARROW = {"data": "msd-task01", "seed": 1, "encoders": "together", "noise": 0.2}


@pytest.fixture
def sent() -> dict[str, np.ndarray]:
    source = np.random.default_rng(1)
    return {name: source.standard_normal(shape, np.float32) * 3 for name, shape in SHAPES.items()}


def test_the_slope_is_that_of_the_nats(sent: dict[str, np.ndarray]) -> None:
    narrow = InformationBottleneck(0.5, 1.0)
    values = {
        name: torch.tensor(array, dtype=torch.float64, requires_grad=True) for name, array in sent.items()
    }
    nats = torch.zeros((), dtype=torch.float64)
    for z in values.values():
        square = z.square().mean(dim=tuple(range(1, z.ndim)), keepdim=True)
        nats = nats + torch.log1p(z.square() / (0.25 * square)).sum() / 2
    nats.backward()
    assert narrow.nats(sent) == pytest.approx(nats.item(), rel=1e-12)
    for name, slope in narrow.slope(sent).items():
        assert slope.dtype == np.float32
        # One rounding to float32.
        np.testing.assert_allclose(slope, values[name].grad, rtol=2**-23, atol=1e-9)


def test_only_silence_is_cheaper(sent: dict[str, np.ndarray]) -> None:
    """As the noise follows the rms, smaller values cost the same; fewer cost less."""
    narrow = InformationBottleneck(0.2, 1.0)
    assert narrow.nats({n: a / 100 for n, a in sent.items()}) == pytest.approx(narrow.nats(sent), rel=1e-5)
    rare = {
        name: np.where(np.arange(array.size).reshape(array.shape) % 10 == 0, array, 0)
        for name, array in sent.items()
    }
    assert narrow.nats(rare) < narrow.nats(sent) / 3
    silent = {name: np.zeros_like(array) for name, array in sent.items()}
    assert narrow.nats(silent) == 0.0
    assert all(not slope.any() for slope in narrow.slope(silent).values())


def test_noise_is_as_wide_as_that_of_the_defence() -> None:
    wide = np.stack([np.full((4, 64, 64), 3.0), np.full((4, 64, 64), 0.5)]).astype(np.float32)
    noise = InformationBottleneck(0.2, 0.0).through({"x0": wide}, np.random.default_rng(2))["x0"] - wide
    # 16,384 values: the deviation is within 3 % unless it is wrong (5 standard errors).
    assert noise[0].std() == pytest.approx(0.6, rel=0.03)
    assert noise[1].std() == pytest.approx(0.1, rel=0.03)


def test_the_price_rises_when_the_task_is_found() -> None:
    narrow = InformationBottleneck(0.2, 2.0)
    assert [narrow.price(share) for share in (0.0, 0.1, 0.25, 0.4, 1.0)] == pytest.approx([0, 0, 1, 2, 2])


def nats_of(desk: Desk, steps: int, rate: float, monkeypatch: pytest.MonkeyPatch) -> float:
    """What the network still passes per voxel at its last step."""
    seen: list[float] = []
    usual = InformationBottleneck.slope

    def slope(self: InformationBottleneck, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        seen.append(self.nats(arrays))
        return usual(self, arrays)

    monkeypatch.setattr(InformationBottleneck, "slope", slope)
    desk.job(pretraining=NARROW | {"steps": steps, "rate": rate})
    desk.told(
        "--recipe", "--images", str(desk.data / "msd"), "--layout", "msd", "--convention", "msd", "--force"
    )
    return sum(seen[-SEATS:])


def test_encoders_that_pay_pass_less(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    free, dear = (nats_of(desk, 30, rate, monkeypatch) for rate in (0.0, 30.0))
    assert dear < free * 0.7
    assert desk.made.described.noise == 0.2


def test_interrupted_it_continues_bit_for_bit(desk: Desk, ends_at: Callable[[int], None]) -> None:
    where = ("--recipe", "--images", str(desk.data / "msd"), "--layout", "msd", "--convention", "msd")
    desk.job(pretraining=NARROW | {"steps": 5, "rate": 1.0})
    desk.run(*where)
    whole = dict(desk.made.tensors)
    ends_at(3)
    desk.run(*where, "--force", code=130)
    ends_at(-1)
    desk.out.unlink()
    desk.run(*where)
    assert all(torch.equal(whole[name], tensor) for name, tensor in desk.made.tensors.items())
    # Noise and price change what is learned.
    for other in ({"noise": 0.0, "rate": 0.0}, {"rate": 0.0}):
        desk.job(pretraining=NARROW | {"steps": 5, "rate": 1.0} | other)
        desk.run(*where, "--force")
        assert not all(torch.equal(whole[name], tensor) for name, tensor in desk.made.tensors.items())


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        ({"rate": 1.0, "noise": 0.0}, "rate is the price of what gets through noise"),
        ({"encoders": "apart", "labels": "none"}, "noise is for encoders that learn from masks"),
        ({"noise": -1.0}, "noise"),
        ({"own_steps": 5}, "own_steps would teach encoders to show images again"),
    ],
)
def test_what_cannot_be_is_refused(desk: Desk, recipe: dict[str, object], said: str) -> None:
    desk.job(pretraining=NARROW | {"steps": 5} | recipe)
    assert said in desk.run("--recipe", code=4)
