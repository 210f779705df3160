"""Happenings for systemd: when the board says that it is ready, or does something else, systemd is notified at
once."""

from __future__ import annotations

from splitpeer.daemon.board import Board
from splitpeer.daemon.happenings import Happening
from splitpeer.daemon.systemd import Notifier


class SystemdSink:
    """Must come after the board."""

    def __init__(self, notifier: Notifier, board: Board) -> None:
        self._notifier, self._board = notifier, board
        self._ready, self._phase = board.is_ready, board.now

    def __call__(self, _: Happening) -> None:
        if self._board.is_ready and not self._ready:
            self._ready = True
            self._notifier.ready()
        if self._board.now != self._phase:
            self._phase = self._board.now
            if self._phase == "draining":
                self._notifier.stopping()
            self._notifier.status(self._board.line())
