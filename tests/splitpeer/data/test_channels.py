"""Several modalities of one site: which seats a patient fills, channels in the seat's order, one grid."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from splitpeer.daemon import happenings as h
from splitpeer.data.channels import Channels
from splitpeer.data.layouts import find_all
from splitpeer.data.loader import SiteData
from splitpeer.data.normalisation import Normaliser
from splitpeer.data.pseudonym import pseudonym
from splitpeer.data.sampling import Sample
from splitpeer.data.volumes import Volumes
from splitpeer.defences.image.stack import make_image_stack
from splitpeer.errors import DataError, PatientUnusable
from splitpeer.federation.files import check_seats

HELD = ("adc", "flair", "t2")
SEATS = {"flair": ("flair",), "mri": ("t2", "adc")}
WINDOW = (8, 8, 1)


@pytest.fixture
def folder(tmp_path: Path, files) -> Path:
    """`p` has all three, `q` lacks a channel of the second seat, `r` fills that only."""
    for number, modality in enumerate(HELD):
        for patient in "pqr":
            if (patient, modality) not in (("q", "adc"), ("r", "flair")):
                files.save(
                    tmp_path / modality / f"{patient}.nii.gz", files.head(seed=10 * number + ord(patient))
                )
    return tmp_path


class Told:
    """Keeps the warnings."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def __call__(self, happening: h.Happening) -> None:
        assert isinstance(happening, h.DataWarning)
        self.lines.append(happening.cause)


def volumes(folder: Path, files, **rules: str) -> dict[str, Volumes]:
    return {
        modality: Volumes(
            found.cases,
            salt=files.SALT,
            normalisation=Normaliser.parse(rules.get(modality, "zscore-nonzero")),
        )
        for modality, found in find_all(folder, "folder", HELD).items()
    }


def key(files, patient: str) -> bytes:
    return pseudonym(files.SALT, patient)


def test_a_patient_fills_a_seat_if_all_its_channels_are_there(folder: Path, files) -> None:
    channels = Channels(volumes(folder, files), SEATS)
    filled = {patient: channels.fills(key(files, patient)) for patient in "pqrs"}
    assert filled == {"p": (0, 1), "q": (0,), "r": (1,), "s": ()}
    assert channels.keys() == sorted(key(files, patient) for patient in "pqr")
    only = Channels(volumes(folder, files), {"mri": ("t2", "adc")})
    assert only.keys() == sorted(key(files, patient) for patient in "pr")
    with pytest.raises(DataError, match="not in this site's data"):
        only.geometry(key(files, "q"))


def test_patients_who_lack_a_channel_are_told(folder: Path, files) -> None:
    told = Told()
    check_seats(Channels(volumes(folder, files), SEATS), h.Reporter(told))
    assert told.lines == ["1 patient lacks adc and does not fill mri"]


def test_a_seat_whose_channels_share_no_patient_is_an_error(folder: Path, files) -> None:
    for path in (folder / "adc").iterdir():
        path.rename(path.with_name(f"x{path.name}"))
    channels = Channels(volumes(folder, files), SEATS)
    said = r"no patient has all of t2, adc \(seat mri\): write the ids of one patient alike"
    with pytest.raises(DataError, match=said) as caught:
        check_seats(channels, h.Reporter())
    assert caught.value.told == "no patient has all of t2, adc (seat mri)"


def test_channels_stand_in_the_seats_order_each_as_if_it_were_alone(folder: Path, files) -> None:
    """Its own normalisation, its own augmentation of grey values, its own noise; the same flips and turns."""
    held = volumes(folder, files, adc="percentile")
    noise = {m: make_image_stack("voxel-noise:0.5", bytes([n]) * 32) for n, m in enumerate(HELD)}
    channels = Channels(held, SEATS, noise)
    samples = [Sample(key(files, patient), (1, 0, 3)) for patient in "pr"]
    got = channels.batch("mri", samples, WINDOW, 5, [0, 3])
    assert got.shape == (2, 2, 8, 8)
    for number, modality in enumerate(("t2", "adc")):
        alone = SiteData(held[modality], noise[modality]).batch(samples, WINDOW, 5, modality, places=[0, 3])
        np.testing.assert_array_equal(got[:, number : number + 1], alone)
    turned = Channels(held, {"mri": ("adc", "t2")}, noise).batch("mri", samples, WINDOW, 5, [0, 3])
    np.testing.assert_array_equal(turned, got[:, ::-1])


def test_one_channel_is_what_it_was(folder: Path, files) -> None:
    held = volumes(folder, files)
    samples = [Sample(key(files, patient), (1, 0, 3)) for patient in "pq"]
    got = Channels(held, SEATS).batch("flair", samples, WINDOW, 5)
    np.testing.assert_array_equal(got, SiteData(held["flair"]).batch(samples, WINDOW, 5, "flair"))


def test_channels_of_a_patient_lie_on_one_grid(folder: Path, files) -> None:
    files.save(folder / "adc" / "p.nii.gz", files.head(), origin=(-10.0, 20.0, 9.0))
    channels = Channels(volumes(folder, files), SEATS)
    with pytest.raises(
        PatientUnusable, match=r"differs from .*flair.p\.nii\.gz in .*resample both"
    ) as caught:
        channels.geometry(key(files, "p"))
    assert (caught.value.key, caught.value.cause) == (key(files, "p"), "grid")
    # Seats of one site are compared as well: one patient is listed with one grid.
    assert channels.geometry(key(files, "r")).shape == (12, 10, 8)


def test_all_channels_are_read(folder: Path, files) -> None:
    files.truncate(folder / "adc" / "p.nii.gz")
    channels = Channels(volumes(folder, files), SEATS)
    with pytest.raises(PatientUnusable) as caught:
        channels.read(key(files, "p"))
    assert caught.value.key == key(files, "p")
    channels.read(key(files, "q"))


def test_a_file_is_of_one_modality(tmp_path: Path, files) -> None:
    """In a folder whose names do not tell, both would be found in the same file."""
    files.save(tmp_path / "p.nii.gz", files.head())
    with pytest.raises(DataError, match=r"p\.nii\.gz: its name does not say whether it is t2 or adc"):
        find_all(tmp_path, "folder", ("t2", "adc"))
