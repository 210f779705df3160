"""What is recorded of a step: by thread and part, on one clock."""

from __future__ import annotations

import threading
import time
from dataclasses import fields
from pathlib import Path

import pytest

from splitpeer.timeline import spans as module
from splitpeer.timeline.parts import LINK, PARTS
from splitpeer.timeline.spans import LOOP, UNRECORDED, LinkTimes, Spans
from splitproto.cost import LinkCost


class Clocks:
    """Stands in for `time`."""

    def __init__(self) -> None:
        self.now, self.ahead = 100.0, 1_700_000_000.0

    def monotonic(self) -> float:
        return self.now

    def time(self) -> float:
        return self.now + self.ahead


@pytest.fixture
def clocks(monkeypatch: pytest.MonkeyPatch) -> Clocks:
    clocks = Clocks()
    monkeypatch.setattr(module, "time", clocks)
    return clocks


def test_a_step(clocks: Clocks) -> None:
    """A part that began before the step, twice the same part, and nothing twice."""
    spans = Spans("hub")
    with spans.of("read"):
        clocks.now = 101.0
    for seconds in (0.25, 0.5):
        with spans.of("decoder"):
            clocks.now += seconds
    timing = spans.take(101.0, {"encrypt": 0.5})
    assert timing.at == 1_700_000_101.0
    assert timing.spans == {LOOP: {"read": [-1.0, 1.0], "decoder": [0.0, 0.25, 0.25, 0.5]}}
    assert (timing.party, timing.link) == ("hub", {"encrypt": 0.5})
    assert spans.take(102.0).spans == {}


async def test_answers_of_sites(clocks: Clocks) -> None:
    """One that fails is no answer."""
    spans = Spans("hub")

    async def question(seconds: float, *, fails: bool = False) -> str:
        clocks.now += seconds
        if fails:
            raise ValueError("no")
        return "yes"

    assert await spans.answer("activations", "near", question(0.25)) == "yes"
    with pytest.raises(ValueError, match="no"):
        await spans.answer("activations", "lost", question(1.0, fails=True))
    await spans.answer("activations", "far", question(0.5))
    assert spans.take(100.0).answers == {"activations": {"near": 0.25, "far": 1.75}}
    assert spans.take(100.0).answers == {}


def test_a_part_that_fails_has_taken_its_time(clocks: Clocks) -> None:
    spans = Spans()

    def fail() -> None:
        clocks.now += 2.0
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        spans.timed("encoder", fail)()
    assert spans.take(100.0).spans == {LOOP: {"encoder": [0.0, 2.0]}}


def test_threads_are_told_apart() -> None:
    spans = Spans()
    began = time.monotonic()
    thread = threading.Thread(target=spans.timed("decoder", time.sleep), args=(0.0,), name="compute")
    with spans.of("activations"):
        thread.start()
        thread.join()
    taken = spans.take(began).spans
    assert {thread: list(parts) for thread, parts in taken.items()} == {
        "compute": ["decoder"],
        LOOP: ["activations"],
    }
    (outer, lasted), (inner, took) = taken[LOOP]["activations"], taken["compute"]["decoder"]
    # Rounded to a microsecond each.
    assert outer - 2e-6 <= inner <= inner + took <= outer + lasted + 4e-6


def test_the_wall_clock(clocks: Clocks) -> None:
    """What the reading is off by moves no step; a clock that is set does."""
    spans = Spans()
    clocks.ahead = 50.0
    assert spans.take(100.0).at == 150.0
    clocks.ahead = 50.01
    assert spans.take(101.0).at == 151.0
    clocks.ahead = 80.0
    assert spans.take(102.0).at == 182.0


def test_what_is_no_part_of_a_step_is_not_kept() -> None:
    with UNRECORDED.of("encoder"):
        pass
    assert UNRECORDED.take(0.0).spans == {}


def test_links() -> None:
    class Link:
        def __init__(self, **seconds: float) -> None:
            self.cost = LinkCost(**seconds)

    times = LinkTimes()
    one, two = Link(encrypt=1.0), Link(decrypt=2.0)
    assert times.take([one]) == {"message": 0.0, "encrypt": 1.0, "decrypt": 0.0, "blocked": 0.0}
    one.cost.encrypt, one.cost.blocked = 1.5, 0.25
    # A second link counts from its beginning; one that has ended is gone.
    assert times.take([one, two]) == {"message": 0.0, "encrypt": 0.5, "decrypt": 2.0, "blocked": 0.25}
    assert times.take([two]) == dict.fromkeys(("message", "encrypt", "decrypt", "blocked"), 0.0)


def test_the_words_for_links_are_those_of_the_counter() -> None:
    assert list(LINK) == [one.name for one in fields(LinkCost)]


def test_the_docs_have_the_table() -> None:
    docs = Path(__file__).resolve().parents[3] / "docs" / "running.md"
    rows = "".join(f"| `{name}` | {part.kind} | {part.means} |\n" for name, part in PARTS.items())
    assert f"|---|---|---|\n{rows}<!-- end -->" in docs.read_text()
