from __future__ import annotations

import hashlib
import hmac
import os
from pathlib import Path

import pytest

from splitpeer.data.layouts import Case
from splitpeer.data.pseudonym import SALT_FILE_BYTES, keyed, load_salt, pseudonym, salt_check
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


@pytest.mark.parametrize("spelling", ["Jos\u00e9 ", "\tJose\u0301\n", " Jos\u00e9", "Jos\u00e9\r"])
def test_white_space_at_the_ends_is_no_part_of_the_id(files, spelling: str) -> None:
    """SP-11.5-2."""
    assert pseudonym(files.SALT, spelling) == pseudonym(files.SALT, "Jos\u00e9")


@pytest.mark.parametrize("other", ["Jose", "jos\u00e9", "Jos \u00e9", "Jos\u00e9\u00a0"])
def test_case_accents_and_spaces_inside_count(files, other: str) -> None:
    """SP-11.5-2."""
    assert pseudonym(files.SALT, other) != pseudonym(files.SALT, "Jos\u00e9")


@pytest.mark.parametrize(
    ("name", "what"), [(" \t", "names no patient"), ("P\udce9", r"'P\\udce9': .* not valid UTF-8")]
)
def test_a_name_that_is_no_id_is_refused(files, name: str, what: str) -> None:
    """SP-11.5-2."""
    with pytest.raises(DataError, match=what):
        pseudonym(files.SALT, name)


def test_the_check_value_shows_whether_a_salt_is_the_same_and_is_no_key(files) -> None:
    """SP-11.5-4."""
    expected = hmac.new(files.SALT, b"splitproto salt v1\0", hashlib.sha256).digest()[:8]
    assert salt_check(files.SALT) == expected
    assert salt_check(files.SALT[::-1]) != expected
    assert salt_check(files.SALT + b"\0") != salt_check(files.SALT[:-1] + b"\0")


def salt_file(path: Path, content: str | bytes, mode: int = 0o600) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    os.chmod(path, mode)
    return path


def test_a_salt_is_read_from_a_private_file(tmp_path: Path, files) -> None:
    assert load_salt(salt_file(tmp_path / "salt", files.SALT.hex() + "\n")) == files.SALT


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o602, 0o660])
def test_a_salt_others_can_reach_is_refused(tmp_path: Path, mode: int, files) -> None:
    with pytest.raises(ConfigError, match="open to group or others: chmod 600"):
        load_salt(salt_file(tmp_path / "salt", files.SALT.hex(), mode))


@pytest.mark.parametrize("ending", ["", "\n", "\r\n", " \n\n"])
@pytest.mark.parametrize("beginning", ["", "\ufeff"])
def test_a_salt_that_an_editor_saved_is_read(tmp_path: Path, files, beginning: str, ending: str) -> None:
    """SP-11.5-3."""
    content = beginning + files.SALT.hex().upper() + ending
    assert load_salt(salt_file(tmp_path / "salt", content)) == files.SALT


DIGITS = "ab" * 32


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"", "is not 64 hexadecimal digits on one line: copy the federation's again"),
        (DIGITS[2:], "holds 62 hexadecimal digits, not 64 hexadecimal digits: copy the whole file"),
        (DIGITS + "0\n", "holds 65 hexadecimal digits"),
        (bytes(range(100, 132)), r"holds 32 raw bytes, .* convert it with `xxd -p -c 32`"),
        (DIGITS.encode("utf-16"), "is UTF-16, as PowerShell writes it"),
        (DIGITS[:32] + "\n" + DIGITS[32:], "is not 64 hexadecimal digits on one line"),
        ("0x" + DIGITS, "is not 64 hexadecimal digits on one line"),
        ("\u00e9" * 64, "is not 64 hexadecimal digits on one line"),
        (DIGITS * (SALT_FILE_BYTES // 64) + " " + DIGITS, None),
    ],
)
def test_a_salt_of_another_form_is_named(tmp_path: Path, content: str | bytes, what: str | None) -> None:
    """SP-11.5-3. The last is a long file, of which only the beginning is read."""
    path = salt_file(tmp_path / "salt", content)
    if what is None:
        assert len(load_salt(path)) == SALT_FILE_BYTES // 2
        return
    with pytest.raises(ConfigError, match=what):
        load_salt(path)


def test_a_missing_salt_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read the patient salt \(No such file or directory\)"):
        load_salt(tmp_path / "salt")
