"""Images rebuilt from what a coordinator saw, by networks that learn on strangers how the two go together.

A network is shown what the adversary would read of strangers: through the true encoders (`insider`), through its own
(private_outsider.py), or nothing but their labels, which a coordinator holds anyway. Then it is shown the run's own.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from monai.losses import SSIMLoss
from pretraining import CONTRASTS
from private_run import Federation, Levels, RowBench, images_of, levels_of
from torch import Tensor
from torch.nn import functional

from splitpeer.attacks.base import silent
from splitpeer.attacks.learning import held_out, rounds, spread, train
from splitpeer.attacks.neighbours import beside, offsets
from splitpeer.attacks.networks import ImageDecoder, image_decoder
from splitpeer.data.loader import SiteData
from splitpeer.data.volumes import Volumes
from splitpeer.leakage.metrics import similarities
from splitpeer.training.split_round import Place
from splitproto.records import Sample

RANGE = 6.0
"""Data range of normalised intensities, for SSIM."""
KEPT = 1 << 30
"""Octets of strangers' levels that are kept in memory; of a row that needs more, none are."""
WIDTH = 32
Images = dict[Place, np.ndarray]
Found = dict[str, list[float]]
"""A figure by contrast, of each slice."""
Told = Callable[[str], None]


# --- patients ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class People:
    """Patients whose images and labels are at hand: strangers, or (for the judge) those of the run."""

    images: dict[str, SiteData]
    masks: Volumes
    window: tuple[int, int, int]

    @classmethod
    def of(cls, bench: RowBench, folder: Path) -> People:
        """Of a cohort."""
        return cls(images_of(folder), bench.masks(folder), bench.window)

    def read(self, samples: Sequence[Sample]) -> Images:
        """float32 [B, 1, *spatial] of all contrasts."""
        return {Place(c, c): one.batch(samples, self.window, None, c) for c, one in self.images.items()}

    def slices(self) -> list[Sample]:
        """All of them."""
        keys = self.masks.keys()
        return [Sample(key, (0, 0, z)) for key in keys for z in range(depth(self.masks, key))]

    def known(self, samples: Sequence[Sample]) -> np.ndarray:
        """What a coordinator knows of a slice without any image, float32 [B, regions + 1, *spatial]: its labels, and
        how far up it lies."""
        labels = SiteData(self.masks).batch(samples, self.window, None, None).astype(np.float32)
        height = np.array([one.origin[2] / max(depth(self.masks, one.key) - 1, 1) for one in samples])
        there = np.broadcast_to(
            height.astype(np.float32).reshape(-1, *[1] * (labels.ndim - 1)), labels[:, :1].shape
        )
        return np.concatenate([labels, there], axis=1)

    def around(self, samples: Sequence[Sample], by: int) -> list[Sample]:
        """The slices so much further up; at the end of a volume, its last."""
        found = []
        for one in samples:
            x, y, z = beside(one, by).origin
            found.append(Sample(one.key, (x, y, min(max(z, 0), depth(self.masks, one.key) - 1))))
        return found


def depth(masks: Volumes, key: bytes) -> int:
    """Slices of a volume."""
    return int(masks.geometry(key).shape[2])


def middle(masks: Volumes, keys: Sequence[bytes]) -> list[Sample]:
    """For each patient the slice with the largest tumour."""
    return [Sample(key, (0, 0, int(tumour(masks, key).argmax()))) for key in keys]


def healthy(masks: Volumes, keys: Sequence[bytes]) -> list[Sample]:
    """For each patient who has one, the slice without tumour that is nearest to the middle of the volume."""
    found = []
    for key in keys:
        free = np.flatnonzero(tumour(masks, key) == 0)
        if len(free):
            centre = depth(masks, key) / 2
            found.append(Sample(key, (0, 0, int(free[np.abs(free - centre).argmin()]))))
    return found


def tumour(masks: Volumes, key: bytes) -> np.ndarray:
    """Voxels of it in each slice, [depth]."""
    whole = masks.window(key, (0, 0, 0), masks.geometry(key).shape)[0]
    found: np.ndarray = (whole > 0).sum(axis=(0, 1))
    return found


# --- what a network is shown ---------------------------------------------------------------------------------


class Reads(Protocol):
    """What an adversary makes of strangers' images: levels as a coordinator would see them."""

    def __call__(self, images: Images, samples: Sequence[Sample], nonce: bytes) -> Levels: ...


@dataclass(frozen=True)
class Look:
    """What of a slice a network is shown."""

    sums: bool = True
    """What was sent."""
    labels: bool = False
    """What a coordinator knows besides: see `People.known`."""
    reach: int = 0
    """Slices above and below that are shown with it."""


@dataclass
class Reader:
    """One adversary's view of strangers and of the run, as an inverse network wants it.

    Args:
        federation: the run.
        strangers: on whom the network learns.
        reads: of them; None: the adversary has every encoder.
        look: what it looks at.
        seed: of its network.
    """

    federation: Federation
    strangers: People
    reads: Reads | None = None
    look: Look = field(default_factory=Look)
    kept: dict[tuple[Sample, bool], Levels] = field(default_factory=dict)
    """Strangers' levels that were computed; may be shared by readers of the same `reads`."""

    def __post_init__(self) -> None:
        bench = self.federation.bench
        self.run = People(self.federation.patients, bench.masks(bench.cohort()), bench.window)
        slices = self.strangers.slices()
        held = held_out([one.key.hex() for one in slices], len(slices))
        self.learned = [one for one, out in zip(slices, held, strict=True) if not out]
        self.judged = [slices[n] for n in spread(held)]
        self._cut = bench.job.model.backbone().cut
        self._keeps = True
        first = self._levels(self.judged, mirrored=False) if self.look.sums else {}
        octets = sum(array[0].nbytes for array in first.values()) // len(self._offsets)
        if 2 * octets * len(slices) > KEPT:
            self._keeps = False
            self.kept.clear()
        self.scales = {name: float(1 / max(array.std(), 1e-6)) for name, array in first.items()}
        self.channels = {
            name: array.shape[1] for name, array in self._inputs(self.strangers, self.judged, first).items()
        }

    def pairs(self, samples: Sequence[Sample], *, mirrored: bool = False) -> tuple[dict[str, Tensor], Tensor]:
        """What would be seen of strangers, and their images [B, contrasts, *spatial]."""
        levels = self._levels(samples, mirrored=mirrored) if self.look.sums else {}
        goal = np.concatenate(list(_turned(self.strangers.read(samples), mirrored).values()), axis=1)
        return self._inputs(self.strangers, samples, levels, mirrored=mirrored), torch.from_numpy(goal)

    def guess(self, network: ImageDecoder, samples: Sequence[Sample]) -> np.ndarray:
        """Images [B, contrasts, *spatial] of the run's own."""
        found = []
        for first in range(0, len(samples), 8):
            some = samples[first : first + 8]
            levels: Levels = {}
            if self.look.sums:
                levels = _stacked([self._released(self.run.around(some, by)) for by in self._offsets])
            with torch.no_grad():
                found.append(network(self._inputs(self.run, some, levels)).numpy())
        return np.concatenate(found)

    def network(self, seed: int) -> ImageDecoder:
        """That is to be trained."""
        return image_decoder(self._cut, self.channels, seed, WIDTH, len(CONTRASTS))

    @property
    def _offsets(self) -> tuple[int, ...]:
        return offsets(self.look.reach)

    def _released(self, samples: Sequence[Sample]) -> Levels:
        return levels_of(self.federation.seen(self.federation.once(samples)))

    def _levels(self, samples: Sequence[Sample], *, mirrored: bool) -> Levels:
        """Of strangers, with their neighbours."""
        return _stacked(
            [self._read(self.strangers.around(samples, by), mirrored=mirrored) for by in self._offsets]
        )

    def _read(self, samples: Sequence[Sample], *, mirrored: bool) -> Levels:
        """Each slice once, as in a run."""
        new = [one for one in dict.fromkeys(samples) if (one, mirrored) not in self.kept]
        fresh: dict[Sample, Levels] = {}
        if new:
            images = _turned(self.strangers.read(new), mirrored)
            made = (self.reads or self._through_the_encoders)(images, new, b"strangers %d" % len(self.kept))
            fresh = {one: {name: array[i] for name, array in made.items()} for i, one in enumerate(new)}
            if self._keeps:
                self.kept |= {(one, mirrored): levels for one, levels in fresh.items()}
        rows = [fresh[one] if one in fresh else self.kept[one, mirrored] for one in samples]
        return {name: np.stack([row[name] for row in rows]) for name in rows[0]}

    def _through_the_encoders(self, images: Images, samples: Sequence[Sample], nonce: bytes) -> Levels:
        return levels_of(self.federation.seen(self.federation.sent(images, samples, nonce)))

    def _inputs(
        self, people: People, samples: Sequence[Sample], levels: Levels, *, mirrored: bool = False
    ) -> dict[str, Tensor]:
        """Each level scaled to about one; what is known, and levels that were not sent, pooled from finer ones."""
        shown = {name: torch.from_numpy(array) * self.scales.get(name, 1.0) for name, array in levels.items()}
        known = None
        if self.look.labels:
            several = [people.known(people.around(samples, by)) for by in self._offsets]
            known = torch.from_numpy(_mirrored(np.concatenate(several, axis=1), mirrored))
        found, finest = dict[str, Tensor](), None
        for level, name in enumerate(one.name for one in self._cut.levels):
            shape = self._cut.shape(level, self.federation.window[:2])[1:]
            finest = shown.get(name) if finest is None else finest
            parts = [shown[name]] if name in shown else [] if finest is None else [pooled(finest, shape)]
            if known is not None:
                parts.append(pooled(known, shape))
            if parts:
                found[name] = torch.cat(parts, dim=1)
        return found


def pooled(level: Tensor, spatial: Sequence[int]) -> Tensor:
    """The level at a coarser resolution."""
    height, width = spatial
    found: Tensor = functional.adaptive_avg_pool2d(level, (height, width))
    return found


def _stacked(levels: Sequence[Levels]) -> Levels:
    return {name: np.concatenate([one[name] for one in levels], axis=1) for name in levels[0]}


def _turned(images: Images, mirrored: bool) -> Images:
    return {place: _mirrored(image, mirrored) for place, image in images.items()}


def _mirrored(array: np.ndarray, mirrored: bool) -> np.ndarray:
    """Left and right exchanged."""
    return np.ascontiguousarray(np.flip(array, 2)) if mirrored else array


# --- networks ------------------------------------------------------------------------------------------------


def learn(reader: Reader, steps: int, network: ImageDecoder) -> float:
    """Train the inverse network, its best weights kept: in bfloat16, which takes 2 to 3 times less time where the
    processor has it. Returns its root mean square error on strangers held out."""
    similarity = SSIMLoss(2, data_range=RANGE, win_size=7)
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    random = np.random.default_rng(steps)
    following = rounds(len(reader.learned), 8, random)
    judged, wanted = reader.pairs(reader.judged)

    def objective(shown: dict[str, Tensor], goal: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            guess = network(shown).float()
        head = (goal != 0).float()
        weight = head / head.mean().clamp_min(1e-3) + 0.1
        both: Tensor = (weight * (guess - goal).abs()).mean() + similarity(guess, goal)
        return both

    def loss(_: int) -> Tensor:
        chosen = [reader.learned[i] for i in following()]
        return objective(*reader.pairs(chosen, mirrored=bool(random.random() < 0.5)))

    def error() -> float:
        return objective(judged, wanted).item()

    train(network, loss, error, steps, rate=3e-3, progress=silent, what="")
    with torch.no_grad():
        return float((network(judged) - wanted).square().mean().sqrt())


def likeness(truth: np.ndarray, guess: np.ndarray) -> Found:
    """SSIM inside the head, aligned, by contrast and slice."""
    return {
        contrast: [similarities(true[c], made[c])["ssim"] for true, made in zip(truth, guess, strict=True)]
        for c, contrast in enumerate(CONTRASTS)
    }


def mean(found: Mapping[str, Sequence[float]]) -> float:
    """Over contrasts and slices."""
    return statistics.fmean(statistics.fmean(values) for values in found.values())
