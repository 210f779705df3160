"""Real daemons as `splitpeer status` shows them, `splitpeer drain` stops them and systemd hears them."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from splitpeer.cli import main
from splitpeer.daemon.observe import PeerHead, Seen, look

LONG = {"steps": 4000, "checkpoint_every": 500}
BRISK = {"join_s": 60, "step_s": 60, "return_s": 60}


def of(scene, who: str) -> Seen:
    return look(PeerHead.load(scene.folder / who / "peer.toml"))


def until(scene, who: str, wanted: Callable[[Seen], object], timeout: float = 60.0) -> Seen:
    ends = time.monotonic() + timeout
    while not wanted(found := of(scene, who)):
        assert time.monotonic() < ends, f"{found.state}, {found.document}"
        time.sleep(0.05)
    return found


def command(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str]:
    with pytest.raises(SystemExit) as left:
        main([str(argument) for argument in arguments])
    return int(left.value.code or 0), capsys.readouterr().out


def test_a_federation_as_status_shows_it(scene, capsys: pytest.CaptureFixture[str]) -> None:
    scene.cast("flair", "t1", training=LONG, deadlines=BRISK)
    hub = scene.start("hub")
    peers = [scene.folder / who / "peer.toml" for who in ("hub", "site-flair", "site-t1")]
    found = until(scene, "hub", lambda one: one.phase == "gathering" and one.sites and one.document["ready"])
    assert {name: known["state"] for name, known in found.sites.items()} == {
        "site-flair": "awaited",
        "site-t1": "awaited",
    }
    code, out = command(capsys, "status", *peers)
    assert code == 1, "two do not run"
    clients = [scene.start("site-flair"), scene.start("site-t1")]
    found = until(scene, "hub", lambda one: one.phase == "training" and (one.work.get("step") or 0) > 20)
    assert (found.pid, found.work["steps"], found.work["job"]) == (hub.pid, 4000, "try")
    assert {known["state"] for known in found.sites.values()} == {"present"}
    assert [of(scene, f"site-{m}").pid for m in ("flair", "t1")] == [client.pid for client in clients]
    until(scene, "site-t1", lambda one: one.phase == "working" and one.work["step"] > 20)
    code, out = command(capsys, "status", *peers)
    assert code == 0, out
    assert "site-t1" in out
    until(scene, "hub", lambda one: one.work.get("step_per_s"))
    until(scene, "site-t1", lambda one: one.work.get("octets_in_per_s") and one.work.get("octets_out_per_s"))

    # A site that hangs: the coordinator says for whom it waits, and the site that it gives no sign.
    clients[1].signal(signal.SIGSTOP)

    def waits_for_it(one: Seen) -> bool:
        return [w["who"] for w in one.waits] == ["site-t1"] and one.age(one.waits[0]["since"]) > 1

    found = until(scene, "hub", waits_for_it)
    assert -60 < found.age(found.waits[0]["until"]) < -50
    clients[1].signal(signal.SIGCONT)
    step = found.work["step"]
    until(scene, "hub", lambda one: one.work["step"] > step)

    # A site that was killed is awaited, and its own status says that it died.
    clients[0].signal(signal.SIGKILL)
    assert clients[0].code() == -signal.SIGKILL
    assert of(scene, "site-flair").state == "died"
    until(scene, "hub", lambda one: one.sites["site-flair"]["state"] == "awaited")
    code, out = command(capsys, "status", peers[0])
    assert (code, "awaited" in out) == (0, True)
    code, out = command(capsys, "drain", peers[0])
    assert code == 0, out
    assert hub.code() == 0
    found = of(scene, "hub")
    assert (found.state, found.phase, found.cause) == ("stopped", "draining", "")
    code, out = command(capsys, "drain", peers[2])
    assert (code, clients[1].code()) == (0, 0)


def test_two_daemons_cannot_share_a_folder(scene) -> None:
    scene.cast("flair", training=LONG)
    scene.start("hub")
    first = scene.start("site-flair")
    until(scene, "site-flair", lambda one: one.runs)
    second = scene.start("site-flair")
    assert second.code() == 4
    assert f"another splitpeer (pid {first.pid}) uses this state folder" in second.last
    assert scene.nursery.runs(first.pid)


def test_systemd_hears_a_daemon(scene, tmp_path: Path) -> None:
    scene.cast("flair")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(60)
        with (tmp_path / "log").open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "splitpeer.cli", "serve", "--role", "client"],
                cwd=scene.folder / "site-flair",
                env={**os.environ, "OMP_NUM_THREADS": "1", "NOTIFY_SOCKET": str(tmp_path / "notify"),
                     "WATCHDOG_USEC": "1000000"},
                stderr=log,
            )  # fmt: skip
        try:
            heard: list[str] = []
            # Nobody answers: it is ready all the same, and dials.
            while not {"READY=1", "WATCHDOG=1"} <= set(heard) or "dialling" not in heard[-1]:
                heard.append(manager.recv(4096).decode())
            assert "STOPPING=1" not in heard
            process.send_signal(signal.SIGTERM)
            while "STOPPING=1" not in heard:
                heard.append(manager.recv(4096).decode())
            assert process.wait(60) == 0
        finally:
            process.kill()
            process.wait()
