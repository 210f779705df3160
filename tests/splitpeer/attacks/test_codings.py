"""A coding is no defence, and an adversary knows it as well as one: it rounds what it learns from as the wire does."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from splitpeer.attacks.base import View
from splitpeer.attacks.simulated_defences import SimulatedDefences
from splitproto import codings
from splitproto.codings import CODINGS

from .image_attacks import encoder, heads, look


def levels(seed: int) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        return dict(encoder()(torch.from_numpy(heads(3, seed))))


def view(form: str) -> View:
    return replace(look(heads(2, 1), encoder()), form=form)


def read(tensor: torch.Tensor, coding: str) -> np.ndarray:
    return codings.decode(codings.encode(tensor.numpy(), coding), coding, tensor.shape[1:])


@pytest.mark.parametrize("coding", CODINGS)
def test_what_an_adversary_sends_itself_is_coded(coding: str) -> None:
    clean = levels(2)
    sent = SimulatedDefences(view(coding), None, 0).release(clean, 0)
    for name, tensor in clean.items():
        assert np.array_equal(sent[name].numpy(), read(tensor, coding)), name
        assert not torch.equal(sent[name], tensor), name
    averaged = SimulatedDefences(view(coding), None, 0).averaged(clean, 0, 1, dict.fromkeys(clean, False))
    assert all(torch.equal(averaged[name].mean, sent[name]) for name in clean)


def test_each_level_is_coded_as_the_job_says() -> None:
    """SP-11.21-8."""
    clean = levels(2)
    by_level = dict(zip(clean, ("int4", "int8", "f32", "f16", "int4"), strict=True))
    sent = SimulatedDefences(replace(look(heads(2, 1), encoder()), form=by_level), None, 0).release(clean, 0)
    for name, tensor in clean.items():
        wanted = tensor.numpy() if by_level[name] == "f32" else read(tensor, by_level[name])
        assert np.array_equal(sent[name].numpy(), wanted), name


def test_tensors_of_several_sites_are_coded_one_by_one_and_what_is_known_in_clear_is_not() -> None:
    one, other = levels(2), {name: 100 * tensor for name, tensor in levels(3).items()}
    clear = torch.rand(3, 1, 32, 32)
    both = {name: torch.cat([one[name], other[name]], 1) for name in one}
    both["x0"] = torch.cat([both["x0"], clear], 1)
    asked = replace(view("f16"), parts=2, clear=("flair",))
    sent = SimulatedDefences(asked, None, 0).release(both, 0)
    assert torch.equal(sent["x0"][:, -1:], clear)
    for name, tensor in one.items():
        width = tensor.shape[1]
        assert np.array_equal(sent[name][:, :width].numpy(), read(tensor, "f16")), name
        assert np.array_equal(sent[name][:, width : 2 * width].numpy(), read(other[name], "f16")), name


def test_a_search_knows_how_far_values_are_rounded() -> None:
    clean = levels(2)
    effects = SimulatedDefences(view("int4"), None, 0).effects(clean)
    for name, tensor in clean.items():
        seen = torch.from_numpy(read(tensor, "int4"))
        kept = seen != 0
        error = torch.stack([(seen - tensor)[n][kept[n]].square().mean().sqrt() for n in range(len(tensor))])
        # Of a gain and what it leaves, the gain fits no worse than 1.
        assert bool((effects[name].scatter > 0).all()) and bool(
            (effects[name].scatter <= 1.001 * error).all()
        ), name
