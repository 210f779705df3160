"""sd_notify: what systemd hears, through real Unix sockets."""

from __future__ import annotations

import asyncio
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from splitpeer.daemon.systemd import Notifier


class Manager:
    """The service manager's end."""

    def __init__(self, address: str) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(address.replace("@", "\0", 1))
        self.environ = {"NOTIFY_SOCKET": address}

    def heard(self, timeout: float = 0.0) -> list[str]:
        """What has come; the first of it within `timeout` seconds."""
        found = []
        self.socket.settimeout(timeout or 0.001)
        try:
            while True:
                found.append(self.socket.recv(4096).decode())
                self.socket.settimeout(0.001)
        except TimeoutError:
            return found

    def until(self, line: str, timeout: float = 60.0) -> list[str]:
        """All that comes up to `line`."""
        found: list[str] = []
        ends = time.monotonic() + timeout
        while line not in found:
            assert time.monotonic() < ends, f"no {line} within {timeout:g} s: {found}"
            found += self.heard(0.1)
        return found


@pytest.fixture(params=["a path", "abstract"])
def manager(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Manager]:
    made = Manager(
        str(tmp_path / "notify") if request.param == "a path" else f"@splitpeer-{secrets.token_hex(8)}"
    )
    yield made
    made.socket.close()


def test_every_word_arrives(manager: Manager) -> None:
    notifier = Notifier({**manager.environ, "WATCHDOG_USEC": "4000000"}, pid=1)
    notifier.ready()
    notifier.status("training, step 3 of 12")
    notifier.alive()
    notifier.stopping()
    assert manager.heard() == ["READY=1", "STATUS=training, step 3 of 12", "WATCHDOG=1", "STOPPING=1"]
    assert notifier.watchdog_s == 2.0


def test_a_status_cannot_say_anything_else(manager: Manager) -> None:
    Notifier(manager.environ).status("lost ukm:\nSTOPPING=1\n\x1b[2J")
    assert manager.heard() == ["STATUS=lost ukm: STOPPING=1 ?[2J"]


@pytest.mark.parametrize(
    ("environ", "every"),
    [
        ({"WATCHDOG_USEC": "60000000"}, 30.0),
        ({"WATCHDOG_USEC": "60000000", "WATCHDOG_PID": "77"}, 30.0),
        ({"WATCHDOG_USEC": "60000000", "WATCHDOG_PID": "78"}, None),
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": "soon"}, None),
        ({}, None),
    ],
)
def test_the_watchdog_is_ours_or_nobodys(
    manager: Manager, environ: dict[str, str], every: float | None
) -> None:
    notifier = Notifier({**manager.environ, **environ}, pid=77)
    assert notifier.watchdog_s == every
    notifier.alive()
    assert manager.heard() == ([] if every is None else ["WATCHDOG=1"])


@pytest.mark.parametrize("environ", [{}, {"NOTIFY_SOCKET": ""}, {"NOTIFY_SOCKET": "relative"}])
def test_without_systemd_nothing_is_opened(environ: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "socket", None)
    notifier = Notifier({**environ, "WATCHDOG_USEC": "1000000"})
    for say in (notifier.ready, notifier.alive, notifier.stopping, notifier.explain_hangs):
        say()
    notifier.status("nobody hears it")
    assert notifier.watchdog_s is None


def test_a_manager_that_is_gone_or_does_not_listen(tmp_path: Path) -> None:
    Notifier({"NOTIFY_SOCKET": str(tmp_path / "none")}).ready()
    deaf = Manager(str(tmp_path / "deaf"))
    notifier = Notifier(deaf.environ)
    began = time.monotonic()
    for _ in range(5000):
        notifier.status("x" * 1000)
    assert time.monotonic() - began < 5
    deaf.socket.close()


# --- through a daemon on duty -----------------------------------------------------------------------------------------

DAEMON = """
import asyncio, sys, time
from pathlib import Path
from splitpeer.settings.peer import PeerConfig
from splitpeer.daemon.duty import Duty

async def main():
    async with Duty(PeerConfig.load(Path("peer.toml"))).on_duty():
        await asyncio.sleep(0.8)
        print("hangs", flush=True)
        hang()

def hang():
    time.sleep(60)

asyncio.run(main())
"""


def test_a_hung_loop_is_not_fed_and_says_where_it_hangs(manager: Manager, peer_toml: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", DAEMON],
        cwd=peer_toml.parent,
        env={**os.environ, **manager.environ, "WATCHDOG_USEC": "400000"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "hangs\n"
    # 0.8 s at 0.2 s: four, and the one at the start; fewer on a machine that is busy.
    assert 2 <= manager.heard().count("WATCHDOG=1") <= 6
    time.sleep(0.6)
    assert manager.heard() == []
    process.send_signal(signal.SIGABRT)  # what systemd does then
    _, said = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGABRT
    assert "in hang" in said


async def test_a_board_says_when_it_is_ready_and_when_it_leaves(
    manager: Manager, peer_toml: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from splitpeer.daemon.duty import Duty
    from splitpeer.daemon.happenings import PhaseBegan, Ready, TrainingBegan
    from splitpeer.settings.peer import PeerConfig

    monkeypatch.setenv("NOTIFY_SOCKET", manager.environ["NOTIFY_SOCKET"])
    duty = Duty(PeerConfig.load(peer_toml, environ={}))
    board = duty.board
    async with duty.on_duty():
        assert "READY=1" not in manager.heard()
        duty.report(Ready("tcp://hub:7443"))
        duty.report(TrainingBegan(3, 12))
        assert manager.heard() == ["READY=1", "STATUS=training, step 3 of 12"]
        board.waits("activations of step 4", who="ukm")
        assert board.line() == "training, step 3 of 12, waits for ukm: activations of step 4"
        await asyncio.sleep(0)
        duty.report(PhaseBegan("draining"))
        assert manager.heard()[0] == "STOPPING=1"
    assert manager.heard()[-1] == "STATUS=stopped"
