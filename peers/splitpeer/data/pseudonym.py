"""Patients' keys: the only name of a patient that leaves a site.

All sites of a federation share one secret salt (never given to the coordinator's logs or to an outsider), so
the same patient id gives the same key everywhere and nobody without the salt can test a guessed id.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Iterable
from pathlib import Path

from splitpeer.data.files import Case
from splitpeer.data.patients import patient_id
from splitpeer.errors import ConfigError, DataError
from splitpeer.storage import reading

CONTEXT = b"splitproto patient v1\0"
CHECK_CONTEXT = b"splitproto salt v1\0"
KEY_BYTES = 16
CHECK_BYTES = 8
SALT_BYTES = 32
SALT_FILE_BYTES = 4096
"""A longer file is not a salt: no more of it is read."""
_SALT = re.compile(rb"(?:\xef\xbb\xbf)?((?:[0-9A-Fa-f]{2}){%d,})[\t-\r ]*" % SALT_BYTES)


def pseudonym(salt: bytes, patient: str) -> bytes:
    """SP-11.5-1: the 16-octet key of a patient: the first 16 octets of HMAC-SHA256(salt, CONTEXT + id).

    The id is that of `patient_id`, encoded as UTF-8. HMAC: RFC 2104.
    """
    return hmac.new(salt, CONTEXT + patient_id(patient).encode(), hashlib.sha256).digest()[:KEY_BYTES]


def salt_check(salt: bytes) -> bytes:
    """SP-11.5-4: the check value of a salt, which shows whether two parties have the same one and may be public."""
    return hmac.new(salt, CHECK_CONTEXT, hashlib.sha256).digest()[:CHECK_BYTES]


def parse_salt(content: bytes) -> bytes:
    """SP-11.5-3: the salt in a file's content. Raises ValueError that says what is wrong with it, and the fix."""
    if match := _SALT.fullmatch(content):
        return bytes.fromhex(match[1].decode())
    wanted = f"{2 * SALT_BYTES} hexadecimal digits"
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise ValueError(
            f"is UTF-16, as PowerShell writes it, not ASCII: save its {wanted} as ASCII or UTF-8"
        )
    text = content.removeprefix(b"\xef\xbb\xbf").strip()
    if re.fullmatch(rb"[0-9A-Fa-f]+", text):
        raise ValueError(f"holds {len(text)} hexadecimal digits, not {wanted}: copy the whole file again")
    if len(content) == SALT_BYTES:
        raise ValueError(
            f"holds {SALT_BYTES} raw bytes, not {wanted}: convert it with `xxd -p -c {SALT_BYTES}`"
        )
    raise ValueError(
        f"is not {wanted} on one line: copy the federation's again, or make one for all peers with "
        f"`openssl rand -hex {SALT_BYTES}`"
    )


def load_salt(path: Path | str) -> bytes:
    """The federation's salt: a file of 64 or more hexadecimal digits that only its owner can read.

    Raises ConfigError for a file that is missing, readable by group or others, or not of that form.
    """
    path = Path(path)
    content = reading.secret(path, SALT_FILE_BYTES, "the patient salt", "check the path")
    try:
        return parse_salt(content)
    except ValueError as error:
        raise ConfigError(f"{path}: the patient salt {error}") from None


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
