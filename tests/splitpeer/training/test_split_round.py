"""One step among all parties: what the whole network computes, less what the wire and the defences take."""

from __future__ import annotations

import math

import numpy as np
import torch

from splitpeer.defences.randomness import Release
from splitpeer.defences.stack import make_stack
from splitpeer.models import build_split_network, unet_backbone
from splitpeer.training.loss import region_loss
from splitpeer.training.optimiser import make_optimiser, make_schedule
from splitpeer.training.split_round import Parties, Wire, fused_step, split_round
from splitpeer.training.split_step import Arrays, ClientHalf, CoordinatorHalf
from splitproto.messages import Sample

FEATURES = (4, 4, 4, 4, 4, 4)
MODALITIES = ("flair", "t1")
SAMPLES = (Sample(bytes(16), (0, 0, 0)), Sample(bytes([1]) * 16, (0, 0, 0)))


def parties(**defences: str) -> Parties:
    network = build_split_network(unet_backbone(2, FEATURES), MODALITIES, job_seed=3)

    def stepping(part: torch.nn.Module) -> tuple:
        optimiser = make_optimiser(part.parameters())
        return optimiser, make_schedule(optimiser, "constant", 4)

    channels = unet_backbone(2, FEATURES).cut.channels
    stacks = {
        m: make_stack(written, key=bytes(32), channels=channels, dimensions=2, place="gradients")
        for m, written in defences.items()
    }
    sites = {m: ClientHalf(network.encoders[m], *stepping(network.encoders[m])) for m in MODALITIES}
    return Parties(CoordinatorHalf(network.decoder, *stepping(network.decoder)), sites, stacks)


def batch(step: int) -> tuple[dict[str, np.ndarray], np.ndarray, Release]:
    source = np.random.default_rng(step)
    images = {m: source.standard_normal((2, 1, 32, 32)).astype(np.float32) for m in MODALITIES}
    target = (source.random((2, 3, 32, 32)) < 0.1).astype(np.float32)
    return images, target, Release(bytes(16), "train", step, 0, SAMPLES)


def weights(of: Parties) -> dict[str, torch.Tensor]:
    halves = {**of.sites, "hub": of.coordinator}
    return {
        f"{name}/{key}": tensor.clone()
        for name, half in halves.items()
        for key, tensor in half.network.state_dict().items()
    }


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], start: str = "") -> bool:
    return all(torch.equal(one[name], other[name]) for name in one if name.startswith(start))


def test_it_is_the_step_of_the_whole_network_bit_for_bit() -> None:
    split, whole = parties(), build_split_network(unet_backbone(2, FEATURES), MODALITIES, job_seed=3)
    optimiser = make_optimiser(whole.parameters())
    for step in (1, 2, 3):
        images, target, release = batch(step)
        loss = region_loss(
            whole({m: torch.from_numpy(i) for m, i in images.items()}), torch.from_numpy(target)
        )
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        assert split_round(split, images, target, release, Wire()) == loss.item()
    state = {f"{m}/{k}": t for m in MODALITIES for k, t in whole.encoders[m].state_dict().items()}
    state |= {f"hub/{k}": t for k, t in whole.decoder.state_dict().items()}
    assert same(state, weights(split))


def test_a_site_that_does_not_take_part_counts_on_and_learns_nothing() -> None:
    split = parties()
    before = weights(split)
    images, target, release = batch(1)
    told: list[tuple[str, str]] = []

    class Told(Wire):
        def ordered(self, modality: str) -> None:
            told.append(("ordered", modality))

        def applied(self, modality: str) -> None:
            told.append(("applied", modality))

        def passed_over(self, modality: str) -> None:
            told.append(("passed over", modality))

    split_round(split, {"t1": images["t1"]}, target, release, Told())
    after = weights(split)
    assert same(before, after, "flair/") and not same(before, after, "t1/")
    assert [half.steps_done for half in (*split.sites.values(), split.coordinator)] == [1, 1, 1]
    assert told == [("ordered", "t1"), ("passed over", "flair"), ("applied", "t1")]


def test_where_nobody_takes_part_all_count_on_and_there_is_no_loss() -> None:
    split = parties()
    before = weights(split)
    _, target, release = batch(1)
    assert math.isnan(split_round(split, {}, target, release, Wire()))
    assert same(before, weights(split)) and split.coordinator.steps_done == 1


def test_gradients_are_defended_after_the_decoder_has_learned_and_each_site_apart() -> None:
    images, target, release = batch(1)
    plain, defended = parties(), parties(t1="gaussian:2")
    down: dict[str, dict[str, Arrays]] = {"plain": {}, "defended": {}}

    class Kept(Wire):
        def __init__(self, name: str) -> None:
            self.name = name

        def down(self, modality: str, gradients: Arrays) -> Arrays:
            down[self.name][modality] = gradients
            return gradients

    for name, of in (("plain", plain), ("defended", defended)):
        split_round(of, images, target, release, Kept(name))
    one, other = weights(plain), weights(defended)
    assert same(one, other, "hub/") and same(one, other, "flair/") and not same(one, other, "t1/")
    assert np.array_equal(down["plain"]["flair"]["x0"], down["defended"]["flair"]["x0"])
    assert not np.array_equal(down["plain"]["t1"]["x0"], down["defended"]["t1"]["x0"])


def test_the_coordinator_alone_makes_its_part() -> None:
    split = parties()
    images, target, release = batch(1)
    arrived = {m: split.sites[m].forward(images[m]) for m in MODALITIES}
    loss, gradients = fused_step(split.coordinator, arrived, target, release, MODALITIES, {})
    assert math.isfinite(loss) and gradients.keys() == set(MODALITIES)
    assert split.coordinator.steps_done == 1 and split.sites["t1"].steps_done == 0
