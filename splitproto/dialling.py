"""Dialling: `dial` resolves a name, tries its addresses, and says what was wrong if nobody answers.

It ends with an admitted `Session`, over ZeroMQ or over any lane that can be dialled.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import socket as tcp
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from . import constants
from .connection import Connection, Timing
from .errors import DeadlineExceeded, LinkLost, SplitprotoError
from .hosts import without_zone
from .identity import AllowList, Credentials, Identity
from .lanes.addresses import dialled_address, format_address
from .lanes.base import Dialled
from .lanes.memory import MemoryLane
from .lanes.zeromq import Context, Dealer
from .negotiation import Offer
from .recheck import files_digest
from .session import Session
from .states import Side
from .vigil import Vigil

log = logging.getLogger(__name__)


async def dial(
    address: str | MemoryLane,
    credentials: Credentials,
    allow: AllowList,
    offer: Offer | None = None,
    *,
    timing: Timing | None = None,
    context: Context | None = None,
) -> Session:
    """Connect to a coordinator and wait until both sides have admitted each other.

    Args:
        address: `tcp://host:port`, or a lane of this process; the listener's certificate must name the host.
        credentials: this side's certificate, key and CA; read again.
        allow: who may answer.
        context: ZeroMQ's, if not the process's own.

    Raises:
        AddressError: `address` cannot be dialled.
        LinkLost: nobody there, name unknown (`retry` is True).
        SplitprotoError: refused, by either side; `retry` says whether trying again can help.
    """
    ours = _Ours(credentials, allow, offer or Offer(), timing or Timing())
    if isinstance(address, MemoryLane):
        try:
            return await _dial(address.end, address.address, address.host, ours)
        except _NobodyThere as error:
            raise error.cause from None
    host, port = dialled_address(address)
    # libzmq tries only the first address of a name; a coordinator often serves just one of IPv6 and IPv4.
    *others, last = await _resolve(host, port, ours.timing.handshake)
    for other in others:
        try:
            return await _dial(partial(Dealer, other, context), other, host, ours)
        except _NobodyThere as error:
            log.info("%s: %s; trying the next address of %s", other, error.cause, host)
    try:
        return await _dial(partial(Dealer, last, context), last, host, ours)
    except _NobodyThere as error:
        raise await _diagnose(host, port, error.cause) from None


@dataclass(frozen=True, slots=True)
class _Ours:
    """What this side brings to a link."""

    credentials: Credentials
    allow: AllowList
    offer: Offer
    timing: Timing


class _NobodyThere(Exception):
    """Nothing came back from one address; not raised outside this module."""

    def __init__(self, cause: SplitprotoError) -> None:
        self.cause = cause


async def _resolve(host: str, port: int, timeout: float) -> list[str]:
    """ZeroMQ endpoints of every address of `host`, in the system's order of preference."""
    try:
        async with asyncio.timeout(timeout):
            found = await asyncio.get_running_loop().getaddrinfo(host, port, type=tcp.SOCK_STREAM)
    except TimeoutError:
        raise DeadlineExceeded(f"the name {host} was not resolved within {timeout:g} s") from None
    except (OSError, UnicodeError) as error:
        raise LinkLost(
            f"the name {host} is unknown: check [network] coordinator and DNS", detail=str(error)
        ) from None
    hosts = []
    for _, _, _, _, at in found:
        scope = f"%{at[3]}" if len(at) == 4 and at[3] else ""
        hosts.append(f"{at[0]}{scope}")
    return [format_address(one, port) for one in dict.fromkeys(hosts)]


async def _dial(open_end: Callable[[], Dialled], at: str, host: str, ours: _Ours) -> Session:
    """One attempt.

    Args:
        open_end: makes the dialling end.
        at: where it leads, for logs.
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
    end = open_end()
    session = Session(connection, end)
    session.address = at
    end.start(session)
    try:
        await session.established()
    except SplitprotoError as error:
        if session.bytes_in:
            raise
        raise _NobodyThere(error) from None
    except asyncio.CancelledError:
        session.carrier_lost(LinkLost("gave up"))
        raise
    vigil = Vigil(ours.credentials, ours.timing.recheck, lambda _, error: log.warning("%s", error))
    vigil.watch(session, own, files, at)
    session.ended.add_done_callback(lambda _: vigil.close())
    return session


async def _diagnose(host: str, port: int, error: SplitprotoError) -> SplitprotoError:
    """Name the cause of a failed connection by trying plain TCP once."""
    if not isinstance(error, LinkLost | DeadlineExceeded):
        return error
    try:
        async with asyncio.timeout(3):
            _, writer = await asyncio.open_connection(host, port)
        writer.close()
    except TimeoutError:
        return LinkLost(f"no answer from {host} port {port}: a firewall, or the wrong address")
    except ConnectionRefusedError:
        return LinkLost(f"nothing listens at {host} port {port}: is the coordinator running?")
    except OSError as cause:
        return LinkLost(f"cannot reach {host} port {port}: {cause.strerror or cause}")
    if isinstance(error, DeadlineExceeded):
        return DeadlineExceeded(
            f"{host} port {port} accepts connections but does not answer as a coordinator"
        )
    return LinkLost(
        f"{host} port {port} closes the connection at once: what listens there is not a coordinator, "
        "or something in between ends it"
    )
