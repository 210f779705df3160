"""What is read of the files of several parties, and what is refused, in one line."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from splitpeer.errors import ConfigError, DataError, PeerError
from splitpeer.timeline.recorded import chosen, file_of, in_lanes, read, read_all, threads_of
from splitpeer.timeline.summary import covered, summarise

AT = 1_700_000_000.0


def row(
    step: int, party: str = "hub", at: float | None = None, **spans: dict[str, list[float]]
) -> dict[str, Any]:
    """A step of half a second."""
    began = AT + step if at is None else at
    timing = {"party": party, "process": 1, "at": began, "spans": spans, "link": {"encrypt": 0.01 * step}}
    return {"step": step, "loss": 1.0, "seconds": 0.5, "timing": timing}


def write(path: Path, *rows: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(one) + "\n" for one in rows))
    return path


def test_other_rows_are_left_out(tmp_path: Path) -> None:
    path = write(
        tmp_path / "metrics.jsonl",
        row(1, loop={"apply": [0.1, 0.2]}),
        {"step": 1, "dice": {"mean": 0.5}},
        {"step": 0, "rollback": True},
        {"step": 1, "loss": 2.0, "seconds": 1.0},
        row(1, at=AT + 9),
    )
    found = read(path)
    assert (found.party, [step.number for step in found.steps]) == ("hub", [1, 1])
    (span,) = found.steps[0].spans
    assert (span.thread, span.part) == ("loop", "apply")
    assert (span.began, span.ended) == pytest.approx((AT + 1.1, AT + 1.3))
    assert (found.began, found.ended) == (AT + 1, AT + 9.5)


def test_an_older_file_comes_first(tmp_path: Path) -> None:
    write(tmp_path / "metrics.older.jsonl", row(1), row(2))
    path = write(tmp_path / "metrics.jsonl", row(3))
    assert [step.number for step in read(path).steps] == [1, 2, 3]


def test_the_newest_run_of_a_folder(tmp_path: Path) -> None:
    older = write(tmp_path / "state" / "job-1" / "metrics.jsonl", row(1))
    newer = write(tmp_path / "state" / "job-2" / "metrics.jsonl", row(1))
    os.utime(older, (1.0, 1.0))
    assert file_of(tmp_path) == file_of(tmp_path / "state") == newer
    assert file_of(older.parent) == file_of(older) == older
    for nothing in (tmp_path / "none", tmp_path / "empty"):
        (tmp_path / "empty").mkdir(exist_ok=True)
        with pytest.raises(ConfigError, match=r"no metrics\.jsonl there: name the \[output\] folder"):
            file_of(nothing)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda one: one["timing"].pop("at"),
        lambda one: one["timing"].update(at="yesterday"),
        lambda one: one["timing"].update(at=True),
        lambda one: one["timing"].update(spans=[1]),
        lambda one: one["timing"]["spans"].update(loop={"apply": [0.1]}),
        lambda one: one["timing"]["spans"].update(loop={"apply": [0.1, float("nan")]}),
        lambda one: one["timing"].update(link=None),
        lambda one: one.update(timing=None),
        lambda one: one.pop("seconds"),
        lambda one: one.update(seconds=10**400),
        lambda one: one.update(step=float("inf")),
        lambda one: one["timing"].update(at=1e30),
    ],
)
def test_a_row_that_is_not_one(tmp_path: Path, spoil: Any) -> None:
    bad = row(2)
    spoil(bad)
    path = write(tmp_path / "metrics.jsonl", row(1), bad)
    with pytest.raises(DataError, match=r"metrics\.jsonl, line 2: not a row of splitpeer"):
        read(path)


@pytest.mark.parametrize("tail", [b'{"step": 3, "lo', b"{", b"\0" * 600, '{"dice": "\xfc'.encode()[:-1]])
def test_a_last_line_that_a_crash_tore_is_ignored(tmp_path: Path, tail: bytes) -> None:
    path = write(tmp_path / "metrics.jsonl", row(1), row(2))
    whole = path.read_bytes()
    path.write_bytes(whole + tail)
    found = read(path)
    assert ([step.number for step in found.steps], found.torn) == ([1, 2], (path,))
    path.write_bytes(whole.rstrip())
    assert ([step.number for step in read(path).steps], read(path).torn) == ([1, 2], ())
    # A bad line with its line feed, or another after it, is no crash of the last write.
    for bad in (whole + tail + b"\n", whole[:-30] + b"\n" + whole):
        path.write_bytes(bad)
        with pytest.raises(DataError, match=r"metrics\.jsonl, line [23]: not a row of splitpeer"):
            read(path)


def test_an_older_file_may_be_torn_too(tmp_path: Path) -> None:
    older = write(tmp_path / "metrics.older.jsonl", row(1), row(2))
    older.write_bytes(older.read_bytes()[:-30])
    found = read(write(tmp_path / "metrics.jsonl", row(3)))
    assert ([step.number for step in found.steps], found.torn) == ([1, 3], (older,))


def test_files_that_are_none(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    contents = {b"half a li\n": "line 1", b"[1]\n": "line 1", b"": "no step in it", b"{}\n": "no step in it"}
    contents |= {b"[1]": "line 1", b"half a li": "no step in it"}
    for content, said in contents.items():
        path.write_bytes(content)
        with pytest.raises(DataError, match=said):
            read(path)


def test_files_of_different_runs(tmp_path: Path) -> None:
    hub = write(tmp_path / "a" / "metrics.jsonl", row(1), row(2))
    same = write(tmp_path / "b" / "metrics.jsonl", row(1))
    later = write(tmp_path / "c" / "metrics.jsonl", row(1, "site", at=AT + 60))
    for others, said in (([same], "were both written by hub"), ([later], "do not overlap in time")):
        with pytest.raises(ConfigError, match=said):
            read_all([hub, *others])


def test_steps_that_a_party_does_not_have(tmp_path: Path) -> None:
    found = read_all([write(tmp_path / "metrics.jsonl", row(3), row(4), row(5))])
    assert [step.number for step in chosen(found, 4, 9)[0].steps] == [4, 5]
    with pytest.raises(PeerError, match=re.escape("no step from 6 to 9: it holds 3 to 5")):
        chosen(found, 6, 9)


def test_what_overlaps_has_a_lane_of_its_own() -> None:
    def ends(item: tuple[float, float]) -> tuple[float, float]:
        return item

    assert in_lanes([(2.0, 3.0), (0.0, 1.0), (1.0, 2.0)], ends) == [[(0.0, 1.0), (1.0, 2.0), (2.0, 3.0)]]
    assert in_lanes([(0.0, 2.0), (1.0, 3.0), (2.0, 4.0)], ends) == [[(0.0, 2.0), (2.0, 4.0)], [(1.0, 3.0)]]


def test_medians(tmp_path: Path) -> None:
    """Spans of a step are added up; what few steps have is counted one by one; two threads at once cover once."""
    rows = [
        row(
            1, loop={"apply": [0.1, 0.2], "evaluation": [-0.3, 0.25]}, compute={"masks": [0.0, 0.1, 0.2, 0.1]}
        ),
        row(2, loop={"apply": [0.1, 0.1]}, compute={"masks": [0.0, 0.1, 0.2, 0.2]}),
        row(3, loop={"apply": [0.1, 0.4]}, compute={"masks": [0.0, 0.1, 0.2, 0.3], "more": [0.0, 0.125]}),
    ]
    found = read(write(tmp_path / "metrics.jsonl", *rows))
    times = summarise(found)
    assert (times.steps, times.step) == (3, pytest.approx(500.0))
    assert dict(times.parts) == pytest.approx(
        {"masks": 300.0, "apply": 200.0, "evaluation": 250.0, "more": 125.0}
    )
    assert list(times.parts) == ["masks", "apply", "evaluation", "more"]
    assert times.single == {"evaluation": 1, "more": 1}
    assert times.link == {"encrypt": 20.0}
    assert [covered(step) for step in found.steps] == pytest.approx([0.3, 0.4, 0.5], abs=1e-6)
    assert times.rest == pytest.approx(100.0, abs=0.01)
    assert list(threads_of(found.steps)) == ["loop", "compute"]
