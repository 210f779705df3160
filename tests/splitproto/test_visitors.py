"""Which connections at a door are ended, and which of these were refused."""

from __future__ import annotations

from splitproto.constants import MAX_HALF_OPEN_PER_SOURCE as CAP
from splitproto.errors import DeadlineExceeded, TooManyLinks
from splitproto.lanes.base import Visitor
from splitproto.visitors import Visitors

PATIENCE = 10.0


class Silent(Visitor):
    hung_up = False

    def hang_up(self) -> None:
        self.hung_up = True


def come(visitors: Visitors, count: int, *, admitted: bool) -> list[Silent]:
    came = [Silent("192.0.2.1", 0.0) for _ in range(count)]
    for one in came:
        assert visitors.came(one) == []
        if admitted:
            visitors.admitted(one)
    return came


def test_sites_that_leave_at_once_are_not_refused() -> None:
    visitors = Visitors(PATIENCE)
    sites = come(visitors, CAP + 3, admitted=True)
    for site in sites:
        visitors.parted(site, 1.0)
    assert visitors.look(1.0) == []
    assert [site.hung_up for site in sites] == 3 * [True] + CAP * [False]
    assert visitors.look(1.0 + PATIENCE) == []
    assert all(site.hung_up for site in sites)


def test_strangers_are_refused() -> None:
    visitors = Visitors(PATIENCE)
    strangers = come(visitors, CAP, admitted=False)
    ((source, error),) = visitors.came(Silent("192.0.2.1", 0.0))
    assert source == "192.0.2.1" and isinstance(error, TooManyLinks)
    assert [one.hung_up for one in strangers] == [True] + (CAP - 1) * [False]
    told = visitors.look(PATIENCE)
    assert len(told) == CAP and all(isinstance(error, DeadlineExceeded) for _, error in told)


def test_what_a_site_keeps_after_its_link_makes_room_for_strangers() -> None:
    visitors = Visitors(PATIENCE)
    sites = come(visitors, CAP, admitted=True)
    for site in sites:
        visitors.parted(site, 1.0)
    assert visitors.came(Silent("192.0.2.1", 2.0)) == []
    assert [site.hung_up for site in sites] == [True] + (CAP - 1) * [False]
