"""Whether a secret's file is open to others on this machine, and what would close it there."""

from __future__ import annotations

import os
import stat
import struct
from pathlib import Path

__all__ = ["how_to_close", "open_to_others"]

_ACL = "system.posix_acl_access"
_USER_OBJ, _USER, _GROUP_OBJ, _GROUP, _MASK, _OTHER = 0x01, 0x02, 0x04, 0x08, 0x10, 0x20
_NO_MODES = frozenset(("vfat", "exfat", "msdos", "ntfs", "ntfs3", "fuseblk"))
"""File systems where the mount decides the mode of every file."""


def open_to_others(path: Path) -> bool:
    """Whether anybody but the owner, and the user that runs this, may read or change the file. Raises OSError.

    Where a file has an access control list, the mode shows the list's mask in place of the group's rights: systemd
    gives a credential (``LoadCredential=``) to a service's user by such a list, and its mode reads 0440.
    """
    mode = path.stat().st_mode
    if not mode & (stat.S_IRWXG | stat.S_IRWXO):
        return False
    if mode & stat.S_IRWXO:
        return True
    entries = _access_list(path)
    if entries is None:
        return True
    mask = next((rights for tag, rights, _ in entries if tag == _MASK), 7)
    groups = any(rights & mask for tag, rights, _ in entries if tag in (_GROUP_OBJ, _GROUP))
    users = {user for tag, rights, user in entries if tag == _USER and rights & mask}
    return groups or not users <= {os.geteuid(), 0}


def how_to_close(path: Path) -> str:
    """How to make the file readable by its owner alone on its file system: one clause."""
    try:
        read_only = bool(os.statvfs(path).f_flag & os.ST_RDONLY)
    except OSError:
        read_only = False
    if read_only:
        return (
            "it is on a read-only mount, where chmod cannot help: with systemd, LoadCredential=NAME:FILE and the path "
            "/run/credentials/UNIT/NAME; in Kubernetes, defaultMode: 0400 on the secret's volume and no fsGroup, or an "
            "init container that copies it to an emptyDir with mode 0600"
        )
    if (kind := _file_system(path)) in _NO_MODES:
        return f"{kind} keeps no modes: mount it with umask=077, or copy the file to another file system"
    return f"chmod 600 {path}"


def _access_list(path: Path) -> list[tuple[int, int, int]] | None:
    """Tag, rights and id of each entry; None where there is no list."""
    try:
        raw = os.getxattr(path, _ACL)
    except OSError:
        return None
    if len(raw) < 4 or (len(raw) - 4) % 8 or struct.unpack_from("<I", raw)[0] != 2:
        return None
    return list(struct.iter_unpack("<HHI", raw[4:]))


def _file_system(path: Path) -> str:
    """The type of the file system that holds `path`; empty where the kernel does not say."""
    try:
        device = path.stat().st_dev
        lines = Path("/proc/self/mountinfo").read_text("utf-8", "replace").splitlines()
    except OSError:
        return ""
    wanted = f"{os.major(device)}:{os.minor(device)}"
    for line in lines:
        # ID PARENT MAJOR:MINOR ROOT POINT OPTIONS [TAGS] - TYPE SOURCE OPTIONS
        mount, _, rest = line.partition(" - ")
        if mount.split()[2] == wanted:
            return rest.split()[0]
    return ""
