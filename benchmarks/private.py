"""What taking part privately costs and what still leaks: Dice, beside images rebuilt from what the coordinator saw.

Rows: all halves trained together and every tensor seen (what a plain job does); narrow levels; a secure sum of which
only the sum is seen; and frozen encoders, pretrained on strangers, from which each window is released once
(docs/private.md). One process computes what a run would, bit for bit, as masks cancel.

The attack is the worst that knows every site's encoder: an inverse network from what the coordinator sees to all four
contrasts, trained on other strangers through the true encoders with the sites' own kind of noise, for twice as many
steps as long as that still gains .01. All rows are trained first, then attacked; --attack-seeds says of which seeds, as
intervals of what leaks are over patients. What is done is kept in --out, and not done again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.losses import SSIMLoss
from pretraining import CONTRASTS, Bench, encoder, interval
from rich.console import Console
from rich.table import Table
from safetensors.torch import load, save
from torch import Tensor

from splitpeer.attacks.base import silent
from splitpeer.attacks.budget import Budget, doubled
from splitpeer.attacks.learning import held_out, rounds, spread, train
from splitpeer.attacks.networks import ImageDecoder, image_decoder
from splitpeer.data.layouts import find_images
from splitpeer.data.loader import SiteData
from splitpeer.data.sampling import TrainingSchedule
from splitpeer.data.volumes import Volumes
from splitpeer.defences.network import Defended
from splitpeer.defences.randomness import Release
from splitpeer.federation.evaluation import Plan, Scoring
from splitpeer.federation.halves import client_half, coordinator_half
from splitpeer.federation.terms import job_on_wire, window_of
from splitpeer.leakage.metrics import similarities
from splitpeer.pretraining import encoder_file
from splitpeer.pretraining.sources import PUBLIC_SALT
from splitpeer.settings.job import JobConfig
from splitpeer.settings.loading import to_toml
from splitpeer.storage import durable
from splitpeer.training.split_round import THE_SUM, Parties, Place, fused_step, split_round
from splitpeer.training.split_step import Arrays
from splitpeer.training.sums import fused
from splitproto.messages import Job, Sample, Seat

SHADOW = 24
"""Strangers on whom the attack learns; the encoders of frozen rows have seen others too."""
FEWEST = 240
"""Steps of an attack's first attempt."""
RANGE = 6.0
"""Data range of normalised intensities, for SSIM."""
Levels = dict[str, np.ndarray]


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
    noise: float = 0.0
    """Gaussian noise on what leaves, in deviations of a level."""


ROWS = (
    Row("joint, all tensors"),
    Row("joint, sum 2,2,4,8,16", widths=(2, 2, 4, 8, 16), secure=True),
    Row("joint, sum 1,1,2,4,8", widths=(1, 1, 2, 4, 8), secure=True),
    Row("frozen, all tensors", strangers=240),
    Row("frozen, tensors 1,1,2,4,8", strangers=240, widths=(1, 1, 2, 4, 8)),
    Row("frozen apart, sum 2,2,4,8,16", strangers=240, apart=True, widths=(2, 2, 4, 8, 16), secure=True),
    Row("frozen each, sum 2,2,4,8,16", strangers=240, each=True, widths=(2, 2, 4, 8, 16), secure=True),
    Row("frozen, sum 4,4,8,8,16", strangers=240, widths=(4, 4, 8, 8, 16), secure=True),
    Row("frozen, sum 2,2,4,8,16", strangers=240, widths=(2, 2, 4, 8, 16), secure=True),
    Row("frozen, sum 1,1,2,4,8", strangers=240, widths=(1, 1, 2, 4, 8), secure=True),
    Row("frozen, sum 2,2,4,8,16, noise .5", strangers=240, widths=(2, 2, 4, 8, 16), secure=True, noise=0.5),
    Row("frozen, sum 1,1,2,4,8, noise .5", strangers=240, widths=(1, 1, 2, 4, 8), secure=True, noise=0.5),
)


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
        path = self.folder / f"job-{'-'.join(map(str, row.widths)) or 'wide'}-{row.secure}.toml"
        path.write_text(to_toml(demo))
        return JobConfig.load(path)

    @property
    def widths(self) -> str:
        """For names of files: encoders of a cut."""
        return "-".join(map(str, self.row.widths)) or "wide"


def images_of(folder: Path) -> dict[str, SiteData]:
    """Of all contrasts of a cohort."""
    return {c: SiteData(Volumes(find_images(folder / c, "folder", c), salt=PUBLIC_SALT)) for c in CONTRASTS}


def together(bench: RowBench, contrast: str) -> dict[str, Tensor]:
    """First weights of an encoder: of a network of all contrasts and the row's fusion, trained on strangers."""
    row = bench.row
    entropy = 1000 * (1 + CONTRASTS.index(contrast)) if row.each else 0
    kind = f"{bench.widths}-{'sum' if row.secure else 'all'}" + (f"-{contrast}s" if row.each else "")
    kept = {c: bench.folder / f"together-{row.strangers}-{kind}-{c}.safetensors" for c in CONTRASTS}
    if not kept[contrast].exists():
        steps = bench.given.pretraining_steps
        given = argparse.Namespace(**vars(bench.given) | {"steps": steps})
        open_row = replace(row, strangers=0, noise=0.0)
        course = replace(bench, row=open_row, given=given, folder=bench.folder / f"course-{kind}")
        course.folder.mkdir(exist_ok=True)
        settings, folder = course.job, bench.cohort(row.strangers)
        job, masks = job_on_wire(settings), bench.masks(folder)
        parties, images, window = halves(course, job, entropy), images_of(folder), window_of(job)
        schedule = TrainingSchedule(
            masks.keys(), masks, window=window, batch=settings.training.batch, steps=steps, seed=bench.seed,
            positive_fraction=settings.data.positive_fraction,
        )  # fmt: skip
        for step in range(steps):
            samples, _ = schedule.batch(step)
            read = {Place(c, c): one.batch(samples, window, None, c) for c, one in images.items()}
            target = SiteData(masks).batch(samples, window, None, None)
            split_round(
                parties, read, target, Release(b"", "train", step + 1, 0, tuple(samples)), terms=job.fusion
            )
        for place, half in parties.sites.items():
            durable.replace(kept[place.seat], save(dict(half.network.state_dict())))
    return load(kept[contrast].read_bytes())


def halves(bench: RowBench, job: Job, entropy: int = 0) -> Parties:
    """All halves, encoders with the row's weights and noise.

    Args:
        entropy: of encoders that are drawn, on top of the seed.
    """
    row, sites = bench.row, {}
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


@dataclass
class Federation:
    """The halves of one row at work, and what its coordinator sees."""

    bench: RowBench
    told: Callable[[str], None]
    _released: dict[Sample, dict[Place, Arrays]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        torch.set_num_threads(1)
        self.job = job_on_wire(self.bench.job)
        self.window = window_of(self.job)
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
        for step in range(settings.training.steps):
            samples, _ = schedule.batch(step)
            target = SiteData(masks).batch(samples, self.window, None, None)
            release = Release(b"", "train", step + 1, 0, tuple(samples), nonce=b"%d" % step)
            if bench.row.strangers:
                fused_step(self.parties.coordinator, self.seen(self.once(samples)), target, release, {})
            else:
                images = self.read(self.patients, samples)
                split_round(self.parties, images, target, release, terms=self.job.fusion)
            if (step + 1) % 100 == 0:
                self.told(f"step {step + 1} of {settings.training.steps}")

    def trained(self, contrast: str) -> Path:
        """Where an encoder of a joint run is kept."""
        row = self.bench.row.name.replace(" ", "-").replace(",", "-")
        return self.bench.folder / f"trained-{row}-{contrast}.safetensors"

    def keep(self) -> None:
        """What the attack needs: encoders that never change are known without it."""
        if not self.bench.row.strangers:
            for place, half in self.parties.sites.items():
                durable.replace(self.trained(place.seat), save(dict(half.network.state_dict())))

    def recall(self) -> None:
        """The encoders as `keep` left them."""
        if not self.bench.row.strangers:
            for place, half in self.parties.sites.items():
                half.network.load_state_dict(load(self.trained(place.seat).read_bytes()))

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


# --- the attack ------------------------------------------------------------------------------------------


def levels_of(seen: dict[Place, Arrays]) -> Levels:
    """All that is seen, level by level: [B, C of all, *spatial]."""
    names = next(iter(seen.values()))
    return {name: np.concatenate([arrays[name] for arrays in seen.values()], axis=1) for name in names}


def depth(masks: Volumes, key: bytes) -> int:
    """Slices of a volume."""
    return int(masks.geometry(key).shape[2])


def middle(masks: Volumes, keys: Sequence[bytes]) -> list[Sample]:
    """For each patient the slice with the largest tumour."""
    found = []
    for key in keys:
        tumour = masks.window(key, (0, 0, 0), masks.geometry(key).shape)[0]
        found.append(Sample(key, (0, 0, int((tumour > 0).sum(axis=(0, 1)).argmax()))))
    return found


def tensors(levels: Levels, scales: dict[str, float]) -> dict[str, Tensor]:
    """Each level scaled to about one."""
    return {name: torch.from_numpy(array) * scales[name] for name, array in levels.items()}


@dataclass(frozen=True)
class Strangers:
    """On whom the attack learns, and by whom it judges its networks itself."""

    federation: Federation
    images: dict[str, SiteData]
    learned: Sequence[Sample]
    """Every slice of most of them."""
    judged: Sequence[Sample]
    """A few slices of the rest."""
    scales: dict[str, float]
    channels: dict[str, int]

    @classmethod
    def met(cls, federation: Federation) -> Strangers:
        """Others than those of the encoders."""
        bench = federation.bench
        folder = replace(bench, seed=bench.seed + 1000).cohort(SHADOW)
        images, masks = images_of(folder), bench.masks(folder)
        everybody = masks.keys()
        slices = [Sample(key, (0, 0, z)) for key in everybody for z in range(depth(masks, key))]
        held = held_out([sample.key.hex() for sample in slices], len(slices))
        learned = [sample for sample, kept in zip(slices, held, strict=True) if not kept]
        first = federation.seen(
            federation.sent(federation.read(images, learned[:16]), learned[:16], b"scales")
        )
        levels = levels_of(first)
        return cls(
            federation, images, learned, [slices[n] for n in spread(held)],
            {name: float(1 / max(array.std(), 1e-6)) for name, array in levels.items()},
            {name: array.shape[1] for name, array in levels.items()},
        )  # fmt: skip

    def pairs(self, samples: Sequence[Sample], nonce: bytes) -> tuple[dict[str, Tensor], Tensor]:
        """What the coordinator would see of them, and their images."""
        images = self.federation.read(self.images, samples)
        seen = self.federation.seen(self.federation.sent(images, samples, nonce))
        return tensors(levels_of(seen), self.scales), torch.from_numpy(
            np.concatenate(list(images.values()), axis=1)
        )


def learn(strangers: Strangers, steps: int, network: ImageDecoder) -> None:
    """Train the inverse network, its best weights kept: in bfloat16, which takes 2 to 3 times less time where the
    processor has it."""
    similarity = SSIMLoss(2, data_range=RANGE, win_size=7)
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    following = rounds(len(strangers.learned), 8, np.random.default_rng(steps))
    judged = strangers.pairs(strangers.judged, b"judged")

    def objective(shown: dict[str, Tensor], goal: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            guess = network(shown).float()
        head = (goal != 0).float()
        weight = head / head.mean().clamp_min(1e-3) + 0.1
        both: Tensor = (weight * (guess - goal).abs()).mean() + similarity(guess, goal)
        return both

    def loss(step: int) -> Tensor:
        chosen = [strangers.learned[i] for i in following()]
        return objective(*strangers.pairs(chosen, b"attack %d" % step))

    train(network, loss, lambda: objective(*judged).item(), steps, rate=3e-3, progress=silent, what="")


def rebuilt(
    federation: Federation, network: ImageDecoder, scales: dict[str, float], samples: Sequence[Sample],
) -> dict[str, list[float]]:  # fmt: skip
    """SSIM inside the head, aligned, by contrast and patient; of what was released in the run."""
    images = federation.read(federation.patients, samples)
    with torch.no_grad():
        guess = network(tensors(levels_of(federation.seen(federation.once(samples))), scales)).numpy()
    truth = np.concatenate(list(images.values()), axis=1)
    return {
        contrast: [similarities(truth[i, c], guess[i, c])["ssim"] for i in range(len(samples))]
        for c, contrast in enumerate(CONTRASTS)
    }


def attack(federation: Federation, told: Callable[[str], None], most: int) -> dict[str, Any]:
    """The worst that an inverse network does, and how long it was trained."""
    bench, strangers = federation.bench, Strangers.met(federation)
    victims = middle(bench.masks(bench.cohort()), bench.split()[1])
    steps = min(FEWEST, most)

    def attempt(times: int) -> tuple[dict[str, list[float]], float]:
        cut = bench.job.model.backbone().cut
        network = image_decoder(cut, strangers.channels, bench.seed, 32, len(CONTRASTS))
        learn(strangers, steps * times, network)
        found = rebuilt(federation, network, strangers.scales, victims)
        mean = statistics.fmean(statistics.fmean(values) for values in found.values())
        told(f"attack of {steps * times} steps: SSIM {mean:.3f}")
        return found, mean

    best, _, curve, stopped = doubled(attempt, Budget(most // steps))
    return {
        "ssim": {c: statistics.fmean(v) for c, v in best.items()},
        "patients": best,
        "budgets": [{"steps": steps * times, "ssim": mean} for times, mean in curve],
        "stopped": stopped,
    }


def floor(federation: Federation) -> dict[str, float]:
    """SSIM of the strangers' mean image, which needs nothing that was sent."""
    bench = federation.bench
    folder = replace(bench, seed=bench.seed + 1000).cohort(SHADOW)
    shadow, masks = images_of(folder), bench.masks(folder)
    victims = middle(bench.masks(bench.cohort()), bench.split()[1])
    means = federation.read(shadow, middle(masks, masks.keys()))
    truth = federation.read(federation.patients, victims)
    return {
        place.seat: statistics.fmean(
            similarities(one[0], means[place].mean(axis=0)[0])["ssim"] for one in truth[place]
        )
        for place in truth
    }


# --- results ---------------------------------------------------------------------------------------------


def octets(federation: Federation) -> int:
    """Sent by all sites for one window."""
    word = 4 if federation.job.fusion is None else federation.job.fusion.bits // 8
    shapes = federation.bench.job.model.backbone().cut.shapes(1, federation.job.window)
    return len(CONTRASTS) * word * sum(int(np.prod(shape)) for shape in shapes.values())


def ran(bench: RowBench, told: Callable[[str], None]) -> dict[str, Any]:
    """Train one row with one seed, and score it."""
    started = time.monotonic()
    federation = Federation(bench, told)
    federation.train()
    federation.keep()
    dice, patients = federation.dice()
    told(f"Dice {dice['mean']:.3f}")
    return {
        "dice": dice,
        "patients": patients,
        "octets_per_window": octets(federation),
        "seconds": time.monotonic() - started,
    }


def attacked(bench: RowBench, told: Callable[[str], None], most: int) -> dict[str, Any]:
    """Attack one row with one seed, after `ran`."""
    federation = Federation(bench, told)
    federation.recall()
    return {"attack": attack(federation, told, most), "floor": floor(federation)}


def shown(
    results: dict[str, Any], rows: Sequence[Row], seeds: Sequence[int], attacks: Sequence[int]
) -> Table:
    """For a terminal: means with 95 % t intervals over patients (and, of Dice, over seeds)."""
    table = Table(title=f"seeds {list(seeds)}, attacked {list(attacks)}")
    for column in (
        "row", "Dice", "minus joint", "over seeds", "SSIM worst contrast", "SSIM mean", "floor", "kB a window", "s",
    ):  # fmt: skip
        table.add_column(column, justify="left" if column == "row" else "right")

    def cell(values: Sequence[float]) -> str:
        half = interval(values)
        return f"{statistics.fmean(values):.3f}" + (f" +- {half:.3f}" if half is not None else "")

    def minus(one: dict[str, Any], other: dict[str, Any]) -> list[float]:
        return [a - b for a, b in zip(one["patients"], other["patients"], strict=True)]

    for row in rows:
        done = [results[f"{row.name}/{seed}"] for seed in seeds]
        paired = [
            minus(one, results[f"{ROWS[0].name}/{seed}"]) for one, seed in zip(done, seeds, strict=True)
        ]
        told = [results[f"{row.name}/{seed}/attack"] for seed in attacks]
        patients = [one["attack"]["patients"] for one in told]
        worst = [max(by.items(), key=lambda item: statistics.fmean(item[1]))[1] for by in patients]
        table.add_row(
            row.name, cell([one["dice"]["mean"] for one in done]),
            cell([each for one in paired for each in one]) if row != ROWS[0] else "-",
            cell([statistics.fmean(one) for one in paired]) if row != ROWS[0] else "-",
            cell([each for one in worst for each in one]) if told else "-",
            cell([statistics.fmean(each) for by in patients for each in zip(*by.values(), strict=True)])
            if told else "-",
            cell([max(one["floor"].values()) for one in told]) if told else "-",
            f"{done[0]['octets_per_window'] / 1000:.0f}", f"{statistics.fmean(one['seconds'] for one in done):.0f}",
        )  # fmt: skip
    return table


def _tell(console: Console, who: str, line: str) -> None:
    console.print(f"{who}: {line}", highlight=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/private"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[7, 8, 9])
    parser.add_argument("--attack-seeds", type=int, nargs="*", help="of --seeds; absent: all")
    parser.add_argument("--patients", type=int, default=124)
    parser.add_argument("--validation", type=int, default=24)
    parser.add_argument("--strangers", type=int, default=240)
    parser.add_argument("--steps", type=int, default=450, help="of the run")
    parser.add_argument("--pretraining-steps", type=int, default=600)
    parser.add_argument("--attack-steps", type=int, default=3840, help="at most")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument(
        "--rows", type=int, nargs="+", default=list(range(len(ROWS))), help="numbers; 0 is joint"
    )
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    console = Console(stderr=True)
    settings = (
        given.patients, given.validation, given.steps, given.pretraining_steps, given.batch, given.strangers
    )  # fmt: skip
    name = "-".join(map(str, settings))
    given.out.mkdir(parents=True, exist_ok=True)
    kept = given.out / f"results-{name}-{given.attack_steps}.json"
    results: dict[str, Any] = json.loads(kept.read_text()) if kept.exists() else {}
    rows = [
        replace(ROWS[number], strangers=min(ROWS[number].strangers, given.strangers))
        for number in sorted({0, *given.rows})
    ]
    attacks = given.seeds if given.attack_seeds is None else given.attack_seeds
    phases: tuple[tuple[str, Sequence[int], Callable[..., dict[str, Any]]], ...] = (
        ("", given.seeds, ran),
        ("/attack", attacks, partial(attacked, most=given.attack_steps)),
    )
    for suffix, seeds, measure in phases:
        for seed in seeds:
            for row in rows:
                if f"{row.name}/{seed}{suffix}" in results:
                    continue
                folder = given.out / f"seed-{seed}-{name}"
                bench = RowBench(folder, seed, given, row, folder)
                told = partial(_tell, console, f"seed {seed}, {row.name}")
                results[f"{row.name}/{seed}{suffix}"] = measure(bench, told)
                durable.replace(kept, json.dumps(results, indent=1).encode())
    if given.json:
        json.dump(results, sys.stdout, indent=1)
        return
    Console().print(shown(results, rows, given.seeds, attacks))


if __name__ == "__main__":
    main()
