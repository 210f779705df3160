"""The command `splitpeer`. This module imports next to nothing, so that Ctrl-C is heard from the start."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from splitpeer.cli import early

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command and leave with its exit code. Never returns."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    with early.signals():
        from splitpeer.cli.outcome import run

        run(arguments)
