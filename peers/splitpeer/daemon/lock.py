"""One daemon per state folder: a lock that the kernel releases when its process ends, however it ends.

The file `lock` in `[peer] state` is locked with flock(2) and holds the process id. It is never removed: two processes
could otherwise lock two files of the same name.
"""

from __future__ import annotations

import fcntl
import os
import signal
from dataclasses import dataclass, field
from pathlib import Path

from splitpeer.errors import ConfigError
from splitpeer.storage import durable

NAME = "lock"
LARGEST_PID = 1 << 22
"""Linux has no larger ones."""


class StateLock:
    """The right to use one state folder.

    Args:
        folder: `[peer] state`; made if it is missing.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / NAME
        self._file: int | None = None

    def take(self) -> bool:
        """Lock the folder. False: another process holds it, if only while its `holder` looks.

        Raises:
            ConfigError, DiskTrouble: the folder cannot be used.
        """
        if self._file is not None:
            return True
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise durable.refusal(error, f"{self._path}:", "[peer] state") from None
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(file)
            return False
        except OSError as error:
            os.close(file)
            raise ConfigError(
                f"{self._path}: this file system has no locks ({error.strerror}): put [peer] state on another"
            ) from None
        self._file = file
        try:
            os.ftruncate(file, 0)
            os.pwrite(file, f"{os.getpid()}\n".encode(), 0)
        except OSError:
            # A full disk: the lock still holds, but its holder is unknown.
            pass
        return True

    def release(self) -> None:
        """Give the folder free."""
        if self._file is not None:
            os.close(self._file)
            self._file = None


@dataclass(frozen=True)
class Holder:
    """Who holds a state folder."""

    pid: int | None
    """As the lock says; None if it says nothing."""
    path: Path
    since: float = field(compare=False)
    """When it took the lock: wall clock, seconds."""

    def signal(self, number: int) -> bool:
        """Send a signal to that process, and not to another that has taken over its number. False: it is gone.

        Raises:
            ConfigError: it is not a process of this machine, or not of this user.
        """
        if self.pid is None:
            raise ConfigError(f"{self.path}: does not say which process holds it: stop that process by hand")
        try:
            process = os.pidfd_open(self.pid)
        except ProcessLookupError:
            if holder(self.path.parent) is None:
                return False
            raise self._elsewhere() from None
        try:
            if not self._has_it_open():
                if holder(self.path.parent) is None:
                    return False
                raise self._elsewhere()
            signal.pidfd_send_signal(process, number)
        except ProcessLookupError:
            return False
        except PermissionError:
            raise ConfigError(
                f"process {self.pid} belongs to another user: run this as that user, or as root"
            ) from None
        finally:
            os.close(process)
        return True

    def _has_it_open(self) -> bool:
        """In a container, and on a shared disk, the same number is another process."""
        wanted = self.path.lstat()
        try:
            # Root asks: the daemon's user must not be able to name another's process, by a link to its pid file.
            if wanted.st_nlink != 1 or Path(f"/proc/{self.pid}").stat().st_uid != wanted.st_uid:
                return False
            for file in Path(f"/proc/{self.pid}/fd").iterdir():
                try:
                    found = file.stat()
                except FileNotFoundError:
                    continue
                if (found.st_dev, found.st_ino) == (wanted.st_dev, wanted.st_ino):
                    return True
        except FileNotFoundError:
            pass
        return False

    def _elsewhere(self) -> ConfigError:
        return ConfigError(
            f"{self.path}: held by process {self.pid} of another container or machine: stop it from there"
        )


def holder(folder: Path) -> Holder | None:
    """The process that holds the lock of a state folder, or None.

    Raises:
        ConfigError: it cannot be read.
    """
    path = folder / NAME
    try:
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be read ({error.strerror}): run this as the daemon's user, or as root"
        ) from None
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            written = os.pread(file, 32, 0).strip()
            pid = int(written) if written.isdigit() and 0 < int(written) <= LARGEST_PID else None
            return Holder(pid, path, os.fstat(file).st_mtime)
        return None
    finally:
        os.close(file)
