"""Gradients that are given go back from several tensors exactly as torch's own function takes them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from splitpeer.training.backward import backward


def levels(seed: int) -> tuple[nn.Module, list[Tensor]]:
    """A network, and tensors of which each is made of all before it: four gradients meet in the first."""
    torch.manual_seed(seed)
    layers = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1) for _ in range(4))
    x, made = torch.randn(2, 4, 9, 9), []
    for layer in layers:
        x = torch.tanh(layer(sum(made, x)))
        made.append(x)
    return layers, made


def gradients_after(way, seed: int, order: Sequence[int]) -> list[Tensor]:
    network, tensors = levels(seed)
    source = torch.Generator().manual_seed(seed)
    # Of very different sizes: another order of the additions would round otherwise.
    given = [torch.randn(t.shape, generator=source) * 10.0 ** (3 * n) for n, t in enumerate(tensors)]
    way([tensors[n] for n in order], [given[n] for n in order])
    return [parameter.grad for parameter in network.parameters()]


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 1, 0, 2), (2, 0), (1,)])
@pytest.mark.parametrize("seed", range(5))
def test_gradients_are_torchs_bit_for_bit(order: tuple[int, ...], seed: int) -> None:
    ours, theirs = (gradients_after(way, seed, order) for way in (backward, torch.autograd.backward))
    for one, other in zip(ours, theirs, strict=True):
        assert (one is None) == (other is None)
        assert one is None or torch.equal(one, other)


def test_what_was_given_is_let_go() -> None:
    _, tensors = levels(0)
    given = torch.ones_like(tensors[0])
    before = sys.getrefcount(given)
    backward(tensors[:1], [given])
    assert sys.getrefcount(given) == before


def test_no_shape_is_compared_by_symbolic_mathematics() -> None:
    program = (
        "import sys, torch\n"
        "from splitpeer.training.backward import backward\n"
        "x = torch.ones(3, requires_grad=True)\n"
        "backward([x * 2, x * 3], [torch.ones(3), torch.ones(3)])\n"
        "assert x.grad.tolist() == [5, 5, 5]\n"
        "print(*{'torch._dynamo', 'sympy'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=100
    )
    assert done.stdout.split() == []
