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

import numpy as np
import torch
from monai.networks.nets import BasicUNet
from torch import Tensor, nn
from torch.nn import functional

from splitpeer.attacks.base import Attack, Knowledge, Progress, Recovered, Shot, Target, View
from splitpeer.attacks.label.field import agreement, pooled
from splitpeer.attacks.label.gradients import blurred, by_step, levels_sent, upsampled
from splitpeer.attacks.surrogates import release_of, shadow_images
from splitpeer.defences.stack import Stack, defend, make_stack
from splitpeer.errors import AttackImpossible, ConfigError
from splitpeer.models import build_decoder, build_encoder, site_seed
from splitpeer.models.cut import level_name
from splitpeer.models.seeding import seeded
from splitpeer.training.loss import region_loss
from splitpeer.training.optimiser import make_optimiser, make_schedule
from splitpeer.training.split_step import ClientHalf, CoordinatorHalf

WIDTHS = (8, 8, 16, 32, 64, 8)
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
    of a defence but that it can be run, so that this is the adaptive adversary for all of them.
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

    batches: int = 40
    """Batches of played jobs to learn from."""
    batch: int = 8
    job_steps: int = 30
    """Training steps of a played job, at most."""
    steps: int = 200
    """Training steps of the network."""

    def recover(self, view: View, knowledge: Knowledge, progress: Progress) -> Recovered:
        """Scores float32 [N, *spatial]: logits."""
        levels = levels_sent(view, self.name)[:FINEST]
        images = shadow_images(view, knowledge, self.name, "cpu")[view.seat.name].numpy()
        masks = np.ascontiguousarray(knowledge.shadow_masks, np.float32)
        if len(masks) != len(images):
            raise AttackImpossible(f"{self.name}: {len(images)} images of other patients, {len(masks)} masks")
        releases = max(1, round(float(np.median([len(t.shots) for t in view.targets if t.shots]))))
        played, truths = [], []
        for done, (rows, shadow) in enumerate(self._jobs(view, knowledge, images, masks, releases), 1):
            own = images[rows] if knowledge.own_images is not None else None
            played.append(features(shadow, levels, own))
            truths.append(torch.from_numpy(masks[rows].max(axis=1, keepdims=True)))
            progress(f"{self.title}: jobs", done, self.batches)
        network = self._train(torch.cat(played), torch.cat(truths), progress)
        with torch.inference_mode():
            shown = features(view, levels, knowledge.own_images).to(self.device)
            found = torch.cat([network(part) for part in shown.split(4 * self.batch)])[:, 0]
        return Recovered(
            found.float().cpu().numpy(), max(len(t.shots) for t in view.targets), (),
            {"levels": list(levels), "releases": releases},
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

    def _train(self, inputs: Tensor, masks: Tensor, progress: Progress) -> nn.Module:
        dimensions = inputs.ndim - 2
        network: nn.Module = seeded(
            lambda: BasicUNet(
                dimensions, inputs.shape[1], 1, WIDTHS, act=("LeakyReLU", {"negative_slope": 0.1})
            ),
            self.seed,
        ).to(self.device)
        optimiser = torch.optim.Adam(network.parameters(), RATE)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, RATE, total_steps=max(self.steps, 2))
        random = np.random.default_rng(self.seed)
        for step in range(self.steps):
            rows = torch.as_tensor(random.integers(len(inputs), size=self.batch))
            flips = [2 + axis for axis in range(dimensions) if random.random() < 0.5]
            x, y = (t[rows].flip(flips).to(self.device) for t in (inputs, masks))
            optimiser.zero_grad(set_to_none=True)
            region_loss(network(x), y).backward()
            optimiser.step()
            schedule.step()
            progress(self.title, step + 1, self.steps)
        return network.eval()


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
