"""Cases of terms, the cut, learning rates and optimisers, from the words of the specification."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from coding import octets
from common import KEY, OTHER_KEY, Case, as_json, refused
from derive import schema_digest
from talk import JOB

from splitproto.fields import write_map

Weights = list[float]

# Terms ----------------------------------------------------------------------------------------------------


def cut(job: dict[str, Any]) -> list[list[Any]]:
    """SP-11.8-1, SP-11.18-2, SP-11.21-2."""
    tensors, total = [], job.get("fusion")
    coded = job.get("activations")
    for place, level in enumerate(job["levels"]):
        one = job["cut"][level]
        sizes = [size // step for size, step in zip(job["window"], one["stride"], strict=True)]
        coding = coded[place] if isinstance(coded, list) else coded
        if coding in ("f16", "int8", "int4"):
            tensors.append(
                [one["name"], "u8", [job["batch"], octets(coding, one["channels"] * math.prod(sizes))]]
            )
            continue
        dtype = f"i{total['bits']}" if total else job["precision"]
        tensors.append([one["name"], dtype, [job["batch"], one["channels"], *sizes]])
    return [*tensors, ["check", f"i{total['bits']}", [len(tensors), 8]]] if total else tensors


def unet(features: list[int], dimensions: int = 2) -> dict[str, Any]:
    """SP-11.8-4: what a job says of a basic-unet with these six widths."""
    levels = [
        {"name": f"x{n}", "channels": width, "stride": [2**n] * dimensions}
        for n, width in enumerate(features[:5])
    ]
    return {"settings": [{"name": "features", "values": features}], "cut": levels}


def stepped(step: int) -> dict[str, Any]:
    """SP-11.8-4: what a job says of a residual-unet of two levels with this step between them."""
    return {
        "network": "residual-unet",
        "settings": [{"name": "features", "values": [8, 8]}, {"name": "strides", "values": [1, step]}],
        "cut": [
            {"name": "x0", "channels": 8, "stride": [1, 1]},
            {"name": "x1", "channels": 8, "stride": [step, step]},
        ],
        "levels": [0, 1],
    }


def odd_cuts(base: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """SP-11.8-4: names of cases, notes and changes of terms whose cut is not that of the network."""
    five, flat = base["cut"], [{**base["cut"][0], "stride": [1, 2]}]
    yield "network-unknown", "a network that nobody knows", {"network": "no-such-net"}
    yield (
        "setting-unknown",
        "a setting that it does not have",
        {"settings": [{"name": "depth", "values": [3]}]},
    )
    yield "cut-of-others", "one channel more", {"cut": [{**five[0], "channels": 33}, *five[1:]]}
    yield "cut-of-other-strides", "another stride", {"cut": flat + five[1:]}
    yield "cut-of-other-names", "another name", {"cut": [{**five[0], "name": "image"}, *five[1:]]}
    yield "steps-of-3", "a step that is neither 1 nor 2", stepped(3)
    yield "steps-of-4", "a step that is neither 1 nor 2", stepped(4)
    yield "cut-too-short", "a level less", {"cut": five[:4], "levels": [0, 3]}


FROZEN, SUM = "release", "fuse"
"""Features of a link."""


def kinds() -> Iterator[tuple[str, str, str, dict[str, Any], dict[str, Any]]]:
    """SP-11.17, SP-11.18: names of cases, notes, errors, changes of terms, and what else matters: features of the link,
    and what the site's policy wants."""
    frozen, total = {"encoders": "frozen"}, {"fusion": {"bits": 16, "range": 4.0, "parties": 3}}
    private = {**frozen, **total}
    bad, refused = "schema-mismatch", "policy-refused"

    def with_rule(rule: str) -> dict[str, Any]:
        return {**total, "normalisation": [{"modality": "another", "rule": rule}]}

    yield "frozen", "SP-11.17-1", "", frozen, {"agreed": [FROZEN]}
    yield "frozen-without-release", "SP-11.17-2", bad, frozen, {"agreed": []}
    for feature in ("train", "evaluate", "average"):
        yield f"frozen-with-{feature}", "SP-11.17-2", bad, frozen, {"agreed": [FROZEN, feature]}
    yield "joint-with-release", "SP-11.17-2", bad, {}, {"agreed": ["train", FROZEN]}
    yield "frozen-averaged", "SP-11.17-2", bad, {**frozen, "average_every": 2}, {"agreed": [FROZEN]}
    yield "joint-refused", "SP-11.17-2", refused, {}, {"policy": ["frozen"]}
    yield "joint-not-once", "SP-11.17-9: a view in each epoch", refused, {}, {"policy": ["once"]}
    yield "frozen-once", "SP-11.17-9", "", frozen, {"agreed": [FROZEN], "policy": ["frozen", "once"]}

    yield "sum", "SP-11.18-1, SP-11.18-2", "", total, {"agreed": ["train", SUM]}
    wide = {"fusion": {**total["fusion"], "bits": 32}}
    yield "sum-of-32-bits", "SP-11.18-2", "", wide, {"agreed": ["train", SUM]}
    yield "sum-of-two-levels", "SP-11.18-2", "", {**total, "levels": [1, 4]}, {"agreed": ["train", SUM]}
    both = ["frozen", "once", "sum"]
    yield "sum-frozen", "SP-11.17-1, SP-11.18-1", "", private, {"agreed": [FROZEN, SUM], "policy": both}
    yield "sum-without-fuse", "SP-11.18-1", bad, total, {"agreed": ["train"]}
    yield "sum-of-bf16", "SP-11.18-1", bad, {**total, "precision": "bf16"}, {"agreed": ["train", SUM]}
    yield (
        "sum-averaged",
        "SP-11.18-1",
        bad,
        {**total, "average_every": 2},
        {"agreed": ["train", "average", SUM]},
    )
    for bits, span in ((24, 4.0), (16, 0.0), (16, 2.0**20 + 1)):
        odd = {"fusion": {"bits": bits, "range": span, "parties": 3}}
        yield f"sum-of-{bits}-to-{span:g}", "SP-11.18-1", bad, odd, {"agreed": ["train", SUM]}
    yield "no-sum", "SP-11.18-1: values without a sum", refused, {}, {"policy": ["sum"]}
    few = {"fusion": {**total["fusion"], "parties": 2}}
    yield "sum-of-two-sites", "SP-11.18-8: two partners at least", refused, few, {"agreed": ["train", SUM]}
    more = {"fusion": {**total["fusion"], "parties": 4}}
    yield "sum-with-a-stranger", "SP-11.18-8: more than are known", refused, more, {"agreed": ["train", SUM]}
    for rule in ("zscore", "zscore-nonzero"):
        yield f"sum-{rule}", "SP-11.18-1", "", with_rule(rule), {"agreed": ["train", SUM]}
    for rule in ("none", "window:0,1", "percentile:0,100"):
        yield f"sum-{rule}", "SP-11.18-1: of any site", refused, with_rule(rule), {"agreed": ["train", SUM]}


def _by_level(case: Callable[..., Case]) -> Iterator[Case]:
    """SP-11.21-8: lists, with an entry for each level that is sent."""
    every = {"agreed": ["train", "coding.f16", "coding.int8", "coding.int4", "coding.levels"]}
    mixed, bad = ["int4", "int4", "int8", "f16", "f32"], "schema-mismatch"
    for title, notes, changes in (
        ("levels", "the finest first", {"activations": mixed, "gradients": "int8"}),
        ("levels-sent", "of the levels that are sent", {"activations": ["int8", "f16"], "levels": [1, 4]}),
        ("levels-of-gradients", "the descriptors are of activations", {"gradients": mixed}),
        ("levels-alike", "a list all the same", {"activations": ["int8"] * 5}),
        ("levels-uncoded", "as precision says", {"activations": ["f32"] * 5}),
        ("levels-bf16", "precision where none is", {"activations": ["int4"] * 4 + ["bf16"], "precision": "bf16"}),
    ):  # fmt: skip
        yield case(title, f"SP-11.21-8: {notes}", "", every, **changes)
    for way in ("activations", "gradients"):
        for title, notes, listed in (
            ("short", "four entries for five levels", mixed[1:]),
            ("long", "six entries for five levels", ["int4", *mixed]),
            ("of-the-cut", "of levels that are not sent", mixed),
            ("precision", "another precision than the job's", [*mixed[:4], "bf16"]),
        ):
            sent = {"levels": [2, 4]} if title == "of-the-cut" else {}
            yield case(f"levels-{title}-{way}", f"SP-11.21-8: {notes}", bad, every, **{way: listed}, **sent)
        without = {"agreed": [name for name in every["agreed"] if name != "coding.levels"]}
        yield case(f"levels-not-agreed-{way}", "SP-11.21-8", bad, without, **{way: mixed})
        without = {"agreed": [name for name in every["agreed"] if name != "coding.f16"]}
        yield case(f"levels-with-a-coding-not-agreed-{way}", "SP-11.21-1", bad, without, **{way: mixed})
    alone = {"agreed": ["release", "coding.int8", "coding.levels"]}
    listed = ["int8"] * 4 + ["f32"]
    yield case("frozen-levels", "SP-11.21-8: releases", "", alone, encoders="frozen", activations=listed)
    yield case(
        "frozen-levels-of-gradients",
        "SP-11.21-1: there are none",
        bad,
        alone,
        encoders="frozen",
        gradients=listed,
    )
    uncoded = ["f32"] * 5
    yield case(
        "frozen-uncoded-levels-of-gradients", "SP-11.21-1: a list all the same", bad, alone,
        encoders="frozen", gradients=uncoded,
    )  # fmt: skip
    of_a_sum = {"agreed": ["train", "fuse", *every["agreed"][1:]], "partners": ["b", "c"]}
    total = {"bits": 16, "range": 4.0, "parties": 3}
    yield case("sum-of-coded-levels", "SP-11.21-1", bad, of_a_sum, fusion=total, activations=mixed)
    for way in ("activations", "gradients"):
        yield case(
            f"sum-of-uncoded-levels-{way}", "SP-11.21-1: a list all the same", bad, of_a_sum,
            fusion=total, **{way: uncoded},
        )  # fmt: skip


def terms() -> Iterator[Case]:
    """A job's terms -> the tensors of a training batch and their digest, or the refusal."""
    base: dict[str, Any] = write_map(JOB, "job")
    partners = ["b", "c"]

    def case(
        title: str, notes: str, error: str = "", site: dict[str, Any] | None = None, /, **changes: Any
    ) -> Case:
        job = {**base, **changes}
        tensors = cut(job) if not error else []
        good = {"descriptors": tensors, "sha256": schema_digest(tensors).hex()}
        return {
            "name": f"terms-{title}",
            "operation": "terms" if site is None else "kinds",
            "notes": notes,
            "job": as_json(job),
            **(site or {}),
            "expect": refused(error, "semantics") if error else good,
        }

    bad = "schema-mismatch"
    yield case("slices", "SP-11.8-1: all levels of a slice")
    usual = [32, 32, 64, 128, 256, 32]
    volumes = {"dimensions": 3, "window": [32, 48, 64], "batch": 2, **unet(usual, 3)}
    yield case("volumes", "SP-11.8-1: sizes in the order x, y, z", **volumes)
    yield case("two-levels", "SP-11.8-1: only the levels named", levels=[2, 4])
    yield case("bottleneck", "SP-11.8-1: channels of the level", levels=[4], **unet([1, 2, 4, 6, 8, 3]))
    yield case("bf16", "SP-11.8-1: the job's precision", precision="bf16")
    yield case("spacing", "SP-11-26: both ends of the range", spacing=[0.01, 1.0, 100.0])
    yield case("highest", "SP-11-26: the highest figures", learning_rate=100.0, weight_decay=100.0,
               seconds_per_step=86400.0, steps=99_999_999)  # fmt: skip
    yield case("lowest", "SP-11-26: the lowest figures", learning_rate=5e-324, weight_decay=0.0,
               seconds_per_step=1.0, steps=1)  # fmt: skip
    for coding in ("f16", "int8", "int4"):
        agreed = {"agreed": ["train", f"coding.{coding}"]}
        notes = "SP-11.21-2: octets of a sample"
        yield case(f"activations-{coding}", notes, "", agreed, activations=coding, levels=[2, 4])
        yield case(
            f"activations-{coding}-not-agreed", "SP-11.21-1", bad, {"agreed": ["train"]}, activations=coding
        )
        yield case(
            f"gradients-{coding}-not-agreed", "SP-11.21-1", bad, {"agreed": ["train"]}, gradients=coding
        )
    both = {"agreed": ["train", "coding.int8", "coding.int4"]}
    notes = "SP-11.21-1: one coding for each direction, and the descriptors are of activations"
    yield case("codings", notes, "", both, activations="int8", gradients="int4")
    only = {"agreed": ["train", "coding.int4"]}
    yield case(
        "gradients-int4", "SP-11.21-1: activations have none", "", only, gradients="int4", precision="bf16"
    )
    yield from _by_level(case)
    total = {"bits": 16, "range": 4.0, "parties": 3}
    for one in ("activations", "gradients"):
        of_a_sum = {"agreed": ["train", "fuse", "coding.int8"], "partners": partners}
        yield case(f"sum-of-coded-{one}", "SP-11.21-1", bad, of_a_sum, fusion=total, **{one: "int8"})
    frozen = {"agreed": ["release", "coding.int8"]}
    yield case("frozen-coded", "SP-11.21-1: releases", "", frozen, encoders="frozen", activations="int8")
    yield case(
        "frozen-coded-gradients",
        "SP-11.21-1: there are none",
        bad,
        frozen,
        encoders="frozen",
        gradients="int8",
    )
    for optimiser, schedule in (("adamw", "cosine"), ("sgd", "constant")):
        yield case(optimiser, "SP-11-24: known names", optimiser=optimiser, schedule=schedule)
    yield case("name-longest", "SP-11-25: 63 characters", name="0-._" + "a" * 59)
    for name in ("", "a/b", "..", ".a", "-a", "A", "é", "a b"):
        yield case(f"name-{name.encode().hex()}", f"SP-11-25: {name!r} is no name", bad, name=name)
    for field, value in (
        ("learning_rate", 0.0), ("learning_rate", -0.001), ("learning_rate", 100.00000000000001),
        ("weight_decay", -5e-324), ("weight_decay", 100.00000000000001), ("seconds_per_step", 0.9999999999999999),
        ("seconds_per_step", 86400.00000000001), ("steps", 100_000_000), ("spacing", [1.0]),
        ("spacing", [1.0, 1.0]), ("spacing", [1.0, 1.0, 0.009999999999999998]),
        ("spacing", [1.0, 100.00000000000001, 1.0]), ("spacing", [1.0, -1.0, 1.0]),
    ):  # fmt: skip
        shown = str(value).replace(" ", "")
        yield case(f"{field}-{shown}", "SP-11-26: out of range", bad, **{field: value})
    for rule in (
        "zscore-nonzero", "zscore", "none", "percentile", "percentile:0,100", "percentile:.5,99.", "window:-1e3,+4.5e2",
    ):  # fmt: skip
        named = [{"modality": "t1", "rule": rule}, {"modality": "pet-fdg", "rule": "none"}]
        yield case(f"normalisation-{rule}", "SP-11.12-10: a rule", normalisation=named)
    for rule in (
        "", "Zscore", "zscore:1,2", "min-max", "window", "window:1", "window:1,1", "window:2,1", "window:1,2,3",
        "window: 1,2", "window:nan,1", "window:-inf,1", "window:-1e999,1", "percentile:-1,50", "percentile:1,100.5",
        "none:0,1", "window:0x1,2",
    ):  # fmt: skip
        named = [{"modality": "t1", "rule": rule}]
        yield case(f"normalisation-bad-{rule}", "SP-11.12-11: no rule", bad, normalisation=named)
    twice = [{"modality": "t1", "rule": "none"}, {"modality": "t1", "rule": "zscore"}]
    yield case("normalisation-twice", "SP-11.12-11: a modality is named twice", bad, normalisation=twice)
    for field, name in (
        ("precision", "f16"), ("precision", "f64"), ("precision", "i8"), ("optimiser", "lion"), ("optimiser", "Adam"),
        ("schedule", "linear"), ("schedule", "onecycle"),
    ):  # fmt: skip
        yield case(
            f"{field}-{name}", "SP-11-2: registered or not, unknown in version 1", bad, **{field: name}
        )
    for name, notes, changes in (
        ("no-bottleneck", "the bottleneck is among the levels", {"levels": [0, 1, 2, 3]}),
        ("level-twice", "levels are distinct", {"levels": [0, 0, 4]}),
        ("levels-descend", "levels ascend", {"levels": [4, 0]}),
        ("window-not-16", "sizes are multiples of 16", {"window": [96, 40]}),
        ("window-one-voxel", "one value at level 4", {"window": [16, 16]}),
        ("window-three-sizes", "a slice has two sizes", {"window": [96, 96, 16]}),
        ("window-two-sizes", "a volume has three sizes", {"dimensions": 3, **unet(usual, 3)}),
        ("strides-of-volumes", "a slice has two strides", unet(usual, 3)),
        ("strides-of-slices", "a volume has three strides", {"dimensions": 3, "window": [96, 96, 96]}),
    ):
        yield case(name, f"SP-11.8-1: {notes}", bad, **changes)
    for name, notes, changes in odd_cuts(base):
        yield case(name, f"SP-11.8-4: {notes}", bad, **changes)
    yield case(
        "features-odd", "SP-11.8-4: those of levels 2 to 4 are even", bad, **unet([32, 32, 64, 127, 256, 32])
    )
    yield case("features-first-odd", "SP-11.8-4: only these three must be even", **unet([3, 5, 4, 6, 8, 7]))
    yield case("window-16-by-32", "SP-11.8-1: the product of all (size / stride) is 2", window=[16, 32])
    yield case("window-flat", "SP-11.8-1", dimensions=3, window=[16, 16, 32], **unet(usual, 3))
    # Refusals first: they take no time.
    for name, notes, error, changes, site in sorted(kinds(), key=lambda kind: not kind[2]):
        known = {"partners": partners} if "fusion" in changes else {}
        yield case(name, notes, error, {**site, **known}, **changes)


# Learning -------------------------------------------------------------------------------------------------


def along(a: float, b: float, q: float) -> float:
    """SP-11-24: along a cosine."""
    return b + (a - b) * (1 + math.cos(math.pi * q)) / 2


def one_cycle(step: int, steps: int, start: float, peak: float, end: float) -> float:
    """SP-11-24: from `start` to `peak`, then to `end`."""
    t, w = step - 1, max(0.0, 0.3 * steps - 1)
    if w > 0 and t <= w:
        return along(start, peak, t / w)
    return along(peak, end, (t - w) / max(steps - 1 - w, 1))


def rate(schedule: str, step: int, steps: int) -> float:
    """SP-11-24: the factor of the learning rate."""
    if schedule == "one-cycle":
        return one_cycle(step, steps, 1 / 25, 1, 1 / 250000)
    return (1 + math.cos(math.pi * (step - 1) / steps)) / 2 if schedule == "cosine" else 1.0


def momentum(schedule: str, step: int, steps: int) -> float:
    """SP-11-24: the first momentum of Adam, or the momentum of SGD."""
    return one_cycle(step, steps, 0.95, 0.85, 0.95) if schedule == "one-cycle" else 0.9


def schedules() -> Iterator[Case]:
    """A step of a schedule -> factor of the learning rate, and momentum. Tolerance: 1e-12, relative."""
    for schedule in ("constant", "cosine", "one-cycle"):
        for steps in (1, 2, 3, 4, 7, 10, 1000):
            for step in sorted({1, 2, 3, steps // 3, steps // 2, 301, 700, steps - 1, steps}):
                if 1 <= step <= steps:
                    yield {
                        "name": f"rate-{schedule}-{step}-of-{steps}",
                        "operation": "schedule",
                        "notes": "SP-11-24",
                        "schedule": schedule,
                        "step": step,
                        "steps": steps,
                        "expect": {
                            "factor": as_json(float(rate(schedule, step, steps))),
                            "momentum": as_json(float(momentum(schedule, step, steps))),
                        },
                    }


def optimised(case: Case) -> list[Weights]:
    """SP-11.10-1: the weights after each step of `made`, computed in float64."""
    weights = list(case["weights"])
    first, second = [0.0] * len(weights), [0.0] * len(weights)
    result = []
    for updates, (step, gradient) in enumerate(zip(case["made"], case["gradients"], strict=True), start=1):
        lr = case["learning_rate"] * rate(case["schedule"], step, case["steps"])
        beta, decay = momentum(case["schedule"], step, case["steps"]), case["weight_decay"]
        for i, weight in enumerate(weights):
            if case["optimiser"] == "adamw":
                weight, g = weight - lr * decay * weight, gradient[i]
            else:
                g = gradient[i] + decay * weight
            if case["optimiser"] == "sgd":
                first[i] = g if updates == 1 else beta * first[i] + g
                weights[i] = weight - lr * (g + beta * first[i])
                continue
            first[i] = beta * first[i] + (1 - beta) * g
            second[i] = 0.999 * second[i] + 0.001 * g * g
            corrected = first[i] / (1 - beta**updates)
            root = math.sqrt(second[i]) / math.sqrt(1 - 0.999**updates)
            weights[i] = weight - lr * corrected / (root + 1e-8)
        result.append(list(weights))
    return result


GRADIENTS = [
    [1.0, -0.5, 0.0, 1e-9, 1.0],
    [0.25, -2.0, 1.0, 1e-9, 0.001],
    [-1.0, 0.5, 0.125, 1e-9, 0.001],
    [0.5, 0.5, -0.75, -1e-9, 0.001],
    [2.0, -0.125, 0.5, 1e-9, 0.001],
    [-0.5, 1.5, 0.25, 1e-9, 0.001],
]


def optimisers() -> Iterator[Case]:
    """Gradients of the steps that are made -> weights after each. Tolerance: 2e-6, absolute (float32 arithmetic)."""
    for optimiser in ("adam", "adamw", "sgd"):
        for schedule in ("constant", "cosine", "one-cycle"):
            for decay, made in (
                (0.0, [1, 2, 3, 4, 5, 6]),
                (0.1, [1, 2, 3, 4, 5, 6]),
                (0.1, [1, 2, 5, 6, 9, 10]),
            ):
                case: Case = {
                    "name": f"{optimiser}-{schedule}{'-decay' if decay else ''}{'-absent' if made[-1] > 6 else ''}",
                    "operation": "optimiser",
                    "notes": "SP-11.10-1, SP-11-31: the steps between are made without this party"
                    if made[-1] > 6
                    else "SP-11-24",
                    "optimiser": optimiser,
                    "schedule": schedule,
                    "steps": 10,
                    "learning_rate": 0.05,
                    "weight_decay": decay,
                    "weights": [1.0, -1.5, 0.5, 2.0, 0.25],
                    "made": made,
                    "gradients": GRADIENTS,
                }
                shown = [[float(f"{weight:.9g}") for weight in weights] for weights in optimised(case)]
                yield {**case, "expect": {"weights": shown}}


# Averages -------------------------------------------------------------------------------------------------


def averages() -> Iterator[Case]:
    """Weights of a seat's encoders, ordered by site, and numbers of patients -> their average, to the bit."""
    ninth = [0.1, 1 / 3, -2.5, 0.0, 1e30, 3e-45]
    other = [0.3, 1 / 7, 2.5, -0.0, -1e30, 1e-45]
    third = [16777216.0, 1.0, 1.5, 0.0, 3e38, -1e-45]
    for name, weights, counts, notes in (
        ("alike", [ninth, ninth], [2, 3], "SP-11.16-4: equal weights stay"),
        ("two", [ninth, other], [2, 3], "SP-11.16-4"),
        (
            "two-the-other-way",
            [other, ninth],
            [2, 3],
            "SP-11.16-4: the order of sites is that of their names",
        ),
        ("three", [ninth, other, third], [120, 77, 1], "SP-11.16-4: rounded once, at the end"),
        ("one-without-patients", [ninth, other], [0, 7], "SP-11.16-4: it takes the average as well"),
        ("large", [[3e38], [3e38], [3e38]], [1 << 20, 1 << 20, 1 << 20], "SP-11.16-4: sums do not overflow"),
        ("tie", [[1.0], [1.0000001192092896]], [1, 1], "SP-11.16-4: to nearest, ties to even"),
    ):
        held = [np.array(one, "<f4") for one in weights]
        result = []
        for values in zip(*(one.tolist() for one in held), strict=True):
            total = float(counts[0]) * values[0]
            for count, value in zip(counts[1:], values[1:], strict=True):
                total += float(count) * value
            result.append(total / sum(counts))
        yield {
            "name": f"average-{name}",
            "operation": "average",
            "notes": notes,
            "weights": [one.tobytes().hex() for one in held],
            "patients": counts,
            "expect": {"average": np.array(result).astype("<f4").tobytes().hex()},
        }


def weights() -> Iterator[Case]:
    """Weights of an encoder -> whether they may be in an average."""
    for name, values, averaged in (
        ("usual", [0.1, -2.5, 0.0, 3e-45], True),
        ("largest", [1024.0, -1024.0], True),
        ("too-large", [0.5, 1024.0001220703125], False),
        ("too-large-below-zero", [0.5, -1024.0001220703125], False),
        ("overflowing", [3e38], False),
        ("infinite", [float("inf")], False),
        ("nan", [float("nan")], False),
    ):
        yield {
            "name": f"weights-{name}",
            "operation": "weights",
            "notes": "SP-11.16-3",
            "weights": np.array(values, "<f4").tobytes().hex(),
            "expect": {"averaged": averaged},
        }


# Losses ---------------------------------------------------------------------------------------------------


def _loss(logits: np.ndarray, mask: np.ndarray, *, exclusive: bool) -> tuple[float, np.ndarray]:
    """SP-11.20-5 in float64: the loss, and its gradient by the logits [samples, channels, x, y]."""
    axes, smooth = (0, 2, 3), 1e-5
    if exclusive:
        power = np.exp(logits - logits.max(1, keepdims=True))
        p, t = power / power.sum(1, keepdims=True), np.concatenate([1 - mask.sum(1, keepdims=True), mask], 1)
        voxels = logits.size / logits.shape[1]
        loss, gradient, first = -(np.log(p) * t).sum() / voxels, (p - t) / voxels, 1
    else:
        p, t = 1 / (1 + np.exp(-logits)), mask
        loss = 2 * -(t * np.log(p) + (1 - t) * np.log(1 - p)).mean()
        gradient, first = 2 * (p - t) / logits.size, 0
    both, either = (p * t).sum(axes), (p + t).sum(axes)
    dice = (2 * both + smooth) / (either + smooth)
    # d Dice / d p, region by region; none of the background's.
    by_p = (2 * t - dice[:, None, None]) / (either + smooth)[:, None, None]
    share = 1.0
    if exclusive:
        by_p[:, 0], share = 0.0, 1 / (logits.shape[1] - 1)
        gradient = gradient - share * p * (by_p - (p * by_p).sum(1, keepdims=True))
    else:
        gradient = gradient - p * (1 - p) * by_p
    return float(loss + share * (1 - dice[first:]).sum()), gradient


def losses() -> Iterator[Case]:
    """Logits and mask -> loss and its gradient by the logits. Tolerance: 1e-5 of the largest (float32 arithmetic)."""
    random = np.random.Generator(np.random.PCG64(20))
    for name, exclusive, regions, filled in (
        ("overlapping", False, 3, 0.3),
        ("overlapping-one", False, 1, 0.5),
        ("overlapping-empty", False, 2, 0.0),
        ("exclusive", True, 2, 0.3),
        ("exclusive-one", True, 1, 0.5),
        ("exclusive-empty", True, 2, 0.0),
    ):
        logits = (4 * random.standard_normal((2, regions + exclusive, 4, 3))).astype("<f4")
        if exclusive:
            chosen = np.where(random.random((2, 4, 3)) < filled, random.integers(0, regions, (2, 4, 3)), -1)
            mask = np.stack([chosen == region for region in range(regions)], 1).astype("u1")
        else:
            mask = (random.random((2, regions, 4, 3)) < filled).astype("u1")
        loss, gradient = _loss(logits.astype("f8"), mask.astype("f8"), exclusive=exclusive)
        yield {
            "name": f"loss-{name}",
            "operation": "loss",
            "notes": "SP-11.20-5, SP-11.20-11",
            "exclusive": exclusive,
            "shape": list(logits.shape),
            "logits": logits.tobytes().hex(),
            "mask": mask.tobytes().hex(),
            "expect": {
                "loss": float(f"{loss:.9g}"),
                "gradient": [float(f"{one:.7g}") for one in gradient.ravel()],
            },
        }


def sides() -> Iterator[Case]:
    """What the site of the labels is asked about persons, in order; refused is the last."""
    one, other, third = (key.hex() for key in (KEY, OTHER_KEY, bytes(16)))

    def case(name: str, notes: str, *asked: tuple[str, list[str]], wrong: bool = False) -> Case:
        listed = [{"message": message, "persons": persons} for message, persons in asked]
        expect = refused("policy-refused", "semantics") if wrong else {"answered": len(asked)}
        return {
            "name": f"sides-{name}",
            "operation": "sides",
            "notes": notes,
            "asked": listed,
            "expect": expect,
        }

    def logits(*persons: str) -> tuple[str, list[str]]:
        return "logits", list(persons)

    def prediction(person: str) -> tuple[str, list[str]]:
        return "prediction", [person]

    yield case(
        "apart", "SP-11.20-13", logits(one, other, one), prediction(third), logits(one), prediction(third)
    )
    yield case("loss-of-a-scored-one", "SP-11.20-13", prediction(one), logits(one), wrong=True)
    yield case(
        "loss-of-a-scored-one-among-others", "SP-11.20-13", prediction(one), logits(other, one), wrong=True
    )
    yield case("score-of-a-trained-one", "SP-11.20-13", logits(other, one), prediction(one), wrong=True)
    yield case(
        "scored-long-ago", "SP-11.20-13: the newest is not all", prediction(one), prediction(other), logits(third),
        logits(one), wrong=True,
    )  # fmt: skip
    yield case(
        "trained-long-ago",
        "SP-11.20-13",
        logits(one),
        logits(other),
        prediction(third),
        prediction(one),
        wrong=True,
    )


def learning() -> Iterator[Case]:
    """All of them."""
    yield from terms()
    yield from schedules()
    yield from optimisers()
    yield from averages()
    yield from weights()
    yield from losses()
    yield from sides()
