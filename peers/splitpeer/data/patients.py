"""What a patient is called: the form of an identifier in which all sites must agree."""

from __future__ import annotations

import unicodedata

from splitpeer.errors import DataError

WHITE_SPACE = "\t\n\v\f\r "
"""SP-11.5-2: what is removed at both ends; a fixed list, as Unicode's grows."""


def patient_id(written: str) -> str:
    """SP-11.5-2: the identifier of a patient, without white space at its ends and in NFC.

    One file system writes "é" as one character, another as two; a space at the end nobody sees. Case and spaces inside
    count.

    Raises:
        DataError: nothing is left, or the name is not valid Unicode.
    """
    name = unicodedata.normalize("NFC", written.strip(WHITE_SPACE))
    if not name:
        raise DataError(f"{written!r} names no patient: rename the file to the patient's id")
    try:
        name.encode()
    except UnicodeEncodeError:
        raise DataError(
            f"{written!a}: the file's name is not valid UTF-8: rename it, for instance with convmv"
        ) from None
    return name
