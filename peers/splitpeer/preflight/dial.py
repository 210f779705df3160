"""Whether the coordinator can be reached and admits us: one link, ended at once."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from datetime import UTC, datetime

from splitpeer.daemon.lock import holder
from splitpeer.daemon.witness import AGENT
from splitpeer.preflight.finding import Finding
from splitpeer.settings.peer import PeerConfig
from splitproto import Offer, SplitprotoError, dial
from splitproto.errors import SecureChannelError


def check_coordinator(config: PeerConfig) -> Iterator[Finding]:
    """Dial as the daemon would. One that runs has a link of its own, which must not be taken from it."""
    address = config.network.coordinator
    if address is None:
        return
    if holder(config.peer.state) is not None:
        yield Finding(
            "coordinator", "ok", "not dialled: the daemon runs and has its own link: see splitpeer status"
        )
        return
    try:
        text = asyncio.run(_dial(config, address))
    except SplitprotoError as error:
        why = str(error)
        if isinstance(error, SecureChannelError) and error.refused == "ours":
            end = config.credentials().identity.not_after
            if "revocation list" in why and datetime.now(UTC) < end:
                why += f" (ours is good until {end:%Y-%m-%d} by this clock: the fault is the list or the clock there)"
        yield Finding("coordinator", "problem", f"{address}: {why}", connection=True)
    else:
        yield Finding("coordinator", "ok", f"{address}: {text}")


async def _dial(config: PeerConfig, address: str) -> str:
    offer = Offer(agent=AGENT)
    session = await dial(
        address, config.credentials(), config.allow_list(), offer, timing=config.network.timing()
    )
    text = f"{session.peer.uri} lets us in, {session.tls}"
    await session.close("drain", "splitpeer doctor has checked the link")
    return text
