"""`splitpeer data`: make a phantom, or look at a folder the way the loader will."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from splitpeer.cli.options import FILE, LAYOUT, config_option, echo_json, json_option, load_peer, set_option
from splitpeer.cli.prepare import prepare
from splitpeer.cli.progress import bar
from splitpeer.cli.terminal import echo
from splitpeer.data.modalities import MODALITIES
from splitpeer.errors import ConfigError
from splitpeer.preflight import preflight
from splitpeer.settings.peer import PeerConfig
from splitproto.errors import printable


@click.group()
def data() -> None:
    """Look at a site's images before training, or make some: from DICOM, or phantoms."""


data.add_command(prepare)


@data.command()
@click.argument("folder", type=FILE)
@click.option("--patients", type=click.IntRange(1), default=40, show_default=True)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@click.option(
    "--shape",
    type=int,
    nargs=3,
    metavar="X Y Z",
    help="Voxels; default: small thick slices that render fast. Not with --dicom.",
)
@click.option("--spacing", type=float, nargs=3, metavar="X Y Z", help="Millimetres. Not with --dicom.")
@click.option("--workers", type=click.IntRange(1), help="Processes; default: one per core. Not with --dicom.")
@click.option(
    "--dicom",
    is_flag=True,
    help="As four hospitals' scanners would send them: other poses, grids and oddities (extra: dicom).",
)
@click.option(
    "--modality",
    "modalities",
    type=click.Choice(MODALITIES),
    multiple=True,
    help="With --dicom: of this hospital alone; may be given several times. Masks lie on the slices of t1ce, or of the "
    "first.",
)
@json_option
def phantom(
    folder: Path,
    patients: int,
    seed: int,
    shape: tuple[int, int, int] | None,
    spacing: tuple[float, float, float] | None,
    workers: int | None,
    dicom: bool,
    modalities: tuple[str, ...],
    as_json: bool,
) -> None:
    """Write a brain phantom with gliomas to FOLDER: MSD layout, and one folder per site."""
    if dicom:
        if shape or spacing or workers:
            raise ConfigError(
                "--dicom: every scanner has its own grid: leave --shape, --spacing and --workers out"
            )
        _dicom_phantom(folder, patients, seed, modalities or MODALITIES, as_json)
        return
    if modalities:
        raise ConfigError("--modality: only with --dicom: leave it out")
    from splitpeer.data.phantom.cohort import write_phantom

    options: dict[str, Any] = {}
    if shape:
        options["shape"] = shape
    if spacing:
        options["spacing_mm"] = spacing
    with bar("phantom") as progress:
        task = progress.add_task("", total=patients)
        summary = write_phantom(
            folder,
            patients,
            seed=seed,
            workers=workers,
            progress=lambda done, total: progress.update(task, completed=done, total=total),
            **options,
        )
    if as_json:
        echo_json(summary)
    else:
        echo(f"{patients} patients in {folder}: msd/, flair/, t1/, t1ce/, t2/, labels/")


def _dicom_phantom(folder: Path, patients: int, seed: int, modalities: Sequence[str], as_json: bool) -> None:
    from splitpeer.data.phantom.scanners import SCANNERS, write_dicom_phantom

    labels = "t1ce" if "t1ce" in modalities else modalities[0]
    with bar("phantom") as progress:
        task = progress.add_task("", total=patients)
        summary = write_dicom_phantom(
            folder,
            patients,
            seed=seed,
            scanners={name: SCANNERS[name] for name in modalities},
            labels=labels,
            progress=lambda done, total: progress.update(task, completed=done, total=total),
        )
    if as_json:
        echo_json(summary)
    else:
        made = ", ".join(f"{name}/" for name in sorted(modalities))
        echo(f"{patients} patients in {folder}: {made} (DICOM), labels/ (on the grid of {labels})")


@data.command()
@click.argument("folder", type=FILE, required=False)
@click.option("--layout", type=LAYOUT, help="Default: guessed from the files.")
@click.option(
    "--modality", "modalities", multiple=True, help="Check this modality only; may be given several times."
)
@click.option(
    "--convention", type=click.Choice(("msd", "brats", "brats2023", "nnunet", "task")), help="Of the masks."
)
@click.option(
    "--job",
    "job_file",
    type=FILE,
    help="job.toml, whose [task] says what the masks mean and how images are normalised.",
)
@config_option
@set_option
@json_option
def check(
    folder: Path | None,
    layout: str | None,
    modalities: tuple[str, ...],
    convention: str | None,
    job_file: Path | None,
    config_file: Path | None,
    settings: tuple[str, ...],
    as_json: bool,
) -> None:
    """Read every image in FOLDER as the loader does, and name every problem by file.

    With FOLDER, no peer.toml is needed. Without: the folder, layout, modalities and convention of a whole peer.toml,
    after the checks of config check.
    With --job, masks and images are read as this job will read them.
    """
    from splitpeer.data.check import by_default
    from splitpeer.data.check import check as look
    from splitpeer.settings.job import JobConfig
    from splitpeer.settings.task import CONVENTION_OF_TASK

    if folder is None:
        config = _whole(config_file, settings)
        folder = config.data.images or config.data.labels
        if folder is None:
            raise ConfigError(f"{config.source}: [data] names no images or labels: add them")
        layout, modalities = layout or config.data.layout, modalities or config.peer.modalities
        convention = convention or config.data.convention
        found = preflight(config)
        if not as_json:
            for finding in found:
                echo(finding.line())
        if any(finding.level == "problem" for finding in found):
            raise ConfigError("; ".join(finding.text for finding in found if finding.level == "problem"))
    elif config_file is not None or settings:
        raise ConfigError("--config and --set are for a check without FOLDER: leave one or the other out")
    task = JobConfig.load(job_file).task if job_file else None
    if task is None and convention == CONVENTION_OF_TASK:
        raise ConfigError(
            'convention "task" says that the masks hold the values of a job: add --job job.toml'
        )
    with bar("reading") as progress:
        reading = progress.add_task("", total=None)
        report = look(
            folder,
            layout,
            modalities,
            task.task(convention) if task and convention else convention,
            lambda done, total, _: progress.update(reading, completed=done, total=total),
            rule=task.rule if task else by_default,
        )
    if as_json:
        click.echo(report.as_json())
    else:
        for line in report.lines():
            echo(line)
    raise click.exceptions.Exit(0 if report.ok else 4)


def _whole(config_file: Path | None, settings: tuple[str, ...]) -> PeerConfig:
    """`peer.toml` for a check without FOLDER. Raises ConfigError, which says that there is another way."""
    try:
        return load_peer(config_file, settings)
    except ConfigError as error:
        raise ConfigError(f"{error}; a check of one folder needs no peer.toml: data check FOLDER") from None


@data.command()
@click.argument("patients", nargs=-1, metavar="[ID|KEY|HANDLE]...")
@config_option
@set_option
@json_option
def keys(
    patients: tuple[str, ...], config_file: Path | None, settings: tuple[str, ...], as_json: bool
) -> None:
    """Look up patients: from ids to keys, and from keys or handles in a log back to ids and files.

    Without arguments, all patients of this site (at a coordinator: of its masks). The output names patients: keep it
    at the site, and write it to a file only under umask 077.
    """
    from splitpeer.data.directory import directory, look_up
    from splitpeer.data.layouts import find, find_all
    from splitpeer.data.pseudonym import load_salt

    config = load_peer(config_file, settings)
    place = config.data.images or config.data.labels
    if place is None or config.data.salt is None:
        raise ConfigError(f"{config.source}: [data] names no images, labels or salt: add them")
    if config.data.images:
        kinds = list(find_all(place, config.data.layout, config.peer.modalities).values())
    else:
        kinds = [find(place, config.data.layout, None)]
    entries = directory(load_salt(config.data.salt), *(kind.cases for kind in kinds))
    if patients:
        entries = list(dict.fromkeys(entry for asked in patients for entry in look_up(entries, asked)))
    if as_json:
        echo_json([asdict(entry) for entry in entries])
        return
    width = max(len(printable(entry.patient)) for entry in entries)
    echo(f"{'key':<32}  {'handle':<8}  {'patient':<{width}}  file")
    for entry in entries:
        echo(f"{entry.key}  {entry.handle}  {printable(entry.patient):<{width}}  {printable(entry.file)}")
