"""The secrets that a site makes for itself: files of random octets that only their owner may read."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from pathlib import Path

from splitpeer.errors import DataError
from splitpeer.storage import durable
from splitproto import holder
from splitproto.secretfile import how_to_close, open_to_others

NAME = "holder.key"
FUSION_KEY = "fusion.key"
"""In the folder of a run: of its training's masks (SP-11.18-5)."""
SERVICE_KEY = "service.key"
"""In the folder of a run: of the masks of its inference (SP-11.18-17)."""


def site_secret(folder: Path) -> bytes:
    """SP-11.14-1: the secret of this site's part in the run of `folder`, so that nobody else can take its place.

    Raises:
        DataError: see `own_secret`.
    """
    return own_secret(
        folder / NAME,
        holder.SECRET_BYTES,
        "the key to this site's place in the run",
        "remove it and have the coordinator readmit this site",
    )


def own_secret(path: Path, octets: int, purpose: str, lost: str) -> bytes:
    """The secret in a file, mode 0600; made on first use.

    Args:
        octets: how many.
        purpose: what it is, for a refusal.
        lost: what to do where the file holds something else.

    Raises:
        DataError: it cannot be read or written, or others may read it.
    """
    try:
        if not path.exists():
            durable.make_folder(path.parent)
            durable.replace(path, secrets.token_bytes(octets))
    except OSError as error:
        raise durable.refusal(error, f"{path}:", "[peer] state") from None
    found = own_file(path, purpose)
    if len(found) != octets:
        raise DataError(f"{path}: is not a key of {octets} bytes; {lost}")
    return found


def own_file(path: Path, purpose: str) -> bytes:
    """What a file holds that only its owner may read.

    Args:
        purpose: what it is, for a refusal.

    Raises:
        DataError: it cannot be read, or others may read it.
    """
    try:
        shared, found = open_to_others(path), path.read_bytes()
    except OSError as error:
        raise durable.refusal(error, f"{path}:", "[peer] state") from None
    if shared:
        raise DataError(f"{path}: others on this machine may read {purpose}: {how_to_close(path)}")
    return found


def forget_mask_keys(folder: Path) -> Iterator[str]:
    """Delete both keys of a run's masks, if they exist (SP-11.18-5), and what a crash left of writing them. Raises
    OSError.

    Yields:
        The name of each key that existed, once it is gone, so that it is reported even if the other cannot be deleted.
    """
    for name in (FUSION_KEY, SERVICE_KEY):
        there = (folder / name).exists()
        (folder / name).unlink(missing_ok=True)
        (folder / name).with_suffix(durable.PART).unlink(missing_ok=True)
        durable.sync_folder(folder)
        if there:
            yield name
