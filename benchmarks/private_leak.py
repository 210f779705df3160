"""What leaks in one row: every attack on it, with its budget doubled, and what can be told of the tumour afterwards."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from pretraining import CONTRASTS
from private_attacks import Found, Look, People, Reader, Told, healthy, learn, likeness, mean, middle
from private_labels import masks_from
from private_outsider import Seen, Surrogates, aligned, of_the_run, taught
from private_run import Federation, RowBench
from private_search import searched
from safetensors.numpy import load, save

from splitpeer.attacks.budget import Budget, doubled
from splitpeer.data.loader import SiteData
from splitpeer.leakage.metrics import similarities
from splitpeer.leakage.tumour import Segmenter, score_tumour, train_segmenter
from splitpeer.storage import durable
from splitproto.records import Sample

FEWEST = 240
"""Steps of an inverse network's first attempt."""
PATIENCE = 2
"""Doublings without gain that end an attack: one alone may be bad luck."""
INSIDER = ("inverse", "neighbours", "search")
"""Of an adversary with every encoder: a network on the sum; on three slices of it, with the labels; and a search."""
OUTSIDER = ("recipe", "surrogates")
"""Of a coordinator without encoders: its own by the recipe, aligned; and those trained on through the run's decoder."""
LABELS = "labels"
"""A network that sees nothing but the labels: what a coordinator knows before anything is sent."""
GRADIENT = "gradient"
"""What a site reads off the gradient of a sum: outlines of the tumour. Rows that are trained over a sum send one."""
ATTACKS = (*INSIDER, *OUTSIDER, LABELS, GRADIENT)


@dataclass
class Attacker:
    """All attacks on one row with one seed, and what they share.

    Args:
        given: `attack_steps` and `surrogate_steps`, `search_steps`; `shadow`: strangers of the adversary.
    """

    bench: RowBench
    told: Told
    given: argparse.Namespace
    _kept: dict[str, Any] = field(default_factory=dict)
    """Levels of strangers, by what made them."""

    @cached_property
    def federation(self) -> Federation:
        """The run, as its training left it."""
        federation = Federation(self.bench, self.told)
        federation.recall()
        return federation

    @cached_property
    def strangers(self) -> People:
        """Others than those of the encoders, with labels."""
        return People.of(self.bench, self.bench.strangers(self.given.shadow))

    @cached_property
    def run(self) -> People:
        """The run's own, for the judge; their labels are the coordinator's too."""
        return People.of(self.bench, self.bench.cohort())

    @cached_property
    def victims(self) -> list[Sample]:
        """Of each patient held out the slice with the largest tumour."""
        return middle(self.run.masks, self.bench.split()[1])

    @cached_property
    def targets(self) -> list[Sample]:
        """These, and slices without tumour."""
        return [*self.victims, *healthy(self.run.masks, self.bench.split()[1])]

    @cached_property
    def seen(self) -> Seen:
        """What arrived."""
        return of_the_run(self.federation)

    @cached_property
    def aligned(self) -> Surrogates:
        """The adversary's own encoders."""
        return aligned(self.federation, self.strangers, self.seen)

    @cached_property
    def taught(self) -> Surrogates:
        """These, trained on."""
        steps = self.given.surrogate_steps
        return taught(self.federation, self.aligned, self.strangers, self.seen, steps, self.told)

    def attack(self, name: str) -> dict[str, Any]:
        """One of `ATTACKS`: figures of its best attempt."""
        if name == GRADIENT:
            return {"masks": masks_from(self.federation, self.strangers, self.told)}
        attempt, most = self._attempt(name)
        truth = self.truth(self.victims)
        best, _, curve, stopped = doubled(self._judged(name, attempt, truth), Budget(most, patience=PATIENCE))
        guess, error = best
        self._guess(name).parent.mkdir(exist_ok=True)
        durable.replace(self._guess(name), save({"guess": guess, "error": np.array([error])}))
        found = likeness(truth, guess[: len(self.victims)])
        return {
            "patients": found,
            "budgets": [{"times": times, "ssim": figure} for times, figure in curve],
            "stopped": stopped,
            "tumour": tumours(self, guess),
        }

    def _judged(
        self, name: str, attempt: Callable[[int], tuple[np.ndarray, float]], truth: np.ndarray
    ) -> Callable[[int], tuple[tuple[np.ndarray, float], float]]:
        def judged(times: int) -> tuple[tuple[np.ndarray, float], float]:
            guess, error = attempt(times)
            figure = mean(likeness(truth, guess[: len(truth)]))
            self.told(f"{name}, budget x {times}: SSIM {figure:.3f}")
            return (guess, error), figure

        return judged

    def _attempt(self, name: str) -> tuple[Callable[[int], tuple[np.ndarray, float]], int]:
        """An attempt by how many times the first budget, and how many times that may be at most."""
        if name == "search":
            return self._search, 4
        steps = min(FEWEST, self.given.attack_steps)
        reader = self.reader(name)

        def inverse(times: int) -> tuple[np.ndarray, float]:
            network = reader.network(self.bench.seed)
            error = learn(reader, steps * times, network)
            return reader.guess(network, self.targets), error

        return inverse, self.given.attack_steps // steps

    def reader(self, name: str) -> Reader:
        """What the networks of an attack see."""
        looks = {
            "inverse": Look(), "neighbours": Look(labels=True, reach=1), LABELS: Look(sums=False, labels=True, reach=1),
            "recipe": Look(labels=True), "surrogates": Look(labels=True),
        }  # fmt: skip
        reads = {"recipe": lambda: self.aligned.reads, "surrogates": lambda: self.taught.reads}.get(name)
        kept = self._kept.setdefault(name if name in OUTSIDER else "encoders", {})
        return Reader(self.federation, self.strangers, None if reads is None else reads(), looks[name], kept)

    def _search(self, times: int) -> tuple[np.ndarray, float]:
        """From the better of the networks' guesses."""
        made = [load(path.read_bytes()) for name in INSIDER if (path := self._guess(name)).exists()]
        if not made:
            raise SystemExit(
                "search starts from a network's guess: run the attacks inverse or neighbours too"
            )
        truth = self.truth(self.victims)
        start = max(made, key=lambda one: mean(likeness(truth, one["guess"][: len(truth)])))
        error = float(start["error"][0])
        guess = searched(
            self.federation, self.targets, start["guess"], error, self.strangers,
            self.given.search_steps * times,
        )  # fmt: skip
        return guess, error

    def truth(self, samples: list[Sample]) -> np.ndarray:
        """Images [N, contrasts, *spatial]."""
        return np.concatenate(list(self.run.read(samples).values()), axis=1)

    def _guess(self, name: str) -> Path:
        row = self.bench.row.name.replace(" ", "-").replace(",", "-")
        return self.bench.folder / "guesses" / f"{row}-{name}.safetensors"


def floor(attacker: Attacker) -> Found:
    """SSIM of the strangers' mean image, which needs nothing that was sent."""
    strangers = attacker.strangers
    means = strangers.read(middle(strangers.masks, strangers.masks.keys()))
    truth = attacker.truth(attacker.victims)
    return {
        place.seat: [similarities(true[c], images.mean(axis=0)[0])["ssim"] for true in truth]
        for c, (place, images) in enumerate(means.items())
    }


# --- the tumour ----------------------------------------------------------------------------------------------


_SEGMENTERS: dict[Path, dict[str, Segmenter]] = {}
"""By cohort of strangers; the same for all rows."""


def segmenters(bench: RowBench, folder: Path) -> dict[str, Segmenter]:
    """For each contrast what finds a tumour in a reconstruction of it, trained on strangers."""
    if folder not in _SEGMENTERS:
        people = People.of(bench, folder)
        slices = people.slices()
        some = slices[:: max(1, len(slices) // 1000)]
        masks = SiteData(people.masks).batch(some, people.window, None, None)
        _SEGMENTERS[folder] = {
            place.seat: train_segmenter(images, masks, steps=bench.given.readout_steps, seed=bench.seed)
            for place, images in people.read(some).items()
        }
    return _SEGMENTERS[folder]


def tumours(attacker: Attacker, guess: np.ndarray) -> dict[str, dict[str, Any]]:
    """By contrast, what a network finds in the reconstructions: overlap, size and side of the tumour in the slices that
    show the largest, presence in these and in others."""
    bench, targets = attacker.bench, attacker.targets
    found = segmenters(bench, bench.strangers(attacker.given.shadow))
    truth = attacker.truth(targets)
    masks = SiteData(attacker.run.masks).batch(targets, bench.window, None, None)
    patients = [one.key.hex() for one in targets]
    told = {}
    for c, contrast in enumerate(CONTRASTS):
        scores, _ = score_tumour(
            found[contrast], truth[:, c : c + 1], guess[:, c : c + 1].astype(np.float32), masks, patients
        )
        told[contrast] = {name: json.loads(json.dumps(score.to_json())) for name, score in scores.items()}
    return told
