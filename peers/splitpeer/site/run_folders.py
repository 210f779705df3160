"""The run folders in a site's [peer] state: how many, how large, and which go when there are too many (SP-11.15-6)."""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from splitpeer.daemon import happenings as h
from splitpeer.errors import DiskTrouble
from splitpeer.settings.bounds import Bounds
from splitpeer.storage import durable
from splitproto.errors import PolicyRefused

COMPLETE = "complete"
"""File that marks a run whose coordinator said that it is complete."""
_NAME = re.compile(r"(.+)-[0-9a-f]{32}")


@dataclass(frozen=True)
class _Run:
    folder: Path
    job: str
    size: int
    used: float
    complete: bool


def mark_complete(folder: Path, report: h.Reporter) -> None:
    """The run of `folder` is complete: its weights are worth keeping."""
    try:
        durable.replace(folder / COMPLETE, b"")
    except OSError as error:
        report(h.RunNotMarked(folder.name, str(error.strerror)))


def make_room(state: Path, current: Path, bounds: Bounds, needed: int, report: h.Reporter) -> None:
    """Remove the oldest runs until `current` fits with the others; never the newest complete one of a job.

    Args:
        needed: bytes that the run of `current` takes at least.

    Raises: PolicyRefused: it does not fit, whatever is removed.
    """
    others = [run for run in _runs(state) if run.folder != current]
    newest: dict[str, _Run] = {}
    for run in others:
        if run.complete:
            newest[run.job] = run
    spare = [run for run in others if newest.get(run.job) is not run]
    most = bounds.max_state_mib << 20
    while len(others) >= bounds.max_runs or sum(run.size for run in others) + needed > most:
        if not spare:
            raise PolicyRefused(
                f"the run needs {needed >> 20} MiB in addition to the {len(others)} complete runs that this site keeps "
                "(max_runs, max_state_mib)"
            )
        oldest = spare.pop(0)
        others.remove(oldest)
        shutil.rmtree(oldest.folder, ignore_errors=True)
        report(h.RunPruned(oldest.folder.name, oldest.size >> 20))


def check_room(state: Path, bounds: Bounds, needed: int) -> None:
    """Before a checkpoint of `needed` bytes. Raises DiskTrouble: it would be too much, like a disk that is full."""
    held = sum(run.size for run in _runs(state))
    if held + needed > bounds.max_state_mib << 20:
        raise DiskTrouble(
            f"a checkpoint of {needed >> 20} MiB, with {held >> 20} MiB kept, exceeds {bounds.max_state_mib} MiB "
            "(max_state_mib)"
        )


def _runs(state: Path) -> list[_Run]:
    """Oldest first."""
    found = []
    for folder in state.iterdir() if state.exists() else ():
        named = _NAME.fullmatch(folder.name)
        if named is None or folder.is_symlink() or not folder.is_dir():
            continue
        marks = [path.lstat() for path in folder.iterdir()]
        used = max((mark.st_mtime for mark in marks), default=folder.lstat().st_mtime)
        found.append(
            _Run(folder, named[1], sum(mark.st_size for mark in marks), used, (folder / COMPLETE).exists())
        )
    return sorted(found, key=lambda run: run.used)
