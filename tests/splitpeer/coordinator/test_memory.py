"""What the coordinator knows of a site's progress, and to which step a site that lost or missed some goes back."""

from __future__ import annotations

import pytest

from splitpeer.coordinator.memory import RESTARTS, Memory, SiteRestarted
from splitpeer.errors import JobFailed
from splitproto.messages import JobAccept

FIRST, SECOND = b"1" * 16, b"2" * 16


def accept(incarnation: bytes, applied: int, *checkpoints: int) -> JobAccept:
    return JobAccept(incarnation, applied, checkpoints, 3)


def at_work(applied: int, *checkpoints: int) -> Memory:
    """A site that joined and has come so far."""
    memory = Memory("ukm")
    memory.hear(accept(FIRST, 0), absent=False)
    memory.applied, memory.checkpoints = applied, checkpoints
    return memory


def test_a_new_link_of_the_same_process_has_lost_nothing() -> None:
    memory = at_work(7, 5)
    memory.hear(accept(FIRST, 7, 5), absent=False)
    assert (memory.lost, memory.restarts) == (False, 0)


def test_a_new_process_goes_back_alone_where_it_saved_all_that_it_had_applied() -> None:
    """SP-11-34."""
    memory = at_work(7, 5)
    memory.hear(accept(SECOND, 0, 5, 7), absent=False)
    assert memory.lost
    assert memory.restore_point(7) == 7
    memory.note_rolled_back(7)
    assert (memory.applied, memory.lost) == (7, False)


@pytest.mark.parametrize(("saved", "computed"), [((5,), 0), ((5, 7), 8)], ids=["not saved", "computed since"])
def test_a_new_process_that_lost_a_step_makes_all_go_back(saved: tuple[int, ...], computed: int) -> None:
    memory = at_work(7, 5)
    memory.hear(accept(SECOND, 0, *saved), absent=False)
    with pytest.raises(SiteRestarted):
        memory.restore_point(computed)


def test_a_second_restart_before_it_has_gone_back_does_not_hide_what_the_first_lost() -> None:
    memory = at_work(7, 5)
    memory.hear(accept(SECOND, 0, 0, 5), absent=False)
    memory.hear(accept(b"3" * 16, 0, 0, 5), absent=False)
    with pytest.raises(SiteRestarted):
        memory.restore_point(0)


def test_a_site_that_restarts_again_and_again_has_failed_until_it_saves_with_the_others() -> None:
    memory = at_work(7, 7)
    for number in range(RESTARTS + 1):
        memory.hear(accept(bytes([number]) * 16, 0, 7), absent=False)
    with pytest.raises(JobFailed, match=f"restarted {RESTARTS + 1} times"):
        memory.restore_point(0)
    memory.forgive()
    assert memory.restore_point(0) == 7


def test_a_site_that_was_away_goes_on_from_what_still_counts() -> None:
    """SP-11-36: steps that the others have undone never were."""
    memory = at_work(7, 3, 5)
    assert memory.return_point(9) is None
    assert memory.return_point(6) == 5
    memory.note_undone(4)
    memory.note_undone(6)
    assert memory.return_point(9) == 3
    memory.note_caught_up()
    assert memory.return_point(9) is None
    memory.note_undone(2)
    with pytest.raises(JobFailed, match="no checkpoint of step 2 or before"):
        memory.return_point(9)


def test_what_a_site_remembers_that_was_absent_before_this_coordinator_began_is_not_known() -> None:
    memory = Memory("ukm")
    memory.hear(accept(FIRST, 7, 5), absent=True)
    assert memory.return_point(9) == 5


def test_a_checkpoint_takes_the_place_of_those_that_need_not_be_kept() -> None:
    memory = at_work(10, 2, 5)
    memory.note_saved(10, keep=(5,))
    assert memory.checkpoints == (5, 10)
