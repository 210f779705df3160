"""One network in two ways: whole, and in halves that exchange arrays."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from splitpeer.models import Backbone, SplitNetwork, build_split_network

SITES = ("flair", "t1")


def window(of: Backbone) -> tuple[int, ...]:
    return (2 * of.cut.stride[0], *of.cut.stride[1:])


def images(of: Backbone, sites: tuple[str, ...] = SITES) -> dict[str, Tensor]:
    source = torch.Generator().manual_seed(0)
    return {site: torch.randn(2, 1, *window(of), generator=source) for site in sites}


def gradients(network: SplitNetwork) -> Mapping[str, Tensor]:
    found = {name: parameter.grad for name, parameter in network.named_parameters()}
    assert all(gradient is not None for gradient in found.values())
    return found  # type: ignore[return-value]


def both_ways(of: Backbone, fusion: str) -> tuple[list[Tensor], Mapping[str, Tensor]]:
    """Logits and gradients are equal, bit for bit; activations and gradients go over as arrays, each site on its own
    graph. Returns all that was sent, and the gradients."""
    x = images(of)
    whole = build_split_network(of, SITES, fusion, job_seed=1)
    expected = whole(x)
    expected.square().mean().backward()

    apart = build_split_network(of, SITES, fusion, job_seed=1)
    sent = {site: apart.encoders[site](x[site]) for site in SITES}
    arrived = {
        site: {n: torch.from_numpy(np.array(t.detach().numpy())).requires_grad_() for n, t in tensors.items()}
        for site, tensors in sent.items()
    }
    for tensors in sent.values():
        assert {n: tuple(t.shape) for n, t in tensors.items()} == of.cut.shapes(2, window(of))
    logits = apart.decoder(arrived)
    logits.square().mean().backward()
    for site, tensors in sent.items():
        back = [torch.from_numpy(np.array(arrived[site][n].grad.numpy())) for n in tensors]
        torch.autograd.backward(list(tensors.values()), back)

    assert torch.equal(logits, expected)
    for key, gradient in gradients(whole).items():
        assert torch.equal(gradient, gradients(apart)[key]), key
    return [tensor for tensors in sent.values() for tensor in tensors.values()], gradients(whole)
