"""Noise, masks and shapes do what they promise, on an encoder's own outputs in two and three dimensions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from splitpeer.defences.activation.noise import rms
from splitpeer.defences.activation.shape import clip_records


def relative_noise(bench, written: str, **changes: object) -> dict[str, torch.Tensor]:
    sent = bench.sent(written, **changes)
    width = {
        name: rms(tensor).reshape(-1, *[1] * (tensor.ndim - 1)) for name, tensor in bench.tensors.items()
    }
    return {name: (sent[name] - bench.tensors[name]) / width[name] for name in sent}


@pytest.mark.parametrize(
    ("written", "kurtosis"), [("gaussian:0.7", 3), ("laplace:0.7", 6), ("laplace:0.7,kept=true", 6)]
)
def test_noise_is_as_wide_and_as_heavy_as_written(bench, written: str, kurtosis: float) -> None:
    noise = relative_noise(bench, written)
    for name in ("x0", "x1"):
        for sample in noise[name]:
            assert abs(sample.mean()) < 0.03
            # Four standard errors of a deviation estimated from so many values of this kurtosis.
            error = math.sqrt((kurtosis - 1) / 4 / sample.numel())
            assert sample.std().item() == pytest.approx(0.7, rel=4 * error)
    together = noise["x0"].flatten().double() / 0.7
    assert together.pow(4).mean().item() == pytest.approx(kurtosis, rel=0.2)
    neighbours = torch.corrcoef(torch.stack([together[:-1], together[1:]]))[0, 1]
    assert abs(neighbours) < 0.02


def test_noise_is_averaged_away_unless_it_is_kept(flat) -> None:
    for written, left in (("gaussian:1", 0.1), ("gaussian:1,kept=true", 1.0)):
        views = [
            relative_noise(flat, written, release=flat.release(step=step))["x0"] for step in range(1, 101)
        ]
        assert torch.stack(views).mean(0).std().item() == pytest.approx(left, rel=0.05)


def test_percentile_noise_measures_what_is_not_zero_over_all_levels(flat) -> None:
    holed = {name: tensor.clone() for name, tensor in flat.tensors.items()}
    holed["x0"][:, :2] = 0
    for written, names in (
        ("percentile:0.5,percentile=90", list(holed)),
        ("percentile:0.5,percentile=90@1,2", ["x1", "x2"]),
    ):
        with torch.no_grad():
            sent = flat.stack(written)(holed, flat.release())
        for index in range(3):
            values = np.concatenate([holed[name][index].abs().numpy().ravel() for name in names])
            expected = 0.5 * np.percentile(values[values > 0], 90)
            noise = (sent["x1"] - holed["x1"])[index]
            assert noise.std().item() == pytest.approx(expected, rel=0.1)


def test_noise_lets_gradients_through_unchanged(flat) -> None:
    for written in ("gaussian:1", "laplace:1", "percentile:1"):
        leaves = flat.leaves()
        sent = flat.stack(written)(leaves, flat.release())
        seeds = [torch.randn_like(tensor) for tensor in sent.values()]
        torch.autograd.backward(list(sent.values()), seeds)
        assert all(torch.equal(leaf.grad, seed) for leaf, seed in zip(leaves.values(), seeds, strict=True))


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_dropout_drops_its_share_and_leaves_the_rest(bench, rate: float) -> None:
    sent = bench.sent(f"dropout:{rate}")
    for name in ("x0", "x1"):
        dropped = sent[name] == 0
        assert dropped.float().mean().item() == pytest.approx(rate, abs=0.02)
        assert torch.equal(sent[name][~dropped], bench.tensors[name][~dropped])
    # Other parameters are another draw; what is left is scaled.
    scaled = bench.sent(f"dropout:{rate},rescale=true")["x0"]
    left = scaled != 0
    assert left.float().mean().item() == pytest.approx(1 - rate, abs=0.02)
    assert torch.allclose(scaled[left], bench.tensors["x0"][left] / (1 - rate))
    assert not bench.sent("dropout:1,rescale=true")["x0"].any()


def test_masks_act_on_the_gradients_too(flat) -> None:
    for written in ("dropout:0.5", "topk:0.1"):
        leaves = flat.leaves()
        sent = flat.stack(written)(leaves, flat.release())
        seeds = {name: torch.randn_like(tensor) for name, tensor in sent.items()}
        torch.autograd.backward(list(sent.values()), list(seeds.values()))
        for name, leaf in leaves.items():
            assert torch.equal(leaf.grad, torch.where(sent[name] != 0, seeds[name], 0.0))


def test_topk_keeps_the_largest_of_each_sample_and_level(bench) -> None:
    for name, tensor in bench.sent("topk:0.05").items():
        count = max(1, round(0.05 * tensor[0].numel()))
        for sample, original in zip(tensor, bench.tensors[name], strict=True):
            kept = sample != 0
            assert kept.sum() == count
            assert torch.equal(sample[kept], original[kept])
            assert original[kept].abs().min() >= original[~kept].abs().max()


def test_a_withheld_level_is_nothing_and_trains_nothing(flat) -> None:
    leaves = flat.leaves()
    sent = flat.stack("withhold@0,2")(leaves, flat.release())
    assert [name for name, tensor in sent.items() if not tensor.requires_grad] == ["x0", "x2"]
    assert not sent["x0"].any() and not sent["x2"].any()
    assert torch.equal(sent["x1"], leaves["x1"])


def test_clipping_bounds_the_record_over_all_levels_together(bench) -> None:
    def norms(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.stack([t.double().flatten(1).square().sum(1) for t in tensors.values()]).sum(0).sqrt()

    before = norms(bench.tensors)
    bound = float(before.median())
    sent = bench.sent(f"clip:{bound!r}")
    assert (norms(sent) <= bound).all()
    for index in range(3):
        if before[index] <= bound:
            assert all(torch.equal(sent[name][index], bench.tensors[name][index]) for name in sent)
        else:
            assert norms(sent)[index].item() == pytest.approx(bound, rel=1e-5)
            ratio = sent["x0"][index] / bench.tensors["x0"][index]
            assert torch.allclose(ratio, ratio.flatten()[0])
    half = bench.sent("clip:1@0")
    assert norms({"x0": half["x0"]}).max() <= 1
    assert torch.equal(half["x1"], bench.tensors["x1"])
    nothing = {"x0": torch.zeros(1, 2, 3, 3, requires_grad=True)}
    clipped = clip_records(nothing, 1.0)["x0"]
    clipped.sum().backward()
    assert torch.isfinite(nothing["x0"].grad).all()


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_quantised_values_lie_on_the_grid_next_to_the_true_ones(bench, bits: int) -> None:
    for name, tensor in bench.sent(f"quantise:{bits}").items():
        for sample, original in zip(tensor.flatten(2), bench.tensors[name].flatten(2), strict=True):
            for channel, true in zip(sample, original, strict=True):
                unit = true.abs().max() / (2 ** (bits - 1) - 1)
                assert len(channel.unique()) <= 2**bits - 1
                assert (channel - true).abs().max() <= unit / 2 * 1.001


def test_quantisation_lets_gradients_straight_through(flat) -> None:
    leaves = flat.leaves()
    sent = flat.stack("quantise:3")(leaves, flat.release())
    seeds = [torch.randn_like(tensor) for tensor in sent.values()]
    torch.autograd.backward(list(sent.values()), seeds)
    assert all(torch.equal(leaf.grad, seed) for leaf, seed in zip(leaves.values(), seeds, strict=True))


def test_a_projection_is_a_secret_orthogonal_map_of_the_channels(bench) -> None:
    whole = bench.sent("projection:1")
    for name, tensor in whole.items():
        before, after = bench.tensors[name].flatten(2).norm(dim=1), tensor.flatten(2).norm(dim=1)
        assert torch.allclose(before, after, rtol=1e-4, atol=1e-5)
    half = bench.sent("projection:0.5")
    for name, tensor in half.items():
        kept = max(1, round(0.5 * bench.channels[name]))
        # A part of a rotation: shorter, and not by the same secret as the whole.
        before = bench.tensors[name].flatten(2).norm(dim=1)
        assert (tensor.flatten(2).norm(dim=1) <= before * (1 + 1e-4) + 1e-5).all()
        assert tensor[:, :kept].any() and not torch.equal(tensor[:, :kept], whole[name][:, :kept])
        assert not tensor[:, kept:].any()
    other = bench.release(step=9, batch=3, mode="evaluate")
    assert torch.equal(bench.sent("projection:0.5", other)["x0"], half["x0"])
    assert not torch.equal(bench.sent("projection:0.5", key=bytes(32))["x0"], half["x0"])


def test_a_bottleneck_is_narrow_and_bounded_and_trains(bench) -> None:
    stack = bench.stack("bottleneck:1@0+bottleneck:3@1,4")
    leaves = bench.leaves()
    sent = stack(leaves, bench.release())
    widths = {"x0": 1, "x1": 3, "x4": 3}
    for name, tensor in sent.items():
        assert tensor.shape == leaves[name].shape
        if name in widths:
            assert (tensor[:, : widths[name]] != 0).any()
            assert tensor.abs().max() <= 1
            assert not tensor[:, widths[name] :].any()
        else:
            assert tensor is leaves[name]
    parameters = dict(stack.named_parameters())
    assert len(parameters) == 6
    sum(tensor.sum() for tensor in sent.values()).backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in parameters.values())
    assert torch.equal(stack.structure(leaves)["x0"], sent["x0"])
    narrow = bench.stack("bottleneck:4096")
    assert narrow.defences[0].carried(bench.channels) == bench.channels
