"""What a site is asked for a segmentation: whether it has the patient, and activations (SP-11.19).

All raise what the questions of a `RemoteSite` raise.
"""

from __future__ import annotations

from collections.abc import Sequence

from splitpeer.coordinator.asking import Question
from splitpeer.coordinator.remote_site import RemoteSite, Sent, Unable
from splitpeer.coordinator.site_link import SiteLink
from splitpeer.federation.seating import Part
from splitproto.errors import Misaligned, UnexpectedMessage
from splitproto.messages import Activations, Locate, Located, Withdraw


async def locate(site: RemoteSite, asked: Locate) -> Located:
    """SP-11.19-4: whether the site can use the patient of a request."""
    # SP-11.17-5: in a frozen job there is nothing that a site forgets.
    question = Question("its answer whether it has a patient", even_restarted=site.frozen)
    return await site.asking.ask(question, _locate, site, asked)


async def _locate(link: SiteLink, site: RemoteSite, asked: Locate) -> Located:
    link.unanswered += 1
    await link.send(asked)
    answer = await link.hear("its answer whether it has a patient", Located)
    link.unanswered -= 1
    found = answer.patient
    if answer.request != asked.request or (found is None) == (answer.cause is None):
        raise UnexpectedMessage("an answer to another question than where a patient is")
    if found is not None and found.key != asked.key:
        raise Misaligned(f"{site.name} located another patient than the one asked for")
    link.located = asked.request
    return answer


async def infer(
    site: RemoteSite, stream: Sequence[Part], index: int, until: int, asked: Locate
) -> Sent | Withdraw | Unable:
    """As `RemoteSite.compute`, of mode `infer` or `release`, for a request whose patient the site has located."""

    async def ask(link: SiteLink) -> Sent | Withdraw | Unable:
        # SP-11.19-8: "as after a lost link, the coordinator sends the `locate` again"
        if link.located != asked.request and (await _locate(link, site, asked)).patient is None:
            return Unable()
        return await site.compute_on(link, stream, index, until)

    forgetful = stream[index].forward.mode == "release"
    what = f"activations for a segmentation, {index + 1} of {len(stream)}"
    return await site.asking.ask(Question(what, even_restarted=forgetful), ask)


async def hear_out(site: RemoteSite) -> None:
    """Hear, and forget, what a site owes of a request that has ended: it would come in the place of other answers."""
    await site.asking.ask(Question("what it owes of a request", even_restarted=True), _hear_out)


async def _hear_out(link: SiteLink) -> None:
    while link.unanswered > 0:
        await link.hear("what it still owes of a request", Activations, Withdraw, Located)
        link.unanswered -= 1
