"""Scores of what attacks recover: truth, floors and the finder of what is segmented, made once for all attacks."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from splitpeer.attacks.base import Result, View
from splitpeer.audit.cohort import Samples
from splitpeer.leakage import Floors, Others, Score, score_images, score_masks
from splitpeer.leakage.tumour import Segmenter, score_tumour, train_segmenter


@dataclass
class Outcome:
    """One attack that ran, with its figures."""

    view: View
    result: Result
    scores: dict[str, Score] = field(default_factory=dict)
    tumour: np.ndarray | None = None
    """bool [N, *spatial]: all that is segmented, as a fixed network finds it in the reconstructions."""


@dataclass
class Judge:
    """Scores what attacks recover; without the truth it scores nothing."""

    truth: Samples | None = None
    modality: str = ""
    floors: Floors | None = None
    segmenter: Segmenter | None = None

    def outcome(self, view: View, result: Result) -> Outcome:
        """Figures by name (see `splitpeer.leakage`), and the tumour that shows in each reconstruction."""
        truth = self.truth
        if truth is None or (result.goal == "mask" and truth.outlines is None):
            return Outcome(view, result)
        if result.goal == "mask":
            found = score_masks(truth.outlines, result.images, truth.patients, parts=truth.parts)
            return Outcome(view, result, found)
        images = truth.images[self.modality]
        scores = score_images(images, result.images, truth.patients, floors=self.floors, z=truth.heights)
        shown = None
        if self.segmenter is not None and truth.outlines is not None:
            scores["tumour_dice"], shown = score_tumour(
                self.segmenter, images, result.images, truth.outlines, truth.patients, floors=self.floors
            )
        return Outcome(view, result, scores, shown)


def make_judge(modality: str, truth: Samples | None, others: Samples | None, *, tumour: bool = True) -> Judge:
    """A judge with floors, and a tumour finder, from patients that are not under attack.

    Args:
        others: similar images, with masks for the tumour finder; None: floors from the truth's other patients.
        tumour: train the tumour finder (half a minute).
    """
    if truth is None or modality not in truth.images:
        return Judge(truth, modality)
    images = truth.images[modality]
    known = None
    if others is not None and modality in others.images:
        known = Others(others.images[modality], others.patients, others.heights)
    floors = Floors.make(images, truth.patients, known, truth.heights)
    segmenter = None
    if tumour and others is not None and others.outlines is not None and truth.masks is not None:
        segmenter = train_segmenter(others.images[modality], others.outlines)
    return Judge(truth, modality, floors, segmenter)
