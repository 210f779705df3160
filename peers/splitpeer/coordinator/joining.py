"""What a site says when it joins: that it accepts the job, and which patients it has."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from splitpeer.coordinator.site_link import SiteLink
from splitpeer.data.geometry import Geometry, compare_geometry
from splitpeer.errors import DataError
from splitproto.errors import Misaligned, SchemaMismatch
from splitproto.messages import Inventory, JobAccept
from splitproto.records import Patient, Seat


@dataclass(frozen=True, slots=True)
class Patients:
    """Whom a site has, by pseudonymous key."""

    usable: Mapping[bytes, Geometry]
    """With the grid of their images."""
    unusable: Mapping[bytes, str]
    """Whose files the site cannot use, with a cause of SP-11.13."""
    seats: Mapping[bytes, tuple[str, ...]]
    """By usable patient, the seats that the site can fill."""
    people: Mapping[bytes, bytes]
    """By usable patient with a mask, where the site was asked for masks, the person whose scan it is."""


def check_weights(name: str, accept: JobAccept, known: bytes) -> None:
    """SP-11.17-6: a site of a frozen job labels the weights of its encoders, and they stay the same.

    Args:
        known: the label that it gave before; empty: none.

    Raises SchemaMismatch.
    """
    if accept.weights is None:
        raise SchemaMismatch(f"{name} does not label the weights of its frozen encoders")
    if known and accept.weights != known:
        raise SchemaMismatch(
            f"{name} has other encoder weights than when it released what the feature bank holds: bring its "
            "run folder back, or start a new run with --fresh"
        )


async def hear_patients(
    link: SiteLink, accept: JobAccept, salt_check: bytes, seats: Sequence[Seat], *, masks: bool = False
) -> Patients:
    """The site's inventory, in as many pieces as it takes.

    Args:
        seats: those that it was offered.
        salt_check: of the coordinator's salt, from which the keys of its masks are made.
        masks: whether it was asked for masks.

    Raises:
        Misaligned: the site has another salt.
        SchemaMismatch: the list is not what `accept` announced.
        SplitprotoError: the link is over.
    """
    usable: dict[bytes, Geometry] = {}
    unusable: dict[bytes, str] = {}
    fills: dict[bytes, tuple[str, ...]] = {}
    people: dict[bytes, bytes] = {}
    last = False
    while not last:
        piece = await link.hear("its list of patients", Inventory)
        last = piece.last
        _check_salt(link.site, piece.salt_check, salt_check)
        # SP-11-4: bounded by what was announced, or a list that never ends would fill our memory.
        if len(usable) + len(piece.patients) > accept.patients or not (piece.patients or last):
            raise SchemaMismatch(f"{accept.patients} patients announced, but more, or none, are listed")
        for p in piece.patients:
            usable[p.key] = Geometry(p.shape, p.spacing, p.directions, p.origin, p.stored)
            fills[p.key] = _seats(p, seats)
            if (p.mask or p.person is not None) and not (masks and p.mask):
                raise SchemaMismatch(
                    "a patient is listed with a mask, or as a person, where none was asked for"
                )
            if p.mask:
                people[p.key] = p.person or p.key
        if piece.unusable is not None:
            unusable = _unusable(piece, usable)
    if len(usable) != accept.patients:
        raise SchemaMismatch(f"{accept.patients} patients announced, {len(usable)} listed")
    return Patients(usable, unusable, fills, people)


def check_fit(
    site: str,
    patients: Patients,
    expected: Mapping[bytes, Geometry],
    seats: Mapping[bytes, Collection[str]],
    *,
    masks: bool = False,
) -> None:
    """SP-11-4: a site that joins a run under way has its patients, on their grids, but for those it cannot use.

    Args:
        expected: the run's patients in use for which the site fills a seat, with the grid of the labels.
        seats: which seats it fills.
        masks: whether it holds the masks of all of them.

    Raises:
        Misaligned: they are not.
    """
    needed = {key: grid for key, grid in expected.items() if key not in patients.unusable}
    if lost := len(needed.keys() - patients.usable.keys()):
        raise Misaligned(f"it lacks {lost} of the run's {len(needed)} patients")
    if lost := sum(not set(seats.get(key, ())) <= set(patients.seats[key]) for key in needed):
        raise Misaligned(f"for {lost} of the run's {len(needed)} patients it lacks a seat that it filled")
    if masks and (lost := len(needed.keys() - patients.people.keys())):
        raise Misaligned(f"it lacks the masks of {lost} of the run's {len(needed)} patients")
    try:
        compare_geometry({"labels": needed, site: {key: patients.usable[key] for key in needed}})
    except DataError as error:
        raise Misaligned(str(error)) from error


def _check_salt(site: str, shown: bytes, own: bytes) -> None:
    """SP-11.5-4: with another salt every key is another, and no patient would be found at both."""
    if shown != own:
        raise Misaligned(
            f"the patient salt of {site} (check value {shown.hex()}) is not the coordinator's: install the "
            "same federation.salt at both (each start's log shows its own check value)"
        )


def _seats(patient: Patient, offered: Sequence[Seat]) -> tuple[str, ...]:
    """The seats that the site can fill for a patient. Raises SchemaMismatch."""
    if patient.seats is None:
        return tuple(seat.name for seat in offered)
    places = patient.seats
    empty = not places and not patient.mask
    if empty or list(places) != sorted(set(places)) or (places and places[-1] >= len(offered)):
        raise SchemaMismatch(f"a patient has seats {list(places)} of the {len(offered)} offered")
    return tuple(offered[place].name for place in places)


def _unusable(piece: Inventory, usable: Collection[bytes]) -> dict[bytes, str]:
    """SP-11.13-9. Raises SchemaMismatch."""
    listed = piece.unusable or ()
    found = {patient.key: patient.cause for patient in listed}
    if not piece.last or len(found) < len(listed) or found.keys() & set(usable):
        raise SchemaMismatch("patients that cannot be used are listed too early, twice, or as usable")
    return found
