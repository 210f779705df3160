"""Patients whom the hospital took out of its list of ids: nothing that was made of them stays among the images."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path

from splitpeer.dicom.headers import DicomHeader
from splitpeer.errors import DataError
from splitpeer.prepare.identifiers import study_id
from splitpeer.prepare.one import HELD_BACK, PatientPaths
from splitpeer.prepare.record import FOLDER, read

NOT_LISTED = "its id is no longer in the list of ids"
NOT_THEIRS = "the list of ids no longer gives its id to the patient whom its image shows"


def remove_unlisted(
    out: Path, ids: Mapping[str, str], patients: Mapping[str, Collection[DicomHeader]]
) -> dict[str, str]:
    """Remove what earlier runs wrote of patients whom the list does not name.

    DICOM files stay, and so do files in `out` that `data prepare` did not write.

    Args:
        out: the folder of images.
        ids: the list, from the hospital's id to the study's.
        patients: the DICOM files at hand, by the hospital's id.

    Returns:
        Why, by the study's id.

    Raises:
        DataError: the list names nobody of whom there is an image, so it is another folder's; nothing was touched.
        OSError: the folder cannot be written.
    """
    names: dict[str, str] = {}
    for hospital in ids:
        with suppress(DataError):  # said of the patient, who has no files here
            names[hospital] = study_id(hospital, ids)
    made = _made(out)
    if made and not made & set(names.values()):
        raise DataError(
            f"the list of ids names none of the {len(made)} patients in {out}: check that it belongs to this folder; "
            "if it does, delete the folder and prepare them again"
        )
    owners = {
        one.series: names.get(hospital) for hospital, files in patients.items() for one in files if one.series
    }
    here = {names.get(hospital) for hospital in patients}
    gone = {}
    for name in sorted(made):
        if name not in names.values():
            gone[name] = NOT_LISTED
        # Of a patient who has files here, the image is made again, or removed with a reason of its own.
        elif name not in here and owners.get(_series(out, name), name) != name:
            gone[name] = NOT_THEIRS
    for name in gone:
        PatientPaths.of(out, name).forget()
    return gone


# --- inside ------------------------------------------------------------------------------------------------


def _made(out: Path) -> set[str]:
    """Of whom earlier runs left anything: the picture is written first, and goes last."""
    records = out / FOLDER
    found = (*records.glob("*.json"), *records.glob("*.png"), *(records / HELD_BACK).glob("*.json"))
    return {path.stem for path in found}


def _series(out: Path, name: str) -> str:
    try:
        return read(PatientPaths.of(out, name).record).series
    except DataError:
        return ""
