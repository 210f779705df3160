"""Every patient's file is checked before work depends on it: a bad one costs only its patient."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from splitpeer.daemon import happenings as h
from splitpeer.data.channels import Channels
from splitpeer.data.geometry import Geometry
from splitpeer.data.volumes import Volumes
from splitpeer.errors import DataError, PatientUnusable
from splitpeer.logs import handle
from splitproto.causes import OF_A_PATIENT

MOST_LINES = 20
"""Warnings about files in the log of one start."""


def look(
    volumes: Volumes | Channels, bad: dict[bytes, str], report: h.Reporter, *, voxels: bool = False
) -> dict[bytes, Geometry]:
    """The grids of all patients that can be used, by their files' headers.

    Args:
        bad: patients that cannot be used, and why; those that are found go there.
        report: told of each.
        voxels: read every file to its end.

    Raises:
        DataError: no patient is left.
    """
    usable, last = {}, ""
    for key in volumes.keys():  # noqa: SIM118 (not a dict)
        if key in bad:
            continue
        try:
            usable[key] = volumes.geometry(key)
            if voxels:
                volumes.read(key)
        except PatientUnusable as error:
            usable.pop(key, None)
            last = str(error)
            note(error, bad, report)
    if bad and not usable:
        cause = next(reversed(bad.values()))
        told = f"none of its patients' files can be used: {counted(bad.values())}"
        none = f"none of {len(bad)} patients' files can be used"
        raise DataError(f"{none}; the last: {last}" if last else none, cause, told)
    return usable


def check_seats(channels: Channels, report: h.Reporter) -> None:
    """A patient fills a seat of several channels only with all of them: others are told of in the site's log.

    Raises:
        DataError: no patient fills such a seat, though each of its channels has patients.
    """
    for number, (seat, modalities) in enumerate(channels.seats.items()):
        held = {modality: set(channels.volumes[modality].keys()) for modality in modalities}
        if not all(held.values()):
            continue
        anyone = set.union(*held.values())
        if not any(number in channels.fills(key) for key in anyone):
            text = f"no patient has all of {', '.join(modalities)} (seat {seat})"
            raise DataError(f"{text}: write the ids of one patient alike in all of them", told=text)
        for modality, keys in held.items():
            if lacking := len(anyone - keys):
                who = "1 patient lacks" if lacking == 1 else f"{lacking} patients lack"
                verb = "does" if lacking == 1 else "do"
                report(h.DataWarning(f"{who} {modality} and {verb} not fill {seat}"))


def tell(volumes: Volumes, report: h.Reporter) -> None:
    """What `look` found that wants a second look, in the log of the party whose files they are."""
    lines = [line for key in sorted(volumes.warnings) for line in volumes.warnings[key]]
    for line in lines[:MOST_LINES]:
        report(h.DataWarning(line))
    if (more := len(lines) - MOST_LINES) > 0:
        report(h.DataWarning(f"{more} more: splitpeer data check shows all"))


def note(error: PatientUnusable, bad: dict[bytes, str], report: h.Reporter) -> None:
    """Only the log of the file's owner names it; others learn the cause."""
    if error.key not in bad:
        bad[error.key] = error.cause
        report(h.PatientFileBad(handle(error.key), str(error)))


def counted(causes: Iterable[str]) -> str:
    """How many patients, and why, in general words: `3 (the file is gone: 1; the file is truncated or damaged: 2)`."""
    numbers = Counter(causes)
    return f"{numbers.total()} ({'; '.join(f'{OF_A_PATIENT[cause]}: {n}' for cause, n in sorted(numbers.items()))})"
