"""A timeline as JSON in the Trace Event Format, which chrome://tracing and Perfetto's viewer open.

The format: "Trace Event Format" of the Chromium project
(docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU). Used are complete events (`ph` X, with
`ts` and `dur` in microseconds), counters (C) and metadata (M). A process is a party, a thread one of its threads.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from typing import Any

from splitpeer.timeline.recorded import PartySteps, Span, in_lanes, kind_of, threads_of
from splitpeer.timeline.spans import LOOP

Event = dict[str, Any]


def document(recorded: Sequence[PartySteps]) -> dict[str, Any]:
    """The whole of the JSON; times count from the beginning of the first span."""
    began = min(_beginning(one) for one in recorded)
    events = [event for pid, one in enumerate(recorded, 1) for event in _party(pid, one, began)]
    # Names first; viewers want the others in order, and an outer event before what lies in it.
    events.sort(key=lambda event: (event["ph"] != "M", event.get("ts", 0.0), -event.get("dur", 0.0)))
    return {
        "traceEvents": events,
        "displayTimeUnit": "ms",
        "otherData": {"began": datetime.fromtimestamp(began, UTC).isoformat()},
    }


def _beginning(one: PartySteps) -> float:
    return min((span.began for step in one.steps for span in step.spans), default=one.began)


def _party(pid: int, one: PartySteps, began: float) -> Iterator[Event]:
    yield _named(pid, 0, "process_name", name=one.party)
    yield _named(pid, 0, "process_sort_index", sort_index=pid)

    def us(moment: float) -> float:
        # A thousandth of what was recorded.
        return max(0.0, round((moment - began) * 1e6, 3))

    tid = 0
    for lane in in_lanes(one.steps, lambda step: (step.began, step.ended)):
        tid += 1
        yield from _thread(pid, tid, "steps")
        for step in lane:
            ts = us(step.began)
            yield {"name": f"step {step.number}", "cat": "step", "ph": "X", "pid": pid, "tid": tid, "ts": ts,
                   "dur": us(step.ended) - ts}  # fmt: skip
    for thread, lanes in threads_of(one.steps).items():
        for spans in lanes:
            tid += 1
            yield from _thread(pid, tid, thread)
            for span in spans:
                ts = us(span.began)
                yield {"name": span.part, "cat": kind_of(span.part), "ph": "X", "pid": pid, "tid": tid, "ts": ts,
                       "dur": us(span.ended) - ts}  # fmt: skip
    for site, waits in _waits(one).items():
        for asked in in_lanes(waits, lambda wait: (wait.began, wait.ended)):
            tid += 1
            yield from _thread(pid, tid, f"for {site}")
            for wait in asked:
                ts = us(wait.began)
                yield {"name": wait.part, "cat": "wait", "ph": "X", "pid": pid, "tid": tid, "ts": ts,
                       "dur": us(wait.ended) - ts}  # fmt: skip
    for step in one.steps:
        if step.link:
            cost = {name: round(1e3 * seconds, 3) for name, seconds in step.link.items()}
            yield {
                "name": "links, ms a step",
                "ph": "C",
                "pid": pid,
                "tid": 0,
                "ts": us(step.ended),
                "args": cost,
            }


def _waits(one: PartySteps) -> dict[str, list[Span]]:
    """By site, from when it was asked until its answer was there."""
    found: dict[str, list[Span]] = {}
    for step in one.steps:
        asked = {span.part: span.began for span in step.spans if span.thread == LOOP}
        for part, there in step.answers.items():
            for site, moment in there.items():
                found.setdefault(site, []).append(Span(site, part, asked.get(part, step.began), moment))
    return dict(sorted(found.items()))


def _thread(pid: int, tid: int, name: str) -> Iterator[Event]:
    yield _named(pid, tid, "thread_name", name=name)
    yield _named(pid, tid, "thread_sort_index", sort_index=tid)


def _named(pid: int, tid: int, what: str, **args: Any) -> Event:
    return {"name": what, "ph": "M", "pid": pid, "tid": tid, "args": args}
