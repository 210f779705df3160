"""A recording as it would have been, had its sites defended what they sent.

`splitpeer replay --defence` writes it to a file, `splitpeer attack --defence` attacks it in memory: the bytes
are the same. A defence's randomness is a function of key and release, so with the site's key and f32 on the
wire the new activations are those of the live defence for the same weights. Gradients stay as recorded: live,
the defence would also have changed what is learnt. The defences themselves are an argument, so that captures
need no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np

from splitpeer.captures.parts import PartWriter
from splitpeer.captures.reader import Capture
from splitpeer.captures.summary import cut_off
from splitpeer.errors import DataError
from splitpeer.training.forms import shown
from splitproto.capture import Header, Party, Recorded
from splitproto.codings import words
from splitproto.errors import CodecError
from splitproto.messages import Activations, Forward, Inventory, Message
from splitproto.seats import Listed, by_seat, joined

SOURCE = "splitproto/redefended-from"
"""Key of `Header.extensions`: last chain of the capture it was made of."""
_Ordered = tuple[str, str, int, int, bytes]
"""Peer, mode, step and number of a batch, and its digest: a batch that was ordered again may hold other samples."""


class SiteDefences(Protocol):
    """The defences of one site."""

    @property
    def specs(self) -> tuple[str, ...]:
        """As they are written, every parameter named."""
        ...

    @property
    def repeats(self) -> bool:
        """Whether the same key gives the same octets again."""
        ...

    def __call__(
        self, tensors: Mapping[str, np.ndarray], run: bytes, forward: Forward, seat: str
    ) -> dict[str, np.ndarray]:
        """`tensors` of one seat (float32 [B, C, *spatial] by level), the answer to `forward`, as they would have left.

        `forward` holds the samples that the rows are of.
        """
        ...


@dataclass(frozen=True)
class DefendedRecord:
    """One message of a defended recording; tensors are read and defended when `message` is asked for."""

    time: float
    peer: str
    direction: str
    head: Message
    make: Callable[[], Message]

    @cached_property
    def message(self) -> Message:
        """Computed once: noise that is never the same twice must not differ between two accesses."""
        return self.make()


@dataclass(frozen=True)
class DefendedCapture:
    """`capture` with activations defended; made by `defended`.

    It has the `header` and `records` of a `Capture`, so attacks read it like one.
    """

    capture: Capture
    applied: Mapping[str, SiteDefences]
    """By site; what other sites sent is unchanged."""
    releases: int = 1
    """How often each batch is ordered and answered. The first time under its own number; further ones under
    numbers that the recording does not use, as a coordinator would that asks again."""

    @property
    def header(self) -> Header:
        """The recording's, with the defences announced."""
        header, applied = self.capture.header, self.applied

        def announced(party: Party) -> Party:
            if party.site not in applied:
                return party
            return replace(party, defences=(*party.defences, *applied[party.site].specs))

        own = applied[header.site].specs if header.role == "client" and header.site in applied else ()
        peers = tuple(map(announced, header.peers))
        return replace(header, peers=peers, defences=(*header.defences, *own))

    def records(self) -> Iterator[DefendedRecord]:
        """The messages in order.

        Raises:
            DataError: a batch is answered that was never ordered.
        """
        header = self.capture.header
        counts = self._batches() if self.releases > 1 else {}
        forwards: dict[_Ordered, Forward] = {}
        listed = {party.site: Listed(party.seats) for party in header.peers if party.seats}
        listed[header.site] = Listed(header.seats)
        for record in self.capture.records():
            head = record.head
            if isinstance(head, Inventory):
                listed[self._site(record)].hear(head)
            if isinstance(head, Forward):
                forwards[record.peer, head.mode, head.step, head.batch, head.digest] = head
            if not isinstance(head, Forward | Activations):
                yield _as_recorded(record)
                continue
            for again in range(self.releases):
                number = head.batch + again * counts.get((record.peer, head.mode, head.step), 0)
                if isinstance(head, Forward):
                    yield _ordered(record, replace(head, batch=number))
                else:
                    site = self._site(record)
                    yield self._answered(record, head, site, number, forwards, listed[site])

    def _site(self, record: Recorded) -> str:
        """Whose patients and activations a message is about."""
        header = self.capture.header
        return header.site if header.role == "client" else record.peer

    def _answered(
        self,
        record: Recorded,
        head: Activations,
        site: str,
        number: int,
        forwards: Mapping[_Ordered, Forward],
        listed: Listed,
    ) -> DefendedRecord:
        place = (record.peer, head.mode, head.step, head.batch, head.digest)
        if site in self.applied and place not in forwards:
            raise _never_ordered(head)
        new = replace(head, batch=number)

        def make() -> Message:
            message = record.message
            if not isinstance(message, Activations):
                return message
            if site not in self.applied:
                return replace(message, batch=number)
            forward = replace(forwards[place], batch=number)
            rows, parts = listed.rows(forward.samples), by_seat(message.tensors, listed.seats)
            for seat, tensors in parts.items():
                samples = tuple(forward.samples[row] for row in rows.get(seat, ()))
                if any(len(tensor) != len(samples) for tensor in tensors.values()):
                    raise _never_ordered(head)
                of = replace(forward, samples=samples, places=None)
                parts[seat] = self.applied[site](tensors, self.capture.header.run or b"", of, seat)
            return replace(message, batch=number, tensors=joined(parts, listed.seats))

        return DefendedRecord(record.time, record.peer, record.direction, new, make)

    def _batches(self) -> dict[tuple[str, str, int], int]:
        """How many numbers the batches of each peer, mode and step take up."""
        counts: dict[tuple[str, str, int], int] = {}
        for record in self.capture.records():
            if isinstance(head := record.head, Forward):
                place = (record.peer, head.mode, head.step)
                counts[place] = max(counts.get(place, 0), head.batch + 1)
        return counts


def defended(capture: Capture, applied: Mapping[str, SiteDefences], releases: int = 1) -> DefendedCapture:
    """`capture` as if its sites had used `applied`.

    Raises:
        DataError: no job was recorded, it was not sent as f32, or a window would leave more often than it may.
    """
    header = capture.header
    if header.job is None or header.run is None:
        raise DataError("the capture names no job: nothing was trained while it was recorded")
    if header.job.fusion is not None:
        raise DataError(
            "the capture is of a run with secure fusion: it holds masked integers, and no defence acts on them"
        )
    if header.job.frozen and releases > 1:
        raise DataError(
            "the capture is of a run with frozen encoders, where each window leaves once: several views of it do not "
            "exist"
        )
    if {*words(header.job.activations)} - {"f32"} or header.job.precision != "f32":
        form = shown(header.job.activations, header.job.precision)
        raise DataError(
            f"the capture was sent as {form}: a defence acts before rounding; record a run in f32"
        )
    return DefendedCapture(capture, applied, releases)


@dataclass(frozen=True)
class Written:
    """What `write_defended` made."""

    path: Path
    defences: tuple[str, ...]
    """As they are written, every parameter named."""
    messages: int
    """Activations that were defended."""
    last_chain: bytes
    repeats: bool
    """Whether a live peer with the same key would have sent the same octets; not so with differential privacy,
    whose noise is never the same twice."""


def write_defended(
    capture: Capture, applied: Mapping[str, SiteDefences], out: Path, *, key: bytes | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> Written:  # fmt: skip
    """Write `capture` again with the activations defended.

    Args:
        capture: of a coordinator (what sites sent) or of a site (what it sent).
        applied: the defences by site.
        out: the new file; never overwritten.
        key: 32 octets to encrypt the new capture with.
        progress: told how many messages were read.

    Raises:
        DataError: see `defended`; the capture is not whole; or `out` exists or cannot be written.
    """
    new = defended(capture, applied)
    source = capture.verify()
    # One that a crash cut off is good up to there.
    if not source.whole and not cut_off(capture):
        raise DataError(
            f"the capture is not whole: {source.problem}; a copy made from it would look as if it were"
        )
    header = replace(
        new.header, part=0, previous=None, encryption="none", salt=None, check=None,
        extensions={**(capture.header.extensions or {}), SOURCE: source.last_chain.hex()},
    )  # fmt: skip
    try:
        writer = PartWriter(out, 0, None, header, key)
    except OSError as error:
        raise DataError(f"{out}: cannot be written ({error.strerror}): name a new file") from None
    except CodecError as error:
        out.unlink(missing_ok=True)
        raise DataError(f"the capture's header has no room for these defences: {error.reason}") from None
    try:
        done = _copy(new, writer, progress)
        writer.end("closed", "")
    except BaseException as error:
        # Half a capture would be taken for a whole one.
        writer.close()
        out.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise DataError(f"{out}: cannot be written ({error.strerror}): free some space") from None
        raise
    specs = dict.fromkeys(spec for one in applied.values() for spec in one.specs)
    return Written(out, tuple(specs), done, writer.chain, all(one.repeats for one in applied.values()))


def _copy(new: DefendedCapture, writer: PartWriter, progress: Callable[[int], None]) -> int:
    """Write all records; returns how many activations were defended."""
    header, done = new.capture.header, 0
    for number, record in enumerate(new.records(), start=1):
        site = header.site if header.role == "client" else record.peer
        done += isinstance(record.head, Activations) and site in new.applied
        writer.append(writer.packed(record.message, record.time, record.peer, record.direction))
        progress(number)
    return done


def _as_recorded(record: Recorded) -> DefendedRecord:
    return DefendedRecord(record.time, record.peer, record.direction, record.head, lambda: record.message)


def _ordered(record: Recorded, head: Forward) -> DefendedRecord:
    return DefendedRecord(record.time, record.peer, record.direction, head, lambda: head)


def _never_ordered(head: Activations) -> DataError:
    return DataError(f"the batch of step {head.step} is answered but was never ordered in this capture")
