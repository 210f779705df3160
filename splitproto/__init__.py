"""splitproto: the wire of split learning between hospitals, without torch.

The sans-IO core (`Connection` and below) knows no socket and no clock; `dial` and `Listener` run it over ZeroMQ
on asyncio, a `Door` over any lanes. Start with `examples/embedding/`, or with `spec/splitproto-1.md` for the octets.
"""

from __future__ import annotations

from .connection import Connection, Timing
from .dialling import dial
from .door import Door
from .errors import LocalError, RemoteError, SplitprotoError
from .identity import AllowList, Credentials, Identity
from .listening import Listener
from .negotiation import Agreement, Offer
from .session import Session
from .states import Side

__version__ = "0.1.0"

__all__ = [
    "Agreement",
    "AllowList",
    "Connection",
    "Credentials",
    "Door",
    "Identity",
    "Listener",
    "LocalError",
    "Offer",
    "RemoteError",
    "Session",
    "Side",
    "SplitprotoError",
    "Timing",
    "dial",
]
