"""Scores of what attacks recover: truth, floors and the finder of what is segmented, made once for all attacks."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from splitpeer.attacks.base import Result, View
from splitpeer.audit.cohort import Samples
from splitpeer.leakage.floors import Floors, Others, compare
from splitpeer.leakage.measure import score_images, score_masks
from splitpeer.leakage.membership import score_members
from splitpeer.leakage.own_image import OwnImage, foreground
from splitpeer.leakage.scores import Score, number, summarise
from splitpeer.leakage.synthesis import Synthesiser
from splitpeer.leakage.tumour import Segmenter, score_tumour, train_segmenter
from splitproto.records import Seat

UNCHANGED = "what was sent adds nothing"
"""Floor of what the traffic adds to images that are known in clear."""


@dataclass
class Outcome:
    """One attack that ran, with its figures."""

    view: View
    result: Result
    modality: str
    """Modality of the images in the result; for a mask, what the attacking site holds."""
    scores: dict[str, Score] = field(default_factory=dict)
    tumour: np.ndarray | None = None
    """bool [N, *spatial]: all that is segmented, as a fixed network finds it in the reconstructions."""


@dataclass(frozen=True)
class Reference:
    """What images of one modality are held against."""

    floors: Floors
    segmenter: Segmenter | None = None


@dataclass
class Judge:
    """Scores what attacks recover; without the truth it scores nothing."""

    truth: Samples | None = None
    channels: dict[str, Reference] = field(default_factory=dict)
    """By modality."""
    own: OwnImage | None = None
    """What the attacking site finds in its own images without a gradient; None: it has no labelled strangers."""
    members: frozenset[bytes] | None = None
    """Who the network was trained on; None: nobody knows."""
    others: Samples | None = None
    """Patients not under attack, from whom a contrast is learned that follows from others (collusion)."""
    _drawn: dict[tuple[tuple[str, ...], str], np.ndarray] = field(default_factory=dict, repr=False)

    def outcomes(self, view: View, result: Result) -> list[Outcome]:
        """Figures by name (see `splitpeer.leakage`): of a map, or of each channel of the images on its own.

        Where a view has channels of several sites, those that there is no truth of are left out.
        """
        if result.goal == "mask":
            return [self._map(view, result)]
        if result.goal == "member":
            return [self._members(view, result)]
        # What is known in clear is no leak; a neighbouring slice has no truth here.
        every = [(n, m) for n, m in enumerate(view.seat.modalities) if m not in view.clear]
        judged = [(n, m) for n, m in every if m in self.channels] or every
        return [self._image(view, _channel(result, n), modality) for n, modality in judged]

    def merit(self, view: View, result: Result) -> float | None:
        """The figure by which an attack's budget is chosen (`attacks.budget`): mean SSIM inside the body, over samples
        and the channels that are known, or the mask's AUC; None without the truth."""
        if self.truth is None or result.goal == "member":
            return None
        if result.goal == "mask":
            scores = self._map(view, result).scores
            return scores["auc"].mean if "auc" in scores else None
        known = [
            compare(self.truth.images[modality], result.images[:, n : n + 1])["ssim"]
            for n, modality in enumerate(view.seat.modalities)
            if modality in self.channels and modality not in view.clear
        ]
        return number(float(np.nanmean(known))) if known else None

    def _map(self, view: View, result: Result) -> Outcome:
        truth, modality = self.truth, " + ".join(view.seat.modalities)
        if truth is None or truth.outlines is None:
            return Outcome(view, result, modality)
        held = truth.at(view.seat)
        found = score_masks(
            truth.outlines, result.images, truth.patients, parts=truth.parts,
            inside=None if held is None else foreground(held),
            own=None if held is None or self.own is None else self.own.maps(held),
            others=self.own.masks if self.own else None, z=truth.heights,
        )  # fmt: skip
        return Outcome(view, result, modality, found)

    def _members(self, view: View, result: Result) -> Outcome:
        modality, keys = " + ".join(view.seat.modalities), [target.sample.key for target in view.targets]
        if self.members is None:
            return Outcome(view, result, modality)
        inside = np.asarray([key in self.members for key in keys])
        return Outcome(view, result, modality, score_members(result.images, inside, keys))

    def _image(self, view: View, result: Result, modality: str) -> Outcome:
        truth, channel = self.truth, self.channels.get(modality)
        if truth is None or channel is None:
            return Outcome(view, result, modality)
        images, floors = truth.images[modality], self._beside(channel.floors, view, modality)
        scores = score_images(images, result.images, truth.patients, floors=floors, z=truth.heights)
        shown = None
        if channel.segmenter is not None and truth.outlines is not None:
            tumour, shown = score_tumour(
                channel.segmenter, images, result.images, truth.outlines, truth.patients, floors=floors
            )
            scores |= tumour
        if drawn := floors.values.get(drawn_from(view.clear)):
            gained = compare(images, result.images)["ssim"] - drawn["ssim"]
            scores["advantage_ssim"] = summarise(gained, truth.patients, floors={UNCHANGED: 0.0}, most=1.0)
        return Outcome(view, result, modality, scores, shown)

    def _beside(self, floors: Floors, view: View, modality: str) -> Floors:
        """`floors`, and what the contrasts that the adversary holds in clear show of this one by themselves."""
        if not view.clear or self.truth is None or modality in view.clear:
            return floors
        images = self.synthesised(view.clear, modality)
        if images is None:
            return floors
        name, values = drawn_from(view.clear), compare(self.truth.images[modality], images)
        return replace(floors, images=floors.images | {name: images}, values=floors.values | {name: values})

    def drawn_likeness(self, known: tuple[str, ...], modality: str) -> float | None:
        """Mean SSIM of `synthesised`."""
        images = self.synthesised(known, modality)
        if images is None or self.truth is None:
            return None
        return float(np.nanmean(compare(self.truth.images[modality], images)["ssim"]))

    def synthesised(self, known: tuple[str, ...], modality: str) -> np.ndarray | None:
        """One contrast of the targets as drawn from others of them, float32 [N, 1, *spatial].

        Learned once (ten seconds); None where other patients, or the targets, lack a contrast.
        """
        if self.truth is None or self.others is None:
            return None
        seat = Seat("known", known)
        shown, learned = self.truth.at(seat), self.others.at(seat)
        wanted = self.others.images.get(modality)
        if shown is None or learned is None or wanted is None:
            return None
        if (known, modality) not in self._drawn:
            self._drawn[known, modality] = Synthesiser.train(learned, wanted)(shown)
        return self._drawn[known, modality]


def drawn_from(modalities: Sequence[str]) -> str:
    """Name of the floor of a collusion with the sites that hold `modalities`."""
    return f"drawn from {' and '.join(modalities)} of the same patient"


def _channel(result: Result, number: int) -> Result:
    return replace(result, images=result.images[:, number : number + 1])


def make_judge(
    modalities: Sequence[str], truth: Samples | None, others: Samples | None, *, tumour: bool = True,
    finder_steps: int = 300, finders: Mapping[str, Segmenter] | None = None,
) -> Judge:  # fmt: skip
    """A judge with floors, and a finder of what is segmented, from patients that are not under attack.

    Args:
        modalities: those that are attacked.
        others: similar images, with masks for the finder; None: floors from the truth's other patients.
        tumour: train the finders (half a minute each).
        finder_steps: training steps of each finder.
        finders: from `train_finders`; None: they are trained here.
    """
    if truth is None:
        return Judge()
    judge = Judge(truth, others=others)
    if finders is None:
        judged = [modality for modality in modalities if modality in truth.images]
        finders = train_finders(judged, others, finder_steps) if tumour and truth.masks is not None else {}
    for modality in modalities:
        if modality not in truth.images:
            continue
        known = None
        if others is not None and modality in others.images:
            known = Others(others.images[modality], others.patients, others.heights)
        floors = Floors.make(truth.images[modality], truth.patients, known, truth.heights)
        judge.channels[modality] = Reference(floors, finders.get(modality))
    return judge


def train_finders(
    modalities: Collection[str], others: Samples | None, steps: int = 300
) -> dict[str, Segmenter]:
    """Networks that find what is segmented, by modality; none for a modality without labelled images of others."""
    if others is None or others.outlines is None:
        return {}
    return {
        modality: train_segmenter(others.images[modality], others.outlines, steps=steps)
        for modality in modalities
        if modality in others.images
    }


def own_image(seat: Seat, others: Samples | None, device: str = "cpu") -> OwnImage | None:
    """What a site at `seat` learns from labelled strangers (ten seconds); None where there are none."""
    images = None if others is None else others.at(seat)
    if others is None or images is None or others.outlines is None:
        return None
    return OwnImage.train(images, others.outlines, others.patients, others.heights, device=device)
