"""A defence applied to a recording: the capture that would have been made, had the sites used it for what they sent.

A defence's randomness is a function of key and release, so with the site's key and f32 on the wire the new
activations are those of the live defence, octet for octet, for the same weights. Gradients stay as recorded: live,
the defence would also have changed what is learnt.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from splitpeer.captures.parts import PartWriter
from splitpeer.captures.reader import Capture
from splitpeer.captures.summary import cut_off
from splitpeer.defences.randomness import Release
from splitpeer.defences.stack import Stack, defend, make_stack
from splitpeer.errors import ConfigError, DataError
from splitpeer.models.registry import backbone_of
from splitproto.capture import Header, Party
from splitproto.errors import CodecError
from splitproto.messages import Activations, Forward, Sample

SOURCE = "splitproto/redefended-from"
"""Key of `Header.extensions`: last chain of the capture it was made of."""


@dataclass(frozen=True)
class Redefended:
    """What was made."""

    path: Path
    defences: tuple[str, ...]
    """As they are written, every parameter named."""
    messages: int
    """Activations that were defended."""
    last_chain: bytes
    repeats: bool
    """Whether a live peer with the same key would have sent the same octets; not so with differential privacy,
    whose noise is never the same twice."""


def redefend(
    capture: Capture,
    written: str,
    out: Path,
    key_of: Callable[[str], bytes],
    *,
    sites: Sequence[str] = (),
    key: bytes | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> Redefended:
    """Write `capture` again with the activations defended.

    Args:
        capture: of a coordinator (what sites sent) or of a site (what it sent).
        written: defences joined by `+`, as in `dropout:0.5+gaussian:1`.
        out: the new file; never overwritten.
        key_of: a site's 32 octets of defence key, by its name.
        sites: only these sites' activations; empty: all.
        key: 32 octets to encrypt the new capture with.
        progress: told how many messages were read.

    Raises:
        ConfigError: no such defence, or one that only training can apply.
        DataError: the capture was not sent as f32, is not whole, or a batch's forward is missing; or `out` exists.
    """
    header = capture.header
    if header.job is None or header.run is None:
        raise DataError("the capture names no job: nothing was trained while it was recorded")
    if header.job.precision != "f32":
        raise DataError(
            f"the capture was sent as {header.job.precision}: a defence acts before rounding; record a run in f32"
        )
    stacks = _stacks(header, written, key_of, sites)
    specs = next(iter(stacks.values())).specs
    samples: dict[tuple[str, str, int, int], tuple[Sample, ...]] = {}
    source = capture.verify()
    # One that a crash cut off is good up to there.
    if not source.whole and not cut_off(capture):
        raise DataError(
            f"the capture is not whole: {source.problem}; what is made of it would look as if it were"
        )
    try:
        writer = PartWriter(out, 0, None, _header(header, stacks, source.last_chain), key)
    except OSError as error:
        raise DataError(f"{out}: cannot be written ({error.strerror}): name a new file") from None
    except CodecError as error:
        out.unlink(missing_ok=True)
        raise DataError(f"the capture's header has no room for these defences: {error.reason}") from None
    done = 0
    try:
        for number, record in enumerate(capture.records(), start=1):
            message, head = record.message, record.head
            site = header.site if header.role == "client" else record.peer
            if isinstance(head, Forward):
                samples[record.peer, head.mode, head.step, head.batch] = head.samples
            elif isinstance(message, Activations) and site in stacks:
                place = (record.peer, message.mode, message.step, message.batch)
                if place not in samples or any(
                    len(t) != len(samples[place]) for t in message.tensors.values()
                ):
                    raise DataError(
                        f"the batch of step {message.step} is answered but was never ordered in this capture"
                    )
                release = Release(
                    header.run,
                    message.mode,
                    message.step,
                    message.batch,
                    samples[place],
                    nonce=secrets.token_bytes(16),
                )
                message = replace(message, tensors=defend(stacks[site], message.tensors, release))
                done += 1
            writer.append(writer.packed(message, record.time, record.peer, record.direction))
            progress(number)
        writer.end("closed", "")
    except OSError as error:
        out.unlink(missing_ok=True)
        raise DataError(f"{out}: cannot be written ({error.strerror}): free some space") from None
    except BaseException:
        # Half a capture would be taken for a whole one.
        writer.close()
        out.unlink(missing_ok=True)
        raise
    repeats = not any(d.kind.private for stack in stacks.values() for d in stack.defences)
    return Redefended(out, specs, done, writer.chain, repeats)


def _stacks(
    header: Header, written: str, key_of: Callable[[str], bytes], sites: Sequence[str]
) -> dict[str, Stack]:
    """One for each site whose activations the capture holds."""
    holds = {header.site: header.defences} if header.role == "client" else {
        party.site: party.defences for party in header.peers}  # fmt: skip
    if not holds:
        raise DataError("the capture names no site whose activations it holds")
    if unknown := sorted(set(sites) - set(holds)):
        raise ConfigError(f"{', '.join(unknown)}: not in this capture; it has {', '.join(holds)}")
    job = header.job
    if job is None:
        raise DataError("the capture names no job")
    channels = backbone_of(job).cut.channels
    stacks = {}
    for site, before in holds.items():
        if sites and site not in sites:
            continue
        stack = make_stack(
            written, key=key_of(site), channels=channels, dimensions=job.dimensions, after=before
        )
        if not stack:
            raise ConfigError("no defence is named: write one, such as dropout:0.5+gaussian:1")
        if live := [d.kind.name for d in stack.defences if not d.kind.offline]:
            raise ConfigError(
                f"{', '.join(live)} changes the training: record a run with it, it cannot be added"
            )
        stacks[site] = stack
    return stacks


def _header(header: Header, stacks: dict[str, Stack], source: bytes) -> Header:
    def said(party: Party) -> Party:
        return (
            replace(party, defences=(*party.defences, *stacks[party.site].specs))
            if party.site in stacks
            else party
        )

    own = stacks[header.site].specs if header.role == "client" and header.site in stacks else ()
    return replace(
        header,
        peers=tuple(map(said, header.peers)),
        defences=(*header.defences, *own),
        part=0,
        previous=None,
        encryption="none",
        salt=None,
        check=None,
        extensions={**(header.extensions or {}), SOURCE: source.hex()},
    )
