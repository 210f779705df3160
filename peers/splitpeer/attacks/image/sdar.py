"""PCAT and SDAR: a curious coordinator trains surrogates of the sites through its own decoder, and inverts those.

A surrogate that serves the same decoder as well as the real site must speak its language; then a network that
turns the surrogate's activations into images turns the site's too. Passive: training does not notice.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial, reduce
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from splitpeer.attacks.base import Attack, Knowledge, Progress, Recovered, Shot, View
from splitpeer.attacks.evidence import Evidence, gather, require_shots
from splitpeer.attacks.learning import Best
from splitpeer.attacks.networks import critic, image_cut, image_decoder
from splitpeer.attacks.pose import unpose_images
from splitpeer.attacks.surrogates import Surrogates
from splitpeer.models import site_seed
from splitpeer.training.optimiser import Adam


@dataclass(frozen=True, kw_only=True)
class SDAR(Attack):
    """PCAT with two discriminators: one tells the surrogate's activations from the site's, one tells recovered
    images from real ones.

    Published for CIFAR: 20,000 steps of 128 images at Adam 1e-3 (surrogate) and 5e-4 (decoder), each
    discriminator with an optimiser of its own, weights 0.02 and 1e-5. Here the surrogates are those
    of all contrasts and a step is one batch of a job. The discriminators compare single releases, of all samples that
    the capture holds. Other patients are held out: the decoder that did best on them is kept. The
    coordinator's decoder is fixed, where the published attack follows it through training. Conditioning on labels
    (an input of both discriminators in the paper's vanilla setting) is left out, as in its U-shaped setting.
    """

    name = "sdar"
    title = "Surrogates with discriminators (SDAR)"
    source = "Zhu et al., NDSS 2025 (arXiv 2310.10483)"
    goal = "image"
    role = "coordinator"
    needs = ("shadow of all", "shadow masks", "decoder")
    uses = frozenset({"shadow", "shadow_masks", "decoder", "architecture", "adaptive"})
    reads_traffic = True
    budget: ClassVar[tuple[str, ...]] = ("epochs", "steps")
    published = "20000 steps of 128 on CIFAR"
    plain = "The coordinator trains imitations of the hospitals' networks on other patients until they fit its own."

    epochs: int = 20
    """How often each of the other patients' samples is shown."""
    steps: int | None = None
    """Batches instead."""
    batch: int = 8
    encoder_rate: float = 1e-3
    decoder_rate: float = 5e-4
    activation_weight: float = 0.02
    image_weight: float = 1e-5
    judge_rate: float = 5e-4
    """Learning rate of both discriminators. A weight scales the judged network's loss: Adam would not see it here."""

    def recover(self, view: View, knowledge: Knowledge, progress: Progress) -> Recovered:
        """Images in the site's intensities, as far as the other patients' are alike."""
        traffic = view.traffic() if self.reads_traffic else ()
        world = Surrogates(
            view, knowledge, self.name, batch=self.batch, seed=self.seed, device=self.device,
            turned=any(shot.seed is not None for shot in traffic),
        )  # fmt: skip
        groups = all_evidence(view, knowledge, self.device)
        real = releases(view, traffic, list(groups[0].levels), self.device)
        views = int(_added(group.views for group in groups).max()) // len(groups)
        averaged = {name: torch.cat([g.levels[name].mean[g.views > 0] for g in groups]) for name in real}
        # What the decoder is shown in the end: single releases say the same only where nothing is averaged.
        shown = real if views == 1 else averaged
        decoder, judge_activations, judge_images = self._networks(view, real)
        encoder_steps = Adam(world.encoders.parameters(), self.encoder_rate)
        decoder_steps = Adam(decoder.parameters(), self.decoder_rate)
        judge_steps = Adam(judge_activations.parameters(), self.judge_rate)
        image_judge_steps = Adam(judge_images.parameters(), self.judge_rate)
        tasks: list[float] = []
        errors: list[float] = []
        told_apart: list[float] = []
        steps = world.steps(self.epochs, self.steps)
        best = Best(nn.ModuleList([world.encoders, decoder]), partial(_unfit, world, decoder, views), steps)
        for step, indices in world.batches(steps):
            drawn = world.draw(indices, step, views)
            imitated, images = drawn.sent[view.seat.name], drawn.images
            task = loss = world.task_loss(drawn.sent, drawn.masks)
            if self.activation_weight:
                loss = task + self.activation_weight * _judged(judge_activations(imitated), real=True)
            _step(encoder_steps, loss)
            if self.activation_weight:
                sent = {name: tensor.detach() for name, tensor in imitated.items()}
                verdict = _judged(judge_activations(some(real, len(indices), step)), real=True)
                verdict = verdict + _judged(judge_activations(sent), real=False)
                _step(judge_steps, verdict)
                told_apart.append(verdict.item())
            error = loss = functional.mse_loss(decoder(drawn.arrived), images)
            if self.image_weight:
                recovered = decoder(some(shown, len(indices), step))
                loss = error + self.image_weight * _judged(judge_images({"x0": recovered}), real=True)
            _step(decoder_steps, loss)
            if self.image_weight:
                _step(
                    image_judge_steps,
                    _judged(judge_images({"x0": images}), real=True)
                    + _judged(judge_images({"x0": recovered.detach()}), real=False),
                )
            tasks.append(task.item())
            errors.append(error.item())
            progress(self.title, step + 1, steps)
            if best.stop(step):
                break
        best.restore()
        history = {"task": tuple(tasks), "image": tuple(errors)}
        if told_apart:
            history["discriminator"] = tuple(told_apart)
        return Recovered(
            revealed(decoder, groups), int(_added(g.views for g in groups).max()),
            settings={"releases": len(next(iter(real.values())))}, history=history, merit=1 - best.error,
        )  # fmt: skip

    def _networks(self, view: View, real: dict[str, Tensor]) -> tuple[nn.Module, nn.Module, nn.Module]:
        """The decoder to images, and the judges of activations and of images."""
        cut, width = view.backbone.cut, len(view.seat.modalities)
        channels, picture = (
            {name: values.shape[1] for name, values in real.items()},
            image_cut(view.dimensions, width),
        )
        decoder = image_decoder(cut, channels, site_seed(self.seed, "decoder"), images=width)
        of_activations = critic(cut, channels, site_seed(self.seed, "D1"))
        of_images = critic(picture, picture.channels, site_seed(self.seed, "D2"))
        return decoder.to(self.device), of_activations.to(self.device), of_images.to(self.device)


@dataclass(frozen=True, kw_only=True)
class PCAT(SDAR):
    """Surrogates trained by the segmentation's loss alone, through the coordinator's decoder as it is.

    The published attack trains during the job, one step with each of its steps; here through the decoder of
    one step of the capture. Rates are those of SDAR's authors' re-run.
    """

    name = "pcat"
    title = "Surrogates through the decoder (PCAT)"
    source = "Gao & Zhang, USENIX Security 2023"
    published = "a step with each of the job; 20000 of 128 in SDAR's re-run on CIFAR"
    reads_traffic = False

    activation_weight: float = field(default=0.0, init=False)
    image_weight: float = field(default=0.0, init=False)


def all_evidence(view: View, knowledge: Knowledge, device: str) -> list[Evidence]:
    """All shots of all targets, those of one pose averaged."""
    chosen = [[shot for shot in target.shots if shot.activations] for target in view.targets]
    require_shots(chosen)
    return gather(chosen, view.seat.modalities, masked=knowledge.adaptive, device=device)


def releases(view: View, traffic: Sequence[Shot], names: Sequence[str], device: str) -> dict[str, Tensor]:
    """All that the site sent of the view's samples and of others, each release once: float32 [N, C, *spatial] by level.

    Args:
        names: levels that say something.
    """
    shots = [shot for target in view.targets for shot in target.shots if shot.activations]
    told: dict[bytes, Shot] = {}
    for shot in (*shots, *(shot for shot in traffic if shot.activations)):
        told.setdefault(hashlib.blake2b(np.ascontiguousarray(shot.activations[names[0]]).data).digest(), shot)
    return {
        name: torch.from_numpy(np.stack([shot.activations[name] for shot in told.values()])).to(device)
        for name in names
    }


def _unfit(world: Surrogates, decoder: nn.Module, views: int) -> float:
    """What surrogates and decoder get wrong of patients held out: the segmentation, and the images."""
    drawn = world.judged(views)
    task = world.task_loss(drawn.sent, drawn.masks)
    return (task + functional.mse_loss(decoder(drawn.arrived), drawn.images)).item()


def revealed(decoder: nn.Module, groups: Iterable[Evidence]) -> Any:
    """What `decoder` makes of what was seen, float32 [N, 1, *window], turned back and averaged over poses."""
    totals, views = [], []
    with torch.no_grad():
        for group in groups:
            images = decoder({name: level.mean for name, level in group.levels.items()})
            weight = group.views.reshape(-1, *[1] * (images.ndim - 1))
            totals.append(unpose_images(images, group.poses) * weight)
            views.append(weight)
    return (_added(totals) / _added(views)).float().cpu().numpy()


def _added(tensors: Iterable[Tensor]) -> Tensor:
    """Their sum, one after the other."""
    return reduce(torch.add, tensors)


def _judged(verdicts: Tensor, *, real: bool) -> Tensor:
    wanted = torch.ones_like(verdicts) if real else torch.zeros_like(verdicts)
    return functional.binary_cross_entropy_with_logits(verdicts, wanted)


def some(real: dict[str, Tensor], count: int, step: int) -> dict[str, Tensor]:
    """The next `count` of what was really sent, round and round."""
    total = len(next(iter(real.values())))
    rows = [(step * count + n) % total for n in range(min(count, total))]
    return {name: values[rows] for name, values in real.items()}


def _step(optimiser: Adam, loss: Tensor) -> None:
    # What else the loss reaches is zeroed by its own optimiser before use.
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()
