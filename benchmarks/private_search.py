"""A search, by an adversary with every encoder, for the images that would together have sent what was seen.

It starts from what an inverse network makes of it, and pays for going further from there than that network errs, and
for contrasts that do not change together (as `splitpeer attack --attacks sum-search`).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from pretraining import CONTRASTS
from private_attacks import People
from private_run import Federation, levels_of, summed
from torch import Tensor

from splitpeer.attacks.image.sum_search import contrast_metric, coupled_variation
from splitpeer.attacks.optimise import lbfgs
from splitpeer.defences.network import Defended
from splitproto.records import Sample

TOLERANCE = 0.1
"""How far values may be from those seen, in deviations of a level, where noise does not say more."""
VARIATION = 0.3
BATCH = 8


def searched(
    federation: Federation,
    samples: Sequence[Sample],
    guess: np.ndarray,
    error: float,
    strangers: People,
    steps: int,
) -> np.ndarray:
    """Images [B, contrasts, *spatial] of the run's slices.

    Args:
        guess: of an inverse network, the start.
        error: its root mean square error on strangers.
        steps: of L-BFGS.
    """
    metric = contrast_metric(_shadow(strangers))
    found = []
    for first in range(0, len(samples), BATCH):
        some = samples[first : first + BATCH]
        seen = levels_of(federation.seen(federation.once(some)))
        found.append(
            _found(federation, seen, torch.from_numpy(guess[first : first + BATCH]), error, metric, steps)
        )
    return np.concatenate(found)


def _found(
    federation: Federation,
    seen: dict[str, np.ndarray],
    start: Tensor,
    error: float,
    metric: Tensor,
    steps: int,
) -> np.ndarray:
    encoders = networks(federation)
    summing, noise = federation.job.fusion is not None, federation.bench.row.noise
    wanted = {name: torch.from_numpy(level) for name, level in seen.items()}
    width = {name: max(TOLERANCE, noise) * float(level.std()) + 1e-6 for name, level in wanted.items()}

    def objective(images: Tensor) -> Tensor:
        made = predicted(encoders, images, summing=summing)
        misfit = torch.zeros(len(images))
        for name, level in wanted.items():
            misfit = misfit + ((made[name] - level) / width[name]).square().flatten(1).sum(1) / 2
        pull = (images - start).square().flatten(1).sum(1) / (2 * max(error, 1e-2) ** 2)
        return misfit + VARIATION * coupled_variation(images, metric) + pull

    ends = lbfgs(objective, start, steps)
    with torch.no_grad():
        better = objective(ends) < objective(start)
    made: np.ndarray = torch.where(better.view(-1, 1, 1, 1), ends, start).numpy()
    return made


def networks(federation: Federation) -> dict[str, torch.nn.Module]:
    """By contrast the true encoders, without noise."""
    halves = {place.seat: half.network for place, half in federation.parties.sites.items()}
    bare = {seat: one.encoder if isinstance(one, Defended) else one for seat, one in halves.items()}
    return {seat: one.eval().requires_grad_(False) for seat, one in bare.items()}


def predicted(encoders: dict[str, torch.nn.Module], images: Tensor, *, summing: bool) -> dict[str, Tensor]:
    """What would be seen of images [B, contrasts, *spatial], level by level as `levels_of` has it."""
    sent = {c: encoders[c](images[:, n : n + 1]) for n, c in enumerate(CONTRASTS)}
    if summing:
        return summed(sent)["sum"]
    names = next(iter(sent.values()))
    return {name: torch.cat([levels[name] for levels in sent.values()], dim=1) for name in names}


def _shadow(strangers: People) -> Tensor:
    """Some images of strangers, [N, contrasts, *spatial]."""
    slices = strangers.slices()
    some = slices[:: max(1, len(slices) // 64)]
    return torch.from_numpy(np.concatenate(list(strangers.read(some).values()), axis=1))
