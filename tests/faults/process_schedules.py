"""Schedules of accidents for real processes: what happens when is a function of a number.

`draw(seed)` says which federation, what lies between its parties, and which accidents happen at which step; `play`
makes them happen to real daemons with real certificates, images and sockets, and judges the end: either the weights of
all parties are those of an undisturbed run, bit for bit, or there is a refusal that `REFUSALS` lists and this schedule
justifies. Processes do not repeat to the microsecond, so a seed that failed may have to be played a few times to fail
again; the schedule is always the same.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import torch

from tests.conftest import SmallDisk
from tests.splitpeer.roles.scene import SEED, Daemon, Scene

from .relays import BOTH, Damage, EnvelopeRelay, TcpRelay, Wires

AGAIN_S = 1.0
"""After so long the service manager starts again what ended with an error that may pass (docs/running.md)."""
SMALL = "1m"
"""A state folder's disk, where it is to be filled."""
PACE = 0.2
"""Heartbeats every second, silence of 4 s ends a link: the processes of a schedule live this much faster."""
SHORT, LONG = (0.3, 2.5), (5.0, 6.5)
"""Seconds, within the silence that a link bears, and beyond."""
RECHECK_S = 1.0
STEPS = 40
LIMIT_S = 300.0
"""For a schedule as a whole: generous, since it says no more than that nothing hangs."""
RUN = "5a" * 16

# --- what is drawn -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Variant:
    """A federation: who, and what is done to what leaves."""

    modalities: tuple[str, ...]
    policy: Mapping[str, Any] = field(default_factory=dict)
    job: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


VARIANTS = {
    "two sites": Variant(("flair", "t1")),
    "three sites": Variant(("flair", "t1", "t2")),
    "fresh noise": Variant(
        ("flair", "t1"),
        {"defences": ["clip:60", "gaussian:0.3", "dropout:0.3"], "image_defences": ["voxel-noise:0.2"]},
        {"defences": {"gradients": ["max-norm"]}},
    ),
    "dropout": Variant(("flair", "t1", "t2"), {}, {"training": {"seat_dropout": 0.3}}),
    "kept noise": Variant(("flair", "t1"), {"image_defences": ["voxel-noise:0.2"]}),
}

PROCESS = ("kill", "stop", "freeze")
MACHINE = ("full disk", "clock")
WIRE = ("cut", "half-cut", "partition", "one-way", "slow", "narrow")
ENVELOPE = ("cut", "half-cut", "partition", "lose", "twice", "short", "flip", "swap", "hold")
LOSES_MEMORY = frozenset({"kill", "stop"})
"""After these all may go back to a checkpoint; after others nobody may."""


@dataclass(frozen=True)
class Accident:
    """One thing that happens."""

    kind: str
    who: str
    """A party; for wires, the site at their end."""
    step: int
    """It happens when this step has been committed, ..."""
    after: float
    """... so many seconds later."""
    lasts: float
    """Seconds until the process is started again, goes on, the wire works again; infinite: never."""
    detail: int = 0
    """How many envelopes pass before the one that is damaged."""

    def __str__(self) -> str:
        return f"{self.kind} {self.who} at step {self.step} + {self.after:.2f} s for {self.lasts:.2f} s"


@dataclass(frozen=True)
class Schedule:
    """Everything that a seed decides."""

    seed: int
    variant: str
    wires: Mapping[str, str]
    """Site to what lies between it and the coordinator: nothing, "octets" or "envelopes"."""
    checkpoint_every: int
    ahead: int
    accidents: tuple[Accident, ...]

    @property
    def for_good(self) -> bool:
        """Somebody goes and never comes back."""
        return any(accident.lasts == float("inf") for accident in self.accidents)

    def __str__(self) -> str:
        wires = ", ".join(f"{site}: {kind}" for site, kind in self.wires.items() if kind)
        lines = "".join(f"\n  {accident}" for accident in self.accidents)
        return (
            f"schedule {self.seed}: {self.variant}; wires: {wires or 'none'}; "
            f"a checkpoint every {self.checkpoint_every} steps, {self.ahead} batches ahead{lines}"
        )


def draw(seed: int) -> Schedule:
    """The schedule of a seed."""
    source = Random(seed)
    if seed % 10 == 9:
        return _storm(seed, source)
    variant = source.choice(list(VARIANTS))
    sites = [f"site-{modality}" for modality in VARIANTS[variant].modalities]
    wires = {site: source.choice(("", "octets", "octets", "envelopes")) for site in sites}
    accidents = [_accident(source, sites, wires) for _ in range(source.choice((1, 2, 2, 3, 4)))]
    if source.random() < 0.3 and len(accidents) > 1:
        # Misfortunes seldom come singly: all at the same step.
        accidents = [_at(accident, accidents[0].step) for accident in accidents]
    if source.random() < 0.08:
        accidents.append(
            Accident(
                "kill", source.choice(["hub", *sites]), source.randrange(1, STEPS - 5), 0.0, float("inf")
            )
        )
    return Schedule(
        seed,
        variant,
        wires,
        source.choice((1, 4, 7, 10, 100)),
        source.choice((1, 4, 8)),
        tuple(sorted(accidents, key=lambda accident: accident.step)),
    )


def _storm(seed: int, source: Random) -> Schedule:
    """Links that are cut again and again: at any moment of a step, or at any of its envelopes."""
    variant = source.choice(("two sites", "fresh noise", "kept noise"))
    sites = [f"site-{modality}" for modality in VARIANTS[variant].modalities]
    wire = source.choice(("octets", "envelopes"))
    kind = "cut" if wire == "octets" else "snap"
    cuts = [
        Accident(kind, source.choice(sites), step, source.uniform(0, 0.1), 0.0, source.randrange(8))
        for step in range(2, STEPS - 1)
    ]
    return Schedule(seed, variant, dict.fromkeys(sites, wire), 10, 4, tuple(cuts))


def _at(accident: Accident, step: int) -> Accident:
    return Accident(accident.kind, accident.who, step, accident.after, accident.lasts, accident.detail)


def _accident(source: Random, sites: list[str], wires: Mapping[str, str]) -> Accident:
    who = source.choice(["hub", *sites])
    kinds = {"": PROCESS, "octets": PROCESS + WIRE, "envelopes": PROCESS + ENVELOPE}[wires.get(who, "")]
    kind = source.choice(kinds) if source.random() < 0.85 else source.choice(MACHINE)
    brief = kind in LOSES_MEMORY or source.random() < 0.6
    return Accident(
        kind,
        who,
        # 0: while they join. The last: during evaluation and farewell.
        source.choice((0, STEPS, *range(1, STEPS), *range(1, STEPS))),
        source.uniform(0, 0.4),
        round(source.uniform(*(SHORT if brief else LONG)), 2),
        source.randrange(12),
    )


# --- what may come of it -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Refusal:
    """An end without the weights, and what justifies it."""

    party: str
    """`hub` or `site`."""
    code: int
    text: str
    """Found in its last line."""
    because: str
    justified: Callable[[Schedule, Played], bool]


@dataclass(frozen=True)
class Interruption:
    """An end with an error after which the service manager starts a daemon again."""

    code: int
    text: str
    """Found in its last line."""
    because: str
    """A kind of accident that justifies it."""


@dataclass
class Played:
    """How one schedule went."""

    schedule: Schedule
    happened: list[str] = field(default_factory=list)
    """Kinds of accidents that really happened."""
    ends: dict[str, tuple[int, str]] = field(default_factory=dict)
    """Party to the exit code and last line of its last process."""
    refused: list[str] = field(default_factory=list)
    again: list[str] = field(default_factory=list)
    """Ends by themselves after which daemons were started again."""
    rollbacks: int = 0
    seconds: float = 0.0

    @property
    def outcome(self) -> str:
        return "refused" if self.refused else "exact"


INTERRUPTIONS = (
    Interruption(3, r"No space left on device", "full disk"),
    Interruption(3, r"is full", "full disk"),
)

REFUSALS = (
    Refusal(
        "hub", 3, r"did not come back within", "a site is gone for good", lambda s, _: s.for_good,
    ),
    Refusal(
        "site", 1, r"the coordinator ended the job: .*did not come back within", "another site is gone for good",
        lambda s, _: s.for_good,
    ),
    Refusal(
        "site", 3, r"gave up on tcp://", "the coordinator is gone for good", lambda s, _: s.for_good,
    ),
    Refusal(
        "site", 3, r"gave up on tcp://", "it came back after the job was done and the coordinator had left",
        lambda _, played: played.ends.get("hub", (1, ""))[0] == 0,
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Reference:
    """What an undisturbed run of a variant comes to."""

    losses: list[float]
    weights: dict[str, torch.Tensor]


def set_up(scene: Scene, variant: Variant, *, patience_s: float = 40.0, **training: Any) -> None:
    """The files of one federation."""
    scene.bent = {"pace": PACE, "run": RUN, "clock": "clock"}
    job = dict(variant.job)
    scene.cast(
        *variant.modalities,
        **{
            **job,
            "data": {"window": [32, 32], "validation": 1},
            "training": {
                "steps": STEPS,
                "batch": 2,
                "checkpoint_every": 10,
                **job.get("training", {}),
                **training,
            },
            "deadlines": {"join_s": 60, "step_s": 30, "return_s": patience_s},
        },
    )
    scene.coordinator(
        runtime={"initial_weights": SEED},
        network={"listen": f"tcp://127.0.0.1:{scene.port}", "recheck_s": RECHECK_S},
    )
    for modality in variant.modalities:
        dress(scene, variant, modality, scene.port, patience_s)
    for who in ("hub", *(f"site-{modality}" for modality in variant.modalities)):
        (scene.folder / who / "clock").write_text("0")


def dress(scene: Scene, variant: Variant, modality: str, port: int, patience_s: float) -> None:
    """A site's peer.toml, dialling `port`."""
    scene.client(
        modality,
        policy=variant.policy,
        network={
            "coordinator": f"tcp://127.0.0.1:{port}",
            "reconnect_s": patience_s,
            "recheck_s": RECHECK_S,
        },
    )


def refer(scene: Scene, variant: Variant) -> Reference:
    """Run it undisturbed."""
    set_up(scene, variant)
    hub, clients = scene.start_all()
    assert hub.code(LIMIT_S) == 0, hub.said
    assert [client.code() for client in clients.values()] == [0] * len(clients)
    return Reference(scene.losses(), scene.weights(STEPS))


# --- playing -------------------------------------------------------------------------------------------------


class Player:
    """Lets a schedule happen."""

    def __init__(self, schedule: Schedule, scene: Scene, wires: Wires) -> None:
        self.schedule, self.scene = schedule, scene
        self.played = Played(schedule)
        self._wires = wires
        self._relays: dict[str, TcpRelay | EnvelopeRelay] = {}
        self._now: dict[str, Daemon] = {}
        self._lost: set[str] = set()
        """Gone for good."""
        self._frozen: Counter[str] = Counter()
        self._due: list[tuple[float, Callable[[], None]]] = []
        self._waiting = list(schedule.accidents)
        self._expected: set[int] = set()
        """Processes whose end was brought about."""
        self._mounted: list[Path] = []
        self._size = self._reached = 0

    def __enter__(self) -> Player:
        return self

    def __exit__(self, *_: object) -> None:
        self.scene.clean_up()
        for folder in self._mounted:
            subprocess.run(["umount", "-l", str(folder)], check=True)

    def play(self) -> Played:
        """Until every process has ended.

        Raises:
            AssertionError: something hangs.
        """
        variant = VARIANTS[self.schedule.variant]
        patience = 4.0 if self.schedule.for_good else 40.0
        set_up(
            self.scene,
            variant,
            patience_s=patience,
            checkpoint_every=self.schedule.checkpoint_every,
            ahead=self.schedule.ahead,
        )
        for modality in variant.modalities:
            site = f"site-{modality}"
            if kind := self.schedule.wires[site]:
                relay = (TcpRelay if kind == "octets" else EnvelopeRelay)(self.scene.port)
                self._wires.lay(relay)
                self._relays[site] = relay
                dress(self.scene, variant, modality, relay.port, patience)
        began = time.monotonic()
        for who in ("hub", *self.schedule.wires):
            if any((a.kind, a.who) == ("full disk", who) for a in self.schedule.accidents):
                self._mount(self.scene.folder / who / "state")
            self._now[who] = self.scene.start(who)
        while not self._over():
            now = time.monotonic()
            assert now < began + LIMIT_S, f"still running after {LIMIT_S:g} s: {self._running()}"
            self._trigger(now)
            for due in sorted(self._due, key=lambda item: item[0]):
                if due[0] <= now:
                    self._due.remove(due)
                    due[1]()
            self._restart()
            time.sleep(0.006)
        self.played.seconds = time.monotonic() - began
        for who, daemon in self._now.items():
            self.played.ends[who] = (daemon.code(1.0), daemon.last)
        self.played.rollbacks = sum(bool(line.get("rollback")) for line in self.scene.metrics())
        return self.played

    # --- inside ----------------------------------------------------------------------------------------

    def _runs(self, daemon: Daemon) -> bool:
        return self.scene.nursery.runs(daemon.pid, 0.0)

    def _running(self) -> list[str]:
        return [who for who, daemon in self._now.items() if self._runs(daemon)]

    def _over(self) -> bool:
        if self._due and not all(who in self._lost for who in self._now):
            # A process that is about to be started again, or to continue, is waited for.
            return False
        return not self._running()

    def _mount(self, folder: Path) -> None:
        """A disk of its own for a state folder; where that is not allowed, it is not filled."""
        folder.mkdir(mode=0o700)
        command = ["mount", "-t", "tmpfs", "-o", f"size={SMALL},mode=700", "splitpeer-test", str(folder)]
        if os.geteuid() == 0 and subprocess.run(command, capture_output=True, check=False).returncode == 0:
            self._mounted.append(folder)

    def _restart(self) -> None:
        """What a service manager does."""
        for who, daemon in self._now.items():
            if daemon.pid in self._expected or self._runs(daemon):
                continue
            self._expected.add(daemon.pid)
            code, last = daemon.code(1.0), daemon.last
            reasons = [
                interruption.because
                for interruption in INTERRUPTIONS
                if interruption.code == code
                and re.search(interruption.text, last)
                and interruption.because in self.played.happened
            ]
            if reasons:
                self.played.again.append(f"{who}: {code}, {reasons[0]}")
                self._later(AGAIN_S, lambda who=who, daemon=daemon: self._again(who, daemon))

    def _trigger(self, now: float) -> None:
        step = self._step()
        while self._waiting and self._waiting[0].step <= step:
            accident = self._waiting.pop(0)
            self._due.append((now + accident.after, lambda accident=accident: self._happen(accident)))

    def _step(self) -> int:
        """The highest that was ever committed; read again only when there is more."""
        path = self.scene.output / "metrics.jsonl"
        size = path.stat().st_size if path.exists() else 0
        if size != self._size:
            self._size = size
            self._reached = max([self._reached, *(line["step"] for line in self.scene.metrics())])
        return self._reached

    def _later(self, seconds: float, what: Callable[[], None]) -> None:
        if seconds < float("inf"):
            self._due.append((time.monotonic() + seconds, what))

    def _happen(self, accident: Accident) -> None:
        relay = self._relays.get(accident.who)
        if accident.kind in PROCESS:
            happened = self._to_process(accident)
        elif accident.kind == "full disk":
            happened = self._fill(accident)
        elif accident.kind == "clock":
            happened = self._set_clock(accident)
        elif accident.kind in ("lose", "twice", "short", "flip", "swap", "hold", "snap"):
            assert isinstance(relay, EnvelopeRelay)
            direction = BOTH[accident.detail % 2]
            damage = Damage(accident.kind, direction, accident.detail // 2, accident.lasts)  # type: ignore[arg-type]
            self._wires.do(relay.arm, damage)
            happened = True
        else:
            assert relay is not None
            self._to_wire(accident, relay)
            happened = True
        if happened:
            self.played.happened.append(accident.kind)

    def _to_process(self, accident: Accident) -> bool:
        daemon = self._now[accident.who]
        if accident.who in self._lost or not self._runs(daemon):
            return False
        if accident.kind == "freeze":
            daemon.signal(signal.SIGSTOP)
            self._frozen[accident.who] += 1
            self._later(accident.lasts, lambda: self._thaw(accident.who, daemon))
            return True
        if self._frozen[accident.who] and accident.kind == "stop":
            return False
        daemon.signal(signal.SIGKILL if accident.kind == "kill" else signal.SIGTERM)
        self._expected.add(daemon.pid)
        if accident.lasts == float("inf"):
            self._lost.add(accident.who)
            return True
        if accident.kind == "kill":
            self._later(accident.lasts, lambda: self._again(accident.who, daemon))
        else:
            self._later(0, lambda: self._when_left(accident, daemon))
        return True

    def _fill(self, accident: Accident) -> bool:
        folder = self.scene.folder / accident.who / "state"
        if folder not in self._mounted:
            return False
        disk = SmallDisk(folder)
        disk.fill()
        self._later(accident.lasts, disk.make_room)
        return True

    def _set_clock(self, accident: Accident) -> bool:
        """Back or forward by hours, for good."""
        folder = self.scene.folder / accident.who
        hours = (-1, 1) if accident.detail % 2 else (-30, 24 * 40)
        (folder / "clock.new").write_text(str(3600 * hours[accident.detail // 2 % 2]))
        (folder / "clock.new").replace(folder / "clock")
        return True

    def _thaw(self, who: str, daemon: Daemon) -> None:
        self._frozen[who] -= 1
        if not self._frozen[who] and self._runs(daemon):
            daemon.signal(signal.SIGCONT)

    def _when_left(self, accident: Accident, daemon: Daemon) -> None:
        """A process that was asked to stop takes its time."""
        if self._runs(daemon):
            self._later(0.05, lambda: self._when_left(accident, daemon))
        else:
            self._later(accident.lasts, lambda: self._again(accident.who, daemon))

    def _again(self, who: str, before: Daemon) -> None:
        if self._now[who] is not before or who in self._lost:
            return
        self._frozen[who] = 0
        if not self._done(who, before):
            self._now[who] = self.scene.start(who)

    def _done(self, who: str, daemon: Daemon) -> bool:
        """It had finished its work before the accident reached it."""
        return ("job.complete" in daemon.said) if who != "hub" else ": 40 steps, Dice" in daemon.said

    def _to_wire(self, accident: Accident, relay: TcpRelay | EnvelopeRelay) -> None:
        do = self._wires.do
        if accident.kind in ("cut", "half-cut"):
            do(relay.cut, far_side=accident.kind == "cut")
        elif accident.kind in ("partition", "one-way"):
            directions = BOTH if accident.kind == "partition" else (BOTH[accident.detail % 2],)
            do(relay.stall, *directions)
            self._later(accident.lasts, lambda: do(relay.flow))
        else:
            assert isinstance(relay, TcpRelay)
            slow = accident.kind == "slow"
            do(relay.__setattr__, *(("delay_s", 0.15) if slow else ("octets_per_s", 100_000)))
            self._later(
                accident.lasts,
                lambda: do(
                    relay.__setattr__, *(("delay_s", 0.0) if slow else ("octets_per_s", float("inf")))
                ),
            )


# --- judging -------------------------------------------------------------------------------------------------


def judge(played: Played, scene: Scene, reference: Reference) -> None:
    """Exact, or a refusal that the list knows. Raises AssertionError otherwise."""
    for daemon in scene.started:
        assert "Traceback" not in daemon.said, daemon.said
    lost = {a.who for a in played.schedule.accidents if a.lasts == float("inf")}
    for who, (code, last) in played.ends.items():
        if code == 0 or (who in lost and code == -signal.SIGKILL):
            continue
        party = "hub" if who == "hub" else "site"
        reasons = [
            refusal.because
            for refusal in REFUSALS
            if (refusal.party, refusal.code) == (party, code)
            and re.search(refusal.text, last)
            and refusal.justified(played.schedule, played)
        ]
        assert reasons, f"{who} ended with {code}, which nothing here justifies: {last}"
        played.refused.append(f"{who}: {code}, {reasons[0]}")
    if played.ends["hub"][0] != 0:
        return
    assert scene.losses() == reference.losses, "other losses than those of the undisturbed run"
    found = scene.weights(STEPS)
    assert found.keys() == reference.weights.keys()
    other = [name for name in found if not torch.equal(found[name], reference.weights[name])]
    assert other == [], "other weights than those of the undisturbed run"
    if not LOSES_MEMORY.intersection(played.happened):
        assert played.rollbacks == 0, "a rollback although no process was lost"


def telling(schedule: Schedule, scene: Scene) -> str:
    """What a failure needs to be told."""
    said = [
        f"--- {daemon.log.name}\n" + "\n".join(daemon.said.splitlines()[-12:]) for daemon in scene.started
    ]
    return f"{schedule}\nreplay: {replay(schedule.seed)}\n" + "\n".join(said)


def replay(seed: int) -> str:
    """The command that plays one schedule again."""
    return f"FAULTS_PROCESS={seed + 1} pytest 'tests/faults/test_process.py::test_schedule[{seed}]'"
