"""The secret that a party's defences draw from: a file of its own, or a seed where runs must repeat."""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from splitpeer.errors import ConfigError
from splitproto.newfile import write_new
from splitproto.secretfile import how_to_close, open_to_others

KEY_BYTES = 32
NAME = "defence.key"
CONTEXT = b"splitpeer key of what is shown v1\0"


def load_or_make(folder: Path) -> bytes:
    """The 32 octets of `folder`/defence.key, made (mode 0600) on first use.

    Keep the file: with another key, noise that is drawn once per patient is drawn a second time.

    Raises:
        ConfigError: it cannot be read or made, is open to others, or does not hold 32 octets.
    """
    path = folder / NAME
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not path.exists():
            _make(path)
        shared, key = open_to_others(path), path.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"{path}: the defences' key cannot be read or made ({error.strerror}): check the folder"
        ) from None
    if shared:
        raise ConfigError(f"{path}: the defences' key is open to group or others: {how_to_close(path)}")
    if len(key) != KEY_BYTES:
        raise ConfigError(
            f"{path}: the defences' key has {len(key)} bytes instead of {KEY_BYTES}: restore it from a backup"
        )
    return key


def from_seed(seed: int, site: str) -> bytes:
    """A key that everybody can compute: for demonstrations and tests, where runs must repeat."""
    return hashlib.sha256(f"splitpeer defence key\0{seed}\0{site}".encode()).digest()


def for_peer(key: bytes, peer: str) -> bytes:
    """What is sent to each of several peers is drawn from a key of its own."""
    return hashlib.sha256(b"splitpeer defence for\0" + key + peer.encode()).digest()


def key_of(base: bytes, shown: Sequence[str], held: Sequence[str]) -> bytes:
    """The 32 octets for the modalities that are `shown`: no two seats, and no two modalities, share their noise.

    By what is shown and not by the seat's name or order, which the coordinator chooses: a seat that is renamed would
    have the same image sent under other noise, to be averaged. The first modality of `peer.toml` has the peer's own
    key, as at a site that holds nothing else; so it keeps it when others are added behind.

    Args:
        base: 32 octets, see `compute.defence_key`.
        shown: of a seat, or of one image.
        held: the site's modalities, in the order of `peer.toml`.
    """
    if tuple(shown) == tuple(held[:1]):
        return base
    return hmac.new(base, CONTEXT + "\0".join(sorted(shown)).encode(), hashlib.sha256).digest()


def _make(path: Path) -> None:
    # Whole or not at all: a crash leaves no half key, and of two processes one wins.
    with suppress(FileExistsError):
        write_new({path: (secrets.token_bytes(KEY_BYTES), 0o600)})
