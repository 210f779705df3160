"""Backward from several tensors whose gradients are given."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def backward(tensors: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
    """`torch.autograd.backward(tensors, gradients)`: the same additions in the same order.

    Torch's own compares shapes by symbolic mathematics, whose import (SymPy) costs a site half a second of CPU time and
    45 MiB. So all gradients leave from one root, which needs none given.

    Args:
        tensors: at least one, each with a graph behind it.
        gradients: of each tensor, its shape and dtype.
    """
    root: Tensor = _Root.apply(tuple(gradients), *tensors)  # type: ignore[no-untyped-call]
    root.backward()


class _Root(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, gradients: tuple[Tensor, ...], *tensors: Tensor) -> Tensor:
        context.gradients = gradients
        return tensors[0].new_zeros(())

    @staticmethod
    def backward(context: Any, *unused: Tensor) -> tuple[Tensor | None, ...]:
        return (None, *context.gradients)
