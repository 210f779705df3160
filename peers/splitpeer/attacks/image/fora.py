"""FORA: a substitute encoder learned from unlabelled images and the distribution of what was sent, then inverted."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from splitpeer.attacks.base import Attack, Knowledge, Progress, Recovered, View
from splitpeer.attacks.image.sdar import all_evidence, releases, revealed, some
from splitpeer.attacks.learning import held_out, spread, steps_of, train, turned
from splitpeer.attacks.networks import critic, image_decoder
from splitpeer.attacks.simulated_defences import SimulatedDefences
from splitpeer.attacks.surrogates import known_defences, release_of, shadow_images
from splitpeer.defences.base import Tensors
from splitpeer.defences.kinds import parse_all
from splitpeer.defences.stack import Stack, make_stack
from splitpeer.models import site_seed
from splitpeer.models.cut import Cut, level_number
from splitpeer.models.seeding import seeded
from splitpeer.training.optimiser import Adam

_CONVOLUTION = {2: nn.Conv2d, 3: nn.Conv3d}
_NORM = {2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}
_BANDWIDTHS = tuple(2.0**k for k in range(-3, 2))


@dataclass(frozen=True, kw_only=True)
class FORA(Attack):
    """A substitute of another architecture is trained until neither a critic (WGAN-GP) nor the distance of the
    means in several kernels' feature spaces (MK-MMD) tells its activations of public images from the site's;
    then a decoder learns to invert the substitute, and is shown what the site sent. Needs no label and no part
    of the real network, only that the public images are alike.

    Published: 40,000 iterations of 64 images, Adam 1e-4 (critic 3e-4), penalty 1000, weight of MK-MMD 0.8, 5,000
    images. Here: rates ten times larger; the distances are taken level by level and averaged; the site's samples are
    all that the capture holds. Public patients are held out: the decoder that did best on them is kept.
    """

    name = "fora"
    title = "Substitute by distribution (FORA)"
    source = "Xu et al., CVPR 2024 (arXiv 2405.04115)"
    goal = "image"
    role = "coordinator"
    needs = ("shadow",)
    uses = frozenset({"shadow", "adaptive"})
    reads_traffic = True
    budget: ClassVar[tuple[str, ...]] = ("epochs", "steps", "inverse_steps")
    published = "40000 iterations of 64 at 1e-4"
    plain = "The coordinator builds a network whose output looks like the hospital's, and learns to turn that back."

    epochs: int = 20
    """How often each public image is shown, to the substitute and to the decoder."""
    steps: int | None = None
    """Batches for substitute and critic, instead."""
    inverse_steps: int | None = None
    """Batches for the decoder, which is trained afterwards, instead."""
    batch: int = 12
    """Images of a step."""
    rate: float = 1e-3
    critic_rate: float = 3e-3
    inverse_rate: float = 1e-3
    """Learning rate of Adam."""
    mmd: float = 0.8
    """Share of MK-MMD in the substitute's loss; the rest is the critic's."""
    penalty: float = 1000.0
    """Weight of the critic's gradient penalty."""

    def recover(self, view: View, knowledge: Knowledge, progress: Progress) -> Recovered:
        """Images in the site's intensities, as far as the public ones are alike."""
        groups, traffic = all_evidence(view, knowledge, self.device), view.traffic()
        images = shadow_images(view, knowledge, self.name, self.device)[view.seat.name]
        real = releases(view, traffic, list(groups[0].levels), self.device)
        imitation = _Imitation(view, knowledge, real, self.seed, self.device)
        shots = (*traffic, *(shot for target in view.targets for shot in target.shots))
        public = _Public(
            images, imitation.defended(images), held_out(knowledge.shadow_patients, len(images)),
            any(shot.seed is not None for shot in shots), self.seed,
        )  # fmt: skip
        source = torch.Generator().manual_seed(self.seed)
        distances = self._imitate(view, imitation, public, real, source, progress)
        channels = {name: values.shape[1] for name, values in real.items()}
        decoder = image_decoder(
            view.backbone.cut, channels, site_seed(self.seed, "decoder"), images=len(view.seat.modalities)
        ).to(self.device)
        errors = self._invert(decoder, imitation, public, source, progress)
        history = {"mmd": distances, "image": errors}
        return Recovered(
            revealed(decoder, groups),
            int(torch.stack([g.views for g in groups]).sum(0).max()),
            settings={"releases": len(next(iter(real.values())))},
            history=history,
        )

    def _imitate(
        self, view: View, imitation: _Imitation, public: _Public, real: dict[str, Tensor], source: torch.Generator,
        progress: Progress,
    ) -> tuple[float, ...]:  # fmt: skip
        """Train the substitute and the critic in turns; returns the distance of each step."""
        channels = {name: values.shape[1] for name, values in real.items()}
        judge = critic(view.backbone.cut, channels, site_seed(self.seed, "critic")).to(self.device)
        own_steps = Adam(imitation.substitute.parameters(), self.rate)
        judge_steps = Adam(judge.parameters(), self.critic_rate)
        distances = []
        steps = steps_of(self.epochs, public.count, self.batch, self.steps)
        for step in range(steps):
            rows, _, inputs = public.some(self.batch, source)
            sent = imitation(inputs, rows, step)
            truth = some(real, self.batch, step)
            distance = torch.stack([mk_mmd(truth[name], sent[name]) for name in real]).mean()
            loss = self.mmd * distance + (1 - self.mmd) * judge(sent).mean()
            own_steps.zero_grad()
            loss.backward()
            own_steps.step()
            sent = {name: tensor.detach() for name, tensor in sent.items()}
            loss = judge(truth).mean() - judge(sent).mean()
            loss = loss + self.penalty * gradient_penalty(judge, truth, sent, source)
            judge_steps.zero_grad()
            loss.backward()
            judge_steps.step()
            distances.append(distance.item())
            progress(f"{self.title}: substitute", step + 1, steps)
        return tuple(distances)

    def _invert(
        self,
        decoder: nn.Module,
        imitation: _Imitation,
        public: _Public,
        source: torch.Generator,
        progress: Progress,
    ) -> tuple[float, ...]:
        """Train the decoder on what the substitute sends of the public images; returns the error of each step."""
        errors: list[float] = []

        def error(rows: list[int], images: Tensor, inputs: Tensor, number: int) -> Tensor:
            with torch.no_grad():
                sent = imitation(inputs, rows, number)
            return functional.mse_loss(decoder(sent), images)

        def loss(step: int) -> Tensor:
            now = error(*public.some(self.batch, source), 2**20 + step)
            errors.append(now.item())
            return now

        train(
            decoder, loss, lambda: error(*public.judged(), 0).item(),
            steps_of(self.epochs, public.count, self.batch, self.inverse_steps), rate=self.inverse_rate,
            progress=progress, what=f"{self.title}: inverse",
        )  # fmt: skip
        return tuple(errors)


class _Public:
    """Public images, and what they are under the site's defences of images.

    Args:
        images: float32 [N, C, *window]. inputs: the same, defended.
        held: bool [N], kept for judging.
        turned: flip and turn what is drawn, as augmentation does.
    """

    def __init__(self, images: Tensor, inputs: Tensor, held: np.ndarray, turned: bool, seed: int) -> None:
        self._images, self._inputs, self._turned = images, inputs, turned
        self._learned, self._judged = np.flatnonzero(~held), spread(held)
        self._random = np.random.default_rng(seed)

    @property
    def count(self) -> int:
        """To learn from."""
        return len(self._learned)

    def some(self, count: int, source: torch.Generator) -> tuple[list[int], Tensor, Tensor]:
        """Rows, images and inputs drawn at random."""
        picked = self._learned[torch.randint(self.count, (count,), generator=source).numpy()]
        images, inputs = self._images[picked], self._inputs[picked]
        if self._turned:
            both = turned(torch.cat([images, inputs], 1).cpu().numpy(), self._random, mirrored=False)
            images, inputs = torch.from_numpy(both).to(images).split(images.shape[1], 1)
        return picked.tolist(), images, inputs

    def judged(self) -> tuple[list[int], Tensor, Tensor]:
        """Those that are held out."""
        return self._judged.tolist(), self._images[self._judged], self._inputs[self._judged]


class Substitute(nn.Module):
    """An encoder that shares only the shapes with the site's: one strided, wider convolution a level, no pooling."""

    def __init__(self, cut: Cut, deepest: int, in_channels: int = 1) -> None:
        super().__init__()
        self.blocks = nn.ModuleDict()
        arriving, dimensions = in_channels, cut.dimensions
        convolution: Any = _CONVOLUTION[dimensions]
        for level, one in enumerate(cut.levels[: deepest + 1]):
            self.blocks[one.name] = nn.Sequential(
                convolution(arriving, one.channels, 5, stride=cut.step(level), padding=2),
                _NORM[dimensions](one.channels, affine=True),
                nn.LeakyReLU(0.1),
            )
            arriving = one.channels

    def forward(self, x: Tensor) -> Tensors:
        """Image [B, in_channels, *spatial] to {"x0": ...}, every level."""
        sent = {}
        for name, block in self.blocks.items():
            x = block(x)
            sent[name] = x
        return sent


class _Imitation:
    """The substitute behind the site's known defences, drawn with a key of the adversary's own."""

    def __init__(
        self, view: View, knowledge: Knowledge, real: Mapping[str, Tensor], seed: int, device: str
    ) -> None:
        self._site = SimulatedDefences(view, None, seed, adaptive=knowledge.adaptive)
        deepest = max(map(level_number, real))
        self.substitute = seeded(
            lambda: Substitute(view.backbone.cut, deepest, len(view.seat.modalities)),
            site_seed(seed, "substitute"),
        ).to(device)
        self._stack = _stack(view, knowledge, seed).to(device)
        # Channels that a bottleneck closed are zero in all that was sent.
        self._open = {
            name: (values != 0)
            .flatten(2)
            .any(dim=2)
            .any(dim=0)
            .float()
            .reshape(1, -1, *[1] * view.dimensions)
            for name, values in real.items()
        }

    def defended(self, images: Tensor) -> Tensor:
        """The public images under the site's known defences of images."""
        if not self._site.on_images:
            return images
        return torch.from_numpy(self._site.images(images.cpu().numpy(), 0)).to(images)

    def __call__(self, images: Tensor, indices: list[int], step: int) -> Tensors:
        found = self.substitute(images)
        sent = {name: found[name] * mask for name, mask in self._open.items()}
        return self._stack(sent, release_of(indices, step)) if self._stack else sent


def _stack(view: View, knowledge: Knowledge, seed: int) -> Stack:
    parts = parse_all(known_defences(view, knowledge), "activations")
    return make_stack(
        [part for part in parts if not part.kind.structural],
        key=hashlib.sha256(b"substitute %d" % seed).digest(),
        channels=view.channels,
        dimensions=view.dimensions,
        after=[str(part) for part in parts if part.kind.structural],
        strict=False,
    )


def mk_mmd(a: Tensor, b: Tensor) -> Tensor:
    """Squared maximum mean discrepancy of [n, ...] and [m, ...] under a sum of Gaussian kernels: a scalar.

    Gretton et al., JMLR 13, 2012, the biased estimate; bandwidths sigma^2 = 2^k * mean squared distance, k = -3..1,
    the mean taken without a graph.
    """
    both = torch.cat([a.flatten(1), b.flatten(1)])
    squares = torch.cdist(both, both, compute_mode="donot_use_mm_for_euclid_dist").square()
    count = len(both)
    middle = (squares.detach().sum() / (count * (count - 1))).clamp(min=1e-12)
    kernel = torch.stack([torch.exp(-squares / (width * middle)) for width in _BANDWIDTHS]).sum(dim=0)
    n = len(a)
    return kernel[:n, :n].mean() + kernel[n:, n:].mean() - 2 * kernel[:n, n:].mean()


def gradient_penalty(judge: nn.Module, real: Tensors, fake: Tensors, source: torch.Generator) -> Tensor:
    """Mean (|gradient| - 1)^2 at random points between `real` and `fake` (WGAN-GP: Gulrajani et al. 2017)."""
    first = next(iter(real.values()))
    count = min(len(first), len(next(iter(fake.values()))))
    share = torch.rand(count, generator=source).to(first)
    between = {}
    for name, values in real.items():
        wide = share.reshape(-1, *[1] * (values.ndim - 1))
        between[name] = (wide * values[:count] + (1 - wide) * fake[name][:count]).requires_grad_()
    gradients = torch.autograd.grad(judge(between).sum(), list(between.values()), create_graph=True)
    norm = torch.cat([g.flatten(1) for g in gradients], dim=1).norm(dim=1)
    penalty: Tensor = (norm - 1).square().mean()
    return penalty
