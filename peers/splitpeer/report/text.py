"""Numbers and names as people read them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from splitpeer.report.words import METRICS

MINUS = "−"
NONE = "–"
THIN = "\u202f"


def figure(value: float | None, digits: int = 2) -> str:
    """A number; a dash where there is none, thousands apart."""
    return NONE if value is None else f"{value:,.{digits}f}".replace(",", THIN).replace("-", MINUS)


def signed(value: float | None) -> str:
    """A change, with its sign."""
    return NONE if value is None else f"{value:+.2f}".replace("-", MINUS)


def share(value: float | None) -> str:
    """A share in percent."""
    return NONE if value is None else f"{100 * value:.0f} %"


def plural(count: int, word: str) -> str:
    """A number with its noun: "1 view", "1 000 views"."""
    return f"{figure(count, 0)} {word}{'' if count == 1 else 's'}"


def metric(name: str) -> str:
    """What a score is called; those of one region end in its name ("auc_TC")."""
    base, _, region = name.rpartition("_")
    return METRICS.get(name) or (f"{METRICS[base]}, {region}" if base in METRICS else name)


def settings(value: Mapping[str, Any]) -> str:
    """One a line."""
    return "\n".join(
        f"{name} = {json.dumps(one, ensure_ascii=False, default=str)}" for name, one in value.items()
    )


def upper_first(text: str) -> str:
    """As a sentence begins."""
    return text[:1].upper() + text[1:]


def lower_first(text: str) -> str:
    """As within a sentence; names such as SDAR or UnSplit stay."""
    first = text.partition(" ")[0]
    return text[:1].lower() + text[1:] if first[1:] == first[1:].lower() and len(first) > 1 else text
