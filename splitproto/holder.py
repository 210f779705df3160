"""Who holds a site's part in a run (SP-11.14): a key made for the run, and the proof that a link speaks for it.

A certificate can be copied, or served twice. The key never leaves the site's run folder, and only its public half and
signatures over fresh challenges are sent, so neither a coordinator nor a record of the conversation can take the
site's place.
"""

from __future__ import annotations

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from .errors import SecondHolder

SECRET_BYTES = 32
_LABEL = b"splitproto holder v1"


def public(secret: bytes) -> bytes:
    """The Ed25519 public key of a 32-byte secret: the `holder` of a job-accept."""
    return Ed25519PrivateKey.from_private_bytes(secret).public_key().public_bytes_raw()


def statement(run: bytes, challenge: bytes, binding: bytes) -> bytes:
    """SP-11.14-2: what is signed: this run, this offer, this pair of certificates."""
    return _LABEL + run + challenge + binding


def prove(secret: bytes, run: bytes, challenge: bytes, binding: bytes) -> bytes:
    """The `proof` of a job-accept."""
    return Ed25519PrivateKey.from_private_bytes(secret).sign(statement(run, challenge, binding))


def check(holder: bytes, proof: bytes, run: bytes, challenge: bytes, binding: bytes) -> None:
    """Raises:
    SecondHolder: the proof was not made with the key of `holder` for this offer on this link.
    """
    try:
        Ed25519PublicKey.from_public_bytes(holder).verify(proof, statement(run, challenge, binding))
    except (InvalidSignature, ValueError):
        raise SecondHolder("the proof does not fit the holder's key") from None
