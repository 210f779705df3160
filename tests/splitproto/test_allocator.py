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
    for _ in range(20):
        blocks = [bytes({mib} << 20) for _ in range({blocks})]
        del blocks
def measure():
    move()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    move()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
if {beside}:
    import threading
    thread = threading.Thread(target=measure)
    thread.start()
    thread.join()
else:
    measure()
"""


def faults(first: str, blocks: int, mib: int, *, beside: bool = False) -> int:
    """Pages that are taken again while so many blocks come and go, 20 times.

    Args:
        mib: of a block.
        beside: in a thread of its own.
    """
    script = FAULTS.format(first=first, blocks=blocks, mib=mib, beside=beside)
    made = subprocess.run((sys.executable, "-c", script), capture_output=True, text=True, check=True)
    return int(made.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")
def test_pages_are_not_taken_again() -> None:
    kept, returned = faults("keep_freed_memory()", 100, 1), faults("True", 100, 1)
    assert kept < 1000 < returned


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")
def test_nor_in_a_thread() -> None:
    """By default it has heaps of its own, of 64 MiB at most, each returned as soon as it is empty."""
    kept, returned = (faults(first, 20, 10, beside=True) for first in ("keep_freed_memory()", "True"))
    assert kept < 1000 < returned
