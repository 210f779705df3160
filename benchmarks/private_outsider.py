"""The coordinator of a run with encoders that it does not have: encoders of its own, made alike.

It repeats the recipe with another seed on the same public data, and aligns what its encoders send with what arrived:
per level, by the means of places with equal labels (it holds the labels of both). `taught` trains these surrogates
further: the run's own decoder has to segment strangers from them, and their values must look like the run's, moment by
moment and to a critic that sees the labels too (after FORA, arXiv 2203.00481, and SDAR, NDSS 2025). An inverse network
learns on the surrogates, and reads the run's sums.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from private_attacks import Images, People, Told, pooled
from private_run import Federation, Levels, RowBench, halves, levels_of, summed, together
from torch import Tensor, nn

from splitpeer.attacks.learning import rounds
from splitpeer.attacks.networks import critic
from splitpeer.pretraining import encoder_file
from splitpeer.training.loss import task_loss
from splitpeer.training.split_round import THE_SUM, Place
from splitproto.records import Sample

ENTROPY = 50_000
"""Of the adversary's own pretraining, on top of the seed."""
SEEN, OCTETS = 1024, 1 << 29
"""Slices of each side that are compared, and their octets, at most."""
GRID, HEIGHTS = 24, 8
"""Places that are compared: bins along each axis of a slice, and slices."""
FEWEST = 5
"""Values on both sides that make a mean worth comparing."""
BATCH = 8
RATE = 1e-3
MOMENTS, FOOLED = 1.0, 0.3
"""Weights of the moments and of the critic's opinion; the segmentation's is 1."""
Sent = dict[Place, dict[str, Tensor]]


class Surrogates(nn.Module):
    """Encoders of the adversary's, and a line per level and place that takes their values to the run's."""

    def __init__(self, federation: Federation) -> None:
        super().__init__()
        bench, self.secure = federation.bench, federation.job.fusion is not None
        row = replace(bench.row, strangers=bench.row.strangers or bench.given.strangers)
        parties = halves(replace(bench, row=replace(row, strangers=0, noise=0.0)), federation.job)
        self.encoders, self.lines = nn.ModuleDict(), nn.ModuleDict()
        for place, half in parties.sites.items():
            encoder_file.load(half.network, together(replace(bench, row=row), place.seat, ENTROPY))
            self.encoders[place.seat] = half.network.eval()
        self.noise = row.noise
        self._random = torch.Generator().manual_seed(bench.seed)

    def plain(self, images: Mapping[str, Tensor]) -> Sent:
        """What would be seen before it is aligned."""
        sent = {seat: encoder(images[seat]) for seat, encoder in self.encoders.items()}
        if self.secure:
            return {THE_SUM: summed(sent)["sum"]}
        return {Place(seat, seat): levels for seat, levels in sent.items()}

    def forward(self, images: Mapping[str, Tensor]) -> Sent:
        """Images by contrast [B, 1, *spatial] to what would be seen of them, with noise like the run's."""
        return {
            place: {name: self._noisy(self.lines[_key(place, name)](one)) for name, one in levels.items()}
            for place, levels in self.plain(images).items()
        }

    def reads(self, images: Images, samples: Sequence[Sample], nonce: bytes) -> Levels:
        """See `private_attacks.Reads`."""
        with torch.no_grad():
            sent = self({place.seat: torch.from_numpy(image) for place, image in images.items()})
        return levels_of(
            {place: {name: level.numpy() for name, level in one.items()} for place, one in sent.items()}
        )

    def _noisy(self, level: Tensor) -> Tensor:
        """The lines keep the run's deviations, noise included: what is added replaces as much of the values."""
        if not self.noise:
            return level
        share = self.noise**2 / (1 + self.noise**2)
        centre = level.mean(dim=tuple(range(2, level.ndim)), keepdim=True)
        drawn = torch.randn(level.shape, generator=self._random) * level.detach().std() * share**0.5
        mixed: Tensor = centre + (level - centre) * (1 - share) ** 0.5 + drawn
        return mixed


def _key(place: Place, level: str) -> str:
    return f"{place.seat}-{level}"


# --- what both sides have in common --------------------------------------------------------------------------


class Seen(NamedTuple):
    """What one side shows of many slices."""

    levels: dict[str, np.ndarray]
    """By place and level, float32 [N, C, *spatial]."""
    known: np.ndarray
    """Labels and height of each, see `People.known`."""


def of_the_run(federation: Federation) -> Seen:
    """All that arrived, or a part of it."""
    bench = federation.bench
    people = People(federation.patients, bench.masks(bench.cohort()), bench.window)
    samples = some(people.slices(), bench)
    parts = []
    for first in range(0, len(samples), BATCH):
        seen = federation.seen(federation.once(samples[first : first + BATCH]))
        parts.append(
            {_key(place, name): array for place, levels in seen.items() for name, array in levels.items()}
        )
    return Seen(_joined(parts), _known(people, samples))


def of_strangers(surrogates: Surrogates, people: People, bench: RowBench) -> Seen:
    """The same of the surrogates, before they are aligned."""
    samples, parts = some(people.slices(), bench), []
    for first in range(0, len(samples), BATCH):
        images = {
            p.seat: torch.from_numpy(image)
            for p, image in people.read(samples[first : first + BATCH]).items()
        }
        with torch.no_grad():
            seen = surrogates.plain(images)
        parts.append(
            {_key(place, name): level.numpy() for place, levels in seen.items() for name, level in levels.items()}
        )  # fmt: skip
    return Seen(_joined(parts), _known(people, samples))


def some(samples: Sequence[Sample], bench: RowBench) -> list[Sample]:
    """As many as are compared."""
    each = bench.job.model.backbone().cut.octets(1, bench.window[:2]) * (1 if bench.row.secure else 4)
    order = np.random.default_rng(bench.seed).permutation(len(samples))[: min(SEEN, OCTETS // each)]
    return [samples[n] for n in sorted(order)]


def _joined(parts: Sequence[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _known(people: People, samples: Sequence[Sample]) -> np.ndarray:
    parts = [people.known(samples[first : first + 64]) for first in range(0, len(samples), 64)]
    return np.concatenate(parts)


# --- alignment -----------------------------------------------------------------------------------------------


def classes(known: np.ndarray, spatial: Sequence[int]) -> np.ndarray:
    """How many regions a place of a level belongs to, int [N, *spatial]."""
    several = torch.from_numpy(known[:, :-1].sum(axis=1, keepdims=True))
    found: np.ndarray = pooled(several, spatial)[:, 0].round().long().numpy()
    return found


def means(level: np.ndarray, known: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of each place with each label: means [cells, C], and of how many values [cells]."""
    _, channels, *spatial = level.shape
    kinds = known.shape[1]
    place = classes(known, spatial)
    for axis, size in enumerate(spatial):
        bins = np.arange(size) * min(GRID, size) // size
        place = place * min(GRID, size) + bins.reshape(-1, *[1] * (len(spatial) - 1 - axis))
    height = np.minimum((known[:, -1, 0, 0] * HEIGHTS).astype(int), HEIGHTS - 1)
    place = place + height.reshape(-1, *[1] * len(spatial)) * kinds * int(
        np.prod([min(GRID, size) for size in spatial])
    )
    cells = HEIGHTS * kinds * int(np.prod([min(GRID, size) for size in spatial]))
    held = np.bincount(place.ravel(), minlength=cells)
    total = np.stack(
        [np.bincount(place.ravel(), level[:, c].ravel(), minlength=cells) for c in range(channels)], axis=1
    )
    return total / np.maximum(held, 1)[:, None], held


def line(own: np.ndarray, other: np.ndarray, own_known: np.ndarray, other_known: np.ndarray) -> nn.Conv2d:
    """What takes the values of `own` [N, C, *spatial] to look like those of `other`: a convolution of size 1.

    Least squares between the means of equal places; then each channel gets the other's mean and deviation.
    """
    (x, n), (y, m) = means(own, own_known), means(other, other_known)
    both = (n >= FEWEST) & (m >= FEWEST)
    if both.sum() <= own.shape[1]:
        raise ValueError("too few slices to align: no place has enough values on both sides")
    weight = np.sqrt(np.minimum(n, m)[both])[:, None]
    wide = np.concatenate([x[both], np.ones((both.sum(), 1))], axis=1) * weight
    channels = own.shape[1]
    ridge = 1e-3 * np.diag([*np.maximum((wide[:, :-1] ** 2).sum(axis=0), 1e-9), 0.0])
    solved = np.linalg.lstsq(wide.T @ wide + ridge, wide.T @ (y[both] * weight), rcond=None)[0]
    matrix = solved[:-1].T
    flat = own.transpose(1, 0, *range(2, own.ndim)).reshape(channels, -1)
    centre = other.mean(axis=tuple(axis for axis in range(other.ndim) if axis != 1))
    wanted = other.std(axis=tuple(axis for axis in range(other.ndim) if axis != 1))
    spread = np.sqrt(np.maximum(np.einsum("ij,jk,ik->i", matrix, np.atleast_2d(np.cov(flat)), matrix), 1e-12))
    matrix = matrix * np.clip(wanted / spread, 0.1, 10)[:, None]
    made = nn.Conv2d(channels, channels, 1)
    with torch.no_grad():
        made.weight.copy_(torch.from_numpy(matrix[:, :, None, None]))
        made.bias.copy_(torch.from_numpy(centre - matrix @ flat.mean(axis=1)))  # type: ignore[union-attr]
    return made


def aligned(federation: Federation, strangers: People, run: Seen) -> Surrogates:
    """Surrogates from the recipe alone, aligned."""
    surrogates = Surrogates(federation)
    own = of_strangers(surrogates, strangers, federation.bench)
    for name, level in own.levels.items():
        surrogates.lines[name] = line(level, run.levels[name], own.known, run.known)
    return surrogates.eval()


# --- further training ----------------------------------------------------------------------------------------


def taught(
    federation: Federation, start: Surrogates, strangers: People, run: Seen, steps: int, told: Told
) -> Surrogates:
    """Trained on from `start`: the run's decoder segments strangers from them, and they look like the run's."""
    surrogates = copy.deepcopy(start).requires_grad_(True)
    decoder = copy.deepcopy(federation.parties.coordinator.network).eval().requires_grad_(False)
    judge = Judge(federation, run)
    optimiser = torch.optim.Adam(surrogates.parameters(), lr=RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, RATE, total_steps=steps + 1)
    samples, random = strangers.slices(), np.random.default_rng(steps)
    following = rounds(len(samples), BATCH, random)
    for step in range(steps):
        chosen = [samples[n] for n in following()]
        images = {p.seat: torch.from_numpy(image) for p, image in strangers.read(chosen).items()}
        known = torch.from_numpy(strangers.known(chosen))
        sent = surrogates(images)
        task = task_loss(
            decoder({place.seat: one for place, one in sent.items()}), known[:, :-1], exclusive=False
        )
        flat = {_key(place, name): level for place, levels in sent.items() for name, level in levels.items()}
        apart, fooled = judge.moments(flat, known), judge.opinion(flat, known)
        optimiser.zero_grad(set_to_none=True)
        (task + MOMENTS * apart + FOOLED * fooled).backward()
        optimiser.step()
        schedule.step()
        judge.learn(flat, known, random)
        if (step + 1) % 200 == 0:
            told(
                f"surrogates: step {step + 1} of {steps}, loss {task.item():.2f}, moments {apart.item():.3f}"
            )
    return surrogates.eval().requires_grad_(False)


class Judge:
    """How unlike the run's values surrogates' are: moments of places with equal labels, and a critic's opinion."""

    def __init__(self, federation: Federation, run: Seen) -> None:
        self.run = run
        cut = federation.bench.job.model.backbone().cut
        self._names = list(dict.fromkeys(key.rpartition("-")[2] for key in run.levels))
        self._scale = {key: float(1 / max(level.std(), 1e-6)) for key, level in run.levels.items()}
        known = run.known.shape[1]
        channels = {
            name: known + sum(level.shape[1] for key, level in run.levels.items() if key.endswith(f"-{name}"))
            for name in self._names
        }
        self._critic = critic(cut, channels, federation.bench.seed)
        self._optimiser = torch.optim.Adam(self._critic.parameters(), lr=RATE, betas=(0.5, 0.9))
        self._targets = {key: self._of(level, run.known) for key, level in run.levels.items()}

    def _of(self, level: np.ndarray, known: np.ndarray) -> dict[int, tuple[Tensor, Tensor]]:
        """By label, mean and deviation of each channel, [C]."""
        where, found = classes(known, level.shape[2:]), {}
        for label in np.unique(where):
            values = np.moveaxis(level, 1, -1)[where == label]
            if len(values) >= FEWEST:
                found[int(label)] = (
                    torch.from_numpy(values.mean(axis=0)),
                    torch.from_numpy(values.std(axis=0)),
                )
        return found

    def moments(self, sent: Mapping[str, Tensor], known: Tensor) -> Tensor:
        """Mean squared differences, in deviations of a level."""
        total, terms = torch.zeros(()), 0
        for key, level in sent.items():
            where = torch.from_numpy(classes(known.numpy(), level.shape[2:]))
            for label, (centre, spread) in self._targets[key].items():
                values = level.movedim(1, -1)[where == label]
                if len(values) < FEWEST:
                    continue
                apart = (values.mean(0) - centre).square() + (values.std(0, correction=0) - spread).square()
                total, terms = total + self._scale[key] ** 2 * apart.mean(), terms + 1
        return total / max(terms, 1)

    def opinion(self, sent: Mapping[str, Tensor], known: Tensor) -> Tensor:
        """How far the critic takes them for something else than the run's."""
        self._critic.requires_grad_(False)
        found: Tensor = (self._critic(self._shown(sent, known)) - 1).square().mean()
        self._critic.requires_grad_(True)
        return found

    def learn(self, sent: Mapping[str, Tensor], known: Tensor, random: np.random.Generator) -> None:
        """One step of the critic (least squares, arXiv 1611.04076)."""
        rows = random.choice(len(self.run.known), len(known))
        true = {key: torch.from_numpy(level[rows]) for key, level in self.run.levels.items()}
        right = self._critic(self._shown(true, torch.from_numpy(self.run.known[rows])))
        wrong = self._critic(self._shown({key: level.detach() for key, level in sent.items()}, known))
        loss = (right - 1).square().mean() + wrong.square().mean()
        self._optimiser.zero_grad(set_to_none=True)
        loss.backward()
        self._optimiser.step()

    def _shown(self, sent: Mapping[str, Tensor], known: Tensor) -> dict[str, Tensor]:
        found = {}
        for name in self._names:
            parts = [level * self._scale[key] for key, level in sent.items() if key.endswith(f"-{name}")]
            found[name] = torch.cat([*parts, pooled(known, parts[0].shape[2:])], dim=1)
        return found
