"""The rules of the Trace Event Format that viewers rely on, for what `splitpeer trace` writes."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

ROUNDED_US = 4.0
"""What was recorded was rounded to a microsecond, up to four times where two events meet."""


def check(document: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The complete events of a document that keeps the rules."""
    assert document["displayTimeUnit"] in ("ms", "ns")
    events = document["traceEvents"]
    assert events and {event["ph"] for event in events} == {"M", "X", "C"}
    named: dict[str, set[tuple[int, ...]]] = {"process_name": set(), "thread_name": set()}
    for event in events:
        assert isinstance(event["name"], str) and event["name"]
        assert isinstance(event["pid"], int) and isinstance(event["tid"], int)
        if event["ph"] == "M":
            assert event["name"] in (*named, "process_sort_index", "thread_sort_index")
            if event["name"] in named:
                key = (event["pid"],) if event["name"] == "process_name" else (event["pid"], event["tid"])
                assert key not in named[event["name"]] and isinstance(event["args"]["name"], str)
                named[event["name"]].add(key)
            continue
        assert isinstance(event["ts"], int | float) and event["ts"] >= 0
        assert (event["pid"],) in named["process_name"], "names come before what they name"
        if event["ph"] == "C":
            assert event["args"] and all(isinstance(value, int | float) for value in event["args"].values())
        else:
            assert isinstance(event["dur"], int | float) and event["dur"] >= 0
            assert (event["pid"], event["tid"]) in named["thread_name"] and isinstance(event["cat"], str)
    timed = [event["ts"] for event in events if event["ph"] != "M"]
    assert timed == sorted(timed)
    complete = [event for event in events if event["ph"] == "X"]
    _nested(complete)
    return complete


def _nested(complete: list[dict[str, Any]]) -> None:
    """Events of a thread must not overlap unless one holds the other; ours do not overlap at all."""
    threads: dict[tuple[int, int], list[tuple[float, float]]] = {}
    for event in complete:
        threads.setdefault((event["pid"], event["tid"]), []).append((event["ts"], event["ts"] + event["dur"]))
    for spans in threads.values():
        assert all(one[1] <= other[0] + ROUNDED_US for one, other in pairwise(sorted(spans)))
