"""What glibc does with freed memory: a process that moves tensors should keep it instead of returning it."""

from __future__ import annotations

import ctypes

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""malloc.h"""
LARGEST_KEPT = 32 << 20
"""Bytes of the largest block that is taken from the heap and stays there when freed: glibc's own upper limit."""


def keep_freed_memory() -> bool:
    """Keep freed blocks of up to 32 MiB, and up to 64 MiB of free memory at the end of the heap.

    By default glibc returns such memory to the system, and the kernel clears each page when it is taken again, which
    costs a link a third of its CPU time. glibc raises its limits to these by itself as large blocks are freed
    (mallopt(3)); this call sets them from the start. Call it when the process starts, before there are other threads:
    it holds for the whole process.

    Returns:
        Whether the limits are set; False without glibc.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return False
    return bool(mallopt(M_MMAP_THRESHOLD, LARGEST_KEPT) and mallopt(M_TRIM_THRESHOLD, 2 * LARGEST_KEPT))
