"""Run as each rank, by `test_halves.py`: rank 0 makes the same steps with all ranks and alone, and compares.

`python stepping.py NETWORK FUSION` under torchrun's variables; rank 0 prints one JSON object.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field

import numpy as np
import torch

from splitpeer.errors import JobFailed
from splitpeer.models import build_decoder, build_encoder, make_backbone
from splitpeer.ranks.group import Ranks
from splitpeer.ranks.halves import FollowingHalf, LeadingHalf
from splitpeer.ranks.torchrun import own_rank
from splitpeer.training.loss import loss_gradient
from splitpeer.training.optimiser import make_optimiser, make_schedule
from splitpeer.training.split_step import CoordinatorHalf

SEATS = ("flair", "t1")
BATCH, SIDE = 3, 64
RATE = 0.01


def half(kind, network: str, settings: dict, fusion: str) -> CoordinatorHalf:
    backbone = make_backbone(network, 2, settings)
    exclusive = fusion == "mean"
    decoder = build_decoder(backbone, SEATS, fusion, 3 + exclusive, exclusive=exclusive, seed=5)
    optimiser = make_optimiser(decoder.parameters(), "sgd", RATE)
    return kind(decoder, optimiser, make_schedule(optimiser, "cosine", 8), exclusive=exclusive)


def arrived(network: str, settings: dict, number: int):
    """Activations as encoders send them, a target of disjoint regions, and who has t1."""
    backbone, source = make_backbone(network, 2, settings), np.random.default_rng(number)
    images = torch.from_numpy(source.standard_normal((BATCH, 1, SIDE, SIDE)).astype(np.float32))
    with torch.no_grad():
        sent = {
            seat: {name: level.numpy() for name, level in build_encoder(backbone, seed=n)(images).items()}
            for n, seat in enumerate(SEATS)
        }
    has = np.array([True, False, True])
    for level in sent["t1"].values():
        level[~has] = 0
    regions = source.integers(0, 8, (BATCH, 1, SIDE, SIDE)) == np.arange(1, 4).reshape(1, 3, 1, 1)
    return sent, regions.astype(np.float32), {"t1": has}


@dataclass
class Compared:
    """The largest difference between all ranks and one, by what it is of; relative to the largest value of its kind."""

    found: dict[str, float] = field(default_factory=dict)

    def note(self, what: str, all_ranks, alone) -> None:
        a, b = np.asarray(all_ranks, np.float64), np.asarray(alone, np.float64)
        assert a.shape == b.shape, what
        difference = float(np.abs(a - b).max() / max(np.abs(b).max(), 1e-30))
        self.found[what] = max(self.found.get(what, 0.0), difference)

    def gradients(self, all_ranks, alone) -> None:
        assert all_ranks.keys() == alone.keys()
        for seat, levels in alone.items():
            for name, level in levels.items():
                self.note("gradients of activations", all_ranks[seat][name], level)

    def weights(self, all_ranks: CoordinatorHalf, alone: CoordinatorHalf) -> None:
        """Together: the gradient of a bias before a norm is nothing but roundings."""
        assert all_ranks.steps_done == alone.steps_done
        both = [one.network.state_dict() for one in (all_ranks, alone)]
        self.note("weights", *(torch.cat([tensor.flatten() for tensor in one.values()]) for one in both))


def compare(
    shared: CoordinatorHalf, alone: CoordinatorHalf, network: str, settings: dict
) -> dict[str, float]:
    compared = Compared()
    start = alone.state()
    for step in range(4):
        sent, target, have = arrived(network, settings, step)
        have = have if step else None
        if step == 2:
            # A step that is not made: the loss is NaN, and the ranks have a forward pass that leads nowhere.
            spoilt = {
                seat: {n: level * np.nan for n, level in levels.items()} for seat, levels in sent.items()
            }
            for one in (shared, alone):
                try:
                    one.step(spoilt, target, (), have)
                except JobFailed:
                    continue
                raise AssertionError("a loss of NaN was taken")
        losses, gradients = zip(*(one.step(sent, target, (), have) for one in (shared, alone)), strict=True)
        compared.note("loss", *losses)
        compared.gradients(*gradients)
        compared.weights(shared, alone)
    # From a feature bank: nothing goes back to sites. Without a seat, as where its site is away.
    sent, target, _ = arrived(network, settings, 9)
    only = {"flair": sent["flair"]}
    compared.note("loss", *(one.learn(only, target, ("t1",)) for one in (shared, alone)))
    compared.weights(shared, alone)
    for one in (shared, alone):
        one.advance(6)
    # Labels at a site; predictions of a batch that is shared, and of one that is too small, while a step is pending.
    logits = [one.decode(sent) for one in (shared, alone)]
    compared.note("logits", *logits)
    compared.note("predictions", *(one.predict(sent) for one in (shared, alone)))
    first = {seat: {n: level[:1] for n, level in levels.items()} for seat, levels in sent.items()}
    compared.note("predictions", *(one.predict(first) for one in (shared, alone)))
    for one in (shared, alone):
        # A gradient that overflows on its way: every rank has summed it, and none may apply it.
        try:
            one.apply(np.full_like(logits[0], 3e38))
        except JobFailed:
            one.decode(sent)
            continue
        raise AssertionError("a gradient with NaN or infinity was taken")
    exclusive = logits[0].shape[1] > target.shape[1]
    back = [loss_gradient(one, target, exclusive=exclusive)[1] for one in logits]
    compared.gradients(*(one.apply(seed) for one, seed in zip((shared, alone), back, strict=True)))
    compared.weights(shared, alone)
    # A rollback, with momentum, and a step from there.
    for one in (shared, alone):
        one.load(*start)
    sent, target, have = arrived(network, settings, 0)
    compared.note("loss", *(one.step(sent, target)[0] for one in (shared, alone)))
    compared.weights(shared, alone)
    return compared.found


def moved(network: str, settings: dict, fusion: str) -> dict[str, float]:
    """What the same steps make of one rounding, up or down, of each weight: the kernels of this processor decide."""
    one, other = (half(CoordinatorHalf, network, settings, fusion) for _ in range(2))
    source = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in one.network.parameters():
            weight *= 1 + torch.finfo(torch.float32).eps * (
                torch.randint(2, weight.shape, generator=source) - 0.5
            )
    return compare(one, other, network, settings)


def main(network: str, settings: dict, fusion: str) -> None:
    torch.set_num_threads(1)
    rank = own_rank()
    assert rank is not None
    with Ranks(rank, 30.0).met("the same") as group:
        if not rank.leads:
            following = half(lambda *a, **k: FollowingHalf(group, *a, **k), network, settings, fusion)
            if rank.number == 1:
                # What it began with does not matter: it is rank 0's from the first step.
                torch.nn.init.normal_(following.network.last.weight)
            while following.follow(30.0):
                pass
            return
        shared = half(lambda *a, **k: LeadingHalf(group, *a, **k), network, settings, fusion)
        found = compare(shared, half(CoordinatorHalf, network, settings, fusion), network, settings)
        shared.beat()
        group.end()
        print(json.dumps([found, moved(network, settings, fusion), group.octets]))


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]), sys.argv[3])
