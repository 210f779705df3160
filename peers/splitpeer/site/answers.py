"""What a site has answered in one run: a journal in the run's folder, under both promises of a second answer.

A run has lines of one kind. Of releases (SP-11.17-4, `released.py`):

    {"batch": 3, "windows": {"<patient's key>": [[x, y, z], ...]}, "people": ["<account>"], "asked": "<hex>",
     "answer": "<hex>"}

Of other answers under masks (SP-11.18-13, `summing.py`):

    {"asked": "<hex>", "answer": "<hex>"}

`asked` and `answer` are SHA-256 of the question and of the octets that left; of releases under masks, and of inference,
of the words before they were masked.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

from splitpeer.storage.journal import Journal
from splitproto.errors import PolicyRefused

ANSWERS = "answers.jsonl"
LEAST_OCTETS = len("[0,0,0],")
"""Of a window's origin in a line of releases; what the line has besides depends on the coordinator's batches."""


def answers_of(folder: Path, most_mib: int) -> Journal:
    """Of the run in `folder`."""
    return Journal(
        folder / ANSWERS, most_mib, "so nobody knows what has left: this site cannot go on with the run"
    )


def check_windows(shapes: Iterable[tuple[int, ...]], window: tuple[int, ...], most_mib: int) -> None:
    """Whether releases of whole volumes can be written down: a run that cannot end should not begin.

    Args:
        shapes: of the volumes, in voxels.
        window: in voxels; windows that cover a volume overlap as the coordinator likes, so not at all here.

    Raises:
        PolicyRefused: however large the batches.
    """
    windows = sum(
        math.prod(-(-size // width) for size, width in zip(shape, window, strict=True)) for shape in shapes
    )
    if windows * LEAST_OCTETS > most_mib << 20:
        raise PolicyRefused(
            f"the job releases {windows} windows or more of this site, and the record of them would be larger than "
            f"{most_mib} MiB (policy max_record_mib)"
        )
