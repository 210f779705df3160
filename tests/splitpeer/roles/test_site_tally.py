"""How many segmentations a site was asked for and answered, and how many it asked for itself."""

from __future__ import annotations

import pytest

from splitpeer.daemon import happenings as h
from splitpeer.site.inference import tally as module
from splitpeer.site.inference.tally import SiteTally


@pytest.fixture
def told() -> list[h.SiteRequestsStand]:
    return []


@pytest.fixture
def tally(told: list[h.SiteRequestsStand]) -> SiteTally:
    return SiteTally("listed", {"a", "b"}, told.append, lambda: 1000.0)  # type: ignore[arg-type]


def test_what_a_site_answers_is_counted_by_who_asks(
    tally: SiteTally, told: list[h.SiteRequestsStand]
) -> None:
    """The coordinator says who: names that the policy does not know are one."""
    for number, (asker, cause) in enumerate(
        [("a", None), ("a", "refused"), ("b", "absent"), ("b", "malformed"), ("x", "refused"), ("y", None)]
    ):
        tally.answered(bytes([number]), asker, cause)
    assert told[-1].answered == {
        "a": {"answered": 1, "refused": 1, "unable": 0},
        "b": {"answered": 0, "refused": 0, "unable": 2},
        "others": {"answered": 1, "refused": 1, "unable": 0},
    }
    assert told[-1].answered_last == 1000.0 and told[-1].ended_last is None


def test_a_request_counts_once_as_it_was_answered_last(
    tally: SiteTally, told: list[h.SiteRequestsStand], monkeypatch: pytest.MonkeyPatch
) -> None:
    """SP-11.19-8: after a lost link the site is asked again; and what is remembered of it has an end."""
    monkeypatch.setattr(module, "MOST_KNOWN", 2)
    for request, cause in ((b"1", "refused"), (b"1", None), (b"1", None), (b"2", None), (b"3", None)):
        tally.answered(request, "a", cause)
    assert told[-1].answered == {"a": {"answered": 3, "refused": 0, "unable": 0}}
    tally.answered(b"1", "a", None)  # forgotten by now
    assert told[-1].answered["a"]["answered"] == 4
    assert set(tally._known) == {b"3", b"1"}


def test_nothing_is_told_twice(tally: SiteTally, told: list[h.SiteRequestsStand]) -> None:
    tally.link(True)
    tally.own(1, 0)
    tally.own(1, 0)
    tally.ended("segmented")
    tally.own(0, 0)
    assert [(one.serves, one.waiting, one.ended["segmented"]) for one in told] == [
        (True, 0, 0),
        (True, 1, 0),
        (True, 0, 1),
    ]
