"""A stranger that floods a listener and hangs up, while the listener is busy: the process must survive."""

from __future__ import annotations

import subprocess
import sys
import time

import zmq

LISTENS = """
import asyncio, sys, time
from pathlib import Path
from splitproto import Listener
from splitproto.identity import AllowList, Credentials

async def main():
    own = Credentials(*map(Path, sys.argv[1:4]))
    async with Listener("tcp://127.0.0.1:0", own, AllowList({"client": ("site",)}, "test")) as listener:
        print(listener.address, flush=True)
        sys.stdin.readline()
        time.sleep(12)  # busy: nothing is read while the stranger goes and two heartbeats would be due
        await asyncio.sleep(1)
        print("alive", flush=True)

asyncio.run(main())
"""


def test_a_flood_that_hangs_up_does_not_end_the_process(federation) -> None:
    """libzmq aborts the process where its own heartbeats are on (zeromq/libzmq#4364)."""
    files = [str(federation.folder / name) for name in ("ca.crt", "hub.crt", "hub.key")]
    with subprocess.Popen(
        [sys.executable, "-c", LISTENS, *files],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stdin
        assert process.stdout
        address = process.stdout.readline().strip()
        context = zmq.Context()
        stranger = context.socket(zmq.DEALER)
        stranger.set_hwm(0)
        stranger.linger = 0
        stranger.connect(address)
        process.stdin.write("go\n")
        process.stdin.flush()
        for _ in range(400):
            stranger.send(b"x" * 200_000)
        time.sleep(0.5)
        stranger.close()
        context.term()
        said, complained = process.communicate(timeout=60)
        assert said.strip() == "alive", complained[-500:]
        assert process.returncode == 0
