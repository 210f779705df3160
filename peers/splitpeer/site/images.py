"""The images of one site, as its `peer.toml` says where they are."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from splitpeer.data.layouts import Found, find_all
from splitpeer.data.normalisation import DEFAULT, Normaliser
from splitpeer.data.pseudonym import load_salt
from splitpeer.data.volumes import Volumes
from splitpeer.errors import DataError
from splitpeer.settings.peer import PeerConfig


def find_cases(config: PeerConfig) -> dict[str, Found]:
    """The site's images and what lies beside them, by modality. Raises DataError naming the file or folder."""
    data = config.data
    if data.images is None or not config.peer.modalities:
        raise DataError("a client needs [data] images and [peer] modality")
    return find_all(data.images, data.layout, config.peer.modalities)


def open_volumes(
    config: PeerConfig,
    found: Mapping[str, Found],
    spacing: tuple[float, ...] = (),
    normalisation: Callable[[str], Normaliser] = lambda _: DEFAULT,
) -> dict[str, Volumes]:
    """The site's images by modality.

    Args:
        found: see `find_cases`; those of a job are enough.
        spacing: of the job's grid, mm; (): as stored.
        normalisation: of the images of a modality.

    Raises:
        ConfigError, DataError: naming the file.
    """
    data = config.data
    if data.salt is None:
        raise DataError("a client needs [data] salt")
    salt = load_salt(data.salt)
    return {
        modality: Volumes(
            kind.cases,
            salt=salt,
            spacing=tuple(spacing) or None,
            normalisation=normalisation(modality),
            cache_mib=data.cache_mib // len(found),
            rules=data.rules(),
        )
        for modality, kind in found.items()
    }
