"""`splitpeer replay`: look, defend afterwards, drive a live peer again; captures of real runs."""

from __future__ import annotations

import asyncio
import json
import secrets
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from splitpeer.captures.reader import Capture, open_capture
from splitpeer.cli import main
from splitpeer.coordinator import record as runs
from splitpeer.errors import DataError
from splitpeer.replay.redrive import _Recording
from splitproto.messages import Activations, Advance

from .scene import SEED, Scene

Run = Callable[..., tuple[int, str, str]]
RUN = bytes(range(16))
STILL = {"optimiser": "sgd", "learning_rate": 1e-30, "schedule": "constant"}
"""Weights that do not move, so that runs can be compared beyond their first step."""


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Run:
    def run(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as left:
            main(["replay", *map(str, arguments)])
        said = capsys.readouterr()
        return int(left.value.code or 0), said.out, said.err

    return run


@pytest.fixture(scope="module")
def recorded(federation: Any, nursery: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    """A run of two sites that coordinator and one site recorded."""
    scene = Scene(federation, tmp_path_factory.mktemp("recorded"), nursery)
    scene.cast(
        "flair", "t1", training={"steps": 5, "batch": 2, "checkpoint_every": 2}, evaluation={"every": 3}
    )
    ran = asyncio.run(scene.together(curious=("hub", "site-t1")))
    assert ran.result is not None and ran.result.complete, ran
    yield scene
    scene.clean_up()


# --- looking -------------------------------------------------------------------------------------------------


def test_the_table_says_what_when_how_much_and_by_whom(recorded: Scene, cli: Run) -> None:
    code, text, error = cli(recorded.capture("hub"))
    assert (code, error) == (0, "")
    flat = " ".join(text.split())
    for words in (
        "recorded by coordinator hub", "job try: 2-D, levels x0,x1,x2,x3,x4, f32, 5 steps of 2",
        "peer site-t1 t1; records: yes; does nothing", "peer site-flair flair; records: no; does nothing",
        "training steps 5", "whole: every record fits the chain; closed cleanly", "last chain",
    ):  # fmt: skip
        assert words in flat, words


def test_json_holds_all_of_it(recorded: Scene, cli: Run) -> None:
    code, text, _ = cli(recorded.capture("site-t1"), "--json")
    found = json.loads(text)
    assert code == 0 and found["verdict"]["whole"] and found["verdict"]["ended"]
    assert found["recorded_by"]["site"] == "site-t1" and found["steps"] == 5 and found["patients"] == 6
    flows = {(flow["direction"], flow["kind"]): flow for flow in found["flows"]}
    octets = 4 * 2 * (2 * 32**2 + 4 * 16**2 + 4 * 8**2 + 8 * 4**2 + 8 * 2**2)  # f32, batch 2, five levels
    assert (flows["in", "gradients"]["messages"], flows["in", "gradients"]["octets"]) == (5, 5 * octets)
    assert flows["out", "activations"]["last_step"] == 5
    levels = {(level["kind"], level["name"]): level for level in found["levels"]}
    assert levels["gradients", "x0"]["shape"] == [2, 32, 32] and levels["gradients", "x4"]["samples"] == 10


# --- bad input -------------------------------------------------------------------------------------------------


def damaged(path: Path, to: Path, edit: Callable[[bytearray], bytes]) -> Path:
    to.write_bytes(edit(bytearray(path.read_bytes())))
    return to


def flipped(octets: bytearray) -> bytes:
    octets[len(octets) // 2] ^= 1
    return bytes(octets)


@pytest.mark.parametrize(
    ("edit", "words", "shown"),
    [
        (lambda o: bytes(o[:-100]), "the recording was cut off; the", True),
        (flipped, "does not fit the chain", False),
        (lambda o: b"SPLTCAP9" + bytes(o[8:]), "version", False),
        (lambda o: b"not a capture", "not a capture: it does not begin with", False),
        (lambda o: b"", "", False),
    ],
    ids=["truncated", "tampered", "version", "foreign", "empty"],
)
def test_damage_is_one_line(
    recorded: Scene, cli: Run, tmp_path: Path, edit: Any, words: str, shown: bool
) -> None:
    path = damaged(recorded.capture("hub"), tmp_path / "bad.cap", edit)
    code, text, error = cli(path)
    assert (code, len(error.splitlines())) == (4, 1), error
    assert words in error and "bad.cap" in error, error
    assert ("training steps" in text and "Messages" in text) == shown
    code, _, error = cli(path, "--out", tmp_path / "new.cap", "--defence", "dropout:0.5", "--seed", 7)
    if not shown:
        assert (code, len(error.splitlines())) == (4, 1), error
        assert not (tmp_path / "new.cap").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("none.cap",), "none.cap"),
        (("CAP", "--key", "none.key"), "none.key"),
        (("CAP", "--out", "x.cap"), "a defended capture needs both"),
        (("CAP", "--defence", "dropout:0.5"), "a defended capture needs both"),
        (("CAP", "--out", "x.cap", "--defence", "dropout:0.5"), "--defence-key FILE, or --seed N"),
        (("CAP", "--out", "x.cap", "--defence", "dropout:7", "--seed", "1"), "from 0 to"),
        (("CAP", "--out", "x.cap", "--defence", "prayer", "--seed", "1"), "'prayer' is unknown"),
        (("CAP", "--out", "x.cap", "--defence", "nopeek", "--seed", "1"), "changes the training"),
        (("CAP", "--out", "x.cap", "--defence", "dropout:0.5", "--seed", "1", "--site", "nobody"), "not in this"),
        (("CAP", "--out", "CAP", "--defence", "dropout:0.5", "--seed", "1"), "name a new file"),
        (("CAP", "--drive", "coordinator"), "add --config peer.toml"),
        (("CAP", "--drive", "coordinator", "--config", "HUB"), "add --job job.toml"),
        (("CAP", "--drive", "client", "--config", "HUB"), "use --drive coordinator"),
        (("T1CAP", "--drive", "coordinator", "--config", "HUB", "--job", "x.toml"), "use --drive client"),
        (("T1CAP", "--drive", "client", "--config", "none.toml"), "no such file"),
        (("T1CAP", "--drive", "client", "--config", "FLAIR"), "but the capture was recorded by the client site-t1"),
    ],
)  # fmt: skip
def test_every_mistake_is_one_line(
    recorded: Scene, cli: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: Any, words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    names = {"CAP": recorded.capture("hub"), "HUB": recorded.folder / "hub" / "peer.toml",
             "T1CAP": recorded.capture("site-t1"), "FLAIR": recorded.folder / "site-flair" / "peer.toml"}  # fmt: skip
    code, _, error = cli(*(names.get(one, one) for one in arguments))
    assert (code, len(error.splitlines())) == (4, 1), error
    assert words in error
    assert recorded.capture("hub").exists() and list(tmp_path.iterdir()) == []


async def test_an_encrypted_capture_needs_its_key_and_bf16_is_not_defended_again(
    scene: Scene, cli: Run, tmp_path: Path
) -> None:
    scene.cast("t1", training={"steps": 1, "batch": 1, "precision": "bf16"})
    for folder, name in ((scene.folder / "hub", "capture.key"), (tmp_path, "other.key")):
        (folder / name).write_bytes(secrets.token_bytes(32))
        (folder / name).chmod(0o600)
    scene.coordinator(capture={"key": "capture.key"})
    ran = await scene.together(curious=("hub",))
    assert ran.result is not None and ran.result.complete, ran

    def run(*arguments: object) -> tuple[int, str, str]:
        return cli(scene.capture("hub"), *arguments)

    code, text, error = await asyncio.to_thread(run)
    assert (code, len(error.splitlines())) == (4, 1) and "need --key KEY" in error, error
    assert "aes-256-gcm" in text and "Messages" not in text
    code, _, error = await asyncio.to_thread(run, "--key", tmp_path / "other.key")
    assert code == 4 and "another key" in error, error
    code, text, error = await asyncio.to_thread(run, "--key", scene.folder / "hub" / "capture.key")
    assert (code, error) == (0, "") and "training steps" in text
    code, _, error = await asyncio.to_thread(
        run, "--key", scene.folder / "hub" / "capture.key", "--out", tmp_path / "x.cap",
        "--defence", "dropout:0.5", "--seed", 1,
    )  # fmt: skip
    assert code == 4 and "sent as bf16" in error, error


# --- defending ---------------------------------------------------------------------------------------------------


def sent(capture: Capture, who: str) -> dict[tuple[str, int, int], dict[str, bytes]]:
    found = {}
    for record in capture.records():
        if isinstance(record.head, Activations) and who in (record.peer, capture.header.site):
            head = record.head
            tensors = record.message.tensors  # type: ignore[attr-defined]
            found[head.mode, head.step, head.batch] = {name: a.tobytes() for name, a in tensors.items()}
    return found


@pytest.mark.parametrize("defence", [["dropout:0.5", "gaussian:1.0"], ["laplace:0.5@0,1", "quantise:4"]])
async def test_a_defence_added_afterwards_gives_what_the_live_defence_sent(
    scene: Scene, cli: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, defence: list[str]
) -> None:
    drawn = runs.secrets.token_bytes
    monkeypatch.setattr(runs.secrets, "token_bytes", lambda count: RUN if count == len(RUN) else drawn(count))
    captures = {}
    for name, policy in (("clean", []), ("live", defence)):
        scene.cast("flair", "t1", training={"steps": 2, "batch": 2, **STILL})
        for modality in scene.modalities:
            scene.client(modality, policy={"coordinators": ["hub"], "defences": policy}, peer={"state": name})
        scene.coordinator(peer={"state": name})
        ran = await scene.together(curious=("hub", "site-t1"))
        assert ran.result is not None and ran.result.complete, ran
        for who in ("hub", "site-t1"):
            captures[name, who] = scene.capture(who).rename(tmp_path / f"{name}-{who}.cap")
    for who in ("hub", "site-t1"):
        out = tmp_path / f"again-{who}.cap"
        code, _, error = await asyncio.to_thread(
            cli, captures["clean", who], "--defence", "+".join(defence), "--seed", SEED, "--out", out
        )
        assert (code, error) == (0, ""), error
        clean, live, again = (open_capture(p) for p in (captures["clean", who], captures["live", who], out))
        assert again.verify().whole and again.verify().ended
        assert again.header.peers == live.header.peers or who != "hub", "announced alike"
        assert again.header.defences == live.header.defences
        assert again.header.extensions["splitproto/redefended-from"] == clean.verify().last_chain.hex()
        for site in ("site-flair", "site-t1") if who == "hub" else ("site-t1",):
            ours, theirs, plain = sent(again, site), sent(live, site), sent(clean, site)
            assert ours.keys() == theirs.keys() and {place[0] for place in ours} == {"train", "evaluate"}
            assert ours == theirs
            assert all(ours[place]["x0"] != plain[place]["x0"] for place in ours)


def test_only_one_site_may_be_defended_and_a_defended_capture_again(
    recorded: Scene, cli: Run, tmp_path: Path
) -> None:
    once, twice = tmp_path / "once.cap", tmp_path / "twice.cap"
    code, _, error = cli(recorded.capture("hub"), "--defence", "dropout:0.5", "--seed", 1, "--site", "site-t1",
                         "--out", once)  # fmt: skip
    assert code == 0, error
    clean, new = open_capture(recorded.capture("hub")), open_capture(once)
    assert sent(clean, "site-flair") == sent(new, "site-flair")
    assert [bool(p.defences) for p in new.header.peers] == [False, True]
    zeros = [np.frombuffer(t["x0"], np.float32) == 0 for t in sent(new, "site-t1").values()]
    assert 0.4 < np.concatenate(zeros).mean() < 0.6
    code, _, error = cli(once, "--defence", "gaussian:1", "--seed", 1, "--site", "site-t1", "--out", twice)
    assert code == 0, error
    assert len(open_capture(twice).header.peers[1].defences) == 2


# --- driving -----------------------------------------------------------------------------------------------------


def test_a_coordinator_that_is_driven_again_gives_the_same_gradients(recorded: Scene, cli: Run) -> None:
    hub = recorded.folder / "hub"
    before = {p: p.stat().st_mtime_ns for p in hub.rglob("*")}
    code, text, error = cli(recorded.capture("hub"), "--drive", "coordinator", "--config", hub / "peer.toml",
                            "--job", hub / "job.toml", "--json")  # fmt: skip
    assert code == 0, error + text
    found = json.loads(text)
    assert found["agrees"] and found["largest"] == 0 and found["largest_figure"] == 0, found
    assert (found["steps"], found["tensors"], found["figures"] >= 5) == (5, 2 * 5 * 5, True)
    assert {p: p.stat().st_mtime_ns for p in hub.rglob("*")} == before, "the peer's own files are only read"


async def test_a_coordinator_that_defends_gradients_is_driven_with_its_own_key(
    scene: Scene, cli: Run
) -> None:
    scene.cast("t1", training={"steps": 2, "batch": 1}, defences={"gradients": ["gaussian:0.5"]})
    ran = await scene.together(curious=("hub",))
    assert ran.result is not None and ran.result.complete, ran
    hub = scene.folder / "hub"
    assert open_capture(scene.capture("hub")).header.defences
    code, text, error = await asyncio.to_thread(
        cli,
        scene.capture("hub"),
        "--drive",
        "coordinator",
        "--config",
        hub / "peer.toml",
        "--job",
        hub / "job.toml",
    )
    assert code == 0, error + text


def test_a_client_that_is_driven_again_sends_the_same_activations(recorded: Scene, cli: Run) -> None:
    code, text, error = cli(recorded.capture("site-t1"), "--drive", "client", "--config",
                            recorded.folder / "site-t1" / "peer.toml")  # fmt: skip
    assert code == 0, error + text
    assert "5 of 5 steps driven" in text and "the live peer answers as recorded" in text
    assert "largest difference 0 " in text


async def test_steps_that_were_made_without_a_site_are_driven_too(scene: Scene, cli: Run) -> None:
    """Seat dropout: what was recorded holds `advance` in the place of gradients."""
    dropping = {"steps": 8, "batch": 1, "seat_dropout": 0.4}
    scene.cast("flair", "t1", training=dropping, evaluation={"every": 4})
    ran = await scene.together(curious=("hub", "site-t1"))
    assert ran.result is not None and ran.result.complete, ran
    advanced = [r for r in open_capture(scene.capture("site-t1")).records() if isinstance(r.head, Advance)]
    assert 0 < len(advanced) < 8
    hub = scene.folder / "hub"
    for site, more in (
        ("hub", ("coordinator", "--config", hub / "peer.toml", "--job", hub / "job.toml")),
        ("site-t1", ("client", "--config", scene.folder / "site-t1" / "peer.toml")),
    ):
        code, text, error = await asyncio.to_thread(cli, scene.capture(site), "--json", "--drive", *more)
        assert code == 0, error + text
        found = json.loads(text)
        assert found["agrees"] and found["largest"] == 0 and found["steps"] >= 7, found


async def test_a_run_that_withdrew_a_patient_is_driven_too(scene: Scene, cli: Run) -> None:
    """SP-11.13-1: the recorded site withdraws it again, and batches drawn again are not confused with earlier ones."""
    scene.cast("flair", "t1", training={"steps": 6, "batch": 2}, evaluation={"every": 3})
    images = scene.folder / "images"
    shutil.copytree(scene.federation.data / "t1", images)
    scene.client("t1", data={"images": str(images)})
    names = {scene.key(path.name.removesuffix(".nii.gz")): path for path in images.iterdir()}
    training, held_out = scene.patients()
    scene.job(
        training={"steps": 6, "batch": 2},
        evaluation={"every": 3, "batch": 4},
        data={"validation": 2, "max_withdrawn": 2},
    )
    for key in (training[0], held_out[0]):
        names[key].write_bytes(names[key].read_bytes()[:-5000])
    ran = await scene.together(curious=("hub", "site-flair", "site-t1"))
    assert ran.result is not None, ran
    assert len(ran.result.withdrawn) == 2
    hub = scene.folder / "hub"
    for site, more in (
        ("hub", ("coordinator", "--config", hub / "peer.toml", "--job", hub / "job.toml")),
        ("site-flair", ("client", "--config", scene.folder / "site-flair" / "peer.toml")),
        ("site-t1", ("client", "--config", scene.folder / "site-t1" / "peer.toml")),
    ):
        code, text, _ = await asyncio.to_thread(cli, scene.capture(site))
        assert "6 (2 withdrawn)" in " ".join(text.split())
        code, text, error = await asyncio.to_thread(cli, scene.capture(site), "--json", "--drive", *more)
        assert code == 0, error + text
        found = json.loads(text)
        assert found["agrees"] and found["largest"] == 0 and found["steps"] == 6, found


async def test_a_site_that_was_lost_ends_the_comparison_and_it_says_so(scene: Scene, cli: Run) -> None:
    """A driven coordinator misses nobody: behind the step that was made without a site nothing can be compared."""
    scene.cast(
        "flair",
        "t1",
        training={"steps": 60, "batch": 1},
        absence={"mode": "drop"},
        **{"absence.per_site_s": {"site-t1": 0.2}},
    )
    hub, clients = scene.start_all("--curious", str(scene.capture("hub")))
    scene.until_step(5)
    clients["t1"].signal(signal.SIGKILL)
    assert hub.code() == 0, hub.said
    lost = next(line["step"] for line in scene.metrics() if line.get("without"))
    folder = scene.folder / "hub"
    code, text, error = await asyncio.to_thread(
        cli, scene.capture("hub"), "--drive", "coordinator", "--config", folder / "peer.toml",
        "--job", folder / "job.toml",
    )  # fmt: skip
    assert code == 0, error + text
    assert f"{lost - 1} of 60 steps driven" in text and "largest difference 0 " in text, text
    assert f"stopped at train step {lost}: the capture holds nothing of site-t1 there" in text, text


def test_a_run_that_averaged_encoders_drives_nobody(recorded: Scene) -> None:
    """SP-11.16: what an average was made of, one party's capture does not hold."""
    capture = open_capture(recorded.capture("hub"))
    header = replace(capture.header, job=replace(capture.header.job, average_every=2))
    with pytest.raises(
        DataError, match=r"averaged encoders, which cannot be repeated: inspect the capture only"
    ):
        _Recording.of(SimpleNamespace(header=header))  # type: ignore[arg-type]


def test_another_coordinator_is_told_apart(recorded: Scene, cli: Run, tmp_path: Path) -> None:
    """Other labels, other weights: exit code 1, or a clear line where the job is not the recorded one."""
    hub = recorded.folder / "hub"
    altered = tmp_path / "job.toml"
    altered.write_text(
        (hub / "job.toml").read_text().replace('"steps": 5', '"steps": 6').replace("steps = 5", "steps = 6")
    )
    code, _, error = cli(recorded.capture("hub"), "--drive", "coordinator", "--config", hub / "peer.toml",
                         "--job", altered)  # fmt: skip
    assert (code, len(error.splitlines())) == (4, 1) and "not the job that was recorded" in error, error
    altered.write_text((hub / "job.toml").read_text().replace(f"seed = {SEED}", "seed = 8"))
    code, _, error = cli(recorded.capture("hub"), "--drive", "coordinator", "--config", hub / "peer.toml",
                         "--job", altered)  # fmt: skip
    assert code == 1 and "orders another batch at step 1" in error, error


def test_a_client_with_other_weights_differs(recorded: Scene, cli: Run, tmp_path: Path) -> None:
    other = tmp_path / "peer.toml"
    other.write_text(
        (recorded.folder / "site-t1" / "peer.toml").read_text().replace(f"weights = {SEED}", "weights = 8")
    )
    code, text, _ = cli(recorded.capture("site-t1"), "--drive", "client", "--config", other, "--json")
    assert code == 1 and json.loads(text)["largest"] > 1e-3
    other.write_text(other.read_text().replace("weights = 8", 'weights = "private"'))
    code, _, error = cli(recorded.capture("site-t1"), "--drive", "client", "--config", other)
    assert code == 4 and "nothing to begin with" in error, error
