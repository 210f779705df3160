"""NVFlare and Flower beside splitproto: tensors, small requests, and the same small split trainings.

    benchmarks/peers.py --nvflare-python /somewhere/nvflare/bin/python --flower-python /somewhere/flower/bin/python

Each of them has an environment of its own (README.md says how to make it), named here or in NVFLARE_PYTHON and
FLOWER_PYTHON; what is not named is not measured. All parties are processes on this machine, over TLS on loopback with
the same certificates, one thread each. NVFlare and splitproto take turns. Flower, whose steps take seconds, has a turn
of its own, and so have splitproto's daemons, which train a U-Net of the same size on a phantom as in production.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AsyncExitStack, ExitStack
from pathlib import Path
from typing import Any

import latency
import throughput
import tiny
import tiny_links
from peer_processes import NVFlare, flower, versions
from rows import Found, Line, at_least, at_most, ratios, spread
from soak import Soak
from working import MIB, WAIT_S, begin, certificates

from splitproto.allocator import keep_freed_memory

WAYS = ("tensors", "stream", "message")
"""NVFlare's, as nvflare_peer.py describes them."""
MLP, UNET = "mlp", "unet"
KINDS = (MLP, UNET)
FIRST = 5
"""Losses that are compared."""
WARM = 30
"""Steps of the daemons that do not count."""
DAEMONS_S = 120.0
INSTALL = "not measured: README.md says how to install it"

ABOUT = (
    "Other frameworks, in environments of their own. NVFlare's cells (F3, mutual TLS over TCP) move tensors in three "
    "ways:",
    "`tensors` (torch tensors, as its jobs send them), `stream` (octets, in chunks) and `message` (octets, at once). "
    "Targets are for",
    "the fastest. All train the same halves on the same data, and find the same losses. Most of a step of the MLP is "
    "transport; of one",
    "of the U-Net most is computing.",
)


# --- in turns with NVFlare -----------------------------------------------------------------------------------------


def tensors(folder: Path, nvflare: NVFlare, rounds: int, mib: int) -> Found:
    """MiB/s and CPU seconds per GiB, by case and transport."""
    found: Found = {}
    with ExitStack() as stack:
        ours, own_cpu = throughput.start("splitproto", folder, stack)
        for case, shapes in throughput.CASES.items():
            times = max(1, mib * MIB // throughput.nbytes(shapes))
            moved = times * throughput.nbytes(shapes) / MIB
            named = {f"x{n}": shape for n, shape in enumerate(shapes)}

            def own(case: str = case, times: int = times) -> None:
                ours.fetch(case, times)

            turns: dict[str, tuple[Callable[[], object], Callable[[], float]]] = {
                "splitproto": (own, own_cpu)
            }
            for way in WAYS:

                def theirs(way: str = way, times: int = times, named: Any = named) -> None:
                    nvflare.order("fetch", way=way, shapes=named, times=times)

                turns[way] = (theirs, nvflare.cpu)
            found[case] = {name: {"rates": [], "costs": []} for name in turns}
            for turn in range(rounds + 1):
                for name, (fetch, cpu) in turns.items():
                    began, spent = time.perf_counter(), cpu()
                    fetch()
                    took, spent = time.perf_counter() - began, cpu() - spent
                    if turn:  # the first round warms up
                        found[case][name]["rates"].append(moved / took)
                        found[case][name]["costs"].append(spent / moved * 1024)
    return found


async def requests(folder: Path, nvflare: NVFlare, rounds: int, count: int) -> Found:
    """Milliseconds of a small request and its answer: p50 and p99 of each round, by transport."""
    found: Found = {name: {"p50": [], "p99": []} for name in ("splitproto", *WAYS[1:])}
    async with latency.listener(folder) as door:
        with latency.process(latency.site, folder, latency.port_of(door)):
            session = await door.accept(WAIT_S)
            await begin(session)
            for turn in range(rounds + 1):
                asked = {"splitproto": [(await latency.ask(session))[0] for _ in range(count)]}
                for way in WAYS[1:]:
                    answer = nvflare.order("ask", way=way, requests=count, octets=latency.OCTETS)
                    asked[way] = answer["waits"]
                if turn:
                    for name, waits in asked.items():
                        quantiles = statistics.quantiles(waits, n=100)
                        found[name]["p50"].append(1e3 * quantiles[49])
                        found[name]["p99"].append(1e3 * quantiles[98])
            await session.close("complete")
    return found


async def trainings(folder: Path, nvflare: NVFlare | None, rounds: int, steps: int) -> Found:
    """Steps a second, and the first losses, by kind and transport."""
    found: Found = {}
    async with AsyncExitStack() as stack:
        for kind in KINDS:
            ours = await stack.enter_async_context(tiny_links.training(folder, kind))
            found[kind] = {
                name: {"rates": [], "losses": []} for name in ("splitproto", *(WAYS if nvflare else ()))
            }
            for turn in range(rounds + 1):
                for name, row in found[kind].items():
                    if nvflare is None or name == "splitproto":
                        took, losses = await ours.train(steps)
                    else:
                        answer = nvflare.order("train", way=name, kind=kind, steps=steps)
                        took, losses = answer["seconds"], answer["losses"]
                    if turn:
                        row["rates"].append(steps / took)
                    else:
                        row["losses"] = losses[:FIRST]
    return found


# --- on their own ------------------------------------------------------------------------------------------------


def daemons(folder: Path, steps: int) -> float:
    """Steps a second of the U-Net by `splitpeer serve`: two sites and a coordinator, images from NIfTI, all records."""
    soak = Soak(folder, tuple(tiny.SITES.values()), {})
    soak.set_up()

    def until(wanted: int) -> tuple[int, float]:
        """(a step from `wanted` on, when it was made)."""
        ends = time.monotonic() + DAEMONS_S
        while (step := soak.progress()[0]) < wanted:
            soak.check()
            if time.monotonic() > ends:
                raise SystemExit(f"the daemons did not reach step {wanted} within {DAEMONS_S:.0f} s")
            time.sleep(0.02)
        return step, time.perf_counter()

    with soak.running():
        first, began = until(WARM)
        last, ended = until(first + steps)
    return (last - first) / (ended - began)


# --- figures -----------------------------------------------------------------------------------------------------


def fastest(row: Found, key: str = "rates") -> str:
    """The way of NVFlare with the highest median rate; of waits, the lowest."""
    ways = [way for way in WAYS if way in row]
    medians = {way: statistics.median(row[way][key]) for way in ways}
    return max(ways, key=lambda way: medians[way] if key == "rates" else -medians[way])


def told(row: Found, key: str, digits: int) -> str:
    """All ways of NVFlare."""
    return ", ".join(f"`{way}` {spread(row[way][key], digits)}" for way in WAYS if way in row)


def rows(found: Found) -> Iterator[Line]:
    """Ratios of one round where both took turns; of medians elsewhere."""
    for name in ("nvflare", "flower"):
        about = found[name]
        said = ", ".join(f"{library} {version}" for library, version in about.items()) if about else INSTALL
        yield Line({"nvflare": "NVFlare", "flower": "Flower"}[name], "", said, None)
    for case, row in found.get("tensors", {}).items():
        best = fastest(row)
        ours = row["splitproto"]["rates"]
        yield Line(f"{case}: NVFlare", "", f"{told(row, 'rates', 0)} MiB/s", None)
        yield at_least(f"{case}: rate / rate of NVFlare's `{best}`", ratios(ours, row[best]["rates"]), 5)
        if best != "tensors":
            ratio = spread(ratios(ours, row["tensors"]["rates"]))
            yield Line(f"{case}: rate / rate of NVFlare's `tensors`", "", ratio, None)
        costs = ratios(row["splitproto"]["costs"], row[best]["costs"])
        yield Line(f"{case}: CPU / CPU of NVFlare's `{best}`", "", spread(costs), None)
    if asked := found.get("requests"):
        best = fastest(asked, "p50")
        for key in ("p50", "p99"):
            ours = f"splitproto {spread(asked['splitproto'][key])}"
            yield Line(f"small request and its answer, {key}", "", f"{ours}, {told(asked, key, 2)} ms", None)
        yield at_most(
            f"p50 / p50 of NVFlare's `{best}`", ratios(asked["splitproto"]["p50"], asked[best]["p50"]), 0.5
        )
    yield from training_rows(found["training"], found.get("daemons", []))


def training_rows(training: Found, product: Sequence[float]) -> Iterator[Line]:
    """Steps a second."""
    names = {MLP: "MLP, 2 sites", UNET: "small U-Net, 2 sites"}
    for kind, row in training.items():
        what, ours = names[kind], row["splitproto"]["rates"]
        yield Line(f"{what}: splitproto's links", "", f"{spread(ours, 1)} steps/s", None)
        if WAYS[0] in row:
            best = fastest(row)
            yield Line(f"{what}: NVFlare's cells", "", f"{told(row, 'rates', 1)} steps/s", None)
            over = ratios(ours, row[best]["rates"])
            yield at_least(f"{what}: steps/s / those of NVFlare's `{best}`", over, 5)
        if "flower" in row:
            theirs = row["flower"]["rates"]
            yield Line(f"{what}: Flower", "", f"{spread(theirs, 3)} steps/s", None)
            # Bare links beside daemons: the target is for daemons, below.
            over = [rate / statistics.median(theirs) for rate in ours]
            yield Line(f"{what}: steps/s / those of Flower", "", spread(over, 0), None)
    if product:
        yield Line(f"{names[UNET]}: splitproto's daemons", "", f"{spread(product, 1)} steps/s", None)
        if "flower" in training[UNET]:
            theirs = training[UNET]["flower"]["rates"]
            over = [rate / statistics.median(theirs) for rate in product]
            yield at_least(f"{names[UNET]}: steps/s of daemons / those of Flower", over, 100, digits=0)


def same_losses(training: Found) -> None:
    """Raises SystemExit: a transport found other losses, so it did not train the same."""
    for kind, row in training.items():
        for name, one in row.items():
            for own, other in zip(row["splitproto"]["losses"], one["losses"], strict=False):
                if abs(own - other) > 1e-5 * abs(own):
                    raise SystemExit(f"{kind} over {name}: loss {other}, over splitproto {own}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--nvflare-python", default=os.environ.get("NVFLARE_PYTHON"))
    parser.add_argument("--flower-python", default=os.environ.get("FLOWER_PYTHON"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--mib", type=int, default=64, help="moved per transport, case and round")
    parser.add_argument("--requests", type=int, default=300, help="per transport and round")
    parser.add_argument("--steps", type=int, default=60, help="of a training, per transport and round")
    parser.add_argument("--flower-steps", type=int, default=6, help="in all: one takes 5 to 10 s")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    keep_freed_memory()
    found: Found = {
        "units": {
            "rates": "MiB/s, steps/s",
            "costs": "CPU seconds per GiB",
            "p50, p99": "ms",
            "daemons": "steps/s",
        },
        "rounds": given.rounds,
        "nvflare": versions(given.nvflare_python, "nvflare", "torch") if given.nvflare_python else None,
        "flower": versions(given.flower_python, "flwr", "torch") if given.flower_python else None,
    }
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        certificates(folder, ["sender", latency.SITE, *tiny.SITES])
        nvflare = None
        if given.nvflare_python:
            nvflare = stack.enter_context(NVFlare.started(given.nvflare_python, folder))
            found["tensors"] = tensors(folder, nvflare, given.rounds, given.mib)
            found["requests"] = asyncio.run(requests(folder, nvflare, given.rounds, given.requests))
        found["training"] = asyncio.run(trainings(folder, nvflare, given.rounds, given.steps))
        found["daemons"] = [daemons(folder / f"daemons-{turn}", 2 * given.steps) for turn in range(3)]
        if given.flower_python:
            for kind in KINDS:
                figures = flower(given.flower_python, folder / f"flower-{kind}", kind, given.flower_steps)
                found["training"][kind]["flower"] = figures | {"losses": figures["losses"][:FIRST]}
    same_losses(found["training"])
    print(json.dumps(found, indent=1) if given.json else "\n".join(map(str, rows(found))))


if __name__ == "__main__":
    main()
