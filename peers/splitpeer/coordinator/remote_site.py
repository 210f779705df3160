"""One site as the coordinator sees it, over all its links: is it here, how far is it, what is it asked next."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import replace
from typing import TypeVar

from splitpeer.coordinator import holder
from splitpeer.coordinator.holder import Seat
from splitpeer.daemon.board import Board
from splitpeer.daemon.witness import Witness
from splitpeer.data.geometry import Geometry, compare_geometry
from splitpeer.errors import DataError, DeadlinePassed, JobFailed
from splitpeer.federation.files import counted
from splitpeer.logs import event
from splitproto import Session, SplitprotoError
from splitproto.admission import Bucket
from splitproto.capture import Party
from splitproto.clock import overslept, patiently
from splitproto.errors import (
    DeadlineExceeded,
    LinkLost,
    LocalError,
    Misaligned,
    SchemaMismatch,
    SecondHolder,
    Superseded,
    UnexpectedMessage,
    printable,
)
from splitproto.messages import (
    Activations,
    Advance,
    Advanced,
    Applied,
    Begin,
    Bye,
    Checkpoint,
    Forward,
    Gradients,
    Inventory,
    JobAccept,
    JobDecline,
    JobOffer,
    Message,
    Rollback,
    RolledBack,
    Saved,
    Unsaved,
    Withdraw,
    Withdrawn,
)
from splitproto.tensors import Array, Descriptor, matches

log = logging.getLogger(__name__)

FAREWELL_S = 5.0
"""How long a site whose link broke at the very end may take to come back and hear that the job is complete."""

REFUSALS_A_SECOND, REFUSALS_AT_ONCE = 0.01, 20.0
"""Lines about links of one site that did not join, whatever the other side makes them say."""
RESTARTS = 10
"""So often since its last checkpoint a site may restart, and make all go back; then it is a failure."""

Answer = TypeVar("Answer")
Heard = TypeVar("Heard", bound=Message)


class SiteRestarted(Exception):
    """A site came back without its memory: everybody must go back to a common checkpoint."""


class Site:
    """One site of the job, over all its links.

    The coordinator's loop calls the verbs one after the other. A verb that loses its link waits for the site
    to come back, at most `patience_s`, and asks again.

    Args:
        name: as in its certificate.
        offer: the job, with its modality.
        patience_s: how long it may be away.
        witness: told of its links and of what it announces.
        board: told what it does and what it is waited for.
        salt_check: of the coordinator's salt, from which the keys of its masks are made.

    Every verb raises, beside what it names:
        SiteRestarted: it came back without its memory.
        DeadlinePassed: it did not answer, or not come back, in time.
        JobFailed: it declined the job, broke the protocol or failed for good.
    """

    def __init__(
        self,
        name: str,
        offer: JobOffer,
        patience_s: float,
        witness: Witness,
        board: Board,
        salt_check: bytes,
    ) -> None:
        self.name, self.modality = name, offer.modality
        self.party = Party(name, offer.modality)
        """What it announced last."""
        self.features: frozenset[str] = frozenset()
        """Agreed on its newest link."""
        self.applied = 0
        """Last step that it is known to have applied, or to have advanced to."""
        self.checkpoints: tuple[int, ...] = ()
        self.patients: dict[bytes, Geometry] = {}
        self.unusable: dict[bytes, str] = {}
        """Patients whose files it said, on joining, that it cannot use, and why."""
        self.absent = ""
        """Why the run goes on without it; empty: it does not."""
        self.restarts = 0
        """Of this site, since the last checkpoint that it wrote with the others; so are the two that follow."""
        self.losses = 0
        self.unsaved = 0
        self._octets_in = 0
        self._octets_out = 0
        self._offer, self._job, self._witness, self._board = offer, offer.job, witness, board
        self._patience_s, self._salt_check = patience_s, salt_check
        self.seat = Seat(name, witness.note)
        """Who holds its part in the run."""
        self._session: Session | None = None
        self._joining: dict[Session, bool] = {}  # links that have not joined; whether they are the holder's
        self._incarnation = b""
        self._restarted = False
        self._lost_at = 0  # `applied` when it restarted
        self._undone: int | None = None  # a rollback to here happened while it was absent
        self._joined = asyncio.Event()
        self._begun = False
        self._sent = 0  # forwards of the present stream that went out on the present link
        self._stream: object = None
        self._base = (0, 0)
        self._expected: dict[bytes, Geometry] | None = None
        self._withdrawn: Sequence[Withdrawn] = ()
        self._failure: Exception | None = None
        self.refusal = ""
        """Why it did not join when it dialled last; empty: it did, or has not dialled."""
        self._watching: asyncio.Task[None] | None = None
        self._refusals = Bucket(REFUSALS_A_SECOND, REFUSALS_AT_ONCE, time.monotonic())
        self._reported: Session | None = None  # the link whose loss the log has already
        board.site(name, modality=self.modality, state="awaited")

    # --- joining ---------------------------------------------------------------------------------------

    async def join(self, session: Session) -> None:
        """Offer the job on a new link and hear what the site has."""
        self._witness.listen(session)
        self._joining[session] = False
        # SP-11.14-6: links that have shown no key go first, the oldest of them.
        alive = sorted((link for link in self._joining if link.alive), key=lambda link: self._joining[link])
        for oldest in alive[: -holder.JOINING]:
            oldest.fail(Superseded(f"too many links of {self.name} at once"))
        try:
            await self._join(session)
        except asyncio.CancelledError:
            raise  # the coordinator ends: the link stays listed, and `bye` says why
        except BaseException:
            del self._joining[session]
            raise
        del self._joining[session]

    async def _join(self, session: Session) -> None:
        challenge = secrets.token_bytes(holder.CHALLENGE_BYTES)
        offer = replace(self._offer, recorded=self._witness.recorded, challenge=challenge)
        try:
            await session.send(offer)
            accept = await self._hear(session, JobAccept, "its answer to the job")
            self.seat.examine(offer, accept, session)
            self._joining[session] = True
            patients: dict[bytes, Geometry] = {}
            unusable: dict[bytes, str] = {}
            last = False
            while not last:
                piece = await self._hear(session, Inventory, "its list of patients")
                last = piece.last
                self._same_salt(piece.salt_check)
                # SP-11-4: bounded by what was announced, or a list that never ends would fill our memory.
                if len(patients) + len(piece.patients) > accept.patients or not (piece.patients or last):
                    raise SchemaMismatch(
                        f"{accept.patients} patients announced, but more, or none, are listed"
                    )
                for p in piece.patients:
                    patients[p.key] = Geometry(p.shape, p.spacing, p.directions, p.origin, p.stored)
                if piece.unusable is not None:
                    unusable = _unusable(piece, patients)
            if len(patients) != accept.patients:
                raise SchemaMismatch(f"{accept.patients} patients announced, {len(patients)} listed")
            if (unfit := self._unfit(patients, unusable)) is not None:
                raise unfit
            # Last: who does not fit must not have the seat.
            await self.seat.take(session, accept.holder or b"", lambda: self._session)
        except SplitprotoError as error:
            if isinstance(error, LocalError):
                session.fail(error)
            if session.farewell is not None:
                # It only looked (splitpeer doctor), or was asked to stop: nobody was refused.
                event(log, "site.left", site=self.name, cause=session.farewell.text)
            elif isinstance(error, SecondHolder | Superseded):
                # Another process, honest or not: it changes nothing for the site itself.
                self.seat.say("site.second_holder", session, self._session, cause=str(error))
            else:
                self._not_taken_back(str(error))
            return
        except JobFailed as error:
            # A decline proves no key: where somebody has the seat, it is a stranger's word.
            if self._expected is None and self.seat.holder is None and not self.here:
                self._witness.note(
                    "job.declined", site=self.name, run=self._offer.run.hex(), cause=str(error)
                )
                self._failure = error
                self._joined.set()
            else:
                self._not_taken_back(str(error))
            return
        self._witness.heard(self.name, accept)
        self.party = Party(self.name, self.modality, accept.defences or (), accept.recorded)
        self.features = frozenset(session.agreement.features)
        self._keep_counts()
        # A new incarnation after the first has lost what was not on disk.
        if self._incarnation and accept.incarnation != self._incarnation:
            self.restarts += 1
            self._lost_at = self._lost_at if self._restarted else self.applied
            self._restarted = True
        # Absent since before this coordinator began: what its memory holds, nobody knows.
        self._restarted |= bool(self.absent) and not self._incarnation
        self.unusable = unusable
        self.refusal, self._failure = "", None
        self._incarnation, self.applied, self.checkpoints = (
            accept.incarnation,
            accept.applied,
            accept.checkpoints,
        )
        self.patients = patients
        self._session, self._begun, self._sent = session, False, 0
        more = {"unusable": counted(unusable.values())} if unusable else {}
        event(log, "site.joined", site=self.name, modality=self.modality, patients=len(patients), **more,
              applied=accept.applied, tls=session.tls, address=session.address,
              serial=session.peer.serial)  # fmt: skip
        self._board.site(self.name, state="absent" if self.absent else "joined", link_since=time.monotonic(),
                         tls=session.tls, applied=accept.applied, checkpoints=list(accept.checkpoints))  # fmt: skip
        self._board.waits(None, who=self.name)
        self._joined.set()
        self._watching = asyncio.create_task(self._watch(session))

    async def _watch(self, session: Session) -> None:
        """Answer a bye at once, and notice a link that ends, also while nothing is asked of the site."""
        await asyncio.wait((session.leaving,))
        bye = session.farewell
        if bye is not None:
            await session.close(bye.reason)
        if self._session is session and self._reported is not session:
            self._joined.clear()
            self._board.site(self.name, state="absent" if self.absent else "awaited")
            if bye is None:
                event(log, "site.lost", logging.WARNING, site=self.name, cause=str(session.ended.result()))
            elif bye.reason != "rotate":
                event(log, "site.left", site=self.name, cause=bye.text)

    def _not_taken_back(self, cause: str) -> None:
        """It came back and did not join: it stays away, and is waited for as before."""
        if cause != self.refusal and self._refusals.take(1.0, time.monotonic()):
            event(log, "site.refused", logging.WARNING, site=self.name, modality=self.modality, cause=cause)
            self._witness.note("site.refused", site=self.name, cause=cause)
        self.refusal = cause

    def _same_salt(self, check: bytes) -> None:
        """SP-11.5-4: with another salt every key is another, and no patient would be found at both."""
        if check != self._salt_check:
            raise Misaligned(
                f"the patient salt of {self.name} (check value {check.hex()}) is not the coordinator's: install the "
                "same federation.salt at both (each start's log shows its own check value)"
            )

    @property
    def here(self) -> bool:
        """Joined, and its link is alive."""
        return self._joined.is_set() and self._session is not None and self._session.alive

    def joined_on(self, session: Session) -> bool:
        """Whether it joined over this link, and none came after it."""
        return self._session is session

    def expect(self, patients: dict[bytes, Geometry]) -> None:
        """A site that joins from now on must hold these, on these grids."""
        self._expected = patients
        self._base = (self._base[0], len(patients))

    def without(self, withdrawn: Sequence[Withdrawn], step: int, patients: int) -> None:
        """SP-11.13-8: of these it is told, and on every new link after `begin`; it need not hold them any more."""
        self._withdrawn, self._base = withdrawn, (step, patients)

    async def joined(self) -> None:
        """Wait until the site has joined; raises JobFailed if it declined."""
        await self._joined.wait()
        if self._failure is not None:
            raise self._failure

    @property
    def tls(self) -> str:
        """TLS version and suite of the present link."""
        return self._session.tls if self._session is not None else ""

    # --- verbs -----------------------------------------------------------------------------------------

    async def begin(self, step: int, patients: int, *, forgive: bool = False) -> None:
        """SP-11-41: let the site know that everybody is here, and after which committed step work goes on.

        `forgive`: also if it has lost its memory.
        """
        self._base = (step, patients)
        await self._ask(self._connected, "to begin", forgive=forgive)

    def shows_waiting(self, seconds: float) -> None:
        """It is waited for to join, so long still."""
        self._board.waits("to join", who=self.name, deadline_s=max(0.0, seconds))

    def committed(self, step: int) -> None:
        """The newest committed step, for the `begin` of a link that comes up now."""
        self._base = (step, self._base[1])

    async def activations(
        self,
        stream: Sequence[Forward],
        index: int,
        until: int,
        described: Callable[[Forward], Sequence[Descriptor]],
        takes: Callable[[int], bool] = lambda index: True,
    ) -> dict[str, Array] | Withdraw:
        """The site's activations for `stream[index]`, or which of its patients cannot be used; batches up to `until`
        are announced.

        Args:
            takes: whether the site takes part in `stream[i]`: what comes behind a batch that it does not is not
                announced yet.
        """

        async def ask(session: Session) -> dict[str, Array] | Withdraw:
            if self._stream is not stream:
                self._stream, self._sent = stream, index
            self._sent = max(self._sent, index)
            while self._sent < min(until, len(stream)) and (self._sent == index or takes(self._sent)):
                await session.send(stream[self._sent], self._job.seconds_per_step)
                self._sent += 1
            forward = stream[index]
            what = f"activations of step {forward.step}"
            answer: Activations | Withdraw = await self._hear(session, (Activations, Withdraw), what)
            # SP-11-9: they repeat what they answer, and are those that are waited for.
            if (answer.mode, answer.step, answer.batch) != (forward.mode, forward.step, forward.batch):
                raise UnexpectedMessage(
                    f"activations of another batch than step {forward.step}, {forward.batch}"
                )
            # SP-11-5: misaligned patients are an error, not a bad Dice.
            if answer.digest != forward.digest:
                raise Misaligned(f"{self.name} used other samples than those of step {forward.step}")
            if isinstance(answer, Withdraw):
                return _withdrawal(forward, answer)
            if not matches(described(forward), answer.tensors):
                raise SchemaMismatch(f"{self.name} sent other tensors than the job describes")
            return dict(answer.tensors)

        return await self._ask(ask, f"activations of step {stream[index].step}")

    async def gradients(self, step: int, tensors: dict[str, Array]) -> None:
        """Send the gradients of `step` and wait until the site has applied them, once."""

        async def ask(session: Session) -> None:
            # SP-11-8: the site said on joining how far it is; what it has applied is not sent again.
            if self.applied >= step:
                return
            await session.send(Gradients(step, tensors), self._job.seconds_per_step)
            answer = await self._hear(session, Applied, f"step {step} to be applied")
            if answer.step != step:
                raise UnexpectedMessage(f"step {answer.step} applied where {step} was due")
            self._at(step)

        await self._ask(ask, f"step {step} to be applied", computed=step)

    async def advance(self, step: int) -> None:
        """Have the site count on to `step`, which was made without it; what was announced to it is void."""
        what = f"its advance to step {step}"

        async def ask(session: Session) -> None:
            await session.send(Advance(step))
            answer: Message | None = None
            # SP-11-31: what was under way before is void.
            while not (isinstance(answer, Advanced) and answer.step == step):
                kinds = (Advanced, Activations, Withdraw, Applied, Saved, Unsaved)
                answer = await self._hear(session, kinds, what)

        self._stream = None
        await self._ask(ask, what)
        self._at(step)

    async def save(self, step: int, keep: Sequence[int] = (), *, leaving: bool = False) -> bytes | None:
        """Have the site write its half of `step` to disk; returns its digest, None if it could not.

        Args:
            step: the committed one.
            keep: steps that all hold, and that must stay (SP-11-33).
            leaving: work ends here, at a step that nobody foresaw, so activations of batches that were announced
                beyond it may come first, and are void.
        """
        what = f"its checkpoint of step {step}"

        async def ask(session: Session) -> Saved | Unsaved:
            await session.send(Checkpoint(step, tuple(keep)))
            kinds = (Saved, Unsaved, Activations, Withdraw) if leaving else (Saved, Unsaved)
            answer: Message = await self._hear(session, kinds, what)
            while not isinstance(answer, Saved | Unsaved):
                answer = await self._hear(session, kinds, what)
            if answer.step != step:
                raise UnexpectedMessage(f"step {answer.step} saved where {step} was due")
            return answer

        answer = await self._ask(ask, what)
        if isinstance(answer, Unsaved):
            self.unsaved += 1
            event(log, "site.unsaved", logging.WARNING, site=self.name, step=step, cause=answer.reason)
            return None
        held = {other for other in self.checkpoints if other in keep} | {step}
        self.checkpoints = tuple(sorted(held))
        self._board.site(self.name, checkpoints=list(self.checkpoints))
        return answer.digest

    def settled(self) -> None:
        """It wrote a checkpoint as all others did: what went wrong before is forgiven."""
        self.restarts = self.losses = self.unsaved = 0

    async def returned(self) -> None:
        """Wait until a site that was absent is here again."""
        try:
            await self._link("to come back", patient=True)
        finally:
            self._board.waits(None, who=self.name)

    async def back(self) -> None:
        """Wait until the site is here, restarted or not; what it lost is known from now on."""
        self._restarted = False
        await self._ask(self._connected, "to come back")

    async def rollback(self, step: int) -> None:
        """Have the site go back to its checkpoint of `step`."""
        what = f"its return to step {step}"
        self._stream = None
        await self._ask(lambda session: self._roll_back(session, step), what)

    async def catch_up(self, step: int, patients: int) -> None:
        """Bring a site that was absent to the committed `step`, where it goes on with the weights that it has.

        Raises:
            JobFailed: it has no checkpoint left to go on from.
        """
        # SP-11-36.
        self._board.site(self.name, state="catching up")
        await self.begin(step, patients, forgive=True)
        # Steps beyond a rollback of the others, or beyond what is committed, never were.
        most = step if self._undone is None else min(step, self._undone)
        if self._restarted or self.applied > most:
            usable = [saved for saved in self.checkpoints if saved <= most]
            if not usable:
                raise JobFailed(f"site {self.name} has no checkpoint of step {most} or before to go on from")
            self._restarted = False
            await self.rollback(max(usable))
        await self.advance(step)
        self._undone, self.absent = None, ""
        self._board.site(self.name, state="joined")

    def leave_out(self, cause: str) -> None:
        """From now on the run goes on without this site, which may dial and join again."""
        self.absent = cause
        event(log, "site.absent", logging.WARNING, site=self.name, modality=self.modality, cause=cause)
        self._witness.note("site.absent", site=self.name, cause=cause)
        self._board.site(self.name, state="absent", absent_since=time.monotonic(), cause=cause)
        self._board.waits(None, who=self.name)
        # It may be in the middle of anything: on a new link, both know where they are.
        if self._session is not None and self._session.alive:
            self._session.fail(DeadlineExceeded("the run goes on without this site; dial again to join it"))
        self._reported = self._session
        self._joined.clear()

    def undo(self, step: int) -> None:
        """While this site was absent, the others went back to `step`."""
        self._undone = step if self._undone is None else min(step, self._undone)

    async def left(self) -> None:
        """Wait until the site is not here."""
        if self._session is not None:
            await asyncio.wait((self._session.ended,))

    async def tell(self, message: Message) -> None:
        """Send a message nobody answers, if the site is here."""
        if self.here and self._begun and self._session is not None:
            try:
                await self._session.send(message)
            except SplitprotoError as error:
                event(log, "site.lost", logging.WARNING, site=self.name, cause=str(error))

    async def bye(self, reason: str, text: str) -> bool:
        """End the present link in good order, also one that has not finished joining.

        Returns:
            Whether the site has answered.
        """
        if reason == "complete" and not (self.here or self.absent):
            # A site between two links shall not dial in vain: the job is done, and it must hear so.
            self._joined.clear()
            try:
                async with asyncio.timeout(FAREWELL_S):
                    await self._joined.wait()
            except TimeoutError:
                event(log, "site.lost", logging.WARNING, site=self.name, cause="it was not here for the bye")
        joining = dict(self._joining)
        session, self._session = self._session, None
        await asyncio.gather(*(link.close(reason, text) for link in joining))
        if session is None:
            return any(known and link.ended.result() is None for link, known in joining.items())
        self._octets_in, self._octets_out = (
            self._octets_in + session.bytes_in,
            self._octets_out + session.bytes_out,
        )
        await session.close(reason, text)
        return session.ended.result() is None

    # --- inside ----------------------------------------------------------------------------------------

    async def _ask(
        self,
        question: Callable[[Session], Awaitable[Answer]],
        what: str,
        *,
        computed: int = 0,
        forgive: bool = False,
    ) -> Answer:
        """Ask on the present link; when that is lost, on the next one.

        Args:
            question: what is asked.
            what: for people.
            computed: the question needs that the site's memory holds the activations of this step.
            forgive: also ask a site that has lost its memory.
        """
        loop = asyncio.get_running_loop()
        # One patience for the whole question: a link that comes up only to die again is not progress.
        patience = loop.time() + self._patience_s + self._job.seconds_per_step
        try:
            while True:
                # While it catches up, the others wait for it: not for one that is lost again.
                session = await self._link(what, patient=not self.absent)
                if session.rotation_due:
                    # SP-6-10: our own key's budget; the site dials again at once.
                    await session.close("rotate", session.rotation_cause)
                    continue
                try:
                    # Each message has its deadline; this one is for all of them together.
                    together = loop.time() + 2 * self._job.seconds_per_step
                    async with asyncio.timeout_at(together):
                        if not self._begun:
                            await session.send(Begin(*self._base))
                            self._begun = True
                            for message in self._withdrawn:
                                await session.send(message)
                        if self._restarted and not forgive:
                            self._bear_restarts()
                            await self._restore(session, computed)
                        return await question(session)
                except TimeoutError:
                    session.fail(DeadlineExceeded(f"{what} took too long"))
                    if not overslept(together):
                        raise DeadlinePassed(f"site {self.name}: {what} took too long") from None
                    # This process was stopped. On a new link both know where they are.
                    patience += loop.time() - together
                    self._joined.clear()
                except DeadlineExceeded as error:
                    session.fail(error)
                    raise DeadlinePassed(f"site {self.name}: {error.reason}") from None
                except SplitprotoError as error:
                    if isinstance(error, LocalError) and session.alive:
                        session.fail(error)
                    if not error.retry:
                        raise JobFailed(f"site {self.name}: {error}") from error
                    self._reported = session
                    event(log, "site.lost", logging.WARNING, site=self.name, cause=session.cause_of(error),
                          waiting_for=what, patience_s=self._patience_s)  # fmt: skip
                    if self._session is session:
                        self._joined.clear()
                    if loop.time() > patience:
                        raise DeadlinePassed(
                            f"site {self.name} ({self.modality}): its links keep breaking ({error}); "
                            f"it was waited for: {what}"
                        ) from error
        finally:
            self._board.waits(None, who=self.name)

    def _bear_restarts(self) -> None:
        """Each may make all go back, so there is an end to it."""
        if self.restarts > RESTARTS:
            raise JobFailed(
                f"site {self.name} has restarted {self.restarts} times since its last checkpoint: its log says why"
            )

    async def _restore(self, session: Session, computed: int) -> None:
        """SP-11-34: a site that lost its memory, but saved exactly the step it had applied, goes back there alone.

        Raises:
            SiteRestarted: it did not, or the question needs what it had computed since.
        """
        if computed > self._lost_at or self._lost_at not in self.checkpoints:
            raise SiteRestarted(self.name)
        self._stream = None
        await self._roll_back(session, self._lost_at)
        self._restarted = False
        event(log, "site.restored", site=self.name, step=self._lost_at)

    async def _roll_back(self, session: Session, step: int) -> None:
        await session.send(Rollback(step))
        # SP-11-15: what was under way before the rollback is void.
        answer: Message | None = None
        kinds = (RolledBack, Activations, Withdraw, Applied, Advanced, Saved, Unsaved)
        while not (isinstance(answer, RolledBack) and answer.step == step):
            answer = await self._hear(session, kinds, f"its return to step {step}")
        self._at(step)
        self.checkpoints = tuple(saved for saved in self.checkpoints if saved <= step)
        self._board.site(self.name, checkpoints=list(self.checkpoints))

    def _at(self, step: int) -> None:
        self.applied = step
        octets_in, octets_out = self.traffic
        self._board.site(self.name, applied=step, octets_in=octets_in, octets_out=octets_out)

    async def _connected(self, session: Session) -> None:
        return

    async def _link(self, what: str, *, patient: bool) -> Session:
        ended = self._session.ended if self._session is not None else None
        if ended is not None and ended.done() and (error := ended.result()) is not None and not error.retry:
            # A site may give up between two questions, such as when its privacy budget is spent.
            raise JobFailed(f"site {self.name}: {error}") from error
        if not self.here and self._failure is None:
            self._joined.clear()
            self._board.site(self.name, state="awaited")
            self._board.waits("to come back", who=self.name, deadline_s=self._patience_s)
            joined = asyncio.ensure_future(self._joined.wait())
            try:
                if not patient:
                    raise DeadlinePassed(f"site {self.name} ({self.modality}) was lost again before {what}")
                if not await patiently((joined,), self._patience_s):
                    raise DeadlinePassed(
                        f"site {self.name} ({self.modality}) did not come back within {self._patience_s:g} s; "
                        f"it was waited for: {what}{f'; when it dialled: {self.refusal}' if self.refusal else ''}"
                    )
            finally:
                joined.cancel()
        if self._failure is not None:
            raise self._failure
        if self._session is None:
            raise LinkLost("no link")
        return self._session

    async def _hear(
        self, session: Session, kind: type[Heard] | tuple[type[Message], ...], what: str
    ) -> Heard:
        # SP-11-19.
        self._board.waits(what, who=self.name, deadline_s=self._job.seconds_per_step)
        message = await session.receive(self._job.seconds_per_step, f"{what} from {self.name}")
        if isinstance(message, JobDecline):
            await session.close("failed", "the job was declined")
            raise JobFailed(f"site {self.name} declined the job: {printable(message.reason)}")
        if isinstance(message, Bye):
            await session.close(message.reason)
            raise LinkLost(f"{self.name} said bye ({message.reason}: {printable(message.text)})")
        if not isinstance(message, kind):
            raise UnexpectedMessage(f"{message.name} where {what} was due")
        return message  # type: ignore[return-value]

    def _unfit(self, patients: dict[bytes, Geometry], unusable: Collection[bytes]) -> Misaligned | None:
        """SP-11-4: why these are not the patients of the run that is under way; None: they are, or none is."""
        out = {patient.key for message in self._withdrawn for patient in message.patients} | {*unusable}
        expected = {key: grid for key, grid in (self._expected or {}).items() if key not in out}
        if lost := len(expected.keys() - patients.keys()):
            return Misaligned(f"it lacks {lost} of the run's {len(expected)} patients")
        try:
            compare_geometry({"labels": expected, self.name: {key: patients[key] for key in expected}})
        except DataError as error:
            return Misaligned(str(error))
        return None

    def _keep_counts(self) -> None:
        if self._session is not None:
            self._octets_in += self._session.bytes_in
            self._octets_out += self._session.bytes_out

    @property
    def traffic(self) -> tuple[int, int]:
        """Octets received from and sent to this site, envelopes included, over all links."""
        now = self._session
        return self._octets_in + (now.bytes_in if now else 0), self._octets_out + (
            now.bytes_out if now else 0
        )


def _withdrawal(forward: Forward, answer: Withdraw) -> Withdraw:
    """SP-11.13-4. Raises UnexpectedMessage."""
    keys = [patient.key for patient in answer.patients]
    if len(set(keys)) < len(keys) or not set(keys) <= {sample.key for sample in forward.samples}:
        raise UnexpectedMessage(f"patients withdrawn who are not in the batch of step {forward.step}")
    return answer


def _unusable(piece: Inventory, patients: Collection[bytes]) -> dict[bytes, str]:
    """SP-11.13-9. Raises SchemaMismatch."""
    listed = piece.unusable or ()
    found = {patient.key: patient.cause for patient in listed}
    if not piece.last or len(found) < len(listed) or found.keys() & set(patients):
        raise SchemaMismatch("patients that cannot be used are listed too early, twice, or as usable")
    return found
