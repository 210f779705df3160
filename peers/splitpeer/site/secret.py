"""The key that a site keeps with a run, so that nobody else can take its place (SP-11.14)."""

from __future__ import annotations

import secrets
from pathlib import Path

from splitpeer.errors import DataError
from splitpeer.storage import durable
from splitproto import holder
from splitproto.secretfile import how_to_close, open_to_others

NAME = "holder.key"


def site_secret(folder: Path) -> bytes:
    """SP-11.14-1: the secret of this site's part in the run of `folder`; made on first use.

    Raises:
        DataError: it cannot be read or written, or others may read it.
    """
    path = folder / NAME
    try:
        if not path.exists():
            durable.make_folder(folder)
            durable.replace(path, secrets.token_bytes(holder.SECRET_BYTES))
        shared, found = open_to_others(path), path.read_bytes()
    except OSError as error:
        raise durable.refusal(error, f"{path}:", "[peer] state") from None
    if shared:
        raise DataError(
            f"{path}: others on this machine may read the key to this site's place in the run: {how_to_close(path)}"
        )
    if len(found) != holder.SECRET_BYTES:
        raise DataError(
            f"{path}: is not a key of {holder.SECRET_BYTES} bytes; remove it and have the coordinator readmit this site"
        )
    return found
