"""Writes the audit trail in a thread of its own: a slow disk must not hold up heartbeats."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from splitpeer.daemon.trail import LOST, Trail
from splitpeer.errors import ConfigError, DiskTrouble
from splitpeer.logs import event
from splitpeer.storage.pending import Pending

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Note:
    at: float
    """Seconds since the epoch."""
    name: str
    fields: dict[str, Any] = field(default_factory=dict)


class Clerk:
    """The trail of one process. On a full disk its lines wait; that is a warning, once, and stops nothing.

    Args:
        folder: `[peer] state`.
    """

    def __init__(self, folder: Path) -> None:
        self._trail = Trail(folder)
        self._pending = Pending(self._write, (ConfigError, DiskTrouble))
        self._thread = ThreadPoolExecutor(1, "trail")

    def begin(self, name: str, **fields: Any) -> None:
        """The first line, now.

        Raises:
            ConfigError, DiskTrouble: the trail cannot be begun.
        """
        self._trail.note(name, **fields)

    def note(self, name: str, **fields: Any) -> None:
        """One line, soon."""
        self._thread.submit(self._append, _Note(time.time(), name, fields))

    async def close(self) -> None:
        """No more lines; those that were noted are written, as far as there is room."""
        await asyncio.to_thread(self._thread.shutdown)

    def _append(self, note: _Note) -> None:
        self._pending.add(note)
        failed_before = self._pending.failing
        error = self._pending.flush()
        if error is not None and not failed_before:
            event(log, "trail.failed", logging.WARNING, cause=str(error))
        if error is None and failed_before:
            event(log, "trail.written", file=str(self._trail.path))

    def _write(self, waiting: deque[_Note]) -> None:
        if self._pending.lost and self._pending.last_lost is not None:
            self._trail.note(LOST, self._pending.last_lost.at, lines=self._pending.lost)
            self._pending.lost = 0
        while waiting:
            note = waiting[0]
            try:
                self._trail.note(note.name, note.at, **note.fields)
            except (ConfigError, DiskTrouble):
                raise
            except Exception:
                # A bug of ours: it must not block the lines after it for ever.
                log.exception("trail.line_failed", extra={"fields": {"line": note.name}})
            waiting.popleft()
