"""A network that reads outlines off gradients, trained on jobs that the site plays itself with other patients.

A site does not know the decoder whose gradients it is sent, but it knows the job, the defence that was announced, and
its own modality. It plays the job with patients whose labels it has, under decoders and keys of its own, and learns
from what it would be sent there. Channels mean something else in every job: the network sees sizes, angles and
agreements instead (`features`), and the site's own image with them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch
from monai.networks.nets import BasicUNet
from torch import Tensor, nn
from torch.nn import functional

from splitpeer.attacks.base import Attack, Knowledge, Progress, Recovered, Shot, Target, View
from splitpeer.attacks.label.field import agreement, pooled
from splitpeer.attacks.label.gradients import blurred, by_step, levels_sent, upsampled
from splitpeer.attacks.learning import held_out, rounds, spread, steps_of, train
from splitpeer.attacks.surrogates import release_of, shadow_images
from splitpeer.defences.stack import Stack, defend, make_stack
from splitpeer.errors import AttackImpossible, ConfigError
from splitpeer.models import build_decoder, build_encoder, site_seed
from splitpeer.models.cut import level_name
from splitpeer.models.seeding import seeded
from splitpeer.training.loss import region_loss
from splitpeer.training.optimiser import make_optimiser, make_schedule
from splitpeer.training.split_step import ClientHalf, CoordinatorHalf

GROWTH = (1, 1, 2, 4, 8, 1)
"""Channels of the network's levels, and of its last, in units of the first."""
FINEST = 3
"""Levels that are looked at, from the finest that was sent."""
HARVESTED = 8
"""Steps of one played job that are learned from, at most: the last ones."""
RATE = 5e-3
_TINY = 1e-30


@dataclass(frozen=True, kw_only=True)
class GradientNetwork(Attack):
    """A small U-Net from (gradients, own image) to the mask.

    Training pairs come from played jobs: as many steps as the view reaches into training, at most `job_steps`, the
    defence applied with keys of the adversary's own, as many releases as the view has of a sample. Nothing is assumed
    of a defence but that it can be run, so that this is the adaptive adversary for all of them. Pairs of patients held
    out say when the network was best, and which of two sizes is better.
    """

    name = "gradient-network"
    title = "A network trained on jobs played with other patients"
    source = "ours; for one gradient per sample see Fu et al. 2022 (USENIX Security, model completion)"
    plain = (
        "Another hospital plays the study with patients whose outlines it has, and trains a network to read outlines "
        "off the training signal."
    )
    goal = "mask"
    role = "client"
    needs = ("shadow", "shadow masks")
    uses = frozenset({"shadow", "shadow_masks", "own_images", "architecture", "adaptive"})
    evidence = "the gradients this site was sent"

    budget: ClassVar[tuple[str, ...]] = ("batches", "steps")

    batches: int = 40
    """Batches of played jobs to learn from."""
    batch: int = 8
    job_steps: int = 30
    """Training steps of a played job, at most."""
    epochs: int = 20
    """How often the network is shown each pair."""
    steps: int | None = None
    """Training steps of the network instead."""
    width: tuple[int, ...] = (8, 16)
    """Channels at full resolution, of each network that is tried."""

    def __post_init__(self) -> None:
        if not self.width or min(self.width) < 1:
            raise ValueError(f"width must be 1 or more, not {'+'.join(map(str, self.width))}")

    def recover(self, view: View, knowledge: Knowledge, progress: Progress) -> Recovered:
        """Scores float32 [N, *spatial]: logits."""
        levels = levels_sent(view, self.name)[:FINEST]
        images = shadow_images(view, knowledge, self.name, "cpu")[view.seat.name].numpy()
        masks = np.ascontiguousarray(knowledge.shadow_masks, np.float32)
        if len(masks) != len(images):
            raise AttackImpossible(f"{self.name}: {len(images)} images of other patients, {len(masks)} masks")
        releases = max(1, round(float(np.median([len(t.shots) for t in view.targets if t.shots]))))
        played, truths, of = [], [], []
        for done, (rows, shadow) in enumerate(self._jobs(view, knowledge, images, masks, releases), 1):
            own = images[rows] if knowledge.own_images is not None else None
            played.append(features(shadow, levels, own))
            truths.append(torch.from_numpy(masks[rows].max(axis=1, keepdims=True)))
            of.append(rows)
            progress(f"{self.title}: jobs", done, self.batches)
        held = held_out(knowledge.shadow_patients, len(images))[np.concatenate(of)]
        if held.all() or not held.any():  # few jobs were played
            held = held_out((), len(held))
        pairs = _Pairs(torch.cat(played), torch.cat(truths), held)
        found_by = [self._train(pairs, width, progress) for width in self.width]
        left, width, network = min(found_by, key=lambda one: one[0])
        with torch.inference_mode():
            shown = features(view, levels, knowledge.own_images).to(self.device)
            found = torch.cat([network(part) for part in shown.split(4 * self.batch)])[:, 0]
        return Recovered(
            found.float().cpu().numpy(), max(len(t.shots) for t in view.targets), (),
            {"levels": list(levels), "releases": releases, "best_width": width}, merit=1 - left,
        )  # fmt: skip

    def _jobs(
        self, view: View, knowledge: Knowledge, images: np.ndarray, masks: np.ndarray, releases: int
    ) -> Iterator[tuple[np.ndarray, View]]:
        """Rows of the other patients, and what the site would be sent of them."""
        last = max(shot.step for target in view.targets for shot in target.shots if shot.gradients)
        length = min(last, self.job_steps)
        random = np.random.default_rng(self.seed)
        size, left, number = min(self.batch, len(images)), self.batches, 0
        while left:
            job = PlayedJob(view, masks.shape[1], knowledge.adaptive, self.seed + number, length)
            for step in range(1, length + 1):
                rows = random.choice(len(images), size, replace=False)
                wanted = left and step > length - HARVESTED
                sent = job.step(images[rows], masks[rows], rows, step, releases if wanted else 0)
                if wanted:
                    left -= 1
                    yield rows, sent
            number += 1

    def _train(self, pairs: _Pairs, width: int, progress: Progress) -> tuple[float, int, nn.Module]:
        """How confused it is by patients held out, the width, and the network with its best weights."""
        dimensions = pairs.inputs.ndim - 2
        widths = tuple(width * times for times in GROWTH)
        network: nn.Module = seeded(
            lambda: BasicUNet(
                dimensions, pairs.inputs.shape[1], 1, widths, act=("LeakyReLU", {"negative_slope": 0.1})
            ),
            self.seed,
        ).to(self.device)
        learned = np.flatnonzero(~pairs.held)
        steps = steps_of(self.epochs, len(learned), self.batch, self.steps)
        random = np.random.default_rng(self.seed)
        following = rounds(len(learned), self.batch, random)
        judged = [t[spread(pairs.held)].to(self.device) for t in (pairs.inputs, pairs.masks)]

        def loss(step: int) -> Tensor:
            rows = torch.as_tensor(learned[following()])
            flips = [2 + axis for axis in range(dimensions) if random.random() < 0.5]
            x, y = (t[rows].flip(flips).to(self.device) for t in (pairs.inputs, pairs.masks))
            return region_loss(network(x), y)

        best = train(
            network, loss, lambda: _confused(network(judged[0]), judged[1]), steps, rate=RATE,
            progress=progress, what=f"{self.title}, width {width}",
        )  # fmt: skip
        return best.error, width, network


def _confused(logits: Tensor, masks: Tensor) -> float:
    """Cross-entropy, the target counting as much as all that is not: a guess has .69. Overlaps of the few samples that
    are held out jump too much to choose by."""
    apart = [functional.softplus(sign * logits[masks == held]) for sign, held in ((-1, 1), (1, 0))]
    return float(torch.stack([values.mean() for values in apart if len(values)]).mean())


@dataclass(frozen=True)
class _Pairs:
    """What a network learns from."""

    inputs: Tensor
    """float32 [N, features, *window]."""
    masks: Tensor
    """float32 [N, 1, *window]."""
    held: np.ndarray
    """bool [N]: of patients held out."""


class PlayedJob:
    """The job of a view with one site and a decoder of the adversary's own.

    Args:
        view: names network, modality and defence.
        regions: of the masks.
        adaptive: run the defence of the gradients.
        steps: of the job's learning-rate schedule.

    Raises:
        AttackImpossible: a defence that is named is not known here.
    """

    def __init__(self, view: View, regions: int, adaptive: bool, seed: int, steps: int) -> None:
        self.view, seat = view, view.seat
        encoder = build_encoder(
            view.backbone, seed=site_seed(seed, seat.name), in_channels=len(seat.modalities)
        )
        decoder = build_decoder(
            view.backbone, (seat.name,), "concat", regions, seed=site_seed(seed, "played")
        )
        on, to = make_optimiser(encoder.parameters(), lr=RATE), make_optimiser(decoder.parameters(), lr=RATE)
        self.site = ClientHalf(encoder, on, make_schedule(on, "constant", steps))
        self.hub = CoordinatorHalf(decoder, to, make_schedule(to, "constant", steps))
        try:
            self.stack: Stack = make_stack(
                view.gradient_defences if adaptive else (), key=hashlib.sha256(b"played %d" % seed).digest(),
                channels=view.channels, dimensions=view.dimensions, place="gradients",
            )  # fmt: skip
        except ConfigError as error:
            raise AttackImpossible(
                f"the capture names a defence that cannot be simulated ({error})"
            ) from None

    def step(self, images: np.ndarray, masks: np.ndarray, rows: np.ndarray, step: int, releases: int) -> View:
        """One training step; returns a view of `releases` draws of its gradients, the samples in order."""
        sent = self.site.forward(images)
        _, gradients = self.hub.step({self.view.seat.name: sent}, masks)
        own = gradients[self.view.seat.name]
        self.site.backward(own)
        shots: list[list[Shot]] = [[] for _ in images]
        release = release_of(rows.tolist(), step)
        for number in range(releases):
            drawn = replace(release, step=step + number * 2**20, target=masks.astype(np.uint8))
            given = defend(self.stack, own, drawn) if self.stack else own
            for index, of in enumerate(shots):
                of.append(
                    Shot("train", number, index, None, gradients={n: a[index] for n, a in given.items()})
                )
        targets = tuple(Target(sample, tuple(of)) for sample, of in zip(release.samples, shots, strict=True))
        return replace(self.view, targets=targets)


def features(view: View, levels: tuple[int, ...], own: np.ndarray | None) -> Tensor:
    """What the network sees of every target, float32 [N, 4 per level + channels of the own image, *window].

    For each level, of the mean gradient of all releases: the logarithm of its size, before and after smoothing over
    neighbours; its cosine with the mean direction; and how well the axes of all releases agree. Zero where a target
    has no gradient.
    """
    near = 2.0 / view.window[0]
    mean = pooled(view)
    rows = [(number, shot) for shots in by_step(view, None) for number, shot in shots]
    seen = [number for number, target in enumerate(mean.targets) if target.shots]
    parts = []
    for level in levels:
        name = level_name(level)
        field = torch.stack([torch.from_numpy(mean.targets[n].shots[0].gradients[name]) for n in seen])
        unit = functional.normalize(field, dim=1, eps=_TINY)
        usual = unit.mean(dim=(0, *range(2, field.ndim)), keepdim=True)
        numbers, agreed = agreement(rows, level, near, 8)
        agreed = agreed[[numbers.index(n) for n in seen]]
        maps = [_size(field), _size(blurred(field, near * field.shape[2])),
                functional.cosine_similarity(unit, usual.expand_as(unit), dim=1)[:, None],
                agreed / agreed.mean().clamp(min=_TINY) - 1]  # fmt: skip
        for one in maps:
            whole = torch.zeros((len(view.targets), *view.window))
            whole[seen] = upsampled(one, view)
            parts.append(whole[:, None])
    if own is not None:
        parts.append(torch.from_numpy(np.ascontiguousarray(own, np.float32)))
    return torch.cat(parts, dim=1)


def _size(field: Tensor) -> Tensor:
    """The logarithm of the norm over channels, in units of its mean: [N, 1, *spatial]."""
    norm = field.square().sum(dim=1, keepdim=True).sqrt()
    return torch.log(norm / norm.mean().clamp(min=_TINY) + 1e-2)
