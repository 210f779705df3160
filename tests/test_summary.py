"""What a test run reports at its end."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def run(*tests: str) -> str:
    """The output of pytest where no program is found, hence no browser."""
    usual = {name: value for name, value in os.environ.items() if name not in ("CI", "PATH")}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests]
    done = subprocess.run(
        command, cwd=ROOT, env={**usual, "PATH": "/nowhere"}, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_browser_tests_that_were_skipped_are_said_with_what_to_do() -> None:
    said = run("tests/splitpeer/report/test_browser.py")
    (line,) = [line for line in said.splitlines() if "Chromium" in line]
    assert re.match(r"[1-9]\d* browser tests were skipped", line)
    assert "apt install chromium" in line


def test_nothing_is_said_where_none_was_skipped() -> None:
    assert "Chromium" not in run("tests/splitpeer/data/test_pseudonym.py")
