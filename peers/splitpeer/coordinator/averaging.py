"""The averages of a seat's encoders, made before the steps that ask for one (SP-11.16).

What the sites have shared is kept until the step that follows is committed: where that step is begun again without a
patient or a site, the average is made again without asking.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from splitpeer.coordinator.remote_site import RemoteSite
from splitpeer.coordinator.team import Team
from splitpeer.daemon import happenings as h
from splitpeer.errors import ConfigError
from splitpeer.federation.seats import Seats
from splitpeer.models.registry import averaged_tensors, backbone_of
from splitpeer.training.averaging import average, flaw
from splitpeer.training.split_round import Place
from splitpeer.training.split_step import Arrays
from splitproto.constants import MAX_TENSORS
from splitproto.records import Job
from splitproto.tensors import Descriptor

Counted = tuple[tuple[str, int], ...]
"""The sites of which an average is made, and how many patients each fills."""


class Averaging:
    """The averages of one run.

    Args:
        job: the terms; where they ask for no averages, nothing is done.
        seats: all of the job.
        team: the sites.
        computed: `await computed(function, *args, what=...)` runs it in the compute thread.
        report: called with every average.

    Raises:
        ConfigError: an encoder has more tensors than fit in one message.
    """

    def __init__(
        self,
        job: Job,
        seats: Seats,
        team: Team,
        computed: Callable[..., Awaitable[Any]],
        report: h.Reporter,
    ) -> None:
        self._every, self._seats, self._team = job.average_every, seats, team
        self._computed, self._report = computed, report
        self._expected = _expected(job, seats) if self._every else {}
        self._committed: int | None = None
        self._shared: dict[Place, Arrays] = {}
        self._sent: dict[Place, Counted] = {}

    async def before(self, step: int, patients: Callable[[str, str], int]) -> None:
        """Make the connected sites continue from the averages that belong to `step`, if there are any.

        Args:
            step: the next to be made.
            patients: how many training patients in use a site (first) fills at a seat (second).

        Raises:
            JobFailed: a site that is needed shares weights that cannot be averaged.
        """
        # SP-11.16-1: before steps 1, N + 1, 2 N + 1, ...
        if not self._every or (step - 1) % self._every:
            return
        if self._committed != step - 1:
            self.forget()
            self._committed = step - 1
        made = {}
        for seat in self._seats.names:
            if counted := await self._average(seat, patients):
                made[seat] = [site for site, _ in counted]
        if made:
            self._report(h.SeatsAveraged(step - 1, made))

    def forget(self) -> None:
        """The parties went back: what was shared is not asked for, or is asked for again."""
        self._committed = None
        self._shared.clear()
        self._sent.clear()

    async def _average(self, seat: str, patients: Callable[[str, str], int]) -> Counted:
        """The sites of which a new average was made; none: not needed."""
        latest: Counted = ()
        while True:
            here = self._here(seat)
            if len(here) < 2 and not any(place.seat == seat for place in self._sent):
                return latest
            await self._ask(seat, here)
            sharing = [site for site in self._here(seat) if Place(site.name, seat) in self._shared]
            # SP-11.16-4: in the order of their names.
            counted = tuple((site.name, patients(site.name, seat)) for site in sharing)
            behind = [site for site in sharing if self._sent.get(Place(site.name, seat)) != counted]
            if not behind:
                return latest
            if await self._send(seat, counted, behind):
                latest = counted
            # Who was lost meanwhile is in this average, and must not be: SP-11.16-1.

    async def _ask(self, seat: str, here: Sequence[RemoteSite]) -> None:
        names = {site.name for site in here}
        self._shared = {p: held for p, held in self._shared.items() if p.seat != seat or p.site in names}
        asked = [site for site in here if Place(site.name, seat) not in self._shared]
        step, expected = self._committed or 0, self._expected[seat]
        answers = await self._team.ask_all(lambda site: site.share(step, seat, expected), asked)
        for site, tensors in answers.items():
            if found := flaw(tensors):
                # SP-11.16-3: one site's weights must not break the others' encoders.
                self._team.leave_out(site, f"the encoder of site {site.name} holds {found}")
                continue
            self._shared[Place(site.name, seat)] = tensors

    async def _send(self, seat: str, counted: Counted, behind: Sequence[RemoteSite]) -> bool:
        """Whether there was an average to send, to those who have another or none."""
        step = self._committed or 0
        weights, numbers = [self._shared[Place(name, seat)] for name, _ in counted], [n for _, n in counted]
        total, first = sum(numbers), not any(place.seat == seat for place in self._sent)
        if total:
            mean = await self._computed(average, weights, numbers, what=f"the average of {seat}'s encoders")
        for site in behind:
            self._sent[Place(site.name, seat)] = counted
        if total or not first:
            # Without patients there is no average: each continues from its own weights.
            await self._team.ask_all(
                lambda site: site.average(
                    step, seat, mean if total else self._shared[Place(site.name, seat)]
                ),
                behind,
            )
        return bool(total)

    def _here(self, seat: str) -> list[RemoteSite]:
        fills = self._seats.sites(seat)
        return sorted((site for site in self._team.present if site.name in fills), key=lambda site: site.name)


def _expected(job: Job, seats: Seats) -> dict[str, tuple[Descriptor, ...]]:
    """By seat, the tensors of an encoder."""
    found = {}
    for seat in seats.seats:
        shapes = averaged_tensors(backbone_of(job), len(seat.modalities))
        if len(shapes) > MAX_TENSORS:
            raise ConfigError(
                f"[training] average_every: an encoder of this network has {len(shapes)} tensors, and at most "
                f"{MAX_TENSORS} can be sent at once: take a network with fewer blocks, or average nothing"
            )
        found[seat.name] = tuple(Descriptor(name, "f32", shape) for name, shape in shapes.items())
    return found
