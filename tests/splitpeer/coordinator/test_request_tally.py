"""How often sites asked for segmentations, and what became of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from splitpeer.coordinator.inference.tally import FILE, FLUSH_S, GIVEN_UP, OUTCOMES, RequestTally
from splitpeer.errors import DataError
from splitproto.messages import UNSEGMENTED

CODES = {
    "segmented": {"segmented"},
    "cancelled": {"cancelled", GIVEN_UP},
    "failed": {"failed", "site-lost", "deadline"},
    "refused": {"refused", "absent", "few-seats", "misaligned", "unusable", "too-large", "busy"},
}


def test_every_way_in_which_a_request_ends_is_counted(tmp_path: Path) -> None:
    """SP-11.19-12."""
    assert set().union(*CODES.values()) == {*UNSEGMENTED, "segmented", GIVEN_UP}
    for outcome, codes in CODES.items():
        for code in codes:
            tally = RequestTally(tmp_path)
            tally.add("charite", code)
            assert tally.by_site == {"charite": {one: int(one == outcome) for one in OUTCOMES}}, code


def test_counts_outlive_a_process_and_are_not_written_all_the_time(tmp_path: Path) -> None:
    now = [1000.0]
    tally = RequestTally(tmp_path, lambda: now[0])
    assert (tally.ended, tally.last, tally.due) == (0, None, False)
    tally.add("ukm", "segmented")
    assert not tally.due
    now[0] += FLUSH_S
    tally.add("ukm", "cancelled")
    assert tally.due
    tally.flush()
    assert not tally.due
    again = RequestTally(tmp_path)
    assert (again.ended, again.last, again.by_site) == (2, now[0], tally.by_site)
    again.add("charite", "busy")
    assert [*again.by_site] == ["charite", "ukm"]


def test_a_full_disk_costs_the_counts_only(tmp_path: Path) -> None:
    tally = RequestTally(tmp_path / "gone")
    tally.add("ukm", "segmented")
    tally.flush()
    (tmp_path / "gone").mkdir()
    tally.flush()
    assert RequestTally(tmp_path / "gone").ended == 1


@pytest.mark.parametrize(
    "text", ["", "[]", '{"sites": {}}', '{"last": null, "sites": {"a": {"segmented": 1}}}']
)
def test_counts_that_cannot_be_read_are_named(tmp_path: Path, text: str) -> None:
    (tmp_path / FILE).write_text(text)
    with pytest.raises(DataError, match="remove it, and these counts start at zero"):
        RequestTally(tmp_path)
