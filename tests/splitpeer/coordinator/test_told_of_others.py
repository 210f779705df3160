"""What a site that asks for a segmentation is told of other sites (SP-11.19-7)."""

from __future__ import annotations

from splitpeer.coordinator.frozen.inference import OTHER_GRID
from splitpeer.coordinator.inference.locating import AWAY, LATE, NO_PART, Sites, told_of_others
from splitproto.causes import OF_A_PATIENT


def told(cause: str) -> str:
    return told_of_others(["site-a"], Sites({"site-a": cause}))


def test_nothing_of_the_patient_but_that_there_is_no_image() -> None:
    assert {told(cause) for cause in ("absent", OTHER_GRID, *OF_A_PATIENT)} == {
        "site-a: no image that can be used"
    }


def test_what_is_of_the_site_helps_whoever_asked() -> None:
    assert {told(cause) for cause in (AWAY, LATE, NO_PART, "refused")} == {
        "site-a: its site is away",
        "site-a: it kept earlier requests waiting too long",
        "site-a: it takes no part in inference",
        "site-a: its policy refuses",
    }
