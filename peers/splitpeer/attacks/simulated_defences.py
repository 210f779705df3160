"""The adversary runs the site's defences itself, with keys of its own: that they are public costs it nothing else.

From this it learns what they do on average, without knowing one defence from another: by how much values shrink,
how far they scatter, and which of its own shadow images would have looked like what it saw.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Collection, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from splitpeer.attacks.base import View
from splitpeer.attacks.evidence import AveragedLevel, Evidence
from splitpeer.attacks.likelihood import Effect, tells, wide
from splitpeer.defences.base import Defence, Tensors
from splitpeer.defences.image.stack import make_image_stack
from splitpeer.defences.kinds import parse_all
from splitpeer.defences.randomness import Release
from splitpeer.defences.specs import by_place
from splitpeer.defences.stack import Stack, make_stack
from splitpeer.errors import AttackImpossible, ConfigError
from splitpeer.training.forms import WireForm
from splitproto.records import Sample

DRAWS = 4
"""Releases that are really drawn; the mean of more is that mean, its scatter shrunk by the root of the ratio."""


class SimulatedDefences:
    """The defences that a view names, applied to tensors and images of the adversary's own.

    Args:
        view: whose defences.
        model: the site's network, if known: it holds what defences have learned.
        seed: of the adversary's keys.

    Raises:
        AttackImpossible: a defence that is named is not known here.
    """

    def __init__(self, view: View, model: nn.Module | None, seed: int, *, adaptive: bool = True) -> None:
        key = hashlib.sha256(b"adversary %d" % seed).digest()
        written = view.defences if adaptive else ()
        learned = {d.spec: d for d in getattr(getattr(model, "stack", None), "defences", ())}
        try:
            announced = by_place(written)
            parts = parse_all(announced.activations, "activations")
            stack = make_stack(
                [d for d in parts if not d.kind.structural],
                key=key,
                channels=view.channels,
                dimensions=view.dimensions,
                after=[str(d) for d in parts if d.kind.structural],
                strict=False,
            )
            self._image = make_image_stack(announced.image, key)
        except ConfigError as error:
            raise AttackImpossible(
                f"the capture names a defence that cannot be simulated ({error}): "
                "attack without knowing the defences (not adaptive)"
            ) from None
        self._key, self._levels = key, tuple(view.channels)
        self._stack: list[Defence] = [
            learned[d.spec] if d.spec in learned and any(True for _ in d.parameters()) else d
            for d in stack.defences
        ]
        self.kept = any(defence.spec.kept for defence in self._stack)
        self._parts, self._clear, self._form = view.parts, view.clear_channels, view.form

    def __bool__(self) -> bool:
        return bool(self._stack)

    @property
    def on_images(self) -> bool:
        """Whether images are defended."""
        return bool(self._image)

    def images(self, clean: np.ndarray, number: int) -> np.ndarray:
        """Images [B, channels, *spatial] as the site would defend them; another `number`, another draw."""
        if not self._image:
            return clean
        defended = np.empty_like(clean)
        for index, image in enumerate(clean):
            for channel, plane in enumerate(image):
                voxels = plane.reshape(1, *plane.shape, *[1] * (3 - plane.ndim))
                # Each modality is defended on its own, with noise of its own.
                key = _key(number, index, channel)
                shown = self._image.window(voxels, key, (0, 0, 0), voxels.shape[1:])
                defended[index, channel] = shown.reshape(plane.shape)
        return defended

    @property
    def mixed(self) -> frozenset[str]:
        """Levels whose channels go through a secret matrix, the same for all samples."""
        return frozenset(
            name for name in self._levels for d in self._stack if d.kind.channel_mixing and d.covers(name)
        )

    def release(self, tensors: Tensors, number: int, view: int = 0) -> Tensors:
        """One release of samples `number`, as it is read; what is drawn once per sample is alike for every `view`."""
        return self._read(self._release(self._stack, tensors, number, view))

    @torch.no_grad()
    def _release(self, stack: Sequence[Defence], tensors: Tensors, number: int, view: int = 0) -> Tensors:
        if not stack:
            return tensors
        count = len(next(iter(tensors.values())))
        samples = tuple(Sample(_key(number, index), (0, 0, 0)) for index in range(count))
        release = Release(b"rehearsal" + bytes(7), "infer", view, number, samples)

        def defended(part: Tensors, place: int) -> Tensors:
            # Another key for every number: the noise that the site draws once and keeps is unknown to the adversary.
            key = hashlib.sha256(self._key + b"%d" % number + (b" %d" % place if place else b"")).digest()
            left: Tensors = Stack(list(stack), key)(part, release)
            return left

        return self._sent(tensors, defended)

    @torch.no_grad()
    def _read(self, tensors: Tensors) -> Tensors:
        """What is read of them after the wire, where that rounds (SP-11.21-6): no defence, but public as one."""
        if self._form == "f32":
            return tensors

        def travelled(part: Tensors, place: int) -> Tensors:
            form = WireForm(self._form, {name: tuple(t.shape[1:]) for name, t in part.items()})
            arrays = form.read({name: t.cpu().numpy() for name, t in part.items()})
            return {name: torch.from_numpy(array).to(part[name]) for name, array in arrays.items()}

        return self._sent(tensors, travelled)

    def _sent(self, tensors: Tensors, through: Callable[[Tensors, int], Tensors]) -> Tensors:
        """Each part of the channels through what happens to it, told its place; what a site that works with the
        adversary shows in clear is neither defended nor sent."""
        own = {n: t[:, : t.shape[1] - self._clear.get(n, 0)] for n, t in tensors.items()}
        sent = [through(part, place) for place, part in enumerate(_apart(own, self._parts))]
        clear = {name: tensor[:, own[name].shape[1] :] for name, tensor in tensors.items()}
        return {name: torch.cat([*(part[name] for part in sent), clear[name]], 1) for name in tensors}

    @torch.no_grad()
    def averaged(
        self, tensors: Tensors, number: int, views: int, masked: dict[str, bool]
    ) -> dict[str, AveragedLevel]:
        """What `views` releases of one batch would say together, as `evidence.gather` adds them up.

        Args:
            masked: the levels to look at, and whether exact zeros are left out there.
        """
        drawn = [self.release(tensors, number, v) for v in range(min(views, DRAWS) if self._stack else 1)]
        result = {}
        for name, mask in masked.items():
            values = torch.stack([draw[name] for draw in drawn])
            counts = (values != 0).float() if mask else torch.ones_like(values)
            count = counts.sum(0)
            mean = values.sum(0) / count.clamp_min(1)
            if views > len(drawn) > 1 and not self.kept:
                centre = wide(_effect(tensors[name], values).gain, mean) * tensors[name]
                mean = torch.where(count > 0, centre + (mean - centre) * (len(drawn) / views) ** 0.5, mean)
            result[name] = AveragedLevel(mean, count, mask)
        return result

    @torch.no_grad()
    def effects(self, tensors: Tensors, exact: Collection[str] = ()) -> dict[str, Effect]:
        """What the defences do to each level, learned from draws around `tensors`; secret matrices apart.

        Args:
            exact: levels of which `Effect.left` and `Effect.steps` are told, apart from the scatter.
        """
        stack = [d for d in self._stack if not d.kind.channel_mixing]
        if not stack and self._form == "f32":
            ones = torch.ones(len(next(iter(tensors.values()))))
            return {name: Effect(ones.to(t), torch.zeros_like(ones).to(t)) for name, t in tensors.items()}
        draws = range(DRAWS if stack else 1)
        drawn = [self._read(self._release(stack, tensors, number)) for number in draws]
        return {
            name: self._exact(stack, tensors, name)
            if name in exact
            else _effect(t, torch.stack([d[name] for d in drawn]))
            for name, t in tensors.items()
        }

    def _exact(self, stack: Sequence[Defence], tensors: Tensors, name: str) -> Effect:
        """Up to the last defence that leaves values out in hiding, then from there; but for the rounding."""
        rounding, hidden = self._rounding(name), self._hidden(name)
        body = [d for d in stack if d is not rounding]
        cut = max((number + 1 for number, d in enumerate(body) if d in hidden), default=0)
        drawn = [self._release(body[:cut], tensors, number) for number in range(DRAWS)]
        before = _effect(tensors[name], torch.stack([d[name] for d in drawn]))
        after = [
            _effect(d[name], self._read(self._release(body[cut:], d, number))[name].unsqueeze(0))
            for number, d in enumerate(drawn)
        ]
        gain = torch.stack([one.gain for one in after]).mean(0)
        scatter = torch.stack([one.scatter for one in after]).square().mean(0).sqrt()
        return Effect(
            before.gain * gain, torch.hypot(gain * before.scatter, scatter), self.left(name), self.steps(name)
        )

    # --- what the traits of the defences say of a level --------------------------------------------------

    def left(self, name: str) -> float:
        """Share of the values that are left, where noise or rounding hides which are; 1: all are, or it shows."""
        return math.prod(1 - float(d.values[d.kind.drops]) for d in self._hidden(name))

    def steps(self, name: str) -> int:
        """Steps of the grid to which values are rounded in the end, between zero and the largest; 0: they are not."""
        last = self._rounding(name)
        return 2 ** (int(last.values[last.kind.rounds]) - 1) - 1 if last is not None else 0

    def says_more(self, evidence: Sequence[Evidence]) -> bool:
        """Whether of some level more can be said than its scatter."""
        return any(
            tells(seen, self.left(name), self.steps(name))
            for e in evidence
            for name, seen in e.levels.items()
        )

    def zeros_show(self, name: str, evidence: Sequence[Evidence]) -> bool:
        """Whether an exact zero tells that a value was left out: not if it may as well have been rounded."""
        if not self.steps(name):
            return True
        once = all(bool(e.levels[name].count.max() <= 1) for e in evidence)
        hidden = self._hidden(name)
        return any(
            not (once and d in hidden) and not self._noise_after(d, name)
            for d in self._acting(name)
            if d.kind.sparse
        )

    def _acting(self, name: str) -> list[Defence]:
        return [d for d in self._stack if d.covers(name)]

    def _rounding(self, name: str) -> Defence | None:
        return next((d for d in reversed(self._acting(name)) if d.kind.rounds), None)

    def _hidden(self, name: str) -> list[Defence]:
        """Those that leave values out at random, of which noise or rounding hides which."""
        acting = self._acting(name)
        return [
            d for number, d in enumerate(acting)
            if d.kind.drops and any(e.kind.additive_noise or e.kind.rounds for e in acting[number:])
            and not any(e.kind.channel_mixing for e in acting[number:])
        ]  # fmt: skip

    def _noise_after(self, defence: Defence, name: str) -> bool:
        acting = self._acting(name)
        return any(d.kind.additive_noise for d in acting[acting.index(defence) :])


def _apart(tensors: Tensors, parts: int) -> list[Tensors]:
    """Equal parts of the channels of each level [B, C, *spatial]."""
    split = {name: torch.chunk(tensor, parts, 1) for name, tensor in tensors.items()}
    return [{name: pieces[place] for name, pieces in split.items()} for place in range(parts)]


def _effect(clean: Tensor, drawn: Tensor) -> Effect:
    """Statistics of `clean` [B, C, *spatial] and draws of it [D, B, C, *spatial]."""
    left = (drawn != 0).to(clean.dtype)
    tell = left.flatten(1).mean() < 0.98  # as exact zeros do
    weight = left if bool(tell) else torch.ones_like(left)
    power = (weight * clean.square()).transpose(0, 1).flatten(1).sum(1).clamp_min(1e-12)
    gain = (weight * drawn * clean).transpose(0, 1).flatten(1).sum(1) / power
    rest = weight * (drawn - wide(gain, clean) * clean).square()
    total = weight.transpose(0, 1).flatten(1).sum(1).clamp_min(1)
    return Effect(gain, (rest.transpose(0, 1).flatten(1).sum(1) / total).sqrt())


def _key(number: int, index: int, channel: int = 0) -> bytes:
    of_channel = b" %d" % channel if channel else b""
    return hashlib.sha256(b"shadow %d %d" % (number, index) + of_channel).digest()[:16]
