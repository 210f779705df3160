"""Records a running peer without disturbing it: `tap` keeps a reference, a thread does the rest. Training
never waits for the disk and never fails because of it: messages that cannot be kept become a gap, and a full
disk ends the recording with one warning.
"""

from __future__ import annotations

import errno
import logging
import os
import threading
import time
from collections import deque
from dataclasses import dataclass, replace
from pathlib import Path

from splitpeer.errors import ConfigError, DataError
from splitpeer.logs import event
from splitproto.capture import Header, Sampling
from splitproto.capture_records import KEY_BYTES
from splitproto.errors import printable
from splitproto.messages import Message

from .appended import BLOCK
from .parts import PartWriter, continued
from .sampling import Chooser

log = logging.getLogger(__name__)

_SMALL = 512
"""What a message takes of the queue in addition to its tensors."""
_END_ROOM = 2 * BLOCK
"""Kept free under every cap, so that gap and end still fit."""
_POLL_S = 0.5
_FULL = {errno.ENOSPC: "disk", errno.EDQUOT: "disk", errno.EFBIG: "size"}


@dataclass(frozen=True)
class Limits:
    """What a recorder may take, in octets."""

    queue: int = 512 << 20
    """Bytes of messages that wait for the disk; more are left out."""
    early: int = 16 << 20
    """Bytes of messages held back until the header is known."""
    part: int = 4 << 30
    """Bytes of one file; then the next one begins. A message longer than this has a file of its own."""
    total: int = 64 << 30
    """Bytes of all files of this recording; then it ends."""
    spare: int = 256 << 20
    """Left free on the disk: checkpoints need it more."""


@dataclass(frozen=True)
class RecorderState:
    """The state of a recording, for logs and the audit trail."""

    path: Path
    """The newest file."""
    records: int
    """Messages written, in all files."""
    octets: int
    """Written, in all files."""
    lost: int
    """Messages that were to be kept and were not."""
    last_chain: bytes | None
    """Chain of the newest whole record; None before there is a file."""
    ended: str | None
    """Why the recording ended: closed, size, disk or failed; None while it continues."""


@dataclass(frozen=True)
class _Tapped:
    time: float
    peer: str
    direction: str
    message: Message
    octets: int


@dataclass(frozen=True)
class _Gap:
    reason: str
    records: int
    octets: int


class Recorder:
    """Records one run of one peer into `path` and, as it grows, `coord.1.cap`, `coord.2.cap`, ...

    Args:
        path: the first file. Nothing is ever overwritten: see `parts.continued`.
        limits: see `Limits`.
        sampling: which batches to keep.
        key: 32 octets, to encrypt with; see `read_key`.

    Raises:
        DataError: the folder cannot be written to.
        ConfigError: a sampled key that is not hexadecimal, or a key of another length.
    """

    def __init__(
        self,
        path: Path,
        *,
        limits: Limits | None = None,
        sampling: Sampling | None = None,
        key: bytes | None = None,
    ) -> None:
        if key is not None and len(key) != KEY_BYTES:
            raise ConfigError(f"a capture's key has {KEY_BYTES} bytes, not {len(key)}")
        if path.is_dir() or not os.access(path.parent, os.W_OK | os.X_OK):
            raise DataError(f"{path}: cannot record there: name a file in a folder that can be written to")
        self._asked, self._key = path, key
        self._limits, self._sampling = limits or Limits(), sampling or Sampling()
        self._chooser = Chooser(self._sampling)
        self._thread: threading.Thread | None = None
        # Under the lock: what waits for the thread, and what both sides must know.
        self._changed = threading.Condition()
        self._queue: deque[_Tapped | _Gap] = deque()
        self._waiting = 0
        self._skipped = _Gap("", 0, 0)
        self._header: Header | None = None
        self._closing: tuple[str, str] | None = None
        self._state = RecorderState(path, 0, 0, 0, None, None)

    @property
    def state(self) -> RecorderState:
        """As of now."""
        with self._changed:
            return self._state

    def tap(self, peer: str, direction: str, message: Message) -> None:
        """Note that `message` was sent to ("out") or came from ("in") `peer`. Costs microseconds; never raises.

        Only a reference is kept, so the arrays must not change afterwards, and they do not: outgoing ones are
        read-only views of a graph's results, which nothing computes in place on once they have left; incoming
        ones become leaves or gradients, which autograd only reads (tests/splitpeer/captures holds it to that).
        """
        now, octets = time.time(), 0
        for array in getattr(message, "tensors", {}).values():
            octets += array.nbytes
        with self._changed:
            if self._closing or not self._chooser.keeps(peer, message):
                return
            early = self._header is None
            if self._state.ended or self._waiting + octets + _SMALL > (
                self._limits.early if early else self._limits.queue
            ):
                cause = "early" if early else "queue"
                self._skipped = _Gap(cause, self._skipped.records + 1, self._skipped.octets + octets)
                self._state = replace(self._state, lost=self._state.lost + 1)
                return
            self._note_skipped()
            self._queue.append(_Tapped(now, peer, direction, message, octets))
            self._waiting += octets + _SMALL
            self._changed.notify()

    def open(self, header: Header) -> None:
        """The header is known (part, previous, sampling, block and encryption are filled in here): begin to write.

        Never raises: where the file cannot be made, a warning says so and nothing is recorded. Only the first
        call counts.
        """
        with self._changed:
            if self._header is not None or self._closing:
                return
            self._note_skipped()
            self._header = header = replace(header, sampling=self._sampling, block=BLOCK)
        # No daemon: it has octets to write when the interpreter ends.
        self._thread = threading.Thread(target=self._work, args=(header,), name="recorder")
        self._thread.start()

    def close(self, reason: str = "closed", text: str = "", timeout: float = 60.0) -> RecorderState:
        """Write the waiting messages and the end record, and wait at most `timeout` seconds for that. Idempotent;
        never raises.

        Without `open` there is no file.

        Args:
            reason: closed or failed.
            text: one line for people.
        """
        with self._changed:
            if not self._closing:
                self._closing = (reason, printable(text)[:500])
            self._changed.notify()
        if self._thread is not None:
            self._thread.join(timeout)
        return self.state

    def _note_skipped(self) -> None:
        if self._skipped.records:
            self._queue.append(self._skipped)
            self._skipped = _Gap("", 0, 0)

    # --- the thread -------------------------------------------------------------------------------------------

    def _work(self, header: Header) -> None:
        files = _Files(self._asked, header, self._key, self._limits)
        try:
            files.begin()
            self._progress(files)
            reason, text = self._drain(files)
            files.end(reason, text)
        except OSError as error:
            reason, text = _FULL.get(error.errno or 0, "failed"), error.strerror or str(error)
            files.give_up(reason, text)
        except Exception as error:
            # Training must not be disturbed; the log reports it.
            reason, text = "failed", f"{type(error).__name__}: {error}"
            files.give_up(reason, text)
        with self._changed:
            dropped = sum(isinstance(one, _Tapped) for one in self._queue)
            self._queue.clear()
            self._waiting = 0
            self._state = replace(self._state, lost=self._state.lost + dropped, ended=reason)
        self._progress(files)
        if not self._closing or (reason, text) != self._closing:
            state = self.state
            event(
                log, "capture.ended", logging.WARNING, file=state.path.name, cause=reason, why=text,
                messages=state.records, octets=state.octets, lost=state.lost,
            )  # fmt: skip

    def _drain(self, files: _Files) -> tuple[str, str]:
        """Write what comes until the end, and say why that is."""
        while True:
            with self._changed:
                while not self._queue and not self._closing:
                    self._changed.wait(_POLL_S)
                    if not threading.main_thread().is_alive():
                        self._closing = ("failed", "the process ended without closing the capture")
                if not self._queue:
                    self._note_skipped()
                if not self._queue:
                    assert self._closing is not None  # noqa: S101  (nothing else ends the wait)
                    return self._closing
                item, behind = self._queue[0], self._waiting > self._limits.queue // 2
            if isinstance(item, _Gap):
                files.gap(item)
            elif left := files.message(item, behind):
                return left
            with self._changed:
                # Only now: a message being written still takes memory.
                self._queue.popleft()
                if isinstance(item, _Tapped):
                    self._waiting -= item.octets + _SMALL
            del item  # it holds arrays
            self._progress(files)

    def _progress(self, files: _Files) -> None:
        with self._changed:
            self._state = replace(
                self._state,
                path=files.path,
                records=files.records,
                octets=files.octets,
                last_chain=files.chain,
            )


class _Files:
    """The files of a recording, under its caps. Belongs to the thread."""

    def __init__(self, asked: Path, header: Header, key: bytes | None, limits: Limits) -> None:
        self.path, self._header, self._key, self._limits = asked, header, key, limits
        self._now: PartWriter | None = None
        self._first = asked
        self._closed_octets = 0
        self.records = 0
        self.chain: bytes | None = None

    def begin(self) -> None:
        """Make the first file."""
        self._first, part, previous = continued(self.path, self._header)
        self._next(part, previous)

    @property
    def octets(self) -> int:
        """In all files."""
        return self._closed_octets + (self._now.octets if self._now else 0)

    def message(self, tapped: _Tapped, behind: bool) -> tuple[str, str] | None:
        """Write one; or say why it does not fit, and the recording is to end.

        `behind`: many are waiting, so the system's cache takes what the disk cannot yet.
        """
        now = self._file
        buffers = now.packed(tapped.message, tapped.time, tapped.peer, tapped.direction)
        needed = sum(map(len, buffers)) + _END_ROOM
        left = None
        if self.octets + needed > self._limits.total:
            left = ("size", "it is as large as it may become")
        elif now.free < needed + self._limits.spare:
            left = ("disk", "the disk is almost full")
        if left is not None:
            now.take_back()
            return left
        if now.octets + needed > self._limits.part and now.messages:
            now.take_back()
            now.end("rotated", "")
            now = self._next(now.part + 1, now.chain)
            buffers = now.packed(tapped.message, tapped.time, tapped.peer, tapped.direction)
        now.append(buffers, direct=not behind)
        self.records += 1
        self.chain = now.chain
        return None

    def gap(self, gap: _Gap) -> None:
        """Record a gap."""
        self._file.gap(gap.reason, gap.records, gap.octets)
        self.chain = self._file.chain
        event(
            log, "capture.gap", logging.WARNING, file=self.path.name, cause=gap.reason, messages=gap.records
        )

    def end(self, reason: str, text: str) -> None:
        """Close in good order."""
        self._file.end(reason, text)
        self.chain = self._file.chain

    def give_up(self, reason: str, text: str) -> None:
        """After an error: keep the whole records, and an end record if it can still be written."""
        if self._now is None:
            return
        try:
            if self._now.can_end:
                self._now.end(reason, printable(text)[:500])
                self.chain = self._now.chain
        except (OSError, ValueError) as error:
            log.debug("the capture has no end: %s", error)
        finally:
            self._now.close()

    @property
    def _file(self) -> PartWriter:
        assert self._now is not None  # noqa: S101  (`begin` comes first)
        return self._now

    def _next(self, part: int, previous: bytes | None) -> PartWriter:
        if self._now is not None:
            self._closed_octets += self._now.octets
        self._now = PartWriter(self._first, part, previous, self._header, self._key)
        self.path, self.chain = self._now.path, self._now.chain
        return self._now


def read_key(path: Path) -> bytes:
    """The key in `path`.

    Raises:
        DataError: it cannot be read, or is not 32 octets.
    """
    try:
        with path.open("rb") as file:
            key = file.read(KEY_BYTES + 1)
    except OSError as error:
        raise DataError(f"{path}: cannot read the key: {error.strerror}") from error
    if len(key) != KEY_BYTES:
        raise DataError(f"{path}: a capture's key is a file of {KEY_BYTES} bytes")
    return key
