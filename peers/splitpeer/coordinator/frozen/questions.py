"""What each site of a run with frozen encoders is asked: every window of its patients, once (SP-11.17)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace

from splitpeer.coordinator.run import Run
from splitpeer.data.sampling import batch_digest
from splitpeer.errors import DataError
from splitpeer.federation.seating import Lists, Part
from splitpeer.federation.seats import by_seat
from splitpeer.federation.terms import cut_descriptors, seat_descriptors, terms_digest, window_of
from splitpeer.storage.bank import ALL_SITES, Bank, BankEntry, Contents
from splitpeer.training.forms import activations_form
from splitpeer.training.windows import window_origins
from splitproto.fusion import CHECK
from splitproto.messages import Forward
from splitproto.records import Sample
from splitproto.seats import tensor_name


def contents(run: Run, weights: Mapping[str, bytes]) -> Contents:
    """All that will be in the bank of a run whose patients are matched.

    Args:
        weights: by site, the label of its encoders' weights.
    """
    if run.job.fusion is not None:
        # SP-11.18: every site is asked the same, and only the sum is kept.
        releases, together = (
            _of_the_sum(run),
            hashlib.sha256(b"".join(weights[site] for site in sorted(weights))),
        )
        weights = {**weights, ALL_SITES: together.digest()}
    else:
        releases = [one for site in sorted(weights) for one in _of_site(run, site)]
    return Contents(
        run.files.run,
        terms(run),
        activations_form(run.job).form,
        weights,
        tuple(releases),
    )


def terms(run: Run) -> str:
    """Digest of what releases depend on: seats, cut, window and so on, and nothing of how the decoder is trained."""
    same = replace(
        run.job, name="", batch=1, steps=1, optimiser="", learning_rate=1.0, weight_decay=0.0, schedule="",
        seconds_per_step=1.0,
    )  # fmt: skip
    seats = run.seating.seats
    filled = {site: [[seat.name, seat.modalities] for seat in seats.of(site)] for site in seats.filled}
    said = [terms_digest(same), run.settings.evaluation.overlap, filled]
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def forward_of(release: BankEntry) -> Forward:
    """SP-11.17-3: the question."""
    samples = tuple(Sample(release.key, origin) for origin in release.origins)
    return Forward("release", 0, release.number, samples, release.digest)


def part_of(run: Run, site: str, lists: Mapping[bytes, tuple[str, ...]], release: BankEntry) -> Part:
    """The question as its site is asked; a batch is of one patient, so it is asked as a whole.

    Args:
        lists: of the site, as it said last.
    """
    part = run.seating.part(site, lists, forward_of(release))
    if part is None:
        raise LookupError(f"release {release.number} holds no patient of {site}")
    return part


def lists_of(run: Run, bank: Bank) -> Mapping[str, Lists]:
    """By site, the seats that it could fill when the bank was made, of the patients who are in it."""
    seats = run.seating.seats
    found: dict[str, dict[bytes, frozenset[str]]] = {site: {} for site in seats.filled}
    for one in bank.contents.releases:
        if one.key in bank.dropped:
            continue
        if one.site == ALL_SITES:
            for site, filled in seats.filled.items():
                found[site][one.key] = frozenset(filled)
        else:
            found[one.site][one.key] = frozenset(by_seat(one.shapes, seats.of(one.site)))
    return found


def check_windows(run: Run, bank: Bank) -> None:
    """Raises DataError: the windows of a patient are not those of the masks."""
    held: dict[tuple[str, bytes], set[tuple[int, int, int]]] = {}
    for one in bank.contents.releases:
        held.setdefault((one.site, one.key), set()).update(one.origins)
    window, overlap = window_of(run.job), run.settings.evaluation.overlap
    for (_, key), origins in held.items():
        if key in run.seating.filled and origins != set(
            window_origins(run.labels.geometry(key).shape, window, overlap)
        ):
            raise DataError(
                f"{bank.folder}: the feature bank has other windows than the masks: they have another grid than when "
                "it was made"
            )


def _of_the_sum(run: Run) -> list[BankEntry]:
    """As `_of_site`, of what is read of all sites together."""
    return [
        replace(
            one,
            site=ALL_SITES,
            shapes={
                described.name: described.shape
                for described in seat_descriptors(
                    run.job, run.seating.seats.seats, _rows(run, len(one.origins))
                )
                if described.name != CHECK
            },
        )
        for one in _of_site(run, min(run.seating.seats.filled))
    ]


def _rows(run: Run, count: int) -> dict[str, int]:
    return dict.fromkeys(run.seating.seats.names, count)


def _of_site(run: Run, site: str) -> list[BankEntry]:
    """Patient after patient, in the order of their keys; a batch never holds two."""
    window, settings = window_of(run.job), run.settings.evaluation
    offered, found = run.seating.seats.of(site), list[BankEntry]()
    for key, filled in sorted(run.seating.of(site).items()):
        origins = window_origins(run.labels.geometry(key).shape, window, settings.overlap)
        for first in range(0, len(origins), settings.batch):
            some = tuple(origins[first : first + settings.batch])
            # What another site fills is sent as well (SP-11.8-5), and not kept.
            shapes = {
                tensor_name(seat.name, described.name, offered): described.shape
                for seat in offered
                if seat.name in filled
                for described in cut_descriptors(run.job, len(some))
            }
            digest = batch_digest(0, [Sample(key, origin) for origin in some], None)
            found.append(BankEntry(site, len(found), key, some, digest, shapes))
    return found
