"""A whole network that computes with what would be read on the other side of a link."""

from __future__ import annotations

from typing import Any

import torch

from splitpeer.models import SplitNetwork
from splitpeer.training.forms import WireForm, activations_form, gradients_form
from splitproto.records import Job


class _Travels(torch.autograd.Function):
    """A level goes down as activations travel, its gradient comes back as gradients do (SP-11.21-6)."""

    @staticmethod
    def forward(ctx: Any, level: torch.Tensor, name: str, there: WireForm, back: WireForm) -> torch.Tensor:
        ctx.name, ctx.back = name, back
        return _read(level, name, there)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        return _read(gradient, ctx.name, ctx.back), None, None, None


def _read(tensor: torch.Tensor, name: str, form: WireForm) -> torch.Tensor:
    array = tensor.detach().contiguous().numpy()
    return torch.from_numpy(form.from_wire(form.to_wire({name: array}))[name].copy())


def at_the_cut(network: SplitNetwork, job: Job) -> None:
    """Put the job's precision or codings between encoders and decoder."""
    there, back = activations_form(job), gradients_form(job)

    def travel(_: Any, __: Any, levels: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: _Travels.apply(level, name, there, back) for name, level in levels.items()}

    for encoder in network.encoders.values():
        encoder.register_forward_hook(travel)
