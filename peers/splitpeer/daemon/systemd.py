"""Telling systemd: ready, stopping, a line for `systemctl status`, and that the event loop still turns.

The protocol is sd_notify(3): one datagram of NAME=VALUE lines to the Unix socket in ``NOTIFY_SOCKET``. Without that
variable everything here is nothing.
"""

from __future__ import annotations

import faulthandler
import os
import socket
import sys
from collections.abc import Mapping
from contextlib import suppress

from splitproto.errors import printable


class Notifier:
    """What one process says to its service manager. Never raises, never waits.

    Args:
        environ: the environment; default: the process's.
        pid: this process; a watchdog that is meant for another one is not fed.
    """

    def __init__(self, environ: Mapping[str, str] | None = None, pid: int | None = None) -> None:
        environ = os.environ if environ is None else environ
        self._address = _address(environ.get("NOTIFY_SOCKET", ""))
        self.watchdog_s = _watchdog(environ, os.getpid() if pid is None else pid) if self._address else None
        """Seconds between two signs of life, half of what systemd allows; None: it does not watch."""

    def ready(self) -> None:
        """The service works: units ordered after it may start."""
        self._send("READY=1")

    def stopping(self) -> None:
        """The daemon is stopping, whatever the cause."""
        self._send("STOPPING=1")

    def status(self, line: str) -> None:
        """One line for `systemctl status`."""
        self._send("STATUS=" + printable(" ".join(line.split())))

    def alive(self) -> None:
        """Must be called from the event loop, so that a hanging loop is noticed."""
        if self.watchdog_s is not None:
            self._send("WATCHDOG=1")

    def explain_hangs(self) -> None:
        """The watchdog ends a process with SIGABRT: let the journal have where each thread hung."""
        if self.watchdog_s is not None:
            # A stream without a file, as tests have, cannot be written to from a signal.
            with suppress(OSError, ValueError, AttributeError):
                faulthandler.enable(sys.__stderr__ or sys.stderr)

    def _send(self, text: str) -> None:
        if self._address is None:
            return
        # The service manager may be restarting: what it missed is said again soon.
        with (
            suppress(OSError),
            socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as door,
        ):
            door.setblocking(False)
            door.sendto(text.encode(), self._address)


def _address(written: str) -> str | bytes | None:
    if written.startswith("@"):  # Linux's abstract sockets begin with a zero octet
        return b"\0" + written[1:].encode()
    return written if written.startswith("/") else None


def _watchdog(environ: Mapping[str, str], pid: int) -> float | None:
    try:
        microseconds = int(environ.get("WATCHDOG_USEC", ""))
        meant = int(environ.get("WATCHDOG_PID") or pid)
    except ValueError:
        return None
    return microseconds / 2e6 if microseconds > 0 and meant == pid else None
