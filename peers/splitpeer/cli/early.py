"""Signals while a command still imports: one line and the exit code, at once.

Python's own answer to Ctrl-C is an exception. During imports it arrives in third-party code: as a page of
traceback, as another error, or ignored in a callback. There is nothing to clean up yet, so the process just
ends.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

INTERRUPTED = 130
"""128 + SIGINT, as shells do."""
_ANSWERS = {
    signal.SIGINT: (b"splitpeer: interrupted\n", INTERRUPTED),
    signal.SIGTERM: (b"splitpeer: stopped while starting\n", 0),
}
_DEFAULTS: tuple[Callable[[int, FrameType | None], object] | signal.Handlers, ...] = (
    signal.default_int_handler,
    signal.SIG_DFL,
)


@contextmanager
def signals() -> Iterator[None]:
    """Within this block, until `over` is called, SIGINT and SIGTERM end the process. Those that are ignored stay so."""
    before = {}
    for number in _ANSWERS:
        try:
            if signal.getsignal(number) in _DEFAULTS:
                before[number] = signal.signal(number, _leave)
        except ValueError:  # not the main thread, which alone handles signals
            break
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def over() -> None:
    """From now on Ctrl-C is an exception again, and SIGTERM ends the process as it does by default."""
    for number, default in zip(_ANSWERS, _DEFAULTS, strict=True):
        if signal.getsignal(number) is _leave:
            signal.signal(number, default)


def _leave(number: int, frame: FrameType | None) -> None:
    text, code = _ANSWERS[signal.Signals(number)]
    os.write(2, text)
    os._exit(code)
