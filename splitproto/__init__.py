"""splitproto: the wire of split learning between hospitals, without torch.

The sans-IO core (`Connection` and below) knows no socket and no clock; `dial` and `Listener` run it over ZeroMQ
on asyncio, a `Door` over any lanes. Start with `examples/embedding/`, or with `spec/splitproto-1.md` for the octets.

A name is imported when it is asked for: a program that needs only the errors loads no TLS, numpy or ZeroMQ.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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

_HOMES = {
    "Agreement": "negotiation", "AllowList": "identity", "Connection": "connection", "Credentials": "identity",
    "Door": "door", "Identity": "identity", "Listener": "listening", "LocalError": "errors", "Offer": "negotiation",
    "RemoteError": "errors", "Session": "session", "Side": "states", "SplitprotoError": "errors",
    "Timing": "connection", "dial": "dialling",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *_HOMES]
