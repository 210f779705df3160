"""A defence tried on recorded traffic."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace

from splitpeer.attacks.base import Shot, Target, View
from splitpeer.defences.randomness import Release
from splitpeer.defences.stack import defend, make_stack
from splitpeer.errors import ConfigError


def redefended(view: View, written: Sequence[str], *, seed: int, views: int = 1) -> View:
    """A clean view as it would have been under a defence, `views` releases of each shot, offline.

    Raises:
        ConfigError: the view is defended already, or the defence changes the training and cannot be applied later.
    """
    if view.defences:
        raise ConfigError(
            f"this capture was recorded under {' + '.join(view.defences)}: "
            "a defence can be tried offline on clean traffic only"
        )
    key = hashlib.sha256(f"offline defence\0{seed}".encode()).digest()
    stack = make_stack(list(written), key=key, channels=view.channels, dimensions=view.dimensions)
    if changing := [d.kind.name for d in stack.defences if not d.kind.offline]:
        raise ConfigError(
            f"{', '.join(changing)} changes the training, so it cannot be tried on recorded traffic: "
            "rehearse it with splitpeer audit"
        )
    run_id = key[:16]
    targets = []
    for target in view.targets:
        shots: list[Shot] = []
        for number, shot in enumerate(target.shots):
            for again in range(views):
                batch = number * views + again
                release = Release(run_id, shot.mode, shot.step, batch, (target.sample,))
                single = {name: array[None] for name, array in shot.activations.items()}
                sent = {name: array[0] for name, array in defend(stack, single, release).items()}
                shots.append(replace(shot, activations=sent))
        targets.append(Target(target.sample, tuple(shots)))
    return replace(view, targets=tuple(targets), defences=stack.specs)
