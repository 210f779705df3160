"""Leaving values out: at random, by size, or whole levels. What is left out is +0, whatever its sign was."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from splitpeer.defences.base import Defence, Draw, Parameter, Place, Tensors
from splitpeer.errors import ConfigError


def masked(tensor: Tensor, mask: Tensor) -> Tensor:
    """`tensor` where `mask`, else +0. (A product with zero would keep the sign, and send it.)"""
    return torch.where(mask, tensor, tensor.new_zeros(()))


class Dropout(Defence):
    """Set each value to zero with probability `rate`, in training and in evaluation.

    Without rescaling by default: the published form, and the decoder learns the smaller sums because the mask
    acts in evaluation as well. Dividing by 1 - rate tells an adversary nothing that it does not know.
    """

    name = "dropout"
    title = "Dropout, always on"
    promise = "No guarantee: exact zeros give the mask away, and an attacker fits the values that are left."
    source = "He, Zhang, Lee, IEEE Internet of Things Journal 2020, doi 10.1109/JIOT.2020.3022358"
    places: ClassVar[frozenset[Place]] = frozenset({"activations", "gradients"})
    options: ClassVar = {
        "rate": Parameter(0.5, 0.0, 1.0, "share of the values that are dropped"),
        "kept": Parameter(False, meaning="draw the mask once per sample, and use it every time"),
        "rescale": Parameter(False, meaning="divide what is left by 1 - rate"),
    }

    def forward(self, tensors: Tensors, draw: Draw) -> Tensors:
        rate, kept = float(self.values["rate"]), bool(self.values["kept"])

        def dropped(name: str, tensor: Tensor) -> Tensor:
            shape = tensor.shape[1:]
            drawn = [
                draw.generator(name, i, kept=kept).random(shape, dtype=np.float32) for i in range(len(tensor))
            ]
            left = masked(tensor, torch.from_numpy(np.stack(drawn) >= rate).to(tensor.device))
            return left / (1 - rate) if self.values["rescale"] and rate < 1 else left

        return self.each(tensors, dropped)


class TopK(Defence):
    """Of each sample's level, keep the `share` of the values with the largest magnitudes."""

    name = "topk"
    title = "Only the largest values"
    promise = "No guarantee: a compression; where the large values lie shows structure."
    source = "standard sparsification, as in Aji & Heafield 2017, arXiv 1704.05021"
    places: ClassVar[frozenset[Place]] = frozenset({"activations", "gradients"})
    options: ClassVar = {"share": Parameter(0.05, 1e-6, 1.0, "share of the values that are kept")}

    def forward(self, tensors: Tensors, draw: Draw) -> Tensors:
        def largest(name: str, tensor: Tensor) -> Tensor:
            flat = tensor.detach().flatten(1).abs()
            count = max(1, round(float(self.values["share"]) * flat.shape[1]))
            mask = torch.zeros_like(flat, dtype=torch.bool)
            mask.scatter_(1, flat.topk(count, dim=1, sorted=False).indices, True)
            return masked(tensor, mask.reshape(tensor.shape))

        return self.each(tensors, largest)


class Withhold(Defence):
    """Send zeros instead of the levels named, as in `withhold@0`.

    The schema stays, so the bytes are sent; leaving the level out of the job ([model] levels) saves them.
    """

    name = "withhold"
    title = "A level withheld"
    promise = "Guaranteed: the levels named are constant and show nothing. None about the other levels."
    guarantee = True
    source = "constant output"

    def __init__(self, levels: tuple[int, ...] | None = None, **values: float | int | bool) -> None:
        if levels is None:
            raise ConfigError("withhold needs levels: write withhold@0 or withhold@0,1")
        super().__init__(levels, **values)

    def carried(self, channels: Mapping[str, int]) -> dict[str, int]:
        return {name: 0 if self.covers(name) else count for name, count in channels.items()}

    def forward(self, tensors: Tensors, draw: Draw) -> Tensors:
        return {name: torch.zeros_like(t) if self.covers(name) else t for name, t in tensors.items()}
