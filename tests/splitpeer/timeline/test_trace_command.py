"""`splitpeer trace` on files that a test writes; on those of real processes: `roles/test_timing.py`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from splitpeer.cli import main
from splitpeer.timeline.chrome import document
from splitpeer.timeline.picture import typical
from splitpeer.timeline.recorded import read, read_all
from tests.splitpeer.timeline.test_recorded import AT, row, write
from tests.splitpeer.timeline.trace_format import check

LANE_OF_FAR = 4
"""At the coordinator: steps, loop, compute, and then sites by name."""


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, ...]:
    """Of a coordinator and a site, in the working directory."""
    monkeypatch.chdir(tmp_path)
    asked = {"activations": [0.0, 0.2], "apply": [0.3, 0.2]}
    hub = [row(n, loop=asked, compute={"decoder": [0.2, 0.1]}) for n in range(1, 9)]
    there = {"activations": {"far": 0.2, "near": 0.125}, "apply": {"near": 0.5}}
    hub[1:] = [one | {"timing": one["timing"] | {"answers": there}} for one in hub[1:]]
    write(tmp_path / "hub" / "metrics.jsonl", *hub)
    gone, made = {"gradients": [0.25, 0.25]}, {"encoder": [0.0, 0.25]}
    site = [row(n, "site", at=AT + n - 0.25, compute=made, loop=gone) for n in range(1, 9)]
    write(tmp_path / "site" / "metrics.jsonl", *site)
    return "hub", "site"


def call(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as left:
        main(("trace", *arguments))
    said = capsys.readouterr()
    return int(left.value.code or 0), said.out, said.err


def test_a_trace_and_a_picture(folders: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, *folders, "-o", "t.json", "--picture", "p.png", "--steps", "2-3")
    assert code == 0
    assert out.splitlines()[-1] == "wrote t.json and p.png: steps 2 to 3 of hub, site"
    assert "decoder" in out and "100.0" in out
    assert "far, 2 of 2: +75.0" in out
    complete = check(json.loads(Path("t.json").read_text()))
    assert {event["name"] for event in complete if event["cat"] == "step"} == {"step 2", "step 3"}
    waits = [event for event in complete if event["tid"] == LANE_OF_FAR]
    assert [(event["name"], event["dur"]) for event in waits] == 2 * [
        ("activations", pytest.approx(2e5, abs=1))
    ]
    assert Path("p.png").read_bytes().startswith(b"\x89PNG")
    assert call(capsys, *folders, "--picture", "p.svg")[0] == 0
    assert "<svg" in Path("p.svg").read_text()
    assert Path("trace.json").exists()


def test_a_torn_last_line_is_told_in_one_line(
    folders: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    path = Path("site") / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-30])
    code, out, err = call(capsys, *folders)
    assert (code, out.splitlines()[-1]) == (0, "wrote trace.json: steps 1 to 8 of hub, site")
    assert err.splitlines() == [
        f"splitpeer: {path}: the last line is incomplete (a crash while it was written) and was ignored"
    ]


def test_json(folders: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, *folders, "--json")
    told = json.loads(out)
    assert (code, told["wrote"]) == (0, ["trace.json"])
    assert told["parties"]["hub"]["parts"] == pytest.approx(
        {"activations": 200.0, "decoder": 100.0, "apply": 200.0}
    )
    assert told["parties"]["hub"]["last"] == {
        "activations": {"site": "far", "steps": 7, "behind": pytest.approx(75.0, abs=0.01)}
    }
    assert told["parties"]["site"]["rest"] == pytest.approx(0.0, abs=0.01)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("hub", "--steps", "5-3"), "give two numbers, the smaller first"),
        (("hub", "--steps", "few"), "give two numbers"),
        (("hub", "--steps", "90"), "no step from 90 to 90: it holds 1 to 8"),
        (("nowhere",), "no metrics.jsonl there"),
        (("hub", "hub"), "were both written by hub"),
        (("hub", "--picture", "p.gif"), "a picture is a .png or a .svg"),
        (("hub", "-o", "gone/t.json"), "gone/t.json: cannot be written"),
        ((), "Missing argument 'RUN_FOLDER...'"),
    ],
)
def test_mistakes_are_one_line(
    folders: tuple[str, ...], capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], said: str
) -> None:
    code, _, err = call(capsys, *arguments)
    assert code == 4
    assert len(err.splitlines()) == 1 and said in err
    assert not Path("trace.json").exists()


def test_steps_that_overlap_are_side_by_side(tmp_path: Path) -> None:
    """As where the next step begins before the last is over; none is lost."""
    rows = (row(n, at=AT + 0.4 * n, loop={"apply": [0.0, 0.5]}) for n in range(1, 6))
    complete = check(document([read(write(tmp_path / "metrics.jsonl", *rows))]))
    assert sorted(event["name"] for event in complete) == ["apply"] * 5 + [f"step {n}" for n in range(1, 6)]


def test_times_count_from_the_first_span(folders: tuple[str, ...]) -> None:
    """A site's encoder begins before the coordinator's step: both are on one clock."""
    complete = check(document(read_all(map(Path, folders))))
    first = {event["name"]: event["ts"] for event in reversed(complete)}
    assert (first["encoder"], first["activations"]) == pytest.approx((0.0, 250_000.0), abs=1.0)


def test_steps_that_are_typical(tmp_path: Path) -> None:
    """Not the first, which warm up, and not those with an evaluation between them."""
    ends = (row(n, at=AT + at) for n, at in enumerate((0.0, 9.0, 10.0, 11.0, 12.0, 13.0, 40.0, 41.0), 1))
    assert typical([read(write(tmp_path / "metrics.jsonl", *ends))]) == (2, 4)
    one = [read(write(tmp_path / "metrics.jsonl", row(7)))]
    assert typical(one) == (7, 7)
