"""Inverse networks: trained on other patients to turn what a site sends back into its images."""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass, replace
from typing import ClassVar, cast

import numpy as np
import torch
from monai.losses import SSIMLoss
from torch import Tensor, nn

from splitpeer.attacks.base import Attack, Knowledge, Progress, Recovered, View
from splitpeer.attacks.evidence import AveragedLevel, Evidence, gather, usable_shots
from splitpeer.attacks.image.whitebox import Misfit
from splitpeer.attacks.learning import held_out, rounds, spread, steps_of, train, turned
from splitpeer.attacks.networks import ImageDecoder, frozen, image_decoder
from splitpeer.attacks.optimise import lbfgs
from splitpeer.attacks.pose import unpose_images
from splitpeer.attacks.simulated_defences import SimulatedDefences
from splitpeer.errors import AttackImpossible

RANGE = 6.0
"""Data range of normalised intensities, for SSIM: about three standard deviations on either side."""


@dataclass
class Inverter:
    """A trained network, what it takes in, and how well it does on shadow images that it has not seen."""

    network: ImageDecoder
    scales: dict[str, Tensor]
    error: float
    """Mean squared error inside the head, of other patients whom it has not seen."""
    width: int
    steps: int
    """After which it had its best weights."""
    left: float
    """Of its objective, on the same patients as `error`."""
    saved: float = 0.0
    """Seconds of training that this attack did not spend, because another of the same adversary had."""

    @torch.no_grad()
    def __call__(self, levels: dict[str, AveragedLevel]) -> Tensor:
        """[B, 1, *window]."""
        image: Tensor = self.network(inputs(levels, self.scales))
        return image


class _Sending:
    """What the site would send of images, averaged over as many releases as the view holds of a sample."""

    def __init__(
        self, simulation: SimulatedDefences, model: nn.Module, seen: Evidence, adaptive: bool, device: str
    ) -> None:
        self._simulation, self._model, self._device = simulation, model, device
        self._masked = {name: level.masked for name, level in seen.levels.items()}
        self._shapes = {name: level.mean.shape[1:] for name, level in seen.levels.items()}
        self._count = round(float(seen.views[seen.views > 0].mean())) if adaptive else 1

    def __call__(self, clean: np.ndarray, number: int) -> dict[str, AveragedLevel]:
        """What is sent of images float32 [B, C, *window]; the defences are drawn by `number`.

        Raises:
            AttackImpossible: the model does not send what the view holds.
        """
        image = torch.from_numpy(self._simulation.images(clean, number)).to(self._device)
        with torch.no_grad():
            sent = self._model(image)
        wrong = [n for n, shape in self._shapes.items() if n not in sent or sent[n].shape[1:] != shape]
        if wrong:
            raise AttackImpossible(
                f"the model does not fit the capture at {wrong[0]}: give the one of this site's encoder"
            )
        levels = {name: sent[name] for name in self._masked}
        return self._simulation.averaged(levels, number, self._count, self._masked)


@dataclass(frozen=True, kw_only=True)
class InverseAttack(Attack):
    """Trains a network on pairs (what the site would send of a shadow image, that image), and shows it the view.

    The shadow images go through the site's encoder (by queries, or with its weights) and through its defences,
    with the adversary's own keys, redrawn for every batch; defences of the image act on the input, the
    clean image stays the goal. As many releases as the view holds of a sample are averaged. Heads are mirrored left to
    right, or turned like the view's. Some patients are held out: by their images the best weights of a training are
    kept, and the better of two sizes of network.

    Args:
        epochs: how often each shadow image is shown. steps: training steps instead. rate: of Adam, along one cycle.
        batch: shadow images a step.
        width: channels at full resolution, of each network that is tried.
        share: of the shadow images that is used, the first ones.

    Raises:
        ValueError: a width that is none.
    """

    name = "inverse"
    title = "inverse network"
    source = "He, Zhang, Lee, ACSAC 2019 and IEEE IoT-J 2020, doi 10.1109/JIOT.2020.3022358; U-Net decoder, SSIM loss"
    goal = "image"
    role = "coordinator"
    needs = ("encoder", "shadow")
    uses = frozenset({"model", "shadow", "architecture", "adaptive"})
    budget: ClassVar[tuple[str, ...]] = ("epochs", "steps")
    published = "50 epochs of 50000 images of CIFAR"
    plain = "Runs other patients' images through the site's half, and trains a network to turn outputs into images."

    epochs: int = 20
    steps: int | None = None
    rate: float = 3e-3
    batch: int = 8
    width: tuple[int, ...] = (16, 32)
    share: float = 1.0

    def __post_init__(self) -> None:
        if not self.width or min(self.width) < 1:
            raise ValueError(f"width must be 1 or more, not {'+'.join(map(str, self.width))}")

    def recover(self, view: View, knowledge: Knowledge, progress: Progress) -> Recovered:
        """See `Attack.recover`. Raises AttackImpossible where encoder or shadow images do not fit the view."""
        model, evidence, views = self._prepare(view, knowledge)
        inverter = self._train(view, knowledge, model, evidence, progress)
        return _found(reconstruct(inverter, evidence), views, inverter)

    def _prepare(self, view: View, knowledge: Knowledge) -> tuple[nn.Module, list[Evidence], int]:
        chosen = usable_shots(view, knowledge)
        evidence = gather(chosen, view.seat.modalities, masked=knowledge.adaptive, device=self.device)
        return frozen(knowledge.model, self.device), evidence, max(map(len, chosen))

    def _train(
        self, view: View, knowledge: Knowledge, model: nn.Module, evidence: list[Evidence], progress: Progress
    ) -> Inverter:
        shadow = np.asarray(knowledge.shadow[view.seat.name], np.float32)
        shadow = shadow[: max(2, round(self.share * len(shadow)))]
        if len(shadow) < 2 or tuple(shadow.shape[2:]) != tuple(view.window):
            raise AttackImpossible(
                f"shadow images are {shadow.shape}, expected at least two of {tuple(view.window)}: cut them alike"
            )
        sending = _Sending(
            SimulatedDefences(view, model, self.seed, adaptive=knowledge.adaptive),
            model, evidence[0], knowledge.adaptive, self.device,
        )  # fmt: skip
        held = held_out(knowledge.shadow_patients[: len(shadow)], len(shadow))
        turned = any(pose is not None for group in evidence for pose in group.poses)
        course = _Course(
            sending, shadow[~held], shadow[spread(held)], evidence[0].levels, turned, self.device
        )
        of = _course_digest(view, knowledge, evidence[0], turned)
        found = [self._learned(view, knowledge, course, width, of, progress) for width in self.width]
        best = min(found, key=lambda one: one.left)
        return replace(best, saved=sum(one.saved for one in found))

    def _learned(
        self, view: View, knowledge: Knowledge, course: _Course, width: int, of: bytes, progress: Progress
    ) -> Inverter:
        """The network of this width, trained now or for another attack of this adversary."""
        steps = steps_of(self.epochs, len(course.shadow), self.batch, self.steps)
        asked = repr((width, steps, self.rate, self.batch, self.share, self.seed, self.device))
        key, began = of + asked.encode(), time.perf_counter()
        # Model and images stand in the key by their identity, and are kept so that it stays theirs.
        if key in knowledge.trained:
            known, seconds, *_ = knowledge.trained[key]
            return cast("Inverter", replace(known, saved=seconds))
        inverter = self._learn(view, course, width, steps, progress)
        images = knowledge.shadow[view.seat.name]
        knowledge.trained[key] = (inverter, time.perf_counter() - began, knowledge.model, images)
        return inverter

    def _learn(self, view: View, course: _Course, width: int, steps: int, progress: Progress) -> Inverter:
        """A network of this width, trained and frozen."""
        network = image_decoder(
            view.backbone.cut, course.channels, self.seed, width, course.shadow.shape[1]
        ).to(self.device)
        source = np.random.default_rng([self.seed, 1])
        following = rounds(len(course.shadow), self.batch, source)

        def loss(step: int) -> Tensor:
            clean = turned(course.shadow[following()], source, mirrored=not course.turned)
            goal = torch.from_numpy(clean).to(self.device)
            return course.objective(network(inputs(course.sending(clean, step), course.scales)), goal)

        shown, truth = course.judged(steps)
        best = train(
            network, loss, lambda: course.objective(network(shown), truth).item(), steps, rate=self.rate,
            progress=progress, what=f"training the inverse network of width {width}",
        )  # fmt: skip
        head = truth != 0
        with torch.no_grad():
            error = float((network(shown) - truth)[head].square().mean()) if bool(head.any()) else 1.0
        return Inverter(network, course.scales, error, width, best.steps, best.error)


def _course_digest(view: View, knowledge: Knowledge, seen: Evidence, turned: bool) -> bytes:
    """Of all that a network learns from: encoder, images, defences, and how often and how large values were seen."""
    what = (
        id(knowledge.model), id(knowledge.shadow[view.seat.name]), knowledge.shadow_patients, knowledge.adaptive,
        view.seat, view.window, view.backbone, view.defences, view.form, view.parts, view.clear,
        turned,
        seen.views.tolist(), [(name, level.masked, level.mean.shape) for name, level in seen.levels.items()],
    )  # fmt: skip
    found = hashlib.sha256(repr(what).encode())
    for level in seen.levels.values():
        found.update(level.mean.cpu().numpy().tobytes())
    return found.digest()


class _Course:
    """What networks learn from and are judged by.

    Args:
        shadow: to learn from, float32 [N, C, *window].
        judged: of patients held out, likewise.
        seen: levels of the view.
        turned: whether the view's samples are turned and flipped.
    """

    def __init__(
        self, sending: _Sending, shadow: np.ndarray, judged: np.ndarray, seen: dict[str, AveragedLevel],
        turned: bool, device: str,
    ) -> None:  # fmt: skip
        self.sending, self.shadow, self.turned = sending, shadow, turned
        self.channels = {name: s.mean.shape[1] * (2 if s.masked else 1) for name, s in seen.items()}
        self.scales = {name: 1 / s.mean.std().clamp_min(1e-6) for name, s in seen.items()}
        self._judged, self._device = np.ascontiguousarray(judged), device
        self._similarity = SSIMLoss(shadow.ndim - 2, data_range=RANGE, win_size=7)

    def judged(self, number: int) -> tuple[dict[str, Tensor], Tensor]:
        """What a network sees of the patients held out, whose defences are drawn once by `number`; and the truth."""
        shown = inputs(self.sending(self._judged, number), self.scales)
        return shown, torch.from_numpy(self._judged).to(self._device)

    def objective(self, guess: Tensor, goal: Tensor) -> Tensor:
        """Absolute error, the head before the air, and one minus SSIM: a scalar."""
        head = (goal != 0).to(goal.dtype)
        weight = head / head.mean().clamp_min(1e-3) + 0.1
        both: Tensor = (weight * (guess - goal).abs()).mean() + self._similarity(guess, goal)
        return both


@dataclass(frozen=True, kw_only=True)
class Refined(InverseAttack):
    """The inverse network's image, then improved by white-box optimisation that stays near it.

    Minimises the misfit + |x - x0|^2 / (2 * prior * e^2), e the network's error on held-out shadow images: the
    image that is most likely, if the network errs on the view as it does on them.

    Args:
        iterations: of L-BFGS; the other settings are the inverse network's.
        prior: how much further than that it may go.
    """

    name = "refined"
    title = "inverse network, refined white-box"
    source = "this project: maximum a posteriori around an inverse network (both after He, Zhang, Lee 2019)"
    needs = ("weights", "shadow")
    budget = ("epochs", "steps", "iterations")
    published = "ours; of its network 50 epochs of 50000 images of CIFAR"
    plain = "Trains a network on other patients, then corrects its images until they would have sent what arrived."

    iterations: int = 200
    prior: float = 1.0

    def recover(self, view: View, knowledge: Knowledge, progress: Progress) -> Recovered:
        """See `InverseAttack.recover`."""
        model, evidence, views = self._prepare(view, knowledge)
        inverter = self._train(view, knowledge, model, evidence, progress)
        start = reconstruct(inverter, evidence)
        simulation = SimulatedDefences(view, model, self.seed, adaptive=knowledge.adaptive)
        if simulation.on_images:  # the view explains the noisy image best; the network knows the clean one
            return _found(start, views, inverter)
        chosen = usable_shots(view, knowledge)
        whole = [name for name in evidence[0].levels if not simulation.zeros_show(name, evidence)]
        evidence = gather(
            chosen, view.seat.modalities, masked=knowledge.adaptive, whole=whole, device=self.device
        )
        misfit = Misfit(model, evidence, knowledge.adaptive, exact=True)
        misfit.calibrate(simulation, start)
        narrow = 2 * self.prior * max(inverter.error, 1e-4)
        images = lbfgs(
            lambda x: misfit(x) + (x - start).square().flatten(1).sum(1) / narrow,
            start, self.iterations, progress=progress, what="refining",
        )  # fmt: skip
        return _found(images, views, inverter)


def _found(images: Tensor, views: int, inverter: Inverter) -> Recovered:
    error = inverter.error**0.5
    note = (
        f"the network of width {inverter.width} after {inverter.steps} steps; root mean square error {error:.2f} on "
        "other patients held out"
    )
    return Recovered(images.cpu().numpy(), views, (note,), merit=1 - error, saved=inverter.saved)


def inputs(levels: dict[str, AveragedLevel], scales: dict[str, Tensor]) -> dict[str, Tensor]:
    """What a network is shown: the values at a common scale and, where zeros tell, whether they were seen."""
    shown = {}
    for name, seen in levels.items():
        values = seen.mean * scales[name]
        shown[name] = torch.cat([values, (seen.count > 0).to(values.dtype)], 1) if seen.masked else values
    return shown


def reconstruct(inverter: Inverter, evidence: list[Evidence]) -> Tensor:
    """[B, 1, *window]: the network's images of every pose, turned back and averaged by their views."""
    total = weights = None
    for group in evidence:
        image = unpose_images(inverter(group.levels), group.poses)
        share = group.views.view(-1, *[1] * (image.ndim - 1))
        total = image * share if total is None else total + image * share
        weights = share if weights is None else weights + share
    if total is None or weights is None:
        raise AttackImpossible("nothing was sent: there is nothing to invert")
    return total / weights
