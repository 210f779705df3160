"""One patient segmented: what sites compute of it, and what the decoder makes of that (SP-11.19)."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import secrets
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from splitpeer.coordinator.exclusion import Exclusion
from splitpeer.coordinator.inference.consent import LateConsent
from splitpeer.coordinator.inference.late_sites import LEFT_OUT_S, LateSites
from splitpeer.coordinator.inference.locating import (
    AWAY,
    Again,
    Answer,
    Locator,
    NoSegmentation,
    check_seats,
    each,
    fitting,
    locating,
    seated,
    seats_of_a_site,
    unfilled,
)
from splitpeer.coordinator.inference.requests import InferenceRequest
from splitpeer.coordinator.inference.site import hear_out, infer
from splitpeer.coordinator.memory import SiteRestarted
from splitpeer.coordinator.prediction import predicted
from splitpeer.coordinator.remote_site import RemoteSite, Sent
from splitpeer.coordinator.run import Arrived, Run
from splitpeer.coordinator.settling import Settling
from splitpeer.daemon import happenings as h
from splitpeer.data.task import Task
from splitpeer.errors import DeadlinePassed, JobFailed, PeerError, told_of
from splitpeer.federation.inference import Volume, questions, task_on_wire, windows_of
from splitpeer.federation.seating import Parts
from splitpeer.federation.terms import window_of
from splitpeer.ranks.group import RankLost
from splitproto import SplitprotoError
from splitproto.errors import printable
from splitproto.messages import Forward, Segmented, Unsegmented, Withdraw
from splitproto.records import Missing, Patient, Sample
from splitproto.tensors import Array

log = logging.getLogger(__name__)

ATTEMPTS = 4
"""How often a request is begun again because a site that took part does not any more."""
NOT_FINITE = "what it sent are not finite numbers"
"""Why a site takes no part in a request any more."""
SETTLE_S = 10.0
"""What was announced to a site when a request ends is waited for so long; then its link ends, and it owes nothing."""


@dataclass(frozen=True)
class Prepared:
    """A segmentation before it is computed."""

    grid: Patient
    """The asking site's."""
    missing: tuple[Missing, ...]
    forwards: Sequence[Forward]
    """The windows, batch by batch."""
    predicted: Callable[[int], Awaitable[np.ndarray]]
    """By index of a batch: float32 [B, channels, *spatial]; in order."""


class PatientSegmenter:
    """Segments with one run's weights and sites.

    Args:
        run: the run.
        task: what is segmented.
        reachable: brings a site to where it can be asked; says why not, or nothing.
    """

    def __init__(self, run: Run, task: Task, reachable: Callable[[RemoteSite], Awaitable[str]]) -> None:
        self._run, self._task = run, task
        self._window = window_of(run.job)
        # SP-11.19-8: "a number that the run never repeats", whatever processes there were before.
        self._last = secrets.randbits(48)
        self._model: tuple[int, bytes] = (-1, b"")
        self._late_sites = LateSites()
        self._asked: set[RemoteSite] = set()
        """Sites that were asked for the present request."""
        self._late: set[RemoteSite] = set()
        """Those of them that it waited for in vain."""
        self._report = run.report
        self._exclusion = Exclusion(run)
        self._consent = LateConsent(run, self._exclusion)
        self._locator = Locator(run, reachable, self._ask, self._late_sites, self._consent)
        self.settling = Settling(run)

    async def heed(self) -> None:
        """Between requests, before anything is made of what sites sent before: what is kept of patients who have
        withdrawn consent goes.

        Raises:
            DiskTrouble, ConfigError: something is left; the next start removes it.
            DataError: a file of what is kept is damaged.
        """
        if news := self._consent.news(self._dropped()):
            await self._forget(news)
        # Only now: what a full disk kept is to be removed yet.
        self._consent.done()

    def _dropped(self) -> frozenset[bytes]:
        """Patients whom people have dropped from what is kept."""
        return frozenset()

    async def _forget(self, news: Mapping[str, frozenset[bytes]]) -> None:
        """By the site that says so, patients of whom nothing is to be kept."""
        await self._consent.heed(news)

    async def clear_up(self) -> None:
        """Between requests: what was kept long enough goes."""

    async def segment(
        self, request: InferenceRequest, progress: Callable[[int, int], None]
    ) -> Segmented | Unsegmented:
        """What comes of a request; whatever goes wrong is said in it.

        Args:
            progress: told how many windows are done, and how many there are.

        Raises:
            RankLost: of the coordinator's own; no request can be served.
        """
        self._asked, self._late = set(), set()
        try:
            outcome = await self._in_time(request, progress)
        finally:
            self._judge_sites()
        await self.settling.end()
        return outcome

    def _judge_sites(self) -> None:
        now = asyncio.get_running_loop().time()
        for site in self._asked:
            if site not in self._late:
                self._late_sites.note_in_time(site.name)
            elif self._late_sites.note_late(site.name, now):
                self._report(h.SiteTooLate(site.name, LEFT_OUT_S))

    async def _in_time(
        self, request: InferenceRequest, progress: Callable[[int, int], None]
    ) -> Segmented | Unsegmented:
        settings = self._run.settings.inference
        deadline_s = settings.deadline_s if settings is not None else 0.0
        try:
            async with self._deadline(deadline_s):
                return await self._segment(request, progress)
        except TimeoutError:
            code, reason = "deadline", f"it took longer than {deadline_s:g} s ([inference] deadline_s)"
        except NoSegmentation as ended:
            code, reason = ended.code, ended.reason
        except RankLost:
            # Nothing can be computed before a new start: who waits is served then.
            raise
        except (PeerError, SplitprotoError) as error:
            # What others are told names no file, so this log has the rest.
            log.warning("a segmentation for %s failed: %s", request.site, printable(str(error)))
            code, reason = "failed", f"the coordinator failed: {told_of(error)}; see its log"
        return Unsegmented(request.asked.request, code, printable(reason)[:500])

    def _deadline(self, seconds: float) -> asyncio.Timeout:
        return asyncio.timeout(seconds)

    async def _segment(self, request: InferenceRequest, progress: Callable[[int, int], None]) -> Segmented:
        lost: dict[str, str] = {}
        forgot: SiteRestarted | None = None
        await self.settling.begin()
        for _ in range(ATTEMPTS):
            try:
                return await self._attempt(request, progress, lost)
            except Again as again:
                await self._quiet()
                if again.forgot is not None:
                    forgot = again.forgot
            except BaseException:
                # Cancelled, too late, or no use: nobody shall compute on.
                await asyncio.shield(self._quiet())
                raise
        if forgot is not None:
            # During training, all go back for it.
            raise forgot
        raise NoSegmentation("site-lost", "sites that have images of the patient went away again and again")

    async def _quiet(self) -> None:
        """Of this request, no site owes anything any more."""
        await asyncio.gather(*(self._settle(site) for site in self._asked if site.here and site.asked_ahead))

    async def _settle(self, site: RemoteSite) -> None:
        """Have a site owe nothing: it said all, or it dials again."""
        try:
            async with asyncio.timeout(SETTLE_S):
                if self._run.job.frozen:
                    # There is no `advance` to make it void.
                    await hear_out(site)
                else:
                    await site.advance(self._run.committed)
        except (TimeoutError, PeerError, SplitprotoError, SiteRestarted):
            site.redial("a request was given up, and what was announced for it did not come")

    async def _attempt(
        self,
        request: InferenceRequest,
        progress: Callable[[int, int], None],
        lost: dict[str, str],
    ) -> Segmented:
        run, asked = self._run, request.asked
        made = await self._prepared(request, lost)
        total = sum(len(forward.samples) for forward in made.forwards)
        volume, done = Volume(made.grid.shape, self._window), 0
        for index, forward in enumerate(made.forwards):
            self._check_cancelled(request)
            progress(done, total)
            probabilities = await made.predicted(index)
            await run.computed(volume.add, forward.samples, probabilities, what="windows of a patient")
            done += len(forward.samples)
        progress(done, total)
        tensors = await run.computed(self._result, volume, asked.want, what="the segmentation")
        model, task = await self._digest(), task_on_wire(self._task)
        seats = run.seating.seats.seats
        return Segmented(asked.request, run.committed, model, seats, made.missing, made.grid, task, tensors)

    async def _prepared(self, request: InferenceRequest, lost: dict[str, str]) -> Prepared:
        """Who takes part, and what each is asked.

        Args:
            lost: sites that cannot take part any more, and why; more are noted in it.

        Raises:
            NoSegmentation: there will be none.
            Again: a site cannot take part any more.
        """
        run, key = self._run, request.asked.key
        sites = await self._locator.locate(request, lost)
        grid = fitting(request, sites, self._octets_per_voxel(request.asked.want))
        self._consent.note_located(sites.grids(), key)
        lists = {site.name: {key: seats_of_a_site(site, patient)} for site, patient in sites.located.items()}
        seating = seated(run, key, lists)
        missing = unfilled(key, seating, sites)
        check_seats(run, request.asked.require, seating.filled.get(key, {}), missing)
        users = [site for site in sites.located if site.name in seating.filled[key].values()]
        forwards = questions("infer", run.committed, self._windows(key, grid), self._number)
        parts = {site: Parts(forwards, partial(seating.part, site.name, lists[site.name])) for site in users}

        async def answered(index: int) -> np.ndarray:
            until = min(index + run.settings.training.ahead, len(forwards))
            self.settling.note_asked()
            answers = await self._ask(
                {site: infer(site, parts[site], index, until, locating(request)) for site in users}
            )
            arrived = self._told_apart(answers, lost)
            samples = len(forwards[index].samples)
            probabilities = await self._predicted(
                arrived, samples, lost, f"batch {index} of a patient's windows"
            )
            request.windows += samples
            return probabilities

        return Prepared(grid, missing, forwards, answered)

    def _windows(self, key: bytes, grid: Patient) -> list[tuple[Sample, ...]]:
        """That cover a patient's volume, batch by batch."""
        return windows_of(key, grid.shape, self._window, *self._run.settings.windows_of_inference())

    @staticmethod
    def _check_cancelled(request: InferenceRequest) -> None:
        if request.cancelled:
            raise NoSegmentation("cancelled", "cancelled, as it was asked for")

    def _octets_per_voxel(self, want: str) -> int:
        return len(self._task.regions) if want == "mask" else 4 * self._task.channels

    # --- what they compute -------------------------------------------------------------------------------

    async def _ask(
        self, questions: Mapping[RemoteSite, Awaitable[Answer]]
    ) -> dict[RemoteSite, Answer | Exception]:
        """See `each`; who is waited for in vain is noted, unless it is all of several: then it is not the sites."""
        self._asked |= questions.keys()
        waited = set(questions)

        async def answered(site: RemoteSite, question: Awaitable[Answer]) -> Answer:
            answer = await question
            waited.discard(site)
            return answer

        late: set[RemoteSite] | None = None
        try:
            found = await each({site: answered(site, question) for site, question in questions.items()})
            late = {site for site, answer in found.items() if isinstance(answer, DeadlinePassed)}
            return found
        finally:
            late = waited if late is None else late
            if len(late) < len(questions) or len(questions) == 1:
                self._late |= late

    def _number(self) -> int:
        self._last += 1
        return self._last

    def _told_apart(self, answers: Mapping[RemoteSite, object], lost: dict[str, str]) -> Arrived:
        """Raises Again: somebody has no activations, and is out."""
        arrived = {site: answer for site, answer in answers.items() if isinstance(answer, Sent)}
        if len(arrived) < len(answers):
            raise Again(told_lost(answers, lost))
        return arrived

    async def _predicted(self, arrived: Arrived, samples: int, lost: dict[str, str], what: str) -> np.ndarray:
        run = self._run
        try:
            found: np.ndarray = await run.computed(predicted, run, arrived, samples, what=what)
        except JobFailed:
            culprit = await run.computed(run.culprit, arrived, what="the activations to be checked")
            if culprit is None or run.job.fusion is not None:
                raise
            lost[culprit[0].name] = NOT_FINITE
            raise Again from None
        return found

    def _result(self, volume: Volume, want: str) -> dict[str, Array]:
        merged = volume.probabilities()
        if want == "probabilities":
            return {want: merged}
        return {want: self._task.decide(merged).astype(np.uint8)}

    async def _digest(self) -> bytes:
        """Of the decoder's tensors, by name; no file has this digest."""
        run = self._run
        if self._model[0] != run.committed:
            self._model = (run.committed, await run.computed(self._hashed, what="a digest of the weights"))
        return self._model[1]

    def _hashed(self) -> bytes:
        digest = hashlib.sha256()
        tensors, _ = self._run.half.state()
        for name, tensor in sorted(tensors.items()):
            if name.startswith("model/"):
                digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
                digest.update(tensor.cpu().contiguous().numpy().tobytes())
        return digest.digest()


def told_lost(answers: Mapping[RemoteSite, object], lost: dict[str, str]) -> SiteRestarted | None:
    """Notes which sites cannot take part any more, and why; returns that one came back without its memory."""
    forgot = None
    for site, answer in answers.items():
        if isinstance(answer, Withdraw):
            # SP-11.19-9.
            lost[site.name] = answer.patients[0].cause
        elif isinstance(answer, SiteRestarted):
            forgot = answer
        elif not isinstance(answer, Sent):
            lost[site.name] = AWAY
    return forgot
