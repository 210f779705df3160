"""`splitpeer data prepare`: a folder of DICOM becomes images on the common atlas, at the site alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from splitpeer.cli.options import FILE, echo_json, json_option, private_files, set_option
from splitpeer.cli.progress import bar
from splitpeer.cli.terminal import echo
from splitpeer.errors import ConfigError, DataError
from splitpeer.settings.loading import parse_override
from splitpeer.settings.peer import find_peer_toml

if TYPE_CHECKING:
    from splitpeer.prepare.cohort import PreparationSummary
    from splitpeer.prepare.one import Steps
    from splitpeer.settings.prepare import PrepareHead, PrepareSection


@click.command()
@click.option(
    "--from",
    "source",
    type=FILE,
    required=True,
    metavar="FOLDER",
    help="DICOM files, at any depth.",
)
@click.option(
    "--modality",
    required=True,
    help="The image to take: t1, t1ce, t2, flair, pd, ct, pet, or any name with a rule in [prepare.series.NAME].",
)
@click.option("--out", type=FILE, required=True, help="Folder of images, for [data] images.")
@click.option("--atlas", help="mni152 (default), or a NIfTI file.")
@click.option(
    "--spacing",
    type=float,
    nargs=3,
    metavar="X Y Z",
    help="Millimetres of the voxels, three numbers, the same in all hospitals; default: the atlas's.",
)
@click.option("--registration", type=click.Choice(("affine", "rigid", "none")), help="Default: affine.")
@click.option(
    "--ids",
    type=FILE,
    help="List with the columns hospital,study, where ids differ; whom it does not name loses the image.",
)
@click.option(
    "--masks", type=FILE, help="Folder of masks (ID.nii.gz) drawn on these series: they go to OUT/labels."
)
@click.option(
    "--accept",
    multiple=True,
    metavar="ID",
    help="Take this patient's image although it was held back; may be given several times.",
)
@click.option(
    "--workers", type=click.IntRange(1, 64), default=1, show_default=True,
    help="Patients at once; about 1 GB of memory and a core each.",
)  # fmt: skip
@click.option(
    "--config",
    "config_file",
    type=FILE,
    help="peer.toml, of which only [prepare] is read; default: $SPLITPEER_CONFIG, ./peer.toml, "
    "~/.config/splitpeer/peer.toml. Where there is none: no rules, no programs.",
)
@set_option
@json_option
def prepare(
    source: Path,
    modality: str,
    out: Path,
    atlas: str | None,
    spacing: tuple[float, float, float] | None,
    registration: str | None,
    ids: Path | None,
    masks: Path | None,
    accept: tuple[str, ...],
    workers: int,
    config_file: Path | None,
    settings: tuple[str, ...],
    as_json: bool,
) -> None:
    """Find each patient's series below --from, register it to the atlas, and write it to --out.

    It opens no connection; programs that [prepare] names may. What is suspicious is held back and named;
    OUT/prepare.html shows every patient. Run again, it does what is new or has changed. Exit codes: 0, every patient
    has an image; 1, a worker was killed; 3, the disk is full; 4, some patients have none, something needs attention, or
    a setting is wrong; 5, a bug; 130, interrupted: what was finished stays.
    """
    private_files()
    from splitpeer.data.modalities import canonical_modality
    from splitpeer.prepare.atlas import load_atlas
    from splitpeer.prepare.cohort import PreparationPlan
    from splitpeer.prepare.cohort import prepare as prepare_all

    head = _head(config_file, settings, _flags(atlas, spacing, registration, ids))
    kind, said = canonical_modality(modality), head.prepare
    plan = PreparationPlan(
        source,
        out,
        kind,
        said.rule(kind),
        _steps(said),
        said.patient_id,
        said.ids,
        masks,
        said.max_voxels,
        accept,
        workers,
    )
    found = load_atlas(head.atlas)
    _warn_of_skulls(found.name, said)
    with bar("{task.description}") as progress:
        task = progress.add_task("reading", total=None)
        summary = prepare_all(
            plan,
            found,
            lambda what, done, total: progress.update(task, description=what, completed=done, total=total),
        )
    _tell(summary, as_json)
    if unknown := sorted(set(accept) - {one.patient for one in summary.outcomes}):
        raise DataError(
            f"--accept {unknown[0]}: no such patient in {source}: write the id as the page shows it"
        )
    raise click.exceptions.Exit(0 if summary.complete else 4)


def _flags(
    atlas: str | None,
    spacing: tuple[float, float, float] | None,
    registration: str | None,
    ids: Path | None,
) -> dict[str, Any]:
    """As keys of the settings; None: not given."""
    from splitpeer.prepare.templates import MNI152

    return {
        "prepare.atlas": atlas if atlas in (None, MNI152) else str(Path(atlas).absolute()),
        "prepare.spacing": None if spacing is None else list(spacing),
        "prepare.registration": registration,
        "prepare.ids": None if ids is None else str(ids.absolute()),
    }


def _warn_of_skulls(atlas: str, said: PrepareSection) -> None:
    from splitpeer.prepare.templates import MNI152

    if atlas == MNI152 and said.registration != "none" and said.skull_strip is None:
        echo(
            "warning: [prepare] skull_strip is not set: mni152 is a brain without skull, and scans with one end about "
            "1 cm off: name a program that strips it",
            err=True,
        )


def _tell(summary: PreparationSummary, as_json: bool) -> None:
    if as_json:
        echo_json(summary.to_json())
        return
    for line in summary.lines():
        echo(line)


def _head(config_file: Path | None, settings: tuple[str, ...], flags: Mapping[str, Any]) -> PrepareHead:
    """[prepare] of the file that is named, or else of the usual one, or what is built in."""
    from splitpeer.settings.prepare import PrepareHead

    given = dict(parse_override(setting) for setting in settings)
    flags = {key: value for key, value in flags.items() if value is not None}
    if twice := sorted(given.keys() & flags.keys()):
        raise ConfigError(f"--set {twice[0]} and the flag for it are both given: leave one out")
    try:
        path = find_peer_toml(config_file)
    except ConfigError:
        path = None
    return PrepareHead.load(path, given | flags)


def _steps(said: PrepareSection) -> Steps:
    from splitpeer.prepare.one import Steps

    if said.registration != "none" or said.bias_field == "n4":
        # Now, not at the first patient: it may be missing.
        import splitpeer.prepare.register  # noqa: F401
    return Steps(
        said.registration, said.spacing, said.bias_field, said.skull_strip, said.deadline_s, said.bounds()
    )
