"""A disk that loses power: what a program did to a folder, and everything that may be there afterwards.

The program runs on a real folder; `Disk` stands in for its `os` and notes each call. The rules are what
POSIX guarantees, harsher than any file system we know:

- data that was not synced is there, or missing, or zeros, or cut off; what was synced before it in the same file stays;
- every name that was made, moved or removed since its folder was synced is as before or as after, each
  independently, even the two halves of a rename;
- a folder whose name is lost takes all that is in it along.
"""

from __future__ import annotations

import errno
import itertools
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SHORT = 300
"""Octets that one write takes at most, so that a power cut finds half a file."""
DIRECTORY = -1

State = frozenset[tuple[Path, bytes | None]]
"""What lies below the root: files with their content, folders with None."""


class Killed(BaseException):
    """SIGKILL: from here on the program does nothing more, not even tidy up."""


@dataclass
class _Inode:
    now: bytes = b""
    safe: bytes = b""

    def outcomes(self) -> set[bytes]:
        if self.now == self.safe:
            return {self.now}
        kept = self.safe if self.now.startswith(self.safe) else b""
        more = len(self.now) - len(kept)
        return {self.now, self.safe, kept + bytes(more), self.now[: len(kept) + more // 2]}


@dataclass
class Disk:
    """Takes the place of `os` in the modules under test.

    Args:
        root: a folder that is there and safe, empty at first.
        deaf: kinds of calls that succeed and do nothing: "sync" of a file, "sync-folder".
        full_at: how many calls succeed before the disk is full; it stays so until this is None again.
        killed_at: how many calls succeed before the program is killed.
    """

    root: Path
    deaf: frozenset[str] = frozenset()
    full_at: int | None = None
    killed_at: int | None = None
    calls: list[tuple[Any, ...]] = field(default_factory=list)
    _open: dict[int, int | Path] = field(default_factory=dict)
    _inodes: int = 0

    # --- what stands in for os ---------------------------------------------------------------------------

    def mkdir(self, path: Path, mode: int) -> None:
        self._check()
        os.mkdir(path, mode)
        self._note("mkdir", path)

    def open(self, path: Path, flags: int, mode: int = 0o777) -> int:
        if flags & os.O_DIRECTORY:
            file = os.open(path, flags)
            self._open[file] = path
            return file
        assert flags & os.O_CREAT
        assert flags & (os.O_EXCL | os.O_APPEND)
        self._check()
        there = path.exists()
        file = os.open(path, flags, mode)
        if there:
            self._open[file] = next(
                more[0] for kind, what, *more in reversed(self.calls) if (kind, what) == ("create", path)
            )
            return file
        self._inodes += 1
        self._open[file] = self._inodes
        self._note("create", path, self._inodes)
        return file

    def fstat(self, file: int) -> os.stat_result:
        return os.fstat(file)

    def ftruncate(self, file: int, size: int) -> None:
        self._check(full=False)
        os.ftruncate(file, size)
        self._note("truncate", self._open[file], size)

    def write(self, file: int, data: memoryview) -> int:
        self._check()
        taken = os.write(file, data[:SHORT])
        self._note("write", self._open[file], bytes(data[:taken]))
        return taken

    def fsync(self, file: int) -> None:
        what = self._open[file]
        if isinstance(what, Path) and not what.is_relative_to(self.root):
            return
        self._check()
        self._note("sync-folder" if isinstance(what, Path) else "sync", what)

    def close(self, file: int) -> None:
        os.close(file)
        # A network share keeps what was written to itself until here, and tells of a full disk only now.
        if not isinstance(self._open.pop(file), Path):
            self._check()
            self._note("close")

    def replace(self, source: Path, target: Path) -> None:
        self._check()
        os.replace(source, target)
        self._note("rename", source, target)

    def unlink(self, path: Path) -> None:
        self._check(full=False)
        os.unlink(path)
        self._note("unlink", path)

    def listdir(self, path: Path) -> list[str]:
        return os.listdir(path)

    def __getattr__(self, name: str) -> Any:
        assert name.startswith("O_"), f"os.{name} is none of the calls that this disk knows"
        return getattr(os, name)

    def _check(self, *, full: bool = True) -> None:
        if self.killed_at is not None and len(self.calls) >= self.killed_at:
            raise Killed
        if full and self.full_at is not None and len(self.calls) >= self.full_at:
            raise OSError(errno.ENOSPC, "No space left on device")

    def _note(self, kind: str, what: Any = None, *more: Any) -> None:
        self.calls.append((kind, what, *more))

    def settle(self) -> None:
        """All that was done so far is safe."""
        self._note("settle")

    # --- what may be left ----------------------------------------------------------------------------------

    def states(self, count: int) -> Iterator[State]:
        """Everything that may lie there if the power goes after `count` calls; each once."""
        names, inodes = self._replay(count)
        seen: set[State] = set()
        paths = sorted(names)
        for chosen in itertools.product(*(set(names[path]) for path in paths)):
            there = {path: value for path, value in zip(paths, chosen, strict=True) if value is not None}
            there = {path: value for path, value in there.items() if self._reached(path, there)}
            files = {path: value for path, value in there.items() if value != DIRECTORY}
            folders = {(path, None) for path, value in there.items() if value == DIRECTORY}
            used = sorted(set(files.values()))
            for contents in itertools.product(*(inodes[number].outcomes() for number in used)):
                content = dict(zip(used, contents, strict=True))
                state = frozenset({(path, content[number]) for path, number in files.items()} | folders)
                if state not in seen:
                    seen.add(state)
                    yield state

    def kept(self) -> State:
        """What is there as long as the power is."""
        names, inodes = self._replay(len(self.calls))
        now = {path: values[-1] for path, values in names.items() if values[-1] is not None}
        return frozenset((p, None if value == DIRECTORY else inodes[value].now) for p, value in now.items())

    def _replay(self, count: int) -> tuple[dict[Path, list[int | None]], dict[int, _Inode]]:
        """(by path all that the name stood for since its folder was synced, the newest last; files by number)."""
        names: dict[Path, list[int | None]] = {}
        inodes: dict[int, _Inode] = {}

        def bind(path: Path, value: int | None) -> None:
            names.setdefault(path.relative_to(self.root), [None]).append(value)

        for kind, what, *more in self.calls[:count]:
            if kind in self.deaf or kind == "close":
                continue
            if kind == "mkdir":
                bind(what, DIRECTORY)
            elif kind == "create":
                inodes[more[0]] = _Inode()
                bind(what, more[0])
            elif kind == "write":
                inodes[what].now += more[0]
            elif kind == "truncate":
                inodes[what].now = inodes[what].now[: more[0]]
            elif kind == "sync":
                inodes[what].safe = inodes[what].now
            elif kind == "rename":
                bind(more[0], names[what.relative_to(self.root)][-1])
                bind(what, None)
            elif kind == "unlink":
                bind(what, None)
            else:
                for path, values in names.items():
                    if kind == "settle" or self.root / path.parent == what:
                        values[:] = values[-1:]
                for inode in inodes.values() if kind == "settle" else ():
                    inode.safe = inode.now
        return names, inodes

    @staticmethod
    def _reached(path: Path, there: dict[Path, int]) -> bool:
        return all(there.get(above) == DIRECTORY for above in path.parents if above != Path("."))


def lay_out(state: State, root: Path) -> Path:
    """Make `root` what a power cut left; returns it."""
    root.mkdir(exist_ok=True)
    for path, content in sorted(state, key=lambda entry: entry[0]):
        if content is None:
            (root / path).mkdir()
        else:
            (root / path).write_bytes(content)
    return root


def found(root: Path) -> State:
    """What lies below a folder."""
    return frozenset(
        (path.relative_to(root), None if path.is_dir() else path.read_bytes()) for path in root.rglob("*")
    )
