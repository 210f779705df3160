"""A coordinator's surrogates for the sites: networks of its own, trained on other patients' images.

What PCAT, SDAR and query-free attacks have in common. All seats of those patients are available, so all
surrogates are trained together through the coordinator's real, frozen decoder, which expects all of them. The
surrogate for the site under attack runs the defences that the site is known to run, with a key of the
adversary's own.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from splitpeer.attacks.base import Knowledge, View
from splitpeer.attacks.learning import held_out, rounds, spread, steps_of
from splitpeer.attacks.simulated_defences import SimulatedDefences
from splitpeer.defences.base import Tensors
from splitpeer.defences.network import Defended, build_network
from splitpeer.defences.randomness import Release
from splitpeer.defences.specs import by_place
from splitpeer.errors import AttackImpossible
from splitpeer.models import Decoder, site_seed
from splitpeer.training.loss import task_loss
from splitproto.records import Sample


def shadow_images(view: View, knowledge: Knowledge, name: str, device: str) -> dict[str, Tensor]:
    """The other patients' images by seat, float32 [N, channels, *window], those of the view's seat at least.

    Raises:
        AttackImpossible: they are of another size.
    """
    widths = {seat.name: len(seat.modalities) for seat in view.seats}
    for seat, images in knowledge.shadow.items():
        wanted = (widths.get(seat, 1), *view.window)
        if tuple(images.shape[1:]) != wanted or not len(images):
            raise AttackImpossible(
                f"{name}: the other patients' {seat} images are {list(images.shape)}, "
                f"expected [N, {', '.join(map(str, wanted))}]"
            )
    return {
        seat: torch.from_numpy(np.ascontiguousarray(images, np.float32)).to(device)
        for seat, images in knowledge.shadow.items()
    }


@dataclass
class SurrogateBatch:
    """One training batch of surrogates."""

    sent: dict[str, Tensors]
    """What each surrogate sends, defended where the site is, with its graph."""
    arrived: Tensors
    """What is known of the attacked one's afterwards: the mean of as many releases as of the site; no graph."""
    images: Tensor
    """float32 [B, 1, *window] of the attacked seat, clean."""
    masks: Tensor
    """float32 [B, regions, *window]."""


class Surrogates:
    """Surrogates for all sites, in front of the coordinator's own decoder.

    Args:
        view: what is attacked: architecture, seats, defences.
        knowledge: shadow images of all seats with masks, the decoder; `adaptive`: defences are simulated.
        name: of the attack, for errors.
        batch: samples of a training batch.
        turned: whether what else was sent is turned and flipped, as the view's samples may be.

    Raises:
        AttackImpossible: what is granted does not fit the view.
    """

    def __init__(
        self,
        view: View,
        knowledge: Knowledge,
        name: str,
        *,
        batch: int,
        seed: int,
        device: str,
        turned: bool = False,
    ) -> None:
        self.view, self.batch, self.device = view, batch, device
        self.images = shadow_images(view, knowledge, name, device)
        decoder, shadow_masks = knowledge.decoder, knowledge.shadow_masks
        if decoder is None or shadow_masks is None:
            raise ValueError("surrogates need a decoder and masks: the runner checks them")
        self.decoder = _frozen(decoder, view, name).to(device)
        masks = np.ascontiguousarray(shadow_masks)
        if {len(masks)} != {len(images) for images in self.images.values()}:
            raise AttackImpossible(
                f"{name}: all seats of the other patients and their masks must be equally many"
            )
        # The decoder of exclusive classes has one channel more: the background.
        self.exclusive = self.decoder.out_channels == masks.shape[1] + 1
        if not self.exclusive and masks.shape[1] != self.decoder.out_channels:
            raise AttackImpossible(
                f"{name}: the masks have {masks.shape[1]} regions, the decoder {self.decoder.out_channels} channels: "
                "they are of different tasks"
            )
        self.masks = torch.from_numpy(masks).to(device)
        # First: it says in one line which defence cannot be simulated.
        self._site = SimulatedDefences(view, None, seed, adaptive=knowledge.adaptive)
        self._masked = knowledge.adaptive
        mine = self.images[view.seat.name]
        self._defended = mine
        if self._site.on_images:
            self._defended = torch.from_numpy(self._site.images(mine.cpu().numpy(), 0)).to(device)
        written = known_defences(view, knowledge)
        key = hashlib.sha256(b"stand-in %d" % seed).digest()
        self.encoders = nn.ModuleDict(
            {
                seat.name: build_network(
                    view.backbone, written if seat == view.seat else (), key=key,
                    seed=site_seed(seed, seat.name), strict=False, in_channels=len(seat.modalities),
                )
                for seat in view.seats
            }
        ).to(device)  # fmt: skip
        held = held_out(knowledge.shadow_patients, len(masks))
        self._learned, self._judged = np.flatnonzero(~held), spread(held)
        self._turning = turned or any(
            shot.seed is not None for target in view.targets for shot in target.shots
        )
        self._random = np.random.default_rng(seed)

    def batches(self, count: int) -> Iterator[tuple[int, np.ndarray]]:
        """(step from 0, indices of the shadow patients' samples), in shuffled rounds."""
        following = rounds(len(self._learned), self.batch, self._random)
        for step in range(count):
            yield step, self._learned[following()]

    def steps(self, epochs: int, steps: int | None) -> int:
        """How many batches so many epochs are, if `steps` are not given."""
        return steps_of(epochs, len(self._learned), self.batch, steps)

    def judged(self, views: int = 1) -> SurrogateBatch:
        """The batch of patients held out, upright."""
        turning, self._turning = self._turning, False
        batch = self.draw(self._judged, 0, views)
        self._turning = turning
        return batch

    def _pose(self, *arrays: Tensor) -> tuple[Tensor, ...]:
        """The same flips and quarter turns for all, where the view's samples were augmented."""
        if not self._turning:
            return arrays
        axes = [axis for axis in range(2, arrays[0].ndim) if self._random.random() < 0.5]
        turns = int(self._random.integers(4)) if arrays[0].shape[2] == arrays[0].shape[3] else 0
        return tuple(torch.rot90(torch.flip(a, axes), turns, (2, 3)) for a in arrays)

    def draw(self, indices: np.ndarray, step: int, views: int = 1) -> SurrogateBatch:
        """One training batch; `views`: releases of each sample that the adversary has and averages."""
        view = self.view
        inputs = {seat.name: self.images[seat.name][indices] for seat in view.seats}
        clean, masks = inputs[view.seat.name], self.masks[indices].float()
        inputs[view.seat.name] = self._defended[indices]
        clean, masks, *posed = self._pose(clean, masks, *inputs.values())
        sent = {}
        for seat, images in zip(inputs, posed, strict=True):
            if seat != view.seat.name:
                sent[seat] = self.encoders[seat](images)
                continue
            encoder = self.encoders[seat]
            if not isinstance(encoder, Defended):
                sent[seat] = arrived = encoder(images)
                continue
            plain = encoder.encoder(images)
            sent[seat] = encoder.stack(plain, release_of(indices.tolist(), step))
            arrived = sent[seat]
            if views > 1:
                masked = dict.fromkeys(plain, self._masked)
                averaged = self._site.averaged(encoder.stack.structure(plain), step, views, masked)
                arrived = {name: level.mean for name, level in averaged.items()}
        return SurrogateBatch(sent, {name: tensor.detach() for name, tensor in arrived.items()}, clean, masks)

    def task_loss(self, sent: dict[str, Tensors], masks: Tensor) -> Tensor:
        """The segmentation's loss through the coordinator's decoder: a scalar."""
        return task_loss(self.decoder(sent), masks, exclusive=self.exclusive)


def known_defences(view: View, knowledge: Knowledge) -> list[str]:
    """The defences of activations that an adaptive adversary simulates, as written; of a naive one none."""
    return list(by_place(view.defences).activations) if knowledge.adaptive else []


def _frozen(decoder: Decoder, view: View, name: str) -> Decoder:
    """A copy whose weights never change.

    Raises:
        AttackImpossible: it is of another job.
    """
    names = [seat.name for seat in view.seats]
    if set(decoder.seats) != set(names) or tuple(decoder.levels) != tuple(sorted(view.levels)):
        raise AttackImpossible(
            f"{name}: the decoder takes levels {list(decoder.levels)} of {', '.join(decoder.seats)}, the view "
            f"has levels {list(view.levels)} of {', '.join(names)}"
        )
    return copy.deepcopy(decoder).requires_grad_(False)


def release_of(indices: Sequence[int], step: int) -> Release:
    """A release of the shadow samples `indices`; what is kept per sample follows their numbers."""
    samples = tuple(Sample(int(i).to_bytes(16, "big"), (0, 0, 0)) for i in indices)
    return Release(b"adversary's own.", "train", step, 0, samples)
