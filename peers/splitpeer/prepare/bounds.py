"""From where on a figure of an image is suspicious.

The numbers come from the phantom (`docs/clinical.md`, Quality): between what registrations that worked had and what
broken ones had. They catch what went wrong altogether, never a millimetre; for that there is the picture.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class QualityBounds:
    """From where on a figure is suspicious."""

    least_nmi: float = 1.05
    least_peak: float = 0.1
    least_overlap: float = 0.9
    least_covered: float = 0.95
    most_scaled: float = 1.3
    """Stretched or shrunk along any direction by more than this factor."""
    most_turned: float = 60.0
    """Degrees."""
