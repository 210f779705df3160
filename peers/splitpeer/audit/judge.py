"""Scores of what attacks recover: the truth, the floors and the tumour finder, made once for all attacks."""

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
    """bool [N, *spatial]: the whole tumour as a fixed network finds it in the reconstructions."""


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
        if truth is None or (result.goal == "mask" and truth.masks is None):
            return Outcome(view, result)
        if result.goal == "mask":
            return Outcome(view, result, score_masks(truth.masks, result.images, truth.patients))
        images = truth.images[self.modality]
        scores = score_images(images, result.images, truth.patients, floors=self.floors, z=truth.heights)
        found = None
        if self.segmenter is not None and truth.masks is not None:
            scores["tumour_dice"], found = score_tumour(
                self.segmenter, images, result.images, truth.masks, truth.patients, floors=self.floors
            )
        return Outcome(view, result, scores, found)


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
    if tumour and others is not None and others.masks is not None and truth.masks is not None:
        segmenter = train_segmenter(others.images[modality], others.masks)
    return Judge(truth, modality, floors, segmenter)
