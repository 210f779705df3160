"""Deadlines of a process that may be stopped or suspended: the time it did not run does not count against a peer."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any

OVERSLEPT = 1.0
"""Seconds; a deadline noticed later than this was missed because this process did not run (stopped, suspended)."""


def overslept(deadline: float) -> bool:
    """Whether this process did not run when `deadline` (the loop's clock) passed: nothing could be noticed,
    so wait again."""
    return asyncio.get_running_loop().time() - deadline > OVERSLEPT


async def patiently(futures: Iterable[asyncio.Future[Any]], timeout: float) -> bool:
    """Wait until one of `futures` is done, at most `timeout` seconds in which this process runs.

    Returns:
        Whether one is.
    """
    loop, waiting = asyncio.get_running_loop(), set(futures)
    while True:
        deadline = loop.time() + timeout
        done, _ = await asyncio.wait(waiting, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        if done or not overslept(deadline):
            return bool(done)
