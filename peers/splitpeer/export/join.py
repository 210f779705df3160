"""Halves become one network: only where every party of the run has agreed, and to the same holders."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from splitpeer.errors import DataError
from splitpeer.export import agreement, bundle
from splitpeer.export.agreement import ExportAgreement
from splitpeer.export.half import DECODER, DECODER_FILE, ENCODERS, MASKS, WHOLE, Half, built, encoder_file
from splitpeer.storage import reading
from splitproto.partners import Trust

_COMMON = (
    "federation",
    "job",
    "run",
    "terms",
    "precision",
    "frozen",
    "dimensions",
    "window",
    "spacing",
    "cut",
    "sum",
)
"""Facts that are the same in all halves of a run."""


def joined(
    folders: Sequence[Path], own: str, trust: Trust, now: datetime, chosen: Mapping[str, str] | None = None
) -> Half:
    """The whole network.

    Args:
        folders: bundles of all parties of a run, each with its agreement.
        own: the site that joins them.
        trust: the federation's.
        now: with its time zone.
        chosen: by seat that several sites fill, the site whose encoder is taken.

    Raises:
        DataError: one line: a party is missing, its agreement is, or the halves do not belong together.
    """
    halves = [bundle.read(folder) for folder in folders]
    agreed = [_agreed(folder, half, trust, now) for folder, half in zip(folders, halves, strict=True)]
    decoder, sites = _parties(folders, halves)
    _check_together(decoder, halves)
    _check_holders(agreed, own)
    sources = _sources(decoder, sites, chosen or {})
    weights = {DECODER_FILE: decoder.weights[DECODER_FILE]}
    for seat, half in sources.items():
        weights[encoder_file(seat)] = half.weights[encoder_file(seat)]
    facts = {
        **{name: value for name, value in decoder.facts.items() if name not in ("weights", "checkpoint")},
        "kind": WHOLE, "party": own,
        "encoders": {seat: half.facts["encoders"][seat] for seat, half in sources.items()},
        "encoders_of": {seat: half.facts["party"] for seat, half in sources.items()},
        "defences": sorted({spec for half in sources.values() for spec in half.facts["defences"]}),
        "secret": any(half.facts["secret"] for half in sources.values()),
        "parties": [one.party for one in agreed], "holders": list(agreed[0].holders),
        "sum": _sum(decoder, sources),
    }  # fmt: skip
    whole = Half(facts, weights)
    built(whole)
    return whole


def _agreed(folder: Path, half: Half, trust: Trust, now: datetime) -> ExportAgreement:
    if half.facts["kind"] == WHOLE:
        raise DataError(f"{folder}: is joined already")
    path = folder / bundle.AGREEMENT
    try:
        data = reading.read(path, bundle.MAX_METADATA)
    except FileNotFoundError:
        raise DataError(
            f"{folder}: has no agreement of {half.facts['party']}: have it exported with --agree"
        ) from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    return agreement.check(data, half.facts, trust, now)


def _parties(folders: Sequence[Path], halves: Sequence[Half]) -> tuple[Half, dict[str, Half]]:
    """The coordinator's half, and the sites' by name: all of the run's."""
    decoders = [half for half in halves if half.facts["kind"] == DECODER]
    if len(decoders) != 1:
        raise DataError(
            f"{len(decoders)} of {len(folders)} bundles are a coordinator's: exactly one has the decoder"
        )
    sites = {half.facts["party"]: half for half in halves if half.facts["kind"] in (ENCODERS, MASKS)}
    twice = [name for name, n in Counter(half.facts["party"] for half in halves).items() if n > 1]
    if twice:
        raise DataError(f"two bundles are of {twice[0]}: name one")
    run = decoders[0].facts["sites"]
    if lacking := sorted(run.keys() - sites.keys()):
        raise DataError(
            f"the run is also of {', '.join(lacking)}: without their agreement the network is not joined"
        )
    if strange := sorted(sites.keys() - run.keys()):
        raise DataError(f"{strange[0]} has no part in the run of the coordinator's bundle: leave it out")
    return decoders[0], sites


def _check_together(decoder: Half, halves: Sequence[Half]) -> None:
    for half in halves:
        for name in _COMMON:
            if half.facts[name] != decoder.facts[name]:
                raise DataError(
                    f"the bundle of {half.facts['party']} is of another {name} than the coordinator's "
                    f"({str(half.facts[name])[:40]}, not {str(decoder.facts[name])[:40]}): export both from one run"
                )
        # Encoders of a frozen job are those of its beginning.
        if half.facts["step"] != decoder.facts["step"] and not decoder.facts["frozen"]:
            raise DataError(
                f"the bundle of {half.facts['party']} is of step {half.facts['step']}, the coordinator's of "
                f"{decoder.facts['step']}: export both with --step, for a step that both have"
            )
        for seat, held in half.facts["seats"].items():
            if decoder.facts["seats"].get(seat) != held:
                raise DataError(
                    f"the bundle of {half.facts['party']} fills a seat {seat} that the run does not have"
                )
        for modality, rule in half.facts["normalisation"].items():
            if decoder.facts["normalisation"].get(modality) != rule:
                raise DataError(f"{half.facts['party']} normalises {modality} by another rule than the run")


def _check_holders(agreed: Sequence[ExportAgreement], own: str) -> None:
    first = agreed[0]
    for one in agreed:
        if one.holders != first.holders:
            raise DataError(
                f"{first.party} lets {', '.join(first.holders)} hold the network, {one.party} "
                f"{', '.join(one.holders)}: agree on one list"
            )
    if own not in first.holders:
        raise DataError(
            f"the parties let {', '.join(first.holders)} hold the network, not {own}: join it there"
        )


def _sources(decoder: Half, sites: Mapping[str, Half], chosen: Mapping[str, str]) -> dict[str, Half]:
    """By seat, whose encoder is taken."""
    found = {}
    for seat in decoder.facts["seats"]:
        fillers = [site for site in sites if seat in decoder.facts["sites"][site]]
        if not fillers:
            raise DataError(f"no bundle has an encoder for seat {seat}: add that of the site that fills it")
        if len(fillers) > 1 and chosen.get(seat) not in fillers:
            raise DataError(
                f"seat {seat} is filled by {' and '.join(fillers)}, whose encoders differ: add "
                f"--use {seat}={fillers[0]}"
            )
        site = chosen.get(seat, fillers[0])
        if site not in fillers or encoder_file(seat) not in sites[site].weights:
            raise DataError(f"{site} does not fill seat {seat}: name one of {', '.join(fillers)}")
        found[seat] = sites[site]
    return found


def _sum(decoder: Half, sources: Mapping[str, Half]) -> dict[str, Any] | None:
    """Of a secure sum, its whole numbers and which seats each site adds."""
    if decoder.facts["sum"] is None:
        return None
    sites: dict[str, list[str]] = {}
    for seat, half in sources.items():
        sites.setdefault(half.facts["party"], []).append(seat)
    return {**decoder.facts["sum"], "sites": dict(sorted(sites.items()))}
