"""Penalties measure what they say and push the right way."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional

from splitpeer.defences.activation.learned import InverseNetwork, distance_correlation, structural_similarity


def test_distance_correlation_is_the_textbooks() -> None:
    source = np.random.default_rng(0)
    x, z = source.normal(size=(6, 3)), source.normal(size=(6, 5))

    def centred(rows: np.ndarray) -> np.ndarray:
        d = np.array([[np.linalg.norm(a - b) for b in rows] for a in rows])
        return d - d.mean(0) - d.mean(1)[:, None] + d.mean()

    a, b = centred(x), centred(z)
    expected = np.sqrt((a * b).mean() / np.sqrt((a * a).mean() * (b * b).mean()))
    found = distance_correlation(torch.tensor(x), torch.tensor(z)).item()
    assert found == pytest.approx(expected, rel=1e-5)
    assert distance_correlation(torch.tensor(x), 3 * torch.tensor(x) + 1).item() == pytest.approx(1, abs=1e-5)
    many = torch.randn(300, 1, generator=torch.Generator().manual_seed(1))
    assert distance_correlation(many, many**2).item() > 0.3, "uncorrelated, and yet dependent"
    constant = torch.ones(6, 2, requires_grad=True)
    distance_correlation(torch.tensor(x).float(), constant).backward()
    assert torch.isfinite(constant.grad).all()


def test_distance_correlations_gradient() -> None:
    source = torch.Generator().manual_seed(3)
    x = torch.randn(5, 4, generator=source)
    z = torch.randn(5, 3, generator=source, requires_grad=True)
    (gradient,) = torch.autograd.grad(distance_correlation(x, z), z)
    step = torch.randn(5, 3, generator=source)
    with torch.no_grad():
        apart = distance_correlation(x, z + 1e-2 * step) - distance_correlation(x, z - 1e-2 * step)
    assert (gradient * step).sum().item() == pytest.approx(apart.item() / 2e-2, rel=0.02)


def test_similarity_is_that_of_scikit_image(bench) -> None:
    from skimage.metrics import structural_similarity as reference

    noisy = bench.image + 0.3 * torch.randn(bench.image.shape, generator=torch.Generator().manual_seed(0))
    for a, b in zip(bench.image, noisy, strict=True):
        full = reference(
            a[0].numpy(), b[0].numpy(), win_size=7, data_range=6.0, use_sample_covariance=False, full=True
        )[1]
        inside = full[tuple(slice(3, -3) for _ in range(bench.dimensions))].mean()
        assert structural_similarity(a[None], b[None]).item() == pytest.approx(inside, abs=2e-4)
    assert structural_similarity(noisy, noisy).item() == pytest.approx(1, abs=1e-6)


def test_nopeek_weighs_the_mean_over_the_levels_that_train(flat) -> None:
    leaves = flat.leaves()
    expected = torch.stack([distance_correlation(flat.image, leaves[name]) for name in ("x0", "x3")]).mean()
    assert flat.stack("nopeek:0.5@0,3").penalty(flat.image, leaves).item() == pytest.approx(
        0.5 * expected.item()
    )
    assert flat.stack("nopeek:0.5@0").penalty(flat.image, flat.tensors) is None, "constants"
    one = {name: tensor[:1] for name, tensor in leaves.items()}
    assert flat.stack("nopeek:0.5").penalty(flat.image[:1], one) is None, "one sample has no distances"


@pytest.mark.parametrize("written", ["nopeek:1", "adversary:1,networks=2,width=8"])
def test_following_the_penalty_lowers_it_as_seen_by_a_judge(flat, written: str) -> None:
    """Descending the penalty in the tensors makes them tell less of the image, or the reversed networks fail."""
    stack = flat.stack(written)
    sent = {name: tensor.clone().requires_grad_() for name, tensor in flat.tensors.items()}

    def judged() -> float:
        """Lower is better for the site."""
        penalty = stack.penalty(flat.image, sent).item()
        return penalty if written.startswith("nopeek") else -penalty

    before = judged()
    optimiser = torch.optim.SGD(list(sent.values()), lr=20 if written.startswith("nopeek") else 2000)
    for _ in range(10):
        optimiser.zero_grad()
        stack.penalty(flat.image, sent).backward()
        optimiser.step()
    assert judged() < before - 1e-3


def test_shredders_noise_is_laplace_of_the_learned_width(flat) -> None:
    stack = flat.stack("shredder:0.1,start=0.5,most=2")
    (defence,) = stack.defences
    with torch.no_grad():
        defence.logits["x0"][0] = 0.0  # width 1
    sent = stack(flat.leaves(), flat.release())
    for channel, width in ((0, 1.0), (1, 0.5)):
        noise = (sent["x0"] - flat.tensors["x0"])[:, channel].flatten(1)
        size = flat.tensors["x0"][:, channel].flatten(1).square().mean(1).sqrt()
        assert (noise.std(1) / size).mean().item() == pytest.approx(width, rel=0.05)
    widths = [defence.width(name) for name in flat.channels]
    penalty = stack.penalty(flat.image, sent)
    assert penalty.item() == pytest.approx(-0.1 * torch.cat(widths).mean().item(), rel=1e-5)
    penalty.backward()
    assert all((p.grad < 0).all() for p in stack.parameters()), "descent makes the noise grow"
    grown = sum(tensor.square().sum() for tensor in sent.values())
    gradients = torch.autograd.grad(grown, list(stack.parameters()))
    assert sum(g.sum().item() for g in gradients) > 0, "the loss that noise adds holds it back"


def test_reversal_trains_networks_and_encoder_against_each_other(bench) -> None:
    stack = bench.stack("adversary:0.5,networks=2,width=4")
    (defence,) = stack.defences
    leaves = bench.leaves()
    stack.penalty(bench.image, leaves).backward()
    reversed_ = {name: leaf.grad.clone() for name, leaf in leaves.items()}
    of_networks = [p.grad.clone() for p in defence.networks[0].parameters()]
    plain, size = bench.leaves(), tuple(bench.image.shape[2:])
    for network in defence.networks:
        network.zero_grad()
        (1 - structural_similarity(network(plain, size), bench.image)).backward()
    for name, leaf in plain.items():
        assert torch.allclose(reversed_[name], -0.5 / 2 * leaf.grad, atol=1e-9, rtol=1e-3)
    for ours, theirs in zip(of_networks, defence.networks[0].parameters(), strict=True):
        assert torch.allclose(ours, theirs.grad, atol=1e-7, rtol=1e-3)


def test_an_inverse_network_learns_to_invert(flat) -> None:
    network = InverseNetwork(flat.channels, 2, 8)
    optimiser = torch.optim.Adam(network.parameters(), 1e-2)
    for _ in range(60):
        optimiser.zero_grad()
        loss = 1 - structural_similarity(network(flat.tensors, flat.window), flat.image)
        loss.backward()
        optimiser.step()
    assert loss.item() < 0.35
    half = {name: functional.avg_pool2d(tensor, 2) for name, tensor in flat.tensors.items()}
    assert network(half, flat.window).shape == flat.image.shape


def test_networks_start_anew_one_after_the_other_and_the_same_after_a_crash(flat) -> None:
    stack, again = (flat.stack("adversary:1,networks=3,restart=30,width=4") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(stack.parameters(), again.parameters(), strict=True))
    (defence,) = stack.defences
    anew = {}
    for step in range(1, 61):
        with torch.no_grad():
            for parameter in stack.parameters():
                parameter.add_(0.01)
        drawn = {id(parameter) for parameter in stack.begin(step)}
        for number, network in enumerate(defence.networks):
            if drawn & {id(parameter) for parameter in network.parameters()}:
                anew[step] = number
                once = [p.clone() for p in network.parameters()]
                assert stack.begin(step), "asked again, it answers the same"
                assert all(torch.equal(a, b) for a, b in zip(once, network.parameters(), strict=True))
    assert anew == {10: 2, 20: 1, 30: 0, 40: 2, 50: 1, 60: 0}
    again.begin(60)
    assert all(
        torch.equal(a, b)
        for a, b in zip(
            defence.networks[0].parameters(), again.defences[0].networks[0].parameters(), strict=True
        )
    )


def test_an_adversary_sees_only_what_carries(flat) -> None:
    stack = flat.stack("bottleneck:2+withhold@0+adversary:1,networks=1,width=4")
    sent = stack(flat.leaves(), flat.release())
    stack.penalty(flat.image, sent).backward()
    network = stack.defences[2].networks[0]
    assert set(network.stages) == {"x1", "x2", "x3", "x4"}
    assert network.stages["x4"].weight.shape[1] == 2
