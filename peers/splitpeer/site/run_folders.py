"""The run folders in a site's [peer] state: how many, how large, and which go when there are too many (SP-11.15-6)."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from splitpeer.daemon import happenings as h
from splitpeer.errors import DataError, DiskTrouble
from splitpeer.federation.terms import terms_digest
from splitpeer.settings.bounds import Bounds
from splitpeer.site.answers import ANSWERS
from splitpeer.site.secret import FUSION_KEY, forget_mask_keys
from splitpeer.site.shown import NAME as SHOWN
from splitpeer.site.shown import runs_in
from splitpeer.storage import checkpoint, durable, reading
from splitproto import codec
from splitproto.errors import CodecError, PolicyRefused, SchemaMismatch
from splitproto.fields import ListOf, Record, write_map
from splitproto.messages import JobOffer
from splitproto.records import MOST_SEATS, Job, Seat

COMPLETE = "complete"
"""File that marks a run whose coordinator said that it is complete."""
TERMS = "terms"
"""File with the digest of the terms and seats that this site accepted for the run."""
OFFER = "offer"
"""File with terms and seats themselves, as they travelled: what the run's encoders are, for whoever exports them."""
COORDINATOR = "coordinator"
"""File with the site name of the coordinator whose run it is."""
MAX_OFFER = 1 << 20
"""Bytes of it."""
_RUN_DIGITS = 32
_NAME = re.compile(rf"(.+)-[0-9a-f]{{{_RUN_DIGITS}}}")


@dataclass(frozen=True)
class _Run:
    folder: Path
    job: str
    size: int
    used: float
    complete: bool
    worked: bool
    """Whether a step was applied or an answer given: else there is nothing in it to lose."""


def mark_complete(folder: Path, report: h.Reporter) -> None:
    """The run of `folder` is complete: its weights are worth keeping, the keys of its masks are not (SP-11.18-5)."""
    try:
        try:
            durable.replace(folder / COMPLETE, b"")
        finally:
            # Also where the disk is full.
            forget_all_keys(folder, report)
    except OSError as error:
        report(h.RunNotMarked(folder.name, str(error.strerror)))


def forget_all_keys(folder: Path, report: h.Reporter) -> None:
    """Delete a complete run's keys for masks, and report each. Raises OSError."""
    run, why = run_of(folder), "the run is complete"
    for name in forget_mask_keys(folder):
        report(h.MaskKeyDeleted(run, why) if name == FUSION_KEY else h.ServiceKeyDeleted(run, why))


def run_of(folder: Path) -> str:
    """The run that a folder belongs to, in hexadecimal."""
    return folder.name.rpartition("-")[2]


def mark_run(state: Path, run: bytes, coordinator: str, report: h.Reporter) -> None:
    """`coordinator` says that a run is complete which an earlier process took up; its folder may be gone.

    A run of another coordinator stays as it is: the keys of its masks are still needed.
    """
    for found in _runs(state):
        named = found.folder.name.endswith(f"-{run.hex()}") and not found.complete
        if named and _coordinator(found.folder) == coordinator:
            mark_complete(found.folder, report)


def write_file(path: Path, octets: bytes) -> None:
    """A file of a run, in place of an older one; durable when this returns. Raises DiskTrouble or ConfigError."""
    try:
        durable.make_folder(path.parent)
        durable.replace(path, octets)
    except OSError as error:
        raise durable.refusal(error, f"{path}:", "[peer] state") from None


def note_coordinator(folder: Path, coordinator: str) -> None:
    """Whose run it is, once: see `mark_run`. Raises DataError: the file cannot be written."""
    path = folder / COORDINATOR
    try:
        if not path.exists():
            durable.replace(path, coordinator.encode())
    except OSError as error:
        raise durable.refusal(error, f"{path}:", "[peer] state") from None


def _coordinator(folder: Path) -> str | None:
    try:
        return (folder / COORDINATOR).read_text("utf-8", "replace")
    except OSError:
        return None


def folders(state: Path) -> list[Path]:
    """Those of all runs, the oldest first."""
    return [run.folder for run in _runs(state)]


def is_complete(folder: Path) -> bool:
    """Whether it was marked."""
    return (folder / COMPLETE).exists()


def check_terms(folder: Path, offer: JobOffer) -> None:
    """SP-11-2: a run keeps the terms and seats that this site accepted, whatever process did.

    Raises:
        SchemaMismatch: the offer has others.
        DataError: the file cannot be read.
    """
    path = folder / TERMS
    try:
        accepted = path.read_bytes()
    except FileNotFoundError:
        return  # new, or taken up before this file was kept
    except OSError as error:
        raise durable.refusal(error, f"{path}:", "[peer] state") from None
    if accepted != accepted_terms(offer):
        raise SchemaMismatch("the terms or the seats are not those that this site accepted for the run")


def note_terms(folder: Path, offer: JobOffer) -> None:
    """See `check_terms`. Raises DataError: the file cannot be written."""
    said = {"job": write_map(offer.job, "job"), "seats": [write_map(one, "seat") for one in offer.seats]}
    for name, data in ((TERMS, accepted_terms(offer)), (OFFER, codec.encode(said))):
        path = folder / name
        try:
            if not path.exists():
                durable.make_folder(folder)
                durable.replace(path, data)
        except OSError as error:
            raise durable.refusal(error, f"{path}:", "[peer] state") from None


def noted_terms(folder: Path) -> tuple[Job, tuple[Seat, ...]]:
    """The job and this site's seats as `note_terms` wrote them. Raises DataError: the file is missing or damaged."""
    path = folder / OFFER
    try:
        said = codec.decode(reading.read(path, MAX_OFFER))
        # A site that holds masks alone fills none.
        return Record(Job).read(said["job"], "job"), ListOf(Record(Seat), MOST_SEATS).read(
            said["seats"], "seats"
        )
    except FileNotFoundError:
        raise DataError(
            f"{folder}: does not say what the run's network is: this site took it up with an older splitpeer"
        ) from None
    except (OSError, CodecError, LookupError, TypeError):
        raise DataError(f"{path}: cannot be read, or is damaged: copy it back from a backup") from None


def accepted_terms(offer: JobOffer) -> bytes:
    """Digest of terms and seats, in hexadecimal."""
    # A deadline is no part of the weights: a coordinator may change it when it restarts.
    terms = terms_digest(replace(offer.job, seconds_per_step=1.0))
    seats = [[seat.name, list(seat.modalities)] for seat in offer.seats]
    return hashlib.sha256(json.dumps([terms, seats]).encode()).hexdigest().encode()


def make_room(state: Path, current: Path, bounds: Bounds, needed: int, report: h.Reporter) -> None:
    """Remove runs until `current` fits with the others, see `_spare`.

    Args:
        needed: bytes that the run of `current` takes at least.

    Raises: PolicyRefused: it does not fit, whatever is removed.
    """
    others, record = [run for run in _runs(state) if run.folder != current], _record(state)
    spare = _spare(others, _kept_for_people(state, bounds))
    most = bounds.max_state_mib << 20
    while len(others) >= bounds.max_runs or record + sum(run.size for run in others) + needed > most:
        if not spare:
            raise PolicyRefused(
                f"the run needs {needed >> 20} MiB in addition to the {len(others)} runs that this site keeps: remove "
                "folders of runs that are not needed from [peer] state, or raise max_runs or max_state_mib"
            )
        oldest = spare.pop(0)
        others.remove(oldest)
        shutil.rmtree(oldest.folder, ignore_errors=True)
        report(h.RunPruned(oldest.folder.name, oldest.size >> 20))


def _spare(runs: Sequence[_Run], people: Collection[str]) -> list[_Run]:
    """Those that may be removed, the first to go first: complete ones that a newer one has replaced or in which nothing
    was done, and then what could continue.

    Args:
        runs: oldest first.
        people: see `_kept_for_people`.
    """
    newest = {run.job: run for run in runs if run.complete and run.worked}
    over = [run for run in runs if run.complete and newest.get(run.job) is not run]
    idle = [run for run in runs if not run.complete and not run.worked]
    begun = [run for run in runs if not run.complete and run.worked]
    return over + idle + [run for run in begun if run.folder.name[-_RUN_DIGITS:] not in people]


def _kept_for_people(state: Path, bounds: Bounds) -> Collection[str]:
    """Runs (hexadecimal) whose patients may be shown in few others or none, so that no other run makes up for them."""
    if bounds.releases != "once" and bounds.max_runs_per_patient is None:
        return ()
    return runs_in(state, bounds.max_record_mib)


def check_room(state: Path, bounds: Bounds, needed: int) -> None:
    """Before a checkpoint of `needed` bytes. Raises DiskTrouble: it would be too much, like a disk that is full."""
    held = _record(state) + sum(run.size for run in _runs(state))
    if held + needed > bounds.max_state_mib << 20:
        raise DiskTrouble(
            f"a checkpoint of {needed >> 20} MiB, with {held >> 20} MiB kept, exceeds {bounds.max_state_mib} MiB "
            "(max_state_mib)"
        )


def _record(state: Path) -> int:
    """Bytes of the record that outlives run folders."""
    path = state / SHOWN
    return path.lstat().st_size if path.exists() else 0


def _runs(state: Path) -> list[_Run]:
    """Oldest first."""
    found = []
    for folder in state.iterdir() if state.exists() else ():
        named = _NAME.fullmatch(folder.name)
        if named is None or folder.is_symlink() or not folder.is_dir():
            continue
        marks = [path.lstat() for path in folder.iterdir()]
        used = max((mark.st_mtime for mark in marks), default=folder.lstat().st_mtime)
        size = sum(mark.st_size for mark in marks)
        found.append(_Run(folder, named[1], size, used, is_complete(folder), _worked(folder)))
    return sorted(found, key=lambda run: run.used)


def _worked(folder: Path) -> bool:
    answers = folder / ANSWERS
    # An encoder that stays as it is has no later step: what it answered counts.
    return any(checkpoint.steps_in(folder)) or (answers.exists() and answers.lstat().st_size > 0)
