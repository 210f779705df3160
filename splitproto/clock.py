"""Deadlines of a process that may be stopped or suspended: what it slept over does not count against a peer."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any

OVERSLEPT = 1.0
"""Seconds: a deadline that is noticed so late was slept over by this process (stopped, suspended), not by the peer."""


def overslept(deadline: float) -> bool:
    """Whether this process did not run when `deadline` (the loop's clock) came: then what was waited for could not
    be noticed, and the wait is to begin again."""
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
