"""Who a patient is to this site, whatever federation, salt or job asks: what budgets and records are counted by."""

from __future__ import annotations

import hashlib
import hmac
from functools import cached_property
from pathlib import Path

from splitpeer.data.layouts import subject
from splitpeer.data.patients import patient_id
from splitpeer.errors import DataError
from splitpeer.privacy.ledger import NAME as LEDGER
from splitpeer.site.secret import own_secret
from splitpeer.site.shown import NAME as SHOWN

NAME = "people.key"
SECRET_BYTES = 32
ACCOUNT_BYTES = 16
CONTEXT = b"splitpeer person v1\0"


class People:
    """The accounts of one site, under a secret of its own: files of accounts name nobody.

    Args:
        state: [peer] state, which holds the secret (mode 0600); it is made on first use.
    """

    def __init__(self, state: Path) -> None:
        self._path = state / NAME

    def account(self, patient: str) -> bytes:
        """16 octets of the person behind a patient's id: all time points of a person have one account.

        Raises:
            DataError: the secret cannot be read or written, others may read it, or it is lost and records are not.
        """
        name = patient_id(subject(patient)).encode()
        return hmac.digest(self._secret, CONTEXT + name, hashlib.sha256)[:ACCOUNT_BYTES]

    @cached_property
    def _secret(self) -> bytes:
        for name in (SHOWN, LEDGER):
            if not self._path.exists() and (self._path.parent / name).exists():
                # With a new secret, nobody would be among those whom the record names.
                raise DataError(
                    f"{self._path}: is missing, and {name} can only be read with it: restore it from a backup"
                )
        return own_secret(
            self._path,
            SECRET_BYTES,
            "the key to whose accounts are whose",
            "so no account can be found: restore it from a backup",
        )
