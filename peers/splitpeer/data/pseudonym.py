"""Patients under keys: the only name of a patient that leaves a site.

All sites of a federation share one secret salt (never given to the coordinator's logs or to an outsider), so
the same patient id gives the same key everywhere and nobody without the salt can test a guessed id.
"""

from __future__ import annotations

import hashlib
import hmac
import stat
import unicodedata
from collections.abc import Iterable
from pathlib import Path

from splitpeer.data.layouts import Case
from splitpeer.errors import ConfigError, DataError

CONTEXT = b"splitproto patient v1\0"
KEY_BYTES = 16
SALT_BYTES = 32


def pseudonym(salt: bytes, patient: str) -> bytes:
    """SP-11.5-1: the 16-octet key of a patient: the first 16 octets of HMAC-SHA256(salt, CONTEXT + id).

    The id is NFC-normalised (one file system writes "e" plus accent, another the accented letter) and
    encoded as UTF-8. Case and spaces count. HMAC: RFC 2104; NFC: Unicode Standard Annex 15.
    """
    message = CONTEXT + unicodedata.normalize("NFC", patient).encode()
    return hmac.new(salt, message, hashlib.sha256).digest()[:KEY_BYTES]


def load_salt(path: Path | str) -> bytes:
    """The federation's salt: a file of at least 64 hexadecimal digits (32 octets) that only its owner can
    read.

    Raises ConfigError for a file that is missing, readable by group or others, not hexadecimal or too short.
    """
    path = Path(path)
    try:
        mode = path.stat().st_mode
        text = path.read_text("ascii").strip()
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot read the patient salt ({error.strerror}): check the path"
        ) from None
    except UnicodeDecodeError:
        text = ""
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise ConfigError(f"{path}: the patient salt is open to group or others: chmod 600 {path}")
    try:
        salt = bytes.fromhex(text)
    except ValueError:
        salt = b""
    if len(salt) < SALT_BYTES:
        raise ConfigError(
            f"{path}: the patient salt must be {SALT_BYTES} or more octets in hexadecimal: "
            f"make one with `openssl rand -hex {SALT_BYTES}` and give it to every site"
        )
    return salt


def keyed(salt: bytes, cases: Iterable[Case]) -> dict[bytes, Case]:
    """Cases by patient key, in the order given. Raises DataError when two cases share a key."""
    out: dict[bytes, Case] = {}
    for case in cases:
        key = pseudonym(salt, case.patient)
        if key in out:
            raise DataError(
                f"{out[key].path} and {case.path} are the same patient: keep one of the two files"
            )
        out[key] = case
    return out


def handle(key: bytes) -> str:
    """How a patient is named to other parties, in shared logs and in errors: the first 8 hex digits of the key.

    Enough for the owner to look the patient up (`splitpeer data keys`); a whole key is never logged or put in an error.
    """
    return key[:4].hex()
