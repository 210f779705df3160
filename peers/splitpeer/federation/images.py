"""The images of one site, where its `peer.toml` says they are."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

from splitpeer.data.consent import Consent
from splitpeer.data.files import Found
from splitpeer.data.geometry import spacing_of
from splitpeer.data.layouts import find, find_all
from splitpeer.data.normalisation import DEFAULT, Normaliser
from splitpeer.data.pseudonym import keyed, load_salt, pseudonym
from splitpeer.data.task import Task
from splitpeer.data.volumes import Volumes
from splitpeer.errors import DataError
from splitpeer.settings.peer import PeerConfig

LIST_SEEN = "withdrawn-list-seen"
"""File in [peer] state: there was a list of withdrawn patients."""


def find_cases(config: PeerConfig) -> dict[str, Found]:
    """The site's images and the other files there, by modality. Raises DataError naming the file or folder."""
    data = config.data
    if data.images is None or not config.peer.modalities:
        raise DataError("a client needs [data] images and [peer] modality")
    return find_all(data.images, data.layout, config.peer.modalities)


def find_files(config: PeerConfig) -> tuple[dict[str, Found], Found | None]:
    """What this site has for a run: images by modality ({}: it holds masks only), and masks (None: it has none).

    Raises DataError naming the file or folder.
    """
    data, only_masks = config.data, config.data.images is None and config.data.labels is not None
    masks = None if data.labels is None else find(data.labels, data.labels_layout or data.layout, None)
    return {} if only_masks else find_cases(config), masks


def open_masks(
    config: PeerConfig,
    found: Found,
    spacing: tuple[float, ...] = (),
    task: Task | None = None,
    without: Collection[bytes] = (),
) -> Volumes:
    """The site's masks.

    Args:
        found: see `find_files`.
        spacing, without: see `open_volumes`.
        task: of the masks; None: before a job says it, when only their headers are read.

    Raises:
        ConfigError, DataError: naming the file.
    """
    data = config.data
    if data.salt is None:
        raise DataError("a client needs [data] salt")
    salt = load_salt(data.salt)
    return Volumes(
        [case for case in found.cases if not without or pseudonym(salt, case.patient) not in without],
        salt=salt,
        spacing=spacing_of(spacing),
        labels=task,
        cache_mib=data.cache_mib,
        rules=data.rules(),
    )


def open_volumes(
    config: PeerConfig,
    found: Mapping[str, Found],
    spacing: tuple[float, ...] = (),
    normalisation: Callable[[str], Normaliser] = lambda _: DEFAULT,
    without: Collection[bytes] = (),
) -> dict[str, Volumes]:
    """The site's images by modality.

    Args:
        found: see `find_cases`; those of a job are enough.
        spacing: of the job's grid, mm; (): as stored.
        normalisation: of the images of a modality.
        without: keys of patients that are passed over, as if they were not there.

    Raises:
        ConfigError, DataError: naming the file.
    """
    data = config.data
    if data.salt is None:
        raise DataError("a client needs [data] salt")
    salt = load_salt(data.salt)
    return {
        modality: Volumes(
            [case for case in kind.cases if not without or pseudonym(salt, case.patient) not in without],
            salt=salt,
            spacing=spacing_of(spacing),
            normalisation=normalisation(modality),
            cache_mib=data.cache_mib // len(found),
            rules=data.rules(),
        )
        for modality, kind in found.items()
    }


def open_consent(
    config: PeerConfig,
    found: Mapping[str, Found],
    earlier: Mapping[bytes, bytes] | None = None,
    *,
    note: bool = True,
    check: Callable[[Collection[bytes]], None] | None = None,
) -> Consent:
    """The list of this site's patients who have withdrawn consent.

    Args:
        earlier, check: of a run, see `Consent`.
        note: whether [peer] state keeps that there was a list; only a daemon writes there.

    Raises:
        ConfigError, DataError: the salt or the files cannot be used.
    """
    data = config.data
    if data.salt is None:
        raise DataError("a client needs [data] salt")
    salt = load_salt(data.salt)
    return Consent(
        data.withdrawn,
        {key: case for kind in found.values() for key, case in keyed(salt, kind.cases).items()},
        config.peer.state / LIST_SEEN,
        earlier,
        salt,
        note=note,
        check=check,
    )
