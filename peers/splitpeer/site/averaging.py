"""A site's part in the averages of a seat's encoders (SP-11.16)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from splitpeer.errors import JobFailed
from splitpeer.site.budgets import Budgets
from splitpeer.training.averaging import flaw
from splitpeer.training.split_step import ClientHalf
from splitproto.constants import MAX_TENSORS
from splitproto.errors import PolicyRefused, SchemaMismatch, StepMismatch, UnexpectedMessage
from splitproto.messages import Average, Averaged, Share, Shared
from splitproto.records import Job, Seat


class SiteAveraging:
    """Shares the weights of this site's encoders, and takes those to continue from.

    Args:
        job: whose policy was judged: a site that does not share is in no job that averages.
        seats: those of the offer.
        halves: the encoder of each, by seat.
        budgets: count the averages that are taken.

    Raises:
        PolicyRefused: the job averages encoders that do not fit in one message.
    """

    def __init__(
        self, job: Job, seats: Sequence[Seat], halves: Mapping[str, ClientHalf], budgets: Budgets
    ) -> None:
        self._every, self._seats, self._halves = job.average_every, seats, halves
        self._budgets = budgets
        most = max(len(half.weights()) for half in halves.values()) if self._every else 0
        if most > MAX_TENSORS:
            raise PolicyRefused(
                f"the job averages encoders of {most} tensors, and at most {MAX_TENSORS} can be sent at once"
            )

    def share(self, asked: Share, *, pending: bool) -> Shared:
        """The weights after the last step that was applied: not those of an average that was taken for the next.

        Args:
            pending: activations of a step wait for their gradients.

        Raises:
            StepMismatch: weights of another step are asked for.
            UnexpectedMessage: the job averages nothing, or there is no such seat.
        """
        half = self._asked_of(asked, pending=pending)
        return Shared(asked.step, asked.seat, half.weights())

    def take(self, average: Average, *, pending: bool) -> Averaged:
        """Make the next step from an average.

        Raises:
            StepMismatch, UnexpectedMessage: as `share`.
            SchemaMismatch: it is not of this encoder.
            JobFailed: it contains NaN, infinity or a value beyond `MOST_WEIGHT`.
            BudgetSpent: too many averages for one step of a seat.
        """
        half = self._asked_of(average, pending=pending)
        # SP-11.16-3.
        own = [(name, array.shape, array.dtype) for name, array in half.weights().items()]
        if [(name, array.shape, array.dtype) for name, array in average.tensors.items()] != own:
            raise SchemaMismatch(f"the average after step {average.step} is not of this site's encoder")
        if found := flaw(average.tensors):
            raise JobFailed(f"the average after step {average.step} holds {found}")
        self._budgets.average(average.step, average.seat)
        half.take(average.tensors)
        return Averaged(average.step, average.seat)

    def _asked_of(self, message: Share | Average, *, pending: bool) -> ClientHalf:
        """SP-11.16-2."""
        if self._every is None or message.seat >= len(self._seats):
            raise UnexpectedMessage(f"a {message.name} of a seat that this job does not average")
        half = self._halves[self._seats[message.seat].name]
        if pending or message.step != half.steps_done or message.step % self._every:
            raise StepMismatch(
                f"a {message.name} after step {message.step}, but {half.steps_done} was the last applied here "
                f"and encoders are averaged every {self._every} steps"
            )
        return half
