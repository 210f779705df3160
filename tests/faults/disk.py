"""The disks of the machines: full, without power, or with a process that dies in the middle of a write.

While a laboratory runs, the few calls by which Python writes files go through here. Each machine has its folder.
Writes of a dead process are refused. A power failure loses what was not synced: any part of a file that was not
`fsync`ed may be there; in a folder that was not, each new, replaced or removed name may be the new one or the old.
"""

from __future__ import annotations

import builtins
import errno
import fcntl
import io
import os
import random
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any, Literal
from unittest import mock

from .virtual import LIFE, Dead, Life

Operation = Literal["write", "fsync", "replace", "replaced", "unlink"]


@dataclass
class Crash:
    """A process dies at one of its own operations on a file."""

    host: str
    operation: Operation
    """"write": with half of it written; "replaced": after a rename, before its folder is synced."""
    name: str = r"step-"
    """What the file's name begins with."""
    skip: int = 0
    power: bool = False
    """The machine, rather than the process."""
    done: bool = False


@dataclass
class _Machine:
    folder: str
    full: bool = False
    locks: list[tuple[Life, int, str]] = field(default_factory=list)
    tokens: dict[int, int] = field(default_factory=dict)  # inode to what was created as that
    synced: dict[int, bytes] = field(default_factory=dict)
    entries: dict[str, dict[str, int]] = field(default_factory=dict)  # of folders, when last synced


class Disks:
    """All machines' disks.

    Args:
        folder: holds one folder per machine, named by its host.
        seed: of what survives when power goes.
        die: ends the life that is running: (life, whether its machine lost power).
        tell: told what happens.
    """

    def __init__(
        self, folder: Path, seed: int, die: Callable[[Life, bool], None], tell: Callable[[str], None]
    ) -> None:
        self._root = str(folder) + "/"
        self._die, self.tell = die, tell
        self._random = random.Random(f"disks {seed}")
        self._machines: dict[str, _Machine] = {}
        self._tokens = count(1)
        self.crashes: list[Crash] = []
        self.remember = False
        """Whether power may go: what is synced must be known."""

    def full(self, host: str, full: bool) -> None:
        """No room, or room again."""
        self._machine(host).full = full

    def release(self, life: Life) -> None:
        """Its process ended: the system drops its locks."""
        machine = self._machine(life.name)
        for owner, file, path in machine.locks:
            if owner is life:
                with suppress(OSError):
                    if os.readlink(f"/proc/self/fd/{file}") == path:
                        _real_flock(file, fcntl.LOCK_UN)
        machine.locks = [lock for lock in machine.locks if lock[0] is not life]

    def power_lost(self, host: str) -> None:
        """What was not synced is there, or not, or in part."""
        machine = self._machine(host)
        for folder, _, files in list(os.walk(self._root + host)):
            before = machine.entries.get(folder, {})
            for name in sorted({*files, *before}):
                self._perhaps(machine, folder, name, before.get(name), name in files)
        # What is there now is on the medium.
        for folder, _, _ in list(os.walk(self._root + host)):
            self._remember(machine, folder)

    def _perhaps(self, machine: _Machine, folder: str, name: str, before: int | None, there: bool) -> None:
        path = f"{folder}/{name}"
        token = machine.tokens.get(os.stat(path).st_ino) if there else None
        if there and token is None:
            return  # from before the laboratory's time
        if token != before and self._random.random() < 0.5:
            # The folder is as it was: the old name, or none.
            if there:
                _real["unlink"](path)
            if before is not None and before in machine.synced:
                with _real["open"](path, "wb") as file:
                    file.write(machine.synced[before])
                machine.tokens[os.stat(path).st_ino] = before
                self.tell(f"power: {name} is what it was")
            else:
                self.tell(f"power: {name} is not there")
        elif there and token is not None:
            with _real["open"](path, "rb") as file:
                data = file.read()
            safe = machine.synced.get(token, b"")
            if data != safe:
                kept = min(len(safe), len(data)) if data.startswith(safe) else 0
                size = self._random.choice((kept, self._random.randint(kept, len(data)), len(data)))
                os.truncate(path, size)
                machine.synced[token] = data[:size]
                self.tell(f"power: {size} of {len(data)} octets of {name} are there")

    # --- what goes through here ------------------------------------------------------------------------------

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Every write of a `Life` goes through here."""
        with (
            mock.patch.object(builtins, "open", self._open),
            mock.patch.object(io, "open", self._open),
            mock.patch.object(os, "open", self._os_open),
            mock.patch.object(os, "write", self._write),
            mock.patch.object(os, "fsync", self._fsync),
            mock.patch.object(os, "replace", self._replace),
            mock.patch.object(os, "rename", self._replace),
            mock.patch.object(os, "unlink", self._unlink),
            mock.patch.object(os, "remove", self._unlink),
            mock.patch.object(os, "mkdir", self._mkdir),
            mock.patch.object(fcntl, "flock", self._flock),
        ):
            yield

    def _machine(self, host: str) -> _Machine:
        if host not in self._machines:
            self._machines[host] = _Machine(self._root + host)
        return self._machines[host]

    def _mine(self, path: Any) -> _Machine | None:
        """The machine of the running process, if `path` is on its disk."""
        life = LIFE.get()
        if life is None or isinstance(path, int):
            return None
        machine = self._machine(life.name)
        return machine if os.fspath(path).startswith(machine.folder) else None

    def _alive(self) -> Life | None:
        life = LIFE.get()
        if life is not None and not life.alive:
            raise Dead
        return life

    def _crash(self, operation: Operation, path: Any) -> bool:
        """Whether the running process dies now."""
        life = LIFE.get()
        if life is None:
            return False
        for crash in self.crashes:
            if (
                not crash.done
                and (crash.host, crash.operation) == (life.name, operation)
                and re.match(crash.name, os.path.basename(os.fspath(path)))
            ):
                if crash.skip > 0:
                    crash.skip -= 1
                    continue
                crash.done = True
                self.tell(f"{life} dies at {operation} {os.path.basename(os.fspath(path))}")
                return True
        return False

    def _dies(self, operation: Operation, path: Any) -> None:
        if self.crashes and self._crash(operation, path):
            self._kill(operation)

    def _kill(self, operation: Operation) -> None:
        life = LIFE.get()
        assert life is not None
        power = next(
            c.power for c in self.crashes if c.done and (c.host, c.operation) == (life.name, operation)
        )
        self._die(life, power)
        raise Dead

    def _open(self, file: Any, mode: str = "r", *args: Any, **options: Any) -> Any:
        writes = mode[0] in "wxa" or "+" in mode
        if not writes:
            return _real["open"](file, mode, *args, **options)
        life = self._alive()
        if isinstance(file, int):
            if life is not None and self._machine(life.name).full:
                os.close(file)
                return _real["open"]("/dev/full", "w" + mode[1:], *args, **options)
            return _real["open"](file, mode, *args, **options)
        machine = self._mine(file)
        if machine is None:
            return _real["open"](file, mode, *args, **options)
        new = not os.path.exists(file)
        opened = _real["open"](file, mode, *args, **options)
        self._created(machine, file, new)
        if machine.full:
            opened.close()
            return _real["open"]("/dev/full", "w" + mode[1:].replace("x", ""), *args, **options)
        return opened

    def _os_open(self, path: Any, flags: int, *args: Any, **options: Any) -> int:
        if not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            return _real["os_open"](path, flags, *args, **options)
        self._alive()
        machine = self._mine(path)
        new = machine is not None and not os.path.exists(path)
        file: int = _real["os_open"](path, flags, *args, **options)
        if machine is not None:
            self._created(machine, path, new)
        return file

    def _created(self, machine: _Machine, path: Any, new: bool) -> None:
        if self.remember and new:
            machine.tokens[os.stat(path).st_ino] = next(self._tokens)

    def _write(self, file: int, data: Any) -> int:
        life = LIFE.get()
        if life is None:
            return _real["write"](file, data)
        self._alive()
        machine = self._machine(life.name)
        if machine.full or self.crashes:
            path = os.readlink(f"/proc/self/fd/{file}")
            if machine.full and path.startswith(machine.folder):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            if self.crashes and self._crash("write", path):
                _real["write"](file, bytes(data)[: len(data) // 2])
                self._kill("write")
        return _real["write"](file, data)

    def _fsync(self, file: Any) -> None:
        life = LIFE.get()
        if life is not None:
            self._alive()
            path = os.readlink(f"/proc/self/fd/{file if isinstance(file, int) else file.fileno()}")
            self._dies("fsync", path)
            if self.remember and path.startswith(self._root):
                self._remember(self._machine(life.name), path)
        # The file system of tests is in memory: there is nothing else to do.

    def _remember(self, machine: _Machine, path: str) -> None:
        if os.path.isdir(path):
            with os.scandir(path) as found:
                machine.entries[path] = {
                    entry.name: machine.tokens[entry.inode()]
                    for entry in found
                    if entry.inode() in machine.tokens
                }
        elif (token := machine.tokens.get(os.stat(path).st_ino)) is not None:
            with _real["open"](path, "rb") as file:
                machine.synced[token] = file.read()

    def _replace(self, source: Any, target: Any, **options: Any) -> None:
        self._alive()
        self._dies("replace", source)
        _real["replace"](source, target, **options)
        self._dies("replaced", target)

    def _unlink(self, path: Any, **options: Any) -> None:
        self._alive()
        self._dies("unlink", path)
        _real["unlink"](path, **options)

    def _mkdir(self, path: Any, *args: Any, **options: Any) -> None:
        self._alive()
        machine = self._mine(path)
        if machine is not None and machine.full and not os.path.exists(path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        _real["mkdir"](path, *args, **options)

    def _flock(self, file: Any, operation: int) -> None:
        life = self._alive()
        number = file if isinstance(file, int) else file.fileno()
        _real_flock(number, operation)
        if life is not None and not operation & fcntl.LOCK_UN:
            self._machine(life.name).locks.append((life, number, os.readlink(f"/proc/self/fd/{number}")))


_real: dict[str, Callable[..., Any]] = {
    "open": builtins.open,
    "os_open": os.open,
    "write": os.write,
    "replace": os.replace,
    "unlink": os.unlink,
    "mkdir": os.mkdir,
}
_real_flock = fcntl.flock


def wipe(folder: Path) -> None:
    """Remove a laboratory's files."""
    shutil.rmtree(folder, ignore_errors=True)
