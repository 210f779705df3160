"""The one defence with a theorem: its clip, its noise, and that nothing bypasses them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats

from splitpeer.defences.activation.dp import DPGaussian, mechanism, normals
from splitpeer.defences.network import build_network
from splitpeer.defences.randomness import Release
from splitpeer.defences.stack import make_stack
from splitpeer.errors import ConfigError
from splitpeer.models import unet_backbone
from splitproto.records import Sample

KEY = bytes(range(32))
CHANNELS = {"x0": 4, "x1": 6}


def release(nonce: bytes = b"", count: int = 2) -> Release:
    samples = tuple(Sample(bytes([n]) * 16, (0, 0, n)) for n in range(count))
    return Release(b"r" * 16, "train", 1, 0, samples, nonce=nonce)


def stack(*written: str, channels=CHANNELS):
    return make_stack(list(written), key=KEY, channels=channels, dimensions=2)


def tensors(size: float = 10.0, seed: int = 0) -> dict[str, torch.Tensor]:
    source = np.random.default_rng(seed)
    return {name: torch.from_numpy(size * source.normal(size=(2, n, 16 >> int(name[1]), 16 >> int(name[1])))).float()
            for name, n in CHANNELS.items()}  # fmt: skip


def flat(found: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([t.flatten(1) for t in found.values()], 1).double()


def test_a_record_is_clipped_over_all_its_levels_together() -> None:
    clear = tensors()
    sent = stack("dp-gaussian:clip=5,noise=0.001")(clear, release())
    noise = 0.005 * math.sqrt(flat(clear).shape[1])
    assert flat(sent).norm(dim=1) == pytest.approx([5, 5], abs=noise)
    # Direction and proportions of the levels are those of the record.
    assert torch.nn.functional.cosine_similarity(flat(sent), flat(clear)).min() > 0.95
    small = tensors(size=1e-3)
    assert (flat(stack("dp-gaussian:clip=5,noise=0.001")(small, release())) - flat(small)).abs().max() < 0.05


@pytest.mark.parametrize("size", [0.0, 1e-6, 1e6])
def test_noise_is_the_same_whatever_the_data(size: float) -> None:
    sent = flat(stack("dp-gaussian:clip=2,noise=3")(tensors(size), release()))
    # The clipped record (norm 2 in 2,500 values) is not visible in noise of 6 on each.
    assert float(sent.std()) == pytest.approx(6, rel=0.05)
    assert stats.kstest(sent.numpy().ravel() / 6, "norm").pvalue > 1e-3


def test_an_optimal_test_of_two_records_attains_the_accounted_tradeoff_and_no_more() -> None:
    """2C apart, the furthest that clipping allows: the empirical delta(epsilon) is that of mu = 2 / noise."""
    record = torch.ones(1, 1, 2, 2)
    rival = -record
    one = stack("dp-gaussian:clip=1,noise=2", channels={"x0": 1})
    draws = {sign: np.concatenate([
        flat(one({"x0": t * 100}, release(b"%d" % n, 1))).numpy() for n in range(3000)])
        for sign, t in (("record", record), ("rival", rival))}  # fmt: skip
    along = {sign: values.sum(1) / 2 for sign, values in draws.items()}  # unit direction (1,1,1,1)/2
    mu = 2 / 2
    for threshold in (-1.0, 0.0, 1.0):
        false, true = (along["rival"] > threshold).mean(), (along["record"] > threshold).mean()
        assert stats.norm.ppf(true) - stats.norm.ppf(false) == pytest.approx(mu, abs=0.15)


def test_sites_of_a_sum_share_the_noise_and_each_counts_what_is_not_told() -> None:
    sites = [
        make_stack(
            ["dp-gaussian:clip=2,noise=3,shared=4,honest=3"],
            key=bytes([n]) * 32,
            channels=CHANNELS,
            dimensions=2,
        )
        for n in range(4)
    ]
    parts = [flat(one(tensors(0.0), release())) for one in sites]
    # 5,120 values: their deviation is off by (2 * 5,120)^-.5 = 1 %.
    assert float(sum(parts).std()) == pytest.approx(6, rel=0.04)
    assert all(float(part.std()) == pytest.approx(3, rel=0.04) for part in parts)
    # One tells: what is left of the noise in the sum.
    assert float(sum(parts[1:]).std()) == pytest.approx(6 * 0.75**0.5, rel=0.04)
    found = mechanism(sites[0].defences)
    assert found is not None
    assert found.noise == pytest.approx(3 * 0.75**0.5) and found.own_noise == pytest.approx(1.5)
    nobody = mechanism(stack("dp-gaussian:clip=2,noise=3,shared=4").defences)
    assert nobody is not None and nobody.noise == nobody.own_noise == 1.5
    with pytest.raises(ConfigError, match="of 2 sites no 3 can be honest"):
        stack("dp-gaussian:shared=2,honest=3")


def test_no_two_computations_share_noise() -> None:
    one, clear = stack("dp-gaussian:clip=1,noise=1"), tensors()
    first = flat(one(clear, release(b"1")))
    assert torch.equal(first, flat(one(clear, release(b"1"))))
    # Equal tensors released again, other tensors under the same nonce, the neighbour in the batch.
    again, other = flat(one(clear, release(b"2"))), flat(one(tensors(seed=1), release(b"1")))
    for rival in (again, other, first.roll(1, 0)):
        distance = (first - rival).std()
        assert distance > 1.2, distance
    two = stack("dp-gaussian:clip=1,noise=1", "dp-gaussian:clip=1e9,noise=1e-3")
    assert mechanism(two.defences).noise == 1
    assert mechanism(stack("gaussian:1").defences) is None


def test_what_is_not_finite_does_not_show() -> None:
    clear = tensors()
    clear["x0"][0, 0, 0, 0], clear["x0"][0, 1], clear["x1"][1, 2, 3, 3] = math.nan, math.inf, -math.inf
    sent = flat(stack("dp-gaussian:clip=1,noise=1")(clear, release()))
    assert torch.isfinite(sent).all()
    assert float(sent.std()) == pytest.approx(1, rel=0.06)


def test_a_level_may_not_leave_beside_it_unless_it_carries_nothing() -> None:
    with pytest.raises(ConfigError, match=r"dp-gaussian.*: x1 would leave without noise"):
        stack("dp-gaussian:clip=1@0")
    assert stack("withhold@1", "dp-gaussian:clip=1@0")
    assert stack("dp-gaussian:clip=1@0,1")


def test_channels_that_carry_nothing_get_no_noise_and_post_processing_may_follow() -> None:
    sent = stack("bottleneck:1@1", "dp-gaussian:clip=1,noise=1", "quantise:8")(tensors(), release())
    assert (sent["x1"][:, 1:] == 0).all()
    assert float(sent["x1"][:, 0].detach().std()) == pytest.approx(1, rel=0.2)


@pytest.mark.parametrize("zero", [False, True])
def test_gradients_pass_the_clip(zero: bool) -> None:
    clear = {name: (t * (not zero)).requires_grad_() for name, t in tensors().items()}
    sent = stack("dp-gaussian:clip=1,noise=1")(clear, release())
    flat(sent).sum().backward()
    assert all(torch.isfinite(t.grad).all() and (t.grad != 0).any() for t in clear.values())


@pytest.mark.parametrize(("frozen", "moves"), [("true", False), ("false", True)])
def test_a_frozen_encoder_hears_no_gradient(frozen: str, moves: bool) -> None:
    written = ["bottleneck:2", f"dp-gaussian:clip=1,noise=1,frozen={frozen}", "nopeek:1"]
    network = build_network(unet_backbone(2, (2, 4, 4, 8, 8, 4), (0, 4)), written, key=KEY, seed=3)
    image = torch.randn(2, 1, 32, 32, generator=torch.manual_seed(0))
    sent = network(image, release())
    penalty = network.stack.penalty(image, sent)
    assert (penalty is not None) == moves
    assert any(t.requires_grad for t in sent.values()) == moves


@pytest.mark.parametrize("written", ["dp-gaussian:noise=0", "dp-gaussian:clip=0", "dp-gaussian:noise=-1"])
def test_no_noise_is_no_mechanism(written: str) -> None:
    with pytest.raises(ConfigError):
        stack(written)


def test_it_says_that_it_guarantees_and_on_what() -> None:
    assert DPGaussian.kind.guarantee
    assert "counted" in DPGaussian.kind.promise


def test_normals_are_normal_and_a_function_of_their_key() -> None:
    first = normals(KEY, (201, 1001))
    assert first.shape == (201, 1001) and first.dtype == np.float64
    assert (first == normals(KEY, (201, 1001))).all()
    assert abs(np.corrcoef(first.ravel(), normals(KEY[::-1], (201, 1001)).ravel())[0, 1]) < 0.01
    assert stats.kstest(first.ravel(), "norm").pvalue > 1e-3
    assert stats.kurtosis(first.ravel()) == pytest.approx(0, abs=0.05)
    assert abs(np.corrcoef(first.ravel()[:-1], first.ravel()[1:])[0, 1]) < 0.01
    # Pieces differ, and the first words are those of ChaCha20 with a zero nonce, written out.
    long = normals(KEY, ((1 << 20) + 4,))
    assert not np.intersect1d(long[:1000], long[-4:]).size
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms

    words = (
        np.frombuffer(Cipher(algorithms.ChaCha20(KEY, bytes(16)), None).encryptor().update(bytes(16)), "<u8")
        >> 11
    )
    radius = math.sqrt(-2 * math.log((int(words[0]) + 1) / 2**53))
    assert normals(KEY, (1,))[0] == pytest.approx(radius * math.cos(2 * math.pi * int(words[1]) / 2**53))


def test_what_leaves_lies_on_a_grid_that_is_the_same_for_every_record() -> None:
    """Mironov 2012: the gaps between values must not depend on what is under the noise."""
    from splitpeer.defences.activation.dp import snapped

    sigma = 3.7
    grid = 2.0**-19  # 2^floor(log2 3.7) is 2
    for scale in (1e-9, 1.0, 1e3):
        values = torch.randn(1000, dtype=torch.float64) * scale
        moved = snapped(values.requires_grad_(), sigma)
        assert torch.equal(moved / grid, torch.round(moved / grid)), scale
        assert (moved - values).abs().max() <= grid / 2
        moved.sum().backward()
        assert torch.equal(values.grad, torch.ones_like(values))
