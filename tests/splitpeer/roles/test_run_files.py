"""What the coordinator leaves on disk: whole after every crash, and a full disk costs figures, never the run."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from splitpeer.coordinator.run_files import RunFiles, RunResult
from splitpeer.daemon import happenings as h
from splitpeer.errors import ConfigError, DiskTrouble
from splitpeer.storage import durable
from splitpeer.storage import lines as lines_module
from tests.splitpeer.training.power_loss import Disk, found, lay_out

if TYPE_CHECKING:
    from tests.conftest import SmallDisk

    from .scene import Scene


def opened(scene: Scene, output: Path) -> RunFiles:
    scene.cast("t1", output={"folder": str(output)})
    files = RunFiles(scene.config("hub"), scene.settings, resume=False, report=h.Reporter())
    files.prepare()
    files.open(resumed=False, patients={}, held_out=())
    return files


def lines(files: RunFiles) -> list[int]:
    return [json.loads(line)["step"] for line in (files.output / "metrics.jsonl").read_text().splitlines()]


def test_a_full_disk_stops_no_run(
    scene: Scene, small_disk: SmallDisk, caplog: pytest.LogCaptureFixture
) -> None:
    files = opened(scene, small_disk.folder)
    files.write(RunResult("try", files.run.hex(), step=1))
    small_disk.fill()
    with caplog.at_level(logging.WARNING):
        for step in range(1, 300):
            files.metric(step=step, loss=0.25)
    assert [record.message for record in caplog.records] == ["lines.waiting"]
    with pytest.raises(
        DiskTrouble, match=r"^[^\n]*result.json: cannot be written \(No space left on device\)[^\n]*$"
    ):
        files.write(RunResult("try", files.run.hex(), step=2))
    kept = files.result()
    assert kept is not None
    assert kept.step == 1
    small_disk.make_room()
    files.write(RunResult("try", files.run.hex(), step=299))
    assert lines(files) == list(range(1, 300)), "what waited is out before the result is"
    assert sorted(os.listdir(small_disk.folder)) == ["metrics.jsonl", "result.json"]


def test_lines_are_on_disk_before_the_result_is(
    scene: Scene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = opened(scene, tmp_path / "runs")
    done: list[str] = []
    monkeypatch.setattr(
        lines_module.os, "fsync", lambda file: done.append(os.readlink(f"/proc/self/fd/{file}"))
    )
    files.metric(step=1)
    files.write(RunResult("try", files.run.hex(), step=1))
    names = [Path(name).name for name in done]
    assert names.index("metrics.jsonl") < names.index("result.part")


def test_the_results_of_a_run_that_is_over_were_taken_away(scene: Scene, tmp_path: Path) -> None:
    files = opened(scene, tmp_path / "runs")
    files.write(RunResult("try", files.run.hex(), complete=True))
    files.record.over()

    def again() -> RunFiles:
        return RunFiles(scene.config("hub"), scene.settings, resume=None, report=h.Reporter())

    assert (again().run, again().record.state) == (files.run, "over")
    (files.output / "result.json").unlink()
    assert again().run != files.run
    assert again().record.state == "new"


def test_an_edited_job_does_not_give_up_a_bank(scene: Scene, tmp_path: Path) -> None:
    """A feature bank cannot be collected twice where each patient may be shown once."""
    files, output = opened(scene, tmp_path / "runs"), {"folder": str(tmp_path / "runs")}
    bank = files.checkpoints / "bank"
    bank.mkdir(parents=True)
    (bank / "bank.json").write_text("{}")

    def again(resume: bool | None = None) -> RunFiles:
        return RunFiles(scene.config("hub"), scene.settings, resume=resume, report=h.Reporter())

    kept = (scene.folder / "hub" / "state" / "try.run.json").read_bytes()
    scene.cast("t1", output=output, training={"learning_rate": 0.0123})
    with pytest.raises(
        ConfigError, match=r"^[^\n]*job.toml has changed[^\n]*change it back[^\n]*--fresh[^\n]*$"
    ):
        again()
    assert (scene.folder / "hub" / "state" / "try.run.json").read_bytes() == kept
    assert again(resume=False).record.state == "new"
    scene.cast("t1", output=output)
    assert (again().run, again().record.state) == (files.run, "running")
    scene.cast("t1", output=output, training={"learning_rate": 0.0123})
    other = again(resume=False)
    other.open(resumed=False, patients={bytes(16): {"t1": "site-t1"}}, held_out=())
    state = scene.folder / "hub" / "state"
    assert (state / f"try-{files.run.hex()}.run.json").read_bytes() == kept
    # Back to it, as the documentation says.
    (state / f"try-{files.run.hex()}.run.json").rename(state / "try.run.json")
    scene.cast("t1", output=output)
    assert (again(resume=True).run, again().record.state) == (files.run, "running")
    again().record.over()
    again(resume=False).open(resumed=False, patients={}, held_out=())
    assert [path.name for path in state.glob("try*.json")] == ["try.run.json"], (
        "what is over is not gone back to"
    )
    (state / "try.run.json").write_bytes(kept)
    (bank / "bank.json").unlink()
    scene.cast("t1", output=output, training={"learning_rate": 0.0123})
    assert again().record.state == "new", "there is nothing to lose"


@pytest.mark.parametrize("complete", [True, False])
def test_whole_results_are_not_in_the_way_of_a_changed_job(
    scene: Scene, tmp_path: Path, complete: bool
) -> None:
    """The first thing that everybody tries is to train the same job for longer."""
    files = opened(scene, tmp_path / "results")
    files.write(RunResult("try", files.run.hex(), step=2, complete=complete))
    if complete:
        files.record.over()
    scene.cast("t1", output={"folder": str(files.output)}, training={"steps": 77})
    if complete:
        with pytest.raises(
            ConfigError, match=r"results of a complete run of another job.toml.*or let --fresh remove them"
        ):
            RunFiles(scene.config("hub"), scene.settings, resume=None, report=h.Reporter())
        assert files.result() is not None, "nothing is lost"
    else:
        assert (
            RunFiles(scene.config("hub"), scene.settings, resume=None, report=h.Reporter()).record.state
            == "new"
        )
    fresh = RunFiles(scene.config("hub"), scene.settings, resume=False, report=h.Reporter())
    fresh.open(resumed=False, patients={}, held_out=())
    assert not (files.output / "result.json").exists()


def test_results_of_another_version_are_results(scene: Scene, tmp_path: Path) -> None:
    """Weeks of training are not removed because a figure of `result.json` was renamed."""
    files = opened(scene, tmp_path / "out")
    files.write(RunResult("try", files.run.hex(), step=2, complete=True))
    path = files.output / "result.json"
    older = json.loads(path.read_text())
    path.write_text(json.dumps({**older, "modalities": older.pop("made_from")}))
    kept = files.result()
    assert kept is not None and (kept.step, kept.complete) == (2, True)


def test_a_resumed_run_begins_with_whole_lines(scene: Scene, tmp_path: Path) -> None:
    files = opened(scene, tmp_path / "runs")
    files.metric(step=1)
    with (files.output / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "lo')
    again = RunFiles(scene.config("hub"), scene.settings, resume=True, report=h.Reporter())
    assert again.run == files.run
    again.open(resumed=True, patients={}, held_out=())
    again.metric(step=2)
    assert lines(again) == [1, 2]


def test_the_power_goes_while_the_result_is_written(
    scene: Scene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = opened(scene, tmp_path / "runs")
    (files.output / "metrics.jsonl").unlink()
    disk = Disk(files.output)
    monkeypatch.setattr(durable, "os", disk)
    seen = 0
    for step in (1, 2):
        first = len(disk.calls)
        files.write(RunResult("try", files.run.hex(), step=step))
        assert disk.kept() == found(files.output)
        for count in range(first, len(disk.calls) + 1):
            for state in disk.states(count):
                seen += 1
                files.output = lay_out(state, tmp_path / f"look-{seen}")
                there = files.result()
                if count == len(disk.calls):
                    assert there is not None
                    assert there.step == step
                else:
                    assert (there.step if there else 0) in (step - 1, step)
        files.output = disk.root
    assert seen > 20
