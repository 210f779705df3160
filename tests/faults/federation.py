"""The federation of all schedules: certificates, small images, and the settings of its peers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from splitproto import pki

MODALITIES = ("flair", "t1", "t2")
PATIENTS = ("MUELLER_Erika", "SCHMIDT_Hans", "YILMAZ_Ayse", "NGUYEN_Linh")
SHAPE = (20, 18, 5)
PORT = 7443
SEED = 7
HUB = "hub"
Sections = dict[str, dict[str, Any]]


def make_federation(folder: Path) -> None:
    """Certificates and images, once for all schedules."""
    now = datetime.now(UTC)
    pki.create_ca(folder / "pki", "test", now=now)
    # Patients' keys decide who trains and who is held out: a replay must have the same.
    (folder / "pki" / "federation.salt").write_text("5a" * 32)
    pki.issue(folder / "pki", "coordinator", HUB, hosts=["127.0.0.1"], now=now)
    for modality in MODALITIES:
        pki.issue(folder / "pki", "client", site_of(modality), now=now)
    for number, patient in enumerate(PATIENTS):
        source = np.random.default_rng(number)
        mask = np.zeros(SHAPE, np.uint8)
        x, y = source.integers(3, 9, 2)
        mask[x : x + 8, y : y + 7, 1:4] = 1
        mask[x + 2 : x + 6, y + 1 : y + 5, 1:4] = 2
        mask[x + 3 : x + 5, y + 2 : y + 4, 2] = 3
        _write(folder / "data" / "labels" / f"{patient}.nii.gz", mask)
        for index, modality in enumerate(MODALITIES):
            values = 100 + 20 * np.roll([0, 1, 2, 3], index)[mask] + source.normal(0, 8, SHAPE)
            _write(folder / "data" / modality / f"{patient}.nii.gz", values.astype(np.float32))
    for name, (modality, numbers) in FOLDERS.items():
        (folder / "data" / name).mkdir()
        for number in numbers:
            file = f"{PATIENTS[number]}.nii.gz"
            (folder / "data" / name / file).symlink_to(folder / "data" / modality / file)


FOLDERS = {"t1-west": ("t1", (0, 1)), "t1-east": ("t1", (1, 2, 3)), "flair-gaps": ("flair", (0, 2, 3))}
"""Folders with some patients of a modality, by number."""


def _write(path: Path, voxels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(voxels, np.eye(4)), path)


def site_of(modality: str) -> str:
    """The site that holds it."""
    return f"site-{modality}"


@dataclass(frozen=True)
class Setting:
    """What is trained, and how patient everybody is."""

    name: str
    modalities: tuple[str, ...] = ("flair", "t1")
    job: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Sections of job.toml that differ."""
    peer: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Sections of the clients' peer.toml that differ."""
    pace: float = 1.0
    """How many times longer everything takes that is computed, read or written."""
    some: Mapping[str, str] = field(default_factory=dict)
    """By site, the one of `FOLDERS` that it has instead of all patients of its modality."""

    @property
    def sites(self) -> tuple[str, ...]:
        return tuple(site_of(modality) for modality in self.modalities)

    def held_by(self, site: str) -> tuple[str, str]:
        """A site's modality, and its folder of images."""
        own = site.removeprefix("site-")
        folder = self.some.get(site, own)
        return FOLDERS[folder][0] if folder in FOLDERS else own, folder

    def sections(self, federation: Path, who: str) -> Sections:
        """A peer's `peer.toml`."""
        keys = federation / "pki"
        made: Sections = {
            "peer": {"site": who, "federation": "test"},
            "tls": {"ca": f"{keys}/ca.crt", "certificate": f"{keys}/{who}.crt", "key": f"{keys}/{who}.key"},
            "data": {"salt": f"{keys}/federation.salt"},
        }
        if who == HUB:
            made["peer"] |= {"role": "coordinator"}
            made["network"] = {"listen": f"tcp://127.0.0.1:{PORT}"}
            made["data"] |= {"labels": f"{federation}/data/labels", "convention": "msd"}
            made["runtime"] = {"initial_weights": SEED}
            return made
        modality, folder = self.held_by(who)
        made["peer"] |= {"role": "client", "modality": modality}
        made["network"] = {"coordinator": f"tcp://127.0.0.1:{PORT}", "reconnect_s": 600}
        made["data"] |= {"images": f"{federation}/data/{folder}"}
        made["policy"] = {"coordinators": [HUB]}
        made["runtime"] = {"initial_weights": SEED}
        return _merged(made, self.peer)

    @property
    def job_sections(self) -> Sections:
        """`job.toml`."""
        made: Sections = {
            "job": {"name": "try", "seed": SEED},
            "sites": {site: self.held_by(site)[0] for site in self.sites},
            "model": {"features": [2, 2, 2, 2, 2, 2], "levels": [0, 4]},
            "data": {"window": [16, 32], "validation": 1},
            "training": {"steps": 10, "batch": 2, "checkpoint_every": 3, "ahead": 3},
            "evaluation": {"overlap": 0.0, "batch": 4},
            "deadlines": {"join_s": 300, "step_s": 30, "return_s": 300},
        }
        return _merged(made, self.job)

    @property
    def goes_on(self) -> bool:
        """Whether steps are made without a site that is away."""
        return self.job_sections.get("absence", {}).get("mode", "pause") != "pause"

    @property
    def patience(self) -> float:
        """Seconds that the coordinator waits for a site."""
        return float(self.job_sections["deadlines"]["return_s"])

    @property
    def steps(self) -> int:
        return int(self.job_sections["training"]["steps"])


def _merged(base: Sections, over: Mapping[str, Mapping[str, Any]]) -> Sections:
    return {name: {**base.get(name, {}), **over.get(name, {})} for name in {**base, **over}}


def toml_of(sections: Sections) -> str:
    lines = []
    for name, keys in sections.items():
        lines += [f"[{name}]", *(f"{key} = {json.dumps(value)}" for key, value in keys.items())]
    return "\n".join(lines) + "\n"
