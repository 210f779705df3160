"""Leaving values out: at random, by size, or whole levels. What is left out is +0, whatever its sign was."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from splitpeer.defences import kinds
from splitpeer.defences.base import Defence, Tensors
from splitpeer.defences.randomness import Draw


def masked(tensor: Tensor, mask: Tensor) -> Tensor:
    """`tensor` where `mask`, else +0: a product with zero would keep the sign, and send it."""
    return torch.where(mask, tensor, tensor.new_zeros(()))


class Dropout(Defence):
    """Set each value to zero with probability `rate`, in training and in evaluation.

    Without rescaling by default: the published form, and the decoder learns the smaller sums because the mask
    acts in evaluation as well. Dividing by 1 - rate tells an adversary nothing that it does not know.
    """

    kind = kinds.DROPOUT

    def forward(self, tensors: Tensors, draw: Draw) -> Tensors:
        rate, kept = float(self.values["rate"]), self.spec.kept

        def dropped(name: str, tensor: Tensor) -> Tensor:
            shape = tensor.shape[1:]
            drawn = [
                draw.generator(name, i, kept=kept).random(shape, dtype=np.float32) for i in range(len(tensor))
            ]
            left = masked(tensor, torch.from_numpy(np.stack(drawn) >= rate).to(tensor.device))
            return left / (1 - rate) if self.values["rescale"] and rate < 1 else left

        return self.each(tensors, dropped)


class TopK(Defence):
    """In each level of each sample, keep the `share` of the values with the largest magnitudes."""

    kind = kinds.TOPK

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

    kind = kinds.WITHHOLD

    def carried(self, channels: Mapping[str, int]) -> dict[str, int]:
        return {name: 0 if self.covers(name) else count for name, count in channels.items()}

    def forward(self, tensors: Tensors, draw: Draw) -> Tensors:
        return {name: torch.zeros_like(t) if self.covers(name) else t for name, t in tensors.items()}
