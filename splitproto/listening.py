"""`Listener`: a door with one ZeroMQ lane, which is what a coordinator needs."""

from __future__ import annotations

from .connection import Timing
from .door import Door, Refused
from .identity import AllowList, Credentials
from .lanes.zeromq import Context, ZmqLane
from .negotiation import Offer


class Listener(Door):
    """A door at one TCP port; see `Door`.

    Args:
        address: `tcp://interface:port` to bind.
        context: ZeroMQ's, if not the process's own.
    """

    def __init__(
        self,
        address: str,
        credentials: Credentials,
        allow: AllowList,
        offer: Offer | None = None,
        *,
        timing: Timing | None = None,
        refused: Refused | None = None,
        context: Context | None = None,
    ) -> None:
        lane = ZmqLane(address, context)
        super().__init__([lane], credentials, allow, offer, timing=timing, refused=refused)
