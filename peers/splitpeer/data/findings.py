"""Findings in file names, shown to their owner only: files not taken, and ids that look wrong."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from splitpeer.data.files import Found, examples, summary
from splitpeer.data.patients import duplicate_warnings, spelling_hints


def naming_warnings(root: Path, found: Iterable[Found]) -> list[str]:
    """One line for each finding about the files under `root` that were `found`, kind by kind."""
    found = list(found)
    left_out = dict.fromkeys(one for kind in found for one in kind.left_out)
    ids = sorted({case.patient for kind in found for case in kind.cases})
    return [*summary(list(left_out), root), *duplicate_warnings(ids), *spelling_hints(ids)]


def lacking_warning(found: Found, what: str) -> list[str]:
    """Patients in the tree that have other files, but none of the kind looked for."""
    if not found.lacking:
        return []
    return [f"{len(found.lacking)} patients have other files here, but no {what}: {examples(found.lacking)}"]
