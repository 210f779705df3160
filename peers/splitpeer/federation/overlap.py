"""How many patients parties have in common, pair by pair: counts only, since keys say nothing to people."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from itertools import combinations

ADVICE = (
    'write patient ids alike everywhere, or list them (layout "csv"); the log of each site (data.warning) shows '
    "ids that others may write differently"
)


def shared_with(name: str, having: Mapping[str, Collection[bytes]]) -> str:
    """What `name` shares with each of the others: ``labels 0, site-flair 6``."""
    own = set(having[name])
    return ", ".join(
        f"{other} {len(own.intersection(keys))}" for other, keys in having.items() if other != name
    )


def pairwise(having: Mapping[str, Collection[bytes]]) -> str:
    """What any two share: ``labels and site-t1 0, site-flair and site-t1 6``."""
    return ", ".join(
        f"{one} and {other} {len(set(having[one]).intersection(having[other]))}"
        for one, other in combinations(having, 2)
    )
