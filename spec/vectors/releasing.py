"""Cases of SP-11.17: what a site with frozen encoders answers, and what it refuses to be asked again."""

from __future__ import annotations

from collections.abc import Iterator
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

    def fine(name: str, notes: str, answered: int, *listed: Question) -> Case:
        return {"name": name, "notes": notes, "asked": list(listed), "expect": {"answered": answered}}

    def wrong(name: str, notes: str, *listed: Question) -> Case:
        expect = refused("policy-refused", "semantics")
        return {"name": name, "notes": notes, "asked": list(listed), "expect": expect}

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
