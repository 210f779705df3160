"""A recording fed to a live peer again, over TLS within this process: does it still answer the same?

The other side of the recorded conversation is played from the capture, under certificates of a CA that lives for
this one run in a temporary folder. The live peer has its own configuration and data, but writes there too.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import shutil
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from splitpeer.captures.reader import Capture
from splitpeer.coordinator.coordinator import Coordinator
from splitpeer.coordinator.record import RunRecord
from splitpeer.daemon import happenings as h
from splitpeer.daemon.console import LogView
from splitpeer.defences.key import NAME as DEFENCE_KEY
from splitpeer.errors import ConfigError, DataError, JobFailed
from splitpeer.federation.terms import Codings, job_on_wire, run_folder
from splitpeer.settings.job import JobConfig
from splitpeer.settings.peer import PeerConfig
from splitpeer.site.client import Client
from splitpeer.storage import checkpoint, reading
from splitpeer.training.forms import activations_form, gradients_form
from splitpeer.training.scores import Scores
from splitproto import AllowList, Credentials, Door, Offer, Session, SplitprotoError, dial, pki
from splitproto.capture import Header, Recorded
from splitproto.errors import IdentityError, UnexpectedMessage
from splitproto.identity import check_name
from splitproto.lanes.memory import MemoryLane
from splitproto.messages import (
    Activations,
    Advance,
    Advanced,
    Applied,
    Average,
    Begin,
    Bye,
    Checkpoint,
    Forward,
    Gradients,
    Inventory,
    JobAccept,
    JobDecline,
    JobOffer,
    Logits,
    Message,
    Progress,
    Rollback,
    RolledBack,
    Saved,
    Share,
    Withdraw,
)
from splitproto.negotiation import FEATURES
from splitproto.records import Job, Patient
from splitproto.tensors import Array

TOLERANCE = 1e-6
HOST = "localhost"
"""Name in the coordinator's certificate, whether the coordinator is live or played back."""
WAIT_S = 120.0
Place = tuple[str, str, int, int]
"""Site, mode, step, batch."""
Told = Callable[[int, int], None]
Heard = TypeVar("Heard", bound=Message)


class Comparison:
    """How far answers are from the recorded ones."""

    def __init__(self, what: str, job: Job) -> None:
        self.what = what
        self._form = activations_form(job) if what == "activations" else gradients_form(job)
        self.gradients = not job.frozen
        """Whether a coordinator sends any; where not, its losses and Dice say whether it is the same."""
        self.tensors = 0
        self.largest = 0.0
        """Largest difference, by the largest magnitude of the recorded tensor."""
        self.absolute = 0.0
        self.where = ""
        self.figures = 0
        """Losses and Dice compared."""
        self.largest_figure = 0.0
        self.steps = 0
        """Training steps that were driven."""
        self.of = job.steps
        """Steps of the job."""
        self.stopped = ""
        """Why the comparison ends before the job does; empty if it does not."""

    @property
    def agrees(self) -> bool:
        """Whether something was compared, and nothing differs by more than `TOLERANCE`."""
        compared = self.tensors if self.gradients or self.what == "activations" else self.figures
        return compared > 0 and max(self.largest, self.largest_figure) <= TOLERANCE

    def tensor(self, name: str, answer: str, live: Array, recorded: Array) -> None:
        """Compare one tensor of an answer."""
        self.tensors += 1
        where = f"{name} {answer}"
        if live.shape != recorded.shape or live.dtype != recorded.dtype:
            self._note(where, np.inf, np.inf)
            return
        a, b = (self._form.from_wire({name: one})[name].astype(np.float64) for one in (live, recorded))
        if np.array_equal(a, b, equal_nan=True):
            return
        off = float(np.max(np.abs(a - b))) if np.isfinite(a).all() and np.isfinite(b).all() else np.inf
        size = float(np.max(np.abs(b)))
        self._note(where, off, off / size if size else np.inf)

    def figure(self, live: float, recorded: float) -> None:
        """Compare a loss or a Dice."""
        self.figures += 1
        self.largest_figure = max(self.largest_figure, abs(live - recorded) / max(abs(recorded), 1e-12))

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        shown = {name: value for name, value in vars(self).items() if not name.startswith("_")}
        return {"agrees": self.agrees, "tolerance": TOLERANCE, **shown}

    def _note(self, where: str, absolute: float, relative: float) -> None:
        self.absolute = max(self.absolute, absolute)
        if relative > self.largest:
            self.largest, self.where = relative, where


@dataclass(frozen=True)
class _Recording:
    """A capture's messages by what they answer; of a batch that was ordered again, the last order counts."""

    header: Header
    job: Job
    run: bytes
    forwards: Mapping[Place, Forward]
    withdrawals: Mapping[tuple[str, bytes], Withdraw]
    """By site and digest: batches that a site answered by withdrawing patients."""
    activations: Mapping[Place, Recorded]
    answers: Mapping[tuple[Place, bytes], Recorded]
    """The same by digest as well: also to batches that a withdrawal made void, and that were drawn again."""
    gradients: Mapping[tuple[str, int], Recorded]
    advances: Mapping[tuple[str, int], Advance]
    """Steps that were made without a site, the last of each row."""
    patients: Mapping[str, tuple[Patient, ...]]
    salt_checks: Mapping[str, bytes]
    labels: Mapping[str, bytes | None]
    """By site, of the weights of its frozen encoders (SP-11.17-6)."""
    figures: Mapping[tuple[int, str], float]
    """Figures that the coordinator sent its sites: (step, loss or dice_...) to value."""

    @staticmethod
    def of(capture: Capture) -> _Recording:
        header, (job, run) = capture.header, _drivable(capture)
        forwards: dict[Place, Forward] = {}
        withdrawals: dict[tuple[str, bytes], Withdraw] = {}
        activations: dict[Place, Recorded] = {}
        answers: dict[tuple[Place, bytes], Recorded] = {}
        gradients: dict[tuple[str, int], Recorded] = {}
        advances: dict[tuple[str, int], Advance] = {}
        lists: dict[str, tuple[Patient, ...]] = {}
        whole: dict[str, bool] = {}
        salt_checks: dict[str, bytes] = {}
        labels: dict[str, bytes | None] = {}
        figures: dict[tuple[int, str], float] = {}
        for record in capture.records():
            match record.head:
                case Forward() as head:
                    forwards[record.peer, head.mode, head.step, head.batch] = head
                case Activations() as head:
                    place = record.peer, head.mode, head.step, head.batch
                    activations[place] = answers[place, head.digest] = record
                case Withdraw() as head:
                    withdrawals[record.peer, head.digest] = head
                case Gradients() as head:
                    gradients[record.peer, head.step] = record
                case Logits():
                    raise DataError(
                        "the recorded run had its labels at a site, whose answers depend on what it is sent: inspect "
                        "the capture only"
                    )
                case Advance() as head:
                    advances[record.peer, head.step] = head
                case JobAccept() as head:
                    labels[record.peer] = head.weights
                case Inventory() as head:
                    former = () if whole.get(record.peer, True) else lists[record.peer]
                    lists[record.peer], whole[record.peer] = (*former, *head.patients), head.last
                    salt_checks[record.peer] = head.salt_check
                case Progress() as head:
                    figures |= {(head.step, name): value for name, value in head.values.items()}
        return _Recording(
            header, job, run, forwards, withdrawals, activations, answers, gradients, advances,
            lists, salt_checks, labels, figures,
        )  # fmt: skip


def _drivable(capture: Capture) -> tuple[Job, bytes]:
    """Job and run of a capture that can drive a peer. Raises DataError: why it cannot."""
    header = capture.header
    if header.job is None or header.run is None:
        raise DataError("the capture names no job: nothing was trained while it was recorded")
    if not header.peers:
        raise DataError("the capture names no peer of its recorder: it cannot drive a peer")
    try:
        check_name("job", header.job.name)  # it becomes part of a folder's name
    except IdentityError as error:
        raise DataError(f"the capture's job: {error.reason}") from None
    if header.job.average_every is not None:
        raise DataError(
            "the recorded run averaged encoders, which cannot be repeated: inspect the capture only"
        )
    if header.job.fusion is not None:
        raise DataError(
            "the recorded run had secure fusion: one party's capture does not hold the others' part of a sum: "
            "inspect the capture only"
        )
    if header.sampling.every != 1 or header.sampling.keys:
        raise DataError("the capture holds a sample of the steps: record all of them to drive a peer with it")
    if capture.gaps():
        raise DataError("messages are missing from the capture (gaps): it cannot drive a peer")
    return header.job, header.run


# --- a coordinator -----------------------------------------------------------------------------------------


async def drive_coordinator(
    capture: Capture, config: Path, job: Path, folder: Path, told: Told = lambda done, of: None
) -> Comparison:
    """Play all sites of a coordinator's capture to a real coordinator, and compare gradients, losses and Dice.

    Args:
        capture: recorded by a coordinator, from the first step on.
        config: its `peer.toml`; its labels are read.
        job: its `job.toml`, unchanged since.
        folder: an empty folder for certificates, state and results.
        told: steps done, and of how many.

    Raises:
        PeerError: the capture cannot drive this coordinator; says why.
    """
    recording = _Recording.of(capture)
    if recording.header.role != "coordinator":
        raise ConfigError(
            "this capture was recorded by a client: use --drive client with that site's peer.toml"
        )
    sites = [party.site for party in recording.header.peers]
    live, settings = _live(config, folder, recording, sites)
    lane = MemoryLane(HOST)
    order = JobConfig.load(job, {"output.folder": str(folder / "results")})
    codings = Codings(recording.job.activations, recording.job.gradients)
    if set(order.sites) != set(sites) or job_on_wire(order, codings) != recording.job:
        raise ConfigError(f"{job}: is not the job that was recorded: take the job.toml of that run")
    comparison = Comparison("gradients", recording.job)
    _copy_key(PeerConfig.load(config).peer.state, live.peer.state)
    # Of the same name as the recorded run.
    record = RunRecord(live, order, resume=False, report=h.Reporter())
    record.run, record.codings = recording.run, codings
    record.begin({})
    stop = asyncio.Event()
    coordinator = Coordinator(live, order, stop, LogView(), resume=True, lane=lane)
    played = [_Site(name, recording, comparison, stop, told) for name in sites]
    working = asyncio.create_task(coordinator.run())
    playing = [asyncio.create_task(site.play(lane, settings[site.name])) for site in played]
    try:
        await asyncio.wait([working, *playing], return_when=asyncio.FIRST_EXCEPTION)
        for task in playing:
            if task.done() and task.exception() is not None:
                task.result()
        result = await working
        await asyncio.gather(*playing)
    except SplitprotoError as error:
        raise JobFailed(f"the conversation broke: {error}") from error
    finally:
        working.cancel()
        for task in playing:
            task.cancel()
        await asyncio.gather(working, *playing, return_exceptions=True)
    comparison.steps = result.step
    _compare_figures(comparison, recording, order, job, folder / "results", result.dice)
    return comparison


class _Site:
    """Answers a coordinator as the recorded site did."""

    def __init__(
        self, name: str, recording: _Recording, comparison: Comparison, stop: asyncio.Event, told: Told
    ) -> None:
        self.name = name
        self._recording, self._comparison, self._stop, self._told = recording, comparison, stop, told
        self._applied = 0
        self._ordered: deque[Forward] = deque()
        self._withdrew = False

    async def play(self, lane: MemoryLane, credentials: tuple[Credentials, AllowList]) -> None:
        for _ in range(200):
            try:
                session = await dial(lane, *credentials, _offer(self._recording, self.name))
                break
            except SplitprotoError as error:
                if not error.retry:
                    raise
                await asyncio.sleep(0.1)
        else:
            raise JobFailed("the coordinator does not listen")
        try:
            await self._converse(session)
        except BaseException:
            await session.close("failed", timeout=1.0)
            raise

    async def _converse(self, session: Session) -> None:
        while True:
            message = await session.receive(WAIT_S, "the coordinator")
            match message:
                case JobOffer():
                    await self._join(session)
                case Forward():
                    if not self._withdrew:
                        self._ordered.append(message)
                case Gradients():
                    self._compare(message)
                    self._applied = message.step
                    await session.send(Applied(message.step))
                    self._told(message.step, self._comparison.of)
                case Advance():
                    self._ordered.clear()
                    self._withdrew = False
                    self._applied = message.step
                    await session.send(Advanced(message.step))
                    self._told(message.step, self._comparison.of)
                case Checkpoint():
                    await session.send(Saved(message.step, bytes(32)))
                case Rollback():
                    self._ordered.clear()
                    self._withdrew = False
                    self._applied = message.step
                    await session.send(RolledBack(message.step))
                case Bye():
                    await session.close(message.reason)
                    return
                case Share() | Average():
                    raise UnexpectedMessage(f"a {message.name} from the coordinator")
                case _:
                    pass  # the session admits only what SP-9 allows; what is left has no answer
            await self._answer(session)

    async def _join(self, session: Session) -> None:
        recording = self._recording
        if self.name not in recording.patients:
            raise JobFailed(f"the capture lacks the patients of {self.name}: this site cannot be played")
        patients, salt_check = recording.patients[self.name], recording.salt_checks[self.name]
        party = next(p for p in recording.header.peers if p.site == self.name)
        accept = JobAccept(
            secrets.token_bytes(16), 0, (0,), len(patients), False, party.defences,
            weights=recording.labels.get(self.name),
        )  # fmt: skip
        await session.send(accept)
        for first in range(0, max(len(patients), 1), 500):
            piece, last = patients[first : first + 500], first + 500 >= len(patients)
            await session.send(Inventory(piece, last, salt_check))

    async def _answer(self, session: Session) -> None:
        while self._ordered and self._ordered[0].step == self._applied + (self._ordered[0].mode == "train"):
            forward = self._ordered.popleft()
            if (said := self._recording.withdrawals.get((self.name, forward.digest))) is not None:
                await session.send(said)
                if forward.mode == "release":
                    continue
                # SP-11.13-1: nothing announced before counts until the coordinator says where to continue.
                self._ordered.clear()
                self._withdrew = True
                return
            place = (self.name, forward.mode, forward.step, forward.batch)
            recorded = self._recording.answers.get((place, forward.digest))
            if recorded is None and place not in self._recording.activations:
                # The capture ends here, or the run continued without this site: the comparison ends.
                self._comparison.stopped = (
                    f"{forward.mode} step {forward.step}: the capture holds nothing of {self.name} there"
                )
                self._stop.set()
                return
            if recorded is None:
                raise JobFailed(
                    f"the coordinator orders another batch at step {forward.step} ({forward.mode}) than was recorded: "
                    "its labels, salt or job.toml are not those of that run"
                )
            # A copy, so that decrypted data of a capture is not kept.
            await session.send(replace(recorded).message, WAIT_S)

    def _compare(self, live: Gradients) -> None:
        recorded = self._recording.gradients.get((self.name, live.step))
        if recorded is None:
            return
        tensors = replace(recorded).message.tensors  # type: ignore[attr-defined]
        for name, array in live.tensors.items():
            self._comparison.tensor(name, f"of {self.name}, step {live.step}", array, tensors[name])


def _compare_figures(
    comparison: Comparison,
    recording: _Recording,
    order: JobConfig,
    job: Path,
    results: Path,
    dice: Scores,
) -> None:
    """Losses and Dice: with those that were sent to the sites, and with the run's own results if they exist."""
    recorded = dict(recording.figures)
    former = JobConfig.load(job).output.folder
    if _run_of(former) == recording.run.hex():
        recorded |= {(step, "loss"): loss for step, loss in _losses(former).items()}
    live = {(step, "loss"): loss for step, loss in _losses(results).items()}
    live |= {
        (comparison.steps, f"dice_{region}"): value for region, value in dice.items() if value is not None
    }
    for place in sorted(live.keys() & recorded.keys()):
        comparison.figure(live[place], recorded[place])


def _run_of(folder: Path) -> str:
    """The run whose results are there; empty if there are none."""
    try:
        return str(reading.document(folder / "result.json", follow=True)["run"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def _losses(folder: Path) -> dict[int, float]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


# --- a client ----------------------------------------------------------------------------------------------


async def drive_client(
    capture: Capture, config: Path, folder: Path, told: Told = lambda done, of: None
) -> Comparison:
    """Play the coordinator of a site's capture to a real client, and compare its activations.

    The client begins where it can: at step 0 if its weights come from a seed, else at the oldest checkpoint of
    that run that is left in its state folder.

    Args:
        capture: recorded by a client.
        config: its `peer.toml`; its images are read.
        folder: an empty folder for certificates and state.
        told: steps done, and of how many.

    Raises:
        PeerError: the capture cannot drive this client; says why.
    """
    recording = _Recording.of(capture)
    if recording.header.role != "client":
        raise ConfigError(
            "this capture was recorded by a coordinator: use --drive coordinator and its job.toml"
        )
    hub = recording.header.peers[0].site
    live, settings = _live(config, folder, recording, [hub])
    lane = MemoryLane(HOST)
    step = _copy_state(PeerConfig.load(config), live.peer.state, recording)
    comparison = Comparison("activations", recording.job)
    stop = asyncio.Event()
    credentials, allowed = settings[hub]
    offer = _offer(recording, hub)
    client = Client(live, stop, goal=lane)
    async with Door([lane], credentials, allowed, offer) as listener:
        working = asyncio.create_task(client.run())
        playing = asyncio.create_task(_play_coordinator(listener, recording, hub, step, comparison, told))
        try:
            await asyncio.wait((working, playing), return_when=asyncio.FIRST_EXCEPTION)
            for task in (working, playing):
                if task.done():
                    task.result()
        except SplitprotoError as error:
            raise JobFailed(f"the conversation broke: {error}") from error
        finally:
            for task in (working, playing):
                task.cancel()
            await asyncio.gather(working, playing, return_exceptions=True)
    return comparison


async def _play_coordinator(
    listener: Door,
    recording: _Recording,
    hub: str,
    begin: int | None,
    comparison: Comparison,
    told: Told,
) -> None:
    session = await listener.accept(WAIT_S)
    header = recording.header
    if header.schema is None:
        raise DataError("the capture names no cut layer")
    defences = header.peers[0].defences
    await session.send(JobOffer(recording.run, header.seats, recording.job, header.schema, False, defences))
    answer = await session.receive(WAIT_S, "the client's answer")
    if isinstance(answer, JobDecline):
        raise JobFailed(f"the client declines the recorded job: {answer.reason}")
    accept = _expect(answer, JobAccept)
    while not _expect(await session.receive(WAIT_S, "its patients"), Inventory).last:
        pass
    step = begin or 0
    await session.send(Begin(step, accept.patients))
    if begin is not None and not recording.job.frozen:
        await session.send(Rollback(step))
        _expect(await session.receive(WAIT_S, "its return"), RolledBack)
    for place in sorted((p for p in recording.activations if p in recording.forwards), key=_order):
        _, mode, of, _ = place
        before = of - (mode == "train")
        if before > step and (hub, before) in recording.advances:
            # The steps between were made without this site.
            await session.send(recording.advances[hub, before])
            _expect(await session.receive(WAIT_S, f"its advance to step {before}"), Advanced)
            step = comparison.steps = before
        if of < step + (mode == "train") or (mode != "train" and of != step):
            continue
        if mode == "train" and of != step + 1:
            comparison.stopped = f"train step {step + 1}: the capture holds nothing of it"
            break
        await session.send(recording.forwards[place])
        answer = await session.receive(WAIT_S, f"activations of step {of}")
        if isinstance(answer, Withdraw):
            comparison.stopped = (
                f"{mode} step {of}: the client cannot use {len(answer.patients)} of the patients"
            )
            break
        answer = _expect(answer, Activations)
        recorded = replace(recording.activations[place]).message.tensors  # type: ignore[attr-defined]
        for name, array in answer.tensors.items():
            comparison.tensor(name, f"of {mode} step {of}, batch {place[3]}", array, recorded[name])
        if mode == "train":
            if (hub, of) not in recording.gradients:
                comparison.stopped = f"train step {of}: the capture holds no gradients of it"
                break
            await session.send(replace(recording.gradients[hub, of]).message, WAIT_S)
            _expect(await session.receive(WAIT_S, f"step {of} to be applied"), Applied)
            step = comparison.steps = of
            told(of, comparison.of)
    await session.close("complete", "the capture ends")


def _order(place: Place) -> tuple[int, bool, int]:
    _, mode, step, batch = place
    return step, mode != "train", batch


def _copy_state(config: PeerConfig, to: Path, recording: _Recording) -> int | None:
    """Give the live client what the run's weights began with: its checkpoints and the key of its defences.

    Returns:
        The checkpoint to begin with; None: at step 0, from the seed that the client makes its weights of.
    """
    state = config.peer.state
    _copy_key(state, to)
    if config.runtime.initial_weights != "private":
        return None
    kept = run_folder(state, recording.job.name, recording.run)
    ordered = {(mode, step) for _, mode, step, _ in recording.activations}
    for step in sorted(checkpoint.available(kept)) if kept.is_dir() else ():
        if not ordered.isdisjoint({("train", step + 1), ("evaluate", step), ("release", step)}):
            shutil.copytree(kept, run_folder(to, recording.job.name, recording.run))
            return step
    raise ConfigError(
        "the client's first weights were private and no checkpoint of that run is left in [peer] state: "
        "there is nothing to begin with"
    )


# --- both --------------------------------------------------------------------------------------------------


def _live(
    config: Path, folder: Path, recording: _Recording, others: list[str]
) -> tuple[PeerConfig, dict[str, tuple[Credentials, AllowList]]]:
    """The live peer's settings with throw-away certificates, and the peers it talks to."""
    own = PeerConfig.load(config).peer
    header = recording.header
    if (own.role, own.site, own.federation) != (header.role, header.site, header.federation):
        raise ConfigError(
            f"{config}: is the {own.role} {own.site}, but the capture was recorded by the {header.role} {header.site}"
        )
    keys, now = folder / "pki", datetime.now(UTC)
    pki.create_ca(keys, own.federation, now=now)
    hub = own.role == "coordinator"
    other = "client" if hub else "coordinator"
    for role, site in ((own.role, own.site), *((other, name) for name in others)):
        pki.issue(keys, role, site, hosts=[HOST] if role == "coordinator" else [], now=now)
    live = PeerConfig.load(
        config,
        {
            "peer.state": str(folder / "state"),
            "tls.ca": str(keys / "ca.crt"),
            "tls.certificate": str(keys / f"{own.site}.crt"),
            "tls.key": str(keys / f"{own.site}.key"),
        },
    )
    live = live.model_copy(update={"tls": live.tls.model_copy(update={"crl": None})})
    allowed = AllowList({own.role: (own.site,)}, "the capture")
    met = {
        name: (Credentials(keys / "ca.crt", keys / f"{name}.crt", keys / f"{name}.key"), allowed)
        for name in others
    }
    return live, met


def _copy_key(state: Path, to: Path) -> None:
    to.mkdir(mode=0o700, parents=True)
    if (state / DEFENCE_KEY).is_file():
        shutil.copy2(state / DEFENCE_KEY, to / DEFENCE_KEY)


def _offer(recording: _Recording, site: str) -> Offer:
    """What was agreed on the recorded links, so that the live peer does no more and no less.

    A coordinator's capture names what all its links had in common; a site that was asked to evaluate could.
    """
    agreed = set(recording.header.features)
    if any(who == site and mode == "evaluate" for who, mode, _, _ in recording.forwards):
        agreed.add("evaluate")
    features = tuple(name for name in FEATURES if name in agreed)
    return Offer(features=features if recording.header.features else FEATURES, max_message=1 << 32)


def _expect(message: Message, kind: type[Heard]) -> Heard:
    if not isinstance(message, kind):
        raise UnexpectedMessage(f"a {message.name} where {kind.name} was due")
    return message
