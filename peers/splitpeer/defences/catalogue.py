"""All defences by name."""

from __future__ import annotations

from splitpeer.defences.base import Defence

CATALOGUE: dict[str, type[Defence]] = {}
