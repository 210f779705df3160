"""One site as the coordinator sees it, over all its links: how it joins, and what it can be asked."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime

from splitpeer.coordinator import holder
from splitpeer.coordinator.asking import Asking, Question
from splitpeer.coordinator.holder import Holding
from splitpeer.coordinator.joining import Patients, check_fit, check_weights, hear_patients
from splitpeer.coordinator.memory import Memory
from splitpeer.coordinator.presence import Presence
from splitpeer.coordinator.relay import Relay
from splitpeer.coordinator.site_link import SiteLink
from splitpeer.coordinator.withdrawals import check_withdrawal
from splitpeer.daemon import happenings as h
from splitpeer.daemon.sinks.log import LogSink
from splitpeer.daemon.witness import Witness
from splitpeer.data.geometry import Geometry
from splitpeer.errors import JobFailed
from splitpeer.federation.files import counted
from splitpeer.federation.seating import Part
from splitpeer.training.forms import activations_form
from splitproto import Session, SplitprotoError
from splitproto.capture import Party
from splitproto.errors import (
    DeadlineExceeded,
    FeatureMissing,
    LocalError,
    Misaligned,
    SchemaMismatch,
    SecondHolder,
    Superseded,
    UnexpectedMessage,
)
from splitproto.messages import (
    Activations,
    Advance,
    Advanced,
    Applied,
    Average,
    Averaged,
    Begin,
    Checkpoint,
    FusionKey,
    Gradients,
    JobAccept,
    JobOffer,
    Located,
    Message,
    Rollback,
    RolledBack,
    Saved,
    Settled,
    Share,
    Shared,
    Unsaved,
    Withdraw,
    Withdrawn,
)
from splitproto.tensors import Array, Descriptor, matches

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sent:
    """A site's activations for a batch."""

    part: Part
    """What they are."""
    tensors: Mapping[str, Array]
    """By name, as they travelled."""


@dataclass(frozen=True)
class Unable:
    """The site's newest link does not let it answer: SP-10-8, it does not evaluate (any more)."""


class RemoteSite:
    """One site of the job, over all its links.

    The coordinator's loop asks one question after the other. A question whose link breaks waits for the site to come
    back, at most `patience_s` seconds, and is asked again.

    Properties are queries, `wait_...` waits, every other verb is a command; those that are coroutines ask the site,
    and raise, in addition to what they name:
        SiteRestarted: it came back without its memory.
        DeadlinePassed: it did not answer, or not come back, in time.
        JobFailed: it broke the protocol, or failed for good.

    Args:
        name: as in its certificate.
        offer: the job, with its seats.
        patience_s: how long it may be away.
        witness: told of its links and of what it announces.
        report: told what it does and what it is waited for.
        salt_check: of the coordinator's salt, from which the keys of its masks are made.
        relay: of the keys of a secure sum; None: the job has none.
    """

    def __init__(
        self,
        name: str,
        offer: JobOffer,
        patience_s: float,
        witness: Witness,
        report: h.Reporter,
        salt_check: bytes,
        relay: Relay | None = None,
    ) -> None:
        self.name, self.seats = name, offer.seats
        self.holds_masks = offer.masks is not None
        """The labels of the run are this site's."""
        names = [seat.name for seat in offer.seats] + (["labels"] if self.holds_masks else [])
        self.seat_names = ", ".join(names)
        """The seats that it fills, in words."""
        self.party = Party(name, offer.seats)
        """What it announced last."""
        self.features: frozenset[str] = frozenset()
        """Agreed on its newest link."""
        self.patients: Mapping[bytes, Geometry] = {}
        self.unusable: Mapping[bytes, str] = {}
        """Patients whose files it said, on joining or since, that it cannot use, and why."""
        self.listed: frozenset[bytes] = frozenset()
        """Patients whom it named when it joined, usable or not: its own (SP-11.13-9)."""
        self.lists: Mapping[bytes, tuple[str, ...]] = {}
        """The seats that it can fill, by usable patient."""
        self.people: Mapping[bytes, bytes] = {}
        """By patient with a mask, where the labels are this site's, the person."""
        self.weights = b""
        """In a frozen job, the label of its encoders' weights; empty: not known yet."""
        self.losses = 0
        """How often it was left out since the last checkpoint that it wrote with the others."""
        self.unsaved = 0
        """How many checkpoints in a row it could not write."""
        self.settled: Settled | None = None
        """SP-11.18-18: sent on every new link after `begin`."""
        self.requests: Callable[[Message], Awaitable[None]] | None = None
        """Takes what it asks for by itself (SP-11.19-2); None: it may not."""
        self.holding = Holding(name, report)
        """Who holds its part in the run."""
        self._offer, self._witness, self._salt_check = offer, witness, salt_check
        self._relay = relay
        self._report = report.to(LogSink(log))
        self._answer_s = offer.job.seconds_per_step
        self._presence = Presence(name, self.seat_names, patience_s, report)
        self._memory = Memory(name)
        self._patience_s = patience_s
        self.asking = Asking(self._presence, self._ready, self._prepare, patience_s, self._answer_s)
        """Also for services that have a module of their own."""
        self._joining: list[SiteLink] = []
        self._committed, self._patients_in_use = 0, 0
        self._expected: Mapping[bytes, Geometry] | None = None
        self._fills: Mapping[bytes, Collection[str]] = {}
        self._withdrawn: Sequence[Withdrawn] = ()
        self._averages: dict[int, Average] = {}  # by place of the seat, as sent last
        self._octets_before = (0, 0)  # in and out, over the links before the present one

    # --- queries ---------------------------------------------------------------------------------------

    @property
    def frozen(self) -> bool:
        """Whether the job's encoders are."""
        return self._offer.job.frozen

    @property
    def here(self) -> bool:
        """It has joined, and its link is alive."""
        return self._presence.here

    @property
    def absent(self) -> bool:
        """Whether the run continues without it, connected again or not."""
        return self._presence.absent

    @property
    def absence(self) -> str:
        """Why the run continues without it; empty where it does not."""
        return self._presence.absence

    @property
    def refusal(self) -> str:
        """Why it did not join when it dialled last; empty: it did, or has not dialled."""
        return self._presence.refusal

    @property
    def applied(self) -> int:
        """The last step that it is known to have applied, or to have advanced to."""
        return self._memory.applied

    @property
    def checkpoints(self) -> tuple[int, ...]:
        """Steps that it has on disk."""
        return self._memory.checkpoints

    @property
    def session(self) -> Session | None:
        """Its present link; None: none has joined."""
        return self._presence.link.session if self._presence.link is not None else None

    @property
    def takes(self) -> int:
        """Octets of tensors in one message that it takes."""
        return self.session.agreement.send_limit if self.session is not None else 0

    @property
    def asked_ahead(self) -> bool:
        """Whether it owes answers that nobody waits for."""
        return self._presence.link is not None and self._presence.link.unanswered > 0

    @property
    def tls(self) -> str:
        """TLS version and suite of the present link."""
        return self.session.tls if self.session is not None else ""

    @property
    def traffic(self) -> tuple[int, int]:
        """Octets received from and sent to this site, envelopes included, over all links."""
        before_in, before_out = self._octets_before
        if (now := self.session) is None:
            return before_in, before_out
        return before_in + now.bytes_in, before_out + now.bytes_out

    # --- waits -----------------------------------------------------------------------------------------

    async def wait_joined(self) -> None:
        """Wait until the site has joined; raises JobFailed if it declined."""
        await self._presence.wait_joined()

    async def wait_gone(self) -> None:
        """Wait until the site is not here."""
        await self._presence.wait_gone()

    async def wait_returned(self) -> None:
        """Wait until a site that was absent is here again."""
        try:
            await self._presence.wait_link("to come back")
        finally:
            self._presence.stop_waiting()

    # --- what the site is to know ------------------------------------------------------------------------

    def expect(
        self, patients: Mapping[bytes, Geometry], seats: Mapping[bytes, Collection[str]], in_use: int
    ) -> None:
        """A site that joins from now on must hold its patients, on these grids, and be able to fill their seats.

        Args:
            in_use: patients of the whole run.
        """
        self._expected, self._fills, self._patients_in_use = patients, seats, in_use

    def set_withdrawn(self, withdrawn: Sequence[Withdrawn], step: int, patients: int) -> None:
        """SP-11.13-8: these are sent on every new link after `begin`; the site need no longer hold them."""
        self._withdrawn = withdrawn
        self._committed, self._patients_in_use = step, patients

    def set_committed(self, step: int) -> None:
        """The newest committed step, for the `begin` of a link that comes up now."""
        self._committed = step

    def show_waiting(self, seconds: float) -> None:
        """It is waited for to join, so long still."""
        self._presence.show_waiting("to join", seconds)

    def leave_out(self, cause: str) -> None:
        """From now on the run continues without this site, which may dial and join again."""
        self._presence.leave_out(cause)

    def note_undone(self, step: int) -> None:
        """While this site was absent, the others went back to `step`."""
        self._memory.note_undone(step)

    def forgive(self) -> None:
        """It wrote a checkpoint as all others did: what went wrong before does not count any more."""
        self._memory.forgive()
        self.losses = self.unsaved = 0

    # --- joining ---------------------------------------------------------------------------------------

    async def offer_job(self, session: Session) -> bool:
        """Offer the job on a new link and learn what the site has; returns whether it has joined."""
        self._witness.listen(session)
        link = SiteLink(self.name, session, self._answer_s, self._presence.show_waiting)
        self._joining.append(link)
        self._presence.note_dialled()
        self._cap_joining()
        try:
            await self._join(link)
        except asyncio.CancelledError:
            raise  # the coordinator ends: the link stays listed, and `say_bye` says why
        except SplitprotoError as error:
            self._refuse(link, error)
        except JobFailed as error:
            self._hear_decline(error)
        except BaseException:
            self._end_joining(link)
            raise
        else:
            self._joining.remove(link)
            return True
        self._end_joining(link)
        return False

    def _cap_joining(self) -> None:
        """SP-11.14-6: links that have shown no key go first, the oldest of them."""
        alive = sorted((link for link in self._joining if link.alive), key=lambda link: link.holder_known)
        for oldest in alive[: -holder.JOINING]:
            oldest.session.fail(Superseded(f"too many links of {self.name} at once"))

    def _end_joining(self, link: SiteLink) -> None:
        self._joining.remove(link)
        if not self._joining:
            self._presence.note_turned_away()

    async def _join(self, link: SiteLink) -> None:
        challenge = secrets.token_bytes(holder.CHALLENGE_BYTES)
        offer = replace(self._offer, recorded=self._witness.recorded, challenge=challenge)
        if self.holds_masks and "label" not in link.session.agreement.features:
            # SP-11.20-1.
            raise FeatureMissing(f"{self.name} does not offer label, and the labels are to be there")
        await link.send(offer)
        accept = await link.hear("its answer to the job", JobAccept)
        self.holding.examine(offer, accept, link.session)
        if self.frozen:
            check_weights(self.name, accept, self.weights)
        link.holder_known = True
        key = None
        if self._relay is not None:
            key = (await link.hear("its key for the sum", FusionKey)).offer
            self._relay.check(self.name, key, datetime.now(UTC))
        masks = self.holds_masks
        patients = await hear_patients(link, accept, self._salt_check, self.seats, masks=masks)
        check_fit(self.name, patients, self._needed(), self._fills, masks=masks)
        # Last: who does not fit must not have the site's part.
        await self.holding.take(link.session, accept.holder or b"", lambda: self.session)
        if self._relay is not None and key is not None:
            self._relay.take(self.name, key)
        self._take(link, accept, patients)

    def _needed(self) -> dict[bytes, Geometry]:
        """The run's patients but for those that are withdrawn; none before the run begins."""
        out = {patient.key for message in self._withdrawn for patient in message.patients}
        return {key: grid for key, grid in (self._expected or {}).items() if key not in out}

    def _refuse(self, link: SiteLink, error: SplitprotoError) -> None:
        session = link.session
        if isinstance(error, LocalError):
            session.fail(error)
        if session.farewell is not None:
            # It only looked (splitpeer doctor), or was asked to stop: not a refusal.
            self._report(h.SiteLeft(self.name, session.farewell.text))
        elif isinstance(error, SecondHolder | Superseded):
            # Another process, honest or not: it changes nothing for the site itself.
            self.holding.note_second(session, self.session, str(error))
        else:
            self._presence.note_refused(str(error))

    def _hear_decline(self, error: JobFailed) -> None:
        # A decline proves no key: if the site's place is taken, it may be a stranger's.
        if self._expected is None and self.holding.holder is None and not self.here:
            self._report(h.SiteDeclined(self.name, self._offer.run.hex(), str(error)))
            self._presence.note_declined(error)
        else:
            self._presence.note_refused(str(error))

    def _take(self, link: SiteLink, accept: JobAccept, patients: Patients) -> None:
        """The site has joined over `link`."""
        session = link.session
        self._witness.heard(self.name, accept)
        self.party = Party(self.name, self._offer.seats, accept.defences or (), accept.recorded)
        self.features = frozenset(session.agreement.features)
        self.patients, self.lists = patients.usable, patients.seats
        self.unusable = link.unusable = dict(patients.unusable)
        self.listed = frozenset((*patients.usable, *patients.unusable))
        self.people = patients.people
        self._octets_before = self.traffic
        self.weights = accept.weights or b""
        self._memory.hear(accept, absent=self.absent)
        unusable = counted(self.unusable.values()) if self.unusable else ""
        self._report(
            h.SiteJoined(
                self.name,
                self.seat_names,
                len(self.patients),
                unusable,
                accept.applied,
                accept.checkpoints,
                session.tls,
                session.address,
                session.peer.serial,
            )
        )
        if self.requests is not None:
            link.listen(self.requests)
        self._presence.take(link)

    # --- what the site is asked --------------------------------------------------------------------------

    async def begin(self, step: int, patients: int, *, even_restarted: bool = False) -> None:
        """SP-11-41: tell the site that all are here, and after which committed step work continues.

        `even_restarted`: also if it has lost its memory.
        """
        self._committed, self._patients_in_use = step, patients
        await self.asking.ask(Question("to begin", even_restarted=even_restarted), self._reach)

    async def reach(self) -> None:
        """Wait until the site is here, restarted or not; what it lost is known from now on."""
        self._memory.write_off()
        await self.asking.ask(Question("to come back"), self._reach)

    async def _reach(self, link: SiteLink) -> None:
        """All that is asked is a link on which work has begun."""

    async def compute(self, stream: Sequence[Part], index: int, until: int) -> Sent | Withdraw | Unable:
        """The site's activations for its part `stream[index]`, or which of its patients cannot be used.

        Args:
            stream: parts of batches in their order.
            until: those before this index are announced.
        """
        question = Question(f"activations of step {stream[index].forward.step}")
        return await self.asking.ask(question, self.compute_on, stream, index, until)

    async def compute_on(
        self, link: SiteLink, stream: Sequence[Part], index: int, until: int
    ) -> Sent | Withdraw | Unable:
        """`compute` on one link."""
        part = stream[index]
        forward = part.forward
        if forward.mode in ("evaluate", "infer") and forward.mode not in link.session.agreement.features:
            # A link before it had the feature: what was asked on that one cannot be asked again.
            return Unable()
        await link.announce(stream, index, until)
        answer = await link.hear(f"activations of step {forward.step}", Activations, Withdraw)
        link.unanswered -= 1
        # SP-11-9: they repeat what they answer, and are those that are waited for.
        if (answer.mode, answer.step, answer.batch) != (forward.mode, forward.step, forward.batch):
            raise UnexpectedMessage(f"activations of another batch than step {forward.step}, {forward.batch}")
        # SP-11-5: misaligned patients are an error, not a bad Dice.
        if answer.digest != forward.digest:
            raise Misaligned(f"{self.name} used other samples than those of step {forward.step}")
        if isinstance(answer, Withdraw):
            check_withdrawal(forward.samples, answer)
            return answer
        if not matches(part.expected, answer.tensors):
            raise SchemaMismatch(f"{self.name} sent other tensors than the job describes")
        # SP-11.21-5: a site that sends no number for a scale has broken the protocol, whatever its images are.
        activations_form(self._offer.job).check(answer.tensors)
        return Sent(part, answer.tensors)

    async def release(self, stream: Sequence[Part], index: int, until: int) -> Sent | Withdraw | Unable:
        """As `compute`, of mode `release`; a site that restarted answers as it did before (SP-11.17-5)."""
        question = Question(f"release {stream[index].forward.batch}", even_restarted=True)
        return await self.asking.ask(question, self.compute_on, stream, index, until)

    async def apply(
        self, step: int, tensors: dict[str, Array], halfway: Callable[[], None] | None = None
    ) -> None:
        """Send the gradients of `step` and wait until the site has applied them, once.

        Args:
            halfway: called when it has half of them, and when its link breaks; maybe more than once.
        """
        question = Question(f"step {step} to be applied", computed=step)
        await self.asking.ask(question, self._apply, step, tensors, halfway)

    async def _apply(
        self, link: SiteLink, step: int, tensors: dict[str, Array], halfway: Callable[[], None] | None
    ) -> None:
        # SP-11-8: the site said on joining how far it is; what it has applied is not sent again.
        if self.applied >= step:
            return
        try:
            await link.send(Gradients(step, tensors), halfway)
            answer = await link.hear(f"step {step} to be applied", Applied)
        except SplitprotoError:
            if halfway is not None:
                halfway()
            raise
        if answer.step != step:
            raise UnexpectedMessage(f"step {answer.step} applied where {step} was due")
        self._memory.applied = step
        self._show_progress()

    async def advance(self, step: int) -> None:
        """Have the site count on to `step`, which was made without it; what was announced to it is void."""
        await self.asking.ask(Question(f"its advance to step {step}"), self._advance, step)
        self._memory.applied = step
        self._show_progress()

    async def _advance(self, link: SiteLink, step: int) -> None:
        link.void_announced()
        await link.send(Advance(step))
        answer: Message | None = None
        # SP-11-31: what was under way before is void.
        while not (isinstance(answer, Advanced) and answer.step == step):
            answer = await link.hear(
                f"its advance to step {step}",
                Advanced, Activations, Withdraw, Applied, Saved, Unsaved, Located,
            )  # fmt: skip

    # --- averages --------------------------------------------------------------------------------------

    async def share(self, step: int, seat: str, expected: Sequence[Descriptor]) -> dict[str, Array]:
        """SP-11.16-2: the weights of the site's encoder at `seat`, after the committed `step`; float32 by name.

        Args:
            expected: names and shapes of the weights.
        """
        question = Question(f"its encoder of {seat} after step {step}")
        return await self.asking.ask(question, self._share, step, self._place(seat), expected)

    async def _share(
        self, link: SiteLink, step: int, seat: int, expected: Sequence[Descriptor]
    ) -> dict[str, Array]:
        await link.send(Share(step, seat))
        answer = await link.hear(f"its encoder after step {step}", Shared)
        if (answer.step, answer.seat) != (step, seat):
            raise UnexpectedMessage(f"an encoder of step {answer.step} where that of step {step} was due")
        if not matches(expected, answer.tensors):
            # SP-11.16-3.
            raise SchemaMismatch(
                f"{self.name} has another encoder than the job's network: it cannot be averaged"
            )
        return dict(answer.tensors)

    async def average(self, step: int, seat: str, tensors: Mapping[str, Array]) -> None:
        """SP-11.16-5: have the site make step `step` + 1 from these weights, also if it forgets them meanwhile."""
        place = self._place(seat)
        message = Average(step, place, tensors)
        await self.asking.ask(Question(f"the average of {seat} to be taken"), self._average, message)
        self._averages[place] = message

    async def _average(self, link: SiteLink, message: Average) -> None:
        await link.send(message)
        answer = await link.hear(f"the average after step {message.step} to be taken", Averaged)
        if (answer.step, answer.seat) != (message.step, message.seat):
            raise UnexpectedMessage(f"an average of step {answer.step} where step {message.step} was due")

    def _place(self, seat: str) -> int:
        """In the offer."""
        return [one.name for one in self._offer.seats].index(seat)

    async def save(self, step: int, keep: Sequence[int] = (), *, leaving: bool = False) -> bytes | None:
        """Have the site write its half of `step` to disk; returns its digest, None if it could not.

        Args:
            step: the committed one.
            keep: steps that all hold, and that must stay (SP-11-33).
            leaving: work ends here, at an unplanned step, so activations of batches that were announced
                beyond it may come first, and are void.
        """
        question = Question(f"its checkpoint of step {step}")
        answer = await self.asking.ask(question, self._save, step, keep, leaving)
        if isinstance(answer, Unsaved):
            self.unsaved += 1
            self._report(h.SiteUnsaved(self.name, step, answer.reason))
            return None
        self._memory.note_saved(step, keep)
        self._show_progress()
        return answer.digest

    async def _save(self, link: SiteLink, step: int, keep: Sequence[int], leaving: bool) -> Saved | Unsaved:
        await link.send(Checkpoint(step, tuple(keep)))
        what = f"its checkpoint of step {step}"
        answer: Message | None = None
        while not isinstance(answer, Saved | Unsaved):
            if leaving:
                answer = await link.hear(what, Saved, Unsaved, Activations, Withdraw)
            else:
                answer = await link.hear(what, Saved, Unsaved)
        if answer.step != step:
            raise UnexpectedMessage(f"step {answer.step} saved where {step} was due")
        return answer

    async def roll_back(self, step: int) -> None:
        """Have the site go back to its checkpoint of `step`."""
        self._averages.clear()
        await self.asking.ask(Question(f"its return to step {step}"), self._roll_back, step)

    async def _roll_back(self, link: SiteLink, step: int) -> None:
        link.void_announced()
        await link.send(Rollback(step))
        # SP-11-15: what was under way before the rollback is void.
        answer: Message | None = None
        while not (isinstance(answer, RolledBack) and answer.step == step):
            answer = await link.hear(
                f"its return to step {step}",
                RolledBack, Activations, Withdraw, Applied, Advanced, Saved, Unsaved, Located,
            )  # fmt: skip
        self._memory.note_rolled_back(step)
        self._show_progress()

    async def catch_up(self, step: int, patients: int) -> None:
        """Bring a site that was absent to the committed `step`, where it continues with the weights that it
        has. Raises: JobFailed: it has no checkpoint left to continue from.
        """
        # SP-11-36.
        self._presence.start_catching_up()
        self._averages.clear()
        await self.begin(step, patients, even_restarted=True)
        if (back_to := self._memory.return_point(step)) is not None:
            self._memory.write_off()
            await self.roll_back(back_to)
        await self.advance(step)
        self._memory.note_caught_up()
        self._presence.end_catching_up()

    async def tell(self, message: Message) -> bool:
        """Send a message that has no answer, if the site is connected; returns whether it was.

        The link of a site that does not take it in time ends: else it would stay queued there.
        """
        link = self._presence.link
        if self.here and link is not None and link.begun:
            try:
                await link.send(message)
            except SplitprotoError as error:
                if isinstance(error, DeadlineExceeded):
                    link.session.fail(error)
                self._report(h.SiteLost(self.name, str(error)))
            else:
                return True
        return False

    def redial(self, cause: str) -> None:
        """End its link: on the next one it owes nothing."""
        if self._presence.link is not None and self._presence.link.alive:
            self._presence.link.session.fail(DeadlineExceeded(cause))

    async def bring(self, step: int, patients: int, *, count_on: bool) -> None:
        """SP-11.19-15: have a site that has joined at the committed `step`, whatever it has forgotten.

        Args:
            count_on: a site that does not hold the step may keep the weights that it has.

        Raises:
            JobFailed: it does not hold the step.
        """
        if self.absent:
            await self.catch_up(step, patients)
            return
        if (link := self._presence.link) is not None and link.begun and self.applied == step:
            return
        await self.reach()
        await self.begin(step, patients, even_restarted=True)
        if self.applied == step:
            return
        if step in self.checkpoints:
            await self.roll_back(step)
        elif count_on:
            await self.advance(step)
        else:
            raise JobFailed(f"site {self.name} holds no weights of step {step}: bring its run folder back")

    async def dismiss(self, text: str) -> bool:
        """Say bye, `complete`, on the present link; one that is joining goes on.

        Returns:
            Whether the site is known to have heard it: not where it had said bye before, as when its link is worn.
        """
        self._octets_before = self.traffic
        link = self._presence.let_go()
        return link is not None and await link.session.close("complete", text)

    async def say_bye(self, reason: str, text: str) -> bool:
        """End all links cleanly, those too that have not finished joining.

        Returns:
            Whether the site's holder is known to have heard it.
        """
        links, self._octets_before = [*self._joining], self.traffic
        if (present := self._presence.let_go()) is not None:
            links.append(present)
        heard = await asyncio.gather(*(link.session.close(reason, text) for link in links))
        return any(link.holder_known for link, known in zip(links, heard, strict=True) if known)

    # --- inside ----------------------------------------------------------------------------------------

    async def _ready(self, link: SiteLink) -> None:
        """Raises DeadlinePassed: it waits for another site."""
        if not link.begun and self._relay is not None:
            await self._relay.await_fresh(self.name, self._patience_s)

    async def _prepare(self, link: SiteLink, question: Question) -> None:
        """Prepare a link for a request: begun, and with the site's memory unchanged.

        Raises:
            SiteRestarted: it lost what the question needs.
        """
        if not link.begun:
            if self._relay is not None:
                await link.send(self._relay.others(self.name))
            await link.send(Begin(self._committed, self._patients_in_use))
            link.begun = True
            for message in (*([self.settled] if self.settled else ()), *self._withdrawn):
                await link.send(message)
        if self._memory.lost and not question.even_restarted:
            step = self._memory.restore_point(question.computed)
            await self._roll_back(link, step)
            # SP-11.16-7: what it forgot besides its own weights.
            for average in self._averages.values():
                if average.step == step:
                    await self._average(link, average)
            self._report(h.SiteRestored(self.name, step))

    def _show_progress(self) -> None:
        octets_in, octets_out = self.traffic
        self._report(h.SiteProgressed(self.name, self.applied, self.checkpoints, octets_in, octets_out))
