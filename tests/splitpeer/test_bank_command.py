"""`splitpeer bank`: what a coordinator keeps of patients is listed, and deleted by their id, in one line each."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from splitpeer.cli import main
from splitpeer.daemon.lock import StateLock
from splitpeer.daemon.trail import NAME, entries
from splitpeer.data.pseudonym import pseudonym
from splitpeer.logs import handle
from splitpeer.settings.loading import to_toml
from splitpeer.storage.bank import FOLDER, Bank, Contents

from .test_bank import KEY, release, tensors

Run = Callable[..., tuple[int, str, str]]
SALT = bytes(range(32))
PATIENTS = ("MUELLER_Erika", "SCHMIDT_Hans")
KEYS = tuple(pseudonym(SALT, name) for name in PATIENTS)
NAMES = {run: f"try-{bytes([run] * 16).hex()}" for run in (7, 8)}


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Run:
    def run(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as left:
            main(["bank", *map(str, arguments)])
        said = capsys.readouterr()
        return int(left.value.code or 0), said.out, said.err

    return run


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A coordinator with two runs, one of them encrypted."""
    monkeypatch.chdir(tmp_path)
    for name, octets in (("federation.salt", SALT.hex().encode()), ("bank.key", KEY)):
        (tmp_path / name).write_bytes(octets)
        (tmp_path / name).chmod(0o600)
    settle(tmp_path, key="")
    for run, key in ((7, b""), (8, KEY)):
        listed = [release(site, n, KEYS[n // 2]) for site in ("north", "south") for n in range(4)]
        labels = {site: bytes(32) for site in ("north", "south")}
        made = Bank.create(
            tmp_path / "state" / NAMES[run] / FOLDER,
            Contents(bytes([run] * 16), "terms", "f32", labels, tuple(listed)),
            key,
        )
        for one in listed:
            made.put(one, tensors(one))
    (tmp_path / "state" / NAMES[7] / "step-00000120.safetensors").touch()
    return tmp_path / "state"


def settle(folder: Path, *, key: str, role: str = "coordinator") -> None:
    """Write peer.toml."""
    hub = role == "coordinator"
    said = {
        "peer": {
            "role": role,
            "site": "hub",
            "federation": "test",
            **({} if hub else {"modality": "t1"}),
        },
        "tls": {"ca": "ca.crt", "certificate": "hub.crt", "key": "hub.key"},
        "network": {"listen" if hub else "coordinator": "tcp://127.0.0.1:1"},
        "data": {
            "salt": "federation.salt",
            **({"labels": "l", "convention": "msd"} if hub else {"images": "i"}),
        },
        **({} if hub else {"policy": {"coordinators": ["hub"]}}),
        **({"bank": {"key": key}} if key else {}),
    }
    (folder / "peer.toml").write_text(to_toml(said))


def files(state: Path, run: int) -> int:
    return len([*(state / NAMES[run] / FOLDER).glob("*/0*")])


def test_a_patient_is_deleted_by_id_and_what_stays_is_said(here: Path, cli: Run) -> None:
    record = {"run": bytes([7] * 16).hex(), "held_out": [KEYS[1].hex()]}
    (here / "try.run.json").write_text(json.dumps(record))
    code, said, error = cli("drop", "0707", "--patient", PATIENTS[0])
    assert (code, error, files(here, 7)) == (0, "", 4)
    assert f"{handle(KEYS[0])}: 8 windows of 2 sites are deleted" in said
    assert "What the decoder has learned by step 120 stays in it" in said
    code, said, _ = cli("drop", "0707", "--patient", handle(KEYS[1]))
    assert (code, files(here, 7)) == (0, 0)
    assert "was held out: no decoder of this run has learned from it" in said and "step 120" not in said
    assert [line["patients"] for line in entries(here / NAME)] == [handle(key) for key in KEYS]
    assert not any(name in (here / NAME).read_text() for name in PATIENTS)


def test_the_list_counts_and_with_a_run_names_handles(here: Path, cli: Run) -> None:
    cli("drop", "0707", "--patient", PATIENTS[0])
    settle(here.parent, key="bank.key")
    code, said, error = cli("list", "0808", "--json")
    assert (code, error) == (0, "")
    (one,) = json.loads(said)
    assert (one["job"], one["windows"], one["patients"], one["encrypted"]) == ("try", 16, 2, True)
    settle(here.parent, key="")
    code, said, _ = cli("list")
    assert code == 0 and len(said.splitlines()) == 2
    assert "the feature bank is encrypted: name its key ([bank] key)" in said.splitlines()[1]
    code, said, _ = cli("list", "0707")
    assert code == 0
    assert (
        "try 07070707  8 windows of 1 patients" in said and "1 patients dropped; decoder at step 120" in said
    )
    assert f"{handle(KEYS[0])}  0 windows, dropped" in said and f"{handle(KEYS[1])}  8 windows\n" in said


def test_the_whole_bank_goes_even_if_its_key_is_lost(here: Path, cli: Run) -> None:
    code, said, error = cli("drop", NAMES[8], "--all")
    assert (code, error) == (0, "") and "the whole bank is deleted" in said
    assert not (here / NAMES[8] / FOLDER).exists() and files(here, 7) == 8
    assert "no bank of '08'" in cli("list", "08")[2]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("drop", "07"), "name patients with --patient ID, or give --all"),
        (("drop", "07", "--all", "--patient", "x"), "name patients with --patient ID, or give --all"),
        (("drop", "07", "--patient", PATIENTS[0], "--patient", "NOBODY"), "NOBODY: is not in this bank"),
        (("drop", "try", "--all"), "'try' names 2 banks: give more of the run's id"),
        (("drop", "09", "--all"), "no bank of '09'"),
        (("drop", "08", "--patient", PATIENTS[0]), "is encrypted: name its key ([bank] key)"),
    ],
)
def test_every_mistake_is_one_line_and_deletes_nothing(
    here: Path, cli: Run, arguments: tuple[str, ...], words: str
) -> None:
    code, _, error = cli(*arguments)
    assert code == 4 and len(error.splitlines()) == 1 and words in error, error
    assert files(here, 7) == files(here, 8) == 8


def test_a_running_coordinator_is_stopped_first(here: Path, cli: Run) -> None:
    lock = StateLock(here)
    assert lock.take()
    code, _, error = cli("drop", "07", "--all")
    lock.release()
    assert code == 4 and "stop it first (splitpeer drain)" in error
    settle(here.parent, key="", role="client")
    assert "only a coordinator keeps a feature bank" in cli("list")[2]
