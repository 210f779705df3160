"""Which key a defence of a seat or of an image draws from: no two seats, and no two modalities, share their noise."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence

CONTEXT = b"splitpeer key of what is shown v1\0"


def key_of(base: bytes, shown: Sequence[str], held: Sequence[str]) -> bytes:
    """The 32 octets for the modalities that are `shown`, made from the peer's own.

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
