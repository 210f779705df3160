"""Where the time of each step went, as processes wrote it down: nothing twice, nothing outside, no patient."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from splitpeer.cli import main
from splitpeer.site.step_rows import StepRows
from splitpeer.timeline.parts import LINK, PARTS
from tests.splitpeer.roles.scene import PATIENTS, Federation, Nursery, Scene
from tests.splitpeer.timeline.trace_format import check

STEPS = 6
EPSILON = 4e-6
"""Seconds; two numbers that are compared were rounded to a microsecond, four times in all."""
HUB, SITES = "hub", ("site-t1", "site-flair")
OF_A_STEP = {
    HUB: frozenset(("masks", "activations", "decode", "decoder", "encode", "apply")),
    **dict.fromkeys(
        SITES,
        frozenset(("images", "encoder", "encode", "send", "gradients", "decode", "backward")),
    ),
}
Rows = list[dict[str, Any]]


def timed(path: Path) -> Rows:
    return [row for row in map(json.loads, path.read_text().splitlines()) if "timing" in row]


@pytest.fixture(scope="module")
def ran(
    tmp_path_factory: pytest.TempPathFactory, federation: Federation, nursery: Nursery
) -> Iterator[Scene]:
    """A federation of three processes, at its end."""
    scene = Scene(federation, tmp_path_factory.mktemp("timing"), nursery)
    scene.cast("t1", "flair", training={"steps": STEPS, "checkpoint_every": 3}, evaluation={"every": 3})
    hub, clients = scene.start_all()
    try:
        for daemon in (hub, *clients.values()):
            assert daemon.code() == 0, daemon.said
        yield scene
    finally:
        scene.clean_up()


@pytest.fixture(scope="module")
def files(ran: Scene) -> Mapping[str, Path]:
    """Of each party."""
    of_sites = {site: next((ran.folder / site).rglob("metrics.jsonl")) for site in SITES}
    return {HUB: ran.output / "metrics.jsonl", **of_sites}


@pytest.fixture(scope="module")
def rows(files: Mapping[str, Path]) -> Mapping[str, Rows]:
    return {party: timed(path) for party, path in files.items()}


def spans(row: Mapping[str, Any]) -> Iterator[tuple[str, str, float, float]]:
    """(thread, part, first, last), in seconds after the step began."""
    for thread, parts in row["timing"]["spans"].items():
        for part, numbers in parts.items():
            for began, took in zip(numbers[::2], numbers[1::2], strict=True):
                yield thread, part, began, began + took


def test_every_party_tells_of_every_step(rows: Mapping[str, Rows]) -> None:
    for party, of_party in rows.items():
        assert [row["step"] for row in of_party] == list(range(1, STEPS + 1))
        assert {row["timing"]["party"] for row in of_party} == {party}
    assert len({of_party[0]["timing"]["process"] for of_party in rows.values()}) == len(rows)


def test_each_part_is_in_each_step_and_in_the_table(rows: Mapping[str, Rows]) -> None:
    for party, of_party in rows.items():
        for row in of_party:
            found = {part for _, part, _, _ in spans(row)}
            assert OF_A_STEP[party] <= found <= PARTS.keys()
            assert row["timing"]["link"].keys() == LINK.keys()
    between = {part for row in rows[HUB] for _, part, _, _ in spans(row)}
    assert {"checkpoint", "evaluation"} <= between


def test_the_coordinator_tells_when_each_site_answered(rows: Mapping[str, Rows]) -> None:
    """Within the wait for it."""
    for party, of_party in rows.items():
        for row in of_party:
            answers = row["timing"].get("answers", {})
            assert answers.keys() == ({"activations", "apply"} if party == HUB else set())
            waits = {part: (first, last) for _, part, first, last in spans(row)}
            for part, there in answers.items():
                assert there.keys() == rows.keys() - {HUB}
                first, last = waits[part]
                assert all(first < moment <= last + 2e-6 for moment in there.values())


def test_parts_of_a_step_lie_within_it(rows: Mapping[str, Rows]) -> None:
    for party, of_party in rows.items():
        for row in of_party:
            inside = [span for span in spans(row) if span[1] in OF_A_STEP[party]]
            assert all(first >= -EPSILON and last <= row["seconds"] + EPSILON for *_, first, last in inside)


def test_parts_of_a_thread_do_not_overlap(rows: Mapping[str, Rows]) -> None:
    for of_party in rows.values():
        by_thread: dict[str, list[tuple[float, float]]] = {}
        for row in of_party:
            at = row["timing"]["at"]
            for thread, _, first, last in spans(row):
                by_thread.setdefault(thread, []).append((at + first, at + last))
        assert by_thread.keys() >= {"loop", "compute"}
        for held in by_thread.values():
            assert all(one[1] <= other[0] + EPSILON for one, other in pairwise(sorted(held)))


def test_what_links_cost(rows: Mapping[str, Rows]) -> None:
    """Each end encrypts and decrypts something; that is the loop's work, so it fits between two readings, which are
    later than the end of one step and earlier than the beginning of the next but one."""
    for of_party in rows.values():
        for before, row, after in zip(of_party, of_party[1:], of_party[2:], strict=False):
            link = row["timing"]["link"]
            assert link["encrypt"] > 0 and link["decrypt"] > 0 and link["message"] > 0
            most = after["timing"]["at"] - before["timing"]["at"] - before["seconds"]
            assert sum(link[name] for name in ("message", "encrypt", "decrypt")) <= most + EPSILON


def test_the_clocks_of_one_machine_agree(rows: Mapping[str, Rows]) -> None:
    """A site's step has begun before the coordinator's is over, and ends after that one has begun."""
    for site in SITES:
        for own, hub in zip(rows[site], rows[HUB], strict=True):
            assert own["timing"]["at"] < hub["timing"]["at"] + hub["seconds"]
            assert own["timing"]["at"] + own["seconds"] > hub["timing"]["at"]


def test_no_patient_is_named(ran: Scene, files: Mapping[str, Path]) -> None:
    names = [*PATIENTS, *(ran.key(patient).hex() for patient in PATIENTS)]
    for path in files.values():
        assert not [name for name in names if name in path.read_text()]


def test_a_site_keeps_so_much_and_no_more(tmp_path: Path) -> None:
    """A coordinator decides how many steps there are, and how often they are made."""
    kept = StepRows(tmp_path, most=1000)
    for step in range(1, 101):
        kept.metric(step=step, seconds=0.25)
    sizes = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    assert sizes.keys() == {"metrics.jsonl", "metrics.older.jsonl"}
    assert all(size < 1000 + len('{"step": 100, "seconds": 0.25}\n') for size in sizes.values())
    lines = (tmp_path / "metrics.older.jsonl").read_text() + (tmp_path / "metrics.jsonl").read_text()
    steps = [json.loads(line)["step"] for line in lines.splitlines()]
    assert steps == list(range(steps[0], 101))


def test_the_command_draws_it(
    ran: Scene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ran.folder)
    out, picture = tmp_path / "trace.json", tmp_path / "trace.png"
    with pytest.raises(SystemExit) as left:
        main(("trace", HUB, *SITES, "-o", str(out), "--picture", str(picture)))
    assert left.value.code == 0
    complete = check(json.loads(out.read_text()))
    assert {event["name"] for event in complete if event["cat"] == "step"} == {
        f"step {number}" for number in range(1, STEPS + 1)
    }
    assert {event["pid"] for event in complete} == {1, 2, 3}
    assert picture.read_bytes().startswith(b"\x89PNG")
    said = capsys.readouterr().out
    assert f"steps 1 to {STEPS} of {', '.join((HUB, *SITES))}" in said
    assert not [patient for patient in PATIENTS if patient in said + out.read_text()]
