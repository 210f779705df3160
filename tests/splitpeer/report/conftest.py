"""Run folders as `splitpeer attack` writes them: small, with every kind of entry, and with a malicious site."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from splitpeer.leakage.floors import MEAN_IMAGE, Floors, Others
from splitpeer.leakage.measure import score_images, score_masks
from splitpeer.leakage.scores import Score
from splitpeer.report.model import AuditRun, Entry, Privacy, Promise, RunLevel, RunNetwork, Source
from splitpeer.report.store import save_run

HOSTILE = "<script>alert(1)</script>"
SIZE, COUNT = 32, 10
X, Y = np.mgrid[:SIZE, :SIZE] - SIZE / 2 + 0.5
PATIENTS = range(COUNT)
GRANTED = ("the weights of the site's encoder", "which defences run, with their parameters")


def brains(seed: int, count: int) -> np.ndarray:
    """[count, 1, 32, 32]: normalised discs of smooth structure."""
    random = np.random.default_rng(seed)
    images = []
    for _ in range(count):
        image = gaussian_filter(random.standard_normal((SIZE, SIZE)), 1.5)
        disc = random.uniform(11, 14) ** 2 > X**2 + Y**2
        images.append(np.where(disc, (image - image[disc].mean()) / image[disc].std(), 0)[None])
    return np.asarray(images, dtype=np.float32)


def make(folder: Path, **changes: Any) -> Path:
    """A run folder with attacks on images and on labels; `changes` are fields of `Run`."""
    random = np.random.default_rng(0)
    truth = brains(0, COUNT)
    masks = np.stack([(X - 3 + i) ** 2 + (Y - 2) ** 2 < 16 for i in range(COUNT)])[:, None]
    floors = Floors.make(truth, PATIENTS, Others(brains(1, 20), range(100, 120)))
    arrays: dict[str, np.ndarray] = {
        "truth_T1": truth.astype(np.float16),
        "floor_T1": floors.images[MEAN_IMAGE].astype(np.float16),
        "masks": masks.astype(np.uint8),
    }
    entries = []

    def image(name: str, noise: float, **fields: Any) -> None:
        found = -2 * truth + 5 + noise * random.standard_normal(truth.shape)
        scores = score_images(truth, found, PATIENTS, floors=floors)
        shown = 0.6 if noise < 1 else 0.1
        scores["tumour_dice"] = Score(shown, 0.0, 1.0, 0.9, COUNT, COUNT, {MEAN_IMAGE: 0.1}, 0.7)
        arrays[name] = found.astype(np.float16)
        fields = {"attack": name, "title": name.title(), "assumptions": GRANTED, "levels": ("x0",)} | fields
        entries.append(
            Entry(id=name, goal="image", modality="T1", scores=scores, settings={"seed": 0}, **fields)
        )

    image("whitebox", 0.0, plain="Searches for the image that fits what was sent.")
    image("dropout-adaptive", 0.5, attack="whitebox", defences=("dropout:0.5",))
    image("dropout-naive", 6.0, attack="whitebox", defences=("dropout:0.5",), adaptive=False)
    image("lonely", 9.0, title="Lonely", defences=("gaussian:20",), adaptive=False)
    arrays["tumour_whitebox"] = masks[:, 0]
    scores = masks[:, 0] + 0.3 * random.random((COUNT, SIZE, SIZE))
    arrays["norms"] = scores.astype(np.float16)
    entries.append(
        Entry(
            id="norms", attack="gradient-norm", title="Gradient norms", goal="mask", modality="T1",
            scores=score_masks(masks, scores, PATIENTS), views=3,
        )
    )  # fmt: skip
    entries.append(
        Entry(
            id="sdar", attack="sdar", title="SDAR", goal="image", modality="T1", status="impossible",
            reason="needs masks of other patients",
        )
    )  # fmt: skip
    fields: dict[str, Any] = {
        "capture": Source(
            role="coordinator", site=HOSTILE, federation="demo", digest="ab" * 32, created=1.7e9
        ),
        "network": RunNetwork(
            window=(32, 32),
            sites={"charite": "T1", HOSTILE: "T2"},
            levels=(
                RunLevel(name="x0", shape=(8, 32, 32), octets=32768, precision="f32", gradient_octets=32768),
                RunLevel(
                    name="x1", shape=(8, 16, 16), octets=8192, precision="f32", defences=("dropout:0.5",)
                ),
                # Older folders count gradients of what is withheld.
                RunLevel(
                    name="x2",
                    shape=(16, 8, 8),
                    octets=4096,
                    precision="f32",
                    sent=False,
                    gradient_octets=987654,
                ),
            ),
            image_octets=4096,
        ),
        "entries": tuple(entries),
        "dice": {"none": {"WT": 0.8, "TC": 0.7, "ET": 0.75}, "dropout:0.5": {"mean": 0.74}},
        "hd95": {"none": {"WT": 3.44, "TC": 5.0, "ET": None, "mean": 4.22}},
        "volume_ml": {"none": {"WT": {"predicted": 41.26, "true": 38.0}}},
        "promises": {
            name: Promise(title=name.title(), promise="No guarantee.") for name in ("dropout", "gaussian")
        },
        "not_tested": ("UnSplit was not run.",),
        "commands": ("splitpeer attack coord.cap --attack whitebox",),
        "privacy": Privacy(guarantee=True, epsilon=2.0, delta=1e-5, releases=50, mechanism="Gaussian"),
    }
    save_run(folder, AuditRun(**fields | changes), arrays)
    return folder


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read only."""
    return make(tmp_path_factory.mktemp("runs") / "attack")


@pytest.fixture
def make_run() -> Callable[..., Path]:
    return make
