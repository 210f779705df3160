"""Figures in plain words. No band says "safe": what these attacks did not find, others may.

A likeness is judged by its position between the floor (what an adversary reaches who has seen nothing of the
patient) and 1. The lowest band is given only if even the upper end of the interval is in it: with few
patients a figure is uncertain, and uncertainty is no privacy.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from splitpeer.leakage.scores import Score, highest_floor


@dataclass(frozen=True)
class Band:
    """One step of a scale from 0 (nothing found) to 4."""

    rank: int
    word: str
    sentence: str


IMAGE_BANDS = (
    Band(0, "no more than an average image", "The attack shows no more than the average of other patients."),
    Band(1, "rough shapes", "A blurred idea of this patient's image: more than an average, few details."),
    Band(2, "recognisable", "Clearly this patient's image, with coarse anatomy and often the lesion."),
    Band(3, "detailed", "The image with most of its anatomy; fine texture is lost."),
    Band(4, "practically the image", "Hardly distinguishable from the image itself."),
)
IMAGE_STEPS = (0.05, 0.25, 0.6, 0.9)
"""Share of the way from the floor to 1 at which bands 1 to 4 begin."""

MASK_BANDS = (
    Band(
        0,
        "no more than is known without it",
        "The map tells no more than other patients' outlines and the hospital's own image do.",
    ),
    Band(1, "a hint of the place", "Target voxels stand out a little; side and part may be guessed."),
    Band(2, "the place", "Place and rough extent of the target can be read."),
    Band(3, "place and size", "Place and size are plain, the border is not sharp."),
    Band(4, "the outline", "The target's outline itself can be drawn."),
)
MASK_STEPS = (0.8, 0.95)
"""AUC at which bands 2 and 3 begin; band 4 also needs a best-threshold Dice of `OUTLINE_DICE`."""
MASK_MARGIN = 0.02
OUTLINE_DICE = 0.7
TUMOUR_SHOWS = 0.5
"""Share of the way from its floor to its ceiling at which the tumour counts as visible in a reconstruction."""


def image_band(scores: Mapping[str, Score]) -> Band | None:
    """Band of a reconstruction by its likeness inside the body; None where nothing was measured."""
    score = scores.get("ssim")
    if score is None or score.mean is None:
        return None
    floor = min(highest_floor(score) or 0.0, 0.99)

    def step(value: float) -> int:
        return sum((value - floor) / (1 - floor) >= edge for edge in IMAGE_STEPS)

    rank = step(score.mean)
    uncertain = step(score.high if score.high is not None else score.mean) > 0
    # If patients can be told apart, more than an average image was seen, however unlike the pictures are.
    if rank == 0 and (uncertain or recognised(scores)):
        rank = 1
    return IMAGE_BANDS[rank]


def mask_band(scores: Mapping[str, Score]) -> Band | None:
    """Band of a recovered map by leak-AUC and Dice; None where nothing was measured."""
    score = scores.get("auc")
    if score is None or score.mean is None:
        return None
    usual = highest_floor(score) or 0.5
    upper = score.high if score.high is not None else score.mean
    if upper <= usual + MASK_MARGIN:
        return MASK_BANDS[0]
    rank = 1 + sum(score.mean >= edge for edge in MASK_STEPS)
    best = scores.get("dice_oracle")
    if rank == 3 and best is not None and (best.mean or 0) >= OUTLINE_DICE:
        rank = 4
    return MASK_BANDS[rank]


def tumour_shows(scores: Mapping[str, Score]) -> bool:
    """Whether a network finds the tumour in the reconstruction, at least halfway to what it finds in the image."""
    score = scores.get("tumour_dice")
    if score is None or score.mean is None:
        return False
    floor, ceiling = highest_floor(score) or 0.0, score.ceiling if score.ceiling is not None else 1.0
    return score.mean > floor and (score.mean - floor) >= TUMOUR_SHOWS * (ceiling - floor)


def recognised(scores: Mapping[str, Score]) -> bool:
    """Whether patients are picked out of the gallery more often than by chance, beyond the interval."""
    score = scores.get("reidentification")
    if score is None or score.mean is None:
        return False
    lower = score.low if score.low is not None else score.mean
    return lower > (highest_floor(score) or 0.0)


def epsilon_words(epsilon: float) -> str:
    """What a privacy budget is worth, in words."""
    if epsilon <= 1:
        return "a strong guarantee"
    if epsilon <= 4:
        return "a moderate guarantee"
    if epsilon <= 10:
        return "a weak guarantee"
    return "formally a guarantee, in practice hardly one"
