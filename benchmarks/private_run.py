"""One way of taking part, computed in one process: its halves, its training, its Dice, and what its coordinator sees.

With nothing lossy in between, and as masks of a secure sum cancel, that is what a run would compute, bit for bit.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from pretraining import CONTRASTS, Bench, encoder
from private_gradients import Noted
from private_logits import Opinions, logit_halves
from safetensors.torch import load, save
from torch import Tensor

from splitpeer.data.layouts import find_images
from splitpeer.data.loader import SiteData
from splitpeer.data.sampling import TrainingSchedule
from splitpeer.data.volumes import Volumes
from splitpeer.defences.network import Defended
from splitpeer.defences.randomness import Release
from splitpeer.federation.evaluation import Plan, Scoring
from splitpeer.federation.halves import client_half, coordinator_half
from splitpeer.federation.terms import job_on_wire, window_of
from splitpeer.models import site_seed
from splitpeer.models.backbone import Encoder
from splitpeer.pretraining import encoder_file
from splitpeer.pretraining.information import InformationBottleneck, PricedHalf
from splitpeer.pretraining.sources import PUBLIC_SALT
from splitpeer.settings.job import JobConfig
from splitpeer.settings.loading import to_toml
from splitpeer.storage import durable
from splitpeer.training.split_round import THE_SUM, Parties, Place, fused_step, split_round
from splitpeer.training.split_step import Arrays, ClientHalf
from splitpeer.training.sums import SUM, fused
from splitproto.records import Job, Sample, Seat

Levels = dict[str, np.ndarray]
Window = tuple[int, int, int]


@dataclass(frozen=True)
class Row:
    """One way to take part."""

    name: str
    strangers: int = 0
    """Whose masks the frozen encoders were pretrained on; 0: all halves are trained together."""
    apart: bool = False
    """Each encoder is pretrained alone, as by a site that has strangers of one contrast only."""
    each: bool = False
    """Each site pretrains a network of all contrasts from private entropy, and keeps its own encoder."""
    widths: tuple[int, ...] = ()
    secure: bool = False
    logits: bool = False
    """Each site sends what its whole network would decide, whatever the widths: see private_logits.py."""
    levels: tuple[int, ...] | None = None
    """Those that are sent; None: all."""
    noise: float = 0.0
    """Gaussian noise on what leaves, in deviations of a level; met while encoders are pretrained, too."""
    rate: float = 0.0
    """Price of what gets through the noise while they are pretrained, a nat per voxel and site."""

    @property
    def one_gradient(self) -> bool:
        """Whether all sites are sent the gradient of their sum."""
        return self.secure and not self.strangers


@dataclass(frozen=True)
class RowBench(Bench):
    """One row with one seed."""

    row: Row
    root: Path
    """Of the patients, whatever the cut; `folder` is that of the encoders."""

    def cohort(self, strangers: int = 0) -> Path:
        """The same for all rows."""
        return Bench(self.root, self.seed, self.given).cohort(strangers)

    @property
    def job(self) -> JobConfig:
        """The demo's, with the row's cut and fusion."""
        plain, row = super().job, self.row
        demo: dict[str, Any] = plain.resolved()
        demo["model"] |= {"widths": list(row.widths), "fusion": "secure-sum" if row.secure else "concat"}
        if row.levels is not None:
            demo["model"]["levels"] = list(row.levels)
        path = self.folder / f"job-{self.widths}-{row.secure}.toml"
        path.write_text(to_toml(demo))
        return JobConfig.load(path)

    @property
    def widths(self) -> str:
        """For names of files: encoders of a cut."""
        levels = "" if self.row.levels is None else "-at-" + "".join(map(str, self.row.levels))
        return ("-".join(map(str, self.row.widths)) or "wide") + levels

    @property
    def window(self) -> Window:
        """Of one slice."""
        return window_of(job_on_wire(self.job))

    def strangers(self, count: int) -> Path:
        """Others than those of the encoders, for an adversary."""
        others = Bench(self.root / "adversary", self.seed + 1000, self.given)
        return others.cohort(count)


def images_of(folder: Path) -> dict[str, SiteData]:
    """Of all contrasts of a cohort."""
    return {c: SiteData(Volumes(find_images(folder / c, "folder", c), salt=PUBLIC_SALT)) for c in CONTRASTS}


def together(bench: RowBench, contrast: str, entropy: int = 0) -> dict[str, Tensor]:
    """First weights of an encoder: of a network of all contrasts and the row's fusion, trained on strangers.

    Args:
        entropy: of the network's first weights, on top of the seed.
    """
    row = bench.row
    kind = f"{bench.widths}-{'sum' if row.secure else 'all'}"
    if row.logits:
        kind = "logits"
    if row.noise or row.rate:
        kind += f"-noise-{row.noise}-rate-{row.rate}"
    if entropy:
        kind += f"-{entropy}"
    elif row.each:
        entropy = 1000 * (1 + CONTRASTS.index(contrast))
        kind += f"-{contrast}s"
    kept = {c: bench.folder / f"together-{row.strangers}-{kind}-{c}.safetensors" for c in CONTRASTS}
    if not kept[contrast].exists():
        steps = bench.given.pretraining_steps
        given = argparse.Namespace(**vars(bench.given) | {"steps": steps})
        open_row = replace(row, strangers=0, noise=0.0)
        course = replace(bench, row=open_row, given=given, folder=bench.folder / f"course-{kind}")
        course.folder.mkdir(exist_ok=True)
        parties = halves(course, job_on_wire(course.job), entropy)
        pretrain(course, parties, bench.cohort(row.strangers), row)
        for place, half in parties.sites.items():
            durable.replace(kept[place.seat], save(dict(half.network.state_dict())))
    return load(kept[contrast].read_bytes())


def pretrain(course: RowBench, parties: Parties, folder: Path, row: Row) -> None:
    """The steps of `together`: those of a joint run, behind the row's noise; or of `private_logits`."""
    job, masks, images, window = (
        job_on_wire(course.job),
        course.masks(folder),
        images_of(folder),
        course.window,
    )
    settings, steps = course.job, course.given.steps
    schedule = TrainingSchedule(
        masks.keys(), masks, window=window, batch=settings.training.batch, steps=steps, seed=course.seed,
        positive_fraction=settings.data.positive_fraction,
    )  # fmt: skip
    if row.noise:
        parties = priced(parties, row, steps, course.seed)
    opinions = Opinions(parties, settings, steps) if row.logits else None
    for step in range(steps):
        samples, _ = schedule.batch(step)
        read = {Place(c, c): one.batch(samples, window, None, c) for c, one in images.items()}
        target = SiteData(masks).batch(samples, window, None, None)
        if opinions is not None:
            opinions.step({place.seat: image for place, image in read.items()}, target)
        else:
            release = Release(b"", "train", step + 1, 0, tuple(samples))
            split_round(parties, read, target, release, terms=job.fusion)


def priced(parties: Parties, row: Row, steps: int, seed: int) -> Parties:
    """The same halves, encoders behind the row's noise and at its rate."""
    narrow = InformationBottleneck(row.noise, row.rate)
    sites = {
        place: PricedHalf(
            cast("Encoder", half.network), half.optimiser, half.schedule, bottleneck=narrow, steps=steps,
            encoders=len(parties.sites), entropy=site_seed(seed, place.seat),
        )
        for place, half in parties.sites.items()
    }  # fmt: skip
    return replace(parties, sites=sites)


def summed(sent: Mapping[str, Mapping[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
    """The only seat of a secure sum, without its rounding: {"sum": {"x0": [B, C, *spatial], ...}}."""
    total: dict[str, Tensor] = {}
    for levels in sent.values():
        for name, level in levels.items():
            total[name] = total[name] + level if name in total else level
    return {SUM: total}


def halves(bench: RowBench, job: Job, entropy: int = 0) -> Parties:
    """All halves, encoders with the row's weights and noise.

    Args:
        entropy: of encoders that are drawn, on top of the seed.
    """
    row, sites = bench.row, dict[Place, ClientHalf]()
    if row.logits:
        return _logits(bench, job, entropy)
    written = (f"gaussian:{row.noise}",) if row.noise else ()
    apart = replace(bench, folder=bench.folder / bench.widths)
    backbone = bench.job.model.backbone()
    for contrast in CONTRASTS:
        half = client_half(
            job, backbone, Seat(contrast, (contrast,)), written, key=contrast.encode().ljust(32),
            seed=bench.seed + entropy, device="cpu",
        )  # fmt: skip
        if row.strangers:
            weights = (
                encoder(apart, f"strangers-{row.strangers}", contrast)
                if row.apart
                else together(bench, contrast)
            )
            if weights is not None:
                network = half.network
                encoder_file.load(network.encoder if isinstance(network, Defended) else network, weights)
        sites[Place(contrast, contrast)] = half
    return Parties(coordinator_half(bench.job, job, CONTRASTS, bench.task, "cpu"), sites)


def _logits(bench: RowBench, job: Job, entropy: int) -> Parties:
    parties = logit_halves(job, CONTRASTS, bench.task.channels, bench.seed + entropy)
    if bench.row.strangers:
        for place, half in parties.sites.items():
            half.network.load_state_dict(together(bench, place.seat))
    return parties


@dataclass
class Federation:
    """The halves of one row at work, and what its coordinator sees."""

    bench: RowBench
    told: Callable[[str], None]
    noted: Noted | None = None
    """What came back, where all sites are sent one gradient, and it was trained here."""
    _released: dict[Sample, dict[Place, Arrays]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        torch.set_num_threads(1)
        self.job = job_on_wire(self.bench.job)
        self.window = self.bench.window
        self.parties = halves(self.bench, self.job)

    @cached_property
    def patients(self) -> dict[str, SiteData]:
        """The run's own."""
        return images_of(self.bench.cohort())

    def read(self, data: dict[str, SiteData], samples: Sequence[Sample]) -> dict[Place, np.ndarray]:
        """Windows of all contrasts."""
        return {Place(c, c): one.batch(samples, self.window, None, c) for c, one in data.items()}

    def sent(
        self, images: dict[Place, np.ndarray], samples: Sequence[Sample], nonce: bytes
    ) -> dict[Place, Arrays]:
        """What leaves the sites."""
        release = Release(b"", "release", 0, 0, tuple(samples), nonce=nonce)
        return {place: half.evaluate(images[place], release) for place, half in self.parties.sites.items()}

    def once(self, samples: Sequence[Sample]) -> dict[Place, Arrays]:
        """What leaves the sites, each window once: asked again, the same."""
        new = [sample for sample in samples if sample not in self._released]
        if new:
            fresh = self.sent(self.read(self.patients, new), new, b"%d" % len(self._released))
            for i, sample in enumerate(new):
                self._released[sample] = {
                    place: {name: array[i].astype(np.float32) for name, array in arrays.items()}
                    for place, arrays in fresh.items()
                }
        return {
            place: {
                name: np.stack([self._released[sample][place][name] for sample in samples])
                for name in self._released[samples[0]][place]
            }
            for place in self.parties.sites
        }

    def seen(self, sent: dict[Place, Arrays]) -> dict[Place, Arrays]:
        """What the coordinator can read of it."""
        if self.job.fusion is None:
            return sent
        return {THE_SUM: fused({p.site: {p.seat: arrays} for p, arrays in sent.items()}, self.job.fusion)}

    def train(self) -> None:
        """The steps of the job."""
        bench, settings = self.bench, self.bench.job
        masks = bench.masks(bench.cohort())
        training, _ = bench.split()
        schedule = TrainingSchedule(
            training, masks, window=self.window, batch=settings.training.batch, steps=settings.training.steps,
            seed=bench.seed, positive_fraction=settings.data.positive_fraction,
        )  # fmt: skip
        steps = range(settings.training.steps)
        if bench.row.one_gradient:
            batches = [schedule.batch(step)[0] for step in steps]
            self.noted = Noted.of(batches, lambda s: bool(masks.window(s.key, s.origin, self.window).any()))
        for step in steps:
            samples, _ = schedule.batch(step)
            target = SiteData(masks).batch(samples, self.window, None, None)
            release = Release(b"", "train", step + 1, 0, tuple(samples), nonce=b"%d" % step)
            if bench.row.strangers:
                fused_step(self.parties.coordinator, self.seen(self.once(samples)), target, release, {})
            else:
                self._together(samples, target, release)
            if (step + 1) % 100 == 0:
                self.told(f"step {step + 1} of {settings.training.steps}")

    def _together(self, samples: Sequence[Sample], target: np.ndarray, release: Release) -> None:
        """A step of all halves, as `split_round`; what comes back of a sum is noted."""
        images, sites = self.read(self.patients, samples), self.parties.sites
        sent = self.seen({place: half.forward(images[place], release) for place, half in sites.items()})
        _, back = fused_step(self.parties.coordinator, sent, target, release, {})
        for place, half in sites.items():
            half.backward(back[THE_SUM if self.job.fusion is not None else place])
        if self.noted is not None:
            self.noted.note(release.step, samples, back[THE_SUM])

    def _trained(self, what: str) -> Path:
        """Where a half is kept."""
        row = self.bench.row.name.replace(" ", "-").replace(",", "-")
        return self.bench.folder / f"trained-{row}-{what}.safetensors"

    def keep(self) -> None:
        """What an attack needs: the decoder, and encoders that were trained."""
        if not self.bench.row.strangers:
            for place, half in self.parties.sites.items():
                durable.replace(self._trained(place.seat), save(dict(half.network.state_dict())))
        if self.noted is not None:
            self.noted.keep(self._trained("gradients"))
        decoder = self.parties.coordinator.network
        durable.replace(self._trained("decoder"), save(dict(decoder.state_dict())))

    def gradients(self) -> Noted:
        """What came back while it was trained; trained again where that was not kept."""
        path = self._trained("gradients")
        if not path.exists():
            again = replace(self, noted=None, _released={})
            again.train()
            again.keep()
        return Noted.read(path)

    def recall(self) -> None:
        """All halves as `keep` left them; trained again where it was not called."""
        if not self._trained("decoder").exists():
            self.train()
            self.keep()
        if not self.bench.row.strangers:
            for place, half in self.parties.sites.items():
                half.network.load_state_dict(load(self._trained(place.seat).read_bytes()))
        decoder = self.parties.coordinator.network
        decoder.load_state_dict(load(self._trained("decoder").read_bytes()))

    def dice(self) -> tuple[dict[str, float | None], list[float]]:
        """By region, of the patients held out; and the mean of each of them."""
        settings, masks = self.bench.job, self.bench.masks(self.bench.cohort())
        plan = Plan.of(
            self.bench.split()[1], masks, self.window, settings.evaluation.overlap, settings.evaluation.batch,
            settings.training.steps,
        )  # fmt: skip
        scoring = Scoring(plan, masks, self.window, None)
        for index, forward in enumerate(plan.forwards):
            arrived = self.seen(self.once(forward.samples))
            scoring.add(
                index, self.parties.coordinator.predict({place.seat: a for place, a in arrived.items()})
            )
        return scoring.dice.result(), scoring.dice.means()


def levels_of(seen: Mapping[Place, Mapping[str, np.ndarray]]) -> Levels:
    """All that is seen, level by level: [B, C of all, *spatial]."""
    names = next(iter(seen.values()))
    return {name: np.concatenate([arrays[name] for arrays in seen.values()], axis=1) for name in names}
