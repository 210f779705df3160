"""Frozen encoders where patients lack seats and two hospitals fill one: to the bit of one process, scores included."""

from __future__ import annotations

import pytest
import torch

from .gaps import HUB, FrozenWhole, cast, losses, weights, who


@pytest.mark.parametrize("fusion", ["concat", "mean"])
async def test_the_decoder_and_its_scores_are_those_of_one_process(scene, fusion: str) -> None:
    """SP-11.17-1: also of steps and predictions without a seat, and of patients who have one seat only."""
    cast(
        scene,
        model={"fusion": fusion},
        data={"window": [48, 48], "validation": 2, "augment": False},
        training={"encoders": "frozen", "steps": 12, "batch": 3, "seat_dropout": 0.6, "checkpoint_every": 6},
        evaluation={"overlap": 0.0, "batch": 7, "missing": True},
    )
    ran = await scene.together(only=who())
    assert ran.error is None and ran.result.complete, ran
    whole = FrozenWhole(scene).train()
    assert losses(scene) == whole.losses
    assert any(whole.without), "a seat sat out"
    found, decoder = weights(scene, HUB, 12), whole.decoder.state_dict()
    assert [name for name in decoder if not torch.equal(decoder[name], found[name])] == []
    result = ran.result
    assert result.dice == whole.dice()
    assert result.missing == {seat: whole.missing(seat) for seat in whole.seats}
    assert result.made_from == whole.seats
    assert result.scored == len(whole.held_out)
    assert result.scored_complete == len(set(whole.held_out) & set(whole.complete())) < result.scored
