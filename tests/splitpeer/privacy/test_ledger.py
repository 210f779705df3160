"""The budget: who pays what, what a crash costs, and that nothing is ever forgotten."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest

from splitpeer.errors import ConfigError, DataError, DiskTrouble
from splitpeer.privacy import ledger as module
from splitpeer.privacy.accounting import epsilon, noise_for
from splitpeer.privacy.ledger import NAME, Ledger, Spent
from splitproto.errors import PolicyRefused
from tests.splitpeer.privacy.accountants import releases_within

RUN, NEXT_RUN = b"1" * 16, b"2" * 16
A, B, C = (bytes([n]) * 16 for n in (0xAA, 0xBB, 0xCC))
EPSILON, DELTA = 4.0, 1e-5
NOISE = noise_for(EPSILON, DELTA, 100)  # one hundred records


@pytest.fixture
def told() -> list[Spent]:
    """What the ledgers of a test tell of themselves."""
    return []


@pytest.fixture
def open_here(tmp_path, told):
    made = []

    def make(epsilon: float = EPSILON) -> Ledger:
        made.append(Ledger(tmp_path / "state", epsilon, DELTA, told.append))
        return made[-1]

    yield make
    for ledger in made:
        ledger.close()


def pay(ledger: Ledger, *patients: bytes, noise=NOISE, run=RUN, learning=False, training=True) -> None:
    ledger.pay(run, patients, noise, learning=learning, training=training)


def stored(ledger: Ledger) -> dict[str, int]:
    """Records by patient, as a process after a crash would find them."""
    found = json.loads(ledger.path.read_text())["patients"]
    return {key[:2]: sum(entry["paid"].values()) for key, entry in found.items()}


def paid(ledger: Ledger) -> dict[str, int]:
    ledger.close()
    return stored(ledger)


# --- who pays ----------------------------------------------------------------------------------------------


def test_a_frozen_encoder_costs_each_patient_its_own_windows(open_here) -> None:
    ledger = open_here()
    pay(ledger, A, A, B)
    pay(ledger, C, training=False)
    assert ledger.spent().epsilon == pytest.approx(epsilon({NOISE: 2}, DELTA))
    assert paid(ledger) == {"aa": 2, "bb": 1, "cc": 1}


def test_an_encoder_that_learns_costs_everybody_it_has_learned_from(open_here) -> None:
    ledger = open_here()
    pay(ledger, C, learning=True, training=False)  # evaluation teaches nothing
    pay(ledger, A, A, learning=True)
    pay(ledger, B, learning=True)  # A is in the weights that made this
    pay(ledger, C, C, C, learning=True, training=False)
    pay(ledger, B, learning=True, run=NEXT_RUN)  # another run begins with weights that know nobody
    assert paid(ledger) == {"aa": 2 + 1 + 3, "bb": 1 + 3 + 1, "cc": 1 + 3}


def test_who_is_in_the_weights_outlives_the_process(open_here) -> None:
    first = open_here()
    pay(first, A, learning=True)
    first.close()
    second = open_here()
    pay(second, B, B, learning=True)
    assert paid(second) == {"aa": 3, "bb": 2}


def test_who_is_in_the_weights_is_on_disk_before_the_weights_are(open_here) -> None:
    """Also of a patient whose payments are written ahead already."""
    plenty = noise_for(EPSILON, DELTA, 100_000)
    ledger = open_here()
    pay(ledger, A, noise=plenty, learning=True, training=False)
    pay(ledger, A, noise=plenty, learning=True)
    assert json.loads(ledger.path.read_text())["patients"][A.hex()]["runs"] == [RUN.hex()]


# --- the limit ---------------------------------------------------------------------------------------------


def test_the_last_record_that_fits_is_the_hundredth(open_here, told) -> None:
    ledger = open_here()
    for _ in range(100):
        pay(ledger, A)
    pay(ledger, *[B] * 50)
    assert ledger.spent().epsilon == pytest.approx(EPSILON)
    with pytest.raises(PolicyRefused) as refused:
        pay(ledger, C, A)
    assert str(refused.value) == (
        "the privacy budget of this site (epsilon 4 at delta 1e-05) is spent for 1 of its patients"
    )
    now = ledger.spent()
    # A refused batch costs nobody anything.
    assert (now.patients, now.half, now.full) == (2, 2, 1)
    pay(ledger, B)
    assert paid(ledger) == {"aa": 100, "bb": 51}
    assert 10 <= len(told) <= 12
    assert all(A.hex() not in str(spent) for spent in told)
    assert [round(spent.epsilon, 1) for spent in told][-2:] == [4.0, 4.0]


def test_the_budget_outlives_processes_runs_and_jobs(open_here) -> None:
    for number in range(4):
        ledger = open_here()
        pay(ledger, *[A] * 25, run=bytes([number]) * 16)
        ledger.close()
    with pytest.raises(PolicyRefused):
        pay(open_here(), A)


def test_unlike_noise_adds_up_and_a_raised_budget_is_more_room(open_here) -> None:
    ledger = open_here()
    pay(ledger, *[A] * 50)
    pay(ledger, *[A] * 200, noise=2 * NOISE)
    assert ledger.spent().epsilon == pytest.approx(EPSILON)
    with pytest.raises(PolicyRefused):
        pay(ledger, A, noise=20 * NOISE)
    ledger.close()
    larger = open_here(epsilon=5.0)
    left = releases_within(5.0, DELTA, NOISE) - 100
    pay(larger, *[A] * left)
    with pytest.raises(PolicyRefused):
        pay(larger, A)


# --- crashes -----------------------------------------------------------------------------------------------


def test_what_is_on_disk_is_never_less_than_what_left_and_most_steps_write_nothing(
    open_here, monkeypatch
) -> None:
    writes = []
    write = Ledger._write
    monkeypatch.setattr(Ledger, "_write", lambda self: (writes.append(1), write(self)))
    plenty = noise_for(EPSILON, DELTA, 100_000)
    ledger = open_here()
    for step in range(1, 201):
        pay(ledger, A, B, noise=plenty, learning=True)
        on_disk = stored(ledger)
        assert 2 * step - 1 <= on_disk["aa"] <= 2 * step + 2 * module.BLOCK
    assert len(writes) <= 10
    assert paid(ledger)["aa"] == 1 + 2 * 199


def test_a_killed_process_has_paid_too_much_but_little(tmp_path) -> None:
    code = (
        "import os, sys; from pathlib import Path; from splitpeer.privacy.ledger import Ledger\n"
        f"ledger = Ledger(Path(sys.argv[1]), {EPSILON}, {DELTA})\n"
        f"for _ in range(30): ledger.pay({RUN!r}, [{A!r}], {NOISE!r}, learning=False, training=True)\n"
        "os.kill(os.getpid(), 9)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    assert done.returncode == -9
    ledger = Ledger(tmp_path, EPSILON, DELTA)
    assert ledger.path.stat().st_mode & 0o777 == 0o600
    spent = stored(ledger)["aa"]
    # At most a fiftieth of the budget is lost.
    assert 30 <= spent <= 32
    for _ in range(100 - spent):
        pay(ledger, A)
    with pytest.raises(PolicyRefused):
        pay(ledger, A)
    ledger.close()


def test_a_ledger_that_cannot_be_written_lets_nothing_leave(open_here, monkeypatch) -> None:
    ledger = open_here()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(
            DataError, match=r"cannot be written \(No space left on device\), so nothing may leave"
        ):
            pay(ledger, A)
        with pytest.raises(DataError):
            pay(ledger, A, learning=True)
    pay(ledger, A, B, learning=True)
    assert stored(ledger)["aa"] >= 1, "on disk before it leaves, after a write that failed as well"
    assert paid(ledger) == {"aa": 1, "bb": 1}, "nothing left, nothing was paid"


def test_a_disk_that_is_full(small_disk, caplog) -> None:
    """Nothing leaves while it is; afterwards all that leaves is paid for; the end is no error."""
    folder = small_disk.folder / "state"
    plenty = noise_for(EPSILON, DELTA, 100_000)
    ledger, left = Ledger(folder, EPSILON, DELTA), 0
    for full in (False, True, False, True, False):
        if full:
            small_disk.fill()
        for step in range(3 * module.BLOCK):
            try:
                pay(ledger, A, *(bytes([step]) * 16 for _ in range(full)), noise=plenty)
                left += 1
            except DiskTrouble:  # exit code 3: a service starts it again
                assert full
            assert stored(ledger)["aa"] >= left
        small_disk.make_room()
    assert 9 * module.BLOCK <= left < 12 * module.BLOCK
    assert not [*folder.glob("*.part")]
    small_disk.fill()
    pay(ledger, A, noise=plenty)
    ledger.close()
    assert "privacy.unsettled" in [record.message for record in caplog.records]
    assert stored(ledger)["aa"] >= left + 1


# --- the file ----------------------------------------------------------------------------------------------


def test_one_process_at_a_time(open_here) -> None:
    first = open_here()
    with pytest.raises(ConfigError, match="another splitpeer of this site"):
        open_here()
    first.close()
    open_here()


@pytest.mark.parametrize("text", [
    "", "[]", "{}", '{"format": "splitpeer privacy ledger 3", "patients": {}}',
    '{"format": "splitpeer privacy ledger 2", "patients": {"zz": {"paid": {}, "runs": []}}}',
    '{"format": "splitpeer privacy ledger 2", "patients": {"aa": {"paid": {"1.0": -1}, "runs": []}}}',
    '{"format": "splitpeer privacy ledger 2", "patients": {"aa": {"paid": {"nan": 1}, "runs": []}}}',
    '{"format": "splitpeer privacy ledger 2", "patients": {"aa": {"paid": {"1.0": true}, "runs": []}}}',
    '{"format": "splitpeer privacy ledger 2", "patients": {"aa": {}}}', "\ud800",
])  # fmt: skip
def test_a_damaged_file_is_an_error_and_not_a_new_start(tmp_path, text: str) -> None:
    (tmp_path / NAME).write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(DataError, match="not a whole privacy ledger") as error:
        Ledger(tmp_path, EPSILON, DELTA)
    assert "\n" not in str(error.value)
    (tmp_path / NAME).unlink()
    Ledger(tmp_path, EPSILON, DELTA).close()  # the lock was given back


def test_a_ledger_remembers_exactly(open_here) -> None:
    ledger = open_here()
    pay(ledger, A, noise=0.1 + 0.2 + 100)
    ledger.close()
    again = open_here()
    assert again.spent() == ledger.spent()
    pay(again, A, noise=0.1 + 0.2 + 100)
    assert len(json.loads(again.path.read_text())["patients"][A.hex()]["paid"]) == 1


def test_a_ledger_remembers_which_noise_was_this_sites_own(open_here) -> None:
    ledger = open_here()
    for own, records in ((NOISE / 2, 3), (None, 2)):
        ledger.pay(RUN, [A] * records, NOISE, learning=False, training=True, own=own)
    ledger.pay(RUN, [B] * 4, NOISE, learning=False, training=True)
    now = ledger.spent()
    assert now.epsilon == pytest.approx(epsilon({NOISE: 5}, DELTA))
    assert now.alone == pytest.approx(epsilon({NOISE: 2, NOISE / 2: 3}, DELTA))
    ledger.close()
    again = open_here()
    assert again.spent() == replace(now, full=again.spent().full)
    assert json.loads(again.path.read_text())["patients"][A.hex()]["paid"] == {
        f"{NOISE!r} {NOISE / 2!r}": 3, repr(NOISE): 2,
    }  # fmt: skip


@pytest.mark.parametrize("said", ["1.0 2.0", "1.0 0.5 0.2", "1.0 ", "1.0 -0.5", "1.0 nan"])
def test_own_noise_that_cannot_be_is_damage(tmp_path, said: str) -> None:
    text = {"format": "splitpeer privacy ledger 2", "patients": {"aa": {"paid": {said: 1}, "runs": []}}}
    (tmp_path / NAME).write_text(json.dumps(text))
    with pytest.raises(DataError, match="not a whole privacy ledger"):
        Ledger(tmp_path, EPSILON, DELTA)


def test_a_ledger_of_patients_is_not_taken_for_one_of_people(tmp_path) -> None:
    (tmp_path / NAME).write_text('{"format": "splitpeer privacy ledger 1", "patients": {}}')
    with pytest.raises(DataError, match="counts patients of one federation, not people: set it aside"):
        Ledger(tmp_path, EPSILON, DELTA)
