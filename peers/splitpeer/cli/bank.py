"""`splitpeer bank`: what runs with frozen encoders keep of patients at this coordinator, of the run's own and of those
segmented for requests, and how it is deleted.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from splitpeer.cli.options import config_option, echo_json, json_option, load_peer, set_option
from splitpeer.cli.terminal import echo
from splitpeer.errors import ConfigError, DataError

if TYPE_CHECKING:
    from splitpeer.settings.peer import PeerConfig
    from splitpeer.storage.bank import Bank, BankEntry
    from splitpeer.storage.request_banks import RequestBanks

RUN_DIGITS = 32
"""At the end of a run folder's name."""


@click.group()
def bank() -> None:
    """The feature banks of this coordinator: activations, or sums of them, that sites released."""


@bank.command("list")
@click.argument("run", required=False)
@config_option
@set_option
@json_option
def list_(run: str | None, config_file: Path | None, settings: tuple[str, ...], as_json: bool) -> None:
    """List the banks in [peer] state; with RUN (its job, or its id's first digits), the patients in that one."""
    config = _coordinator(config_file, settings)
    if run is None:
        shown = [one.summary(config) for one in _kept(config.peer.state)]
    else:
        shown = [_named(config.peer.state, run).shown(config, patients=True)]
    if as_json:
        echo_json(shown)
        return
    for one in shown:
        if "problem" in one:
            echo(f"{one['job']} {one['run'][:8]}  {one['problem']}")
            continue
        asked = f", {one['requested']} of them for requests" if one["requested"] else ""
        echo(
            f"{one['job']} {one['run'][:8]}  {one['windows']} windows of {one['patients']} patients{asked}, "
            f"{one['size']}, {one['dropped']} patients dropped; decoder at step {one['step']}; {one['folder']}"
        )
        for patient in one.get("listed", ()):
            more = ", for requests" * patient["requested"] + ", dropped" * patient["dropped"]
            echo(f"  {patient['patient']}  {patient['windows']} windows{more}")
    if not shown:
        echo(f"{config.peer.state}: no feature bank", err=True)


@bank.command()
@click.argument("run")
@click.option(
    "--patient",
    "patients",
    multiple=True,
    metavar="ID",
    help="As the masks' files name the patient, or as the log does; may be given several times.",
)
@click.option("--all", "whole", is_flag=True, help="The whole bank.")
@config_option
@set_option
def drop(
    run: str, patients: tuple[str, ...], whole: bool, config_file: Path | None, settings: tuple[str, ...]
) -> None:
    """Delete patients, or everything, from the bank of RUN (its job, or its id's first digits).

    The coordinator must be stopped; a run that goes on is then made without these patients. What the decoder has
    learned stays in it.
    """
    if whole == bool(patients):
        raise ConfigError("name patients with --patient ID, or give --all for the whole bank")
    config = _coordinator(config_file, settings)
    kept = _named(config.peer.state, run)
    with _held(config.peer.state):
        if whole:
            _drop_all(kept, config)
        else:
            _drop_patients(kept, config, patients)


# --- inside ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Kept:
    """What one run keeps on disk."""

    folder: Path
    """Of the run."""

    @property
    def run(self) -> str:
        return self.folder.name[-RUN_DIGITS:]

    @property
    def job(self) -> str:
        return self.folder.name[: -RUN_DIGITS - 1]

    @property
    def bank(self) -> Path:
        """Of the run's patients; not there where it is trained from the bank of another run."""
        from splitpeer.storage.bank import FOLDER

        return self.folder / FOLDER

    @property
    def step(self) -> int:
        """Of the newest checkpoint of the decoder."""
        steps = [path.stem.rpartition("-")[2] for path in self.folder.glob("step-*.safetensors")]
        return max((int(step) for step in steps if step.isdigit()), default=0)

    def open(self, config: PeerConfig) -> _Opened:
        """Raises DataError, ConfigError."""
        from splitpeer.storage.bank import Bank, load_key
        from splitpeer.storage.request_banks import RequestBanks

        key = load_key(config.bank.key) if config.bank.key is not None else b""
        found, requests = Bank.open(self.bank, key), RequestBanks(self.folder, key)
        of = {patient: requests.of(patient) for patient in sorted(requests.patients())}
        banks = [
            *([found] if found is not None else []),
            *(bank for some in of.values() for bank in some.values()),
        ]
        if not banks:
            raise DataError(f"{self.folder}: no feature bank any more")
        return _Opened(found, requests, frozenset(of), tuple(banks))

    def held_out(self) -> frozenset[str]:
        """Keys of patients whom the run never trains on, as far as its record is there."""
        from splitpeer.storage import reading

        with suppress(OSError, ValueError, KeyError, TypeError):
            record = reading.document(self.folder.parent / f"{self.job}.run.json")
            if record["run"] == self.run:
                return frozenset(map(str, record["held_out"]))
        return frozenset()

    def summary(self, config: PeerConfig) -> dict[str, Any]:
        """As `shown`, or why not."""
        try:
            return self.shown(config, patients=False)
        except (ConfigError, DataError) as error:
            return {"job": self.job, "run": self.run, "folder": str(self.folder), "problem": str(error)}

    def shown(self, config: PeerConfig, *, patients: bool) -> dict[str, Any]:
        from splitpeer.logs import handle
        from splitpeer.storage import reading

        opened = self.open(config)
        there, dropped = opened.windows(), opened.dropped
        octets = sum(
            path.stat().st_size
            for folder in (self.bank, opened.requests.folder)
            for path in folder.rglob("*")
            if path.is_file()
        )
        return {
            "job": self.job, "run": self.run, "folder": str(self.bank if opened.bank else opened.requests.folder),
            "encrypted": all(bank.encrypted for bank in opened.all),
            "windows": there.total(), "patients": len(there), "requested": len(there.keys() & opened.requested),
            "dropped": len(dropped), "size": reading.size(octets), "step": self.step,
        } | ({} if not patients else {
            "listed": [
                {
                    "patient": handle(key), "windows": there[key], "requested": key in opened.requested,
                    "dropped": key in dropped,
                }
                for key in sorted({*there, *dropped}, key=handle)
            ]
        })  # fmt: skip


@dataclass(frozen=True)
class _Opened:
    """The banks of a run."""

    bank: Bank | None
    """Of the run's patients."""
    requests: RequestBanks
    requested: frozenset[bytes]
    """Patients for whom `requests` has banks."""
    all: tuple[Bank, ...]

    @property
    def dropped(self) -> frozenset[bytes]:
        return frozenset(key for bank in self.all for key in bank.dropped)

    def windows(self) -> Counter[bytes]:
        """That are there, of each patient of whom there are any."""
        found = Counter[bytes]()
        for bank in self.all:
            missing = {(one.site, one.number) for one in bank.missing()}
            for one in bank.contents.releases:
                if one.key not in bank.dropped and (one.site, one.number) not in missing:
                    found[one.key] += len(one.origins)
        return found

    def releases(self, key: bytes) -> list[BankEntry]:
        """Of a patient, removed or not."""
        return [one for bank in self.all for one in bank.contents.releases if one.key == key]

    def only_requested(self, key: bytes) -> bool:
        """Whether the patient is not of the run."""
        own = self.bank.contents.releases if self.bank is not None else ()
        return key in self.requested and all(one.key != key for one in own)

    def drop(self, keys: Collection[bytes]) -> None:
        """Raises DiskTrouble, ConfigError, DataError."""
        self.requests.drop(keys)
        if self.bank is not None:
            self.bank.drop(keys)


def _coordinator(config_file: Path | None, settings: tuple[str, ...]) -> PeerConfig:
    config = load_peer(config_file, settings)
    if config.peer.role != "coordinator":
        raise ConfigError(f"{config.source}: is a client's: only a coordinator keeps a feature bank")
    return config


def _kept(state: Path) -> list[_Kept]:
    from splitpeer.storage import bank, request_banks

    indices = [
        *state.glob(f"*/{bank.FOLDER}/{bank.INDEX}"),
        *state.glob(f"*/{request_banks.FOLDER}/*/*/{bank.INDEX}"),
    ]
    return [_Kept(folder) for folder in sorted({_run_folder(state, index) for index in indices})]


def _run_folder(state: Path, inside: Path) -> Path:
    return state / inside.relative_to(state).parts[0]


def _named(state: Path, run: str) -> _Kept:
    """Raises ConfigError: none, or several."""
    kept = _kept(state)
    found = [one for one in kept if run in (one.job, one.folder.name) or one.run.startswith(run)]
    if len(found) == 1:
        return found[0]
    every = ", ".join(f"{one.job} {one.run[:8]}" for one in found or kept) or "none"
    what = f"{run!r} names {len(found)} banks: give more of the run's id" if found else f"no bank of {run!r}"
    raise ConfigError(f"{what}; {'there are' if found else f'in {state} there is'}: {every}")


@contextmanager
def _held(state: Path) -> Iterator[None]:
    """The state folder, which no daemon may use meanwhile. Raises ConfigError."""
    from splitpeer.daemon.lock import StateLock

    lock = StateLock(state)
    if not lock.take():
        raise ConfigError(
            f"a coordinator uses {state}: stop it first (splitpeer drain), and start it again afterwards"
        )
    try:
        yield
    finally:
        lock.release()


def _drop_patients(kept: _Kept, config: PeerConfig, named: Sequence[str]) -> None:
    from splitpeer.logs import handle

    opened = kept.open(config)
    keys = _keys(opened, config, named)
    opened.drop(keys)
    _note(kept, config, sorted(handle(key) for key in keys))
    held_out = kept.held_out()
    for key in keys:
        gone = opened.releases(key)
        windows = sum(len(one.origins) for one in gone)
        sites = len({one.site for one in gone})
        echo(f"{handle(key)}: {windows} windows of {sites} sites are deleted")
        if key.hex() in held_out:
            echo(
                f"{handle(key)}: was held out: no decoder of this run has learned from it; a coordinator that serves "
                "[inference] removes its mask from predictions/, else remove it there"
            )
        elif opened.only_requested(key):
            echo(f"{handle(key)}: was segmented only: no decoder of this run has learned from it")
    if any(key.hex() not in held_out and not opened.only_requested(key) for key in keys):
        _tell_what_stays(kept)


def _keys(opened: _Opened, config: PeerConfig, named: Sequence[str]) -> list[bytes]:
    """Of patients by their id, or by their handle in the log. Raises ConfigError: one is not in the bank."""
    from splitpeer.data.pseudonym import load_salt, pseudonym
    from splitpeer.logs import handle

    if config.data.salt is None:
        raise ConfigError("a coordinator needs [data] salt")
    salt, there = (
        load_salt(config.data.salt),
        {one.key for bank in opened.all for one in bank.contents.releases},
    )
    handles, keys = {handle(key): key for key in there}, []
    for name in named:
        key = handles.get(name) or pseudonym(salt, name)
        if key not in there:
            raise ConfigError(
                f"--patient {name}: is not in this bank: write the id as the masks' files have it, or the handle "
                "that the log and splitpeer bank list RUN show; nothing was deleted"
            )
        keys.append(key)
    return list(dict.fromkeys(keys))


def _drop_all(kept: _Kept, config: PeerConfig) -> None:
    from splitpeer.storage.bank import remove
    from splitpeer.storage.request_banks import RequestBanks

    # The run's own last: with its index, what a crash leaves is found again.
    requests = RequestBanks(kept.folder)
    if requests.folder.exists():
        requests.remove()
        echo(f"{requests.folder}: all that was released for requests is deleted")
    if kept.bank.exists():
        remove(kept.bank)
        echo(f"{kept.bank}: the whole bank is deleted")
    _note(kept, config, ())
    echo(
        "If the run is not complete, it asks the sites again when it is started again; sites of a secure sum that are "
        "done with it do not answer."
    )
    _tell_what_stays(kept)


def _tell_what_stays(kept: _Kept) -> None:
    echo(
        f"What the decoder has learned by step {kept.step} stays in it ({kept.folder}), and in the results: "
        "only a new run without the patient is without it. Copies and backups are not touched."
    )


def _note(kept: _Kept, config: PeerConfig, handles: Collection[str]) -> None:
    from splitpeer.daemon.trail import Trail

    patients = ", ".join(handles) or "all"
    Trail(config.peer.state).note("bank.dropped", time.time(), run=kept.run, patients=patients)
