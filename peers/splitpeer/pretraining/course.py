"""Stages one after the other, and the encoder's file at the end."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

from torch import Tensor

from splitpeer.errors import ConfigError
from splitpeer.models.cut import Backbone
from splitpeer.pretraining import encoder_file
from splitpeer.pretraining.encoder_file import EncoderFacts, EncoderFile
from splitpeer.pretraining.examples import ImageSource, examples
from splitpeer.pretraining.information import InformationBottleneck
from splitpeer.pretraining.stage import Progress, Stage, Together, train
from splitpeer.settings.job import JobConfig
from splitpeer.storage import durable, reading

STEPS = ".steps"
"""Ending of the folder with the checkpoints of a pretraining that is not over."""
PARTNERS = "partners.json"
"""In that folder: the files that are to be made for partners."""


@dataclass(frozen=True)
class Planned:
    """A stage, and where its images come from."""

    stage: Stage
    source: Callable[[], ImageSource]
    """Called when the stage begins."""


@dataclass(frozen=True)
class Told:
    """How far the work is: for a person."""

    begins: Callable[[int, Stage], None]
    """A stage, by its number from 0."""
    reads: Callable[[int, int], None]
    """Patients read, of how many."""
    steps: Progress


SILENT = Told(lambda number, stage: None, lambda done, total: None, lambda done, total, loss: None)


def stage_of(
    job: JobConfig,
    data: str,
    *,
    labels: bool,
    steps: int,
    seed: int | None,
    channels: int,
    exclusive: bool,
    device: str,
    together: Together | None = None,
    bottleneck: InformationBottleneck | None = None,
) -> Stage:
    """A stage with the optimiser, the batch and the windows of a job.

    Args:
        channels: of the decoder.
    """
    training = job.training
    return Stage(
        data=data,
        channels=channels,
        labels=labels,
        exclusive=exclusive,
        steps=steps,
        batch=training.batch,
        optimiser=training.optimiser,
        learning_rate=training.learning_rate,
        weight_decay=training.weight_decay,
        schedule=training.schedule,
        augment=job.data.augment,
        positive_fraction=job.data.positive_fraction,
        seed=seed,
        every=training.checkpoint_every,
        device=device,
        together=together,
        bottleneck=bottleneck,
    )


def work_folder(out: Path) -> Path:
    """Where checkpoints are until `out` is written."""
    return out.with_name(out.name + STEPS)


def pretrain(
    planned: Sequence[Planned],
    backbone: Backbone,
    described: EncoderFacts,
    out: Path,
    *,
    force: bool,
    partners: Mapping[Path, tuple[str, EncoderFacts]] = MappingProxyType({}),
    told: Told = SILENT,
) -> EncoderFile:
    """Make all stages, each from the weights of the one before, and write the file; continues one that was interrupted.

    Args:
        planned: at least one.
        described: the encoder.
        out: the file.
        force: begin again, and replace the files, where they are there.
        partners: further files to write: the seats and encoders that the first stage trains together with this one.

    Raises:
        ConfigError: `out` is there, its folder is not, or an interrupted one had other settings or partners.
        DataError, JobFailed: see `stage.train`.
    """
    folder = work_folder(out)
    if not out.parent.is_dir():
        raise ConfigError(f"{out.parent}: no such folder: make it, or name another --out")
    # The files for partners are there already where the work ended just before its own.
    for path in (out, *(() if folder.exists() else partners)):
        if path.exists() and not force:
            raise ConfigError(f"{path}: exists and is not overwritten: move it away, or add --force")
    if force and folder.exists():
        shutil.rmtree(folder)
    _keep_to_partners(folder, sorted(str(path.resolve()) for path in partners))
    tensors: dict[str, Tensor] | None = None
    for number, one in enumerate(planned):
        told.begins(number, one.stage)
        trained = train(
            one.stage,
            backbone,
            described,
            lambda draw, source=one.source: examples(source(), draw, told.reads),  # type: ignore[misc]
            folder / str(number + 1),
            start=tensors,
            progress=told.steps,
        )
        tensors = trained.tensors
        described = replace(described, stages=(*described.stages, trained.past))
        for path, (seat, facts) in partners.items() if number == 0 else ():
            durable.make_folder(path.parent)
            encoder_file.write(path, trained.others[seat], replace(facts, stages=(trained.past,)))
    encoder_file.write(out, tensors or {}, described)
    shutil.rmtree(folder, ignore_errors=True)
    return encoder_file.read(out)


def _keep_to_partners(folder: Path, asked: list[str]) -> None:
    """Raises ConfigError: the one that was interrupted makes other files for partners, which would be lost."""
    path = folder / PARTNERS
    try:
        begun = reading.document(path)["files"]
    except FileNotFoundError:
        begun = None
    except (OSError, ValueError, LookupError):
        raise ConfigError(f"{path}: cannot be read: add --force to begin again") from None
    if begun is None:
        try:
            durable.make_folder(folder)
            durable.replace(path, json.dumps({"files": asked}).encode())
        except OSError as error:
            raise durable.refusal(error, f"{path}:", "--out") from None
    elif begun != asked:
        where = f"with --for-partners {Path(begun[0]).parent}" if begun else "without --for-partners"
        raise ConfigError(
            f"{folder}: what was interrupted began {where}: say the same, or --force to begin again"
        )
