"""What the site of the labels is asked: the gradient of a loss, and scores of predictions (SP-11.20).

All raise what the questions of a `RemoteSite` raise.
"""

from __future__ import annotations

from collections.abc import Mapping

from splitpeer.coordinator.asking import Question
from splitpeer.coordinator.remote_site import RemoteSite
from splitpeer.coordinator.site_link import SiteLink
from splitpeer.coordinator.withdrawals import check_withdrawal
from splitproto.errors import Misaligned, SchemaMismatch, UnexpectedMessage
from splitproto.messages import Conclude, Logits, LossGradients, Prediction, Scores, Withdraw
from splitproto.tensors import Descriptor, matches


async def loss_gradients(site: RemoteSite, asked: Logits) -> LossGradients | Withdraw:
    """SP-11.20-6: the gradient of the loss by these logits, or whose masks cannot be used."""

    async def ask(link: SiteLink) -> LossGradients | Withdraw:
        await link.send(asked)
        answer = await link.hear(f"the loss of step {asked.step}", LossGradients, Withdraw)
        _check(site, asked, "train", 0, answer)
        if isinstance(answer, Withdraw):
            return answer
        if answer.digest != asked.digest:
            raise Misaligned(f"{site.name} used other samples than those of step {asked.step}")
        if not matches([Descriptor.of(name, array) for name, array in asked.tensors.items()], answer.tensors):
            raise SchemaMismatch(f"{site.name} sent other gradients than those of the logits")
        return answer

    # Where the site also waits for the gradients of its own activations, a restart costs the step.
    computed = asked.step if site.seats else 0
    return await site.asking.ask(Question(f"the loss of step {asked.step}", computed=computed), ask)


async def score(site: RemoteSite, asked: Prediction) -> Scores | Withdraw:
    """SP-11.20-9: have the site score a prediction, or say that it cannot use the mask."""

    async def ask(link: SiteLink) -> Scores | Withdraw:
        await link.send(asked)
        answer = await link.hear(f"a score of step {asked.step}", Scores, Withdraw)
        _check(site, asked, "evaluate", asked.batch, answer)
        return answer

    return await site.asking.ask(Question(f"a score of step {asked.step}"), ask)


async def conclude(site: RemoteSite, asked: Conclude) -> Mapping[str, float]:
    """SP-11.20-9: the figures of an evaluation that the site tells."""

    async def ask(link: SiteLink) -> Mapping[str, float]:
        await link.send(asked)
        answer = await link.hear(f"the scores of step {asked.step}", Scores)
        _check(site, asked, "evaluate", asked.batch, answer)
        return answer.values

    return await site.asking.ask(Question(f"the scores of step {asked.step}"), ask)


def _check(
    site: RemoteSite,
    asked: Logits | Prediction | Conclude,
    mode: str,
    batch: int,
    answer: LossGradients | Scores | Withdraw,
) -> None:
    """Raises UnexpectedMessage, Misaligned: the answer is not to what was asked."""
    same = answer.step == asked.step
    if not isinstance(answer, LossGradients):
        same = same and answer.batch == batch
    if isinstance(answer, Withdraw) and not isinstance(asked, Conclude):
        same = same and answer.mode == mode
        if answer.digest != asked.digest:
            raise Misaligned(f"{site.name} withdrew patients of other samples of step {asked.step}")
    if not same:
        raise UnexpectedMessage(f"{answer.name} of step {answer.step} where step {asked.step} was due")
    if isinstance(answer, Withdraw) and not isinstance(asked, Conclude):
        check_withdrawal(asked.samples if isinstance(asked, Logits) else (asked.sample,), answer)
