"""The one grammar of addresses: ``tcp://host:port``, as settings, listeners and diallers read it."""

from __future__ import annotations

import re

from splitproto.errors import AddressError
from splitproto.hosts import host_name

__all__ = ["dialled_address", "format_address", "parse_address", "served_address"]

_ADDRESS = re.compile(r"tcp://(\[[^\[\]/?#@]+\]|[^\[\]/?#@:]+):(\d{1,5})", re.IGNORECASE)


def parse_address(address: str) -> tuple[str, int]:
    """Host (`host_name`, or ``*``) and port of ``tcp://host:port``; an IPv6 address loses its brackets.

    Raises:
        AddressError: not such an address; the text says why.
    """
    match = _ADDRESS.fullmatch(address.removesuffix("/"))
    if match is None or int(match[2]) >= 2**16:
        raise AddressError(f"{address!a} is not an address: write tcp://host:port")
    # RFC 6874 writes the zone's percent sign as %25.
    host, bracketed = match[1].strip("[]").replace("%25", "%"), match[1].startswith("[")
    if host == "*" and not bracketed:
        return host, int(match[2])
    try:
        host = host_name(host)
    except ValueError as error:
        raise AddressError(f"{error}: write tcp://host:port") from None
    if bracketed != (":" in host):
        raise AddressError(
            f"{address!a} is not an address: brackets, as in tcp://[::1]:7443, are for IPv6 alone"
        )
    return host, int(match[2])


def served_address(address: str) -> tuple[str, int]:
    """Host and port of an address that others are told: its port is not 0, which leaves the choice to the system.

    Raises:
        AddressError: not such an address.
    """
    host, port = parse_address(address)
    if port == 0:
        raise AddressError(f"{address!a} names port 0, which nobody can dial: write tcp://host:port")
    return host, port


def dialled_address(address: str) -> tuple[str, int]:
    """Host and port of an address to dial: one host, not ``*``, and a port.

    Raises:
        AddressError: not such an address.
    """
    host, port = served_address(address)
    if host == "*":
        raise AddressError("nobody can dial '*': write the coordinator's host name")
    return host, port


def format_address(host: str, port: int) -> str:
    """The address of a host and a port: the inverse of `parse_address`."""
    return f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"
