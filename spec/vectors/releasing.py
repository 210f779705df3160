"""Cases of SP-11.17: what a site with frozen encoders answers, and what it refuses to be asked again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from common import KEY, OTHER_KEY, SEED, Case, refused

Question = dict[str, Any]


def asked(batch: int, *windows: tuple[bytes, tuple[int, int, int]], **more: Any) -> Question:
    """A `forward` of mode release, without its digest."""
    samples = [{"key": key.hex(), "origin": list(origin)} for key, origin in windows]
    return {"step": 0, "batch": batch, "samples": samples, "seed": None, "places": None, **more}


def questions() -> Iterator[Case]:
    """Questions in order -> windows released, or the error at the last."""
    one, two, third = (KEY, (0, 0, 10)), (KEY, (0, 0, 11)), (OTHER_KEY, (0, 0, 10))
    beside = (KEY, (-4, 0, 10))

    def fine(name: str, notes: str, answered: int, *listed: Question, **site: Any) -> Case:
        return {"name": name, "notes": notes, **site, "asked": list(listed), "expect": {"answered": answered}}

    def wrong(name: str, notes: str, *listed: Question, **site: Any) -> Case:
        expect = refused("policy-refused", "semantics")
        return {"name": name, "notes": notes, **site, "asked": list(listed), "expect": expect}

    yield fine("nothing", "SP-11.17-4", 0)
    yield fine("each-window-once", "SP-11.17-4", 3, asked(0, one, two), asked(1, third))
    yield fine(
        "the-same-question",
        "SP-11.17-5: after a lost link",
        3,
        asked(0, one, two),
        asked(1, third),
        asked(0, one, two),
    )
    yield fine("another-origin", "SP-11.17-4: a window is key and origin", 2, asked(0, one), asked(1, beside))
    yield wrong("window-twice-in-a-batch", "SP-11.17-4", asked(0, one, two, one))
    yield wrong("window-of-another-batch", "SP-11.17-4", asked(0, one, two), asked(1, third, two))
    yield wrong("batch-with-other-windows", "SP-11.17-4", asked(0, one), asked(0, two))
    yield wrong("batch-in-another-order", "SP-11.17-4", asked(0, one, two), asked(0, two, one))
    yield wrong("batch-cut-short", "SP-11.17-4", asked(0, one, two), asked(0, one))
    yield wrong("seed", "SP-11.17-3: another pose is another release", asked(0, one, seed=SEED))
    yield wrong("seed-0", "SP-11.17-3: 0 is a seed", asked(0, one, seed=0))
    yield wrong("step-1", "SP-11.17-3: there are no weights but those of step 0", asked(0, one, step=1))
    yield wrong("places", "SP-11.17-3", asked(0, one, places=[1]))
    yield from grids(fine, wrong)
    yield from runs(fine, wrong)


def grids(fine: Callable[..., Case], wrong: Callable[..., Case]) -> Iterator[Case]:
    """SP-11.17-10: of a site with the policy *once*."""

    def at(batch: int, *origins: tuple[int, int, int]) -> Question:
        return asked(batch, *((KEY, origin) for origin in origins))

    slices = {"once": {"window": [8, 8, 1], "volume": [21, 8, 5]}}
    tiles = [at(z, (0, 0, z), (4, 0, z), (8, 0, z), (12, 0, z), (13, 0, z)) for z in range(5)]
    yield fine("grid", "SP-11.17-10: overlap 1/2, the last one at the border", 25, *tiles, **slices)
    yield fine(
        "grid-in-any-order", "SP-11.17-10", 3, at(0, (13, 0, 0)), at(1, (1, 0, 3), (9, 0, 3)), **slices
    )
    yield wrong("grid-shifted", "SP-11.17-10: by a voxel", at(0, (0, 0, 0)), at(1, (1, 0, 0)), **slices)
    yield wrong("grid-shifted-in-a-batch", "SP-11.17-10", at(0, (0, 0, 0), (3, 0, 0)), **slices)
    yield wrong(
        "grid-shifted-elsewhere", "SP-11.17-10: of another slice, too",
        at(0, (0, 0, 0)), at(1, (5, 0, 4), (9, 0, 4), (1, 0, 4)), **slices,
    )  # fmt: skip
    yield wrong(
        "grid-near-the-border",
        "SP-11.17-10",
        at(0, (13, 0, 0)),
        at(1, (12, 0, 0)),
        at(2, (11, 0, 0)),
        **slices,
    )
    yield fine(
        "grid-of-a-longer-volume",
        "SP-11.17-10: the run's is of 22 x 8 x 6, so its last slice shows nothing here",
        10,
        at(0, (0, 0, 4), (4, 0, 4), (8, 0, 4), (12, 0, 4), (14, 0, 4)),
        at(1, (0, 0, 5), (4, 0, 5), (8, 0, 5), (12, 0, 5), (14, 0, 5)),
        **slices,
    )
    yield wrong(
        "grid-twice-at-the-border",
        "SP-11.17-10: one origin of n - w or more",
        at(0, (13, 0, 0)),
        at(1, (14, 0, 0)),
        **slices,
    )
    patients = [at(0, (0, 0, 0)), asked(1, (OTHER_KEY, (1, 0, 0)))]
    yield fine("grid-of-another-patient", "SP-11.17-10", 2, *patients, **slices)
    small = {"once": {"window": [8, 8, 8], "volume": [5, 8, 8]}}
    yield wrong(
        "grid-of-a-small-volume",
        "SP-11.17-10: one place in its window",
        at(0, (-1, 0, 0)),
        at(1, (-3, 0, 0)),
        **small,
    )
    odd = {"once": {"window": [5, 1, 1], "volume": [40, 1, 1]}}
    yield fine(
        "grid-of-odd-windows",
        "SP-11.17-10: floor(5/2) apart",
        3,
        at(0, (0, 0, 0), (2, 0, 0), (4, 0, 0)),
        **odd,
    )


def runs(fine: Callable[..., Case], wrong: Callable[..., Case]) -> Iterator[Case]:
    """SP-11.17-9, SP-11.17-11: `before` says of whom windows have left already."""
    once = {"once": {"window": [8, 8, 1], "volume": [64, 64, 64]}}
    question = asked(0, (KEY, (0, 0, 0)))

    def before(offer: str, weights: str = "ours", key: bytes = KEY) -> Question:
        return {"offer": offer, "weights": weights, "key": key.hex()}

    yield wrong("once-other-run", "SP-11.17-9", question, **once, before=[before("other-run")])
    yield wrong(
        "once-other-terms", "SP-11.17-9: the same id", question, **once, before=[before("other-terms")]
    )
    yield fine(
        "once-other-weights", "SP-11.17-9", 1, question, **once, before=[before("other-run", "others")]
    )
    yield fine(
        "once-other-patient", "SP-11.17-9", 1, question, **once, before=[before("other-run", key=OTHER_KEY)]
    )
    shown = [before("other-run", "others"), before("other-terms", "third")]
    yield wrong("two-runs-of-two", "SP-11.17-11", question, most_runs=2, before=shown)
    yield fine("two-runs-of-three", "SP-11.17-11", 1, question, most_runs=3, before=shown)
    yield fine("two-runs-of-any", "SP-11.17-11: without a limit", 1, question, before=shown)
