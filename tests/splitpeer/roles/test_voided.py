"""What was under way before a `rollback` or an `advance` is void, whatever it is (SP-11-15)."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pytest

from splitproto.messages import (
    Activations,
    Advanced,
    Applied,
    JobAccept,
    Message,
    RolledBack,
    Saved,
    Unsaved,
)

from .test_misbehaviour import altered, replace, run

OLD = (
    Activations("train", 9, 0, bytes(32), {"x0": np.zeros((1, 1), np.float32)}),
    Applied(9),
    Advanced(9),
    Saved(9, bytes(32)),
    Unsaved(9, "no room"),
)


@pytest.mark.parametrize("old", OLD, ids=lambda message: message.name)
async def test_before_a_rollback(scene, old: Message) -> None:
    """A site says that it had applied five steps of a run that begins: it has to go back."""
    scene.cast("t1", training={"steps": 3, "checkpoint_every": 2})
    answered = 0

    def twist(message: Message) -> Iterable[Message]:
        nonlocal answered
        if isinstance(message, JobAccept):
            return altered(JobAccept, applied=5)(message)

        def late(back: Message) -> list[Message]:
            nonlocal answered
            answered += 1
            return [old, RolledBack(7), back]

        return replace(RolledBack, late)(message)

    error, why = await run(scene, twist)
    assert error is None, why
    assert why.startswith("complete") and answered == 1


async def test_at_any_other_time_it_is_not(scene) -> None:
    scene.cast("t1", training={"steps": 3, "checkpoint_every": 2})
    error, why = await run(scene, replace(Saved, lambda saved: [OLD[1], saved]))
    assert "applied where its checkpoint of step 2 was due" in str(error), why
