"""What a user can cause, and the exit code it gets: one line, the cause, the fix; never a traceback.

Exit codes: 0 ok, 1 job failed, 2 connection or authentication, 3 time-out, 4 usage or configuration, 5 a bug.
"""

from __future__ import annotations

import errno
import re

from splitproto.causes import CAUSES
from splitproto.errors import SplitprotoError, printable


class PeerError(Exception):
    """Root of what `splitpeer` reports to a person. `str(error)` is one line: the cause, then the fix."""

    exit_code = 5

    def __str__(self) -> str:
        # A file name or a peer's text in it must not steer a terminal or forge a line of a log.
        return printable(super().__str__())


class JobFailed(PeerError):
    """The job itself cannot continue: a site declined it, the loss is NaN or infinity, patients do not match."""

    exit_code = 1


class ConnectionRefused(PeerError):
    """No connection, or one side refused the other: address, certificate, role, allow-list."""

    exit_code = 2


class DeadlinePassed(PeerError):
    """A wait ended without what it waited for; the line names what that was."""

    exit_code = 3


class ConfigError(PeerError):
    """A setting is missing, unknown or impossible: names the file, the key and the fix."""

    exit_code = 4


def needs(what: str, package: str, extra: str) -> ConfigError:
    """A package of an extra that is not installed, for `what` was asked."""
    return ConfigError(f"{what} needs {package}: in the clone, pip install '.[{extra}]'")


class DataError(PeerError):
    """A file or folder of images cannot be used: names the file and the fix.

    Args:
        text: for this side only.
        cause: for others, one of `splitproto.causes.CAUSES`.
        told: for others, more than the cause, and without names; empty: no more.
    """

    exit_code = 4

    def __init__(self, text: str, cause: str = "data", told: str = "") -> None:
        super().__init__(text)
        self.cause, self.told = cause, told


class PatientUnusable(DataError):
    """The file of one patient cannot be used; the others can."""

    def __init__(self, key: bytes, cause: str, text: str) -> None:
        super().__init__(text, cause)
        self.key = key


class DiskTrouble(DataError):
    """A disk is full or fails. With room again, a restarted daemon resumes, so a service manager may restart it."""

    exit_code = 3

    def __init__(self, text: str, cause: str = "disk-failed") -> None:
        super().__init__(text, cause)


_NO_MEMORY = re.compile(r"out of memory|not enough memory|can't allocate memory")
"""What torch says."""


def told_of(error: BaseException) -> str:
    """SP-12-1: the same in words, and how many patients are affected; names no file, no folder and no patient."""
    told = error.told if isinstance(error, DataError) else ""
    return told or CAUSES[cause_of(error)]


def cause_of(error: BaseException) -> str:
    """What others are told of an error whose text may name a file: a name in `splitproto.causes.CAUSES`."""
    if isinstance(error, DataError):
        return error.cause
    if isinstance(error, ConfigError):
        return "settings"
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and _NO_MEMORY.search(str(error))):
        return "memory"
    if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
        return "descriptors"
    return "internal"


class AttackImpossible(PeerError):
    """A capture, or what the adversary is granted, lacks what an attack needs: names what."""

    exit_code = 4


def sayable(error: BaseException) -> str:
    """Why a daemon stopped, for its status and its trail: the text of errors that name no file, so no patient,
    and the kind of all others.
    """
    named_nothing = isinstance(error, ConnectionRefused | DeadlinePassed | JobFailed | SplitprotoError)
    return str(error) if named_nothing else type(error).__name__
