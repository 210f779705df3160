"""The list of patients who have withdrawn consent: it may appear or grow; if it cannot be read, nothing is sent."""

from __future__ import annotations

from pathlib import Path

import pytest

from splitpeer.data import consent
from splitpeer.data.consent import Consent
from splitpeer.data.files import Case
from splitpeer.errors import DataError, PeerError

CASES = {
    name.encode(): Case(name, Path(f"{name}.nii.gz"))
    for name in ("P-1", "P-10", "Jos\u00e9", "sub-01_ses-1", "sub-01_ses-2", "BraTS-GLI-00005-001")
}


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(consent, "PAUSE_S", 0.0)
    return tmp_path / "withdrawn.txt"


def test_it_appears_and_grows(path: Path) -> None:
    listed = Consent(path, CASES)
    assert listed.withdrawn() == set()
    path.write_text("# of May\n\n  P-1\n")
    assert listed.withdrawn() == {b"P-1"}
    path.write_text("\ufeffP-10\r\nJose\u0301\r\n", newline="")
    assert listed.withdrawn() == {b"P-1", b"P-10", "Jos\u00e9".encode()}, "who has withdrawn stays so"


def test_a_person_stands_for_all_time_points(path: Path) -> None:
    path.write_text("sub-01\nBraTS-GLI-00005-001\n")
    assert Consent(path, CASES).withdrawn() == {b"sub-01_ses-1", b"sub-01_ses-2", b"BraTS-GLI-00005-001"}


def test_ids_of_nobody_are_counted(path: Path) -> None:
    path.write_text("P-1\np-10\nP-2\n")
    listed = Consent(path, CASES)
    assert (listed.withdrawn(), listed.unknown) == ({b"P-1"}, 2)


def test_nobody_keeps_a_list() -> None:
    assert Consent(None, CASES).withdrawn() == set()


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda path: path.write_bytes(b"P-1\n\xff\n"), "is not UTF-8"),
        (lambda path: path.mkdir(), "cannot be read"),
        (lambda path: path.symlink_to(path), "cannot be read"),
        (lambda path: path.parent.rmdir(), "is gone"),
    ],
)
def test_what_cannot_be_read_is_no_empty_list(path: Path, spoil, said: str) -> None:
    spoil(path)
    with pytest.raises(
        DataError, match=f"withdrawn\\.txt: the list of withdrawn patients {said}.* nothing is sent"
    ):
        Consent(path, CASES).withdrawn()


def test_a_list_that_was_there_does_not_vanish(path: Path) -> None:
    path.write_text("P-1\n")
    listed = Consent(path, CASES)
    listed.withdrawn()
    path.unlink()
    with pytest.raises(DataError, match="is gone, so nothing is sent: put it back"):
        listed.withdrawn()


def test_a_list_that_was_there_is_missed_by_the_next_process(path: Path, tmp_path: Path) -> None:
    mark = tmp_path / "state" / "seen"
    assert Consent(path, CASES, mark).withdrawn() == set()
    assert not mark.exists(), "there was no list yet"
    path.write_text("P-1\n")
    assert Consent(path, CASES, mark).withdrawn() == {b"P-1"}
    path.unlink()
    with pytest.raises(DataError, match="is gone, so nothing is sent: put it back"):
        Consent(path, CASES, mark).withdrawn()
    path.write_text("")
    assert Consent(path, CASES, mark).withdrawn() == set()


def test_without_a_mark_no_list_is_read(path: Path, tmp_path: Path) -> None:
    """It would be forgotten with the process."""
    path.write_text("P-1\n")
    (tmp_path / "state").write_text("a file where the folder should be")
    with pytest.raises(PeerError, match="state"):
        Consent(path, CASES, tmp_path / "state" / "seen").withdrawn()
