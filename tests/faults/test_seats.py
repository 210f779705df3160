"""Kill -9 of each party, where two hospitals fill one seat and patients have gaps: the result is as if undisturbed."""

from __future__ import annotations

import json
import signal

import pytest

from tests.splitpeer.roles.gaps import Whole, cast, who


@pytest.mark.timeout(400)
@pytest.mark.parametrize("killed", who())
def test_a_killed_party_changes_nothing(scene, killed) -> None:
    """SP-11-14, SP-11-34: weights of all, losses and Dice."""
    cast(scene, training={"steps": 24, "checkpoint_every": 5})
    running = {name: scene.start(name) for name in who()}
    scene.until_step(7)
    running[killed].signal(signal.SIGKILL)
    assert running[killed].code() == -signal.SIGKILL
    running[killed] = scene.start(killed)
    scene.until_step(16)
    running[killed].signal(signal.SIGKILL)
    running[killed] = scene.start(killed)
    assert {name: daemon.code() for name, daemon in running.items()} == dict.fromkeys(running, 0), running[
        "hub"
    ].said
    whole = Whole(scene).train()
    whole.assert_exact()
    assert json.loads((scene.output / "result.json").read_text())["dice"] == whole.dice()
