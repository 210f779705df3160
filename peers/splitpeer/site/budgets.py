"""Counts of what a coordinator has asked of a site (SP-11.15): a valid certificate does not allow asking
without limit. Counts of a run are in its folder and those of the day in the state folder, so that neither a
restart nor a new run id resets them.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from splitpeer.errors import DataError
from splitpeer.settings.bounds import Bounds
from splitpeer.storage import durable
from splitproto.errors import PolicyRefused
from splitproto.messages import Forward

FILE, TALLY, DAY, INFERENCES = "budget.json", "budget.tally", "budget-day.json", "budget-inferences.json"
BURST_S = 10.0
FLUSH = 4096
"""Evaluated windows between two writes of their counts: a crash forgets at most this many."""
DAY_S = 86_400.0
MOST_SEATS = 64
"""SP-8.4: seats of a job. Names that predictions of one run may say were left out."""
_ROWS, _COLUMNS = 2, 1 << 18
_MOST = 0xFFFF
"""Where a cell of a tally stops."""


class BudgetSpent(PolicyRefused):
    """The coordinator asked for more than the policy allows; the site stays up and ends this link."""


class Tally:
    """How often each of any number of things was counted, in a megabyte: never too few, rarely a few too many."""

    def __init__(self, octets: bytes | None = None) -> None:
        cells = np.zeros(_ROWS * _COLUMNS, "<u2") if octets is None else np.frombuffer(octets, "<u2").copy()
        self._cells = cells.reshape(_ROWS, _COLUMNS)

    def add(self, thing: bytes) -> int:
        """Count `thing` once more; how often that was by now."""
        digest = hashlib.blake2b(thing, digest_size=4 * _ROWS).digest()
        places = [int.from_bytes(digest[4 * row : 4 * row + 4], "big") % _COLUMNS for row in range(_ROWS)]
        least = min(int(self._cells[row, place]) for row, place in enumerate(places))
        new = min(least + 1, _MOST)
        # Only cells that would fall behind: others count something else as well.
        for row, place in enumerate(places):
            self._cells[row, place] = max(int(self._cells[row, place]), new)
        return new

    def octets(self) -> bytes:
        """To be given to a new one."""
        return self._cells.tobytes()


class Rate:
    """A bucket of messages that fills with time."""

    def __init__(self, per_second: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._rate, self._clock = per_second, clock
        self._left, self._at = per_second * BURST_S, clock()

    def take(self) -> bool:
        """Whether one more is within the rate."""
        now = self._clock()
        self._left = min(self._rate * BURST_S, self._left + (now - self._at) * self._rate)
        self._at = now
        if self._left < 1:
            return False
        self._left -= 1
        return True


class Times:
    """How often each step was asked for. Only the highest, and those asked for again, are kept.

    Args:
        said: what `kept` gave.
        before: below the first step.
    """

    def __init__(self, said: Mapping[str, Any], before: int) -> None:
        self.highest = int(said.get("highest", before))
        self._repeats = {int(step): int(times) for step, times in said.get("repeats", {}).items()}

    def add(self, step: int) -> int:
        """Once more; how often now."""
        if step > self.highest:
            self.highest = step
            return 1
        times = self._repeats[step] = self._repeats.get(step, 1) + 1
        return times

    def kept(self) -> dict[str, Any]:
        """For the file."""
        return {"highest": self.highest, "repeats": self._repeats}


class Budgets:
    """What was asked for in one run.

    Args:
        folder: the run's; None: nothing is written.
        bounds: [policy].

    Raises:
        DataError: the counts cannot be read.
    """

    def __init__(self, folder: Path | None, bounds: Bounds) -> None:
        self._folder, self._bounds = folder, bounds
        said = _read(folder / FILE) if folder is not None else {}
        self._rollbacks = int(said.get("rollbacks", 0))
        self._steps = Times(said, before=0)
        self._losses = Times(said.get("losses", {}), before=0)
        self._averages = {
            int(seat): Times(times, before=-1) for seat, times in said.get("averages", {}).items()
        }
        self._left_out = [str(seat) for seat in said.get("left_out", [])]
        path = folder / TALLY if folder is not None else None
        octets = path.read_bytes() if path is not None and path.exists() and not path.is_symlink() else None
        self._tally = Tally(octets if octets is not None and len(octets) == 2 * _ROWS * _COLUMNS else None)
        self._unwritten = 0
        self._rate = Rate(bounds.max_messages_per_s)

    def message(self) -> None:
        """SP-11.15-4: one more from the coordinator. Raises BudgetSpent."""
        if not self._rate.take():
            raise BudgetSpent(
                f"more than {self._bounds.max_messages_per_s} messages a second (max_messages_per_s)"
            )

    def computed(self, forward: Forward) -> None:
        """SP-11.15-2: a batch that is about to be computed and sent. Raises BudgetSpent."""
        if forward.mode == "train":
            self._within(self._steps.add(forward.step), f"step {forward.step} was asked for")
            return
        most = self._bounds.max_window_evaluations
        for sample in forward.samples:
            times = self._tally.add(sample.key + repr(sample.origin).encode())
            if times > most:
                self.flush()
                raise BudgetSpent(
                    f"one window was asked for more than {most} times in evaluations (max_window_evaluations)"
                )
        self._unwritten += len(forward.samples)
        if self._unwritten >= FLUSH:
            self.flush()

    def logits(self, step: int) -> None:
        """SP-11.20-7: the gradient of a step's logits is about to be computed and sent. Raises BudgetSpent."""
        self._within(self._losses.add(step), f"the loss of step {step} was asked for")

    def predicted(self, key: bytes, without: str) -> None:
        """SP-11.20-10: a prediction of a patient is about to be scored. Raises BudgetSpent.

        Args:
            without: the seat that was left out; empty: none. The site does not know the seats of others, so their
                number is bounded, and names do not begin a count of their own.
        """
        if without and without not in self._left_out:
            if len(self._left_out) >= MOST_SEATS:
                raise BudgetSpent(f"predictions without more than {MOST_SEATS} different seats in one run")
            self._left_out.append(without)
            self._write()
        most = min(self._bounds.max_window_evaluations * (1 + len(self._left_out)), _MOST - 1)
        if self._tally.add(b"prediction" + key) > most:
            self.flush()
            raise BudgetSpent(
                f"a patient was scored more than {most} times in one run (max_window_evaluations, with all seats and "
                "without each)"
            )
        self._unwritten += 1

    def average(self, step: int, seat: int) -> None:
        """SP-11.16-9: one more average after `step`, for a place in `seats`. Raises BudgetSpent."""
        times = self._averages.setdefault(seat, Times({}, before=-1)).add(step)
        self._within(times, f"an average after step {step} came")

    def rollback(self) -> None:
        """SP-11.15-3: one more. Raises BudgetSpent."""
        if self._rollbacks >= self._bounds.max_rollbacks:
            raise BudgetSpent(f"more than {self._bounds.max_rollbacks} rollbacks in one run (max_rollbacks)")
        self._rollbacks += 1
        self._write()

    def flush(self) -> None:
        """Have the counts on disk."""
        self._write()
        if self._unwritten and self._folder is not None:
            self._unwritten = 0
            _replace(self._folder / TALLY, self._tally.octets())

    def _within(self, times: int, what: str) -> None:
        if times > self._bounds.max_step_repeats:
            self._write()
            raise BudgetSpent(f"{what} more than {self._bounds.max_step_repeats} times (max_step_repeats)")
        if times % 10 == 0:
            self._write()

    def _write(self) -> None:
        if self._folder is None:
            return
        averages = {seat: times.kept() for seat, times in self._averages.items()}
        value = {**self._steps.kept(), "rollbacks": self._rollbacks, "averages": averages}
        if self._left_out:
            value["left_out"] = self._left_out
        if self._losses.highest:
            value["losses"] = self._losses.kept()
        _replace(self._folder / FILE, json.dumps(value).encode())


def new_run(state: Path, bounds: Bounds, now: float | None = None) -> None:
    """SP-11.15-5: a run that this site has not seen is taken up. Raises BudgetSpent: too many of them today."""
    at = time.time() if now is None else now
    began = [then for then in _read(state / DAY).get("runs", []) if at - DAY_S < then <= at]
    if len(began) >= bounds.max_runs_per_day:
        raise BudgetSpent(f"more than {bounds.max_runs_per_day} new runs within 24 hours (max_runs_per_day)")
    durable.make_folder(state)
    _replace(state / DAY, json.dumps({"runs": [*began, at]}).encode())


def new_inference(state: Path, bounds: Bounds, request: bytes, key: bytes, now: float | None = None) -> None:
    """SP-11.19-4: a request that this site takes part in; told again, it counts once.

    Args:
        key: of the patient. Another one under the same request counts as another request.

    Raises:
        BudgetSpent: too many of them today.
        DataError: the counts cannot be read or written.
    """
    at = time.time() if now is None else now
    said = _read(state / INFERENCES).get("requests", {})
    known = {one: then for one, then in said.items() if at - DAY_S < then <= at}
    name = hashlib.sha256(request + key).hexdigest()
    if name in known:
        return
    if len(known) >= bounds.max_inferences_per_day:
        raise BudgetSpent(
            f"more than {bounds.max_inferences_per_day} requests for segmentations within 24 hours "
            "(max_inferences_per_day)"
        )
    durable.make_folder(state)
    _replace(state / INFERENCES, json.dumps({"requests": {**known, name: at}}).encode())


def _read(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes()) if path.exists() else {}
    except (OSError, ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise DataError(f"{path}: cannot be read: remove it, and this site's counts start at zero")
    return value


def _replace(path: Path, octets: bytes) -> None:
    """A full disk costs the count, not the run."""
    try:
        durable.replace(path, octets)
    except OSError:
        return
