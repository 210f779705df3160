"""The images of this site, by patient: whose grid a segmentation gets."""

from __future__ import annotations

from splitpeer.data.layouts import find_all
from splitpeer.data.patients import patient_id
from splitpeer.errors import ConfigError, DataError
from splitpeer.results.own_scan import OwnScan
from splitpeer.settings.peer import PeerConfig


class OwnImages:
    """All images of this site.

    Args:
        config: `peer.toml`.

    Raises:
        ConfigError, DataError: there are none, or a folder cannot be read.
    """

    def __init__(self, config: PeerConfig) -> None:
        if config.data.images is None or not config.peer.modalities:
            raise ConfigError(
                f"{config.source}: names no images ([data] images, [peer] modality): segmentations are asked for at a "
                "site that has images of the patient"
            )
        self._config = config
        found = find_all(config.data.images, config.data.layout, config.peer.modalities)
        self._cases = {
            modality: {case.patient: case for case in kind.cases} for modality, kind in found.items()
        }

    def of(self, patient: str, modality: str | None = None) -> OwnScan:
        """The image of a patient whose grid a segmentation gets.

        Args:
            patient: the id at this site.
            modality: of the image; None: the first of `[peer] modality` that there is.

        Raises:
            ConfigError: this site has no such modality.
            DataError: there is no image of the patient, or it cannot be used.
        """
        from splitpeer.data.nifti import read_header
        from splitpeer.prepare.record import is_of, read, record_of

        wanted = patient_id(patient)
        if modality is not None and modality not in self._cases:
            raise ConfigError(f"this site has no {modality}: it has {', '.join(self._cases)}")
        for name in self._cases if modality is None else (modality,):
            if (case := self._cases[name].get(wanted)) is not None:
                header = read_header(case, self._config.data.rules())
                path = record_of(case.path)
                record = read(path) if path.exists() else None
                if record is not None and not is_of(case.path, record.image):
                    # The way back of another image: the mask would lie elsewhere.
                    raise DataError(f"{case.path}: is not the image that {path} describes: prepare it again")
                return OwnScan(wanted, name, case, header, record)
        raise DataError(
            f"{wanted}: no {modality or 'image'} of this patient here: splitpeer data keys lists the ids"
        )
