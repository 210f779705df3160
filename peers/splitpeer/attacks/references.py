"""Encoders that an adversary trains itself, each on half of its own people, as the encoder under attack was trained.

It knows who each of them has seen, and so what an encoder does to people whom it has seen (shadow models: Shokri et
al., IEEE S&P 2017, arXiv 1610.05820; in and out in balance: LiRA, Carlini et al., IEEE S&P 2022, arXiv 2112.03570).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from splitpeer.attacks.base import Progress
from splitpeer.attacks.learning import rounds
from splitpeer.data.augment import augment
from splitpeer.defences.base import Tensors
from splitpeer.models import Decoder, build_decoder, build_encoder, site_seed
from splitpeer.models.backbone import Encoder
from splitpeer.models.cut import Backbone
from splitpeer.training.loss import task_loss
from splitpeer.training.optimiser import Adam

MASKS, IMAGES = "masks", "images"
"""What encoders learned: to segment, or to restore their images without anybody's labels."""


@dataclass(frozen=True)
class Course:
    """How the encoder under attack was trained, as far as the adversary knows."""

    steps: int
    batch: int
    rate: float
    """Of Adam, constant."""
    augment: bool
    """Windows are flipped, turned and rescaled as in a run (SP-11.7)."""
    task: str = MASKS


@dataclass(frozen=True)
class ReferenceEncoder:
    """One of the adversary's own."""

    model: nn.Module
    """In place of the one under attack."""
    decoder: nn.Module
    """{"x0": ...} to logits, or to the image."""
    seen: np.ndarray
    """bool [people], in the order of `halves`."""


def halves(people: int, count: int, seed: int) -> list[np.ndarray]:
    """Who of so many people each of `count` encoders sees, bool [people]: a random half, and the next one the rest.

    So everybody is seen by as many encoders as not (with an even `count`).
    """
    source = np.random.default_rng([seed, people])
    found: list[np.ndarray] = []
    while len(found) < count:
        inside = np.zeros(people, bool)
        inside[source.permutation(people)[: people // 2]] = True
        found += [inside, ~inside]
    return found[:count]


def trainable(model: nn.Module) -> bool:
    """Whether it is known how to make another one like it: there are encoders in it."""
    return any(isinstance(module, Encoder) for module in model.modules())


def train_references(
    model: nn.Module,
    backbone: Backbone,
    images: np.ndarray,
    masks: np.ndarray,
    people: np.ndarray,
    course: Course,
    count: int,
    seed: int,
    device: str,
    progress: Progress,
) -> Iterator[ReferenceEncoder]:
    """References one after the other, from weights of their own.

    Args:
        model: the one under attack: its architecture is taken, its weights are not.
        images: float32 [N, channels, *spatial].
        masks: uint8 [N, regions, *spatial].
        people: int [N], from 0: whose each is.
    """
    total = count * course.steps
    for number, seen in enumerate(halves(int(people.max()) + 1, count, seed)):
        rows = np.flatnonzero(seen[people])

        def told(done: int, number: int = number) -> None:
            progress("reference encoders", number * course.steps + done, total)

        own = site_seed(seed, f"reference {number}")
        made = _afresh(model, own).to(device)
        head = _Head(backbone, made, images, masks, course.task, own).to(device)
        _train(made, head, images[rows], masks[rows], course, own, device, told)
        yield ReferenceEncoder(made.eval().requires_grad_(False), head.eval().requires_grad_(False), seen)


def _afresh(model: nn.Module, seed: int) -> nn.Module:
    """The same network with other weights."""
    made = copy.deepcopy(model).requires_grad_(True)
    encoders = [module for module in made.modules() if isinstance(module, Encoder)]
    for number, encoder in enumerate(encoders):
        width = encoder.in_channels
        fresh = build_encoder(encoder.backbone, in_channels=width, seed=site_seed(seed, f"encoder {number}"))
        encoder.load_state_dict(fresh.state_dict())
    return made


class _Head(nn.Module):
    """A decoder behind levels that may be those of several seats, one after the other."""

    def __init__(
        self,
        backbone: Backbone,
        model: nn.Module,
        images: np.ndarray,
        masks: np.ndarray,
        task: str,
        seed: int,
    ) -> None:
        super().__init__()
        with torch.no_grad():
            sent = model.eval()(torch.from_numpy(images[:1]).to(next(model.parameters()).device))
        first = next(iter(sent))
        self.parts = max(1, sent[first].shape[1] // backbone.cut.channels[first])
        self.names = [f"seat {number}" for number in range(self.parts)]
        outputs = masks.shape[1] if task == MASKS else images.shape[1]
        self.decoder: Decoder = build_decoder(
            backbone, self.names, "concat", outputs, seed=site_seed(seed, "decoder")
        )

    def forward(self, levels: Tensors) -> Tensor:
        """Level name to [B, C, *spatial]."""
        apart = {name: torch.chunk(level, self.parts, 1) for name, level in levels.items()}
        found: Tensor = self.decoder(
            {seat: {name: level[n] for name, level in apart.items()} for n, seat in enumerate(self.names)}
        )
        return found


def _train(
    model: nn.Module, head: nn.Module, images: np.ndarray, masks: np.ndarray, course: Course, seed: int,
    device: str, told: Callable[[int], None],
) -> None:  # fmt: skip
    following = rounds(len(images), course.batch, np.random.default_rng(seed))
    optimiser = Adam([*model.parameters(), *head.parameters()], lr=course.rate)
    model.train()
    head.train()
    with torch.enable_grad():
        for step in range(course.steps):
            shown, wanted = _batch(images, masks, following(), course, (seed + step) % 2**63)
            found = head(model(shown.to(device)))
            goal = wanted.to(device)
            loss = (
                task_loss(found, goal, exclusive=False)
                if course.task == MASKS
                else functional.mse_loss(found, goal)
            )
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            told(step + 1)


def _batch(
    images: np.ndarray, masks: np.ndarray, rows: Sequence[int] | np.ndarray, course: Course, seed: int
) -> tuple[Tensor, Tensor]:
    shown, wanted = list(images[rows]), list(masks[rows])
    if course.augment:
        # All channels alike: what a modality's own brightness adds is little.
        shown = [augment(image, seed, index, "") for index, image in enumerate(shown)]
        wanted = [augment(mask, seed, index, None) for index, mask in enumerate(wanted)]
    if course.task == IMAGES:
        from splitpeer.pretraining.distortion import Distortion  # MONAI takes seconds to import

        distort = Distortion(shown[0].shape[1:])
        wanted, shown = shown, [distort(one, (seed, index)) for index, one in enumerate(shown)]
    return (
        torch.from_numpy(np.stack(shown).astype(np.float32)),
        torch.from_numpy(np.stack(wanted).astype(np.float32)),
    )
