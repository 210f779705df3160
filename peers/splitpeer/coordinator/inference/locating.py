"""Who has a patient, whether their images fit together, and who fills which seat (SP-11.19-4 to SP-11.19-7)."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

from splitpeer.coordinator.inference.consent import LateConsent
from splitpeer.coordinator.inference.late_sites import LateSites
from splitpeer.coordinator.inference.requests import InferenceRequest
from splitpeer.coordinator.inference.site import locate
from splitpeer.coordinator.memory import SiteRestarted
from splitpeer.coordinator.remote_site import RemoteSite
from splitpeer.coordinator.run import Run
from splitpeer.data.geometry import Geometry, differences
from splitpeer.data.rules import MAX_VOXELS
from splitpeer.errors import DeadlinePassed, JobFailed
from splitpeer.federation.seating import Lists, Seating
from splitpeer.logs import handle
from splitproto import SplitprotoError
from splitproto.causes import CONSENT, OF_A_PATIENT
from splitproto.errors import printable
from splitproto.messages import Locate, Located
from splitproto.records import Missing, Patient

log = logging.getLogger(__name__)

AWAY = "its site is away"
LATE = "it kept earlier requests waiting too long"
NO_PART = "it takes no part in inference"
REFUSED = "its policy refuses"
NOT_OF_THE_PATIENT = {cause: cause for cause in (AWAY, LATE, NO_PART)} | {"refused": REFUSED}
"""Causes that say nothing of a patient, in the words that another site is told."""
NO_IMAGE = "no image that can be used"
"""All that another site is told where the cause is of the patient."""
Answer = TypeVar("Answer")


class NoSegmentation(Exception):
    """The request has no segmentation.

    Args:
        code: of `unsegmented`.
        reason: one line for people.
    """

    def __init__(self, code: str, reason: str) -> None:
        super().__init__(reason)
        self.code, self.reason = code, reason


class Again(Exception):
    """A site that took part cannot any more: the others have to be asked again.

    Args:
        forgot: one came back without its memory.
    """

    def __init__(self, forgot: SiteRestarted | None = None) -> None:
        super().__init__()
        self.forgot = forgot


@dataclass
class Sites:
    """Who takes part in a request."""

    causes: dict[str, str] = field(default_factory=dict)
    """Why a site does not."""
    located: dict[RemoteSite, Patient] = field(default_factory=dict)

    def grids(self) -> dict[str, Geometry]:
        """By site, those of the patient's images."""
        return {
            site.name: Geometry(p.shape, p.spacing, p.directions, p.origin, p.stored)
            for site, p in self.located.items()
        }


class Ask(Protocol):
    """Asks several sites at once; the answer of each, or its error."""

    async def __call__(
        self, questions: Mapping[RemoteSite, Awaitable[Answer]], /
    ) -> dict[RemoteSite, Answer | Exception]: ...


class Locator:
    """Asks the sites of a run who has a patient.

    Args:
        run: the run.
        reachable: brings a site to where it can be asked; says why not, or nothing.
        ask: puts questions to sites.
        late: sites that are left out for a while.
        consent: told who has withdrawn it.
    """

    def __init__(
        self,
        run: Run,
        reachable: Callable[[RemoteSite], Awaitable[str]],
        ask: Ask,
        late: LateSites,
        consent: LateConsent,
    ) -> None:
        self._run, self._reachable, self._ask = run, reachable, ask
        self._late, self._consent = late, consent

    async def locate(
        self, request: InferenceRequest, lost: Mapping[str, str], some: Collection[str] | None = None
    ) -> Sites:
        """SP-11.19-4: every site that can take part is asked, the asking one included.

        Args:
            some: only these.
        """
        found, now = Sites(dict(lost)), asyncio.get_running_loop().time()
        request.causes = found.causes
        left = []
        for site in self._run.team.sites:
            if site.name in lost or not (some is None or site.name in some):
                continue
            if self._late.includes(site.name, now):
                found.causes[site.name] = LATE
            else:
                left.append(site)
        causes = await each({site: self._reachable(site) for site in left})
        ready = []
        for site, cause in causes.items():
            if cause == "":
                ready.append(site)
                continue
            if cause not in NOT_OF_THE_PATIENT:
                log.warning("%s cannot be asked for a segmentation: %s", site.name, cause)
            found.causes[site.name] = NO_PART if cause == NO_PART else AWAY
        answers = await self._ask({site: locate(site, locating(request)) for site in ready})
        for site, answer in answers.items():
            if isinstance(answer, Located) and answer.patient is not None:
                found.located[site] = answer.patient
            elif isinstance(answer, Located):
                found.causes[site.name] = answer.cause or "absent"
                if answer.cause == CONSENT:
                    self._consent.note(site.name, request.asked.key)
            elif isinstance(answer, SiteRestarted):
                raise Again(answer)
            else:
                found.causes[site.name] = AWAY
        return found


def fitting(request: InferenceRequest, sites: Sites, octets_per_voxel: int) -> Patient:
    """The asking site's grid, which is that of all others.

    Args:
        octets_per_voxel: of what is asked for.

    Raises:
        NoSegmentation: it has no image of the patient, or the grids differ.
    """
    asker = next((site for site in sites.located if site.name == request.site), None)
    if asker is None:
        # SP-11.19-5.
        raise _not_at_the_asker(request.site, sites.causes.get(request.site, AWAY))
    grids, own = sites.grids(), sites.located[asker]
    if not seats_of_a_site(asker, own):
        # SP-11.19-5: "nobody is sent a mask of a patient of whom it has no image".
        raise _not_at_the_asker(request.site, "absent")
    for name, other in grids.items():
        # SP-11.19-6.
        if found := differences(grids[request.site], other):
            # The grid of another site's image is not the asking site's to know.
            log.warning(
                "patient %s: images at %s and %s differ in %s",
                handle(request.asked.key), request.site, name, "; ".join(found),
            )  # fmt: skip
            raise NoSegmentation(
                "misaligned",
                f"the image of the patient at {name} is on another grid than that at {request.site}: bring "
                "all to one grid; the coordinator's log says what differs",
            )
    octets = math.prod(own.shape) * octets_per_voxel
    # Before memory is taken: the result must fit one message, and the volume this coordinator.
    if math.prod(own.shape) > MAX_VOXELS or octets > asker.takes:
        raise NoSegmentation(
            "too-large", f"a volume of {'x'.join(map(str, own.shape))} voxels is too large to segment"
        )
    return own


def seated(run: Run, key: bytes, lists: Mapping[str, Lists]) -> Seating:
    """SP-11.19-7: as the run's own matching has it, else the first site by name that has a seat."""
    known = run.seating.filled.get(key, {})
    names = run.seating.seats
    filled = {}
    for seat in names.names:
        having = [site for site in names.sites(seat) if seat in lists.get(site, {}).get(key, ())]
        if having:
            filled[seat] = known[seat] if known.get(seat) in having else having[0]
    return Seating(run.job, names, {key: filled})


def unfilled(key: bytes, seating: Seating, sites: Sites) -> tuple[Missing, ...]:
    """The seats that nobody fills, and why."""
    filled = seating.filled.get(key, {})
    return tuple(
        Missing(seat, printable(told_of_others(seating.seats.sites(seat), sites))[:200])
        for seat in seating.seats.names
        if seat not in filled
    )


def check_seats(run: Run, require: int | None, filled: Mapping[str, str], missing: Sequence[Missing]) -> None:
    """Raises NoSegmentation: too few."""
    every = len(filled) + len(missing)
    # SP-11.18-14: a sum is one of all its parties.
    least = every if run.job.fusion is not None else min(require or 1, every)
    if len(filled) < max(1, least):
        told = "; ".join(f"{one.seat}: {one.cause}" for one in missing)
        raise NoSegmentation("few-seats", f"{len(filled)} of {every} seats, {least} are required ({told})")


def locating(request: InferenceRequest) -> Locate:
    """The question where its patient is."""
    return Locate(request.asked.request, request.asked.key, request.site)


def seats_of_a_site(site: RemoteSite, patient: Patient) -> tuple[str, ...]:
    """Names of the seats that a site has located the patient for."""
    places = range(len(site.seats)) if patient.seats is None else patient.seats
    return tuple(site.seats[place].name for place in places if place < len(site.seats))


def told_of_others(fillers: Sequence[str], sites: Sites) -> str:
    """SP-11.19-7: of other sites, nothing of the patient but that there is no image."""
    told = {name: NOT_OF_THE_PATIENT.get(sites.causes.get(name, "absent"), NO_IMAGE) for name in fillers}
    return "; ".join(f"{name}: {why}" for name, why in told.items()) or "no site fills it"


def in_words(cause: str) -> str:
    """A cause for people at the coordinator, or at the site itself."""
    known = {"absent": "no image of the patient", "refused": REFUSED}
    return known.get(cause) or OF_A_PATIENT.get(cause, cause)


def _not_at_the_asker(site: str, cause: str) -> NoSegmentation:
    if cause in ("absent", "refused"):
        return NoSegmentation(cause, f"{site}: {in_words(cause)}")
    return NoSegmentation("unusable" if cause in OF_A_PATIENT else "site-lost", f"{site}: {in_words(cause)}")


async def each(asked: Mapping[RemoteSite, Awaitable[Answer]]) -> dict[RemoteSite, Answer | Exception]:
    """All at once; where one fails, its error. A defect is raised."""
    tasks = {site: asyncio.ensure_future(_awaited(question)) for site, question in asked.items()}
    try:
        if tasks:
            await asyncio.wait(tasks.values())
        found: dict[RemoteSite, Answer | Exception] = {}
        for site, task in tasks.items():
            error = task.exception()
            if error is None:
                found[site] = task.result()
            elif isinstance(error, DeadlinePassed | JobFailed | SiteRestarted | SplitprotoError):
                found[site] = error
            else:
                raise error
        return found
    finally:
        for task in tasks.values():
            task.cancel()
        await asyncio.gather(*tasks.values(), return_exceptions=True)


async def _awaited(question: Awaitable[Answer]) -> Answer:
    return await question
