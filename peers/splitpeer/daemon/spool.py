"""The spool: the folder through which people and hospital software ask a site's daemon for a segmentation.

``inference/`` in `[peer] state`, mode 0700. Files only, no socket: a request outlives both the command that asked and
the daemon that was working on it.

=============================  ========================  ==========================================================
``<id>.request.json``          who asks                  `SpoolRequest`; written once, never changed
``<id>.cancel``                who asks                  empty: give up
``<id>.status.json``           daemon                    `Status`; replaced when it changes
``<id>.result.safetensors``    daemon                    `SpoolResult`; whole before the status says `done`
=============================  ========================  ==========================================================

A request counts from the moment its file has its name, and is over when that file is gone.
"""

from __future__ import annotations

import errno
import logging
import os
import secrets
import stat
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from splitpeer.daemon.spooled import ID, TRANSITIONS, SpoolRequest, SpoolResult, Status, now
from splitpeer.errors import ConfigError, DataError, DeadlinePassed, PeerError
from splitpeer.logs import event
from splitpeer.storage import descriptors, durable, reading

__all__ = ["NAME", "Spool", "Waiting", "folder_of"]

NAME = "inference"
REQUEST, STATUS, RESULT, CANCEL = ".request.json", ".status.json", ".result.safetensors", ".cancel"
SUFFIXES = (REQUEST, STATUS, RESULT, CANCEL)
MAX_REQUEST = MAX_STATUS = 16 << 10
"""Bytes."""
MAX_RESULT = 8 << 30
"""Bytes: the probabilities of four channels of 800 x 800 x 800 voxels."""
MOST_OPEN = 256
"""Requests that are not answered yet; more are refused (`busy`)."""
MOST_FILES = 16 * MOST_OPEN
"""Files in the folder: more is no use, and takes time to list."""
KEEP_S = 24 * 3600.0
"""An answer that nobody fetched is removed after so long, and a request that nobody could answer fails."""
ORPHAN_S = 3600.0
"""The same for files of no request: a crash left them."""
TIDY_S = 3600.0
"""Between two looks at old files."""
log = logging.getLogger(__name__)


def folder_of(state: Path) -> Path:
    """The spool folder of a daemon whose `[peer] state` is `state`."""
    return state / NAME


@dataclass(frozen=True)
class Waiting:
    """A request that has no answer yet."""

    id: str
    request: SpoolRequest
    given_up: Literal["", "cancel", "deadline"] = ""
    """The asker has given up, or its `until` has passed: stop, then `Spool.give_up`."""


class Spool:
    """One spool folder, for either side. The constructor does nothing; each call opens what it needs.

    Args:
        folder: see `folder_of`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._requests: dict[str, SpoolRequest] = {}
        self._last: list[Waiting] = []
        self._listed = (0, 0.0)
        self._unwritten: dict[str, Status] = {}
        self._tidied = float("-inf")
        self._warned = False

    # --- who asks --------------------------------------------------------------------------------------------

    def ask(self, request: SpoolRequest) -> str:
        """Hand in a request; returns its id.

        Raises:
            ConfigError: there is no spool, or it is not this user's.
            DeadlinePassed: too many requests wait.
            DiskTrouble: the disk is full or fails. Nothing half-written stays.
        """
        self._check_own()
        try:
            names = set(os.listdir(self.folder))
        except OSError as error:
            raise self._refusal(error) from None
        ids = {name.removesuffix(REQUEST) for name in names if name.endswith(REQUEST)}
        if len(ids) >= MOST_OPEN and len([one for one in ids if not self.status(one).final]) >= MOST_OPEN:
            raise DeadlinePassed(f"{MOST_OPEN} requests of this site wait already: ask again later")
        if len(names) >= MOST_FILES:
            raise DeadlinePassed(
                f"{self.folder}: {len(names)} files: remove the answers that were fetched, then ask again"
            )
        name = secrets.token_hex(16)
        try:
            durable.replace(self._path(name, REQUEST), request.write())
        except OSError as error:
            raise self._refusal(error) from None
        return name

    def status(self, name: str) -> Status:
        """How far a request is.

        Raises:
            DataError: there is no such request (any more), or the file cannot be read.
        """
        path = self._path(name, STATUS)
        try:
            return Status.read(reading.read(path, MAX_STATUS))
        except FileNotFoundError:
            if not self._path(name, REQUEST).exists():
                raise DataError(f"request {name[:8]} is gone from {self.folder}: ask again") from None
            return Status(state="waiting")
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror})") from None
        except ValueError as error:
            raise DataError(f"{path}: not the status of a request: {error}") from None

    def result(self, name: str) -> SpoolResult:
        """The segmentation of a request that is done.

        Raises:
            DataError: the file is missing, too large, torn or altered.
        """
        path = self._path(name, RESULT)
        try:
            return SpoolResult.decode(reading.read(path, MAX_RESULT))
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror}): ask again") from None
        except ValueError as error:
            raise DataError(f"{path}: {error}: ask again") from None

    def cancel(self, name: str) -> None:
        """Ask the daemon to give up. Raises DataError, DiskTrouble: the folder cannot be written."""
        try:
            durable.replace(self._path(name, CANCEL), b"", sync=False)
        except OSError as error:
            raise self._refusal(error) from None

    def forget(self, name: str) -> None:
        """Remove what there is of a request; if it was open, the daemon gives it up. Raises nothing."""
        for suffix in SUFFIXES:
            with suppress(OSError):
                os.unlink(self._path(name, suffix))

    # --- the daemon ------------------------------------------------------------------------------------------

    def open(self) -> None:
        """Make the folder if need be, private, and remove what is old.

        Raises:
            ConfigError, DiskTrouble: the folder cannot be used.
        """
        try:
            durable.make_folder(self.folder)
            self._check_own()
            os.chmod(self.folder, 0o700)
        except OSError as error:
            raise self._refusal(error) from None
        self.tidy()

    def waiting(self) -> list[Waiting]:
        """Every request that has no answer yet, oldest first: also those that were taken up before, by this process or
        by one that died. One that is no longer listed was forgotten by its asker: stop working on it.

        To be called every 40 to 100 ms: nothing is read while the folder does not change. Requests that are not valid
        are answered here. Raises nothing that has to do with the disk.
        """
        self._write_again()
        if time.monotonic() - self._tidied > TIDY_S:
            self.tidy()
        try:
            changed = os.stat(self.folder).st_mtime_ns
            # A file can come in the same tick of the file system's clock as the last look.
            settled = time.time_ns() - changed > 2_000_000_000 and changed == self._listed[0]
            due = any(one.request.until and one.request.until <= now() for one in self._last)
            if settled and not due and time.monotonic() - self._listed[1] < 10:
                return list(self._last)
            found = self._list()
        except OSError as error:
            self._warn(error)
            return list(self._last)
        self._warned = False
        self._listed, self._last = (changed, time.monotonic()), found
        return list(found)

    def note(self, name: str, status: Status) -> bool:
        """Say how far a request is.

        Returns:
            False: it has an answer, or was forgotten; nothing is written.
            True otherwise; a final status that finds no room on the disk is written by a later `waiting`.
        """
        before = self._unwritten.get(name)
        try:
            before = before or self.status(name)
            if status.state not in TRANSITIONS[before.state]:
                return False
            if not self._path(name, REQUEST).exists():
                return False
        except DataError:
            if not self._path(name, REQUEST).exists():
                return False
        status = status.model_copy(update={"written": now()})
        try:
            durable.replace(self._path(name, STATUS), status.write(), sync=status.final)
        except OSError as error:
            self._warn(error)
            if status.final:
                self._unwritten[name] = status
        if status.final:
            self._drop(name)
        return True

    def deliver(self, name: str, result: SpoolResult) -> bool:
        """Hand over the segmentation, and note `done`; where there is no room for it, `failed`.

        Returns:
            False: not delivered.

        Raises:
            ValueError: the result does not fit together: a bug of the caller.
        """
        result.check()
        if not self._path(name, REQUEST).exists():
            return False
        path = self._path(name, RESULT)
        try:
            durable.replace(path, result.encode())
        except OSError as error:
            trouble = durable.refusal(error, f"{self.folder}: a segmentation", "[peer] state")
            self.note(name, Status.failed("disk", str(trouble)))
            return False
        total = self.status(name).total
        if not self.note(name, Status(state="done", done=total, total=total)):
            with suppress(OSError):
                os.unlink(path)
            return False
        return True

    def give_up(self, one: Waiting) -> None:
        """Answer a request whose asker has given up."""
        if one.given_up == "deadline":
            self.note(one.id, Status.failed("deadline", "nobody could answer before its deadline: ask again"))
        else:
            self.note(one.id, Status(state="cancelled"))

    def tidy(self) -> None:
        """Remove answers that nobody fetched, and what crashes left. Raises nothing."""
        self._tidied = time.monotonic()
        try:
            entries = {entry.name: entry.stat(follow_symlinks=False) for entry in os.scandir(self.folder)}
        except OSError as error:
            self._warn(error)
            return
        moment, removed = time.time(), 0
        answered = {
            name[:32]
            for name, found in entries.items()
            if name.endswith(STATUS) and moment - found.st_mtime > KEEP_S and self._is_final(name[:32])
        }
        for name, found in entries.items():
            one = name[:32]
            lost = one + REQUEST not in entries or name.endswith(durable.PART)
            if not ID.fullmatch(one) or not stat.S_ISREG(found.st_mode):
                continue
            if one in answered or (lost and moment - found.st_mtime > ORPHAN_S):
                with suppress(OSError):
                    os.unlink(self.folder / name)
                    removed += 1
        if removed:
            event(log, "spool.tidied", files=removed)

    # --- inside ----------------------------------------------------------------------------------------------

    def _path(self, name: str, suffix: str) -> Path:
        if not ID.fullmatch(name):
            raise DataError(f"{name[:40]!r} is not the name of a request: 32 hexadecimal digits")
        return self.folder / f"{name}{suffix}"

    def _list(self) -> list[Waiting]:
        with descriptors.spared(lambda: os.scandir(self.folder)) as entries:
            times = {entry.name: entry.stat(follow_symlinks=False).st_mtime for entry in _at_most(entries)}
        open_, known = [], {}
        for file in sorted(times):
            name = file.removesuffix(REQUEST)
            if not file.endswith(REQUEST) or not ID.fullmatch(name) or name in self._unwritten:
                continue
            if name + STATUS in times and self._is_final(name):
                continue
            if (request := self._requests.get(name) or self._read(name)) is None:
                continue
            known[name] = request
            open_.append(Waiting(name, request, _given_up(request, times[file], name + CANCEL in times)))
        self._requests = known
        open_.sort(key=lambda one: (one.request.created, one.id))
        for one in open_[MOST_OPEN:]:
            self.note(one.id, Status.failed("busy", f"{MOST_OPEN} requests of this site wait already"))
        return open_[:MOST_OPEN]

    def _read(self, name: str) -> SpoolRequest | None:
        """A new request; None: it is not valid, which is its answer, or is gone."""
        try:
            return SpoolRequest.read(reading.read(self._path(name, REQUEST), MAX_REQUEST))
        except FileNotFoundError:
            return None
        except OSError as error:
            if error.errno in durable.TROUBLE:
                raise
            self.note(name, Status.failed("request", f"the request cannot be read ({error.strerror})"))
        except ValueError as error:
            self.note(name, Status.failed("request", f"the request is not valid: {error}"))
        return None

    def _is_final(self, name: str) -> bool:
        if not ID.fullmatch(name):
            return False
        try:
            return self.status(name).final
        except DataError:
            return False

    def _write_again(self) -> None:
        for name, status in list(self._unwritten.items()):
            if self._path(name, REQUEST).exists():
                try:
                    durable.replace(self._path(name, STATUS), status.write())
                except OSError:
                    return
            del self._unwritten[name]

    def _drop(self, name: str) -> None:
        self._requests.pop(name, None)
        self._last = [one for one in self._last if one.id != name]

    def _warn(self, error: OSError) -> None:
        if not self._warned:
            event(log, "spool.trouble", logging.WARNING, folder=str(self.folder), cause=error.strerror)
        self._warned = True

    def _check_own(self) -> None:
        """Raises ConfigError: the folder is missing, or another user's, whose daemon could not read our files."""
        try:
            found = os.stat(self.folder, follow_symlinks=False)
        except FileNotFoundError:
            raise ConfigError(
                f"{self.folder}: there is no such folder, so this daemon has never served requests: write [policy] "
                "inference in its peer.toml, then start it again"
            ) from None
        except OSError as error:
            raise self._refusal(error) from None
        if not stat.S_ISDIR(found.st_mode):
            raise ConfigError(f"{self.folder}: not a folder: move it away")
        if found.st_uid != os.geteuid():
            raise self._other_user()

    def _refusal(self, error: OSError) -> PeerError:
        if error.errno in (errno.EACCES, errno.EPERM):
            return self._other_user()
        if error.errno in durable.TROUBLE:
            return durable.refusal(error, f"{self.folder}: a request", "[peer] state")
        return ConfigError(f"{self.folder}: cannot be used ({error.strerror}): check [peer] state")

    def _other_user(self) -> ConfigError:
        return ConfigError(f"{self.folder}: belongs to the daemon's user: run this as that user")


def _at_most(entries: Iterator[os.DirEntry[str]]) -> Iterator[os.DirEntry[str]]:
    for count, entry in enumerate(entries):
        if count >= MOST_FILES:
            return
        yield entry


def _given_up(request: SpoolRequest, touched: float, cancelled: bool) -> Literal["", "cancel", "deadline"]:
    if cancelled:
        return "cancel"
    until = request.until or datetime.fromtimestamp(touched + KEEP_S, UTC)
    return "deadline" if until <= now() else ""
