"""Files that a power cut cannot undo: written whole, synced, renamed, and the rename synced as well.

A write, like a rename, returns before anything is on the medium. Until `fsync` of the file its name may
lead to nothing or to zeros; until `fsync` of the folder its name may be missing.
"""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from pathlib import Path

from splitpeer.errors import ConfigError, DiskTrouble, PeerError
from splitpeer.storage import descriptors

TROUBLE = frozenset((errno.ENOSPC, errno.EDQUOT, errno.EIO)) | descriptors.EXHAUSTED
"""Errors of a disk or of the system that may pass; others (rights, a folder that is a file) need a person."""
PART = ".part"
"""Suffix of a file being written. The next write removes what a crash left under it."""


def replace(path: Path, data: bytes, mode: int = 0o600, *, sync: bool = True) -> None:
    """Write `path` whole or not at all, never through a symbolic link.

    Args:
        path: the file; an older one, or a link of that name, is replaced.
        data: all of its bytes.
        mode: of the new file.
        sync: whether the file must survive a power loss once this has returned. False where it can be made again.

    Raises:
        OSError: full disk, rights. The file before is untouched and nothing half-written stays.
    """
    part = path.with_suffix(PART)
    with suppress(FileNotFoundError):
        os.unlink(part)
    try:
        file = descriptors.spared(
            lambda: os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
        )
        try:
            left = memoryview(data)
            while left:
                left = left[os.write(file, left) :]
            if sync:
                os.fsync(file)
        finally:
            # Some file systems report a full disk only here.
            os.close(file)
        os.replace(part, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(part)
        raise
    if sync:
        sync_folder(path.parent)


def make_folder(folder: Path) -> None:
    """Make a folder (mode 0700) and those above it, durably. An existing one is fine. Raises OSError."""
    _make(folder)
    device = folder.stat().st_dev
    # Even if all existed: the process that made one may have died before syncing it. Not all above is ours to open.
    for above in folder.absolute().parents:
        if above.stat().st_dev != device:
            break
        with suppress(PermissionError):
            sync_folder(above)


def _make(folder: Path) -> None:
    try:
        os.mkdir(folder, 0o700)
    except FileExistsError:
        if not folder.is_dir():
            raise
    except FileNotFoundError:
        _make(folder.parent)
        os.mkdir(folder, 0o700)


def refusal(error: OSError, what: str, setting: str) -> PeerError:
    """A failed write as one line that names the file's purpose and the setting behind it.

    Returns:
        DiskTrouble, after which a restart may do, where the disk is full or fails; else ConfigError.
    """
    said = f"{what} cannot be written ({error.strerror})"
    if error.errno in descriptors.EXHAUSTED:
        return DiskTrouble(f"{said}: {descriptors.FIX}", "disk-failed")
    if error.errno not in TROUBLE:
        return ConfigError(f"{said}: free it, or change {setting}")
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    return DiskTrouble(f"{said}: make room, or change {setting}", "disk-full" if full else "disk-failed")


def sync_folder(folder: Path) -> None:
    """Names made, changed or removed in it are on the medium once this has returned. Raises OSError."""
    file = descriptors.spared(lambda: os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
    try:
        os.fsync(file)
    except OSError as error:
        # Network shares that cannot sync a folder say so; their own guarantees apply.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(file)
