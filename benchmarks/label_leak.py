"""Labels at a site: what the coordinator reads off the gradients of its logits, and what defences cost.

One network on the phantom in one process, as with labels at a site: logits, the site's gradient, its defence, backward.
The attack (`logit-gradient`) gets the logits and gradients of some training windows, of their first release and of all.
Figures are means over windows with tumour; Dice at the best threshold of each window. The network's Dice is of the
slices of patients held out.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from splitpeer.attacks.base import Knowledge, Shot, Target, View
from splitpeer.attacks.label.logits import LOGITS, LogitGradient
from splitpeer.attacks.runner import run
from splitpeer.data.layouts import find_images, find_labels
from splitpeer.data.loader import SiteData
from splitpeer.data.phantom.cohort import write_phantom
from splitpeer.data.sampling import TrainingSchedule, split_patients
from splitpeer.data.task import glioma
from splitpeer.data.volumes import Volumes
from splitpeer.defences.randomness import Release
from splitpeer.defences.stack import defend, make_stack
from splitpeer.models import SplitNetwork, build_split_network
from splitpeer.models.registry import make_backbone
from splitpeer.training.loss import loss_gradient
from splitpeer.training.optimiser import make_optimiser, make_schedule
from splitproto.records import Sample, Seat

SALT, WINDOW, BATCH, ATTACKED = bytes(32), (48, 48, 1), 8, 16
DEFENCES = ("", "gaussian:1", "gaussian:5", "gaussian:25", "max-norm", "marvell:0.45")


def dice(found: np.ndarray, true: np.ndarray) -> float:
    return float(2 * (found & true).sum() / max(found.sum() + true.sum(), 1))


def auc(score: np.ndarray, true: np.ndarray) -> float:
    """The chance that a voxel of the target scores higher than another; ties count half."""
    values, inverse = np.unique(score, return_inverse=True)
    positive = np.bincount(inverse[true], minlength=len(values))
    negative = np.bincount(inverse[~true], minlength=len(values))
    below = np.concatenate([[0], np.cumsum(negative)[:-1]])
    return float((positive * (below + negative / 2)).sum() / (positive.sum() * negative.sum()))


def best(score: np.ndarray, true: np.ndarray) -> float:
    return max(dice(score > at, true) for at in (0.0, *np.quantile(score, np.linspace(0.3, 0.998, 60))))


def held_out_dice(
    network: SplitNetwork, images: dict[str, SiteData], masks: Volumes, held_out: Sequence[bytes]
) -> float:
    """Whole tumour, mean over patients."""
    network.eval()
    whole: list[float] = []
    for key in held_out:
        shape = masks.geometry(key).shape
        x0, y0 = ((n - w) // 2 for n, w in zip(shape[:2], WINDOW[:2], strict=True))
        samples = [Sample(key, (x0, y0, z)) for z in range(shape[2])]
        x = {m: torch.from_numpy(one.batch(samples, WINDOW, None, m)) for m, one in images.items()}
        with torch.no_grad():
            said = (network(x).sigmoid() > 0.5).numpy()
        true = SiteData(masks).batch(samples, WINDOW, None, None).astype(bool)
        whole += [dice(said[:, 0], true[:, 0])]
    return float(np.mean(whole))


def measure(data: Path, defence: str, steps: int, seed: int) -> dict[str, Any]:
    torch.manual_seed(seed)
    masks = Volumes(find_labels(data / "labels", "folder"), salt=SALT, labels=glioma("msd"))
    seats = ("flair", "t1ce")
    images = {m: SiteData(Volumes(find_images(data / m, "folder", m), salt=SALT)) for m in seats}
    training, held_out = split_patients(masks.keys(), 4, seed)
    backbone = make_backbone("basic-unet", 2, {"features": (8, 8, 16, 32, 32, 8)}, (0, 1, 2, 3, 4), ())
    network = build_split_network(backbone, seats, "concat", 3, exclusive=False, job_seed=seed)
    optimiser = make_optimiser(network.parameters(), "adam", 5e-3, 0.0)
    schedule = make_schedule(optimiser, "one-cycle", steps)
    drawn = TrainingSchedule(
        training, masks, window=WINDOW, batch=BATCH, steps=steps, seed=seed, positive_fraction=0.0
    )
    stack = make_stack(
        defence, key=bytes(32), channels={"x0": 3}, dimensions=2, place="gradients"
    ) if defence else None  # fmt: skip
    seen: dict[Sample, list[Shot]] = {}
    for step in range(steps):
        samples, pose = drawn.batch(step)
        x = {m: torch.from_numpy(one.batch(samples, WINDOW, pose, m)) for m, one in images.items()}
        target = SiteData(masks).batch(samples, WINDOW, pose, None)
        logits = network(x).float()
        _, gradient = loss_gradient(logits.detach().numpy(), target, exclusive=False)
        if stack is not None:
            release = Release(bytes(16), "train", step + 1, 0, tuple(samples), target)
            gradient = defend(stack, {"x0": gradient}, release)["x0"]
        optimiser.zero_grad()
        logits.backward(torch.from_numpy(gradient))
        optimiser.step()
        schedule.step()
        for row, sample in enumerate(samples):
            shown = ({LOGITS: logits.detach().numpy()[row].copy()}, {LOGITS: gradient[row].copy()})
            seen.setdefault(sample, []).append(Shot("train", step + 1, row, pose, *shown))
    truth: dict[Sample, np.ndarray] = {
        sample: masks.window(sample.key, sample.origin, WINDOW)[..., 0].max(axis=0) > 0 for sample in seen
    }
    attacked = sorted(
        (sample for sample in seen if truth[sample].sum() > 30),
        key=lambda one: (-len(seen[one]), one.key, one.origin),
    )[:ATTACKED]
    found: dict[str, Any] = {"defence": defence or "none", "seed": seed, "releases": len(seen[attacked[0]])}
    for name, count in (("first", 1), ("all", None)):
        view = View(
            "coordinator", "labels", Seat("flair", ("flair",)), (Seat("flair", ("flair",)),), backbone, WINDOW[:2],
            tuple(Target(sample, tuple(seen[sample][:count])) for sample in attacked),
            gradient_defences=(defence,) if defence else (),
        )  # fmt: skip
        scores = run(LogitGradient(), view, Knowledge()).images
        pairs = [(score, truth[sample]) for score, sample in zip(scores, attacked, strict=True)]
        found[f"auc_{name}"] = float(np.mean([auc(score, true) for score, true in pairs]))
        found[f"dice_{name}"] = float(np.mean([best(score, true) for score, true in pairs]))
    found["network_dice"] = held_out_dice(network, images, masks, held_out)
    return found


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__)
    asked.add_argument("--steps", type=int, default=300)
    asked.add_argument("--seeds", type=int, nargs="+", default=[1])
    asked.add_argument("--defences", nargs="+", default=list(DEFENCES))
    asked.add_argument("--out", type=Path)
    given = asked.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        write_phantom(Path(folder), 16, seed=5, shape=(64, 64, 32), workers=1)
        for seed in given.seeds:
            for defence in given.defences:
                line = json.dumps(measure(Path(folder), defence, given.steps, seed))
                print(line, flush=True)
                if given.out is not None:
                    with given.out.open("a") as file:
                        file.write(line + "\n")


if __name__ == "__main__":
    main()
