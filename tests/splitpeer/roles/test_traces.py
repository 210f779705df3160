"""What a run leaves: log lines for people, files of results, and nothing of a patient."""

from __future__ import annotations

import json
import os
import stat

from splitpeer.daemon.console import LogView, Pace


class Ear:
    """A view that remembers."""

    def __init__(self) -> None:
        self.heard: list[tuple] = []

    def __getattr__(self, name: str):
        return lambda *arguments: self.heard.append((name, *arguments))


def test_logs_and_results_of_a_run(scene, make) -> None:
    scene.cast("flair", "t1", training={"steps": 4, "checkpoint_every": 2})
    scene.client("flair", log={"format": "json", "level": "debug"})
    hub, clients = scene.start_all("--json")
    assert hub.code() == 0, hub.said
    assert [client.code() for client in clients.values()] == [0, 0]

    # Nobody's name, key or file.
    logs = [hub.said, *(client.said for client in clients.values())]
    keys = [key.hex() for key in scene.masks().keys()]  # noqa: SIM118
    for said in logs:
        for trace in (*make.PATIENTS, *keys, ".nii"):
            assert trace not in said
        assert "Traceback" not in said
    shared = "".join((scene.output / name).read_text() for name in ("metrics.jsonl", "result.json"))
    assert not any(trace in shared for trace in (*make.PATIENTS, *keys))

    # What people see on the way.
    for line in (
        r'job\.waiting sites="site-flair \(flair\), site-t1 \(t1\)"',
        r'job\.all_here sites="site-flair, site-t1" steps=4',
        r"job\.step step=1/4 loss=\d\.\d+ steps_per_s=0",
        r'job\.step step=4/4 loss=\d\.\d+ steps_per_s=[\d.]+ mb_per_s="site-flair [\d.]+ site-t1 [\d.]+" left_s=0',
        r'job\.checkpoint step=2 sites="site-flair [0-9a-f]{12}, site-t1 [0-9a-f]{12}"',
        r"job\.evaluated step=4 volumes=2 WT=",
        r"^try: 4 steps, Dice WT 0\.\d+ TC 0\.\d+ ET 0\.\d+ mean 0\.\d+; ",
    ):
        hub.until(line, timeout=0.1)
    events = [json.loads(line) for line in clients["flair"].said.splitlines()]
    now_and_then = ("job.progress", "link.waiting", "peer.notice")
    assert [e["event"] for e in events if e["event"] not in now_and_then] == [
        "peer.starting",
        "peer.start",
        "link.up",
        "peer.announced",
        "job.accepted",
        "job.begin",
        "job.checkpoint",
        "job.checkpoint",
        "job.complete",
    ]

    # What is left on disk.
    result = json.loads((scene.output / "result.json").read_text())
    assert json.loads(hub.said[hub.said.index("{\n") :]) == result
    assert result["complete"] is True
    assert (result["step"], result["steps"]) == (4, 4)
    assert (result["patients"], result["validation"]) == (6, 2)
    assert result["sites"] == {"site-flair": "flair", "site-t1": "t1"}
    assert result["tls"].startswith("TLSv1.3 ")
    assert set(result["dice"]) == {"WT", "TC", "ET", "mean"}
    assert 0 < result["seconds"] < 100
    # Activations and gradients, f32, of two sites; envelopes and TLS add little.
    payload = 2 * 2 * 3 * 4 * (2 * 32**2 + 4 * 16**2 + 4 * 8**2 + 8 * 4**2 + 8 * 2**2)
    assert payload < result["bytes_per_step"] < 1.1 * payload
    steps = [line for line in scene.metrics() if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4]
    assert all({"loss", "seconds", "waited", "computed"} <= line.keys() for line in steps)
    checkpoints = list(scene.folder.glob("*/state/*/*.safetensors"))
    assert len(checkpoints) >= 3 * 2
    for path in checkpoints:
        assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
        assert stat.S_IMODE(os.stat(path.parent).st_mode) == 0o700


async def test_a_view_is_told_everything_in_order(scene) -> None:
    scene.cast("t1", training={"steps": 2})
    ear = Ear()
    ran = await scene.together(view=ear)
    assert ran.result is not None, ran.error
    names = [name for name, *_ in ear.heard]
    assert names == ["waiting", "begin", "step", "step", *["evaluating"] * names.count("evaluating"),
                     "evaluated", "close"]  # fmt: skip
    assert ear.heard[0] == ("waiting", "site-t1 (t1)")
    assert ear.heard[1] == ("begin", 2, ["site-t1"], [])
    octets = [heard[3]["site-t1"] for heard in ear.heard if heard[0] == "step"]
    assert 0 < octets[0] < octets[1]
    assert ear.heard[-2] == ("evaluated", 2, ran.result.dice)


def test_a_log_view_says_little(caplog) -> None:
    caplog.set_level("INFO", "splitpeer")
    view = LogView()
    view.waiting("site-t1 (t1)")
    view.waiting("")
    view.begin(100, ["site-t1"], [])
    for step in range(1, 101):
        view.step(step, 1.0, {"site-t1": step * 1000})
    view.close()
    assert [(r.getMessage(), r.fields.get("step")) for r in caplog.records] == [
        ("job.waiting", None),
        ("job.all_here", None),
        ("job.step", "1/100"),
        ("job.step", "100/100"),
    ]


def test_pace_counts_a_site_that_came_later() -> None:
    pace = Pace()
    assert pace.add(1, {"a": 10}) == (0.0, {"a": 0.0})
    rate, traffic = pace.add(2, {"a": 10**6, "b": 10**9})
    assert rate > 0
    assert traffic["a"] > 0
    assert traffic["b"] == 0
