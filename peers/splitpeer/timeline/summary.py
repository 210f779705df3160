"""Medians of the parts of a step, for each party."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import chain

from splitpeer.timeline.parts import LINK, PARTS
from splitpeer.timeline.recorded import PartySteps, TimedStep


@dataclass(frozen=True)
class LastSite:
    """Whom a part of a step waited for."""

    site: str
    """The one whose answer was the last in most steps."""
    steps: int
    """In how many."""
    behind: float
    """Of these, median milliseconds since the answer before it."""


@dataclass(frozen=True)
class PartTimes:
    """Of one party; medians, in milliseconds."""

    steps: int
    step: float
    rest: float
    """Of a step, what is in no part on any thread."""
    parts: Mapping[str, float]
    """Over steps, each with its spans added up; of `single`, over single spans. In the order of `parts.PARTS`."""
    single: Mapping[str, int]
    """How many spans there are of parts that fewer than half of the steps have: between steps, or several ahead."""
    link: Mapping[str, float]
    last: Mapping[str, LastSite]
    """By part in which more than one site is asked."""


def summarise(one: PartySteps) -> PartTimes:
    """What a party's steps consist of."""
    by_step: dict[str, list[list[float]]] = {}
    for step in one.steps:
        for part, spans in _spans(step).items():
            by_step.setdefault(part, []).append(spans)
    known = [part for part in PARTS if part in by_step]
    ordered = [*known, *sorted(by_step.keys() - PARTS.keys())]
    single = {
        part: list(chain.from_iterable(by_step[part]))
        for part in ordered
        if 2 * len(by_step[part]) < len(one.steps)
    }
    links = [name for name in LINK if any(name in step.link for step in one.steps)]
    return PartTimes(
        len(one.steps),
        _median(step.seconds for step in one.steps),
        _median(step.seconds - covered(step) for step in one.steps),
        {part: _median(single.get(part) or map(sum, by_step[part])) for part in ordered},
        {part: len(spans) for part, spans in single.items()},
        {name: _median(step.link.get(name, 0.0) for step in one.steps) for name in links},
        _last(one.steps),
    )


def _last(steps: Iterable[TimedStep]) -> dict[str, LastSite]:
    behind: dict[str, dict[str, list[float]]] = {}
    for step in steps:
        for part, there in step.answers.items():
            if len(there) > 1:
                *_, before, last = sorted(there, key=lambda site: there[site])
                behind.setdefault(part, {}).setdefault(last, []).append(there[last] - there[before])
    found = {}
    for part, by_site in behind.items():
        site = max(by_site, key=lambda site: len(by_site[site]))
        found[part] = LastSite(site, len(by_site[site]), _median(by_site[site]))
    return found


def covered(step: TimedStep) -> float:
    """Seconds of a step in which at least one thread was at a part."""
    until, found = step.began, 0.0
    for span in sorted(step.spans, key=lambda span: span.began):
        began, ended = max(span.began, until), min(span.ended, step.ended)
        if ended > began:
            found, until = found + ended - began, ended
    return found


def _spans(step: TimedStep) -> dict[str, list[float]]:
    """Seconds of each, by part."""
    found: dict[str, list[float]] = {}
    for span in step.spans:
        found.setdefault(span.part, []).append(span.ended - span.began)
    return found


def _median(seconds: Iterable[float]) -> float:
    return round(1e3 * statistics.median(seconds), 3)
