"""Run folders: what was written comes back, and what is damaged is named in one line."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from splitpeer.errors import DataError
from splitpeer.report.model import AuditRun, Entry, Source, configuration
from splitpeer.report.names import brief, key, kind
from splitpeer.report.store import ARRAYS, ATTACK, FRONTIER, load_run, save_run


class Trap:
    """Does something when a pickle of it is read."""

    def __init__(self, path: Path) -> None:
        self._path = str(path)

    def __reduce__(self) -> tuple:
        return os.mkdir, (self._path,)


def test_there_and_back(run_folder: Path, tmp_path: Path) -> None:
    folder = load_run(run_folder)
    save_run(tmp_path / "copy", folder.run, dict(folder.arrays))
    again = load_run(tmp_path / "copy")
    assert again.run == folder.run
    assert set(again.arrays) == set(folder.arrays)
    np.testing.assert_array_equal(again.arrays["whitebox"], folder.arrays["whitebox"])
    assert not list((tmp_path / "copy").glob("*.part"))


def test_what_json_has_no_word_for_does_not_lose_an_attack(tmp_path: Path) -> None:
    settings = {
        "a": np.float32(0.5),
        "b": (1, np.int64(2)),
        "c": float("nan"),
        "d": Path("x"),
        "e": np.arange(2),
    }
    entry = Entry(id="a", attack="a", title="a", goal="image", modality="T1", settings=settings)
    run = AuditRun(capture=Source(role="client"), entries=(entry,), dice={"none": {"WT": float("nan")}})
    save_run(tmp_path, run, {})
    again = load_run(tmp_path).run
    assert again.entries[0].settings == {"a": 0.5, "b": [1, 2], "c": None, "d": "x", "e": [0, 1]}
    assert again.dice == {"none": {"WT": None}}


def test_without_arrays_a_run_can_be_read(make_run: Callable[..., Path], tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    (folder / ARRAYS).unlink()
    assert dict(load_run(folder).arrays) == {}


def test_a_sweep_alone_can_be_read(tmp_path: Path) -> None:
    point = {"name": "none", "dice": 0.8, "leakage": 0.9, "more": "ignored"}
    (tmp_path / FRONTIER).write_text(json.dumps({"points": [point]}))
    folder = load_run(tmp_path)
    assert folder.run is None and folder.frontier.points[0].dice == 0.8


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda text: text[:100], "attack.json"),
        (lambda text: "[]", "attack.json"),
        (lambda text: text.replace('"format": 1', '"format": 2'), "another version"),
        (lambda text: text.replace('"plain"', '"plane"'), "entries.0.plane"),
        (lambda text: text.replace('"goal": "image"', '"goal": "soul"'), "entries.0.goal"),
        (lambda text: text.replace('"mean": ', '"mean": "x", "n": '), "entries.0.scores"),
    ],
)
def test_a_damaged_description_is_named(
    run_folder: Path, tmp_path: Path, damage: Callable, said: str
) -> None:
    (tmp_path / ATTACK).write_text(damage((run_folder / ATTACK).read_text()))
    with pytest.raises(DataError, match=said) as caught:
        load_run(tmp_path)
    assert "\n" not in str(caught.value) and caught.value.exit_code == 4


def test_what_is_no_folder_or_holds_nothing_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such folder"):
        load_run(tmp_path / "nowhere")
    with pytest.raises(DataError, match="holds no attack"):
        load_run(tmp_path)


def test_damaged_and_foreign_arrays_are_named_and_no_pickle_is_read(run_folder: Path, tmp_path: Path) -> None:
    (tmp_path / ATTACK).write_bytes((run_folder / ATTACK).read_bytes())
    (tmp_path / ARRAYS).write_bytes((run_folder / ARRAYS).read_bytes()[:2000])
    with pytest.raises(DataError, match="cannot be read"):
        load_run(tmp_path)
    with (tmp_path / ARRAYS).open("wb") as file:
        np.save(file, np.zeros(3))
    with pytest.raises(DataError, match="no archive"):
        load_run(tmp_path)
    np.savez(tmp_path / ARRAYS, whitebox=np.array([Trap(tmp_path / "sprung")]), words=np.array(["a"]))
    arrays = load_run(tmp_path).arrays
    for name in ("whitebox", "words"):
        with pytest.raises(DataError, match=name):
            arrays[name]
    assert not (tmp_path / "sprung").exists()


def test_only_numbers_are_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="only numbers"):
        save_run(tmp_path, AuditRun(capture=Source(role="client")), {"names": np.array(["a"])})
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot be written"):
        save_run(tmp_path / "file", AuditRun(capture=Source(role="client")), {})


def test_names_of_configurations() -> None:
    assert configuration((), ()) == "none"
    assert configuration(("a:1", "image/b"), ("c",)) == "a:1 + image/b + gradients/c"
    assert key("a + b") == key("b + a") != key("a")
    full = "dropout:rate=0.5,kept=false,rescale=false@0,1 + gradients/gaussian:scale=1,kept=true"
    assert brief(full) == "dropout:0.5@0,1 + gradients/gaussian:1,kept=true"
    assert key(full) == key(" + ".join(reversed(brief(full).split(" + "))))
    for same in ("none", "unknown:a=1", "dropout:0.5", "dropout:strange=1", "<script>", "withhold@0"):
        assert brief(same) == same
    assert kind("image/dropout:0.5@0") == "dropout" and kind("withhold@0") == "withhold"
