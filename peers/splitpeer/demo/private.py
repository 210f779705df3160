"""The demo in private mode: encoders learn from strangers and stay as they are; only their sum is seen."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from splitpeer.demo.federation import HUB, SITES, DemoJob, Federation
from splitpeer.errors import ConfigError
from splitpeer.site.shown import NAME as RELEASED

OTHERS = 2000
"""Added to the seed: patients from whom the encoders learn; neither the run's nor the adversary's."""
CACHE_MIB = 1024


@dataclass(frozen=True)
class PrivateJob(DemoJob):
    """The demo's patients and network; each window leaves once, in a sum over all hospitals."""

    widths: tuple[int, ...] = (1, 1, 2, 4, 8)
    """Channels of the levels that leave."""
    strangers: int = 96
    """Phantom patients, as a public data set, on whose images and masks each encoder is trained beforehand."""
    pretraining_steps: int = 300

    def toml(self) -> dict[str, Any]:
        """`job.toml` as a dict."""
        settings = super().toml()
        settings["model"] |= {"fusion": "secure-sum", "widths": list(self.widths)}
        settings["training"] |= {"encoders": "frozen"}
        return settings

    def policy(self, site: str) -> dict[str, Any]:
        """Private jobs only, and sums with the other three only."""
        others = [other for other in SITES if other != site]
        return super().policy(site) | {"preset": "private", "partners": others, "min_partners": len(others)}

    def weights(self, site: str) -> str:
        """Relative to the site's folder."""
        return f"../{self.encoders}/{SITES[site]}.safetensors"

    @property
    def encoders(self) -> str:
        """Folder of what is trained beforehand; another for other settings."""
        parts = (self.seed, self.strangers, self.pretraining_steps, self.batch, *self.widths)
        return "encoders-" + "-".join(map(str, parts))


def pretrain_all(federation: Federation, job: PrivateJob, workers: int, done: Callable[[str], None]) -> None:
    """Make the encoder of each hospital that has none yet, as `splitpeer pretrain` does, in `workers` processes.

    Args:
        federation: its job.toml is written.
        done: called with each modality.
    """
    from splitpeer.data.phantom.cohort import write_phantom

    strangers = federation.folder / f"public-{job.strangers}"
    write_phantom(strangers, job.strangers, seed=job.seed + OTHERS)
    folder = federation.folder / job.encoders
    folder.mkdir(exist_ok=True)
    wanted = [m for m in SITES.values() if not (folder / f"{m}.safetensors").exists()]
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        running = {
            pool.submit(_pretrain, federation.hub / "job.toml", strangers, modality, folder, job): modality
            for modality in wanted
        }
        for future in as_completed(running):
            future.result()
            done(running[future])


def _pretrain(job_file: Path, strangers: Path, modality: str, folder: Path, job: PrivateJob) -> None:
    import torch

    from splitpeer.data.normalisation import Normaliser
    from splitpeer.data.rules import Rules
    from splitpeer.pretraining.course import Planned, pretrain, stage_of
    from splitpeer.pretraining.encoder_file import EncoderFacts
    from splitpeer.pretraining.examples import ImageSource
    from splitpeer.pretraining.sources import Preparation, public
    from splitpeer.settings.job import JobConfig

    torch.set_num_threads(1)
    config = JobConfig.load(job_file)
    task, backbone = config.task.task("msd"), config.model.backbone()
    grid = Preparation((), lambda modality: Normaliser(), Rules(), CACHE_MIB)

    def source() -> ImageSource:
        opened = public(strangers, "folder", {modality: (modality,)}, grid, strangers / "labels", task)
        return ImageSource(opened.channels, opened.labels, lambda: set())

    stage = stage_of(
        config, "phantom", labels=True, steps=job.pretraining_steps,
        seed=None, channels=task.channels, exclusive=False, device="cpu",
    )  # fmt: skip
    facts = EncoderFacts.of(backbone, (modality,), ("zscore-nonzero",), (), config.data.window)
    pretrain([Planned(stage, source)], backbone, facts, folder / f"{modality}.safetensors", force=False)


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
