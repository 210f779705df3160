"""Seats of a job: which there are, who fills them, and the names of their tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from splitpeer.errors import ConfigError
from splitpeer.federation.seats import by_seat, joined, seats_of
from splitpeer.federation.terms import job_on_wire, seat_descriptors
from splitpeer.settings.job import JobConfig
from splitpeer.settings.loading import to_toml
from splitproto.records import Fusion, Seat

T1, MRI = Seat("t1", ("t1",)), Seat("mri", ("t2", "flair"))


def job(folder: Path, text: str) -> JobConfig:
    path = folder / "job.toml"
    path.write_text(f'[job]\nname = "j"\n{text}')
    return JobConfig.load(path)


HOSPITALS = '[sites]\nsouth = "t1"\nnorth = "T1w"\neast = ["t2", "flair"]\n'


def test_every_modality_is_a_seat_of_its_own(tmp_path: Path) -> None:
    seats = seats_of(job(tmp_path, HOSPITALS))
    assert seats.names == ("flair", "t1", "t2")
    assert [seat.modalities for seat in seats.seats] == [("flair",), ("t1",), ("t2",)]
    assert seats.sites("t1") == ("north", "south"), "by name, not by their order in the file"
    assert [seat.name for seat in seats.of("east")] == ["flair", "t2"]
    assert list(seats.filled) == ["east", "north", "south"]


def test_a_seat_of_two_channels_in_the_order_written(tmp_path: Path) -> None:
    config = job(tmp_path, HOSPITALS + '[seats]\nmri = ["t2", "FLAIR"]\n')
    seats = seats_of(config)
    assert seats.seats == (MRI, T1)
    assert seats.of("east") == (MRI,)
    assert (
        seats_of(job(tmp_path, to_toml(config.resolved()).partition("name")[2].partition("\n")[2])) == seats
    )


def test_who_lacks_a_modality_of_a_seat_does_not_fill_it(tmp_path: Path) -> None:
    seats = seats_of(job(tmp_path, HOSPITALS + 'west = ["t1", "t2"]\n[seats]\nmri = ["t2", "flair"]\n'))
    assert seats.of("west") == (T1,)
    assert seats.sites("mri") == ("east",)


def test_what_no_step_will_use_is_told(tmp_path: Path) -> None:
    seats = '[seats]\nmri = ["t2", "flair"]\n'
    assert job(tmp_path, HOSPITALS + seats).unused() == []
    assert job(tmp_path, HOSPITALS + 'west = ["t1", "t2"]\n').unused() == [], "each is a seat of its own"
    assert job(tmp_path, HOSPITALS + 'west = ["t1", "t2"]\n' + seats).unused() == [
        "[sites] west holds t2, which only counts together with flair (seat mri): remove it, or add flair"
    ]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (
            'west = "flair"\n[seats]\nmri = ["t2", "flair"]',
            "[sites] west holds flair and fills no seat: give it",
        ),
        ('[seats]\nmri = ["t1", "t2"]', "[seats] mri: no site holds all of t1, t2"),
        ('[seats]\nct = "ct"', "[seats] ct: no site holds all of ct"),
        ('[seats]\nmri = ["t2", "flair"]\ntwo = ["t2"]', "[seats] t2 is in two seats: name it in one"),
        ('[seats]\nmri = ["t2", "t2"]', "[seats] mri: the same twice"),
        ('west = ["t1", "T1w"]', "[sites] west: the same twice"),
        ("west = []", "[sites] west: [] is neither a modality nor a list of modalities"),
        ("west = [1]", "[sites] west: [1] is neither a modality nor a list of modalities"),
        ('[seats]\ncoordinator = ["t2"]', "[seats] no seat may be called coordinator"),
        ('west = "coordinator"', "[seats] no seat may be called coordinator"),
        ('[seats]\nt1 = ["t2", "flair"]', "[seats] t1 is also a modality at one of [sites]"),
        ("[data]\nmin_seats = 4", "[data] min_seats = 4, but the job has 3 seats"),
        (f"west = {[f'm{n}' for n in range(17)]}", "[sites] west fills 17 seats, at most 16 are possible"),
        (
            f"west = {[f'm{n}' for n in range(9)]}\n[seats]\nall = {[f'm{n}' for n in range(9)]}",
            "[seats] all has 9 modalities, at most 8 are possible",
        ),
    ],
)
def test_what_cannot_be(tmp_path: Path, more: str, said: str) -> None:
    with pytest.raises(ConfigError) as error:
        job(tmp_path, HOSPITALS + more)
    assert said in str(error.value) and "\n" not in str(error.value)


ONE_EACH = '[sites]\nsouth = "t1"\neast = ["t2", "flair"]\n[model]\nfusion = "secure-sum"\n'


def test_a_secure_sum_tells_its_terms(tmp_path: Path) -> None:
    """SP-11.18-1, SP-11.18-2: the channels of the sum are the cut's."""
    on_wire = job_on_wire(
        job(tmp_path, ONE_EACH + "widths = [1, 1, 2, 4, 8]\nsum_bits = 32\nsum_range = 2.0\n")
    )
    assert on_wire.fusion == Fusion(32, 2.0, 2)
    assert [level.channels for level in on_wire.cut] == [1, 1, 2, 4, 8]
    sent = seat_descriptors(on_wire, (Seat("flair", ("flair",)), Seat("t2", ("t2",))))
    assert [(one.name, one.dtype, one.shape[1]) for one in sent] == [
        ("x0", "i32", 1), ("x1", "i32", 1), ("x2", "i32", 2), ("x3", "i32", 4), ("x4", "i32", 8), ("check", "i32", 8),
    ]  # fmt: skip
    assert job_on_wire(job(tmp_path, HOSPITALS)).fusion is None


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ('[absence]\nmode = "skip"', '[absence] mode = "skip": a sum without a site shows what it holds'),
        (
            "[training]\nseat_dropout = 0.1",
            "[training] seat_dropout: a sum without a seat shows what it holds",
        ),
        ("[evaluation]\nmissing = true", "[evaluation] missing: a sum without a seat shows what it holds"),
        ("[data]\nmin_seats = 2", "[data] min_seats: patients of a sum have all seats"),
        (
            "[training]\naverage_every = 5",
            "[training] average_every: the sites of a sum fill different seats",
        ),
        ('[wire]\nactivations = "int8"', "[wire]: what travels of a sum is not coded"),
        ('[training]\nprecision = "bf16"', '[training] precision = "bf16": gradients of a sum are f32'),
        (
            '[task.normalisation]\nt1 = "window:0,1"',
            "in a secure sum only zscore and zscore-nonzero lose no image",
        ),
        ("sum_bits = 8", "sum_bits"),
        ("sum_range = 0.0", "sum_range"),
    ],
)
def test_what_a_secure_sum_cannot_be(tmp_path: Path, more: str, said: str) -> None:
    """SP-11.18-14: one set of sites, and all of them."""
    with pytest.raises(ConfigError) as error:
        job(tmp_path, ONE_EACH + more)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_a_secure_sum_has_one_site_for_each_seat(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"\[sites\] .* fill seat t1: in a sum each seat is one site's"):
        job(tmp_path, HOSPITALS + '[model]\nfusion = "secure-sum"\n')
    with pytest.raises(ConfigError, match=r"\[sites\] names 1 site: there is no sum of one"):
        job(tmp_path, '[sites]\nsouth = "t1"\n[model]\nfusion = "secure-sum"\n')


def test_tensors_of_several_seats_are_named_by_seat() -> None:
    """SP-11.8-5."""
    parts: dict[str, dict[str, Any]] = {"mri": {"x0": 1, "x1": 2}, "t1": {"x0": 3, "x1": 4}}
    both = joined(parts, (MRI, T1))
    assert both == {"mri/x0": 1, "mri/x1": 2, "t1/x0": 3, "t1/x1": 4}
    assert list(both) == ["mri/x0", "mri/x1", "t1/x0", "t1/x1"]
    assert by_seat(both, (MRI, T1)) == parts
    assert joined({"t1": parts["t1"]}, (MRI, T1)) == {"t1/x0": 3, "t1/x1": 4}
    assert by_seat({"t1/x0": 3}, (MRI, T1)) == {"t1": {"x0": 3}}
    assert joined({"t1": parts["t1"]}, (T1,)) == parts["t1"]
    assert by_seat(parts["t1"], (T1,)) == {"t1": parts["t1"]}
    for strange in ("x0", "ct/x0"):
        with pytest.raises(KeyError):
            by_seat({strange: 1}, (MRI, T1))
