"""Peers that speak the protocol but break its rules: the job ends with one line that names the site."""

from __future__ import annotations

import asyncio
import dataclasses
import secrets
from collections import deque
from collections.abc import Callable, Iterable

import numpy as np
import pytest

from splitpeer.cli.outcome import exit_code
from splitpeer.errors import DeadlinePassed, JobFailed
from splitpeer.federation.terms import cut_descriptors, job_on_wire
from splitpeer.site.client import Client
from splitproto import Listener, SplitprotoError, dial
from splitproto.errors import Misaligned, SchemaMismatch
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
    Progress,
    Rollback,
    RolledBack,
    Saved,
    Withdraw,
)
from splitproto.records import Patient, Seat, Unusable
from splitproto.tensors import schema_digest
from tests.splitpeer.roles.scene import JOINT

Twist = Callable[[Message], Iterable[Message]]


async def peer(scene, twist: Twist, inventory: Callable[[list[Patient]], list[Patient]] = lambda p: p) -> str:
    """A client of some fifty lines. `twist` takes each answer and returns what is sent instead.

    Returns why its link ended.
    """
    config = scene.config("site-t1")
    volumes = scene.images("t1")
    session = await dial(config.network.coordinator, config.credentials(), config.allow_list())

    async def answer(message: Message) -> None:
        for changed in twist(message):
            await session.send(changed)

    try:
        offer = await session.receive(20)
        assert isinstance(offer, JobOffer)
        patients = []
        for key in volumes.keys():  # noqa: SIM118 (not a dict)
            grid = volumes.geometry(key)
            patients.append(Patient(key, grid.shape, grid.spacing, grid.directions, grid.origin, grid.stored))
        await answer(JobAccept(secrets.token_bytes(16), 0, (0,), len(patients)))
        await answer(Inventory(tuple(inventory(patients)), True, volumes.salt_check))
        announced: deque[Forward] = deque()
        applied = 0
        while True:
            while announced and announced[0].step == applied + (announced[0].mode == "train"):
                asked = announced.popleft()
                described = cut_descriptors(offer.job, len(asked.samples))
                tensors = {d.name: np.full(d.shape, 0.5, np.float32) for d in described}
                for array in tensors.values():
                    array.flat[::3] = -1.0
                await answer(Activations(asked.mode, asked.step, asked.batch, asked.digest, tensors))
            match await session.receive(20):
                case Forward() as asked:
                    announced.append(asked)
                case Gradients() as back:
                    applied = back.step
                    await answer(Applied(back.step))
                case Checkpoint() as asked:
                    await answer(Saved(asked.step, bytes(32)))
                case Rollback() as asked:
                    announced.clear()
                    applied = asked.step
                    await answer(RolledBack(asked.step))
                case Advance() as asked:
                    announced.clear()
                    applied = asked.step
                    await answer(Advanced(asked.step))
                case Begin() | Progress():
                    pass
                case Bye() as said:
                    await session.close(said.reason)
                    return f"{said.reason}: {said.text}"
    except SplitprotoError as error:
        return str(error)
    finally:
        await session.close("failed", timeout=0.5)


def replace(kind: type[Message], change: Callable[[Message], Iterable[Message]]) -> Twist:
    return lambda message: change(message) if isinstance(message, kind) else [message]


def altered(kind: type[Message], **fields: object) -> Twist:
    def change(message: Message) -> list[Message]:
        made = {k: v(getattr(message, k)) if callable(v) else v for k, v in fields.items()}
        return [dataclasses.replace(message, **made)]

    return replace(kind, change)


def nan(tensors):
    spoiled = {name: array.copy() for name, array in tensors.items()}
    spoiled["x2"].flat[7] = np.nan
    return spoiled


def withdraw(message: Message, key: bytes) -> Withdraw:
    """Instead of activations."""
    of = (message.mode, message.step, message.batch, message.digest)
    return Withdraw(*of, (Unusable(key, "missing"),))


async def run(scene, *arguments: object) -> tuple[BaseException | None, str]:
    async with scene.running(only=["hub"]) as on:
        await asyncio.sleep(0.05)
        why = await peer(scene, *arguments)
        await asyncio.wait(on.tasks.values(), timeout=30)
        return on.tasks["hub"].exception(), why


async def test_a_peer_that_keeps_to_it_completes(scene) -> None:
    """What follows proves nothing if this fails."""
    scene.cast("t1", training={"steps": 3, "checkpoint_every": 2})
    error, why = await run(scene, lambda message: [message])
    assert error is None
    assert why.startswith("complete")


TRANSPOSED = {"x0": np.zeros((3, 2, 16, 64), np.float32)}
CASES = {
    "another digest": (
        altered(Activations, digest=bytes(32)),
        "site-t1 used other samples than those of step 1",
    ),
    "another step": (altered(Activations, step=2), "activations of another batch than step 1, 0"),
    "another mode": (altered(Activations, mode="evaluate"), "activations of another batch than step 1, 0"),
    "another batch": (altered(Activations, batch=1), "activations of another batch than step 1, 0"),
    "a level missing": (
        altered(Activations, tensors=lambda t: {n: a for n, a in t.items() if n != "x1"}),
        "site-t1 sent other tensors than the job describes",
    ),
    "a level too many": (
        altered(Activations, tensors=lambda t: {**t, "x5": t["x4"]}),
        "site-t1 sent other tensors than the job describes",
    ),
    "another shape": (
        altered(Activations, tensors=lambda t: {**t, **TRANSPOSED}),
        "site-t1 sent other tensors than the job describes",
    ),
    "another dtype": (
        altered(Activations, tensors=lambda t: {**t, "x4": t["x4"].astype(np.float16)}),
        "site-t1 sent other tensors than the job describes",
    ),
    "not a number": (
        altered(Activations, tensors=nan),
        "site site-t1 sent activations (x2) that are not finite",
    ),
    "applied another step": (altered(Applied, step=7), "step 7 applied where 1 was due"),
    "applied unasked": (
        replace(Activations, lambda m: [Applied(1), m]),
        "applied where activations of step 1",
    ),
    "withdraws a patient who is not in the batch": (
        replace(Activations, lambda m: [withdraw(m, bytes(16))]),
        "patients withdrawn who are not in the batch of step 1",
    ),
    "withdraws in another batch": (
        replace(Activations, lambda m: [dataclasses.replace(withdraw(m, bytes(16)), step=2)]),
        "activations of another batch than step 1, 0",
    ),
    "saved another step": (altered(Saved, step=9), "step 9 saved where 2 was due"),
}


@pytest.mark.parametrize("case", CASES)
async def test_a_site_that_does_not_keep_to_it_is_named(scene, case: str) -> None:
    """SP-11-5, SP-11-9, SP-11-10, SP-11-13, SP-11.13-4."""
    twist, line = CASES[case]
    scene.cast("t1", training={"steps": 3, "checkpoint_every": 2})
    error, why = await run(scene, twist)
    assert isinstance(error, JobFailed), error
    assert error.exit_code == 1
    assert str(error).startswith("site site-t1")
    assert line in str(error)
    assert "\n" not in str(error)
    # The site is told as well, unless TCP dropped it: it sends on while the coordinator's process closes.
    assert line.partition("site-t1 ")[2] in why or line in why or why == "the connection was lost"


async def test_gradients_that_are_never_applied(scene) -> None:
    """SP-11-7, SP-11-19."""
    scene.cast("t1", training={"steps": 1}, deadlines={"step_s": 0.5})
    error, why = await run(scene, replace(Applied, lambda m: []))
    assert isinstance(error, DeadlinePassed)
    assert error.exit_code == 3
    assert str(error) == "site site-t1: waited 0.5 s for step 1 to be applied from site-t1"
    assert "waited 0.5 s" in why or why == "the connection was lost"


async def test_activations_that_never_come(scene) -> None:
    """SP-11-19."""
    scene.cast("t1", deadlines={"step_s": 0.5})
    error, _ = await run(scene, replace(Activations, lambda m: []))
    assert isinstance(error, DeadlinePassed)
    assert str(error) == "site site-t1: waited 0.5 s for activations of step 1 from site-t1"


async def test_not_a_number_in_evaluation_is_no_dice(scene) -> None:
    scene.cast("t1", training={"steps": 1})

    def spoil(message: Message) -> list[Message]:
        changed = nan(message.tensors) if message.mode == "evaluate" else message.tensors
        return [dataclasses.replace(message, tensors=changed)]

    error, _ = await run(scene, replace(Activations, spoil))
    assert isinstance(error, JobFailed)
    assert "site site-t1 sent activations (x2) that are not finite" in str(error)


async def test_an_inventory_that_does_not_add_up_does_not_join(scene) -> None:
    """SP-11-4."""
    scene.cast("t1", deadlines={"join_s": 1.5})
    error, why = await run(scene, lambda m: [m], lambda patients: patients[:-1])
    assert "6 patients announced, 5 listed" in why
    assert isinstance(error, DeadlinePassed)
    assert "missing after 1.5 s: site-t1" in str(error)


@pytest.mark.parametrize("how", ["as usable", "twice", "too early"])
async def test_unusable_patients_that_do_not_add_up_do_not_join(scene, how: str) -> None:
    """SP-11.13-9."""
    scene.cast("t1", deadlines={"join_s": 1.5})

    def change(message: Inventory) -> list[Message]:
        stranger, known = Unusable(bytes(16), "missing"), Unusable(message.patients[0].key, "missing")
        listed = {"as usable": (known,), "twice": (stranger, stranger), "too early": (stranger,)}[how]
        changed = dataclasses.replace(message, unusable=listed, last=how != "too early")
        return [changed, Inventory((), True, message.salt_check)][: 1 + (how == "too early")]

    error, why = await run(scene, replace(Inventory, change))
    assert "patients that cannot be used are listed too early, twice, or as usable" in why
    assert isinstance(error, DeadlinePassed)


async def test_a_batch_that_its_digest_does_not_fit_is_refused_by_the_site(scene, monkeypatch) -> None:
    """SP-11-5: the other direction: a coordinator that commits to one batch and sends another."""
    from splitpeer.federation.batches import TrainingStream

    scene.cast("t1")
    honest = TrainingStream._make
    monkeypatch.setattr(
        TrainingStream,
        "_make",
        lambda stream, index: dataclasses.replace(honest(stream, index), digest=bytes(32)),
    )
    ran = await scene.together()
    assert isinstance(ran.error, JobFailed)
    (error,) = ran.clients.values()
    assert isinstance(error, Misaligned)
    assert exit_code(error) == 1
    assert "batch of step 1: the samples do not give the digest that came with them" in str(error)
    assert "the samples do not give the digest" in str(ran.error)


async def test_gradients_of_another_shape_are_refused_by_the_site(scene, monkeypatch) -> None:
    """SP-11-10."""
    from splitpeer.training.split_step import CoordinatorHalf

    scene.cast("t1")
    honest = CoordinatorHalf.step

    def crooked(self, *asked):
        loss, gradients = honest(self, *asked)
        return loss, {m: {n: g[:1] for n, g in levels.items()} for m, levels in gradients.items()}

    monkeypatch.setattr(CoordinatorHalf, "step", crooked)
    ran = await scene.together()
    (error,) = ran.clients.values()
    assert isinstance(error, SchemaMismatch)
    assert exit_code(error) == 1
    assert "the gradients of step 1 do not have the shapes of the activations" in str(error)
    assert isinstance(ran.error, JobFailed)


@pytest.mark.parametrize("change", [{"learning_rate": 0.5}, {"steps": 9}, None])
async def test_a_run_keeps_the_terms_that_it_was_accepted_with(scene, change: dict | None) -> None:
    """SP-11-25: after a lost link the same run is offered again, with other terms or (None) the same ones."""
    scene.cast("t1")
    hub, terms = scene.config("hub"), job_on_wire(scene.settings)
    offers = [JobOffer(bytes(16), (Seat("t1", ("t1",)),), job, schema_digest(cut_descriptors(job)))
              for job in (terms, dataclasses.replace(terms, **(change or {})))]  # fmt: skip
    answers: list[Message] = []
    client = asyncio.create_task(Client(scene.config("site-t1"), asyncio.Event()).run())
    async with Listener(
        hub.network.listen,
        hub.credentials(),
        scene.settings.allow_list(),
        JOINT,
    ) as listener:
        for offer in offers:
            session = await listener.accept(30)
            await session.send(offer)
            answers.append(await session.receive(30))
            if isinstance(answers[-1], JobDecline):
                break
            while not (await session.receive(30)).last:
                pass
            await session.close("rotate")
        else:
            session = await listener.accept(30)
            await session.close("complete")
        done, _ = await asyncio.wait([client], timeout=30)
    assert done
    assert isinstance(answers[0], JobAccept)
    if change is None:
        assert isinstance(answers[1], JobAccept) and client.exception() is None
        return
    assert isinstance(answers[1], JobDecline) and answers[1].code == SchemaMismatch.code
    with pytest.raises(JobFailed, match="declined: the terms of a run cannot change while it runs"):
        client.result()
