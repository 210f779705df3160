"""The service: takes what sites ask for, works on one request after the other, and sends the outcome to who asked."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Coroutine, Mapping
from typing import Any

from splitpeer.coordinator.inference.locating import AWAY, NO_PART, in_words
from splitpeer.coordinator.inference.requests import InferenceRequest, RequestChange, Requests, RequestState
from splitpeer.coordinator.inference.segmenting import PatientSegmenter
from splitpeer.coordinator.inference.tally import GIVEN_UP, OUTCOMES, RequestTally
from splitpeer.coordinator.memory import SiteRestarted
from splitpeer.coordinator.remote_site import RemoteSite
from splitpeer.coordinator.run import Run
from splitpeer.daemon import happenings as h
from splitpeer.data.task import Task
from splitpeer.errors import PeerError
from splitpeer.logs import handle
from splitpeer.settings.job import Inference
from splitproto import SplitprotoError
from splitproto.clock import patiently
from splitproto.messages import Cancel, Message, Segment, Segmenting, Unsegmented

LOOK_S = 1.0
"""Between two looks at requests whose sites are away."""
TELL_S = 0.5
"""Between two messages about how far a request is."""


class Service:
    """Inference of one run.

    Args:
        run: the run.
        settings: [inference].
        task: what is segmented.
        make: makes what segments, of run, task and what reaches a site; None: `PatientSegmenter`.
    """

    def __init__(
        self,
        run: Run,
        settings: Inference,
        task: Task,
        make: Callable[..., PatientSegmenter] | None = None,
    ) -> None:
        self._run, self._settings = run, settings
        self._report = run.report
        self._sites = {site.name: site for site in run.team.sites}
        self._requests = Requests(settings.max_queue)
        self._tally = RequestTally(run.files.checkpoints)
        self._segmenter = (make or PatientSegmenter)(run, task, self._reachable)
        self._changed = asyncio.Event()
        self._sending: set[asyncio.Task[None]] = set()
        self._delivering: set[InferenceRequest] = set()
        self._told_at = float("-inf")
        self._began = float("-inf")
        self._last_here: dict[str, float] = {}
        self._serving = False
        self._not_before = float("-inf")
        for site in run.team.sites:
            site.requests = self._hearing(site)

    # --- what sites say ----------------------------------------------------------------------------------

    def wake(self) -> None:
        """Something has changed: a site has joined, or the service is to end."""
        self._changed.set()
        self._show()

    def _hearing(self, site: RemoteSite) -> Any:
        async def hear(message: Message) -> None:
            if isinstance(message, Segment):
                await self._take(site, message)
            elif isinstance(message, Cancel):
                self._cancel(site, message)

        return hear

    async def _take(self, site: RemoteSite, asked: Segment) -> None:
        """SP-11.19-2."""
        known = self._requests.find(site.name, asked.request)
        if known is None:
            request = InferenceRequest(site.name, asked, since=self._now())
            if not self._requests.add(request):
                reason = (
                    f"{self._settings.max_queue} requests of {site.name} wait already ([inference] max_queue)"
                )
                self._count(site.name, "busy")
                await site.tell(Unsegmented(asked.request, "busy", reason))
                return
            self._show()
            await self._tell_place(request)
            self._changed.set()
        elif known.asked != asked:
            self._count(site.name, "refused")
            await site.tell(Unsegmented(asked.request, "refused", "another request has this id"))
        elif known.state is RequestState.ANSWERED:
            self._deliver(known)
        else:
            await self._tell_place(known)

    def _cancel(self, site: RemoteSite, message: Cancel) -> None:
        request = self._requests.find(site.name, message.request)
        if request is None:
            return
        request.cancelled = True
        if request.state is RequestState.QUEUED:
            patient = handle(request.asked.key)
            self._report(
                h.SegmentationCancelled(self._run.files.run.hex(), message.request.hex(), patient, site.name)
            )
            self._end(request, Unsegmented(message.request, "cancelled", "cancelled, as it was asked for"))
        elif request.state is RequestState.ANSWERED:
            self._lapse(request)

    # --- work --------------------------------------------------------------------------------------------

    async def serve(self) -> None:
        """When the run is complete: until it is draining."""
        run = self._run
        self._serving, self._began = True, self._now()
        for site in run.team.sites:
            site.set_committed(0 if run.job.frozen else run.committed)
        await self._segmenter.settling.trained()
        run.report(h.PhaseBegan("serving"))
        self._report(h.ServiceBegan(run.job.name, run.files.run.hex(), run.committed))
        self._show()
        try:
            while not run.draining:
                self._changed.clear()
                self._tidy()
                await self._welcome()
                await self._segmenter.heed()
                await self._segmenter.clear_up()
                await self._keep_counts()
                request = self._requests.next(self._takes_on)
                if request is not None:
                    await self._work(request)
                elif not run.draining:
                    await self._wait()
        finally:
            self._tally.flush()
            for task in list(self._sending):
                task.cancel()
            await asyncio.gather(*self._sending, return_exceptions=True)

    @property
    def wanted(self) -> bool:
        """Whether a request is to be worked on before the next step of the training."""
        # Inclusive of the time in which the training may not be held up again.
        if self._settings.serve != "always" or self._run.committed == 0 or self._now() < self._not_before:
            return False
        return any(one.state is RequestState.QUEUED and self._takes_on(one.site) for one in self._requests)

    def _takes_on(self, name: str) -> bool:
        """Whether a site is here and has taken what was computed for it: results may not pile up."""
        return self._sites[name].here and not any(one.site == name for one in self._delivering)

    async def serve_one(self) -> None:
        """Between two steps: one request, with the weights of the committed step.

        Raises:
            SiteRestarted: a site came back without its memory; the request waits until all went back.
        """
        self._tidy()
        await self._keep_counts()
        request = self._requests.next(self._takes_on)
        if request is None:
            return
        began, share = self._now(), self._settings.share
        self._run.report(h.PhaseBegan("segmenting"))
        try:
            await self._work(request)
        finally:
            now = self._now()
            self._not_before = now + (now - began) * (1 - share) / share

    async def _wait(self) -> None:
        try:
            async with asyncio.timeout(LOOK_S):
                await self._changed.wait()
        except TimeoutError:
            return

    async def _welcome(self) -> None:
        """Sites that have joined are brought to where they may ask."""
        await asyncio.gather(*(self._bring(site) for site in self._run.team.sites if site.here))

    async def _bring(self, site: RemoteSite) -> str:
        """Why the site cannot be asked; empty: it can."""
        run = self._run
        if run.job.fusion is not None and not all(other.here for other in run.team.sites):
            # SP-11.18-7: nobody works before the keys of all parties are here.
            return AWAY
        try:
            # SP-11.17-1: the weights of frozen encoders are those of step 0.
            step = 0 if run.job.frozen else run.committed
            await site.bring(step, len(run.seating.filled), count_on=not run.team.all_needed)
        except (PeerError, SplitprotoError, SiteRestarted) as error:
            return str(error)
        return ""

    async def _reachable(self, site: RemoteSite) -> str:
        """Wait for a site that was here just now, and bring it to the step; why it cannot be asked, or nothing."""
        if site.absent and not (self._serving and site.here):
            return AWAY
        if not site.here:
            # SP-11.19-13.
            gone = self._last_here.get(site.name, self._began)
            left = self._run.settings.deadlines.return_s - (self._now() - gone)
            if left > 0:
                joined = asyncio.ensure_future(site.wait_joined())
                try:
                    await patiently((joined,), left)
                finally:
                    joined.cancel()
                    await asyncio.gather(joined, return_exceptions=True)
        if not site.here:
            return AWAY
        if "infer" not in site.features:
            return NO_PART
        return await self._bring(site) if self._serving else ""

    async def _work(self, request: InferenceRequest) -> None:
        run, began = self._run, self._now()
        request.move(RequestChange.TURN, began)
        name, patient = request.asked.request.hex(), handle(request.asked.key)
        waiting = sum(one.state is RequestState.QUEUED for one in self._requests)
        self._report(h.SegmentationBegan(name, patient, request.site, waiting))
        self._show()
        for other in self._requests:
            if other.state is RequestState.QUEUED:
                self._send(self._tell_place(other))
        self._told_at = float("-inf")
        try:
            outcome = await self._segmenter.segment(request, lambda *far: self._tell_progress(request, *far))
        except BaseException:
            request.move(RequestChange.PUT_BACK, self._now())
            self._show()
            raise
        failed = isinstance(outcome, Unsegmented)
        missing = () if isinstance(outcome, Unsegmented) else outcome.missing
        without = {one.seat for one in missing}
        seats = [seat for seat in run.seating.seats.names if seat not in without]
        self._report(
            h.SegmentationServed(
                run.files.run.hex(),
                name,
                patient,
                request.site,
                run.committed,
                outcome.code if isinstance(outcome, Unsegmented) else "segmented",
                "" if failed else ", ".join(seats),
                ", ".join(one.seat for one in missing),
                "; ".join(f"{site}: {in_words(cause)}" for site, cause in request.causes.items()),
                request.windows,
                round(self._now() - began, 3),
            )
        )
        self._end(request, outcome)

    def _end(self, request: InferenceRequest, outcome: Any) -> None:
        request.outcome = outcome
        request.move(RequestChange.OUTCOME, self._now())
        self._count(request.site, outcome.code if isinstance(outcome, Unsegmented) else "segmented")
        for one in self._requests.crowded(request.site):
            self._lapse(one)
        if request.state is RequestState.ANSWERED:
            self._deliver(request)

    def _tidy(self) -> None:
        """SP-11.19-13: requests of sites that did not come back in time."""
        now = self._now()
        for site in self._run.team.sites:
            if site.here:
                self._last_here[site.name] = now
        for request in self._requests:
            waiting_for_it = request.state is RequestState.QUEUED and self._sites[request.site].here
            if waiting_for_it:
                request.since = now
            elif (
                request.state in (RequestState.QUEUED, RequestState.ANSWERED)
                and now - request.since > self._run.settings.deadlines.return_s
            ):
                self._lapse(request)

    def _lapse(self, request: InferenceRequest) -> None:
        unanswered = request.state is RequestState.QUEUED
        request.move(RequestChange.LAPSED, self._now())
        self._requests.remove(request)
        if unanswered:
            self._count(request.site, GIVEN_UP)

    # --- what people are shown ---------------------------------------------------------------------------

    def _count(self, site: str, code: str) -> None:
        self._tally.add(site, code)
        self._show()

    async def _keep_counts(self) -> None:
        if self._tally.due:
            await self._run.on_disk(self._tally.flush, what="counts of requests")

    def _show(self) -> None:
        run, tally = self._run, self._tally
        states = [one.state for one in self._requests]
        waiting, running = states.count(RequestState.QUEUED), states.count(RequestState.WORKING)
        self._report(
            h.RequestsStand(
                run.files.run.hex(),
                run.committed,
                self._serving or (self._settings.serve == "always" and run.committed > 0),
                waiting,
                running,
                tally.ended,
                tally.last,
                self._by_site(),
            )
        )

    def _by_site(self) -> dict[str, Mapping[str, int]]:
        """Of sites that have ever asked: requests that wait, run, and what became of the others."""
        ended = self._tally.by_site
        found: dict[str, Mapping[str, int]] = {}
        for site in sorted({*ended, *(one.site for one in self._requests)}):
            states = Counter(one.state for one in self._requests if one.site == site)
            found[site] = {
                "waiting": states[RequestState.QUEUED],
                "running": states[RequestState.WORKING],
                **ended.get(site, dict.fromkeys(OUTCOMES, 0)),
            }
        return found

    # --- what sites are told -----------------------------------------------------------------------------

    def _deliver(self, request: InferenceRequest) -> None:
        """SP-11.19-3: on the link that the site has now."""
        if request not in self._delivering:
            self._delivering.add(request)
            self._send(self._delivered(request))

    async def _delivered(self, request: InferenceRequest) -> None:
        try:
            sent = request.outcome is not None and await self._sites[request.site].tell(request.outcome)
            if sent and request.state is RequestState.ANSWERED:
                request.move(RequestChange.SENT, self._now())
                self._requests.remove(request)
        finally:
            self._delivering.discard(request)
            self._changed.set()

    async def _tell_place(self, request: InferenceRequest) -> None:
        state = "working" if request.state is RequestState.WORKING else "queued"
        ahead = 0 if state == "working" else self._requests.ahead(request)
        await self._sites[request.site].tell(Segmenting(request.asked.request, state, 0, 0, ahead))

    def _tell_progress(self, request: InferenceRequest, done: int, total: int) -> None:
        now = self._now()
        if now - self._told_at >= TELL_S:
            self._told_at = now
            message = Segmenting(request.asked.request, "working", done, total, 0)
            self._send(self._told(self._sites[request.site], message))

    async def _told(self, site: RemoteSite, message: Message) -> None:
        await site.tell(message)

    def _send(self, sending: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(sending)
        self._sending.add(task)
        task.add_done_callback(self._sending.discard)

    def _now(self) -> float:
        return asyncio.get_running_loop().time()
