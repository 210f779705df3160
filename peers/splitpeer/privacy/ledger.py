"""The privacy budget of the people whose images a site has: payments are on disk before anything leaves.

Every record (window) that leaves is paid for by the patients whose images it depends on:

- **a frozen encoder**: by its own patient alone;
- **an encoder that learns**: also by every patient of an earlier training batch of the run. The site's backward
  pass uses their bare images, so the weights carry them, and so does whatever these weights make of anybody
  else. Each such record also moves by at most 2C, so it costs the same. (Not counting them is the usual
  mistake: a noisy activation is no private gradient.)

An account is a person's: all scans of a person, in all federations, are paid from it (`site/people.py`).

`privacy-ledger.json` in `[peer] state` (mode 0600) holds, by account, how many records were paid at which noise
(sigma / clip); of noise that sites of a sum share, also at which noise of this site's own ("1.5 0.75"), which is all
that is left if every other site works with the coordinator. Payments are written ahead in blocks: a crash loses the
unused rest of a block, so it counts too much and never too little, and most steps write nothing. One process at a time
may hold it.

Deleting the file deletes the memory of what left: the promise is then void. Back it up with the patients' data.
"""

from __future__ import annotations

import fcntl
import json
import logging
import math
import os
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from splitpeer.errors import ConfigError, DataError, DiskTrouble
from splitpeer.logs import event
from splitpeer.privacy.accounting import SENSITIVITY, detected, epsilon_of_mu, mu_within
from splitpeer.storage import durable, reading
from splitproto.errors import PolicyRefused

log = logging.getLogger(__name__)

NAME = "privacy-ledger.json"
MAX_BYTES = 256 << 20
"""Largest ledger that is read, in bytes: some 250 a patient."""
FORMAT = "splitpeer privacy ledger 2"
OF_PATIENTS = "splitpeer privacy ledger 1"
"""An earlier edition: by patient, as one federation knew the patient."""
BLOCK = 32
"""Payments written ahead, each of as many records as the one at hand."""
LOST_SHARE = 50
"""A crash costs a patient at most this fraction of the budget (one in so many), in addition to the current payment."""
_SLACK = 1 + 1e-9  # of rounding, where sums of squares meet their limit


@dataclass(frozen=True)
class Spent:
    """How far the budget is used: without any patient's key."""

    epsilon: float
    """Epsilon of the patient that paid most."""
    alone: float
    """The same where noise that sites share counts as this site's own alone: if all others tell theirs."""
    budget: float
    delta: float
    patients: int
    """Who paid anything."""
    half: int
    """How many have used half of epsilon or more."""
    full: int
    """How many cannot pay for one more record at the noise last used."""
    detected: float
    """At FPR, the largest TPR of any test whether the images are those of the patient that paid most."""


Noise = tuple[float, float]
"""sigma / clip that counts, and this site's own part of it."""


@dataclass
class _Account:
    """One patient: records by noise. `written` is what the file says, never less than `paid`."""

    paid: Counter[Noise] = field(default_factory=Counter)
    written: Counter[Noise] = field(default_factory=Counter)
    runs: set[str] = field(default_factory=set)
    """Runs whose weights may carry this patient."""

    @property
    def squared(self) -> float:
        """mu^2 of all that was paid."""
        return sum(count * _cost(noise) for (noise, _), count in self.paid.items())

    @property
    def squared_alone(self) -> float:
        """The same with this site's own noise alone."""
        return sum(count * _cost(own) for (_, own), count in self.paid.items())


def _cost(noise: float) -> float:
    return (SENSITIVITY / noise) ** 2 if noise > 0 else math.inf


class Ledger:
    """The accounts of one site under one budget.

    Args:
        folder: `[peer] state`; made (0700) if it is missing.
        epsilon: the budget of every patient, for all that ever leaves.
        delta: its delta.
        told: what is spent, at every tenth of the budget and at the end.

    Raises:
        ConfigError: another process holds the ledger; the folder cannot be written.
        DataError: the file is damaged.
    """

    def __init__(
        self, folder: Path, epsilon: float, delta: float, told: Callable[[Spent], None] = lambda spent: None
    ) -> None:
        self.path = folder / NAME
        self.epsilon, self.delta = epsilon, delta
        self._most = mu_within(epsilon, delta) ** 2 * _SLACK
        # mu^2 at every tenth of epsilon.
        self._tenths = [mu_within(epsilon * n / 10, delta) ** 2 / _SLACK for n in range(1, 11)]
        self._noise = math.inf
        self._lock = _lock(folder)
        self._closed = False
        try:
            self._accounts = _read(self.path)
        except BaseException:
            os.close(self._lock)
            raise
        self._tell, self._reached = told, bisect_right(self._tenths, self._worst())

    def pay(
        self,
        run: bytes,
        patients: Sequence[bytes],
        noise: float,
        *,
        learning: bool,
        training: bool,
        own: float | None = None,
    ) -> None:
        """Pay for one batch, durably, before it leaves: all of it or nothing.

        Args:
            run: of the job; each starts with new weights.
            patients: the account of every record in the batch.
            noise: sigma / clip of this release.
            learning: whether the encoder's weights ever follow gradients.
            training: whether gradients for this batch may follow.
            own: this site's part of the noise, sigma / clip; None: all of it. It decides nothing but `Spent.alone`.

        Raises:
            PolicyRefused: it would exceed some patient's budget. Nothing is paid.
            DataError: the ledger cannot be written. Nothing may leave.
        """
        if self._closed:
            raise RuntimeError("the ledger is closed")
        name = run.hex()
        costs = self._costs(name, [key.hex() for key in patients], learning=learning)
        self._noise = noise
        beyond = [key for key, count in costs.items() if not self._bears(key, noise, count)]
        if beyond:
            event(log, "privacy.refused", logging.WARNING, patients=len(beyond), epsilon=self.epsilon,
                  delta=self.delta)  # fmt: skip
            raise PolicyRefused(
                f"the privacy budget of this site (epsilon {self.epsilon:g} at delta {self.delta:g}) is spent for "
                f"{len(beyond)} of its patients"
            )
        at = (noise, noise if own is None else own)
        new, fresh = set(), costs.keys() - self._accounts.keys()
        for key, count in costs.items():
            account = self._accounts.setdefault(key, _Account())
            account.paid[at] += count
            if learning and training and name not in account.runs:
                account.runs.add(name)
                new.add(key)
        if new or any(self._accounts[key].paid[at] > self._accounts[key].written[at] for key in costs):
            for key, count in costs.items():
                account = self._accounts[key]
                account.written[at] = account.paid[at] + self._ahead(account, noise, count)
            try:
                self._write()
            except DataError:
                self._unpay(costs, at, new, fresh, name)
                raise
        reached = bisect_right(self._tenths, max(self._accounts[key].squared for key in costs))
        if reached > self._reached:
            self._reached = reached
            self._tell(self.spent())

    def spent(self) -> Spent:
        """The state of the budget, exactly as paid (amounts reserved ahead do not count)."""
        return _spent(self._accounts, self.epsilon, self.delta, self._noise)

    def close(self) -> None:
        """Write what was really paid, and let others have the ledger. May be called again."""
        if self._closed:
            return
        self._closed = True
        try:
            if any(account.written != account.paid for account in self._accounts.values()):
                for account in self._accounts.values():
                    account.written = Counter(account.paid)
                self._write()
        except DataError as error:
            # The file counts too much, as after a crash: no reason to end a job with an error.
            event(log, "privacy.unsettled", logging.WARNING, cause=str(error))
        finally:
            os.close(self._lock)
        if self._accounts:
            self._tell(self.spent())

    # --- inside ----------------------------------------------------------------------------------------

    def _costs(self, run: str, batch: Sequence[str], *, learning: bool) -> Counter[str]:
        """Records that each account pays for."""
        costs = Counter(batch)
        if learning:
            costs.update({
                key: len(batch) - costs[key] for key, account in self._accounts.items() if run in account.runs
            })  # fmt: skip
        return costs

    def _bears(self, key: str, noise: float, count: int) -> bool:
        account = self._accounts.get(key)
        return (account.squared if account else 0.0) + count * _cost(noise) <= self._most

    def _ahead(self, account: _Account, noise: float, count: int) -> int:
        """Records to write ahead: a block, but little of the budget, and never beyond it."""
        left = (self._most - account.squared) / _cost(noise)
        return max(0, math.floor(min(BLOCK * count, self._most / _cost(noise) / LOST_SHARE, left)))

    def _unpay(
        self, costs: Counter[str], noise: Noise, new: AbstractSet[str], fresh: AbstractSet[str], run: str
    ) -> None:
        """Nothing left, so nothing is owed. The file's content is unknown now: the next payment rewrites it."""
        for key, count in costs.items():
            account = self._accounts[key]
            account.paid[noise] -= count
            account.written.clear()
            if key in new:
                account.runs.discard(run)
            if key in fresh:
                del self._accounts[key]

    def _write(self) -> None:
        patients = {
            key: {"paid": {_text(noise): count for noise, count in sorted(a.written.items()) if count},
                  "runs": sorted(a.runs)}
            for key, a in sorted(self._accounts.items())
        }  # fmt: skip
        text = json.dumps({"format": FORMAT, "patients": patients}, separators=(",", ":"))
        try:
            durable.replace(self.path, text.encode("ascii"))
        except OSError as error:
            kind = DiskTrouble if error.errno in durable.TROUBLE else DataError
            raise kind(
                f"{self.path}: the privacy ledger cannot be written ({error.strerror}), so nothing may leave: "
                "free or change [peer] state"
            ) from error

    def _worst(self) -> float:
        return max((account.squared for account in self._accounts.values()), default=0.0)


def read_spent(folder: Path, epsilon: float, delta: float) -> Spent:
    """The state of the budget as the file in `folder` has it, while another process may be paying: never less than
    what was paid, and a little more.

    Raises:
        DataError: the file is damaged.
    """
    accounts = _read(folder / NAME)
    # The noise last used is not in the file; the finest step is the most generous question.
    noise = max((noise for account in accounts.values() for noise, _ in account.paid), default=math.inf)
    return _spent(accounts, epsilon, delta, noise)


def _spent(accounts: dict[str, _Account], epsilon: float, delta: float, noise: float) -> Spent:
    squares = [account.squared for account in accounts.values()]
    worst = math.sqrt(max(squares, default=0.0))
    most, half = mu_within(epsilon, delta) ** 2 * _SLACK, mu_within(epsilon / 2, delta) ** 2 / _SLACK
    alone = math.sqrt(max((account.squared_alone for account in accounts.values()), default=0.0))
    return Spent(
        epsilon_of_mu(worst, delta),
        epsilon_of_mu(alone, delta),
        epsilon,
        delta,
        patients=len(squares),
        half=sum(square >= half for square in squares),
        full=sum(not square + _cost(noise) <= most for square in squares),
        detected=detected(worst),
    )


def _lock(folder: Path) -> int:
    """Two processes with a copy of the accounts each would forget what the other paid."""
    path = folder / f"{NAME}.lock"
    file = -1
    try:
        durable.make_folder(folder)
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if file >= 0:
            os.close(file)
        if isinstance(error, BlockingIOError):
            raise ConfigError(
                f"{folder / NAME}: another splitpeer of this site is running on the same budget: stop one of them"
            ) from None
        raise ConfigError(
            f"{path}: the privacy ledger cannot be made ({error.strerror}): check [peer] state"
        ) from None
    return file


def _read(path: Path) -> dict[str, _Account]:
    try:
        text = reading.read(path, MAX_BYTES)
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise DataError(f"{path}: the privacy ledger cannot be read ({error.strerror})") from None
    try:
        found = reading.parse(text)
        if found["format"] == OF_PATIENTS:
            raise DataError(
                f"{path}: counts patients of one federation, not people: set it aside to begin again, with an epsilon "
                "that is less by what splitpeer privacy of the earlier edition says is spent"
            )
        if found["format"] != FORMAT:
            raise ValueError("another format")
        return {bytes.fromhex(key).hex(): _account(entry) for key, entry in found["patients"].items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise DataError(
            f"{path}: not a whole privacy ledger: restore it from a backup; without it, what has left is unknown"
        ) from None


def _text(noise: Noise) -> str:
    """One number where all of it is this site's own."""
    return " ".join(map(repr, noise[:1] if noise[0] == noise[1] else noise))


def _account(entry: dict[str, Any]) -> _Account:
    paid: Counter[Noise] = Counter()
    for said, count in entry["paid"].items():
        noise, own = map(float, said.split(" ")) if " " in said else (float(said), float(said))
        if not (noise >= own >= 0 and type(count) is int and count >= 0):
            raise ValueError("no count")
        paid[noise, own] = count
    return _Account(paid, Counter(paid), {bytes.fromhex(run).hex() for run in entry["runs"]})
