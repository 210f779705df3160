"""For all tests: the profile of hypothesis, logging restored after each, and a disk of a few hundred KiB to fill."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# No deadline: the machine may be busy, and time is not what properties are about.
settings.register_profile(
    "unhurried", deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("unhurried")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # As a shell starts what runs in the background; processes of the tests would inherit it, and hear no Ctrl-C.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def logging_as_it_was() -> Iterator[None]:
    """A command that runs within a test sets the process's levels and handlers."""
    root = logging.getLogger()
    loggers = [root, logging.getLogger("splitpeer"), logging.getLogger("splitproto")]
    handlers, levels = root.handlers[:], [logger.level for logger in loggers]
    yield
    root.handlers[:] = handlers
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)


NO_BROWSER = "no browser"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What a person would otherwise miss among the dots."""
    reasons = [
        report.longrepr[2]
        for report in terminalreporter.getreports("skipped")
        if isinstance(report.longrepr, tuple)
    ]
    count = sum(NO_BROWSER in reason for reason in reasons)
    if count:
        terminalreporter.write_line(
            f"{count} browser tests were skipped, as no Chromium was found: install it (apt install chromium; "
            "dnf install chromium; or Google Chrome) to have the report's page tested",
            yellow=True,
        )


class SmallDisk:
    """A file system of its own, below `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._filler = folder / "filler"

    def fill(self, but: int = 0) -> None:
        """Not an octet goes on it any more, or `but` of them (whole pages)."""
        with open(self._filler, "ab", buffering=0) as file:
            for piece in (1 << 16, 1):
                with suppress(OSError):
                    while True:
                        file.write(bytes(piece))
        if but:
            os.truncate(self._filler, self._filler.stat().st_size - but)

    def make_room(self) -> None:
        """Take away what filled it."""
        self._filler.unlink(missing_ok=True)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[SmallDisk]:
    """512 KiB of tmpfs."""
    folder = tmp_path / "small"
    folder.mkdir()
    if os.geteuid() != 0:
        pytest.skip("mounting a small disk needs root")
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=512k", "splitpeer-test", str(folder)],
        capture_output=True,
        text=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip(f"no small disk can be mounted here: {mounted.stderr.strip()}")
    try:
        yield SmallDisk(folder)
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)
