"""A secret that hospitals share and the coordinator does not have: from it each draws the same network for a recipe."""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from dataclasses import dataclass, field
from pathlib import Path

from splitpeer.errors import ConfigError
from splitpeer.storage import durable, reading

OCTETS = 32
NAME = "splitpeer-pretraining-1"
"""First word of the file, so that no other key, such as the salt that the coordinator has too, is taken for it."""
ENTROPY_BYTES = 16
FINGERPRINT_BYTES = 4
_MOST = 4096
"""A longer file is not such a secret: no more of it is read."""
_FILE = re.compile(rf"{NAME} ([0-9A-Fa-f]{{{2 * OCTETS}}})\s*")


@dataclass(frozen=True)
class SharedSecret:
    """What is in the file."""

    octets: bytes = field(repr=False)

    @property
    def fingerprint(self) -> str:
        """Eight hexadecimal digits to compare by telephone; they do not show the secret."""
        return self._derived(b"fingerprint")[:FINGERPRINT_BYTES].hex()

    def entropy(self, plan: str) -> int:
        """128 bits, others for each plan: HMAC-SHA-256 (RFC 2104) of it."""
        return int.from_bytes(self._derived(b"entropy\0" + plan.encode())[:ENTROPY_BYTES], "big")

    def _derived(self, what: bytes) -> bytes:
        return hmac.new(self.octets, f"{NAME}\0".encode() + what, hashlib.sha256).digest()


def make(path: Path) -> SharedSecret:
    """A new one, in a file of mode 0600. Raises ConfigError: the file is there, or cannot be written."""
    if path.exists():
        # Encoders that were made from it could not be made again.
        raise ConfigError(f"{path}: exists and is not overwritten: move it away, or name another --output")
    made = SharedSecret(secrets.token_bytes(OCTETS))
    try:
        durable.replace(path, f"{NAME} {made.octets.hex()}\n".encode())
    except OSError as error:
        raise durable.refusal(error, f"{path}:", "--output") from None
    return made


def read(path: Path) -> SharedSecret:
    """Raises ConfigError: it is missing, open to group or others, or not such a file."""
    content = reading.secret(path, _MOST, "the hospitals' secret", "check --secret")
    if (match := _FILE.fullmatch(content.decode("ascii", "replace"))) is None:
        raise ConfigError(
            f"{path}: is no secret of splitpeer init secret: have the hospital that made it send it again"
        )
    return SharedSecret(bytes.fromhex(match[1]))
