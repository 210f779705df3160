"""What glibc does with freed memory: a process that moves tensors should keep it instead of returning it."""

from __future__ import annotations

import ctypes

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3
"""malloc.h"""
LARGEST_KEPT = 32 << 20
"""Bytes of the largest block that is taken from the heap and stays there when freed: glibc's own upper limit."""
FREE_KEPT = 256 << 20
"""Bytes of free memory at the end of the heap that stay: as much as a small training step takes and frees again."""
HEAP = 64 << 20
"""Bytes of a heap of a thread other than the first: it gets several, and an empty one stays if padding covers it."""


def keep_freed_memory() -> bool:
    """Keep freed blocks of up to 32 MiB, and up to 256 MiB of free memory at the end of the heap.

    By default glibc returns such memory to the system, and the kernel clears each page when it is taken again, which
    costs a link a third of its CPU time and a training step up to a fifth. glibc raises its limits to some of this by
    itself as large blocks are freed (mallopt(3)); this call sets them from the start. Heaps of other threads are
    returned as soon as they are empty, whatever these limits, unless padding at the end of a heap covers them. (One
    heap for all threads keeps them too, but cost messages of 1 MiB a fifth more CPU time.) Call it when the process
    starts, before there are other threads: it holds for the whole process.

    Returns:
        Whether the limits are set; False without glibc.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return False
    limits = {M_MMAP_THRESHOLD: LARGEST_KEPT, M_TRIM_THRESHOLD: FREE_KEPT, M_TOP_PAD: HEAP}
    return all(mallopt(limit, value) for limit, value in limits.items())
