"""Was a patient among those that a network was trained on? Told from what was released of the patient.

An encoder that has seen a patient's labels arranges that patient's values so that the labels are easier to read from
them than a stranger's. How hard a patient is in itself (a small tumour) is no sign: the reading error is compared
with that of strangers who are as hard. It works on any view: one site, all of them, their sum, a pretrained encoder's
features. Who trained is not what a coordinator needs it for: it names the training patients itself. It needs it for
those on whom an encoder was pretrained before, and so does anybody else who gets hold of features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from splitpeer.attacks.base import Attack, Knowledge, Progress, Recovered, View
from splitpeer.attacks.evidence import AveragedLevel, Evidence, gather, usable_shots
from splitpeer.attacks.networks import frozen
from splitpeer.attacks.simulated_defences import SimulatedDefences
from splitpeer.errors import AttackImpossible

BATCH = 16
VOXELS = 1024
"""Of each shadow sample from which the probe learns."""
RIDGE = 1e-3


@dataclass(frozen=True, kw_only=True)
class Membership(Attack):
    """A linear probe reads the labels from the levels; its error, against strangers as hard, is the score.

    The probe learns from the first half of the shadow patients, none of whom was trained on. On the others its error is
    regressed on what makes a sample hard, the area of the label. A target whose error
    lies below what this predicts is taken for a member, the more so the more standard deviations it does. Where
    the adversary has no labels of the targets, the probe's own outline takes their place.
    """

    name = "membership"
    title = "membership inference"
    source = (
        "loss: Yeom et al., CSF 2018 (arXiv 1709.01604); regression on non-members: Bertran et al., NeurIPS 2023 "
        "(arXiv 2307.03694); a probe on features in place of the network's own loss is ours"
    )
    goal = "member"
    role = "coordinator"
    needs = ("encoder", "shadow", "shadow masks")
    uses = frozenset({"model", "shadow", "shadow_masks", "labels", "architecture", "adaptive"})
    plain = "Tells who was among the patients that the network learned from, by how well their values fit their labels."

    def recover(self, view: View, knowledge: Knowledge, progress: Progress) -> Recovered:
        """Scores float32 [N], higher for members. Raises AttackImpossible where the granted images do not fit."""
        chosen = [[s for s in shots if s.seed is None] for shots in usable_shots(view, knowledge)]
        if not all(chosen):
            raise AttackImpossible("membership reads releases that were not augmented: record evaluation")
        seen = gather(chosen, view.seat.modalities, masked=False, device=self.device)[0]
        images = np.asarray(knowledge.shadow[view.seat.name], np.float32)
        if len(images) < 8 or images.shape[2:] != tuple(view.window) or knowledge.shadow_masks is None:
            raise AttackImpossible(
                f"shadow images are {images.shape}: at least eight are needed, of {view.window}"
            )
        labels = _outline(knowledge.shadow_masks)
        world = _Shadow(view, knowledge, images, seen, self.seed, self.device)
        half = len(images) // 2
        probe = _Probe.learn(world, labels[:half], np.arange(half), self.seed)
        strangers = np.arange(half, len(images))
        errors, hardness = _read(probe, world, labels, strangers)
        known = None if knowledge.labels is None else _outline(knowledge.labels)
        own, own_hardness = probe.errors({n: level.mean for n, level in seen.levels.items()}, known)
        weights = np.linalg.lstsq(hardness, errors, rcond=None)[0]
        spread = max(float(np.std(errors - hardness @ weights)), 1e-9)
        scores = (own_hardness @ weights - own) / spread
        progress("reading labels", 1, 1)
        note = f"{len(strangers)} shadow samples say how hard a stranger is"
        return Recovered(scores.astype(np.float32), int(seen.views.max()), (note,))


class _Shadow:
    """What the site would send of the adversary's own images."""

    def __init__(
        self, view: View, knowledge: Knowledge, images: np.ndarray, seen: Evidence, seed: int, device: str
    ) -> None:
        self._model: nn.Module = frozen(knowledge.model, device)
        self._simulation = SimulatedDefences(view, self._model, seed, adaptive=knowledge.adaptive)
        self._images, self._device, self._names = images, device, list(seen.levels)
        self._views = max(round(float(seen.views.mean())), 1)

    @torch.no_grad()
    def __call__(self, rows: Sequence[int] | np.ndarray) -> dict[str, Tensor]:
        """{level: [B, C, *spatial]} of these images."""
        number = int(rows[0])
        image = torch.from_numpy(self._simulation.images(self._images[rows], number)).to(self._device)
        sent = self._model(image)
        levels: dict[str, AveragedLevel] = self._simulation.averaged(
            sent, number, self._views, dict.fromkeys(self._names, False)
        )
        return {name: level.mean for name, level in levels.items()}


@dataclass(frozen=True)
class _Probe:
    """A linear map from the values above a voxel to its label, by ridge regression."""

    weights: np.ndarray
    mean: np.ndarray
    scale: np.ndarray

    @classmethod
    def learn(cls, world: _Shadow, labels: np.ndarray, rows: np.ndarray, seed: int) -> _Probe:
        source = np.random.default_rng(seed)
        values, goals = [], []
        for batch in _batches(rows):
            for of, label in zip(_stacked(world(batch), labels.shape[1:]), labels[batch], strict=True):
                flat, goal = of.reshape(len(of), -1).T, label.ravel()
                inside = np.flatnonzero(goal)
                few = source.choice(len(goal), min(VOXELS, len(goal)), replace=False)
                places = np.concatenate([few, inside[: VOXELS // 4]])
                values.append(flat[places])
                goals.append(goal[places])
        x, y = np.concatenate(values).astype(np.float64), np.concatenate(goals).astype(np.float64)
        mean, scale = x.mean(0), np.maximum(x.std(0), 1e-6)
        x = np.concatenate([(x - mean) / scale, np.ones((len(x), 1))], 1)
        weights = np.linalg.solve(x.T @ x + RIDGE * len(x) * np.eye(x.shape[1]), x.T @ y)
        return cls(weights, mean, scale)

    def errors(self, levels: dict[str, Tensor], labels: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        """The reading error of each sample [B], and what tells how hard it is [B, 3].

        Args:
            labels: bool [B, *spatial]; None: the probe's own outline.
        """
        window = _window(levels) if labels is None else labels.shape[1:]
        errors, hardness = [], []
        for number, of in enumerate(_stacked(levels, window)):
            flat = (of.reshape(len(of), -1).T - self.mean) / self.scale
            found = flat @ self.weights[:-1] + self.weights[-1]
            label = found > 0.5 if labels is None else labels[number].ravel()
            squares = np.square(found - label)
            parts = [squares[side].mean() for side in (label, ~label) if side.any()]
            errors.append(float(np.mean(parts)))
            size = float(label.mean())
            hardness.append([1.0, size, size**0.5])
        return np.asarray(errors), np.asarray(hardness)


def _read(
    probe: _Probe, world: _Shadow, labels: np.ndarray, rows: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    found = [probe.errors(world(batch), labels[batch]) for batch in _batches(rows)]
    return np.concatenate([one for one, _ in found]), np.concatenate([other for _, other in found])


def _outline(masks: np.ndarray) -> np.ndarray:
    """All that is segmented, bool [N, *spatial]."""
    outline: np.ndarray = np.asarray(masks).max(axis=1) != 0
    return outline


def _batches(rows: np.ndarray) -> list[np.ndarray]:
    return [rows[first : first + BATCH] for first in range(0, len(rows), BATCH)]


def _window(levels: dict[str, Tensor]) -> tuple[int, ...]:
    """The finest grid of all levels."""
    finest = max(levels.values(), key=lambda tensor: tensor.shape[2])
    return tuple(finest.shape[2:])


def _stacked(levels: dict[str, Tensor], window: Sequence[int]) -> np.ndarray:
    """All levels on the grid of the window, float32 [B, channels of all, *spatial]."""
    grown = [functional.interpolate(levels[name].float(), size=tuple(window)) for name in sorted(levels)]
    stacked: np.ndarray = torch.cat(grown, 1).cpu().numpy()
    return stacked
