"""Cases of SP-11.19: for whom a site computes, and what it refuses to be asked for a request."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from common import KEY, OTHER_KEY, SEED, Case, refused

REQUEST, OTHER_REQUEST = bytes(range(0x50, 0x60)), bytes(range(0x60, 0x70))
Question = dict[str, Any]


def inference() -> Iterator[Case]:
    """All of them."""
    yield from admissions()
    yield from questions()


def admissions() -> Iterator[Case]:
    """SP-11.19-4: a `locate` -> whether the policy lets the site take part."""

    def case(
        name: str,
        admitted: bool,
        policy: str,
        asker: str = "site-a",
        request: bytes = REQUEST,
        key: bytes = KEY,
    ) -> Case:
        locate = {"request": request.hex(), "key": key.hex(), "asker": asker}
        own = [{"request": REQUEST.hex(), "key": KEY.hex()}]
        return {
            "operation": "admission", "name": name, "notes": "SP-11.19-4", "site": "site-a", "policy": policy,
            "listed": ["site-b"], "own": own, "locate": locate, "expect": {"admitted": admitted},
        }  # fmt: skip

    yield case("own", True, "own")
    yield case("own-of-another-asker", True, "own", asker="site-c")
    yield case("own-word-of-the-coordinator", False, "own", request=OTHER_REQUEST)
    yield case("own-of-another-patient", False, "own", key=OTHER_KEY)
    yield case("own-for-a-listed-site", False, "own", asker="site-b", request=OTHER_REQUEST)
    yield case("listed", True, "listed", asker="site-b", request=OTHER_REQUEST, key=OTHER_KEY)
    yield case("listed-stranger", False, "listed", asker="site-c", request=OTHER_REQUEST)
    yield case("listed-own", True, "listed")
    yield case("listed-own-word-of-the-coordinator", False, "listed", request=OTHER_REQUEST)
    yield case("none", False, "none")


def located(key: bytes = KEY) -> Question:
    """The site has located a patient, by a `locate` that it admitted."""
    return {"locate": key.hex()}


def asked(*windows: tuple[bytes, tuple[int, int, int]], **more: Any) -> Question:
    """A `forward` of mode infer, without step, number and digest."""
    samples = [{"key": key.hex(), "origin": list(origin)} for key, origin in windows]
    return {"samples": samples, "seed": None, "places": None, **more}


def questions() -> Iterator[Case]:
    """SP-11.19-8: what is said on a link, in order -> windows asked for, or the error at the last."""
    one, two, third = (KEY, (0, 0, 10)), (KEY, (0, 0, 11)), (OTHER_KEY, (0, 0, 10))

    def fine(name: str, notes: str, windows: int, *said: Question) -> Case:
        return {
            "operation": "questions", "name": name, "notes": notes, "said": list(said),
            "expect": {"windows": windows},
        }  # fmt: skip

    def wrong(name: str, notes: str, *said: Question) -> Case:
        expect = refused("policy-refused", "semantics")
        return {"operation": "questions", "name": name, "notes": notes, "said": list(said), "expect": expect}

    new_link: Question = {"link": "new"}
    yield fine("each-window-once", "SP-11.19-8", 2, located(), asked(one), asked(two))
    yield fine("together", "SP-11.19-8", 2, located(), asked(one, two))
    yield fine(
        "located-again",
        "SP-11.19-8: as after a lost answer",
        3,
        located(),
        asked(one, two),
        located(),
        asked(one),
    )
    yield fine("two-patients", "SP-11.19-8", 2, located(), located(OTHER_KEY), asked(one), asked(third))
    yield fine("on-the-next-link", "SP-11.19-8", 2, located(), asked(one), new_link, located(), asked(one))
    yield wrong("not-located", "SP-11.19-8", asked(one))
    yield wrong("another-is-located", "SP-11.19-8", located(OTHER_KEY), asked(one))
    yield wrong("located-on-another-link", "SP-11.19-8", located(), new_link, asked(one))
    yield wrong("window-twice", "SP-11.19-8", located(), asked(one), asked(two, one))
    yield wrong("window-twice-in-a-batch", "SP-11.19-8", located(), asked(one, one))
    yield wrong(
        "another-located-in-between", "SP-11.19-8", located(), asked(one), located(OTHER_KEY), asked(one)
    )
    yield wrong("two-patients-in-a-batch", "SP-11.19-8", located(), located(OTHER_KEY), asked(two, third))
    yield wrong("seed", "SP-11.19-8: another pose is another view", located(), asked(one, seed=SEED))
    yield wrong("seed-0", "SP-11.19-8: 0 is a seed", located(), asked(one, seed=0))
    yield wrong("places", "SP-11.19-8", located(), asked(one, places=[1]))
