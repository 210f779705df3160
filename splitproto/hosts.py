"""Host names as they are dialled and certified: one spelling for each, in ASCII.

Certificates and TLS know a host by its ASCII form without a trailing dot, and an IPv6 address without its zone.
"""

from __future__ import annotations

import ipaddress
import re

__all__ = ["host_name", "split_address", "without_zone"]

LONGEST = 253
"""Characters of a DNS name (RFC 1035 section 2.3.4, without the root's dot)."""
_LABEL = re.compile(r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?")
_ADDRESS = re.compile(r"tcp://(\[[^\[\]/?#@]+\]|[^\[\]/?#@:]+):(\d{1,5})", re.IGNORECASE)
_DEVIATIONS = frozenset("ßς\u200c\u200d")
"""The old and the new standard (IDNA 2003 and 2008) give names with these two different ASCII forms."""


def host_name(text: str) -> str:
    """The ASCII form of a DNS name or IP address: ``München.example.`` is ``xn--mnchen-3ya.example``.

    Raises:
        ValueError: it is neither; the text says why.
    """
    if (address := _ip(text)) is not None:
        return address
    name = text.removesuffix(".")
    if found := _DEVIATIONS.intersection(name.lower()):
        raise ValueError(
            f"{text!a} has two ASCII forms because of {''.join(sorted(found))!a}: "
            "take the one that is in your DNS (xn--...)"
        )
    try:
        name = name.encode("idna").decode("ascii").lower()
    except UnicodeError:
        raise ValueError(f"{text!a} is neither a DNS name nor an IP address") from None
    labels = name.split(".")
    if len(name) > LONGEST or not all(map(_LABEL.fullmatch, labels)) or labels[-1].isdigit():
        raise ValueError(f"{text!a} is neither a DNS name nor an IP address")
    return name


def without_zone(host: str) -> str:
    """An IPv6 address without its zone (``fe80::1%eth0``), which only this machine knows; others unchanged."""
    return host.partition("%")[0]


def split_address(address: str) -> tuple[str, int]:
    """Host (`host_name`, or ``*``) and port of ``tcp://host:port``; an IPv6 address loses its brackets.

    Raises:
        ValueError: not such an address; the text says why.
    """
    match = _ADDRESS.fullmatch(address.removesuffix("/"))
    if match is None or int(match[2]) >= 2**16:
        raise ValueError(f"{address!a} is not an address: write tcp://host:port")
    # RFC 6874 writes the zone's percent sign as %25.
    host, bracketed = match[1].strip("[]").replace("%25", "%"), match[1].startswith("[")
    if host == "*" and not bracketed:
        return host, int(match[2])
    try:
        host = host_name(host)
    except ValueError as error:
        raise ValueError(f"{error}: write tcp://host:port") from None
    if bracketed != (":" in host):
        raise ValueError(
            f"{address!a} is not an address: brackets, as in tcp://[::1]:7443, are for IPv6 alone"
        )
    return host, int(match[2])


def _ip(text: str) -> str | None:
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return None
    return str(address)
