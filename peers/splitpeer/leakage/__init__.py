"""How much leaked: figures of reconstructions and recovered masks, with floors and intervals over patients."""

from splitpeer.leakage.floors import Floors, Others
from splitpeer.leakage.measure import score_images, score_masks
from splitpeer.leakage.scores import Score

__all__ = ["Floors", "Others", "Score", "score_images", "score_masks"]
