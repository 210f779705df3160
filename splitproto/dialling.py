"""Dialling: `dial` tries the ways to a listener and says what was wrong if nobody answers.

It ends with an admitted `Session`, over ZeroMQ or over any lane that has a `Destination`.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from dataclasses import dataclass

from . import constants
from .connection import Connection, Timing
from .errors import LinkLost, SplitprotoError
from .hosts import without_zone
from .identity import AllowList, Credentials, Identity
from .lanes.base import Attempt, Destination
from .lanes.tcp_dial import TcpDestination
from .lanes.zeromq import Context
from .negotiation import Offer
from .recheck import files_digest
from .session import Session
from .states import Side
from .vigil import Vigil

log = logging.getLogger(__name__)


async def dial(
    address: str | Destination,
    credentials: Credentials,
    allow: AllowList,
    offer: Offer | None = None,
    *,
    timing: Timing | None = None,
    context: Context | None = None,
) -> Session:
    """Connect to a coordinator and wait until both sides have admitted each other.

    Args:
        address: `tcp://host:port`, or where a lane of another kind is reached; the listener's certificate must name
            the host.
        credentials: this side's certificate, key and CA; read again.
        allow: who may answer.
        context: ZeroMQ's, if not the process's own.

    Raises:
        AddressError: `address` cannot be dialled.
        LinkLost: no answer, or the name is unknown (`retry` is True).
        SplitprotoError: refused, by either side; `retry` says whether trying again can help.
    """
    ours = _Ours(credentials, allow, offer or Offer(), timing or Timing())
    goal = TcpDestination(address, context) if isinstance(address, str) else address
    last: _NobodyThere | None = None
    for attempt in await goal.attempts(ours.timing.handshake):
        if last is not None:
            log.info("%s; trying the next address of %s, %s", last, goal.host, attempt.at)
        try:
            return await _dial(attempt, goal.host, ours)
        except _NobodyThere as error:
            last = error
    if last is None:
        raise LinkLost(f"{goal.host} has no address: check [network] coordinator and DNS")
    raise await goal.diagnose(last.cause) from None


@dataclass(frozen=True, slots=True)
class _Ours:
    """What this side brings to a link."""

    credentials: Credentials
    allow: AllowList
    offer: Offer
    timing: Timing


class _NobodyThere(Exception):
    """Nothing came back from one address; not raised outside this module."""

    def __init__(self, at: str, cause: SplitprotoError) -> None:
        super().__init__(f"{at}: {cause}")
        self.cause = cause


async def _dial(attempt: Attempt, host: str, ours: _Ours) -> Session:
    """One attempt.

    Args:
        host: what the listener's certificate must name.

    Raises:
        _NobodyThere: nothing came back.
        SplitprotoError: as `dial`.
    """
    own, files = ours.credentials.identity, files_digest(ours.credentials)

    def authorise(peer: Identity) -> None:
        ours.allow.check(peer, own.federation)

    connection = Connection(
        Side.CLIENT,
        secrets.token_bytes(constants.LINK_ID_BYTES),
        ours.credentials.client_context(),
        own.sha256,
        authorise,
        ours.offer,
        asyncio.get_running_loop().time(),
        hostname=without_zone(host),
        timing=ours.timing,
    )
    end = attempt.open_end()
    session = Session(connection, end)
    session.address = attempt.at
    end.start(session)
    try:
        await session.established()
    except SplitprotoError as error:
        if session.bytes_in:
            raise
        raise _NobodyThere(attempt.at, error) from None
    except asyncio.CancelledError:
        session.carrier_lost(LinkLost("gave up"))
        raise
    vigil = Vigil(ours.credentials, ours.timing.recheck, lambda _, error: log.warning("%s", error))
    vigil.watch(session, own, files, attempt.at)
    session.ended.add_done_callback(lambda _: vigil.close())
    return session
