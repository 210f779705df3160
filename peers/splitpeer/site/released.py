"""What a site has released in a run with frozen encoders (SP-11.17): each window once, the same answer every time.

In the run's folder, `released.jsonl` holds a line for each question that was answered, durable before the answer
leaves: `{"batch": 3, "windows": [["<key in hexadecimal>", x, y, z], ...]}`. A line torn by a crash is of an answer that
never left.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from splitpeer.errors import DataError
from splitpeer.storage import durable, reading
from splitproto.errors import PolicyRefused
from splitproto.messages import Forward

NAME = "released.jsonl"
MOST_OCTETS = 1 << 30
"""Of the file: some ten million windows."""
_APPEND = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW

Window = tuple[bytes, int, int, int]
"""Key and origin."""


class Released:
    """The questions that one run has answered.

    Args:
        folder: the run's; None: they are not kept.

    Raises:
        DataError: what was kept cannot be read.
    """

    def __init__(self, folder: Path | None) -> None:
        self._path = folder / NAME if folder is not None else None
        self._questions: dict[int, tuple[Window, ...]] = {}
        self._numbers: dict[Window, int] = {}
        if self._path is not None:
            self._read(self._path)

    @property
    def windows(self) -> int:
        """How many windows have left."""
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

    def note(self, forward: Forward) -> None:
        """The batch was checked, and its answer is about to leave; durable when this returns. Raises DataError."""
        if self.knows(forward):
            return
        windows = _windows(forward)
        if self._path is not None:
            shown = [[key.hex(), *origin] for key, *origin in windows]
            line = json.dumps({"batch": forward.batch, "windows": shown}, separators=(",", ":"))
            try:
                _append(self._path, line.encode() + b"\n")
            except OSError as error:
                raise durable.refusal(error, f"{self._path}:", "[peer] state") from None
        self._take(forward.batch, windows)

    def _take(self, number: int, windows: tuple[Window, ...]) -> None:
        self._questions[number] = windows
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
                said = reading.parse(line)
                self._take(int(said["batch"]), tuple(map(_window, said["windows"])))
            if torn:
                os.truncate(path, len(octets) - len(torn))
        except (ValueError, TypeError, LookupError):
            raise DataError(
                f"{path}: damaged, so nobody knows what has left: this site cannot go on with the run; "
                "have the coordinator start a new one"
            ) from None
        except OSError as error:
            raise durable.refusal(error, f"{path}:", "[peer] state") from None


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
