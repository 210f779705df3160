"""Scores as they are kept and shown: no torch, so that a console may show them."""

from __future__ import annotations

from typing import TypeAlias

Scores: TypeAlias = dict[str, float | None]
"""Region to score, and "mean" over the regions; None (null in JSON) for what cannot be scored."""


def shown(score: float | None) -> str:
    """A score for people: three decimals, or a dash where there is none."""
    return "-" if score is None else f"{score:.3f}"
