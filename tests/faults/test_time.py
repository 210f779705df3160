"""Machines that sleep, processes that get no CPU, clocks that are changed: time passes, and nothing is lost."""

from __future__ import annotations

import signal
import time

import pytest

PACE = 0.1
"""Two seconds of silence end a link."""
STEP_S = 6.0
OFTEN = {"recheck_s": 0.1}


@pytest.mark.parametrize("sleepers", ["everybody", "the sites"])
def test_whoever_slept_goes_on_where_it_was(scene, sleepers: str) -> None:
    """Longer than the silence that a link bears, than a step's deadline, than all questions of a step together."""
    scene.bent = {"pace": PACE}
    scene.cast(
        "flair",
        "t1",
        training={"steps": 40, "checkpoint_every": 10},
        deadlines={"step_s": STEP_S, "return_s": 60},
    )
    hub, clients = scene.start_all()
    scene.until_step(12)
    asleep = {"everybody": (hub, *clients.values()), "the sites": tuple(clients.values())}[sleepers]
    for daemon in asleep:
        daemon.signal(signal.SIGSTOP)
    time.sleep(STEP_S + 1.5)
    for daemon in asleep:
        daemon.signal(signal.SIGCONT)
    assert hub.code() == 0, hub.said
    assert [client.code() for client in clients.values()] == [0, 0]
    assert not any(line.get("rollback") for line in scene.metrics())
    assert all("Traceback" not in daemon.said for daemon in (hub, *clients.values()))
    scene.assert_exact()


def test_a_clock_that_is_set_moves_nothing_but_what_is_written(scene) -> None:
    """Deadlines and heartbeats live on the monotonic clock; certificates are good for longer than these jumps."""
    scene.bent = {"clock": "clock"}
    scene.cast("flair", "t1", training={"steps": 40, "checkpoint_every": 10})
    here = f"tcp://127.0.0.1:{scene.port}"
    scene.coordinator(network={"listen": here, **OFTEN})
    for modality in scene.modalities:
        scene.client(modality, network={"coordinator": here, **OFTEN})

    def set_clock(who: str, days: float) -> None:
        aside = scene.folder / who / "clock.new"
        aside.write_text(str(86_400 * days))
        aside.replace(scene.folder / who / "clock")

    for who in ("hub", "site-flair", "site-t1"):
        set_clock(who, 0)
    hub, clients = scene.start_all()
    for step, who, days in ((5, "hub", 40), (12, "site-t1", -400), (19, "hub", -400), (26, "site-flair", 40)):
        scene.until_step(step)
        set_clock(who, days)
    assert hub.code() == 0, hub.said
    assert [client.code() for client in clients.values()] == [0, 0]
    assert [client.said.count("link.up") for client in clients.values()] == [1, 1]
    assert not any(line.get("rollback") for line in scene.metrics())
    scene.assert_exact()
