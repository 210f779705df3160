"""What a site answers and refuses in inference (SP-11.19-4, SP-11.19-8 to SP-11.19-10)."""

from __future__ import annotations

import pytest

from splitpeer.data.sampling import batch_digest
from splitpeer.settings.bounds import Bounds
from splitpeer.site.budgets import BudgetSpent, new_inference
from splitpeer.site.inference.answering import Answering, Terms
from splitproto.errors import PolicyRefused
from splitproto.messages import Forward, Locate
from splitproto.records import Sample

KEY, OTHER, MINE = b"k" * 16, b"o" * 16, b"m" * 16
LISTED = Terms("listed", ("site-a",))


def asked(*samples: tuple[bytes, int], **more: object) -> Forward:
    windows = tuple(Sample(key, (0, 0, z)) for key, z in samples)
    return Forward("infer", 3, 7, windows, batch_digest(3, windows, None), **more)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("terms", "asker", "mine", "admitted"),
    [
        (Terms("none"), "site-a", False, False),
        (Terms("none"), "site-a", True, False),
        (Terms("own"), "site-a", False, False),
        (Terms("own"), "site-a", True, True),
        (LISTED, "site-a", False, True),
        (LISTED, "site-b", False, False),
        (LISTED, "site-b", True, True),
    ],
)
def test_whom_a_policy_serves(tmp_path, terms, asker, mine, admitted) -> None:
    """SP-11.19-4: the coordinator's word counts for listed sites only, a request of its own is known by id and key."""
    answering = Answering(terms, Bounds(), tmp_path)
    assert answering.admit(Locate(MINE, KEY, asker), lambda request, key: mine) is admitted


def test_requests_of_a_day_are_counted_once_each_also_by_the_next_process(tmp_path) -> None:
    bounds = Bounds(max_inferences_per_day=2)
    for request in (KEY, OTHER, KEY):
        new_inference(tmp_path, bounds, request, KEY, now=1000.0)
    with pytest.raises(BudgetSpent, match="max_inferences_per_day"):
        new_inference(tmp_path, bounds, MINE, KEY, now=1001.0)
    new_inference(tmp_path, bounds, OTHER, KEY, now=1002.0)
    new_inference(tmp_path, bounds, MINE, KEY, now=1000.0 + 86_401)
    answering = Answering(LISTED, Bounds(max_inferences_per_day=1), tmp_path / "b")
    assert answering.admit(Locate(KEY, KEY, "site-a"), lambda *_: False)
    assert not answering.admit(Locate(MINE, KEY, "site-a"), lambda *_: False)


def test_one_request_about_two_patients_counts_twice(tmp_path) -> None:
    """SP-11.19-4: nothing shows a site that a listed asker's request is one, so its id alone limits nothing."""
    answering = Answering(LISTED, Bounds(max_inferences_per_day=2), tmp_path)
    admitted = [
        answering.admit(Locate(MINE, key, "site-a"), lambda *_: False) for key in (KEY, OTHER, MINE, KEY)
    ]
    assert admitted == [True, True, False, True]


def test_each_window_is_asked_for_once_after_a_locate(tmp_path) -> None:
    """SP-11.19-8."""
    answering = Answering(LISTED, Bounds(), tmp_path)
    with pytest.raises(PolicyRefused, match="not located"):
        answering.check(asked((KEY, 0)))
    answering.open(KEY)
    answering.check(asked((KEY, 0), (KEY, 1)))
    with pytest.raises(PolicyRefused, match="twice"):
        answering.check(asked((KEY, 1)))
    with pytest.raises(PolicyRefused, match="twice"):
        answering.check(asked((KEY, 2), (KEY, 2)))
    answering.open(KEY)
    answering.check(asked((KEY, 1)))
    answering.close()
    with pytest.raises(PolicyRefused, match="not located"):
        answering.check(asked((KEY, 5)))


@pytest.mark.parametrize(
    "forward",
    [
        asked((KEY, 0), seed=4),
        asked((KEY, 0), places=(0,)),
        asked((KEY, 0), (OTHER, 0)),
        asked((OTHER, 0)),
    ],
    ids=["seed", "places", "two patients", "another patient"],
)
def test_what_no_locate_allows_is_refused(tmp_path, forward) -> None:
    answering = Answering(LISTED, Bounds(), tmp_path)
    answering.open(KEY)
    with pytest.raises(PolicyRefused):
        answering.check(forward)
