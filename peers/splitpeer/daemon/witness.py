"""What a role leaves for those who look later: its audit trail, always, and a capture, if asked. It never
changes what the role does, and what goes wrong here is a warning.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from splitpeer.captures.recorder import Limits, Recorder, RecorderState, read_key
from splitpeer.daemon import happenings as h
from splitpeer.daemon.clerk import Clerk
from splitpeer.daemon.sinks.log import LogSink
from splitpeer.daemon.sinks.trail import TrailSink
from splitpeer.errors import ConfigError, sayable
from splitpeer.settings.peer import PeerConfig
from splitproto import Session, __version__
from splitproto.capture import Header, Party, Sampling
from splitproto.messages import JobAccept, JobOffer, Probe, Probed
from splitproto.records import Job, Seat
from splitproto.secretfile import how_to_close, open_to_others

log = logging.getLogger(__name__)

AGENT = f"splitpeer/{__version__}"


class Witness:
    """What one process of one peer has seen.

    Args:
        config: `peer.toml`; its [capture] says how to record, [peer] state where the trail lies.
        curious: file to record into; None: no capture.

    Raises:
        ConfigError: this site may not record, or the key file cannot be used.
        DataError: the capture cannot be written there.
    """

    def __init__(self, config: PeerConfig, curious: Path | None = None) -> None:
        if curious is not None and config.policy is not None and not config.policy.may_record:
            raise ConfigError(f"{config.source}: [policy] may_record is false: start without --curious")
        self._config, self._path = config, curious
        self._clerk = Clerk(config.peer.state)
        self._report = h.Reporter(TrailSink(self.note), LogSink(log))
        self._run: bytes | None = None
        self._said: dict[str, Any] = {}
        self._key: bytes | None = None
        self._recorder: Recorder | None = None
        if curious is not None:
            self._key = _private(config.capture.key) if config.capture.key is not None else None
            self._recorder = self._new_recorder(curious)

    # --- the trail -------------------------------------------------------------------------------------

    @asynccontextmanager
    async def on_duty(self, **fields: Any) -> AsyncIterator[None]:
        """Notes the peer's start and its stop, and ends the capture in between.

        Raises:
            ConfigError, DiskTrouble: the trail cannot be begun.
        """
        peer = self._config.peer
        self._clerk.begin(
            "peer.start", role=peer.role, site=peer.site, federation=peer.federation, agent=AGENT, **fields
        )
        cause = "done"
        try:
            yield
        except BaseException as error:
            cause = sayable(error)
            raise
        finally:
            await self._end_capture(
                "closed" if cause == "done" else "failed", "" if cause == "done" else cause
            )
            self.note("peer.stop", cause=cause)
            await self._clerk.close()

    def note(self, name: str, **fields: Any) -> None:
        """One line of the trail, soon."""
        self._clerk.note(name, **fields)

    # --- the capture -----------------------------------------------------------------------------------

    @property
    def recorded(self) -> bool:
        """What SP-11-29 asks a side to say."""
        return self._recorder is not None and self._recorder.state.ended is None

    def listen(self, session: Session) -> None:
        """A new link: whose it is goes to the trail, what it carries to the capture."""
        self._report(h.PeerLinked(session.peer.site, session.peer.role, session.tls))
        peer = session.peer.site

        def tap(direction: str, message: Any) -> None:
            # Asked each time: a capture may end, or be followed by another, while a link lives.
            if self._recorder is not None and not isinstance(message, Probe | Probed):
                self._recorder.tap(peer, direction, message)

        session.tap = tap

    def heard(self, peer: str, said: JobOffer | JobAccept) -> None:
        """SP-11-29, SP-11-30: what a peer announced about itself; in log and trail where it is new."""
        defences = None if said.defences is None else list(said.defences)
        if self._said.get(peer) == (said.recorded, defences):
            return
        self._said[peer] = (said.recorded, defences)
        self._report(h.PeerAnnounced(peer, said.recorded, defences))

    def start(
        self,
        run: bytes,
        job: Job,
        schema: bytes,
        peers: Iterable[Party],
        *,
        seats: Iterable[Seat] = (),
        defences: tuple[str, ...] = (),
        features: Iterable[str] = (),
    ) -> None:
        """The job and what the peers announced are known: write the header. Again for the same run: nothing."""
        if self._path is None or self._recorder is None or run == self._run:
            return
        self._run = run
        peer = self._config.peer
        header = Header(
            role=peer.role,
            site=peer.site,
            federation=peer.federation,
            agent=AGENT,
            created=time.time(),
            run=run,
            seats=tuple(seats),
            job=job,
            schema=schema,
            peers=tuple(peers),
            defences=defences,
            features=tuple(sorted(features)),
        )
        self._recorder.open(header)
        self._report(h.CaptureStarted(self._path.name, self._key is not None, run.hex()))

    async def expect(self, run: bytes) -> None:
        """This run is next: if another one is being recorded, that capture ends, and a new one waits for `start`."""
        if self._path is None or self._run in (None, run):
            return
        await self._end_capture("closed", "another run began")
        self._run, self._recorder = None, self._new_recorder(self._path)

    def _new_recorder(self, path: Path) -> Recorder:
        settings = self._config.capture
        return Recorder(
            path,
            limits=Limits(part=settings.rotate_mib << 20, total=settings.max_mib << 20),
            sampling=Sampling(settings.every, settings.keys),
            key=self._key,
        )

    async def _end_capture(self, reason: str, text: str) -> None:
        recorder, self._recorder = self._recorder, None
        if recorder is None:
            return
        state: RecorderState = await asyncio.to_thread(recorder.close, reason, text)
        if self._run is None:
            return
        chain = state.last_chain.hex() if state.last_chain else ""
        self._report(
            h.CaptureEnded(state.path.name, str(state.ended), state.records, state.octets, state.lost, chain)
        )


def _private(path: Path) -> bytes:
    """The key that encrypts a capture, if nobody else can read it."""
    if not path.exists():
        raise ConfigError(f"{path}: no such key: make one with (umask 077; openssl rand -out {path} 32)")
    if open_to_others(path):
        raise ConfigError(f"{path}: the capture's key is open to group or others: {how_to_close(path)}")
    return read_key(path)
