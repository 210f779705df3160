"""What a site has answered in one run: a journal in the run's folder, under both promises of a second answer.

A run has lines of one kind. Of releases (SP-11.17-4, `released.py`):

    {"batch": 3, "windows": {"<patient's key>": [[x, y, z], ...]}, "people": ["<account>"], "asked": "<hex>",
     "answer": "<hex>"}

Of other answers under masks (SP-11.18-13, `summing.py`):

    {"asked": "<hex>", "answer": "<hex>"}

`asked` and `answer` are SHA-256 of the question and of the octets that left.
"""

from __future__ import annotations

from pathlib import Path

from splitpeer.storage.journal import Journal

ANSWERS = "answers.jsonl"


def answers_of(folder: Path, most_mib: int) -> Journal:
    """Of the run in `folder`."""
    return Journal(
        folder / ANSWERS, most_mib, "so nobody knows what has left: this site cannot go on with the run"
    )
