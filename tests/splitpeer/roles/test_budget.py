"""A site with a privacy budget in a real federation: it pays for what it sends, and stops."""

from __future__ import annotations

import json
import logging
import signal
from collections import Counter

import pytest

from splitpeer.daemon.trail import entries
from splitpeer.data.sampling import TrainingSchedule
from splitpeer.errors import ConfigError, JobFailed
from splitpeer.privacy.accounting import epsilon, noise_for
from splitpeer.privacy.ledger import NAME
from splitpeer.settings.peer import PeerConfig
from splitpeer.site.people import People
from splitproto.errors import PolicyRefused
from splitproto.messages import Activations

from .scene import PATIENTS

EPSILON, DELTA = 8.0, 1e-5


def budget(records: int, frozen: bool = True) -> dict:
    """Sections for a client whose patients bear so many records each."""
    noise = noise_for(EPSILON, DELTA, records) * (1 + 1e-9)
    written = f"dp-gaussian:clip=100,noise={noise!r},frozen={str(frozen).lower()}"
    return {
        "policy": {"coordinators": ["hub"], "defences": [written], "epsilon": EPSILON, "delta": DELTA},
        "runtime": {"initial_weights": "private"},
    }


def ledger(scene, site: str = "site-t1") -> Counter[str]:
    """Records paid, by patient's key: each patient here is a person."""
    found = json.loads((scene.folder / site / "state" / NAME).read_text())["patients"]
    people = People(scene.folder / site / "state")
    keys = {people.account(patient).hex(): scene.key(patient).hex() for patient in PATIENTS}
    return Counter({keys[account]: sum(entry["paid"].values()) for account, entry in found.items()})


def asked(scene, steps: int) -> list[list[str]]:
    """The patients of each of the job's first batches, computed here."""
    job = scene.settings
    batches = TrainingSchedule(
        scene.patients()[0], scene.masks(), window=(*job.data.window, 1), batch=job.training.batch,
        steps=job.training.steps, seed=job.job.seed, positive_fraction=job.data.positive_fraction,
    )  # fmt: skip
    return [[sample.key.hex() for sample in batches.batch(step)[0]] for step in range(steps)]


@pytest.fixture
def sent(monkeypatch) -> list[Activations]:
    """Everything that left the site t1, as its own session was given it."""
    from splitpeer.site import opening

    left: list[Activations] = []

    class Noted(opening.SiteJob):
        def forward(self, forward):
            made = super().forward(forward)
            if self.seats[0].name == "t1":
                left.append(made)
            return made

    monkeypatch.setattr(opening, "SiteJob", Noted)
    return left


async def test_a_frozen_site_pays_for_every_window_of_training_and_evaluation(scene, sent) -> None:
    scene.cast("flair", "t1", training={"steps": 6})
    scene.client("t1", **budget(10_000))
    ran = await scene.together()
    assert ran.error is None, ran.error
    assert all(error is None for error in ran.clients.values()), ran.clients
    expected = Counter(key for batch in asked(scene, 6) for key in batch)
    paid = ledger(scene)
    held_out = {key.hex() for key in scene.patients()[1]}
    assert {key: count for key, count in paid.items() if key not in held_out} == expected
    # Evaluation is paid for as well, to the window.
    evaluated = sum(len(made.tensors["x0"]) for made in sent if made.mode == "evaluate")
    assert evaluated > 0
    assert sum(count for key, count in paid.items() if key in held_out) == evaluated
    last = [line for line in entries(scene.folder / "site-t1" / "state" / "audit.jsonl")
            if line["event"] == "privacy.spent"][-1]  # fmt: skip
    (noise,) = {noise for entry in json.loads((scene.folder / "site-t1" / "state" / NAME).read_text())[
        "patients"].values() for noise in map(float, entry["paid"])}  # fmt: skip
    assert last["epsilon"] == pytest.approx(epsilon({noise: max(paid.values())}, DELTA), abs=1e-3)
    assert not any(key in str(last) for key in paid)


async def test_an_encoder_that_learns_pays_for_all_it_has_seen(scene) -> None:
    scene.cast("flair", "t1", training={"steps": 4})
    scene.client("t1", **budget(10_000, frozen=False))
    ran = await scene.together()
    assert ran.error is None, ran.error
    batches, paid = asked(scene, 4), ledger(scene)
    learned: set[str] = set()
    expected: Counter[str] = Counter()
    for batch in batches:
        expected.update(
            {key: len(batch) if key in learned else batch.count(key) for key in learned | set(batch)}
        )
        learned |= set(batch)
    held_out = {key.hex() for key in scene.patients()[1]}
    evaluated = sum(paid[key] for key in held_out)
    assert {key: paid[key] - evaluated for key in learned} == expected


async def test_when_the_budget_is_spent_nothing_more_leaves_and_all_hear_why(scene, sent, caplog) -> None:
    caplog.set_level(logging.INFO, "splitpeer")
    scene.cast("flair", "t1", training={"steps": 12})
    scene.client("t1", **budget(3))
    ran = await scene.together()
    why = "the privacy budget of this site (epsilon 8 at delta 1e-05) is spent for"
    assert isinstance(ran.clients["site-t1"], PolicyRefused)
    assert why in str(ran.clients["site-t1"])
    assert why in str(ran.error)
    assert isinstance(ran.clients["site-flair"], JobFailed)
    assert why in str(ran.clients["site-flair"])
    left = Counter(key for made in sent for key in asked(scene, 12)[made.step - 1])
    assert left == ledger(scene)
    assert max(left.values()) <= 3
    spent = len(sent)
    assert 1 <= spent < 12
    trail = entries(scene.folder / "site-t1" / "state" / "audit.jsonl")
    assert why in str([line["cause"] for line in trail if line["event"] == "peer.stop"][-1])
    said = "\n".join(f"{r.getMessage()} {getattr(r, 'fields', {})}" for r in caplog.records)
    assert "privacy.refused" in said and "privacy.spent" in said
    assert not any(key in said for key in left)
    # And another job gets no more than what is left.
    scene.job(job={"name": "another", "seed": 8}, training={"steps": 12})
    ran = await scene.together()
    assert isinstance(ran.clients["site-t1"], PolicyRefused)
    assert max(ledger(scene).values()) <= 3


async def test_a_frozen_encoder_keeps_its_weights(scene) -> None:
    scene.cast("t1", training={"steps": 5, "checkpoint_every": 5})
    scene.client("t1", **budget(10_000))
    ran = await scene.together()
    assert ran.error is None, ran.error
    first, last = scene.weights(0), scene.weights(5)
    same = {name: bool((first[name] == last[name]).all()) for name in first}
    assert all(same[name] for name in same if name.startswith("encoders"))
    assert not all(same.values())


def test_both_sides_leave_with_exit_code_1(scene) -> None:
    scene.cast("t1", training={"steps": 12})
    scene.client("t1", **budget(2))
    hub, clients = scene.start_all()
    assert (hub.code(), clients["t1"].code()) == (1, 1), hub.said + clients["t1"].said
    for daemon in (hub, clients["t1"]):
        assert "the privacy budget of this site (epsilon 8 at delta 1e-05) is spent" in daemon.last
        assert "Traceback" not in daemon.said


def test_a_killed_site_has_paid_for_all_that_left(scene) -> None:
    scene.cast("flair", "t1", training={"steps": 40, "checkpoint_every": 10})
    scene.client("t1", **budget(10_000))
    hub, clients = scene.start_all()
    scene.until_step(13)
    clients["t1"].signal(signal.SIGKILL)
    hub.until(r"site\.(left|lost) .*site-t1")
    steps = len(scene.losses())
    after_crash = ledger(scene)
    left = Counter(key for batch in asked(scene, steps) for key in batch)
    assert all(after_crash[key] >= count for key, count in left.items())
    again = scene.start("site-t1")
    assert (hub.code(), again.code()) == (0, 0), hub.said + again.said
    back = int(hub.until(r"job\.rollback step=(\d+)")[1])
    # What was repeated after the rollback got new noise, and was paid again.
    repeated = Counter(key for batch in asked(scene, 40)[back:] for key in batch)
    finally_paid = ledger(scene)
    assert all(finally_paid[key] == after_crash[key] + repeated[key] for key in repeated)


async def test_a_batch_ordered_again_is_sent_again_and_paid_once(scene, sent) -> None:
    """Lost with its link: the octets are still there, and are no new release."""
    from splitpeer.site.client import Client

    scene.cast("flair", "t1", training={"steps": 8, "checkpoint_every": 100})
    scene.client("t1", **budget(10_000))
    work, cut = Client._work, []

    async def lose_the_third(self, session, job):
        async def send(message, *rest, _send=session.send):
            if (
                isinstance(message, Activations)
                and message.step == 3
                and job.seats[0].name == "t1"
                and not cut
            ):
                cut.append(message)
                from splitproto.errors import LinkLost

                raise LinkLost("cut by the test")
            return await _send(message, *rest)

        session.send = send
        return await work(self, session, job)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Client, "_work", lose_the_third)
        ran = await scene.together()
    assert ran.error is None, ran.error
    third = [made for made in sent if made.mode == "train" and made.step == 3]
    assert len(third) == 2
    assert third[0] is third[1] is cut[0]
    paid = ledger(scene)
    expected = Counter(key for batch in asked(scene, 8) for key in batch)
    assert {key: paid[key] for key in expected} == expected


@pytest.mark.parametrize(
    ("over", "words"),
    [
        ({"delta": None}, "epsilon and delta are one budget: write both, or neither"),
        ({"defences": ["gaussian:1"]}, "only dp-gaussian among the defences can keep"),
        ({"delta": 1.0}, "delta must be less than 1"),
        ({"epsilon": 0}, "epsilon must be greater than 0"),
    ],
)
def test_a_budget_that_cannot_be_kept_is_no_budget(scene, over, words: str) -> None:
    sections = budget(10)
    policy = {key: value for key, value in {**sections["policy"], **over}.items() if value is not None}
    here = scene.client("t1", **{**sections, "policy": policy})
    with pytest.raises(ConfigError, match=words) as error:
        PeerConfig.load(here / "peer.toml", environ={})
    assert "\n" not in str(error.value)


def test_a_budget_with_noise_that_anybody_can_compute_is_none(scene) -> None:
    here = scene.client("t1", **{**budget(10), "runtime": {"initial_weights": 7}})
    with pytest.raises(ConfigError, match="anyone who knows the seed computes the noise"):
        PeerConfig.load(here / "peer.toml", environ={})


def test_a_damaged_ledger_is_found_before_dialling(scene) -> None:
    scene.cast("t1")
    scene.client("t1", **budget(10))
    (scene.folder / "site-t1" / "state").mkdir()
    (scene.folder / "site-t1" / "state" / NAME).write_text("{")
    client = scene.start("site-t1")
    assert client.code() == 4
    assert "not a whole privacy ledger: restore it from a backup" in client.last
