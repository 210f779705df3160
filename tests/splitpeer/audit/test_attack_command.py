"""`splitpeer attack` on a real capture: what it recovers, and how it answers input that cannot be used."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from splitpeer.audit.rehearsal import Protection, Rehearsed
from splitpeer.cli import main
from splitpeer.report.store import load_run


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as left:
        main([str(argument) for argument in arguments])
    return int(left.value.code or 0)


def attack(place: Any, capture: Path, out: Path, *more: object) -> int:
    return run("attack", capture, "--seat", "t1", "--samples", 3, "--budget", 1, "--out", out, *more)


def truth(place: Any) -> tuple[object, ...]:
    return ("--truth", place.data, "--salt", place.salt, "--convention", "msd")


def entries(out: Path) -> dict[str, Any]:
    return {entry.id: entry for entry in load_run(out).run.entries}


def test_a_clean_capture_with_the_weights_gives_the_images(
    place: Any, clean: Rehearsed, tmp_path: Path, capsys: Any
) -> None:
    out = tmp_path / "run"
    code = attack(place, clean.capture, out, "--attack", "pca", "--attack", "whitebox:iterations=60", *truth(place),
                  "--knows", f"weights={clean.weights('t1')}")  # fmt: skip
    assert code == 0
    assert "fixed: more may gain" in " ".join(capsys.readouterr().err.split())
    found = entries(out)
    (whitebox,) = (e for e in found.values() if e.attack == "whitebox")
    score = whitebox.scores["ssim"]
    assert score.mean > 0.95 > max(f for f in score.floors.values() if f is not None), score
    assert whitebox.settings["iterations"] == 60 and whitebox.site == "site-t1" and whitebox.adaptive
    folder = load_run(out)
    run_, arrays = folder.run, folder.arrays
    assert run_.capture.digest and not run_.capture.rehearsal and run_.digests["weights"]
    assert arrays["truth_t1"].shape == arrays[whitebox.id].shape == (3, 1, 32, 32)
    # Of every patient the slice with most tumour is attacked, since the masks were given.
    assert (np.asarray(arrays["masks"])[:, 0].sum(axis=(1, 2)) > 20).all()


def test_too_little_effort_is_doubled_and_the_report_says_what_it_took(
    place: Any, clean: Rehearsed, tmp_path: Path, capsys: Any
) -> None:
    out, page = tmp_path / "run", tmp_path / "report.html"
    asked = ("--attack", "pca", "--attack", "whitebox:iterations=1,schedules=joint", "--knows",
             f"weights={clean.weights('t1')}")  # fmt: skip
    assert attack(place, clean.capture, out, *truth(place), *asked, "--budget", 4) == 0
    pca, whitebox = entries(out).values()
    assert pca.effort is None and whitebox.effort.times == 4 and whitebox.settings["iterations"] == 4
    assert whitebox.effort.stopped == "limit" and "Adam" in whitebox.effort.published
    (_, first), _, (_, last) = whitebox.effort.curve
    assert whitebox.scores["ssim"].mean == pytest.approx(last) and last > first + 0.01
    assert run("report", out, "--out", page) == 0
    shown = page.read_text()
    assert "iterations 4 (at the limit: more may gain)" in shown and "published with 5000 iterations" in shown
    assert f"1 times: {first:.3f}, 2 times:" in shown
    # Without the truth nobody can tell whether more would help.
    assert attack(place, clean.capture, out, *asked, "--budget", "auto") == 0
    assert [e.effort.stopped for e in entries(out).values() if e.effort] == ["fixed"]
    capsys.readouterr()
    assert attack(place, clean.capture, out, *asked, "--budget", "0") == 4
    assert "write auto" in capsys.readouterr().err


def test_a_defence_tried_offline_is_met_by_who_knows_it_and_the_naive_form_stands_beside(
    place: Any, clean: Rehearsed, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    code = attack(place, clean.capture, out, "--attack", "whitebox:iterations=60", "--defence", "dropout:0.5",
                  *truth(place), "--knows", f"weights={clean.weights('t1')}")  # fmt: skip
    assert code == 0
    adaptive, naive = sorted(entries(out).values(), key=lambda e: not e.adaptive)
    assert (adaptive.adaptive, naive.adaptive, adaptive.trained) == (True, False, False)
    assert adaptive.defences and adaptive.defences[0].startswith("dropout:rate=0.5")
    assert adaptive.scores["ssim"].mean > naive.scores["ssim"].mean + 0.1


def test_labels_are_read_from_a_sites_capture(place: Any, clean: Rehearsed, tmp_path: Path) -> None:
    out = tmp_path / "run"
    code = run(
        "attack",
        clean.site_capture("t1"),
        "--attack",
        "gradient-norm",
        "--first-step",
        "--out",
        out,
        *truth(place),
    )
    assert code == 0
    (entry,) = entries(out).values()
    assert entry.goal == "mask" and entry.scores["auc"].mean > 0.9


def test_without_the_truth_it_runs_and_says_no_figure(place: Any, clean: Rehearsed, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert attack(place, clean.capture, out, "--attack", "pca") == 0
    (entry,) = entries(out).values()
    assert entry.scores == {} and json.loads((out / "attack.json").read_text())["format"] == 1


def test_what_cannot_be_used_gets_one_line_and_code_4(
    place: Any, clean: Rehearsed, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(said: str, *arguments: object, capture: Path = clean.capture) -> None:
        capsys.readouterr()
        code = attack(place, capture, tmp_path / "out", *arguments)
        line = capsys.readouterr().err.strip().splitlines()
        assert code == 4, line
        assert (
            said in line[-1]
            and line[-1].startswith("splitpeer: ")
            and not any("Traceback" in x for x in line)
        ), line

    weights = f"weights={clean.weights('t1')}"
    whole = clean.capture.read_bytes()
    torn, bent, newer = (tmp_path / name for name in ("torn.cap", "bent.cap", "newer.cap"))
    torn.write_bytes(whole[:40])
    bent.write_bytes(
        whole[: len(whole) // 2] + bytes([whole[len(whole) // 2] ^ 1]) + whole[len(whole) // 2 + 1 :]
    )
    newer.write_bytes(whole[:7] + b"9" + whole[8:])
    other = tmp_path / "other-salt"
    other.write_text("11" * 32)
    other.chmod(0o600)

    refused("is unknown; known are", "--attack", "magic")
    refused("no setting 'iteration'", "--attack", "whitebox:iteration=3")
    refused("iterations must be a whole number, not 'many'", "--attack", "whitebox:iterations=many")
    refused("iterations must be 1 or more", "--attack", "whitebox:iterations=0")
    refused("tv must be 0 or more", "--attack", "whitebox:tv=-1")
    refused("decoder is given twice", "--attack", "pca", "--knows", "decoder=a", "--knows", "decoder=b")
    refused("needs the weights", "--attack", "whitebox")
    refused("not the encoder of this capture's job", "--attack", "whitebox", "--knows",
            f"weights={clean.weights('coordinator')}")  # fmt: skip
    refused("no such file", "--attack", "whitebox", "--knows", f"weights={tmp_path / 'gone.safetensors'}")
    refused("write one of weights=PATH", "--attack", "pca", "--knows", "wieghts=x")
    refused("--truth needs --salt", "--attack", "pca", "--truth", place.data)
    refused(
        "patients under attack are not in the folder",
        "--attack",
        "pca",
        "--truth",
        place.data,
        "--salt",
        other,
    )
    refused("defence 'drop' is unknown", "--attack", "pca", "--defence", "drop:1")
    refused("rate must be", "--attack", "pca", "--defence", "dropout:1.5")
    refused("cannot be tried on recorded traffic", "--attack", "pca", "--defence", "nopeek:1")
    refused("no site of this capture fills t2", "--attack", "pca", "--seat", "t2")
    refused("step 99 was not recorded", "--attack", "pca", "--step", 99)
    refused("torn.cap", "--attack", "pca", capture=torn)
    refused("bent.cap", "--attack", "pca", "--knows", weights, capture=bent)
    refused("version", "--attack", "pca", capture=newer)
    refused("nowhere.cap", "--attack", "pca", capture=tmp_path / "nowhere.cap")
    assert not (tmp_path / "out" / "attack.json").exists(), "nothing that looks like a result"
    refused("a client recorded this capture", "--attack", "pca", capture=clean.site_capture("t1"))


def test_a_capture_that_was_cut_off_is_attacked_up_to_its_last_whole_record(
    place: Any, clean: Rehearsed, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cut = tmp_path / "cut.cap"
    shutil.copy(clean.capture, cut)
    with cut.open("r+b") as file:
        file.truncate(cut.stat().st_size - 100)
    assert attack(place, cut, tmp_path / "out", "--attack", "pca") == 0
    assert not load_run(tmp_path / "out").run.capture.complete
    assert "attacked up to its last whole record" in " ".join(capsys.readouterr().err.split())


def test_a_defended_capture_is_not_defended_twice(place: Any, tmp_path: Path, capsys: Any) -> None:
    played = place.rehearse(Protection(("gaussian:0.5",)), tmp_path / "defended")
    assert attack(place, played.capture, tmp_path / "out", "--attack", "pca", "--defence", "dropout:0.5") == 4
    assert "recorded under gaussian" in capsys.readouterr().err
    out = tmp_path / "again"
    assert attack(place, played.capture, out, "--attack", "whitebox:iterations=20", "--knows",
                  f"weights={played.weights('t1')}", *truth(place)) == 0  # fmt: skip
    assert {e.adaptive for e in entries(out).values()} == {True, False}
    assert all(e.trained and e.views == 2 for e in entries(out).values())
