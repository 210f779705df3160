"""The standing of a site: all pairs of the table, what may follow what, and the picture in the docs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

from splitpeer.coordinator.standing import TRANSITIONS, Change, ImpossibleChange, Standing, after
from splitpeer.daemon.status_schema import SiteState

ROOT = Path(__file__).resolve().parents[3]
C = Change

# Rows as in Standing, columns as written here; "-": cannot happen. Written by hand, apart from the table.
COLUMNS = (
    C.DIALLED, C.TURNED_AWAY, C.DECLINED, C.JOINED, C.LINK_ENDED, C.FAILED, C.LEFT_OUT, C.CATCHES_UP, C.CAUGHT_UP,
)  # fmt: skip
EXPECTED = {
    "awaited":     "joining      awaited      lost    present      -        lost    absent  -            -",
    "joining":     "joining      awaited      lost    present      -        lost    absent  -            -",
    "present":     "present      present      -       present      awaited  lost    absent  -            -",
    "lost":        "lost         lost         lost    present      -        lost    absent  -            -",
    "absent":      "absent       absent       absent  returned     -        absent  absent  -            awaited",
    "returned":    "returned     returned     -       returned     absent   absent  absent  catching_up  present",
    "catching up": "catching_up  catching_up  -       catching_up  absent   absent  absent  -            present",
}  # fmt: skip
PAIRS = [
    (Standing(name), change, word.replace("_", " "))
    for name, row in EXPECTED.items()
    for change, word in zip(COLUMNS, row.split(), strict=True)
]


@pytest.mark.parametrize(("standing", "change", "then"), PAIRS, ids=lambda one: getattr(one, "value", one))
def test_every_pair_of_standing_and_happening(standing: Standing, change: Change, then: str) -> None:
    if then == "-":
        with pytest.raises(ImpossibleChange, match=f"{change.value}.* while the site is {standing.value}"):
            after(standing, change)
    else:
        assert after(standing, change) is Standing(then)


def test_no_pair_is_left_out() -> None:
    assert len(PAIRS) == len(Standing) * len(Change)
    assert set(TRANSITIONS) == set(Standing)


def test_every_standing_is_reached_and_none_is_a_dead_end() -> None:
    """A site that failed, or is absent, may always come back."""
    for start in Standing:
        seen, ahead = {start}, [start]
        while ahead:
            for then in TRANSITIONS[ahead.pop()].values():
                if then not in seen:
                    seen.add(then)
                    ahead.append(then)
        assert seen == set(Standing), start


def test_only_a_decision_takes_a_site_out_of_the_run_or_back_in() -> None:
    """SP-11-35: a link that comes or goes never changes on whom the run counts."""
    for standing, row in TRANSITIONS.items():
        for change, then in row.items():
            if standing.out != then.out:
                assert change is (C.LEFT_OUT if then.out else C.CAUGHT_UP), (standing, change)


def test_a_link_is_there_from_joining_to_its_end() -> None:
    for standing, row in TRANSITIONS.items():
        assert (C.LINK_ENDED in row) is standing.linked
        assert row[C.JOINED].linked
        if standing.linked:
            assert not row[C.LINK_ENDED].linked


def test_what_is_joining_does_not_show_where_work_counts_on_a_link() -> None:
    """SP-11.14-4: a link with the site's certificate moves it only while it is awaited."""
    for standing, row in TRANSITIONS.items():
        awaited = standing in (Standing.AWAITED, Standing.JOINING)
        assert (row[C.DIALLED] is Standing.JOINING) is awaited
        assert row[C.TURNED_AWAY] is (Standing.AWAITED if awaited else standing)


def test_status_shows_the_standings_and_no_other_word() -> None:
    assert {one.value for one in Standing} == set(get_args(SiteState))


def test_the_docs_draw_the_table() -> None:
    checked = subprocess.run([sys.executable, ROOT / "docs" / "diagrams.py", "--check"], check=False)
    assert checked.returncode == 0, "run: python docs/diagrams.py"
