"""What a step of the coordinator's decoder costs on two ranks, by the same step on one; and what passes between them.

The decoder is the demo's, of four seats. torchrun starts two processes, each of one thread; in turns, both make steps
together by gloo over the loopback interface, and rank 0 makes the same steps alone while the other waits. The
optimiser and the gradients for the sites are part of a step, the wire to the sites is not.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial

import torch
from peer_processes import free_port
from rich.console import Console
from rich.table import Table
from rows import Found, Line, ratios, spread

from splitpeer.demo.federation import SITES, DemoJob
from splitpeer.models import OUT_CHANNELS, build_decoder, unet_backbone
from splitpeer.ranks.group import Ranks
from splitpeer.ranks.halves import FollowingHalf, LeadingHalf
from splitpeer.ranks.torchrun import own_rank
from splitpeer.training.optimiser import make_optimiser, make_schedule
from splitpeer.training.split_step import Arrays, CoordinatorHalf
from splitproto.allocator import keep_freed_memory

WARM_UP = 3
WAIT_S = 300.0
RANKS = 2
CASES = {"slices": (8, (96, 96)), "large slices": (8, (240, 240))}
"""Batch and window."""
MIB = 1 << 20


def made(kind: Callable[..., CoordinatorHalf], widths: tuple[int, ...]) -> CoordinatorHalf:
    decoder = build_decoder(unet_backbone(2, widths), tuple(SITES.values()), "concat", OUT_CHANNELS, seed=1)
    optimiser = make_optimiser(decoder.parameters(), "adam", 1e-3)
    return kind(decoder, optimiser, make_schedule(optimiser, "constant", 10_000))


def batch_of(case: str, widths: tuple[int, ...]) -> tuple[dict[str, Arrays], torch.Tensor]:
    """Activations of all seats, and a target."""
    batch, window = CASES[case]
    torch.manual_seed(0)
    shapes = unet_backbone(2, widths).cut.shapes(batch, window)
    sent = {
        seat: {name: torch.randn(shape).numpy() for name, shape in shapes.items()} for seat in SITES.values()
    }
    return sent, (torch.rand(batch, OUT_CHANNELS, *window) > 0.9).float()


def milliseconds(half: CoordinatorHalf, given: tuple[dict[str, Arrays], torch.Tensor], steps: int) -> float:
    """Of a step."""
    began = time.perf_counter()
    for _ in range(steps):
        half.step(*given)
    return 1000 * (time.perf_counter() - began) / steps


def lead(ranks: Ranks, rounds: int, steps: int, widths: tuple[int, ...]) -> Found:
    found: Found = {}
    shared, alone = made(partial(LeadingHalf, ranks), widths), made(CoordinatorHalf, widths)
    weights = sum(parameter.numel() for parameter in alone.network.parameters())
    for case in CASES:
        given = batch_of(case, widths)
        for half in (shared, alone):
            milliseconds(half, given, WARM_UP)
        before = ranks.octets
        took: dict[str, list[float]] = {"one": [], "two": []}
        for _ in range(rounds):
            took["one"].append(milliseconds(alone, given, steps))
            took["two"].append(milliseconds(shared, given, steps))
        sent = (ranks.octets - before) / (rounds * steps)
        # Two ranks send each other their sums once; float32.
        found[case] = took | {"mib": sent / MIB, "summed_mib": 2 * 4 * weights / MIB}
    ranks.end()
    return found


def as_rank(rounds: int, steps: int) -> None:
    keep_freed_memory()
    torch.set_num_threads(1)
    widths = tuple(DemoJob().toml()["model"]["features"])
    rank = own_rank()
    if rank is None:
        raise SystemExit("torchrun starts this")
    rank.quieten()
    with Ranks(rank, WAIT_S).met("benchmark") as ranks:
        if rank.leads:
            print(json.dumps(lead(ranks, rounds, steps, widths), indent=2))
            return
        half = made(partial(FollowingHalf, ranks), widths)
        while isinstance(half, FollowingHalf) and half.follow(WAIT_S):
            pass


ABOUT = (
    "The coordinator's decoder of four seats, a step of one rank, and the same of two that share the batch by gloo, in",
    "turns; one thread for each rank, so two use both cores. Between them pass activations and their gradients.",
)


def rows(found: Found) -> Iterator[Line]:
    """Steps of two ranks, relative to steps of one."""
    for case, one in found.items():
        batch, window = CASES[case]
        size = "x".join(map(str, window))
        told = f"one {spread(one['one'], 0)} ms, two {spread(one['two'], 0)} ms"
        yield Line(f"decoder step, batch {batch} of {size}", "", told, None)
        by = spread(ratios(one["two"], one["one"]))
        yield Line(f"two ranks / one, batch {batch} of {size}", "", by, None)
        passed = f"{one['mib']:.1f} MiB, and {one['summed_mib']:.1f} MiB of sums of gradients"
        yield Line(f"between two ranks in a step, batch {batch} of {size}", "", passed, None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=4, help="Of each, in a round.")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--as-rank", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.as_rank:
        as_rank(given.rounds, given.steps)
        return
    meet = ("--master-addr", "127.0.0.1", "--master-port", str(free_port()))
    start = ("-m", "torch.distributed.run", "--nproc-per-node", str(RANKS), *meet)
    own = (__file__, "--as-rank", "--rounds", str(given.rounds), "--steps", str(given.steps))
    done = subprocess.run((sys.executable, *start, *own), stdout=subprocess.PIPE, text=True, check=True)
    if given.json:
        print(done.stdout)
        return
    table = Table(title="A step of the decoder on one rank and on two: median (lowest-highest)")
    for heading in ("", "found"):
        table.add_column(heading)
    for line in rows(json.loads(done.stdout)):
        table.add_row(line.what, line.found)
    Console(width=None if sys.stdout.isatty() else 110).print(table)


if __name__ == "__main__":
    main()
