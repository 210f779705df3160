"""One step among all parties: what the whole network computes, apart from the effect of wire and defences."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from splitpeer.defences.randomness import Release
from splitpeer.defences.stack import Stack, make_stack
from splitpeer.errors import JobFailed
from splitpeer.models import build_decoder, build_encoder, build_split_network, unet_backbone
from splitpeer.training.loss import region_loss
from splitpeer.training.optimiser import make_optimiser, make_schedule
from splitpeer.training.split_round import (
    Parties,
    Place,
    Rows,
    fused_step,
    gathered,
    handed_back,
    split_round,
)
from splitpeer.training.split_step import Arrays, ClientHalf, CoordinatorHalf
from splitproto.records import Sample

FEATURES = (4, 4, 4, 4, 4, 4)
MODALITIES = ("flair", "t1")
PLACES = {m: Place(f"site-{m}", m) for m in MODALITIES}
SAMPLES = (Sample(bytes(16), (0, 0, 0)), Sample(bytes([1]) * 16, (0, 0, 0)))


def parties(**defences: str) -> Parties:
    network = build_split_network(unet_backbone(2, FEATURES), MODALITIES, job_seed=3)

    def stepping(part: torch.nn.Module) -> tuple:
        optimiser = make_optimiser(part.parameters())
        return optimiser, make_schedule(optimiser, "constant", 4)

    channels = unet_backbone(2, FEATURES).cut.channels
    stacks = {
        PLACES[m]: make_stack(written, key=bytes(32), channels=channels, dimensions=2, place="gradients")
        for m, written in defences.items()
    }
    sites = {PLACES[m]: ClientHalf(network.encoders[m], *stepping(network.encoders[m])) for m in MODALITIES}
    return Parties(CoordinatorHalf(network.decoder, *stepping(network.decoder)), sites, stacks)


def batch(step: int) -> tuple[dict[Place, np.ndarray], np.ndarray, Release]:
    source = np.random.default_rng(step)
    images = {PLACES[m]: source.standard_normal((2, 1, 32, 32)).astype(np.float32) for m in MODALITIES}
    target = (source.random((2, 3, 32, 32)) < 0.1).astype(np.float32)
    return images, target, Release(bytes(16), "train", step, 0, SAMPLES)


def weights(of: Parties) -> dict[str, torch.Tensor]:
    halves = {**{place.seat: half for place, half in of.sites.items()}, "hub": of.coordinator}
    return {
        f"{name}/{key}": tensor.clone()
        for name, half in halves.items()
        for key, tensor in half.network.state_dict().items()
    }


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], start: str = "") -> bool:
    return all(torch.equal(one[name], other[name]) for name in one if name.startswith(start))


def hear(split: Parties, verb: str, told: Callable[[Place, Any], object]) -> None:
    """From now on, `told` is given what each encoder is asked by `verb` to work on, before it does."""

    def heard(place: Place, honest: Any, given: Any, *more: Any) -> Any:
        told(place, given)
        return honest(given, *more)

    for place, half in split.sites.items():
        setattr(half, verb, partial(heard, place, getattr(half, verb)))


def test_it_is_the_step_of_the_whole_network_bit_for_bit() -> None:
    split, whole = parties(), build_split_network(unet_backbone(2, FEATURES), MODALITIES, job_seed=3)
    optimiser = make_optimiser(whole.parameters())
    for step in (1, 2, 3):
        images, target, release = batch(step)
        loss = region_loss(
            whole({place.seat: torch.from_numpy(i) for place, i in images.items()}), torch.from_numpy(target)
        )
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        assert split_round(split, images, target, release) == loss.item()
    state = {f"{m}/{k}": t for m in MODALITIES for k, t in whole.encoders[m].state_dict().items()}
    state |= {f"hub/{k}": t for k, t in whole.decoder.state_dict().items()}
    assert same(state, weights(split))


def test_encoders_that_compute_at_once_compute_what_one_after_the_other_does() -> None:
    alone, together = parties(), replace(parties(), threads=2)
    inside: dict[str, set[str]] = {"forward": set(), "backward": set()}
    for verb, names in inside.items():
        hear(together, verb, lambda place, _, names=names: names.add(threading.current_thread().name))
    for step in (1, 2, 3):
        images, target, release = batch(step)
        assert split_round(together, images, target, release) == split_round(alone, images, target, release)
    assert same(weights(alone), weights(together))
    assert all(name.startswith("encoder") for names in inside.values() for name in names)


def test_an_error_of_an_encoder_beside_others_is_raised() -> None:
    split = replace(parties(), threads=2)
    images, target, release = batch(1)

    def bad(*_: object) -> None:
        raise JobFailed("the gradient is not finite")

    split.sites[PLACES["t1"]].backward = bad  # type: ignore[method-assign]
    with pytest.raises(JobFailed, match="not finite"):
        split_round(split, images, target, release)


def test_a_site_that_does_not_take_part_counts_on_and_learns_nothing() -> None:
    split = parties()
    before = weights(split)
    images, target, release = batch(1)
    told: list[tuple[str, str]] = []
    hear(split, "forward", lambda place, _: told.append(("ordered", place.site)))
    hear(split, "advance", lambda place, _: told.append(("passed over", place.site)))
    hear(split, "backward", lambda place, _: told.append(("applied", place.site)))
    split_round(split, {PLACES["t1"]: images[PLACES["t1"]]}, target, release)
    after = weights(split)
    assert same(before, after, "flair/") and not same(before, after, "t1/")
    assert [half.steps_done for half in (*split.sites.values(), split.coordinator)] == [1, 1, 1]
    assert told == [("ordered", "site-t1"), ("passed over", "site-flair"), ("applied", "site-t1")]


def test_where_nobody_takes_part_all_count_on_and_there_is_no_loss() -> None:
    split = parties()
    before = weights(split)
    _, target, release = batch(1)
    assert math.isnan(split_round(split, {}, target, release))
    assert same(before, weights(split)) and split.coordinator.steps_done == 1


def test_gradients_are_defended_after_the_decoder_has_learned_and_each_site_apart() -> None:
    images, target, release = batch(1)
    plain, defended = parties(), parties(t1="gaussian:2")
    down: dict[str, dict[str, Arrays]] = {"plain": {}, "defended": {}}
    for name, of in (("plain", plain), ("defended", defended)):
        hear(of, "backward", lambda place, heard, into=down[name]: into.update({place.seat: heard}))
        split_round(of, images, target, release)
    one, other = weights(plain), weights(defended)
    assert same(one, other, "hub/") and same(one, other, "flair/") and not same(one, other, "t1/")
    assert np.array_equal(down["plain"]["flair"]["x0"], down["defended"]["flair"]["x0"])
    assert not np.array_equal(down["plain"]["t1"]["x0"], down["defended"]["t1"]["x0"])


def test_the_coordinator_alone_makes_its_part() -> None:
    split = parties()
    images, target, release = batch(1)
    arrived = {place: half.forward(images[place]) for place, half in split.sites.items()}
    loss, gradients = fused_step(split.coordinator, arrived, target, release, {})
    assert math.isfinite(loss) and gradients.keys() == set(PLACES.values())
    assert split.coordinator.steps_done == 1 and split.sites[PLACES["t1"]].steps_done == 0


# --- seats that several sites fill, and samples that nobody has ---------------------------------------------

NORTH, SOUTH, EAST = Place("north", "t1"), Place("south", "t1"), Place("east", "flair")
FIVE = tuple(Sample(bytes([i]) * 16, (0, 0, 0)) for i in range(5))
GAPS = {NORTH: Rows((0, 3)), SOUTH: Rows((0, 1), frozenset({0})), EAST: Rows((1, 2, 3))}
"""Sample 0 is at both hospitals and the first fills it; 2 has no t1, 0 no flair, and 4 nobody has."""


class Grouped:
    """The same in one process: an encoder for each site, and rows that autograd itself scatters."""

    def __init__(self, fusion: str) -> None:
        cut = unet_backbone(2, FEATURES)
        self.encoders = {place: build_encoder(cut, seed=n) for n, place in enumerate(GAPS)}
        self.decoder = build_decoder(cut, MODALITIES, fusion, seed=9)
        self.optimisers = [make_optimiser(n.parameters()) for n in (*self.encoders.values(), self.decoder)]
        self.fusion = fusion

    def step(self, images: dict[Place, np.ndarray], target: np.ndarray) -> float:
        seats: dict[str, dict[str, torch.Tensor]] = {}
        held = {seat: torch.zeros(5) for seat in MODALITIES}
        for place, rows in GAPS.items():
            used = [i for i, sample in enumerate(rows.samples) if sample not in rows.ignored]
            into = torch.tensor([rows.samples[i] for i in used])
            held[place.seat][into] = 1
            for name, sent in self.encoders[place](torch.from_numpy(images[place])).items():
                empty = seats.setdefault(place.seat, {}).get(name)
                empty = torch.zeros(5, *sent.shape[1:]) if empty is None else empty
                seats[place.seat][name] = empty.index_add(0, into, sent[used])
        fused = {}
        for level, name in enumerate(sorted(seats["t1"])):
            both = [seats[seat][name] for seat in MODALITIES]
            count = sum(held.values()).clamp(min=1).view(-1, 1, 1, 1)
            fused[level] = torch.cat(both, 1) if self.fusion == "concat" else (both[0] + both[1]) / count
        loss = region_loss(self.decoder.decode(fused), torch.from_numpy(target))
        loss.backward()
        for optimiser in self.optimisers:
            optimiser.step()
            optimiser.zero_grad()
        return loss.item()


def with_gaps(fusion: str, **defended: Stack) -> Parties:
    cut = unet_backbone(2, FEATURES)

    def stepping(part: torch.nn.Module) -> tuple:
        optimiser = make_optimiser(part.parameters())
        return part, optimiser, make_schedule(optimiser, "constant", 4)

    sites = {p: ClientHalf(*stepping(build_encoder(cut, seed=n))) for n, p in enumerate(GAPS)}
    hub = CoordinatorHalf(*stepping(build_decoder(cut, MODALITIES, fusion, seed=9)))
    return Parties(hub, sites, {place: defended[place.site] for place in GAPS if place.site in defended})


def five(step: int) -> tuple[dict[Place, np.ndarray], np.ndarray, Release]:
    source = np.random.default_rng(step)
    images = {
        place: source.standard_normal((len(rows.samples), 1, 32, 32)).astype(np.float32)
        for place, rows in GAPS.items()
    }
    target = (source.random((5, 3, 32, 32)) < 0.1).astype(np.float32)
    return images, target, Release(bytes(16), "train", step, 0, FIVE)


@pytest.mark.parametrize("fusion", ["concat", "mean"])
def test_with_gaps_it_is_the_same_grouping_in_one_process_bit_for_bit(fusion: str) -> None:
    split, whole = with_gaps(fusion), Grouped(fusion)
    for step in (1, 2, 3):
        images, target, release = five(step)
        loss = split_round(split, images, target, release, rows=GAPS)
        assert loss == whole.step(images, target), step
    for place, half in split.sites.items():
        state = half.network.state_dict()
        assert all(torch.equal(state[k], t) for k, t in whole.encoders[place].state_dict().items()), place
    state = split.coordinator.network.state_dict()
    assert all(torch.equal(state[k], t) for k, t in whole.decoder.state_dict().items())


def test_a_mean_counts_what_each_sample_has() -> None:
    decoder = build_decoder(unet_backbone(2, FEATURES), MODALITIES, "mean", seed=9)
    held = torch.tensor([True, False, True])
    sent = {"t1": torch.ones(3, 4, 2, 2), "flair": 3 * held.view(3, 1, 1, 1).expand(3, 4, 2, 2)}
    mean = decoder._fuse({s: {"x0": t} for s, t in sent.items()}, "x0", MODALITIES, {"flair": held})
    assert [sample.unique().item() for sample in mean] == [2, 1, 2]
    nobody = decoder._fuse(
        {s: {"x0": torch.zeros(1, 4, 2, 2)} for s in sent}, "x0", MODALITIES, dict.fromkeys(sent, held[1:2])
    )
    assert not nobody.any()


def test_rows_of_a_seat_come_together_and_part_again() -> None:
    sent = {
        p: {"x0": np.full((len(r.samples), 1), n, np.float32)} for n, (p, r) in enumerate(GAPS.items(), 1)
    }
    seats, have = gathered(sent, GAPS, 5)
    assert seats["t1"]["x0"][:, 0].tolist() == [1, 2, 0, 1, 0]
    assert seats["flair"]["x0"][:, 0].tolist() == [0, 3, 3, 3, 0]
    assert have["t1"].tolist() == [True, True, False, True, False]
    back = {"x0": np.arange(10, 15, dtype=np.float32)[:, None]}
    assert handed_back(back, GAPS[NORTH], 5)["x0"][:, 0].tolist() == [10, 13]
    assert handed_back(back, GAPS[SOUTH], 5)["x0"][:, 0].tolist() == [0, 11], "another fills sample 0"


def test_what_is_whole_is_not_copied() -> None:
    array = np.ones((2, 1), np.float32)
    seats, have = gathered({NORTH: {"x0": array}}, {NORTH: Rows((0, 1))}, 2)
    assert seats["t1"]["x0"] is array and have == {}
    assert handed_back({"x0": array}, Rows((0, 1)), 2)["x0"] is array
    parts = {NORTH: {"x0": array[:1]}, SOUTH: {"x0": array[1:]}}
    assert gathered(parts, {NORTH: Rows((0,)), SOUTH: Rows((1,))}, 2)[1] == {}, "nobody lacks it"


def test_a_site_of_two_seats_learns_at_the_seat_that_takes_part() -> None:
    """SP-11-37: it sends both and is sent gradients for one."""
    plain = with_gaps("concat")
    west = {Place("west", place.seat): half for place, half in plain.sites.items() if place != SOUTH}
    split = Parties(plain.coordinator, west)
    before = {place: {k: t.clone() for k, t in h.network.state_dict().items()} for place, h in west.items()}
    images, target, release = batch(1)
    down: list[str] = []
    hear(split, "backward", lambda place, _: down.append(place.seat))
    shown = {Place("west", place.seat): image for place, image in images.items()}
    left = west[Place("west", "t1")]
    mean = {name: array / 2 for name, array in left.weights().items()}
    saved = left.state()
    left.take(mean)
    split_round(split, shown, target, release, left_out={"t1"})
    assert down == ["flair"]
    steps = {half.steps_done for half in west.values()}
    # SP-11.16-6: the seat that is left out continues from its average, as over a network.
    assert all(np.array_equal(array, mean[name]) for name, array in left.weights().items())
    left.load(*saved)
    changed = {p.seat: not same(before[p], dict(h.network.state_dict())) for p, h in west.items()}
    assert changed == {"t1": False, "flair": True}
    assert steps == {1}


def test_a_site_whose_samples_another_fills_counts_on() -> None:
    split = with_gaps("concat")
    images, target, release = five(1)
    rows = {**GAPS, SOUTH: Rows((0, 3), frozenset({0, 3}))}
    arrived = {place: half.forward(images[place]) for place, half in split.sites.items()}
    _, gradients = fused_step(split.coordinator, arrived, target, release, {}, rows=rows)
    assert gradients.keys() == {NORTH, EAST}


def test_gradients_of_a_part_are_defended_with_its_own_samples_and_masks() -> None:
    seen: list[Release] = []

    class Seen(Stack):
        def __call__(self, tensors, release):  # type: ignore[no-untyped-def]
            seen.append(release)
            return super().__call__(tensors, release)

    stack = make_stack(
        "gaussian:2",
        key=bytes(32),
        channels=unet_backbone(2, FEATURES).cut.channels,
        dimensions=2,
        place="gradients",
    )
    stack.__class__ = Seen
    images, target, release = five(1)
    split_round(with_gaps("concat", east=stack), images, target, release, rows=GAPS)
    (told,) = seen
    assert told.samples == FIVE[1:4] and np.array_equal(told.target, target[1:4])
