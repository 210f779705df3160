from __future__ import annotations

import hashlib
import hmac
import os
from pathlib import Path

import pytest

from splitpeer.data.layouts import Case
from splitpeer.data.pseudonym import keyed, load_salt, pseudonym
from splitpeer.errors import ConfigError, DataError


def test_the_key_is_a_truncated_hmac_of_the_id(files) -> None:
    """SP-11.5-1."""
    assert pseudonym(files.SALT, "BRATS_001").hex() == "7c260ae5783c56ade47fc7cebae7af0f"
    assert (
        pseudonym(files.SALT, "BRATS_001")
        == hmac.new(files.SALT, b"splitproto patient v1\x00BRATS_001", hashlib.sha256).digest()[:16]
    )
    assert pseudonym(files.SALT, "BRATS_001") != pseudonym(files.SALT[::-1], "BRATS_001")
    assert pseudonym(files.SALT, "BRATS_001") != pseudonym(files.SALT, "brats_001")


def test_two_spellings_of_one_accent_are_one_patient(files) -> None:
    assert pseudonym(files.SALT, "Jos\u00e9") == pseudonym(files.SALT, "Jose\u0301")
    cases = [Case("Jos\u00e9", Path("1.nii")), Case("Jose\u0301", Path("2.nii"))]
    with pytest.raises(DataError, match=r"1\.nii and 2\.nii are the same patient"):
        keyed(files.SALT, cases)


def salt_file(path: Path, text: str, mode: int = 0o600) -> Path:
    path.write_text(text)
    os.chmod(path, mode)
    return path


def test_a_salt_is_read_from_a_private_file(tmp_path: Path, files) -> None:
    assert load_salt(salt_file(tmp_path / "salt", files.SALT.hex() + "\n")) == files.SALT


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o602, 0o660])
def test_a_salt_others_can_reach_is_refused(tmp_path: Path, mode: int, files) -> None:
    with pytest.raises(ConfigError, match="open to group or others: chmod 600"):
        load_salt(salt_file(tmp_path / "salt", files.SALT.hex(), mode))


@pytest.mark.parametrize("text", ["", "00" * 31, "zz" * 32, "0" * 65, "\u00e9" * 64])
def test_a_salt_that_is_short_or_not_hexadecimal_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match="must be 32 or more octets in hexadecimal"):
        load_salt(salt_file(tmp_path / "salt", text))


def test_a_missing_salt_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read the patient salt \(No such file or directory\)"):
        load_salt(tmp_path / "salt")
