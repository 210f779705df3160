"""Whose images an encoder learns from, besides a site's own: public data in any layout, and the phantom."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from splitpeer.data.channels import Channels
from splitpeer.data.geometry import spacing_of
from splitpeer.data.layouts import find, find_all, subject
from splitpeer.data.modalities import MODALITIES
from splitpeer.data.normalisation import Normaliser
from splitpeer.data.patients import patient_id
from splitpeer.data.pseudonym import keyed
from splitpeer.data.rules import Rules
from splitpeer.data.task import Task
from splitpeer.data.volumes import Volumes
from splitpeer.errors import ConfigError, DataError
from splitpeer.pretraining.examples import ImageSource
from splitpeer.storage import reading

PUBLIC_SALT = hashlib.sha256(b"splitpeer pretraining: public data").digest()
"""Public patients need no secret, and every site is to draw them in one order."""
PHANTOM = "phantom"
MAX_LIST = 16 << 20
"""Bytes of a list of patients to leave out."""


@dataclass(frozen=True)
class Preparation:
    """What is done to every volume before a window is cut from it."""

    spacing: tuple[float, ...]
    """Millimetres; (): as stored."""
    rule: Callable[[str], Normaliser]
    """By modality."""
    rules: Rules
    cache_mib: int


def public(
    images: Path,
    layout: str,
    seats: Mapping[str, Sequence[str]],
    grid: Preparation,
    labels: Path | None,
    task: Task | None,
) -> ImageSource:
    """Other people's images.

    Args:
        images: folder or list.
        layout: of both.
        seats: their modalities, in the order of the channels.
        labels: where the masks are; None: they are not used.
        task: what the masks mean.

    Raises:
        DataError: naming the file or folder.
    """
    found = find_all(images, layout, list(dict.fromkeys(chain(*seats.values()))))
    volumes = {
        modality: Volumes(
            one.cases,
            salt=PUBLIC_SALT,
            spacing=spacing_of(grid.spacing),
            normalisation=grid.rule(modality),
            cache_mib=grid.cache_mib // len(found),
            rules=grid.rules,
        )
        for modality, one in found.items()
    }
    masks = open_masks(labels, layout, PUBLIC_SALT, grid, task) if labels is not None else None
    return ImageSource(Channels(volumes, seats), masks)


def open_masks(folder: Path, layout: str, salt: bytes, grid: Preparation, task: Task | None) -> Volumes:
    """Masks of a task, on the images' grid. Raises ConfigError: the task is missing; DataError: naming the folder."""
    if task is None:
        raise ConfigError("masks are given, but not what their values mean: add --convention")
    return Volumes(
        find(folder, layout, None).cases,
        salt=salt,
        spacing=spacing_of(grid.spacing),
        labels=task,
        cache_mib=grid.cache_mib,
        rules=grid.rules,
    )


def phantom(
    folder: Path,
    patients: int,
    seed: int,
    seats: Mapping[str, Sequence[str]],
    grid: Preparation,
    task: Task | None,
    progress: Callable[[int, int], None],
) -> ImageSource:
    """The phantom of a recipe; rendered into `folder`, unless it is there.

    Raises:
        ConfigError, DataError: it has not these modalities, or cannot be written.
    """
    from splitpeer.data.phantom.cohort import write_phantom

    if strange := [one for one in chain(*seats.values()) if one not in MODALITIES]:
        raise ConfigError(f"the phantom shows {', '.join(MODALITIES)}, not {strange[0]}: name other data")
    write_phantom(folder, patients, seed=seed, progress=progress)
    return public(folder, "folder", seats, grid, folder / "labels" if task is not None else None, task)


def left_out(path: Path | None, salt: bytes, volumes: Collection[Volumes]) -> frozenset[bytes]:
    """The keys of the patients that a list names: an id a line; a person's stands for all time points.

    Raises:
        DataError: the list cannot be read, or names nobody.
    """
    if path is None:
        return frozenset()
    try:
        text = reading.read(path, MAX_LIST, follow=True).decode("utf-8-sig")
    except OSError as error:
        raise DataError(
            f"{path}: the list of patients cannot be read ({error.strerror}): check the path"
        ) from None
    except UnicodeDecodeError:
        raise DataError(f"{path}: the list of patients is not UTF-8: save it as UTF-8") from None
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    asked = {patient_id(line) for line in lines}
    found = {
        key
        for one in volumes
        for key, case in keyed(salt, one.cases.values()).items()
        if asked & {case.patient, subject(case.patient)}
    }
    if asked and not found:
        raise DataError(f"{path}: names none of the patients that are here: compare the spelling")
    return frozenset(found)
