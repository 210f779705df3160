"""Host names as they are dialled and certified: one spelling for each, in ASCII.

Certificates and TLS know a host by its ASCII form without a trailing dot, and an IPv6 address without its zone.
"""

from __future__ import annotations

import ipaddress
import re

__all__ = ["host_name", "without_zone"]

LONGEST = 253
"""Characters of a DNS name (RFC 1035 section 2.3.4, without the root's dot)."""
_LABEL = re.compile(r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?")
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


def _ip(text: str) -> str | None:
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return None
    return str(address)
