"""A happening is reported once, and every place shows its part of it."""

from __future__ import annotations

import inspect
import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from splitpeer.daemon import happenings as h
from splitpeer.daemon import sinks
from splitpeer.daemon.board import Board
from splitpeer.daemon.sinks import budgets, progress, sparing
from splitpeer.daemon.sinks.board import BoardSink
from splitpeer.daemon.sinks.console import ConsoleSink
from splitpeer.daemon.sinks.log import LogSink, lines
from splitpeer.daemon.sinks.metrics import MetricsSink, row
from splitpeer.daemon.sinks.progress import ProgressMessages
from splitpeer.daemon.sinks.sparing import Sparing
from splitpeer.daemon.sinks.trail import TrailSink, entry
from splitpeer.logs import handle
from splitpeer.settings.peer import PeerConfig
from splitpeer.timeline.spans import StepTiming
from splitproto.messages import Progress

TIMING = StepTiming("hub", 4711, 1.7e9, {"compute": {"decoder": [0.5, 0.25]}}, {"encrypt": 0.125})
COMMITTED = h.StepCommitted(7, 0.25, ["t1", "t2"], ["t2"], 3.0, 2.0, 1.0, {"ukm": 10}, TIMING)
EVALUATED = h.Evaluated(
    8,
    2,
    {"WT": 0.5, "ET": None},
    ["flair", "t1"],
    {"t1": {"WT": 0.25, "ET": None}},
    {"WT": 2.5},
    {"WT": {"predicted": 12.5, "true": 10.0}},
    4.0,
)


class Files:
    """Where rows go."""

    def __init__(self) -> None:
        self.opened = True
        self.rows: list[dict[str, Any]] = []

    def metric(self, **values: Any) -> None:
        self.rows.append(values)


class View:
    """Remembers what it was told."""

    def __init__(self) -> None:
        self.told: list[tuple[Any, ...]] = []

    def __getattr__(self, name: str) -> Any:
        return lambda *values: self.told.append((name, *values))


@pytest.fixture
def board(peer_toml: Path) -> Board:
    return Board(PeerConfig.load(peer_toml, environ={}))


@pytest.fixture
def heard(monkeypatch: pytest.MonkeyPatch) -> list[h.Happening]:
    monkeypatch.setattr(sparing.time, "monotonic", lambda: 1000.0)
    return []


def said(happening: h.Happening) -> list[tuple[str, dict[str, Any], int]]:
    return [(line.name, line.fields, line.level) for line in lines(happening)]


# --- all places --------------------------------------------------------------------------------------------


def test_a_sink_that_raises_stops_neither_the_run_nor_the_sinks_after_it(caplog) -> None:
    def broken(happening: h.Happening) -> None:
        raise KeyError("loss")

    heard: list[h.Happening] = []
    report = h.Reporter(broken)
    report.to(heard.append)(COMMITTED)
    report.to(heard.append)(EVALUATED)
    assert heard == [COMMITTED, EVALUATED]
    # Once, with its traceback.
    (record,) = caplog.records
    assert record.getMessage() == "sink.failed" and record.exc_info is not None


def test_a_step_is_told_once_and_seen_everywhere(board: Board) -> None:
    files, view, messages = Files(), View(), ProgressMessages()
    h.Reporter(BoardSink(board)).to(MetricsSink(files), ConsoleSink(view))(COMMITTED)
    work = board._document()["work"]
    assert (work["step"], work["loss"]) == (7, 0.25)
    assert files.rows == [
        {"step": 7, "loss": 0.25, "without": ["t1", "t2"], "absent": ["t2"],
         "seconds": 3.0, "waited": 2.0, "computed": 1.0,
         "timing": {"party": "hub", "process": 4711, "at": 1.7e9,
                    "spans": {"compute": {"decoder": [0.5, 0.25]}}, "link": {"encrypt": 0.125}}}
    ]  # fmt: skip
    assert view.told == [("step", 7, 0.25, {"ukm": 10})]
    assert messages.due(COMMITTED) == Progress(7, {"loss": 0.25})
    # The console's own lines tell of it.
    assert (said(COMMITTED), entry(COMMITTED)) == ([], None)


def test_an_evaluation(board: Board) -> None:
    files, view = Files(), View()
    h.Reporter(BoardSink(board), MetricsSink(files), ConsoleSink(view))(EVALUATED)
    assert board._document()["work"]["made_from"] == ["flair", "t1"]
    assert board._document()["work"]["hd95"] == files.rows[0]["hd95"] == {"WT": 2.5}
    volumes = {"WT": {"predicted": 12.5, "true": 10.0}}
    assert board._document()["work"]["volume_ml"] == files.rows[0]["volume_ml"] == volumes
    assert files.rows[0]["missing"] == {"t1": {"WT": 0.25, "ET": None}}
    assert view.told == [("evaluated", 8, {"WT": 0.5, "ET": None})]
    assert said(EVALUATED) == [
        ("job.evaluated",
         {"step": 8, "volumes": 2, "WT": 0.5, "ET": None, "made_from": "flair t1"}, logging.INFO),
        ("job.distances", {"step": 8, "unit": "mm", "WT": 2.5}, logging.INFO),
        ("job.volumes", {"step": 8, "unit": "ml", "WT": "12.5 of 10"}, logging.INFO),
        ("job.evaluated_without", {"step": 8, "missing": "t1", "WT": 0.25, "ET": None}, logging.INFO),
    ]  # fmt: skip
    assert ProgressMessages().due(EVALUATED) == Progress(8, {"dice_WT": 0.5})


def test_a_budget_is_seen_with_the_others_noise_and_without(board: Board) -> None:
    for alone, seen in (
        (2.5, "epsilon 2.5 of 8 spent"),
        (4.0, "epsilon 2.5 of 8 spent (4 if all others tell"),
    ):
        told = h.PrivacySpent(2.5, alone, 8.0, 1e-5, 3, 1, 0)
        h.Reporter(BoardSink(board))(told)
        assert board._document()["work"]["privacy"].startswith(seen)
        assert entry(told)[1]["alone"] == alone  # type: ignore[index]


def test_nothing_happens_that_nobody_is_told() -> None:
    folder = Path(inspect.getfile(sinks)).parent
    places = "".join(path.read_text() for path in folder.glob("*.py"))
    shown = set(re.findall(r"\bh\.(\w+)", places))
    happenings = {
        name
        for name, kind in vars(h).items()
        if inspect.isclass(kind) and issubclass(kind, h.Happening) and kind.line is None
    }
    assert happenings - shown == set()


def test_happenings_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        COMMITTED.step = 8  # type: ignore[misc]


# --- metrics and progress ----------------------------------------------------------------------------------


def test_a_step_without_anybody_has_no_loss() -> None:
    nobody = h.StepCommitted(1, float("nan"), [], [], 1.0, 1.0, 0.0, {})
    assert row(nobody) == {"step": 1, "loss": None, "seconds": 1.0, "waited": 1.0, "computed": 0.0}
    assert ProgressMessages().due(nobody) == Progress(1, {})


def test_rows_of_a_run_that_is_not_open_yet_are_not_written() -> None:
    files = Files()
    files.opened = False
    MetricsSink(files)(h.RunRolledBack(3, 4, "a site is at a later step", [3]))
    assert files.rows == []
    files.opened = True
    MetricsSink(files)(h.RunRolledBack(3, 4, "a site is at a later step", [3]))
    assert files.rows == [{"step": 3, "rollback": True, "cause": "a site is at a later step"}]


def test_sites_are_told_now_and_then_and_of_every_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    messages = ProgressMessages()
    assert messages.due(COMMITTED) is not None
    clock[0] += progress.EVERY_S - 0.1
    assert messages.due(COMMITTED) is None
    assert messages.due(EVALUATED) is not None
    clock[0] += 0.2
    assert messages.due(COMMITTED) is None, "the evaluation was told just now"
    clock[0] += progress.EVERY_S
    assert messages.due(COMMITTED) is not None
    assert messages.due(h.Drained(1, 1)) is None


# --- log and trail -----------------------------------------------------------------------------------------


def test_a_line_is_of_the_module_that_tells(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "splitpeer"):
        LogSink(logging.getLogger("splitpeer.site.client"))(h.LinkBroke("timeout"))
    assert [(r.name, r.message, r.levelno) for r in caplog.records] == [
        ("splitpeer.site.client", "link.lost", logging.WARNING)
    ]


def test_the_terms_of_a_job_are_in_the_trail_and_its_inventory_is_not() -> None:
    accepted = h.JobAccepted(
        "glioma",
        "00ff",
        "hub",
        "aa",
        "bb",
        ("mri (t2, t1)",),
        ("x0", "x2"),
        "float32",
        ("noise:1",),
        True,
        3,
        12,
    )
    assert entry(accepted) == (
        "job.accepted",
        {"job": "glioma", "run": "00ff", "coordinator": "hub", "terms": "aa", "schema": "bb",
         "seats": ["mri (t2, t1)"], "levels": ["x0", "x2"], "precision": "float32", "defences": ("noise:1",),
         "recorded": True, "applied": 3},
    )  # fmt: skip
    assert said(accepted) == [
        ("job.accepted",
         {"job": "glioma", "seats": "mri (t2, t1)", "levels": "x0,x2", "precision": "float32", "applied": 3,
          "patients": 12}, logging.INFO)
    ]  # fmt: skip


def test_a_patient_is_a_handle_and_its_file_is_in_the_log_alone() -> None:
    key = b"\x01" * 16
    out = h.PatientOut("withdraw", "00ff", key, 5, "the file is gone", Path("/images/anna.nii.gz"))
    about = {"patient": handle(key), "step": 5, "cause": "the file is gone"}
    assert said(out) == [("patient.withdraw", {**about, "file": "/images/anna.nii.gz"}, logging.WARNING)]
    assert entry(out) == ("patient.withdraw", {"run": "00ff", **about})
    assert key.hex() not in repr(out)


@pytest.mark.parametrize(("before", "level"), [(5, logging.WARNING), (3, logging.INFO)])
def test_a_step_that_is_lost_is_a_warning(before: int, level: int) -> None:
    assert said(h.SiteRolledBack("00ff", 3, before))[0][2] == level


def test_where_a_checkpoint_could_not_be_written() -> None:
    assert said(h.CheckpointMissed(4, ["ukm", "charite"]))[0][1] == {"step": 4, "sites": "ukm, charite"}
    assert said(h.CheckpointMissed(4, cause="no room"))[0][1] == {"step": 4, "cause": "no room"}


# --- what a coordinator can cause --------------------------------------------------------------------------


def test_figures_have_a_budget(heard: list[h.Happening]) -> None:
    spare = Sparing(h.Reporter(heard.append), patients=2)
    for step in range(1000):
        spare(h.FiguresTold(step, 1000, {"loss": 1.0}))
        spare(h.StepCounted(step))
    assert sum(isinstance(one, h.FiguresTold) for one in heard) == sparing.LINES_AT_ONCE
    assert sum(isinstance(one, h.StepCounted) for one in heard) == 1000


def test_a_happening_may_bring_its_line_and_ask_for_a_budget(heard: list[h.Happening]) -> None:
    @dataclass(frozen=True)
    class Greeted(h.Happening):
        line, level, sparing = "peer.greeted", logging.WARNING, True

        text: str

    assert said(Greeted("good day")) == [("peer.greeted", {"text": "good day"}, logging.WARNING)]
    spare = Sparing(h.Reporter(heard.append), patients=2)
    for _ in range(1000):
        spare(Greeted("good day"))
    assert len(heard) == sparing.LINES_AT_ONCE


def test_what_is_missing_is_told_when_it_changes(heard: list[h.Happening]) -> None:
    spare = Sparing(h.Reporter(heard.append), patients=2)
    spare(h.MissingTold(1, {"t1": "it is away", "t2": "no disk"}))
    spare(h.MissingTold(2, {"t2": "no disk", "flair": "lost"}))
    assert heard == [
        h.MissingChanged(1, {"t1": "it is away", "t2": "no disk"}, [], ["t1", "t2"]),
        h.MissingChanged(2, {"flair": "lost"}, ["t1"], ["flair", "t2"]),
    ]
    assert [(name, fields) for name, fields, _ in said(heard[1])] == [
        ("job.without", {"seat": "flair", "after_step": 2, "cause": "lost"}),
        ("job.with_again", {"seat": "t1", "after_step": 2}),
    ]
    for step in range(1000):
        spare(h.MissingTold(step, {"t1": "away"} if step % 2 else {}))
    changes = [one for one in heard if isinstance(one, h.MissingChanged) and (one.gone or one.back)]
    assert len(changes) == sparing.LINES_AT_ONCE


def test_a_patient_is_noted_once_and_all_of_them_not_for_ever(heard: list[h.Happening]) -> None:
    spare = Sparing(h.Reporter(heard.append), patients=2)
    for step in range(100):
        for _ in range(2):
            spare(h.PatientOut("withdrawn", "00ff", b"k", step, "gone", None))
    assert [one.step for one in heard if isinstance(one, h.PatientOut)] == list(range(2 * sparing.NOTED_EACH))


# --- what peers can cause ----------------------------------------------------------------------------------


def test_a_flood_is_counted_in_the_next_line_of_its_site(caplog: pytest.LogCaptureFixture) -> None:
    """The log's rate and the trail's number are bounded, for each site on its own."""
    now, noted = 0.0, []
    sink = LogSink(logging.getLogger("splitpeer.test"))
    sink._budget = budgets.LogBudget(lambda: now)
    limit = budgets.LIMITS[h.SiteRefused]
    assert limit.a_second is not None
    told = h.Reporter(sink, TrailSink(lambda name, **fields: noted.append(fields)))
    for number in range(1000):
        told(h.SiteRefused("ukm", "t1", str(number)))
    told(h.SiteRefused("charite", "t2", "other patients"))
    now = 1 / limit.a_second
    told(h.SiteRefused("ukm", "t1", "1000"))
    said_of = [(r.fields["cause"], r.fields.get("not_shown")) for r in caplog.records]  # type: ignore[attr-defined]
    shown = int(limit.at_once)
    assert said_of == [
        *((str(number), None) for number in range(shown)), ("other patients", None), ("1000", 1000 - shown)
    ]  # fmt: skip
    ukm = [fields for fields in noted if fields["site"] == "ukm"]
    assert len(ukm) == limit.noted == len(noted) - 1
    assert [fields for fields in noted if "and_more" in fields] == [ukm[-1]]


# --- a site, as its coordinator sees it --------------------------------------------------------------------


def test_a_site_joins_and_is_lost_in_every_place(board: Board) -> None:
    joined = h.SiteJoined("ukm", "t1", 12, "", 3, (2, 3), "TLSv1.3", "10.0.0.1", "ab")
    told = h.Reporter(BoardSink(board))
    told(joined)
    told(h.SiteAwaited("ukm", "to come back", 30.0))
    told(h.SiteAbsent("ukm", "t1", "it did not come back"))
    document = board._document()
    shown = document["sites"]["ukm"]
    assert (shown["tls"], shown["applied"], shown["checkpoints"]) == ("TLSv1.3", 3, [2, 3])
    assert shown["cause"] == "it did not come back" and shown["absent_since"] and shown["link_since"]
    assert [(one["who"], one["what"]) for one in document["waits"]] == [("ukm", "to come back")]
    told(h.SiteNotAwaited("ukm"))
    assert board._document()["waits"] == []
    about = {"site": "ukm", "seats": "t1", "patients": 12, "applied": 3, "tls": "TLSv1.3",
             "address": "10.0.0.1", "serial": "ab"}  # fmt: skip
    assert said(joined) == [("site.joined", about, logging.INFO)]
    assert entry(h.SiteAbsent("ukm", "t1", "gone")) == ("site.absent", {"site": "ukm", "cause": "gone"})
    lost = h.SiteLost("ukm", "timeout", "step 3 to be applied", 60.0)
    assert said(lost) == [
        ("site.lost", {"site": "ukm", "cause": "timeout", "waiting_for": "step 3 to be applied", "patience_s": 60.0},
         logging.WARNING)
    ]  # fmt: skip
    assert said(h.SiteLost("ukm", "timeout")) == [
        ("site.lost", {"site": "ukm", "cause": "timeout"}, logging.WARNING)
    ]


@pytest.mark.parametrize("outcome", ["second_holder", "superseded"])
def test_two_links_of_one_certificate(outcome: Any) -> None:
    second = h.SecondLink("ukm", outcome, "again", "10.0.0.2", "ab", None, None)
    about = {"site": "ukm", "cause": "again", "address": "10.0.0.2", "serial": "ab"}
    assert said(second) == [(f"site.{outcome}", about, logging.WARNING)]
    assert entry(second) == (f"site.{outcome}", about)


def test_the_head_of_a_chain_is_whole_in_the_trail() -> None:
    ended = h.CaptureEnded("t.splitcap", "closed", 3, 100, 0, "ab" * 32)
    assert said(ended)[0][:2] == (
        "capture.closed",
        {
            "file": "t.splitcap",
            "reason": "closed",
            "messages": 3,
            "octets": 100,
            "lost": 0,
            "chain": "ab" * 6,
        },
    )
    assert entry(ended) == ("capture.ended", vars(ended))
