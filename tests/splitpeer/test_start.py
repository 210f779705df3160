"""What a start costs, and what it says while it imports."""

from __future__ import annotations

import subprocess
import sys

NEEDLESS = (
    "monai",
    "matplotlib",
    "skimage",
    "scipy.ndimage",
    "scipy.stats",
    "nilearn",
    "sklearn",
    "dp_accounting",
    "pandas",
)
"""Packages that cost from a tenth of a second to several, and that training does not need."""


def test_a_daemon_imports_what_it_trains_with_and_no_more() -> None:
    program = (
        "import sys, splitpeer.roles.client, splitpeer.roles.coordinator\n"
        f"print(*sorted(set({NEEDLESS}) & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=100
    )
    assert done.stdout.split() == []
