"""Whether a site is here, as links come and go: what log, board and those who wait for it are told."""

from __future__ import annotations

import asyncio
import traceback

import pytest

from splitpeer.coordinator.asking import Asking, Question
from splitpeer.coordinator.presence import Presence
from splitpeer.coordinator.site_link import SiteLink
from splitpeer.coordinator.standing import ImpossibleChange, Standing
from splitpeer.daemon import happenings as h
from splitpeer.daemon.sinks.board import BoardSink
from splitpeer.errors import DeadlinePassed, JobFailed
from splitproto.errors import LinkLost, Misaligned, SplitprotoError
from splitproto.messages import Bye


class Session:
    """A link that ends when the test wants it to."""

    tls, rotation_due, slept = "TLSv1.3", False, 0.0

    def __init__(self) -> None:
        loop = asyncio.get_running_loop()
        self.ended: asyncio.Future[SplitprotoError | None] = loop.create_future()
        self.leaving: asyncio.Future[None] = loop.create_future()
        self.farewell: Bye | None = None

    @property
    def alive(self) -> bool:
        return not self.ended.done()

    def fail(self, error: SplitprotoError | None) -> None:
        if self.alive:
            self.ended.set_result(error)
            self.leaving.set_result(None)

    async def close(self, reason: str, text: str = "") -> None:
        self.fail(None)

    def cause_of(self, error: SplitprotoError) -> str:
        return str(error)


class Board:
    """Remembers the words it was told."""

    def __init__(self) -> None:
        self.words: list[str] = []

    def site(self, name: str, **fields: object) -> None:
        if "state" in fields:
            self.words.append(str(fields["state"]))

    def waits(self, what: str | None, **fields: object) -> None: ...


@pytest.fixture
def board() -> Board:
    return Board()


@pytest.fixture
def presence(board: Board) -> Presence:
    return Presence("ukm", "t1", 0.05, h.Reporter(BoardSink(board)))  # type: ignore[arg-type]


def joined(presence: Presence) -> SiteLink:
    link = SiteLink("ukm", Session(), 5.0, presence.show_waiting)  # type: ignore[arg-type]
    presence.note_dialled()
    presence.take(link)
    return link


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_the_board_shows_the_word_of_the_standing(presence: Presence, board: Board) -> None:
    link = joined(presence)
    link.session.fail(LinkLost("cut"))
    await settle()
    presence.leave_out("it did not come back")
    joined(presence)
    presence.start_catching_up()
    presence.end_catching_up()
    assert board.words == [
        "awaited", "joining", "present", "awaited", "absent", "absent", "returned", "catching up", "present",
    ]  # fmt: skip
    assert (presence.here, presence.absent, presence.absence) == (True, False, "")


async def test_one_that_is_refused_is_awaited_again(presence: Presence, board: Board) -> None:
    presence.note_dialled()
    presence.note_refused("it lacks 1 of the run's 3 patients")
    presence.note_turned_away()
    assert board.words == ["awaited", "joining", "awaited"]
    with pytest.raises(DeadlinePassed, match="when it dialled: it lacks 1"):
        await presence.wait_link("to begin")


async def test_the_loss_of_a_link_is_logged_once(presence: Presence, caplog) -> None:
    """Whichever sees it first, the watch over the link or a request on it."""
    link = joined(presence)
    link.session.fail(LinkLost("cut"))
    presence.lose(link, "cut", waiting_for="activations of step 3")
    await settle()
    assert [record.getMessage() for record in caplog.records] == ["site.lost"]
    assert presence.standing is Standing.AWAITED


async def test_the_end_of_an_older_link_changes_nothing(presence: Presence) -> None:
    older, newer = joined(presence), joined(presence)
    older.session.fail(LinkLost("cut"))
    await settle()
    assert presence.here and presence.link is newer


async def test_one_that_declined_is_lost_to_all_who_wait_and_may_still_join(presence: Presence) -> None:
    waiting = asyncio.create_task(presence.wait_joined())
    presence.note_dialled()
    presence.note_declined(JobFailed("site ukm declined the job: no"))
    presence.note_turned_away()
    with pytest.raises(JobFailed, match="declined"):
        await waiting
    with pytest.raises(JobFailed, match="declined"):
        await presence.wait_link("to begin")
    joined(presence)
    assert await presence.wait_link("to begin") is presence.link


async def test_a_link_that_has_just_ended_does_not_count_as_joined(presence: Presence) -> None:
    """The watch over the link has not run yet."""
    joined(presence).session.fail(LinkLost("cut"))
    waiting = asyncio.create_task(presence.wait_joined())
    await settle()
    assert not waiting.done()
    joined(presence)
    await waiting


async def test_one_that_is_let_go_as_it_comes_back_is_not_waited_for(presence: Presence) -> None:
    waiting = asyncio.create_task(presence.wait_link("to begin"))
    await settle()
    joined(presence)
    presence.let_go()
    with pytest.raises(DeadlinePassed, match="let go"):
        await waiting


async def test_one_that_is_lost_while_it_catches_up_does_not_hold_up_the_others(presence: Presence) -> None:
    presence.leave_out("cut")
    link = joined(presence)
    presence.start_catching_up()
    link.session.fail(LinkLost("cut"))
    await settle()
    assert presence.standing is Standing.ABSENT
    with pytest.raises(DeadlinePassed, match="lost again"):
        await presence.wait_link_unless_absent("to begin")
    with pytest.raises(DeadlinePassed, match="lost again"):
        presence.start_catching_up()


async def test_what_the_table_does_not_list_is_an_error(presence: Presence) -> None:
    joined(presence)
    with pytest.raises(ImpossibleChange):
        presence.start_catching_up()


async def test_a_link_that_wears_out_while_its_site_joins_still_carries_a_question(
    presence: Presence,
) -> None:
    """Else the next one wears out as well, and the next."""
    link = joined(presence)
    link.session.rotation_due, link.session.rotation_cause = True, "old"
    assert not await link.rotate_if_due() and link.alive
    link.begun = True
    assert await link.rotate_if_due() and not link.alive


# --- asking --------------------------------------------------------------------------------------------------


class Site:
    """Answers as the test wants."""

    def __init__(self, presence: Presence) -> None:
        self.presence, self.asked = presence, 0
        self.asking = Asking(presence, self.ready, self.prepare, 0.05, 5.0)

    async def ready(self, link: SiteLink) -> None: ...

    async def prepare(self, link: SiteLink, question: Question) -> None: ...

    async def answer(self, link: SiteLink, *errors: SplitprotoError) -> int:
        self.asked += 1
        if self.asked <= len(errors):
            link.session.fail(errors[self.asked - 1])
            joined(self.presence)
            raise errors[self.asked - 1]
        return self.asked


async def test_a_question_whose_link_breaks_is_asked_again_on_the_next(presence: Presence) -> None:
    joined(presence)
    site = Site(presence)
    assert await site.asking.ask(Question("a number"), site.answer, LinkLost("cut"), LinkLost("again")) == 3


async def test_an_error_that_a_new_link_does_not_mend_is_not_asked_again(presence: Presence) -> None:
    joined(presence)
    site = Site(presence)
    with pytest.raises(JobFailed, match=r"site ukm: .*other samples") as failed:
        await site.asking.ask(Question("a number"), site.answer, Misaligned("other samples"))
    assert (site.asked, presence.standing) == (1, Standing.LOST)
    told = "".join(traceback.format_exception(failed.value))
    assert "in answer" in told, "the traceback does not name the verb"
