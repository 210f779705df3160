"""Cases of SP-11.14: who holds a site's part in a run. Signatures are made with another module than the library's."""

from __future__ import annotations

from collections.abc import Iterator

from common import DIALLER, LISTENER, RUN, Case, refused
from cryptography.hazmat.primitives.asymmetric import ed25519
from derive import binding

SECRET = bytes(range(0x60, 0x80))
CHALLENGE = bytes(range(0x80, 0xA0))


def proofs() -> Iterator[Case]:
    """A job-accept's holder and proof, and the offer and link that they answer."""
    key = ed25519.Ed25519PrivateKey.from_private_bytes(SECRET)
    link = binding(DIALLER, LISTENER)
    signed = b"splitproto holder v1" + RUN + CHALLENGE + link
    holder, proof = key.public_key().public_bytes_raw(), key.sign(signed)
    fits = {
        "run": RUN.hex(),
        "challenge": CHALLENGE.hex(),
        "binding": link.hex(),
        "holder": holder.hex(),
        "proof": proof.hex(),
    }
    made = {"statement": signed.hex(), "holder": holder.hex(), "proof": proof.hex()}
    yield {"name": "proof", "notes": "SP-11.14-2", "secret": SECRET.hex(), **fits, "expect": made}

    def wrong(name: str, notes: str, **changed: bytes) -> Case:
        shown = {field: octets.hex() for field, octets in changed.items()}
        return {
            "name": name,
            "notes": notes,
            **fits,
            **shown,
            "expect": refused("second-holder", "semantics"),
        }

    other = ed25519.Ed25519PrivateKey.from_private_bytes(bytes(32)).public_key().public_bytes_raw()
    yield wrong("proof-other-key", "SP-11.14-3: the holder shown is not who signed", holder=other)
    yield wrong("proof-other-run", "SP-11.14-2", run=RUN[::-1])
    yield wrong("proof-replayed", "SP-11.14-2: the challenge of another offer", challenge=bytes(32))
    swapped = binding(LISTENER, DIALLER)
    yield wrong("proof-relayed", "SP-11.14-2: made for another pair of certificates", binding=swapped)
    yield wrong("proof-zero", "SP-11.14-3", proof=bytes(64))
    yield wrong(
        "holder-no-point", "SP-11.14-3: octets that are no point of the curve", holder=b"\x02" + bytes(31)
    )
