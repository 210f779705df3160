"""What a training step costs in octets, FLOPs and time, and what that means at sizes that nobody has measured.

python benchmarks/cost_model.py             # the tables of docs/scale.md
python benchmarks/cost_model.py --picture docs/scale.png
python benchmarks/cost_model.py --check     # the model beside the figures that are kept in results/speed/
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rows import Found, Line
from torch.utils.flop_counter import FlopCounterMode

from splitpeer.coordinator.turns import GAIN
from splitpeer.models import build_decoder, build_encoder, make_backbone
from splitpeer.training import forms

KEPT = Path(__file__).parent / "results" / "speed"
CODECS = ("f32", "bf16", "int8", "int4")
"""How values travel; f16 takes what bf16 takes."""
TLS = 1 + 22 / 16384
"""Octets with records around them (RFC 8446, 5.2: header, content type, tag)."""
TCP = 1 + 52 / 1448
"""Octets with IP and TCP around them, segments of Ethernet's size."""
GBIT = 1e9
HOSPITALS = 4
VOLUME = (240, 240, 155)
"""Of BraTS."""


@dataclass(frozen=True)
class Job:
    """What the cost of a step depends on."""

    dimensions: int
    window: tuple[int, ...]
    batch: int
    sites: int = HOSPITALS
    codec: str = "f32"
    network: str = "basic-unet"
    settings: tuple[tuple[str, tuple[int, ...]], ...] = ()
    widths: tuple[int, ...] = ()


def values(job: Job) -> int:
    """That one site sends in a step; as many come back."""
    shapes = make_backbone(job.network, job.dimensions, dict(job.settings), widths=job.widths).cut.shapes(
        job.batch, job.window
    )
    return sum(math.prod(shape) for shape in shapes.values())


def octets(job: Job) -> float:
    """Of one direction of the coordinator's link in a step, IP packets."""
    return forms.octets(job.codec, values(job)) * job.sites * TLS * TCP


def flops(job: Job) -> tuple[float, float]:
    """Forward and backward of a step: one site's encoder; fusion and decoder. Counted on torch's meta device."""
    backbone = make_backbone(job.network, job.dimensions, dict(job.settings), widths=job.widths)
    seats = [f"s{number}" for number in range(job.sites)]
    with torch.device("meta"):
        encoder = build_encoder(backbone, seed=0)
        decoder = build_decoder(backbone, seats, seed=0)
        image = torch.empty(job.batch, 1, *job.window)
    counts = []
    with FlopCounterMode(display=False) as counter:
        sent = encoder(image)
        torch.autograd.backward(list(sent.values()), [torch.ones_like(one) for one in sent.values()])
    counts.append(counter.get_total_flops())
    leaves = {
        seat: {name: one.detach().clone().requires_grad_() for name, one in sent.items()} for seat in seats
    }
    with FlopCounterMode(display=False) as counter:
        decoder(leaves).sum().backward()
    counts.append(counter.get_total_flops())
    return float(counts[0]), float(counts[1])


def seconds(compute: float, each_way: float, rate: float, round_trip: float, turns: int = 1) -> float:
    """A step: gradients follow activations, so both directions and one round trip add up.

    Args:
        turns: of how many sites. Activations of all but the last arrive while others still receive gradients.
    """
    return compute + round_trip + (1 + 1 / turns) * 8 * each_way / rate


# --- against measurements -----------------------------------------------------------------------------------------

DEMO = Job(2, (96, 96), 8, settings=(("features", (8, 8, 16, 32, 64, 8)),))
"""The job of step.py and links.py."""


@dataclass(frozen=True)
class Compared:
    """A figure by the model and as measured."""

    what: str
    model: float
    measured: float
    unit: str

    @property
    def error(self) -> float:
        """Of the model, in per cent of what was measured."""
        return 100 * (self.model / self.measured - 1)

    def __str__(self) -> str:
        both = " | ".join(f"{value:.4g} {self.unit}" for value in (self.model, self.measured))
        return f"| {self.what} | {both} | {self.error:+.0f} % |"


def kept(name: str) -> Mapping[str, Any] | None:
    """What a program found last; None: it has not run."""
    path = KEPT / f"{name}.json"
    if not path.exists():
        return None
    found: Mapping[str, Any] = json.loads(path.read_text())["found"]
    return found


def _median(rows: Mapping[str, Sequence[float]], beginning: str) -> float:
    return statistics.median(
        value for name, took in rows.items() if name.startswith(beginning) for value in took
    )


def compared() -> Iterator[Compared]:
    """Whatever of the kept figures the model says something about."""
    if step := kept("step"):
        rows = step["rows"]
        encoder, decoder = flops(DEMO)
        # The rate of one core comes from the whole network in one thread, and from nothing else.
        rate = (DEMO.sites * encoder + decoder) / _median(rows, "whole, 1 thread")
        half = _median(rows, "   coordinator's half, 1")
        yield Compared("coordinator's half of a step", 1e3 * decoder / rate, 1e3 * half, "ms")
        two = 1e3 * (DEMO.sites * encoder / 2 + decoder) / rate
        measured = 1e3 * _median(rows, "four sites, coordinator with 1")
        yield Compared("step, four sites on two cores, without the wire's CPU", two, measured, "ms")
    if links := kept("links"):
        down = statistics.median(one["down"] for one in links["octets"])
        yield Compared("octets from the coordinator in a step", octets(DEMO) / 1e6, down / 1e6, "MB")
        alone = statistics.median(links["loopback"])
        for name, link in links["links"].items():
            model = _linked(DEMO, alone, link)
            yield Compared(f"step, {name}", 1e3 * model, 1e3 * statistics.median(links["steps"][name]), "ms")
        yield from _coded(links, alone)
    if sites := kept("sites"):
        cost = _per_site(sites, "64")
        for count in ("16", "256"):
            model = cost * int(count)
            yield Compared(f"coordinator's CPU in a step of {count} sites, from that of 64", model,
                           _per_site(sites, count) * int(count), "ms")  # fmt: skip


def _linked(job: Job, alone: float, link: Mapping[str, float]) -> float:
    """Seconds of a step over a link of `links.py`, its gradients sent whichever way is faster."""
    at_once, in_turns = (
        seconds(alone, octets(job), link["rate"], link["round_trip_s"], sites) for sites in (1, job.sites)
    )
    return in_turns if in_turns < GAIN * at_once else at_once


def _coded(links: Mapping[str, Any], alone: float) -> Iterator[Compared]:
    """Over links of `links.py`, with its coding; `alone`: seconds of a step without a network."""
    coding, coded = links["coding"], links["coded"]
    job = replace(DEMO, codec=coding)
    down = statistics.median(one["down"] for one in links["coded_octets"])
    yield Compared(f"octets from the coordinator in a step, {coding}", octets(job) / 1e6, down / 1e6, "MB")
    for name, took in coded.items():
        link = links["links"][name]
        model = _linked(job, alone, link)
        yield Compared(f"step, {name}, {coding}", 1e3 * model, 1e3 * statistics.median(took), "ms")


def _per_site(sites: Mapping[str, Any], count: str) -> float:
    return float(statistics.median(one["step_cpu_ms"] for one in sites[count]))


# --- what nobody has measured -------------------------------------------------------------------------------------

TFLOPS = 20.0
"""Assumed of each party's GPU, sustained; in 10**12 a second."""
VOLUMETRIC = Job(3, (128, 128, 128), 1)
NARROW = (1, 1, 2, 4, 8)
"""Channels of a sum, finest level first (docs/private.md)."""
ROUND_TRIP_S = 0.010


def computing(job: Job) -> float:
    """Seconds of a step without a network: sites side by side, then the coordinator."""
    return sum(flops(job)) / TFLOPS / 1e12


def volumetric() -> Iterator[str]:
    """3-D windows of 128^3 at several rates."""
    encoder, decoder = flops(VOLUMETRIC)
    compute = computing(VOLUMETRIC)
    yield f"Encoder {encoder / 1e12:.2f} TFLOP, decoder {decoder / 1e12:.2f} TFLOP, {compute:.2f} s of computing."
    yield ""
    yield "| channels sent | codec | GB each way | 1 Gb/s | 10 Gb/s | 100 Gb/s |"
    yield "|---|---|---|---|---|---|"
    for widths in ((), NARROW):
        for codec in CODECS:
            job = replace(VOLUMETRIC, codec=codec, widths=widths)
            each = octets(job)
            took = [f"{seconds(compute, each, rate * GBIT, ROUND_TRIP_S):.2f} s" for rate in (1, 10, 100)]
            sent = ", ".join(map(str, widths)) or "all: 32, 32, 64, 128, 256"
            yield f"| {sent} | {codec} | {each / 1e9:.3g} | {' | '.join(took)} |"


def draw(path: Path) -> None:
    """A step of 3-D windows by the rate of the coordinator's link, for each codec."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rates = [10 ** (2 + exponent / 20) for exponent in range(61)]  # 100 Mb/s to 100 Gb/s
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    compute = computing(VOLUMETRIC)
    for codec, colour in zip(CODECS, ("#1b1b1b", "#8a8a8a", "#2a6fbb", "#d1602f"), strict=True):
        for widths, style, sent in (((), "-", "all channels"), (NARROW, "--", "1, 1, 2, 4, 8")):
            each = octets(replace(VOLUMETRIC, codec=codec, widths=widths))
            took = [seconds(compute, each, rate * 1e6, ROUND_TRIP_S) for rate in rates]
            axes.plot(rates, took, style, color=colour, label=f"{codec}, {sent}")
    axes.axhline(compute, color="#999999", linewidth=0.8)
    axes.annotate("computing alone", (rates[0], compute), (4, -11), textcoords="offset points", fontsize=8)
    axes.set(xscale="log", yscale="log", xlabel="rate of the coordinator's link", ylabel="seconds a step")
    axes.set_xticks([100, 1000, 10_000, 100_000], ["100 Mb/s", "1 Gb/s", "10 Gb/s", "100 Gb/s"])
    axes.set_yticks([1, 10, 100], ["1", "10", "100"])
    axes.set_title("3-D windows of 128^3, four sites, by the model", loc="left", fontsize=11)
    axes.grid(which="major", color="#dddddd", linewidth=0.6)
    axes.legend(title="codec, channels sent", fontsize=8, title_fontsize=8)
    figure.savefig(path, dpi=110)


def private(patients: int = 1000) -> Iterator[str]:
    """Private mode: each site sends a masked share of every voxel once, as 4 octets a value."""
    yield "| network | MB a patient and site | GB a site | GB at the coordinator, four sites | hours at 1 Gb/s |"
    yield "|---|---|---|---|---|"
    for dimensions in (2, 3):
        per_voxel = sum(width / 2 ** (dimensions * level) for level, width in enumerate(NARROW))
        one = math.prod(VOLUME) * per_voxel * 4 * TLS * TCP
        everything = one * patients * HOSPITALS
        yield (
            f"| {dimensions}-D | {one / 1e6:.1f} | {one * patients / 1e9:.1f} | {everything / 1e9:.0f} | "
            f"{8 * everything / GBIT / 3600:.2f} |"
        )


def many(count: int = 1000) -> Iterator[str]:
    """So many sites in each step, each with the demo's tensors and one sample."""
    yield "| sites | MB each way | seconds at 1 Gb/s, both ways | at 10 Gb/s | CPU s for messages | handshakes, CPU s |"
    yield "|---|---|---|---|---|---|"
    sites = kept("sites") or {}
    if "256" not in sites:
        return
    message = _per_site(sites, "256") / 1e3
    shakes = statistics.median(one["handshakes"] for one in sites["256"])
    each = octets(Job(2, (96, 96), 1, sites=count, settings=DEMO.settings))
    yield (
        f"| {count} | {each / 1e6:.0f} | {16 * each / GBIT:.2f} | {1.6 * each / GBIT:.2f} | {message * count:.2f} | "
        f"{count / shakes:.1f} |"
    )


ABOUT = (
    "What a model of octets, FLOPs and round trips says (docs/scale.md), beside the figures that the other programs "
    "found last.",
)


def rows(found: Found) -> Iterator[Line]:
    """The error of the model; no target."""
    for one in found["compared"]:
        it = Compared(**one)
        told = (
            f"{it.model:.4g} {it.unit} by the model, {it.measured:.4g} {it.unit} measured: {it.error:+.0f} %"
        )
        yield Line(it.what, "", told, None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="only compare with the figures that are kept")
    parser.add_argument("--json", action="store_true", help="the same as JSON")
    parser.add_argument("--picture", type=Path, help="draw a step by the rate of the link, as PNG")
    given = parser.parse_args()
    if given.picture:
        draw(given.picture)
        return
    if given.json:
        print(json.dumps({"compared": [asdict(one) for one in compared()]}, indent=1))
        return
    if given.check:
        print("| figure | model | measured | error |\n|---|---|---|---|", *compared(), sep="\n")
        return
    for title, lines in (("3-D, 128^3", volumetric()), ("Private mode", private()), ("Many sites", many())):
        print(f"\n{title}\n", *lines, sep="\n")


if __name__ == "__main__":
    main()
