"""What glibc does with memory that is freed: a process that moves tensors wants it kept, not returned page by page."""

from __future__ import annotations

import ctypes

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""malloc.h"""
LARGEST_KEPT = 32 << 20
"""Bytes of a block that comes from the heap and stays there: glibc's own upper limit."""


def keep_freed_memory() -> bool:
    """Keep blocks of up to 32 MiB that are freed, and 64 MiB at the end of the heap.

    glibc returns such memory to the system and clears each page when it gets it back, which costs a link a third of its
    CPU time. It moves its limits up by itself, to these, when large blocks are freed (mallopt(3)); this starts there.
    For a process's own start, before other threads run: the setting is that of the whole process.

    Returns:
        Whether it is set: not without glibc.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return False
    return bool(mallopt(M_MMAP_THRESHOLD, LARGEST_KEPT) and mallopt(M_TRIM_THRESHOLD, 2 * LARGEST_KEPT))
