"""What people at a site ask for: from the spool to the coordinator, and back.

A request outlives links and processes: what has no answer yet is asked again, under the same id (SP-11.19-2).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Self, TypeVar

import numpy as np

from splitpeer.daemon import happenings as h
from splitpeer.daemon.spool import Spool, Waiting, folder_of
from splitpeer.daemon.spooled import Provenance, SpoolRequest, SpoolResult, Status, TaskForm, now
from splitpeer.data.geometry import Geometry
from splitpeer.data.pseudonym import load_salt, pseudonym
from splitpeer.errors import DataError, DeadlinePassed, sayable
from splitpeer.federation.compute import Compute
from splitpeer.logs import handle
from splitpeer.settings.peer import PeerConfig
from splitpeer.site.inference.tally import SiteTally
from splitpeer.site.job import SiteJob
from splitproto import Session, SplitprotoError
from splitproto.messages import (
    MOST_SEATS_OF_A_JOB,
    Cancel,
    Message,
    Segment,
    Segmented,
    Segmenting,
    Unsegmented,
)
from splitproto.records import TaskTerms

LOOK_S = 0.04
"""Between two looks into the spool: a request waits half of it; each costs 0.2 ms of a core."""
REST_S = 5.0
"""After a look that failed."""
NOTE_S = 0.25
"""Between two lines of progress of one request."""
READ_S = 600.0
"""Looking for a patient's files, at most."""
CAUSES = {
    "refused": "refused",
    "absent": "absent",
    "few-seats": "incomplete",
    "misaligned": "misaligned",
    "unusable": "unusable",
    "site-lost": "lost",
    "too-large": "unusable",
    "busy": "busy",
    "deadline": "deadline",
    "failed": "internal",
}
"""By code of `unsegmented`, the spool's word."""
Returned = TypeVar("Returned")


@dataclass
class _Asked:
    """A request that is taken up."""

    request: SpoolRequest
    key: bytes
    sent_on: Session | None = None
    """The link on which it was sent last."""
    noted: Status | None = None
    noted_at: float = float("-inf")


@dataclass(frozen=True)
class _AskingLink:
    session: Session
    job: SiteJob
    compute: Compute


class InferenceAsker:
    """The requests of one site; a context, in which the spool is watched.

    Args:
        config: the site's `peer.toml`.
        report: told what is asked and what comes of it.
        tally: counts it.
    """

    def __init__(
        self, config: PeerConfig, report: h.Reporter | Callable[[h.Happening], None], tally: SiteTally
    ) -> None:
        self._spool = Spool(folder_of(config.peer.state))
        self._salt = load_salt(config.data.salt) if config.data.salt is not None else b""
        self._report, self.tally = report, tally
        self._link: _AskingLink | None = None
        self._asked: dict[str, _Asked] = {}
        # The spool is files: one thread, and never the one that computes.
        self._thread = ThreadPoolExecutor(1, "spool")
        self._watching: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        """Raises ConfigError, DiskTrouble: see `Spool.open`."""
        await self._on_disk(self._spool.open)
        self._watching = asyncio.create_task(self._watch())
        self._tell_counts()
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.gather(self._watching, return_exceptions=True)
        self._thread.shutdown()

    def link(self, session: Session, job: SiteJob, compute: Compute) -> None:
        """Work has begun on a link: requests go out on it.

        Args:
            compute: looks for patients' files.
        """
        self._link = _AskingLink(session, job, compute)
        self.tally.link(_served(session))
        self._tell_counts()

    def unlink(self) -> None:
        """The link is over."""
        self._link = None
        self.tally.link(None)
        self._tell_counts()

    def owns(self, request: bytes, key: bytes) -> bool:
        """Whether a request about this patient is one of these."""
        asked = self._asked.get(request.hex())
        return asked is not None and asked.key == key

    async def hear(self, message: Message) -> None:
        """What the coordinator says of a request. Of one that is not known, nothing is believed."""
        match message:
            case Segmenting(request=request):
                await self._note_progress(request.hex(), message)
            case Segmented(request=request) if (asked := self._asked.get(request.hex())) is not None:
                await self._deliver(asked, message)
            case Unsegmented(request=request) if request.hex() in self._asked:
                # A daemon that cancelled has forgotten the request already.
                await self._fail(request.hex(), CAUSES.get(message.code, "internal"), message.reason)
            case _:
                pass

    # --- the spool -------------------------------------------------------------------------------------

    async def _watch(self) -> None:
        """Nobody awaits this: whatever fails is told, and the spool is looked at again."""
        told = ""
        while True:
            failed = ""
            try:
                await self._look()
            except Exception as error:
                failed = sayable(error)
            if failed and failed != told:
                self._report(h.DataWarning(f"a request for a segmentation has to wait: {failed}"))
            told = failed
            await asyncio.sleep(REST_S if failed else LOOK_S)

    async def _look(self) -> None:
        """Raises what kept a request from being attended to, after all others were."""
        waiting = await self._on_disk(self._spool.waiting)
        for name in self._asked.keys() - {one.id for one in waiting}:
            # The asker has forgotten it.
            await self._drop(name)
        failed: Exception | None = None
        for one in waiting:
            try:
                await self._attend(one)
            except SplitprotoError:
                break  # the link is over: they are asked again on the next one
            except Exception as error:
                failed = error
        if failed is not None:
            raise failed

    async def _attend(self, one: Waiting) -> None:
        """Have a request where it can be. Raises SplitprotoError: the link is over."""
        if one.given_up:
            await self._drop(one.id)
            await self._on_disk(self._spool.give_up, one)
            return
        asked, link = self._asked.get(one.id), self._link
        if asked is not None and link is not None and asked.sent_on is link.session:
            return
        if asked is None:
            asked = self._asked[one.id] = _Asked(one.request, pseudonym(self._salt, one.request.patient))
            self._tell_counts()
        if link is None:
            await self._note(asked, one.id, Status(state="waiting", reason="waits for the coordinator"))
        elif not _served(link.session):
            reason = f"job {link.job.job.name} serves no inference: its job.toml has no [inference]"
            await self._fail(one.id, "not-served", reason)
        elif await self._is_here(link, one.id, asked):
            asked.sent_on = link.session
            require = MOST_SEATS_OF_A_JOB if asked.request.require == "all" else asked.request.require
            run, request = link.job.run.hex(), bytes.fromhex(one.id)
            self._report(h.SegmentationAsked(run, one.id, handle(asked.key)))
            await self._note(asked, one.id, Status(state="waiting", reason="asks the coordinator"))
            await link.session.send(Segment(request, asked.key, asked.request.want, require))

    async def _is_here(self, link: _AskingLink, name: str, asked: _Asked) -> bool:
        """Whether this site has an image of the patient; if not, that is the answer."""
        try:
            here = await link.compute.run(
                link.job.holds, asked.key, what="the patient's files", timeout=READ_S
            )
        except (DataError, DeadlinePassed) as error:
            await self._fail(name, "unusable", str(error))
            return False
        if not here:
            patient = asked.request.patient
            await self._fail(name, "unknown", f"this site has no image of patient {patient}: check the id")
        return bool(here)

    async def _drop(self, name: str) -> None:
        asked, link = self._over(name, "cancelled"), self._link
        if asked is not None and link is not None and asked.sent_on is link.session:
            # With its link, a request is over at the coordinator as well.
            with suppress(SplitprotoError):
                await link.session.send(Cancel(bytes.fromhex(name)))

    # --- answers ---------------------------------------------------------------------------------------

    async def _note_progress(self, name: str, told: Segmenting) -> None:
        asked = self._asked.get(name)
        if asked is None:
            return
        if told.state == "queued":
            status = Status(state="queued", ahead=min(told.ahead, 1 << 48))
        else:
            status = Status(state="working", done=min(told.done, 1 << 48), total=min(told.total, 1 << 48))
        moment = asyncio.get_running_loop().time()
        last = asked.noted is None or asked.noted.state != status.state
        if last or moment - asked.noted_at >= NOTE_S:
            await self._note(asked, name, status)

    async def _note(self, asked: _Asked, name: str, status: Status) -> None:
        if asked.noted == status:
            return
        asked.noted, asked.noted_at = status, asyncio.get_running_loop().time()
        self._tell_counts()
        await self._on_disk(self._spool.note, name, status)

    async def _fail(self, name: str, cause: str, reason: str) -> None:
        self._over(name, "failed")
        self._report(h.SegmentationFailed(name, cause, "" if cause in ("unknown", "unusable") else reason))
        await self._on_disk(self._spool.note, name, Status.failed(cause, reason))

    async def _deliver(self, asked: _Asked, came: Segmented) -> None:
        name, link = came.request.hex(), self._link
        try:
            if link is None:
                raise ValueError("no link")
            result = _result(asked, came, link.job)
            result.check()
        except DataError as error:
            await self._fail(name, "unusable", str(error))
            return
        except ValueError as error:
            reason = f"the coordinator sent no segmentation that fits the request: {error}"
            await self._on_disk(self._spool.note, name, Status.failed("internal", reason))
            self._report(h.SegmentationFailed(name, "internal", reason))
            self._over(name, "failed")
            return
        delivered = await self._on_disk(self._spool.deliver, name, result)
        about = result.provenance
        self._over(name, "segmented" if delivered else "failed")
        if delivered:
            self._report(h.SegmentationCame(about.run, name, about.step, about.used, about.missing))
        else:
            self._report(
                h.SegmentationFailed(name, "disk", "it could not be written, or nobody waits for it")
            )

    # --- counts ----------------------------------------------------------------------------------------

    def _over(self, name: str, outcome: str) -> _Asked | None:
        """Forget a request; None: the asker has forgotten it already, and so it is counted."""
        if (asked := self._asked.pop(name, None)) is not None:
            self.tally.ended(outcome)
            self._tell_counts()
        return asked

    def _tell_counts(self) -> None:
        session = None if self._link is None else self._link.session
        # What a coordinator worked on when its link ended waits to be asked for again.
        running = sum(
            one.noted is not None
            and one.noted.state == "working"
            and session is not None
            and one.sent_on is session
            for one in self._asked.values()
        )
        self.tally.own(len(self._asked) - running, running)

    async def _on_disk(self, function: Callable[..., Returned], *args: object) -> Returned:
        return await asyncio.get_running_loop().run_in_executor(self._thread, function, *args)


def _served(session: Session) -> bool:
    """Whether the job has inference."""
    return "infer" in session.agreement.features


def _result(asked: _Asked, came: Segmented, job: SiteJob) -> SpoolResult:
    """What came, as the spool has it. Raises ValueError: it does not fit what was asked."""
    kind = asked.request.want
    if came.tensors.keys() != {kind}:
        raise ValueError(f"it holds {', '.join(came.tensors)}, not {kind}")
    if came.grid.key != asked.key:
        raise ValueError("it is of another patient")
    values = np.asarray(came.tensors[kind])
    # SP-11.19-11: on the grid that this site told.
    here = job.channels.listed(asked.key)
    if values.shape[1:] != here.shape or came.grid.shape != here.shape:
        raise ValueError(f"it has {values.shape[1:]} voxels, the image {here.shape}")
    grid = Geometry(here.shape, here.spacing, here.directions, here.origin, here.stored)
    missing = tuple(seat.seat for seat in came.missing)
    return SpoolResult(
        Provenance(
            patient=asked.request.patient,
            run=job.run.hex(),
            job=job.job.name,
            step=came.step,
            digest=came.model.hex(),
            used=tuple(seat.name for seat in came.seats if seat.name not in missing),
            missing=missing,
            causes={seat.seat: seat.cause for seat in came.missing},
            modalities={seat.name: tuple(seat.modalities) for seat in came.seats},
            task=_task(came.task),
            affine=tuple(tuple(float(x) for x in row) for row in grid.affine),
            asked=asked.request.created,
            created=now(),
        ),
        kind,
        values,
    )


def _task(told: TaskTerms) -> TaskForm:
    return TaskForm(
        values=tuple((label.value, label.name) for label in told.labels),
        regions=tuple((region.name, region.values, region.title or "") for region in told.regions),
        exclusive=told.exclusive,
        convention=told.convention,
    )
