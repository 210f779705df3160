"""What a site hears on a new link (SP-11-16): the gradients that it lost, and no batch that it has computed already."""

from __future__ import annotations

from splitpeer.site import client
from splitproto import dial
from splitproto.errors import LinkLost


async def test_gradients_that_were_lost_come_again_without_another_forward(scene, monkeypatch) -> None:
    scene.cast("t1", training={"steps": 4, "batch": 1, "checkpoint_every": 4, "ahead": 1})
    links: list[list[tuple[str, int | None]]] = []

    async def losing(*arguments, **keywords):
        session = await dial(*arguments, **keywords)
        receive, heard = session.receive, []
        links.append(heard)

        async def hearing(*arguments, **keywords):
            message = await receive(*arguments, **keywords)
            if len(links) == 1 and message.name == "gradients" and message.step == 2:
                error = LinkLost("cut by the test")
                session.carrier_lost(error)
                raise error
            heard.append((message.name, getattr(message, "step", None)))
            return message

        session.receive = hearing
        return session

    monkeypatch.setattr(client, "dial", losing)
    ran = await scene.together()
    assert ran.result is not None, ran.error
    assert len(links) == 2
    assert ("forward", 2) in links[0]
    words = [word for word in links[1] if word[0] not in ("job-offer", "begin")]
    assert words[0] == ("gradients", 2)
    assert ("forward", 2) not in words
