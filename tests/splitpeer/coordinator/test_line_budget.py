"""Lines that a peer can cause: the log's rate and the trail's number are bounded, and what is left out is counted."""

from __future__ import annotations

from splitpeer.coordinator.line_budget import NOTED, LineBudget


def test_a_flood_is_counted_in_the_next_line(caplog) -> None:
    now, noted = 0.0, []
    lines = LineBudget(
        lambda name, **fields: noted.append(fields), a_second=0.1, at_once=2.0, clock=lambda: now
    )
    for number in range(1000):
        lines.say("site.refused", number=number)
    now = 10.0
    lines.say("site.refused", number=1000)
    said = [record.fields for record in caplog.records]
    assert said == [{"number": 0}, {"number": 1}, {"number": 1000, "not_shown": 998}]
    assert len(noted) == NOTED
    assert [fields for fields in noted if "and_more" in fields] == [noted[-1]]
