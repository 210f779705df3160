"""One colour per region, the same on the page, in pictures and in DICOM.

Okabe and Ito's (jfly.uni-koeln.de/color), distinguishable for colour-blind readers; on the page each contour also has
a dash of its own.
"""

from __future__ import annotations

COLOURS = ("#56B4E9", "#E69F00", "#CC79A7", "#009E73", "#F0E442", "#D55E00", "#0072B2")
"""In the order of a task's regions, repeated where there are more; bright ones first, since pictures are dark."""
DASHES = ("", "6 2.5", "1.6 2.4", "8 2.5 1.6 2.5")
"""Of the contours, in pixels of the screen; repeated."""


def hex_of(place: int) -> str:
    """The colour of the region at `place` as #RRGGBB."""
    return COLOURS[place % len(COLOURS)]


def colour_of(place: int) -> tuple[int, int, int]:
    """The same as three numbers of 0 to 255."""
    text = hex_of(place)[1:]
    red, green, blue = (int(text[start : start + 2], 16) for start in (0, 2, 4))
    return red, green, blue


def dash_of(place: int) -> str:
    """How the contour of the region at `place` is dashed; empty: a full line."""
    return DASHES[place % len(DASHES)]
