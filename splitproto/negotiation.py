"""What two sides agree on: a pure function of two offers (SP-10)."""

from __future__ import annotations

from dataclasses import dataclass

from .constants import DEFAULT_MAX_MESSAGE, PROTOCOL_VERSIONS
from .errors import FeatureMissing, VersionMismatch, printable
from .messages import Hello, Welcome

FEATURES = (
    "train", "evaluate", "average", "release", "fuse", "infer", "label", "probe",
    "dtype.f32", "dtype.bf16", "coding.f16", "coding.int8", "coding.int4", "coding.levels",
)  # fmt: skip
"""Features of version 1. The registry's names have no "/"; private ones are `<domain>/<name>` (SP-13)."""


@dataclass(frozen=True, slots=True)
class Offer:
    """What one side brings."""

    versions: tuple[int, ...] = PROTOCOL_VERSIONS
    features: tuple[str, ...] = FEATURES
    requires: tuple[str, ...] = ("dtype.f32",)
    max_message: int = DEFAULT_MAX_MESSAGE
    """Tensor octets of one message this side takes; also the credit it gives."""
    agent: str = "splitproto"


@dataclass(frozen=True, slots=True)
class Agreement:
    """What holds on a link after WELCOME."""

    version: int
    features: frozenset[str]
    receive_limit: int
    """Largest body this side takes."""
    send_limit: int
    """Largest body the peer takes, and the credit it gives at first."""
    peer_agent: str


def negotiate(own: Offer, hello: Hello) -> Agreement:
    """The listener's view of what both can do: highest common version, features of both.

    Raises:
        VersionMismatch: no common version.
        FeatureMissing: one side requires what the other lacks.
    """
    common = set(own.versions) & set(hello.versions)
    if not common:
        raise VersionMismatch(
            f"no common protocol version: the client speaks {_list(hello.versions)}, "
            f"the coordinator {_list(own.versions)}"
        )
    _require(own.requires, hello.features, "the client")
    _require(hello.requires, own.features, "the coordinator")
    return Agreement(
        version=max(common),
        features=frozenset(own.features) & frozenset(hello.features),
        receive_limit=own.max_message,
        send_limit=hello.max_message,
        peer_agent=printable(hello.agent),
    )


def confirm(own: Offer, welcome: Welcome) -> Agreement:
    """The dialler's check that the listener chose only what was offered.

    Raises:
        VersionMismatch, FeatureMissing: the listener chose something else (a downgrade, or a defect).
    """
    if welcome.version not in own.versions:
        raise VersionMismatch(
            f"the coordinator chose protocol version {welcome.version}, which was not offered"
        )
    if not set(welcome.features) <= set(own.features):
        raise FeatureMissing("the coordinator chose features that were not offered")
    _require(own.requires, welcome.features, "the coordinator")
    return Agreement(
        version=welcome.version,
        features=frozenset(welcome.features),
        receive_limit=own.max_message,
        send_limit=welcome.max_message,
        peer_agent=printable(welcome.agent),
    )


def _require(required: tuple[str, ...], offered: tuple[str, ...], who: str) -> None:
    missing = [name for name in required if name not in offered]
    if missing:
        raise FeatureMissing(f"{who} does not offer {', '.join(missing)}")


def _list(versions: tuple[int, ...]) -> str:
    return ", ".join(map(str, sorted(versions)))
