"""What the coordinator of the private demo could see: images rebuilt from the sums that it kept.

The adversary is stronger than a real one: it holds the encoder of every hospital. An inverse network learns from
other patients to turn what is seen into images. The same is done to the values of one hospital, which the coordinator
never had.
"""

from __future__ import annotations

import base64
import io
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from monai.losses import SSIMLoss
from torch import Tensor

from splitpeer.attacks.networks import ImageDecoder, image_decoder
from splitpeer.data.layouts import find_images, find_labels
from splitpeer.data.loader import SiteData
from splitpeer.data.phantom.cohort import write_phantom
from splitpeer.data.pseudonym import load_salt
from splitpeer.data.volumes import Volumes
from splitpeer.defences.randomness import Release
from splitpeer.demo.federation import SITES, Federation
from splitpeer.demo.leak import SEAT, STRANGERS, recorded_keys
from splitpeer.demo.private import PrivateJob, coordinator_bank
from splitpeer.errors import JobFailed
from splitpeer.federation.halves import client_half
from splitpeer.federation.terms import job_on_wire, window_of
from splitpeer.leakage.metrics import similarities
from splitpeer.pretraining import encoder_file
from splitpeer.settings.job import JobConfig
from splitpeer.storage import durable
from splitpeer.storage.bank import Bank
from splitpeer.training.sums import fused
from splitproto.messages import Sample, Seat

STEPS = 120
"""Of each inverse network."""
RANGE = 6.0
"""Data range of normalised intensities, for SSIM."""
AROUND = (-6, -3, 0, 3, 6)
"""Slices of a stranger that the networks learn from, counted from the one with most tumour."""
Levels = dict[str, np.ndarray]


@dataclass(frozen=True)
class Rebuilt:
    """Of a few patients held out, one slice each of the shown modality, [N, H, W]."""

    truth: np.ndarray
    from_site: np.ndarray
    from_sum: np.ndarray
    average: np.ndarray
    """Mean of the strangers, which needs nothing that was sent."""

    def ssim(self, guess: np.ndarray) -> float:
        """Mean inside the head, aligned in intensity."""
        pairs = zip(self.truth, guess, strict=True)
        return statistics.fmean(similarities(true, one)["ssim"] for true, one in pairs)

    @property
    def figures(self) -> dict[str, float]:
        """For the summary."""
        return {
            "inverse on the sum, ssim": self.ssim(self.from_sum),
            "inverse on one hospital's values, ssim": self.ssim(self.from_site),
            "average of strangers, ssim": self.ssim(self.average),
        }


class SumAudit:
    """Everything that the attack may use, and the truth.

    Args:
        federation: its run is over.
    """

    def __init__(self, federation: Federation, job: PrivateJob) -> None:
        self._config = JobConfig.load(federation.hub / "job.toml")
        self._job = job_on_wire(self._config)
        self._window = window_of(self._job)
        self._salt = load_salt(federation.salt)
        self._seed = job.seed
        strangers = federation.folder / "strangers"
        write_phantom(strangers, STRANGERS, seed=job.seed + 1000)
        self._patients, self._strangers = self._read(federation.data), self._read(strangers)
        self._masks, self._other_masks = self._labels(federation.data), self._labels(strangers)
        self._halves = {}
        for modality in SITES.values():
            half = client_half(
                self._job, self._config.model.backbone(), Seat(modality, (modality,)), (), key=bytes(32),
                seed=job.seed, device="cpu",
            )  # fmt: skip
            weights = encoder_file.read(federation.folder / job.encoders / f"{modality}.safetensors")
            encoder_file.load(half.network, weights.tensors)
            self._halves[modality] = half
        bank = Bank.open(coordinator_bank(federation))
        if bank is None:
            raise JobFailed(f"{federation.hub}: no feature bank; the log of the coordinator says why")
        self._bank = bank
        self._keys = [bytes.fromhex(key) for key in recorded_keys(federation)]

    def run(self) -> Rebuilt:
        """Train both networks, and look."""
        seen, victims = self._kept()
        samples = self._slices()
        images = self._images(self._strangers, samples)
        sent = self._sent(images)
        if self._job.fusion is None:
            raise JobFailed("the job has no secure fusion")
        sums = fused({m: {m: levels} for m, levels in sent.items()}, self._job.fusion)
        truth = self._images(self._patients, victims)
        place = list(SITES.values()).index(SEAT)
        everything = np.concatenate(list(images.values()), axis=1)
        from_sum = self._invert(sums, everything, seen)[:, place]
        from_site = self._invert(sent[SEAT], images[SEAT], self._sent(truth)[SEAT])[:, 0]
        average = np.broadcast_to(images[SEAT].mean(axis=0), truth[SEAT].shape)[:, 0]
        return Rebuilt(truth[SEAT][:, 0], from_site, from_sum, average)

    # --- what is known ---------------------------------------------------------------------------------

    def _read(self, folder: Path) -> dict[str, SiteData]:
        return {
            m: SiteData(Volumes(find_images(folder / m, "folder", m), salt=self._salt))
            for m in SITES.values()
        }

    def _labels(self, folder: Path) -> Volumes:
        task = self._config.task.task("msd")
        return Volumes(find_labels(folder / "labels", "folder"), salt=self._salt, labels=task)

    def _images(self, data: Mapping[str, SiteData], samples: Sequence[Sample]) -> Levels:
        return {m: one.batch(samples, self._window, None, m) for m, one in data.items()}

    def _sent(self, images: Levels) -> dict[str, Levels]:
        """What leaves each hospital, before its masks are added."""
        release = Release(b"", "release", 0, 0, ())
        return {m: dict(half.evaluate(images[m], release)) for m, half in self._halves.items()}

    def _slices(self) -> list[Sample]:
        """Those of the strangers."""
        found = []
        for key in self._other_masks.keys():  # noqa: SIM118 (not a mapping)
            shape = self._other_masks.geometry(key).shape
            tumour = self._other_masks.window(key, (0, 0, 0), shape)[0]
            middle = int((tumour > 0).sum(axis=(0, 1)).argmax())
            x, y = (
                max(0, (size - wide) // 2) for size, wide in zip(shape[:2], self._window[:2], strict=True)
            )
            found += [Sample(key, (x, y, min(max(0, middle + d), shape[2] - 1))) for d in AROUND]
        return found

    def _kept(self) -> tuple[Levels, list[Sample]]:
        """From the bank: for each patient the sum of the window with most tumour, and which it is."""
        rows: list[Levels] = []
        samples = []
        labels = SiteData(self._masks)
        for key in self._keys:
            entries = [entry for entry in self._bank.contents.releases if entry.key == key]
            best: tuple[float, int, int] = (-1.0, 0, 0)
            for number, entry in enumerate(entries):
                asked = [Sample(key, origin) for origin in entry.origins]
                held = labels.batch(asked, self._window, None, None).reshape(len(asked), -1).sum(axis=1)
                best = max(best, (float(held.max()), number, int(held.argmax())))
            entry, row = entries[best[1]], best[2]
            rows.append({name: array[row] for name, array in self._bank.get(entry).items()})
            samples.append(Sample(key, entry.origins[row]))
        return {name: np.stack([row[name] for row in rows]) for name in rows[0]}, samples

    # --- the network -----------------------------------------------------------------------------------

    def _invert(self, known: Levels, images: np.ndarray, seen: Levels) -> np.ndarray:
        """[N, modalities, H, W] of what is seen, by a network that learned from what is known."""
        scales = {name: float(1 / max(array.std(), 1e-6)) for name, array in known.items()}
        channels = {name: array.shape[1] for name, array in known.items()}
        cut = self._config.model.backbone().cut
        network = image_decoder(cut, channels, self._seed, 16, images.shape[1])
        _learn(network, _tensors(known, scales), torch.from_numpy(images), self._seed)
        with torch.no_grad():
            rebuilt: np.ndarray = network(_tensors(seen, scales)).numpy()
        return rebuilt


def _tensors(levels: Levels, scales: Mapping[str, float]) -> dict[str, Tensor]:
    return {
        name: torch.from_numpy(np.array(array, np.float32)) * scales[name] for name, array in levels.items()
    }


def _learn(network: ImageDecoder, known: Mapping[str, Tensor], goal: Tensor, seed: int) -> None:
    similarity = SSIMLoss(2, data_range=RANGE, win_size=7)
    optimiser = torch.optim.Adam(network.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 3e-3, total_steps=STEPS + 1)
    source = np.random.default_rng(seed)
    for _ in range(STEPS):
        chosen = torch.from_numpy(source.choice(len(goal), 8, replace=False))
        guess = network({name: array[chosen] for name, array in known.items()})
        true = goal[chosen]
        head = (true != 0).float()
        weight = head / head.mean().clamp_min(1e-3) + 0.1
        loss = (weight * (guess - true).abs()).mean() + similarity(guess, true)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()


# --- for people ------------------------------------------------------------------------------------------


def write_page(path: Path, found: Rebuilt) -> None:
    """`report.html`: in words and pictures, what the coordinator could and could not see."""
    figure = {name: f"{value:.2f}" for name, value in found.figures.items()}
    picture = base64.b64encode(_picture(found)).decode()
    words = f"""<!doctype html><html lang="en"><meta charset="utf-8"><title>What the coordinator could see</title>
<style>
body {{ font: 16px/1.5 sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em }}
img {{ max-width: 100% }}
</style>
<h1>What the coordinator could see</h1>
<p><b>It received</b>, once for each window, integers from each hospital that look random by themselves, because masks
that only the hospitals know are added. It could read their sum over all four hospitals, and kept that. It also holds
the labels, and knows which windows belong to which pseudonym.</p>
<p><b>It did not receive</b> images, any single hospital's values, or encoders. No gradient was sent to any hospital, so
none could read the tumour from one. The decoder was trained after the hospitals' part was over.</p>
<p><b>The sum itself is not protected.</b> Below is what a network rebuilds from it that was trained on {STRANGERS}
other patients with the encoders of all hospitals, which a real coordinator does not have. Beside it: the same attack on
one hospital's values, which only all other hospitals together with the coordinator could compute. Structural
similarity to the true image (1: the same): sum {figure["inverse on the sum, ssim"]},
one hospital's values {figure["inverse on one hospital's values, ssim"]},
average of other patients {figure["average of strangers, ssim"]}.</p>
<img alt="True image, and images rebuilt" src="data:image/png;base64,{picture}">
<p>These are synthetic patients and a short attack: the figures show the mechanism, and are no bound on what a better
attack finds in the sum. Tumour-like structure can remain visible in it.</p></html>
"""
    durable.replace(path, words.encode(), mode=0o666, sync=False)


def _picture(found: Rebuilt) -> bytes:
    columns = {
        "true image": found.truth,
        "from one hospital's values": found.from_site,
        "from the sum": found.from_sum,
        "average of others": found.average,
    }
    figure = Figure(figsize=(10, 2.5 * len(found.truth)), layout="constrained")
    grid = figure.subplots(len(found.truth), len(columns), squeeze=False)
    for column, (title, images) in enumerate(columns.items()):
        grid[0, column].set_title(title)
        for row, image in enumerate(images):
            grid[row, column].imshow(np.rot90(image), cmap="gray")
            grid[row, column].axis("off")
    made = io.BytesIO()
    figure.savefig(made, format="png", dpi=90)
    return made.getvalue()
