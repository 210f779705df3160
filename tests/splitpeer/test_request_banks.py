"""Numbers of what is released for requests: none is given twice (SP-11.17-3)."""

from __future__ import annotations

from pathlib import Path

import pytest

from splitpeer.storage import request_banks
from splitpeer.storage.bank import Bank, BankEntry, Contents
from splitpeer.storage.request_banks import LAST, RequestBanks


def contents(site: str, *numbers: int) -> Contents:
    releases = tuple(
        BankEntry(site, number, bytes(16), ((0, 0, 0),), bytes(32), {"level": (1,)}) for number in numbers
    )
    return Contents(bytes(16), "", "f32", {site: bytes(32)}, releases)


@pytest.fixture
def banks(tmp_path: Path) -> RequestBanks:
    return RequestBanks(tmp_path)


def test_the_last_number_is_known_without_reading_every_index(
    banks: RequestBanks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert banks.last_number() == -1
    banks.create("a", b"1" * 16, contents("a", 5, 6))
    banks.create("b", b"2" * 16, contents("b", 3))

    def opened(*_: object) -> None:
        raise AssertionError("an index was read")

    monkeypatch.setattr(Bank, "open", opened)
    # Also by the next process, and of patients whose releases are gone.
    again = RequestBanks(tmp_path)
    again.clear(again.patients())
    assert again.last_number() == 6
    assert again.patients() == {b"1" * 16, b"2" * 16}


@pytest.mark.parametrize(
    "left", [None, "", "{}", '{"number": -4}', '{"number": "6"}', '{"number": true}', "[6]"]
)
def test_where_it_is_not_noted_the_indices_tell(banks: RequestBanks, left: str | None) -> None:
    """Those of an earlier version, or of a damaged file."""
    banks.create("a", b"1" * 16, contents("a", 5, 6))
    file = banks.folder / LAST
    file.unlink()
    if left is not None:
        file.write_text(left)
    assert banks.last_number() == 6
    banks.create("a", b"2" * 16, contents("a", 4))
    assert banks._noted_last() == 6


def test_a_crash_before_the_bank_is_there_gives_no_number_twice(
    banks: RequestBanks, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    def create(*_: object) -> None:
        raise Killed

    monkeypatch.setattr(request_banks.Bank, "create", create)
    with pytest.raises(Killed):
        banks.create("a", b"1" * 16, contents("a", 7))
    assert banks.last_number() == 7
