"""File descriptors: as many as this machine allows, and a reserve that connections cannot take.

libzmq accepts connections as long as there are descriptors. A coordinator that has none left cannot write a
checkpoint, so its soft limit stays `RESERVE` below the hard one, and is raised for the moment of opening a file.
"""

from __future__ import annotations

import errno
import resource
import threading
from collections.abc import Callable
from typing import TypeVar

EXHAUSTED = frozenset((errno.EMFILE, errno.ENFILE))
FIX = "raise the limit of open files (LimitNOFILE= of the service, or ulimit -n)"
RESERVE = 32
Returned = TypeVar("Returned")

_lock = threading.Lock()


def raise_limit() -> int:
    """Raise the soft limit to the hard one, less the reserve. Returns the new soft limit."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    soft = hard - RESERVE if hard > 4 * RESERVE else hard
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return soft


def spared(opening: Callable[[], Returned]) -> Returned:
    """What `opening` returns, which opens a file or a few; if there is no descriptor left, from the reserve."""
    try:
        return opening()
    except OSError as error:
        if error.errno != errno.EMFILE:
            raise
    with _lock:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        try:
            return opening()
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
