"""The page and its JSON, without a browser: what is there, in which order, and what bad folders get."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from splitpeer.errors import DataError
from splitpeer.report.build import write_report
from splitpeer.report.model import AuditRun, Privacy
from splitpeer.report.store import ARRAYS, FRONTIER, load_run, save_run

NOW = datetime(2026, 1, 2, tzinfo=UTC)


class Outline(HTMLParser):
    """Levels of the headings, and the page's words."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.levels: list[int] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list) -> None:
        if re.fullmatch("h[1-6]", tag):
            self.levels.append(int(tag[1]))

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


@pytest.fixture(scope="module")
def page(run_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    out = tmp_path_factory.mktemp("page") / "report.html"
    write_report([run_folder], out, now=NOW)
    return out.read_text()


def test_the_three_questions_come_first(page: str) -> None:
    text = Outline(page).text
    places = [
        text.index(words)
        for words in (
            "What can the coordinator see of our images? Practically the image, without a defence.",
            "What can the other hospitals see of the labels? The outline, without a defence.",
            "What does each defence buy, and at what Dice? ",
            "Every figure holds for",
        )
    ]
    assert places == sorted(places)


def test_headings_go_down_one_by_one(page: str) -> None:
    levels = Outline(page).levels
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(below <= above + 1 for above, below in pairwise(levels))


def test_the_page_says_what_it_must(page: str) -> None:
    text = Outline(page).text
    for words in (
        "the weights of the site's encoder",  # assumptions
        "knows the defence", "ignores it",  # adaptive beside naive
        "Only an adversary who ignores the defence was tried",
        "8 × 32 × 32", "32 768", "withheld",  # what leaves
        "UnSplit was not run.", "SDAR on T1, without a defence: needs masks of other patients.",
        "Gradient inversion and CAFE",
        "Region by region", "WT 0.80 3.4 41.3 38.0", "TC 0.70 5.0 – –",  # Dice, HD95, volumes
        "by a factor of 7.4 at most",  # epsilon 2
        "splitpeer attack coord.cap --attack whitebox", "ab" * 32,
        "mean image of other patients", "2 January".replace("2 ", "02 "),
    ):  # fmt: skip
        assert words in text, words


def changed(run_folder: Path, out: Path, change: Callable[[AuditRun], AuditRun]) -> str:
    """The words of the page about a changed copy of `run_folder`."""
    read = load_run(run_folder)
    assert read.run is not None
    save_run(out / "run", change(read.run), dict(read.arrays))
    write_report([out / "run"], out / "report.html", now=NOW)
    return Outline((out / "report.html").read_text()).text


def test_no_gradients_are_said_to_come_back_of_what_is_withheld(page: str) -> None:
    """In older folders they have a figure."""
    text = Outline(page).text
    assert "987 654" not in text and "and 32 768 back in training" in text


def test_headings_tell_two_sites_of_one_modality_apart(run_folder: Path, tmp_path: Path) -> None:
    def two(run: AuditRun) -> AuditRun:
        first, *others = run.entries
        moved = (
            first.model_copy(update={"site": "south"}),
            *(e.model_copy(update={"site": "north"}) for e in others),
        )
        return run.model_copy(update={"entries": moved})

    text = changed(run_folder, tmp_path, two)
    for words in (
        "T1 at south, without a defence",
        "T1 at north, under dropout:0.5",
        "SDAR on T1 at north, without",
    ):
        assert words in text, words


def test_a_coordinator_that_averages_holds_the_encoders(run_folder: Path, tmp_path: Path, page: str) -> None:
    def averaging(run: AuditRun) -> AuditRun:
        return run.model_copy(update={"capture": run.capture.model_copy(update={"averages": True})})

    text = changed(run_folder, tmp_path, averaging)
    said = (
        "the coordinator receives the weights of every encoder that is averaged, and its recording holds them"
    )
    assert said in text and "Images and names never leave" in text and "never sends them" not in text
    plain = Outline(page).text
    assert said not in plain and "Images, encoder weights and names never leave" in plain
    assert "never sends them or their gradients." in plain


def test_text_of_others_is_text(page: str) -> None:
    assert "&lt;script&gt;alert(1)" in page
    assert "<script>alert" not in page


def test_nothing_in_the_page_points_outside(page: str) -> None:
    assert not re.findall(r'(?:src|href)="(?!data:|#)', page)
    assert "default-src &#39;none&#39;" in page or "default-src 'none'" in page
    assert "style=" not in page and "onclick" not in page


def test_json_holds_everything(run_folder: Path, tmp_path: Path) -> None:
    beside = write_report([run_folder, run_folder], tmp_path / "r.html", title="T", now=NOW)
    data = json.loads(beside.read_text())
    assert data["title"] == "T" and len(data["answers"]) == 3 and len(data["folders"]) == 2
    assert data["folders"][0]["run"] == load_run(run_folder).run.model_dump(mode="json")
    assert set(data["folders"][0]["digests"]) == {"attack.json", "reconstructions.npz"}
    (dropout,) = [one for one in data["configurations"] if one["name"] == "dropout:0.5"]
    assert dropout["change"] == pytest.approx(0.74 - 0.75) and dropout["band"]["rank"] >= 2


def test_the_same_folder_gives_the_same_page(run_folder: Path, tmp_path: Path, page: str) -> None:
    write_report([run_folder], tmp_path / "report.html", now=NOW)
    assert (tmp_path / "report.html").read_text() == page


def test_folders_without_truth_pictures_or_scores(make_run: Callable[..., Path], tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    run, arrays = load_run(folder).run, dict(load_run(folder).arrays)
    blind = run.model_copy(
        update={"entries": tuple(e.model_copy(update={"scores": {}}) for e in run.entries)}
    )
    kept = {name: array for name, array in arrays.items() if not name.startswith(("truth", "floor", "masks"))}
    save_run(folder, blind, kept)
    write_report([folder], tmp_path / "a.html", now=NOW)
    text = Outline((tmp_path / "a.html").read_text()).text
    assert "No true images were given" in text and "Not measured: see the pictures." in text
    (folder / ARRAYS).unlink()
    write_report([folder], tmp_path / "a.html", now=NOW)
    assert "No pictures of this attack were kept" in (tmp_path / "a.html").read_text()


def test_interrupted_attacks_empty_runs_and_noise_without_guarantee(
    make_run: Callable[..., Path], tmp_path: Path
) -> None:
    folder = make_run(tmp_path / "run", privacy=Privacy(statement="Noise without guarantee, by choice."))
    loaded = load_run(folder)
    entries = tuple(
        e.model_copy(update={"status": "interrupted", "reason": "Ctrl-C"}) for e in loaded.run.entries
    )
    save_run(folder, loaded.run.model_copy(update={"entries": entries}), dict(loaded.arrays))
    write_report([folder], tmp_path / "a.html", now=NOW)
    text = Outline((tmp_path / "a.html").read_text()).text
    assert "it might have recovered more: Ctrl-C." in text and "Noise without guarantee, by choice." in text
    empty = make_run(tmp_path / "empty", entries=(), dice={}, privacy=None)
    write_report([empty], tmp_path / "b.html", now=NOW)
    text = Outline((tmp_path / "b.html").read_text()).text
    assert text.count("Not tested in these runs.") == 2 and "No budget of differential privacy" in text


def test_a_sweep(run_folder: Path, tmp_path: Path) -> None:
    points = [
        {"name": f"gaussian:{i}", "dice": 0.8 - 0.02 * i, "leakage": 1 - 0.06 * i, "by": "pca", "floor": 0.2,
         "front": i % 2 == 0}
        for i in range(9)
    ]  # fmt: skip
    (tmp_path / FRONTIER).write_text(json.dumps({"points": points}))
    write_report([tmp_path], tmp_path / "alone.html", now=NOW)
    write_report([run_folder, tmp_path], tmp_path / "both.html", now=NOW)
    for name in ("alone.html", "both.html"):
        page = (tmp_path / name).read_text()
        assert page.count("<circle") == 9 and page.count('<circle class="on"') == 5
        assert "gaussian:8" in page


@pytest.mark.parametrize(
    ("name", "array", "said"),
    [
        ("whitebox", np.zeros((10, 1, 16, 16)), "masks is"),
        ("whitebox", np.zeros((11, 1, 32, 32)), "names row 10"),
        ("whitebox", np.zeros((10, 32, 32)), "not a set of images"),
        ("masks", np.zeros((10, 1, 8, 8)), "masks is"),
        ("tumour_whitebox", np.zeros((2, 32, 32)), "names row 9 of tumour_whitebox"),
    ],
)
def test_arrays_that_do_not_fit_are_named(
    run_folder: Path, tmp_path: Path, name: str, array: np.ndarray, said: str
) -> None:
    loaded = load_run(run_folder)
    save_run(tmp_path / "run", loaded.run, dict(loaded.arrays) | {name: array})
    with pytest.raises(DataError, match=said):
        write_report([tmp_path / "run"], tmp_path / "a.html")
    assert not (tmp_path / "a.html").exists()


def test_the_command(run_folder: Path, tmp_path: Path) -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "splitpeer.cli", "report", *arguments]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=100)

    done = run(str(run_folder), "--out", "out/page.html", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"page": "out/page.html", "json": "out/page.json"}
    assert (tmp_path / "out/page.html").exists()
    for arguments, said in (
        (["nowhere"], "nowhere: no such folder"),
        ([str(run_folder), "--out", "page.json"], "another ending"),
    ):
        done = run(*arguments)
        assert done.returncode == 4 and said in done.stderr
        assert done.stderr.count("\n") == 1 and "Traceback" not in done.stderr
