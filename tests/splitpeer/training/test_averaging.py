"""Averages of encoders: the exact rule, and what a site keeps until the step that the average belongs to."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from splitpeer.defences.kinds import parse_all
from splitpeer.defences.network import build_network
from splitpeer.defences.randomness import Release
from splitpeer.models import build_encoder
from splitpeer.models.registry import NETWORKS, averaged_tensors, make_backbone, unet_backbone
from splitpeer.training.averaging import average
from splitpeer.training.optimiser import make_optimiser, make_schedule
from splitpeer.training.split_step import ClientHalf
from splitproto.records import Sample

CUT = unet_backbone(2, (2, 4, 4, 8, 8, 4))


def half(seed: int, *, written: tuple[str, ...] = ()) -> ClientHalf:
    encoder = build_network(CUT, parse_all(written, "activations"), key=bytes(32), seed=seed)
    optimiser = make_optimiser(encoder.parameters(), "adam", 0.01)
    return ClientHalf(encoder, optimiser, make_schedule(optimiser, "constant", 10))


def step(one: ClientHalf, seed: int) -> None:
    rng = np.random.default_rng(seed)
    image = rng.normal(size=(2, 1, 32, 32)).astype(np.float32)
    number = one.steps_done + 1
    release = Release(bytes(16), "train", number, 0, (Sample(bytes(16), (0, 0, 0)),) * 2)
    sent = one.forward(image, release)
    one.backward({name: rng.normal(size=a.shape).astype(np.float32) for name, a in sent.items()})


def same(one, other) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


def test_the_rule_by_hand() -> None:
    """SP-11.16-4: (2 * 0.1f + 3 * 0.3f + 1 * 7f) / 6 in float64, rounded once."""
    sites = [np.array([value], np.float32) for value in (0.1, 0.3, 7.0)]
    found = average([{"w": one} for one in sites], [2, 3, 1])["w"]
    exact = (2 * float(sites[0][0]) + 3 * float(sites[1][0]) + float(sites[2][0])) / 6
    assert found.dtype == np.float32 and found[0] == np.float32(exact)
    rng = np.random.default_rng(3)
    many = [
        {"a": rng.normal(size=(5, 3)).astype(np.float32), "b": np.float32(rng.normal(size=4))}
        for _ in range(4)
    ]
    counts = [7, 0, 120, 3]
    for name, mean in average(many, counts).items():
        for place in np.ndindex(mean.shape):
            total = 0.0
            for one, count in zip(many, counts, strict=True):
                total += count * float(one[name][place])
            assert mean[place] == np.float32(total / 130)


def test_what_is_no_average() -> None:
    one = {"w": np.zeros(1, np.float32)}
    with pytest.raises(ValueError, match="no patients"):
        average([one, one], [0, 0])
    with pytest.raises(ValueError, match="different networks"):
        average([one, {"v": one["w"]}], [1, 1])


def test_the_weights_from_before_are_kept_until_the_step_is_applied() -> None:
    """SP-11.16-6."""
    one, other = half(1), half(2)
    for seed in (10, 11):
        step(one, seed)
        step(other, seed + 100)
    before, saved = one.weights(), one.state()
    mean = average([before, other.weights()], [1, 3])
    one.take(mean)
    assert same(one.weights(), before), "what is shared"
    assert same(
        {k: v.numpy() for k, v in one.state()[0].items()}, {k: v.numpy() for k, v in saved[0].items()}
    )
    live = {name: tensor.numpy() for name, tensor in one.network.state_dict().items()}
    assert same(live, mean), "what the next step is made from"
    # SP-11.16-5: a second one takes the place of the first.
    one.take(other.weights())
    assert same(one.weights(), before)
    one.take(mean)
    one.advance(2)
    assert same(one.weights(), before), "advancing to the step that is applied forgets neither"
    step(one, 12)
    assert not same(one.weights(), before)
    assert same({f"model/{n}": a for n, a in one.weights().items()},
                {n: t.numpy() for n, t in one.state()[0].items() if n.startswith("model/")})  # fmt: skip


def test_the_moments_stay_each_sites_own() -> None:
    """SP-11.16-5."""
    one, other = half(1), half(2)
    step(one, 10)
    step(other, 11)
    before = {name: t.clone() for name, t in one.state()[0].items() if name.startswith("optimiser/")}
    one.take(average([one.weights(), other.weights()], [1, 1]))
    after = one.state()[0]
    assert before and all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_who_sits_the_step_out_counts_on_with_the_average() -> None:
    """SP-11.16-6: the step is advanced to."""
    one, other = half(1), half(2)
    mean = average([one.weights(), other.weights()], [1, 1])
    one.take(mean)
    one.advance(1)
    assert same(one.weights(), mean)


def test_who_computed_the_step_in_vain_has_its_own_weights_back() -> None:
    """SP-11.16-6: it was committed without this half, which an average that overflows must not break for good."""
    one = half(1)
    before = one.weights()
    one.take({name: np.full_like(array, 1000) for name, array in before.items()})
    one.forward(np.ones((2, 1, 32, 32), np.float32))
    one.advance(1)
    assert same(one.weights(), before) and not one.averaged
    step(one, 10)
    assert one.steps_done == 2 and not same(one.weights(), before)


def test_after_a_rollback_the_average_is_the_same_again() -> None:
    """SP-11.16-6, SP-11.16-7."""
    one, other = half(1), half(2)
    step(one, 10)
    step(other, 11)
    saved, own = [part.state() for part in (one, other)], one.weights()
    made = []
    for _ in range(2):
        mean = average([one.weights(), other.weights()], [5, 2])
        one.take(mean)
        other.take(mean)
        step(one, 20)
        step(other, 21)
        made.append((one.weights(), other.weights()))
        for part, state in zip((one, other), saved, strict=True):
            part.load(*state)
        assert same(one.weights(), own)
    assert all(same(a, b) for a, b in zip(*made, strict=True))
    assert not same(*made[0])


def test_a_rollback_before_the_step_forgets_the_average() -> None:
    """SP-11.16-6."""
    one = half(1)
    saved, before = one.state(), one.weights()
    one.take(half(2).weights())
    one.load(*saved)
    assert same({name: t.numpy() for name, t in one.network.state_dict().items()}, before)


def test_nothing_of_the_defences_is_shared() -> None:
    """SP-11.16-3."""
    plain, defended = half(1), half(1, written=("bottleneck:2",))
    assert same(plain.weights(), defended.weights())
    mine = {n: t.clone() for n, t in defended.network.state_dict().items() if not n.startswith("encoder.")}
    assert mine
    defended.take(half(2).weights())
    assert same(half(1).weights(), defended.weights())
    after = defended.network.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in mine.items())
    assert same({n.removeprefix("model/encoder."): t.numpy() for n, t in defended.state()[0].items()
                 if n.startswith("model/encoder.")}, half(1).weights())  # fmt: skip


@pytest.mark.parametrize("network", list(NETWORKS))
def test_names_and_shapes_are_known_without_a_site(network: str) -> None:
    """SP-11.16-3: floating-point numbers only, which today are all that an encoder has."""
    backbone = make_backbone(network, 2)
    state = build_encoder(backbone, 2, seed=1).state_dict()
    floating = {name: tuple(t.shape) for name, t in state.items() if t.is_floating_point()}
    assert averaged_tensors(backbone, 2) == floating
    assert len(floating) == len(state)
