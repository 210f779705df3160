"""What the shots of every target say together, as tensors: the part of an attack that all of them share.

Shots in the same pose from the same weights are added up before anything is computed with them: averaging is
the adversary's first answer to fresh noise, and it makes a hundred views as cheap as one. Exact zeros, which a
convolution's output practically never holds, tell where dropout or top-k struck: there the adversary knows
nothing, and elsewhere it loses nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from splitpeer.attacks.base import Knowledge, Shot, View
from splitpeer.attacks.pose import Pose, pose_of
from splitpeer.errors import AttackImpossible

ZEROS_TELL = 0.02
"""Share of exact zeros in a level from which on they are taken for a defence's."""


@dataclass
class AveragedLevel:
    """One level over all targets: how often each value was seen, and its mean over those times."""

    mean: Tensor
    """float32 [B, C, *spatial]; 0 where never seen."""
    count: Tensor
    """float32 [B, C, *spatial]."""
    masked: bool
    """Whether exact zeros were left out."""


@dataclass
class Evidence:
    """One pose of every target."""

    poses: tuple[Pose | None, ...]
    levels: dict[str, AveragedLevel]
    views: Tensor
    """float32 [B]: shots of each target; 0 where a target has fewer poses than others."""
    of: object = None
    """What `same` (see `gather`) said of its shots."""


def weights_of(shot: Shot) -> int:
    """How many training steps the encoder had behind it when it made this shot: step n trains weights n - 1."""
    return shot.step - 1 if shot.mode == "train" else shot.step


def usable_shots(view: View, knowledge: Knowledge) -> list[list[Shot]]:
    """For every target, the shots made with the weights that the adversary knows.

    Raises:
        AttackImpossible: some target has none, or nothing was sent.
    """
    at = knowledge.weights_step
    chosen = [
        [s for s in target.shots if s.activations and (at is None or weights_of(s) == at)]
        for target in view.targets
    ]
    require_shots(chosen, "" if at is None else f" from the weights of step {at}, the only ones known")
    return chosen


def require_shots(chosen: Sequence[Sequence[Shot]], which: str = "") -> None:
    """Raises AttackImpossible where there is no target, or one without a shot."""
    if not chosen:
        raise AttackImpossible("the view holds no sample: record more, or choose others")
    missing = sum(not shots for shots in chosen)
    if missing:
        raise AttackImpossible(
            f"{missing} of {len(chosen)} samples have no activations{which}: choose other samples or steps"
        )


def gather(
    chosen: Sequence[Sequence[Shot]],
    modalities: Sequence[str] | None,
    *,
    masked: bool,
    whole: Collection[str] = (),
    device: str = "cpu",
    same: Callable[[Shot], object] = lambda shot: None,
) -> list[Evidence]:
    """Add up shots of the same pose (and of the same `same`); the groups in order of their first shots.

    All shots of a group have one `same`, whatever their target; the poses of a group differ from target to target.

    Args:
        chosen: shots of every target.
        modalities: of an image's channels.
        masked: leave out exact zeros where a level holds many, as an adversary does who knows of dropout.
        whole: levels in which zeros are values like others, however many.

    Levels that hold nothing but zeros were withheld and are left out.

    Raises:
        AttackImpossible: the shots differ in their levels or shapes, or every level was withheld.
    """
    groups: dict[tuple[object, int], list[list[Shot]]] = {}  # (same, pose's number) to shots by target
    for number, shots in enumerate(chosen):
        places: dict[object, dict[object, int]] = {}
        for shot in shots:
            pose = None if shot.seed is None else (shot.seed, shot.index)
            known = places.setdefault(same(shot), {})
            place = known.setdefault(pose, len(known))
            groups.setdefault((same(shot), place), [[] for _ in chosen])[number].append(shot)
    first = chosen[0][0].activations
    shapes = {name: tuple(values.shape) for name, values in first.items()}
    for shots in chosen:
        for shot in shots:
            if {name: tuple(values.shape) for name, values in shot.activations.items()} != shapes:
                raise AttackImpossible(
                    "the samples were sent in different shapes or levels: attack one job at a time"
                )
    told = [name for name in shapes if any(s.activations[name].any() for shots in chosen for s in shots)]
    if not told:
        raise AttackImpossible("every level was withheld: all that was sent is zero")
    tell = {name: masked and name not in whole and _zeros(chosen, name) >= ZEROS_TELL for name in told}
    return [
        Evidence(
            poses=tuple(pose_of(shots[0], modalities) if shots else None for shots in group),
            levels={name: _add(group, name, shapes[name], tell[name], device) for name in told},
            views=torch.tensor([float(len(shots)) for shots in group], device=device),
            of=of,
        )
        for (of, _), group in groups.items()
    ]


def _zeros(chosen: Sequence[Sequence[Shot]], name: str) -> float:
    """Share of exact zeros, over the first shot of every target."""
    return float(np.mean([np.mean(shots[0].activations[name] == 0) for shots in chosen]))


def _add(
    group: list[list[Shot]], name: str, shape: tuple[int, ...], masked: bool, device: str
) -> AveragedLevel:
    total = np.zeros((len(group), *shape), np.float32)
    count = np.zeros_like(total)
    for number, shots in enumerate(group):
        told: set[bytes] = set()
        for shot in shots:
            values = shot.activations[name]
            # The same again is no second witness: nothing random happened, or it was drawn once and kept.
            digest = hashlib.blake2b(np.ascontiguousarray(values).data).digest()
            if digest in told:
                continue
            told.add(digest)
            total[number] += values
            count[number] += (values != 0) if masked else 1.0
    mean = total / np.maximum(count, 1)
    return AveragedLevel(torch.from_numpy(mean).to(device), torch.from_numpy(count).to(device), masked)
