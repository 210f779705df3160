"""What a site has released to runs with frozen encoders (SP-11.17): each window once, the same answer every time.

In `[peer] state`, `released.jsonl` holds a line for each question that was answered, durable before the answer leaves:

    {"run": "<hex>", "encoders": ["<hex>"], "batch": 3, "windows": [["<patient's key>", x, y, z], ...],
     "people": ["<hex>"], "answer": "<SHA-256>"}

It outlives the folders of runs. A line torn by a crash is of an answer that never left.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from splitpeer.errors import DataError
from splitpeer.storage import durable, reading
from splitproto.errors import PolicyRefused, SiteFailed
from splitproto.fusion import answer_digest
from splitproto.messages import Forward

NAME = "released.jsonl"
MOST_OCTETS = 1 << 30
"""Of the file: some ten million windows."""
_APPEND = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW

Window = tuple[bytes, int, int, int]
"""Key and origin."""


@dataclass(frozen=True)
class Whose:
    """What a run's releases are of."""

    run: bytes = b""
    encoders: frozenset[str] = frozenset()
    """Digests of the encoders' weights, see `Encoders.identities`."""
    person: Callable[[bytes], str] = bytes.hex
    """Key of a patient -> the person at this site, whatever the federation."""
    once: bool = False
    """[policy] releases: whether another run may not ask for whom these encoders have shown."""


class Released:
    """The questions that a run has answered, and those that its encoders have answered in others.

    Args:
        folder: [peer] state; None: they are not kept.
        whose: the run.

    Raises:
        DataError: what was kept cannot be read.
    """

    def __init__(self, folder: Path | None, whose: Whose | None = None) -> None:
        self._path = folder / NAME if folder is not None else None
        self._whose = whose or Whose()
        self._questions: dict[int, tuple[Window, ...]] = {}
        self._answers: dict[int, str] = {}
        self._numbers: dict[Window, int] = {}
        self._elsewhere: set[str] = set()
        """People whom one of the encoders has shown in another run."""
        if self._path is not None:
            self._read(self._path)

    @property
    def windows(self) -> int:
        """How many windows have left in this run."""
        return len(self._numbers)

    @property
    def patients(self) -> int:
        """Of how many patients."""
        return len({window[0] for window in self._numbers})

    def knows(self, forward: Forward) -> bool:
        """Whether this very question was answered before."""
        return self._questions.get(forward.batch) == _windows(forward)

    def check(self, forward: Forward) -> None:
        """Whether a batch of mode `release` may be answered.

        Raises:
            PolicyRefused: it may not, now or ever.
        """
        # SP-11.17-3.
        if forward.step != 0 or forward.seed is not None or forward.places is not None:
            raise PolicyRefused("a release is of step 0, without a seed and without places")
        # SP-11.17-4: a window in two batches, or twice in one, would be met in several contexts.
        windows = _windows(forward)
        if len(set(windows)) < len(windows):
            raise PolicyRefused(f"release {forward.batch} asks for one window twice")
        known = self._questions.get(forward.batch)
        if known is not None and known != windows:
            raise PolicyRefused(f"release {forward.batch} was answered for other windows before")
        if known is None and (again := [w for w in windows if w in self._numbers]):
            first = self._numbers[again[0]]
            raise PolicyRefused(
                f"release {forward.batch} asks for {len(again)} windows that were released before, as of {first}"
            )
        # SP-11.17-9: of a patient and not of a window, which another run may cut otherwise.
        if self._whose.once and known is None and self._elsewhere.intersection(self._people(forward)):
            raise PolicyRefused(
                f"release {forward.batch} is of a patient whom this encoder has shown in another run "
                "(policy releases = once)"
            )

    def note(self, forward: Forward, tensors: Mapping[str, np.ndarray]) -> None:
        """The batch was checked, and its answer is about to leave; durable when this returns.

        Raises:
            SiteFailed: another answer left before (SP-11.17-5).
            DataError: it cannot be written down.
        """
        answer = answer_digest(tensors)
        if self.knows(forward):
            if answer != self._answers[forward.batch]:
                raise SiteFailed(
                    f"the answer to release {forward.batch} is not the one that was given before, and a second one "
                    "would show more: was this site's network, machine or data changed?"
                )
            return
        windows = _windows(forward)
        if self._path is not None:
            line = {
                "run": self._whose.run.hex(),
                "encoders": sorted(self._whose.encoders),
                "batch": forward.batch,
                "windows": [[key.hex(), *origin] for key, *origin in windows],
                "people": self._people(forward),
                "answer": answer,
            }
            try:
                _append(self._path, json.dumps(line, separators=(",", ":")).encode() + b"\n")
            except OSError as error:
                raise durable.refusal(error, f"{self._path}:", "[peer] state") from None
        self._take(forward.batch, windows, answer)

    # --- inside ----------------------------------------------------------------------------------------

    def _people(self, forward: Forward) -> list[str]:
        return sorted({self._whose.person(sample.key) for sample in forward.samples})

    def _take(self, number: int, windows: tuple[Window, ...], answer: str) -> None:
        self._questions[number], self._answers[number] = windows, answer
        self._numbers.update(dict.fromkeys(windows, number))

    def _read(self, path: Path) -> None:
        try:
            octets = reading.read(path, MOST_OCTETS)
        except FileNotFoundError:
            return
        except OSError as error:
            raise DataError(
                f"{path}: cannot be read ({error.strerror}); check the file and whose it is"
            ) from None
        whole, _, torn = octets.rpartition(b"\n")
        try:
            for line in whole.splitlines():
                self._read_line(reading.parse(line))
            if torn:
                os.truncate(path, len(octets) - len(torn))
        except (ValueError, TypeError, LookupError, AttributeError):
            raise DataError(
                f"{path}: damaged, so nobody knows what has left: this site cannot go on with the run; "
                "restore the file from a backup"
            ) from None
        except OSError as error:
            raise durable.refusal(error, f"{path}:", "[peer] state") from None

    def _read_line(self, said: Mapping[str, Any]) -> None:
        """Raises ValueError, TypeError, LookupError or AttributeError."""
        run, windows = bytes.fromhex(said["run"]), tuple(map(_window, said["windows"]))
        answer, people = str(said["answer"]), _texts(said["people"])
        if run == self._whose.run:
            self._take(int(said["batch"]), windows, answer)
        elif self._whose.encoders.intersection(_texts(said["encoders"])):
            self._elsewhere.update(people)


def _texts(shown: Collection[object]) -> list[str]:
    if not isinstance(shown, list):
        raise TypeError
    return [str(one) for one in shown]


def _windows(forward: Forward) -> tuple[Window, ...]:
    return tuple((sample.key, *sample.origin) for sample in forward.samples)


def _window(shown: list[object]) -> Window:
    """Raises ValueError or TypeError."""
    key, x, y, z = shown
    if not (isinstance(key, str) and isinstance(x, int) and isinstance(y, int) and isinstance(z, int)):
        raise TypeError
    return bytes.fromhex(key), x, y, z


def _append(path: Path, line: bytes) -> None:
    """A line at the end, synced. Raises OSError; then nothing of it stays."""
    fresh = not path.exists()
    file = os.open(path, _APPEND, 0o600)
    try:
        size = os.fstat(file).st_size
        try:
            left = memoryview(line)
            while left:
                left = left[os.write(file, left) :]
            os.fsync(file)
        except OSError:
            os.ftruncate(file, size)
            raise
    finally:
        os.close(file)
    if fresh:
        durable.sync_folder(path.parent)
