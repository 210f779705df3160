"""Freed memory stays with the process."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource
from splitproto.allocator import keep_freed_memory
assert {first}
def move():
    for _ in range(100):
        blocks = [bytes(1 << 20) for _ in range(8)]
move()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
move()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(first: str) -> int:
    """Pages that are taken again while 800 MiB come and go."""
    made = subprocess.run(
        (sys.executable, "-c", FAULTS.format(first=first)), capture_output=True, text=True, check=True
    )
    return int(made.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")
def test_pages_are_not_taken_again() -> None:
    kept, returned = faults("keep_freed_memory()"), faults("True")
    assert kept < 1000 < returned
