"""benchmarks/codings.py: what is compared, and which pair is the best."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import codings
import numpy as np
import pytest
import torch

from splitpeer.defences.randomness import Release
from splitpeer.models import build_split_network, unet_backbone
from splitpeer.training.forms import Forms, WireForm
from splitpeer.training.optimiser import make_optimiser, make_schedule
from splitpeer.training.split_round import Parties, Place, split_round
from splitpeer.training.split_step import ClientHalf, CoordinatorHalf
from splitproto.records import Sample

WIDTHS = (2, 2, 4, 4, 8, 2)
SHAPES = {f"x{level}": (width, 32 >> level, 32 >> level) for level, width in enumerate(WIDTHS[:5])}


def parties() -> Parties:
    network = build_split_network(unet_backbone(2, WIDTHS), ("t1",), job_seed=3)
    half = []
    for module, of in ((network.encoders["t1"], ClientHalf), (network.decoder, CoordinatorHalf)):
        optimiser = make_optimiser(module.parameters(), "sgd", 0.1, 0.0)
        half.append(of(module, optimiser, make_schedule(optimiser, "constant", 9)))
    return Parties(half[1], {Place("t1", "t1"): half[0]})


def weights_after_a_step(forms: Forms | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the encoder and the decoder."""
    every = parties()
    draw = np.random.default_rng(5)
    image = draw.normal(size=(2, 1, 32, 32)).astype(np.float32)
    target = (draw.random((2, 3, 32, 32)) > 0.9).astype(np.float32)
    release = Release(b"", "train", 1, 0, (Sample(bytes(16), (0, 0, 0)), Sample(bytes(16), (0, 0, 0))))
    split_round(every, {Place("t1", "t1"): image}, target, release, forms=forms)
    halves = (every.sites[Place("t1", "t1")], every.coordinator)
    of_encoder, of_decoder = (
        torch.cat([p.detach().flatten() for p in half.network.parameters()]) for half in halves
    )
    return of_encoder, of_decoder


def test_a_step_is_made_from_what_the_receiver_reads() -> None:
    """Coded activations change both halves, coded gradients the encoder only."""
    plain, coded = WireForm("f32", SHAPES), WireForm("int4", SHAPES)
    encoder, decoder = weights_after_a_step(None)
    for forms, changed in (
        (Forms(plain, plain), (False, False)),
        (Forms(coded, plain), (True, True)),
        (Forms(plain, coded), (True, False)),
    ):
        after = weights_after_a_step(forms)
        found = tuple(
            not torch.equal(one, other) for one, other in zip(after, (encoder, decoder), strict=True)
        )
        assert found == changed, forms


def test_octets_of_a_step(tmp_path: Path) -> None:
    """A byte for each value and two for each 64: (64 + 2) / 256 of float32's, as levels are multiples of 64."""

    def octets(form: str) -> int:
        return codings.octets_of(codings.Training(form, form, 7, 8, 1, 10), tmp_path)

    assert octets("int8") / octets("f32") == pytest.approx(66 / 256, rel=1e-4)
    assert octets("int4") / octets("f32") == pytest.approx(34 / 256, rel=1e-3)
    # The two deepest levels hold 6 % of the values, and a list gives them 16 bits in one direction.
    mixed = codings.octets_of(codings.Training("int4 int4 int4 f16 f16", "int4", 7, 8, 1, 10), tmp_path)
    values = [width * (96 >> level) ** 2 for level, width in enumerate((32, 32, 64, 128, 256))]
    share = sum(values[3:]) / sum(values)
    assert mixed / octets("f32") == pytest.approx(34 / 256 + share * (1 / 2 - 34 / 256) / 2, rel=1e-3)


@pytest.mark.parametrize(
    ("dice", "best", "met"),
    [
        ({"f32 / f32": [0.80, 0.82], "int8 / int8": [0.80, 0.812], "int4 / int4": [0.70, 0.70]}, "int8 / int8", True),
        ({"f32 / f32": [0.80, 0.82], "int8 / int8": [0.79, 0.79], "bf16 / bf16": [0.81, 0.81]}, "bf16 / bf16", False),
        ({"f32 / f32": [0.80, 0.82], "int8 / int8": [0.79, 0.79]}, "no pair", False),
        ({"f32 / f32": [0.80, 0.82], "int8 / int8": [0.84, 0.805], "bf16 / bf16": [0.8, 0.82]}, "bf16 / bf16", False),
    ],
)  # fmt: skip
def test_the_smallest_pair_that_loses_little(dice: dict[str, list[float]], best: str, met: bool) -> None:
    octets = {"f32 / f32": 1000, "bf16 / bf16": 500, "int8 / int8": 258, "int4 / int4": 133}
    found: dict[str, Any] = {"dice": dice, "octets": octets, "ms": {}}
    *_, line = codings.rows(found)
    assert best in line.found and line.met is met
