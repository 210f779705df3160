"""Small patients on disk, a job for them, and one rehearsal that several tests look at."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from splitpeer.audit.cohort import Cohort, most_tumour
from splitpeer.audit.rehearsal import Protection, Recording, Rehearsal, Rehearsed
from splitpeer.settings.job import JobConfig

MODALITIES = ("flair", "t1")
SHAPE = (32, 32, 10)
SALT = bytes(32)

JOB = """\
[job]
name = "small"
seed = 3
[sites]
site-flair = "flair"
site-t1 = "t1"
[model]
features = [4, 4, 4, 8, 8, 4]
[data]
window = [32, 32]
validation = 3
positive_fraction = 1.0
[training]
steps = 3
batch = 3
[evaluation]
batch = 16
"""


def write_cohort(root: Path, patients: int, seed: int) -> None:
    """Heads with a ball of tumour whose largest slice is known: z = 3 + number % 4."""
    for number in range(patients):
        source = np.random.default_rng([seed, number])
        grid = np.stack(np.meshgrid(*(np.arange(n) for n in SHAPE), indexing="ij"))
        centre = np.array([source.uniform(12, 20), source.uniform(12, 20), 3 + number % 4]).reshape(
            3, 1, 1, 1
        )
        away = np.linalg.norm((grid - centre) * np.array([1, 1, 2.0]).reshape(3, 1, 1, 1), axis=0)
        head = ((grid[0] - 16) / 14) ** 2 + ((grid[1] - 16) / 13) ** 2 < 1
        mask = np.select([away < 2, away < 3.5, away < 6], [2, 3, 1], 0).astype(np.uint8) * head
        waves = np.sin(grid[0] / source.uniform(2, 5)) + np.cos(grid[1] / source.uniform(2, 5))
        for order, modality in enumerate(MODALITIES):
            values = 100 + 15 * waves * (1 + order) + 40 * np.roll([0, 1, 2, 3], order)[mask]
            save(root / modality / f"patient-{number}.nii.gz", (values * head).astype(np.float32))
        save(root / "labels" / f"patient-{number}.nii.gz", mask)


def save(path: Path, voxels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(voxels, np.eye(4)), path)


@dataclass(frozen=True)
class Place:
    """Where the small patients are."""

    folder: Path

    @property
    def data(self) -> Path:
        return self.folder / "data"

    @property
    def shadow(self) -> Path:
        return self.folder / "shadow"

    @property
    def job(self) -> Path:
        return self.folder / "job.toml"

    @property
    def salt(self) -> Path:
        return self.folder / "salt"

    def cohort(self) -> Cohort:
        return Cohort.read(self.data, MODALITIES, salt=SALT, convention="msd")

    def rehearse(self, protection: Protection, folder: Path, views: int = 2) -> Rehearsed:
        cohort = self.cohort()
        rehearsal = Rehearsal(JobConfig.load(self.job), cohort, protection, folder, seed=3)
        targets = most_tumour(cohort, rehearsal.validation, rehearsal.window)
        return rehearsal.play(Recording(targets=tuple(targets), views=views))


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    made = Place(tmp_path_factory.mktemp("audit"))
    write_cohort(made.data, 8, seed=1)
    write_cohort(made.shadow, 6, seed=2)
    made.job.write_text(JOB)
    made.salt.write_text(SALT.hex())
    made.salt.chmod(0o600)
    return made


@pytest.fixture(scope="session")
def clean(place: Place) -> Rehearsed:
    """A rehearsal without defences."""
    return place.rehearse(Protection(), place.folder / "clean")
