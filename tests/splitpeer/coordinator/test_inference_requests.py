"""Requests for segmentations: their states and their turns (SP-11.19-13)."""

from __future__ import annotations

import itertools

import pytest

from splitpeer.coordinator.inference.requests import (
    MOST_KEPT,
    TRANSITIONS,
    InferenceRequest,
    RequestChange,
    Requests,
    RequestState,
)
from splitproto.messages import Segment

KEY = bytes(16)
_ids = itertools.count(1)


def of(site: str) -> InferenceRequest:
    return InferenceRequest(site, Segment(next(_ids).to_bytes(16, "big"), KEY, "mask"))


def filled(*sites: str, most: int = 10) -> tuple[Requests, list[InferenceRequest]]:
    requests, made = Requests(most), [of(site) for site in sites]
    assert all(requests.add(one) for one in made)
    return requests, made


def order(requests: Requests) -> list[str]:
    found = []
    while (one := requests.next(lambda _: True)) is not None:
        one.move(RequestChange.TURN, 0.0)
        found.append(one.site)
        one.move(RequestChange.OUTCOME, 0.0)
        one.move(RequestChange.SENT, 0.0)
        requests.remove(one)
    return found


def test_sites_take_turns_and_each_keeps_its_order() -> None:
    requests, made = filled("a", "a", "a", "b", "c", "b")
    assert [requests.ahead(one) for one in made] == [0, 3, 5, 1, 2, 4]
    first = requests.next(lambda _: True)
    assert first is made[0]
    requests, made = filled("a", "a", "a", "b", "c", "b")
    assert order(requests) == ["a", "b", "c", "a", "b", "a"]


def test_what_is_said_to_be_ahead_is_what_comes_before() -> None:
    for sites in itertools.product("abc", repeat=5):
        requests, made = filled(*sites)
        said = {one.asked.request: requests.ahead(one) for one in made}
        places = {}
        for place in range(len(made)):
            one = requests.next(lambda _: True)
            assert one is not None
            places[one.asked.request] = place
            one.move(RequestChange.TURN, 0.0)
            one.move(RequestChange.OUTCOME, 0.0)
            requests.remove(one)
        assert said == places, sites


def test_a_site_that_is_away_loses_no_turn_of_the_others_and_keeps_its_own() -> None:
    requests, made = filled("a", "b")
    assert requests.next(lambda site: site == "b") is made[1]
    assert requests.next(lambda site: site == "a") is made[0]


def test_a_site_can_fill_its_own_queue_only() -> None:
    requests, _ = filled("a", "a", "b", most=2)
    assert not requests.add(of("a"))
    assert requests.add(of("b"))
    # What is worked on does not wait.
    first = requests.next(lambda _: True)
    assert first is not None
    first.move(RequestChange.TURN, 0.0)
    assert requests.add(of("a"))


def test_a_request_is_found_by_its_own_site_only() -> None:
    requests, made = filled("a")
    assert requests.find("a", made[0].asked.request) is made[0]
    assert requests.find("b", made[0].asked.request) is None


def test_few_answers_are_kept_for_a_site_that_is_away() -> None:
    requests, made = filled(*"a" * (MOST_KEPT + 2))
    for one in made:
        one.move(RequestChange.OUTCOME, 0.0)
    assert requests.crowded("a") == made[:2]


def test_every_change_that_the_table_does_not_list_is_an_error() -> None:
    for state, change in itertools.product(RequestState, RequestChange):
        request = of("a")
        request.state = state
        if change in TRANSITIONS[state]:
            request.move(change, 7.0)
            assert (request.state, request.since) == (TRANSITIONS[state][change], 7.0)
        else:
            with pytest.raises(KeyError):
                request.move(change, 7.0)
