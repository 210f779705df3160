"""Which codings the sites' links can carry, where `[wire]` leaves it to the coordinator: from rates to a choice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from splitpeer.federation.terms import Codings, seat_descriptors
from splitpeer.settings.job import Wire
from splitpeer.settings.values import AUTO
from splitproto.codings import CODINGS
from splitproto.records import Job, Seat
from splitproto.tensors import body_bytes

FORMS = (None, *CODINGS)
"""The least lossy first; None: as the job's precision says."""


@dataclass(frozen=True)
class LinkRate:
    """What one site's link was measured to carry, while the others' were as well."""

    round_trip_s: float
    up: float
    """Octets per second from the site."""
    down: float
    """Octets per second to it."""

    def __str__(self) -> str:
        up, down = (f"{_short(8e-6 * rate)} Mb/s" for rate in (self.up, self.down))
        return f"{up} up, {down} down, {_short(1e3 * self.round_trip_s)} ms"


class Fit(NamedTuple):
    """A form for one direction, and what it costs."""

    form: str | None
    slowest: str
    """The site that takes longest."""
    seconds: float
    """That it takes for the tensors of one step."""

    def __str__(self) -> str:
        return f"{self.form or 'none'} ({_short(self.seconds)} s a step at {self.slowest})"


@dataclass(frozen=True)
class ChosenCodings:
    """What was chosen; None: job.toml says it."""

    activations: Fit | None
    gradients: Fit | None

    @property
    def codings(self) -> Codings:
        """Those of the job, where `[wire]` leaves them open."""
        return Codings(*(fit.form if fit is not None else None for fit in (self.activations, self.gradients)))


def choose(
    wire: Wire, job: Job, seats: Mapping[str, Sequence[Seat]], rates: Mapping[str, LinkRate]
) -> ChosenCodings:
    """The codings that `wire` leaves open.

    Args:
        job: the other terms.
        seats: by site, those that it fills.
        rates: by site.
    """
    # SP-11-10: the gradients have the shapes of the activations.
    octets = {
        form: {site: step_octets(job, filled, form) for site, filled in seats.items()} for form in FORMS
    }
    up, down = ({site: getattr(rates[site], way) for site in seats} for way in ("up", "down"))
    return ChosenCodings(
        least_lossy(octets, up, wire.auto_s) if wire.activations == AUTO else None,
        least_lossy(octets, down, wire.auto_s) if wire.gradients == AUTO else None,
    )


def least_lossy(
    octets: Mapping[str | None, Mapping[str, int]], rates: Mapping[str, float], within_s: float
) -> Fit:
    """The first form with which no site takes longer than `within_s` for a step; the last, if there is none.

    Args:
        octets: by form, the least lossy first, and site, those of one step.
        rates: by site, octets per second.
    """
    fits = []
    for form, sizes in octets.items():
        seconds = {site: count / rates[site] for site, count in sizes.items()}
        slowest = max(seconds, key=seconds.__getitem__)
        fits.append(Fit(form, slowest, seconds[slowest]))
    return next((fit for fit in fits if fit.seconds <= within_s), fits[-1])


def step_octets(job: Job, seats: Sequence[Seat], form: str | None) -> int:
    """Octets of the tensors of one step, at a site that fills these seats for the whole batch."""
    return body_bytes(seat_descriptors(replace(job, activations=form), seats))


def in_words(rates: Mapping[str, LinkRate]) -> str:
    """All links in a line."""
    return "; ".join(f"{site} {rate}" for site, rate in rates.items())


def _short(value: float) -> str:
    """Two digits, or all before the point."""
    return f"{value:.0f}" if value >= 10 else f"{value:.2g}"
