"""SP-11.13-12: consent that is withdrawn is told at once, while the site is connected, whether or not anybody asks."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from splitpeer.coordinator.frozen.trainer import BankTrainer
from splitpeer.coordinator.site_link import MOST_REVOKED, SiteLink
from splitpeer.daemon import happenings as h
from splitpeer.errors import DataError, DeadlinePassed
from splitpeer.federation.compute import Compute
from splitpeer.logs import handle
from splitpeer.site import upkeep
from splitpeer.site.job import SiteJob
from splitpeer.site.serving import Serving
from splitpeer.site.upkeep import MOST_AT_ONCE, Upkeep
from splitpeer.storage.bank import Bank
from splitproto.causes import CONSENT
from splitproto.errors import DeadlineExceeded, LinkLost, UnexpectedMessage
from splitproto.messages import Advanced, Message, Revoked

from .scene import PATIENTS, WAIT_S, Scene
from .served import cast_frozen, comes, held_out, request_banks, segmented, serving, until, withdrawn_at
from .test_frozen_consent import files_of, sums, withdrawn_list
from .test_late_consent import lines, predictions

__all__ = ["sums"]


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """A look every twentieth of a second."""
    monkeypatch.setattr(upkeep, "CONSENT_S", 0.05)


async def nobody_asked(scene: Scene) -> None:
    """While the run is served: the patient is out, and the prediction gone, with the site connected all the time."""
    (patient,) = held_out(scene)
    async with serving(scene) as on:
        hub = on.coordinator
        assert hub is not None
        await until(lambda: all(site.here for site in hub.sites))
        await until(lambda: patient in predictions(scene.output))
        withdrawn_at(scene, "t2").write_text(f"{patient}\n")
        await until(lambda: bool(lines(scene, "hub", "predictions.removed")))
        assert not any(task.done() for task in on.tasks.values())
        assert predictions(scene.output) == set()
    (said,) = lines(scene, "hub", "patient.withdrawn")
    assert (said["site"], said["patient"]) == ("site-t2", handle(scene.key(patient)))
    assert said["cause"] == "consent was withdrawn" and patient not in json.dumps(said)
    (told,) = lines(scene, "site-t2", "patient.withdraw")
    assert told["patient"] == handle(scene.key(patient))


async def test_while_a_run_is_served(joint: Scene) -> None:
    await nobody_asked(joint)


async def test_while_a_run_with_frozen_encoders_is_served(frozen: Scene) -> None:
    await nobody_asked(frozen)


async def test_what_was_released_for_a_request_goes(frozen: Scene) -> None:
    """SP-11.19-14: of a patient who is not of the run."""
    comes(frozen, "NEW_Nora", 77)
    async with serving(frozen):
        await segmented(frozen, "t1ce", "NEW_Nora")
        kept = request_banks(frozen).folder / frozen.key("NEW_Nora").hex()
        assert [*kept.rglob("*.safetensors")]
        withdrawn_at(frozen, "t2").write_text("NEW_Nora\n")
        await until(lambda: bool(lines(frozen, "hub", "bank.dropped")))
        assert not [*kept.rglob("*.safetensors")]


async def test_a_look_whose_outcome_comes_too_late_is_not_the_last(
    joint: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whom it found, nobody was told of."""
    honest, late = Compute.run, list[list[bytes]]()

    async def run(self: Compute, function: Any, *given: Any, **options: Any) -> Any:
        found = await honest(self, function, *given, **options)
        if function.__name__ == "newly_revoked" and found and len(late) < 2:
            late.append(found)
            raise DeadlinePassed("the list of consent took too long")
        return found

    monkeypatch.setattr(Compute, "run", run)
    await nobody_asked(joint)
    assert len(late) == 2 and late[0] == late[1]


async def test_of_a_patient_of_another_site_no_notice_is_taken(
    frozen: Scene, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """SP-11.13-12: only a site that has the patient can have what others released of it deleted."""
    key, others, honest, left = frozen.key("NEW_Nora"), list[bytes](), SiteJob.newly_revoked, Serving.revoked
    told = list[bytes]()

    def newly_revoked(self: SiteJob) -> list[bytes]:
        mistaken = [one for one in others if "site-t2" in str(self.folder)]
        return [*honest(self), *mistaken]

    def revoked(self: Serving, keys: Sequence[bytes]) -> None:
        left(self, keys)
        if key in keys and "site-t2" in str(self.job.folder):
            told.extend(keys)
            others.clear()

    monkeypatch.setattr(SiteJob, "newly_revoked", newly_revoked)
    monkeypatch.setattr(Serving, "revoked", revoked)
    async with serving(frozen) as on:
        hub = on.coordinator
        assert hub is not None
        await until(lambda: all(site.here for site in hub.sites))
        # Not on the list with which the site joined.
        comes(frozen, "NEW_Nora", 77, modalities=["t1ce"])
        await segmented(frozen, "t1ce", "NEW_Nora")
        kept = request_banks(frozen).folder / key.hex()
        others.append(key)
        await until(lambda: key in told)
        # Two more requests, so that the coordinator has looked at what was said.
        for _ in range(2):
            await segmented(frozen, "t1ce", held_out(frozen)[0])
        assert any(site.unusable.get(key) == CONSENT for site in hub.sites)
        assert [*kept.rglob("*.safetensors")] and not lines(frozen, "hub", "bank.dropped")
        assert all(site.here for site in hub.sites) and not any(task.done() for task in on.tasks.values())
        (said,) = [one.getMessage() for one in caplog.records if "not its own" in one.getMessage()]
        assert said.startswith("site-t2 says") and "Nora" not in said and key.hex() not in said
        withdrawn_at(frozen, "t1ce").write_text("NEW_Nora\n")
        await until(lambda: bool(lines(frozen, "hub", "bank.dropped")))
        assert not [*kept.rglob("*.safetensors")]


async def test_while_sums_are_collected(sums: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of the patient's sums are kept, so no site is asked for one any more; and the site stays connected."""
    key = min(sums.patients()[0])
    gone = next(name for name in PATIENTS if sums.key(name) == key)
    honest, told, said = Bank.put, threading.Event(), Serving.revoked

    def put(self: Bank, release: Any, tensors: Any) -> None:
        honest(self, release, tensors)
        if not told.is_set() and key not in {one.key for one in self.missing()}:
            withdrawn_list(sums).write_text(gone)
            # The site says so while the coordinator waits for nothing.
            assert told.wait(WAIT_S)

    def revoked(self: Serving, keys: Sequence[bytes]) -> None:
        said(self, keys)
        told.set()

    monkeypatch.setattr(Bank, "put", put)
    monkeypatch.setattr(Serving, "revoked", revoked)
    ran = await sums.together()
    assert ran.error is None and ran.result.complete and set(ran.clients.values()) == {None}, ran
    assert files_of(sums, gone) == []
    assert files_of(sums, *(name for name in PATIENTS if name != gone))
    assert [(one["site"], one["cause"]) for one in ran.result.withdrawn] == [("site-t2", "consent")]


async def test_while_the_decoder_learns_from_a_bank(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sites stay for inference; nobody asks them for anything of the run any more."""
    cast_frozen(scene)
    (gone, *_), _ = scene.patients()
    name = next(one for one in PATIENTS if scene.key(one) == gone)
    honest, said, told = BankTrainer._step, Serving.revoked, asyncio.Event()

    async def step(self: BankTrainer, *given: Any) -> Any:
        if self._run.committed == 1 and not told.is_set():
            withdrawn_at(scene, "t2").write_text(f"{name}\n")
            await told.wait()
            await until(lambda: any(site.unusable.get(gone) == CONSENT for site in self._run.team.sites))
        return await honest(self, *given)

    def revoked(self: Serving, keys: Sequence[bytes]) -> None:
        said(self, keys)
        told.set()

    monkeypatch.setattr(BankTrainer, "_step", step)
    monkeypatch.setattr(Serving, "revoked", revoked)
    async with scene.running() as on:
        await until(lambda: on.tasks["hub"].done() or serves(scene))
        assert not on.tasks["hub"].done()
        assert files_of(scene, name) == []
        record = json.loads((scene.folder / "hub" / "state" / "try.run.json").read_text())
        # The step in hand was made with the patient, the next ones were not.
        assert [(one["key"], one["step"], one["cause"]) for one in record["withdrawn"]] == [
            (gone.hex(), 3, CONSENT)
        ]


def serves(scene: Scene) -> bool:
    path = scene.folder / "hub" / "state" / "try.run.json"
    return path.exists() and json.loads(path.read_text())["state"] == "serving"


async def test_while_encoders_are_trained(scene: Scene) -> None:
    """Of a patient held out, whom no batch asks for before the end."""
    training = {"steps": 5000, "batch": 3, "checkpoint_every": 5000}
    data = {"window": [48, 48], "validation": 2, "max_withdrawn": 1}
    scene.cast("t1ce", "t2", training=training, data=data, evaluation={"every": 5000})
    scene.client("t2", data={"withdrawn": str(withdrawn_list(scene)), "cache_mib": 0})
    (first, *_) = held_out(scene)
    async with scene.running() as on:
        await until(lambda: len(scene.losses()) >= 2)
        withdrawn_list(scene).write_text(f"{first}\n")
        await until(lambda: bool(lines(scene, "hub", "patient.withdrawn")) or on.tasks["hub"].done())
        made = len(scene.losses())
        assert not on.tasks["hub"].done()
        await until(lambda: len(scene.losses()) > made + 2 or on.tasks["hub"].done())
        assert not any(task.done() for task in on.tasks.values())
    (said,) = lines(scene, "hub", "patient.withdrawn")
    assert (said["site"], said["patient"]) == ("site-t2", handle(scene.key(first)))


# --- without roles ---------------------------------------------------------------------------------------


class Watched:
    """A site's watch of its list, with what it says of whom."""

    def __init__(self, looks: Sequence[list[bytes] | Exception]) -> None:
        self.looks, self.sent, self.told = [*looks], list[Message](), list[h.Happening]()
        self.said: list[bytes] = []
        self.noted: list[bytes] = []
        self.takes_nothing = False
        self.upkeep = Upkeep(SimpleNamespace(), self, lambda: None, h.Reporter(self.told.append))  # type: ignore[arg-type]

    async def run(self, function: Any, *, what: str, timeout: float) -> Any:
        return function()

    def newly_revoked(self) -> list[bytes]:
        found = self.looks.pop(0)
        if isinstance(found, Exception):
            raise found
        return found

    async def send(self, message: Message, timeout: float) -> None:
        self.sent.append(message)
        if self.takes_nothing:
            raise DeadlineExceeded("waited 1 s for the peer to take a revoked")

    async def watch(self) -> None:
        """Until there is nothing left to look at."""
        job = SimpleNamespace(
            newly_revoked=self.newly_revoked,
            note_revoked=self.noted.extend,
            job=SimpleNamespace(seconds_per_step=1.0),
        )
        await self.upkeep.watch_consent(self, job, self.said.extend)  # type: ignore[arg-type]


def keys(count: int) -> list[bytes]:
    return [number.to_bytes(16, "big") for number in range(count)]


async def test_a_list_that_cannot_be_read_is_told_once_and_looked_at_again() -> None:
    """And many patients are named in pieces."""
    many = keys(MOST_AT_ONCE + 1)
    looks = [[], DataError("gone"), DataError("gone"), many, DataError("other"), LinkLost("the end")]
    watched = Watched(looks)
    await watched.watch()
    assert watched.sent == [Revoked(tuple(many[:MOST_AT_ONCE])), Revoked((many[-1],))]
    assert watched.said == watched.noted == many
    assert [one.cause for one in watched.told if isinstance(one, h.DataWarning)] == ["gone", "other"]


async def test_a_link_that_takes_nothing_in_time_is_not_the_end() -> None:
    """The message stays queued, so it was said; whoever withdraws later is told of as well."""
    one, other = keys(2)
    watched = Watched([[one], [other], LinkLost("the end")])
    watched.takes_nothing = True
    await watched.watch()
    assert watched.sent == [Revoked((one,)), Revoked((other,))]
    assert watched.said == watched.noted == [one, other]


async def test_who_could_not_be_told_of_is_not_noted() -> None:
    (one,) = keys(1)
    watched = Watched([[one]])

    async def send(message: Message, timeout: float) -> None:
        raise LinkLost("the end")

    watched.send = send  # type: ignore[method-assign]
    await watched.watch()
    assert watched.said == watched.noted == []


class Talk:
    """A link on which a site says things."""

    def __init__(self, *said: Message) -> None:
        self.said, self.failed = [*said], list[Exception]()
        self.ended = asyncio.get_running_loop().create_future()

    async def receive(self, timeout: float = 0, what: str = "") -> Message:
        if not self.said:
            await asyncio.sleep(WAIT_S)
        return self.said.pop(0)

    def fail(self, error: Exception) -> None:
        self.failed.append(error)


def link_of(talk: Talk) -> SiteLink:
    return SiteLink("a", talk, 1.0, lambda what, seconds: None)  # type: ignore[arg-type]


async def test_it_is_heard_in_place_of_any_answer() -> None:
    one, other = keys(2)
    link = link_of(Talk(Revoked((one,)), Revoked((one, other)), Advanced(3)))
    assert await link.hear("its advance", Advanced) == Advanced(3)
    assert link.unusable == {one: CONSENT, other: CONSENT}


async def test_a_site_that_names_no_end_of_patients_loses_its_link() -> None:
    some = [
        Revoked(tuple(keys(MOST_REVOKED)[first : first + 1024])) for first in range(0, MOST_REVOKED, 1024)
    ]
    link = link_of(Talk(*some, Revoked((b"p" * 16,)), Advanced(3)))
    with pytest.raises(UnexpectedMessage, match="too many patients"):
        await link.hear("its advance", Advanced)
    talk = Talk(*some, Revoked((b"p" * 16,)))
    link = link_of(talk)

    async def nothing(message: Message) -> None:
        raise AssertionError

    link.listen(nothing)
    await until(lambda: bool(talk.failed))
    assert isinstance(talk.failed[0], UnexpectedMessage) and len(link.unusable) == MOST_REVOKED
