"""Several attacks on one view: each in its adaptive form, with the naive one beside it, scored and kept together.

A naive result is never kept alone: an attack that ignores a known defence says nothing about that defence.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from splitpeer.attacks.base import Knowledge, Progress, Result, Shot, Target, View, silent
from splitpeer.attacks.catalogue import make_attack
from splitpeer.audit.cohort import Samples
from splitpeer.defences import Release, make_stack
from splitpeer.defences.network import defend
from splitpeer.errors import AttackImpossible, ConfigError
from splitpeer.leakage import Floors, Others, Score, score_images, score_masks
from splitpeer.leakage.tumour import Segmenter, score_tumour, train_segmenter


@dataclass(frozen=True)
class Order:
    """One attack to run."""

    attack: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    views: int | None = None
    """Use at most so many releases of each sample; None: all."""


def parse_order(written: str) -> Order:
    """`whitebox`, or with settings `whitebox:iterations=200,tv=0.01`. Raises ConfigError."""
    name, _, text = written.partition(":")
    settings: dict[str, Any] = {}
    for part in filter(None, text.split(",")):
        key, equals, value = part.partition("=")
        if not equals:
            raise ConfigError(f"--attack {written}: write {part!r} as setting=value")
        settings[key] = value
    return Order(name, settings)


@dataclass
class Outcome:
    """One attack that ran, or could not."""

    view: View
    result: Result
    scores: dict[str, Score] = field(default_factory=dict)
    tumour: np.ndarray | None = None
    """bool [N, *spatial]: the whole tumour as a fixed network finds it in the reconstructions."""


@dataclass
class Judge:
    """Scores what attacks recover. Empty of truth, it scores nothing."""

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


def run(
    view: View, knowledge: Knowledge, orders: Sequence[Order], judge: Judge, *, seed: int = 0,
    device: str = "cpu", naive: bool = True, progress: Progress = silent,
) -> Iterator[Outcome]:  # fmt: skip
    """Run `orders` one after the other; each outcome is there as soon as it is scored.

    Args:
        naive: beside every adaptive attack on a defended view, also the one that does not know the defence.

    Raises:
        AttackImpossible: the view or the knowledge lacks what an attack needs.
        ConfigError: an attack or setting that does not exist.
    """
    for order in orders:
        seen = first_views(view, order.views) if order.views is not None else view
        defended = bool(view.gradient_defences if view.role == "client" else view.defences)
        forms = (True, False) if defended and naive else (True,)
        for adaptive in forms:
            attack = make_attack(order.attack, seed=seed, device=device, **order.settings)
            if attack.role != view.role:
                raise AttackImpossible(
                    f"{order.attack} works on what a {attack.role} sees, and a {view.role} recorded this capture"
                )
            result = attack.run(seen, replace(knowledge, adaptive=adaptive), progress)
            yield judge.outcome(seen, result)


def first_views(view: View, count: int) -> View:
    """`view` with at most the first `count` releases of each sample."""
    targets = tuple(Target(target.sample, target.shots[:count]) for target in view.targets)
    return replace(view, targets=targets)


def redefended(view: View, written: Sequence[str], *, seed: int, views: int = 1) -> View:
    """A clean view as it would have been under a defence, `views` releases of each shot, offline.

    Raises:
        ConfigError: the view is defended already, or the defence changes the training and cannot be applied later.
    """
    if view.defences:
        raise ConfigError(
            f"this capture was recorded under {' + '.join(view.defences)}: "
            "a defence can be tried offline on clean traffic only"
        )
    key = hashlib.sha256(f"offline defence\0{seed}".encode()).digest()
    stack = make_stack(list(written), key=key, channels=view.channels, dimensions=view.dimensions)
    if changing := [d.name for d in stack.defences if not d.offline]:
        raise ConfigError(
            f"{', '.join(changing)} changes the training, so it cannot be tried on recorded traffic: "
            "rehearse it with splitpeer audit"
        )
    run_id = key[:16]
    targets = []
    for target in view.targets:
        shots: list[Shot] = []
        for number, shot in enumerate(target.shots):
            for again in range(views):
                batch = number * views + again
                release = Release(run_id, shot.mode, shot.step, batch, (target.sample,))
                single = {name: array[None] for name, array in shot.activations.items()}
                sent = {name: array[0] for name, array in defend(stack, single, release).items()}
                shots.append(replace(shot, activations=sent))
        targets.append(Target(target.sample, tuple(shots)))
    return replace(view, targets=tuple(targets), defences=stack.specs)
