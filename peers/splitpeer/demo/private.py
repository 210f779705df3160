"""The demo in private mode: encoders learn from strangers and stay as they are; only their sum is seen."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from splitpeer.demo.federation import HUB, SITES, DemoJob, Federation
from splitpeer.errors import ConfigError, JobFailed
from splitpeer.site.shown import NAME as RELEASED

OTHERS = 2000
"""Added to the seed: patients from whom the encoders learn; neither the run's nor the adversary's."""
MAKER = next(iter(SITES))
"""The hospital that makes all encoders."""
SUM = "sum"
KNOWN, COLLUDE = "others-known", "others-collude"
"""What is attacked: the sum, one hospital's values, and these together with all others' images. Folders have the same
names."""


@dataclass(frozen=True)
class PrivateJob(DemoJob):
    """The demo's network; each window leaves once, in a sum over all hospitals."""

    patients: int = 100
    """So few that the hospitals send less than a twentieth of what they send in the plain demo."""
    steps: int = 400
    widths: tuple[int, ...] = (1, 1, 2, 4, 8)
    """Channels of the levels that leave."""
    strangers: int = 100
    """Phantom patients, as a public data set, on whose images and masks the encoders are trained beforehand."""
    pretraining_steps: int = 350

    def toml(self) -> dict[str, Any]:
        """`job.toml` as a dict."""
        settings = super().toml()
        settings["model"] |= {"fusion": "secure-sum", "widths": list(self.widths)}
        settings["training"] |= {"encoders": "frozen"}
        settings["evaluation"]["overlap"] = 0.0
        settings["pretraining"] = {
            "data": "phantom",
            "patients": self.strangers,
            "cohort": self.seed + OTHERS,
            "encoders": "together",
            "steps": self.pretraining_steps,
        }
        return settings

    def policy(self, site: str) -> dict[str, Any]:
        """Private jobs only, and sums with the other three only."""
        others = [other for other in SITES if other != site]
        return super().policy(site) | {
            "preset": "private",
            "partners": others,
            "min_partners": len(others),
            # Its attacks know of no noise: without any they are at their strongest.
            "min_encoder_noise": 0.0,
            "min_encoder_rate": 0.0,
        }

    def weights(self, site: str) -> str:
        """In the site's folder; another file for other settings."""
        parts = (self.seed, self.strangers, self.pretraining_steps, self.batch, *self.widths)
        return f"encoder-{'-'.join(map(str, parts))}.safetensors"


def pretrain_all(federation: Federation, job: PrivateJob, threads: int) -> None:
    """Make the hospitals' encoders, unless they are there: one trains those of all, and hands each other its own.

    The command is a hospital's own, and the terminal shows what it says; an interrupted one continues.

    Args:
        federation: all its files are written.
        threads: that the training may use.

    Raises:
        JobFailed: the command did.
    """
    folder, made_for = federation.folder, federation.folder / MAKER / "partners"
    own = folder / MAKER / job.weights(MAKER)
    if not own.exists():
        files = ("--config", str(folder / MAKER / "peer.toml"), "--job", str(federation.hub / "job.toml"))
        command = (
            sys.executable, "-m", "splitpeer.cli", "pretrain", *files, "--recipe", "--for-partners", str(made_for),
            "--out", str(own), "--set", f"runtime.threads={threads}",
        )  # fmt: skip
        # Threads that spin while they wait would take the time of others on a busy machine.
        if code := subprocess.run(
            command, env=os.environ | {"OMP_WAIT_POLICY": "PASSIVE"}, check=False
        ).returncode:
            raise JobFailed(f"splitpeer pretrain ended with exit code {code}: its last line says why")
    for site, modality in SITES.items():
        if (made := made_for / f"{modality}.safetensors").exists():
            made.rename(folder / site / job.weights(site))


def refuse_second_run(federation: Federation) -> None:
    """Hospitals show a patient once (policy releases): a folder is good for one run. Raises ConfigError."""
    if any((federation.folder / site / "state" / RELEASED).exists() for site in SITES):
        raise ConfigError(
            f"{federation.folder}: its hospitals have shown their patients already, and do so once: "
            "remove the folder, or name another with --out"
        )


def coordinator_bank(federation: Federation) -> Path:
    """The feature bank of the newest run."""
    return max((federation.folder / HUB / "state").glob("*/bank"), key=lambda path: path.stat().st_mtime)
