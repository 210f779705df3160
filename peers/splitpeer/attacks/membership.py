"""Was a patient among those that a network was trained on? Told from what was released of the patient.

An encoder that has seen a patient treats that patient's values a little otherwise than a stranger's, and, where it has
seen the labels, arranges them so that the labels are easier to read. It works on any view: one site, all of them, their
sum, a pretrained encoder's features. Who trained is not what a coordinator needs it for: it names the training patients
itself. It needs it for those on whom an encoder was pretrained before, and so does anybody else who gets hold of
features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from splitpeer.attacks.base import Attack, Knowledge, Progress, Recovered, View
from splitpeer.attacks.discriminant import Table, learn
from splitpeer.attacks.evidence import AveragedLevel, Evidence, gather, usable_shots
from splitpeer.attacks.networks import frozen
from splitpeer.attacks.people import Group, signs_of
from splitpeer.attacks.probe import LinearProbe, outline, read
from splitpeer.attacks.references import IMAGES, MASKS, Course, train_references, trainable
from splitpeer.attacks.simulated_defences import SimulatedDefences
from splitpeer.errors import AttackImpossible

ANY, UPRIGHT = "any", "upright"
FEWEST = 8
"""Shadow people from whom it can be learned what strangers look like."""
SLICES = 4
"""Of each of them that are compared, at most: those with most of what is segmented."""


@dataclass(frozen=True, kw_only=True)
class Membership(Attack):
    """Two tests, fixed beforehand, of which the better one counts (`leakage.membership` corrects for the choice).

    The first: a linear probe learns to read labels off the levels of the first half of the shadow patients, none of
    whom was trained on. On the others its error is regressed on what makes a sample hard, the area of the label. A
    target whose error lies below what this predicts is taken for a member, the more so the more standard deviations it
    does. Where the adversary has no labels of the targets, the probe's own outline takes their place.

    The second: the adversary trains encoders of its own on random halves of its people, sees there what many signs of
    each level look like for people who were seen and for others, in units of these, and learns from it which signs
    tell and how much (`member_signs`, `people`, `discriminant`). Nothing is chosen on the targets. It needs eight
    people, and an encoder whose like can be made.

    Args:
        references: encoders that it trains, an even number; below four, the first test alone is made.
        steps: of the training of each.
        batch: of the same.
        rate: of Adam.
        poses: "any": windows are turned and flipped, as in a run; "upright": they are not.
        task: "masks", or "images" where the encoder learned without labels.

    Raises:
        ValueError: an unknown task, or unknown poses.
    """

    name = "membership"
    title = "membership inference"
    source = (
        "loss: Yeom et al., CSF 2018 (arXiv 1709.01604); regression on non-members: Bertran et al., NeurIPS 2023 "
        "(arXiv 2307.03694); encoders of its own: Shokri et al., S&P 2017 (arXiv 1610.05820), LiRA, S&P 2022 (arXiv "
        "2112.03570); signs in features in place of the network's own loss are ours"
    )
    goal = "member"
    role = "coordinator"
    needs = ("encoder", "shadow", "shadow masks")
    uses = frozenset({"model", "shadow", "shadow_masks", "labels", "decoder", "architecture", "adaptive"})
    published = "256 reference networks, trained like the target (LiRA on CIFAR)"
    plain = (
        "Tells who was among the patients that the network learned from: trains networks of its own on people it "
        "knows, and learns from them what a network does to people it has seen."
    )

    references: int = 4
    steps: int = 300
    batch: int = 8
    rate: float = 5e-3
    poses: str = ANY
    task: str = MASKS

    def __post_init__(self) -> None:
        if self.task not in (MASKS, IMAGES):
            raise ValueError(f"task must be {MASKS} or {IMAGES}, not {self.task!r}")
        if self.poses not in (ANY, UPRIGHT):
            raise ValueError(f"poses must be {ANY} or {UPRIGHT}, not {self.poses!r}")

    def recover(self, view: View, knowledge: Knowledge, progress: Progress) -> Recovered:
        """Scores float32 [N, tests], higher for members.

        Raises:
            AttackImpossible: the granted images do not fit.
        """
        chosen = [[s for s in shots if s.seed is None] for shots in usable_shots(view, knowledge)]
        if not all(chosen):
            raise AttackImpossible("membership reads releases that were not augmented: record evaluation")
        seen = gather(chosen, view.seat.modalities, masked=False, device=self.device)[0]
        images = np.asarray(knowledge.shadow[view.seat.name], np.float32)
        if len(images) < 8 or images.shape[2:] != tuple(view.window) or knowledge.shadow_masks is None:
            raise AttackImpossible(
                f"shadow images are {images.shape}: at least eight are needed, of {view.window}"
            )
        world = _Shadow(view, knowledge, images, seen, self.seed, self.device)
        scores, note = self._by_probe(world, seen, outline(knowledge.shadow_masks), knowledge)
        progress("reading labels", 1, 1)
        tests, notes = [scores], [note]
        scene = _Comparison(view, knowledge, images, np.asarray(knowledge.shadow_masks), seen, world)
        if why := self._missing(scene):
            notes.append(f"no reference encoders: {why}")
        else:
            scores, note = self._by_references(scene, progress)
            tests.append(scores)
            notes.append(note)
        return Recovered(np.stack(tests, 1).astype(np.float32), int(seen.views.max()), tuple(notes))

    def _by_probe(
        self, world: _Shadow, seen: Evidence, labels: np.ndarray, knowledge: Knowledge
    ) -> tuple[np.ndarray, str]:
        """The first test."""
        half = len(labels) // 2
        probe = LinearProbe.learn(world, labels[:half], np.arange(half), self.seed)
        strangers = np.arange(half, len(labels))
        errors, hardness = read(probe, world, labels, strangers)
        known = None if knowledge.labels is None else outline(knowledge.labels)
        own, own_hardness = probe.errors({n: level.mean for n, level in seen.levels.items()}, known)
        weights = np.linalg.lstsq(hardness, errors, rcond=None)[0]
        spread = max(float(np.std(errors - hardness @ weights)), 1e-9)
        return (
            own_hardness @ weights - own
        ) / spread, f"{len(strangers)} shadow samples say how hard a stranger is"

    def _missing(self, scene: _Comparison) -> str:
        """Why the second test cannot be made; empty if it can."""
        count = len(set(scene.people.tolist()))
        if self.references < 4:
            return "none were asked for"
        if count < FEWEST:
            return f"the images are of {count} people, {FEWEST} are needed"
        if not scene.knowledge.architecture or not trainable(scene.world.model):
            return "it is not known which network it is"
        return ""

    def _by_references(self, scene: _Comparison, progress: Progress) -> tuple[np.ndarray, str]:
        """The second test."""
        masks, images = scene.masks, scene.images
        decoder = scene.decoder()
        rows = _compared(scene)
        shadow = Group(scene.world, masks, scene.people).of(rows)
        targets = {n: level.mean for n, level in scene.seen.levels.items()}
        order = np.unique(scene.keys, return_inverse=True)[1]
        asked = Group(
            lambda batch: {n: level[torch.as_tensor(batch)] for n, level in targets.items()},
            scene.knowledge.labels, order,
        )  # fmt: skip
        course = Course(self.steps, self.batch, self.rate, self.poses == ANY, self.task)
        tables = []
        made = train_references(
            scene.world.model, scene.view.backbone, images, masks, scene.people, course,
            2 * (self.references // 2), self.seed, self.device, progress,
        )  # fmt: skip
        for number, reference in enumerate(made):
            sender = scene.world.through(reference.model)
            every = Group(sender, masks, scene.people).of(rows)
            inside = reference.seen[shadow.people]
            strangers, asked_for = (every.of(np.flatnonzero(kind)) for kind in (~inside, inside))
            if asked.masks is None:
                asked_for = replace(asked_for, masks=None)
            judge = reference.decoder if decoder is not None else None
            signs = signs_of(strangers, asked_for, judge, self.seed + number)
            who = [np.flatnonzero(kind) for kind in (~reference.seen, reference.seen)]
            kinds = np.repeat([False, True], [len(one) for one in who])
            tables.append(Table(np.concatenate(signs), kinds, np.concatenate(who)))
        told = learn(tables)
        _, found = signs_of(shadow, asked, decoder, self.seed)
        note = (
            f"{len(tables)} reference encoders of {self.steps} steps, each on half of {int(scene.people.max()) + 1} "
            f"people; of people and encoders left out in turn, {found.shape[1]} signs told who was seen with an AUC of "
            f"{told.told:.2f}"
        )
        return told(found)[order], note


class _Comparison(NamedTuple):
    """What the second test works with."""

    view: View
    knowledge: Knowledge
    images: np.ndarray
    masks: np.ndarray
    seen: Evidence
    world: _Shadow

    @property
    def people(self) -> np.ndarray:
        """Whose each shadow sample is, int [N] from 0; where nobody said so, each is another's."""
        names = self.knowledge.shadow_patients
        if len(names) != len(self.images):
            return np.arange(len(self.images))
        found: np.ndarray = np.unique(np.asarray(names), return_inverse=True)[1]
        return found

    @property
    def keys(self) -> list[str]:
        """Who each target is of."""
        return [target.sample.key.hex() for target in self.view.targets]

    def decoder(self) -> nn.Module | None:
        """The coordinator's half, where this view's levels are all that it takes; else None."""
        given = self.knowledge.decoder
        if given is None or len(given.seats) != 1 or len(self.view.seats) != 1:
            return None
        (seat,) = given.seats
        return _OneSeat(given, seat).eval()


class _OneSeat(nn.Module):
    """A decoder of one seat's levels."""

    def __init__(self, decoder: nn.Module, seat: str) -> None:
        super().__init__()
        self.decoder, self.seat = decoder, seat

    def forward(self, levels: dict[str, Tensor]) -> Tensor:
        found: Tensor = self.decoder({self.seat: levels})
        return found


def _compared(scene: _Comparison) -> np.ndarray:
    """Rows of the shadow samples that are compared: of everybody those with most of what is segmented, as many as there
    are of a target, as a rule those with most of it too."""
    _, counts = np.unique(scene.keys, return_counts=True)
    few = min(SLICES, int(np.median(counts)))
    size = outline(scene.masks).reshape(len(scene.masks), -1).sum(1)
    rows = []
    for person in range(int(scene.people.max()) + 1):
        own = np.flatnonzero(scene.people == person)
        rows += own[np.argsort(-size[own], kind="stable")[:few]].tolist()
    return np.asarray(sorted(rows))


class _Shadow:
    """What the site would send of the adversary's own images."""

    def __init__(
        self, view: View, knowledge: Knowledge, images: np.ndarray, seen: Evidence, seed: int, device: str
    ) -> None:
        self.model: nn.Module = frozen(knowledge.model, device)
        self._asked = view, knowledge, images, seen, seed, device
        self._simulation = SimulatedDefences(view, self.model, seed, adaptive=knowledge.adaptive)
        self._images, self._device, self._names = images, device, list(seen.levels)
        self._views = max(round(float(seen.views.mean())), 1)

    def through(self, model: nn.Module) -> _Shadow:
        """The same by another encoder."""
        view, knowledge, images, seen, seed, device = self._asked
        return _Shadow(view, replace(knowledge, model=model), images, seen, seed, device)

    @torch.no_grad()
    def __call__(self, rows: Sequence[int] | np.ndarray) -> dict[str, Tensor]:
        """{level: [B, C, *spatial]} of these images."""
        number = int(rows[0])
        image = torch.from_numpy(self._simulation.images(self._images[rows], number)).to(self._device)
        sent = self.model(image)
        levels: dict[str, AveragedLevel] = self._simulation.averaged(
            sent, number, self._views, dict.fromkeys(self._names, False)
        )
        return {name: level.mean for name, level in levels.items()}
