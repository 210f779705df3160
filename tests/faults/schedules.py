"""Schedules of faults, each a function of its seed: a setting, and which fault hits which machine at which moment.

One to six faults, at drawn times or at drawn moments of the protocol. `verdict` says what may come of it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from .disk import Crash
from .federation import HUB, PATIENTS, Setting
from .laboratory import Laboratory
from .memory import Tamper
from .stand_ins import Moment

THREE = ("flair", "t1", "t2")
NOISE = ["gaussian:0.5"]
SETTINGS = (
    Setting("plain"),
    Setting("three", THREE, {"training": {"steps": 8, "checkpoint_every": 2}, "evaluation": {"every": 4}}),
    Setting(
        "coded",
        job={
            "training": {"steps": 12, "checkpoint_every": 5, "precision": "bf16"},
            "wire": {"activations": "int8"},
        },
    ),
    Setting(
        "scored",
        job={"training": {"steps": 9, "checkpoint_every": 4}, "evaluation": {"every": 3, "missing": True}},
    ),
    Setting(
        "noise", job={"training": {"steps": 9, "checkpoint_every": 4}}, peer={"policy": {"defences": NOISE}}
    ),
    Setting(
        "kept noise",
        job={"training": {"steps": 8, "checkpoint_every": 3}, "defences": {"gradients": NOISE}},
        peer={"policy": {"defences": ["gaussian:0.5"], "image_defences": ["voxel-noise:0.5"]}},
    ),
    Setting("dropout", THREE, {"training": {"steps": 10, "checkpoint_every": 4, "seat_dropout": 0.35}}),
    Setting(
        "one ahead", job={"training": {"steps": 14, "ahead": 1, "optimiser": "sgd", "schedule": "cosine"}}
    ),
    Setting(
        "far ahead", job={"training": {"steps": 14, "ahead": 8, "checkpoint_every": 5, "keep_checkpoints": 1}}
    ),
)
"""One of few: what the undisturbed run comes to is computed once."""


def _away(mode: str, **sections: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Sites that are away for longer than a few seconds are gone on without."""
    return {
        "absence": {"mode": mode},
        "deadlines": {"join_s": 60, "step_s": 30, "return_s": 3},
        **sections,
    }


GOING_ON = (
    Setting("skip", THREE, _away("skip"), pace=10.0),
    Setting(
        "skip, but for one",
        THREE,
        _away("skip", evaluation={"every": 4}, **{"absence.per_site_s": {"site-flair": 60}}),
        pace=10.0,
    ),
    Setting("drop", THREE, _away("drop", evaluation={"every": 5}), pace=30.0),
    Setting(
        "drop and dropout",
        THREE,
        _away("drop", training={"checkpoint_every": 4, "seat_dropout": 0.35, "precision": "bf16"}),
        pace=30.0,
    ),
)
"""Settings in which steps are made without a site that is away: slow, so that it comes back while there is work."""
ONE_IN = 4
"""So many schedules have one of them."""
GAPS = {"site-t1": "t1-west", "site-t2": "t1-east", "site-flair": "flair-gaps"}
"""Two sites fill the seat t1, and of some patients a seat is missing."""
SEATS = (
    Setting(
        "gaps", THREE,
        {"data": {"min_seats": 1}, "training": {"steps": 10, "checkpoint_every": 3, "seat_dropout": 0.3}},
        some=GAPS,
    ),
    Setting(
        "averages", THREE,
        {"data": {"min_seats": 1}, "training": {"steps": 11, "checkpoint_every": 3, "average_every": 2}},
        {"policy": {"share_encoder": True}}, some=GAPS,
    ),
)  # fmt: skip
ONE_IN_SEATS = 6


# --- faults ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class When:
    """A moment of the protocol; what is None may be anything.

    Attributes:
        nth: which one of those that fit, 0 the first.
        after: virtual seconds; 0: in the very call.
    """

    who: str
    told: str
    message: str
    step: int | None = None
    nth: int = 0
    after: float = 0.0

    def fits(self, moment: Moment) -> bool:
        return (self.who, self.told, self.message) == (moment.who, moment.told, moment.message) and (
            self.step is None or self.step == moment.step
        )

    def __str__(self) -> str:
        verb = {"send": "sends", "sent": "has sent", "got": "gets"}[self.told]
        step = "" if self.step is None else f" {self.step}"
        nth = f" ({self.nth + 1}.)" if self.nth else ""
        return f"when {self.who} {verb} {self.message}{step}{nth}" + (
            f" + {self.after:.4f} s" if self.after else ""
        )


@dataclass(frozen=True)
class Fault:
    """What happens to whom, and when: at a virtual time or at a moment."""

    kind: str
    host: str
    when: float | When
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        when = f"at {self.when:.4f}" if isinstance(self.when, float) else str(self.when)
        options = " ".join(
            f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in self.options.items()
        )
        return f"{self.kind} {self.host} {options} {when}".replace("  ", " ")

    @property
    def seconds(self) -> float:
        """How long somebody may be out of reach because of it."""
        return max(float(self.options.get(key, 0.0)) for key in ("back", "seconds", "leap"))


def strike(lab: Laboratory, fault: Fault) -> None:
    """Let it happen now."""
    node, o = lab.nodes[fault.host], fault.options
    lab.tell(f"*** {fault}")
    lab.struck.append(fault.kind)
    if fault.kind in ("kill", "power"):
        node.kill(o["back"], power=fault.kind == "power")
    elif fault.kind == "stop":
        node.hold(o["seconds"])
    elif fault.kind == "drain":
        node.drain()
    elif fault.kind == "cut":
        lab.network.cut(fault.host, o["notice"])
    elif fault.kind == "part":
        lab.network.part(fault.host, HUB, o["seconds"])
    elif fault.kind == "oneway":
        ends = (fault.host, HUB) if o["up"] else (HUB, fault.host)
        lab.network.part(*ends, o["seconds"], both=False)
    elif fault.kind == "slow":
        lab.network.slow(fault.host, o["factor"], o["seconds"])
    elif fault.kind == "tamper":
        lab.network.tampers.append(Tamper(o["what"], fault.host, o["up"], o["skip"]))
    elif fault.kind == "jump":
        for other in lab.nodes.values():
            if other.life is not None and (o["all"] or other is node):
                lab.loop.jump(other.life, o["leap"])
    elif fault.kind == "full":
        lab.disks.full(fault.host, True)
        lab.later(o["seconds"], lambda: lab.disks.full(fault.host, False))
    elif fault.kind == "crawl":
        lab.slow_disk[fault.host] = o["each"]
        lab.later(o["seconds"], lambda: lab.slow_disk.pop(fault.host, None))
    elif fault.kind == "crash":
        lab.disks.crashes.append(Crash(fault.host, o["operation"], o["name"], o["skip"], o["power"]))
    elif fault.kind == "spoil":
        lab.bad_files.add((fault.host, o["patient"]))
        lab.later(o["repaired"], lambda: lab.bad_files.discard((fault.host, o["patient"])))
    else:
        raise ValueError(fault.kind)


def arm(lab: Laboratory, faults: list[Fault]) -> None:
    """Have them happen when they are due."""
    lab.disks.remember = any(f.kind == "power" or f.options.get("power") for f in faults)
    for fault in faults:
        if isinstance(fault.when, float):
            lab.later(fault.when, lambda fault=fault: strike(lab, fault))
        else:
            lab.watchers.append(_watcher(lab, fault, fault.when))


def _watcher(lab: Laboratory, fault: Fault, when: When) -> Callable[[Moment], None]:
    left = when.nth

    def watch(moment: Moment) -> None:
        nonlocal left
        if left < 0 or not when.fits(moment):
            return
        left -= 1
        if left >= 0:
            return
        if when.after:
            lab.later(when.after, lambda: strike(lab, fault))
        else:
            strike(lab, fault)

    return watch


# --- drawing -----------------------------------------------------------------------------------------------

KINDS = {
    "kill": 6, "power": 2, "stop": 3, "drain": 2, "cut": 5, "part": 3, "oneway": 2, "slow": 1, "tamper": 5,
    "jump": 1, "full": 2, "crawl": 1, "crash": 3,
}  # fmt: skip
RECOVERING = (
    "rollback",
    "rolled-back",
    "begin",
    "job-offer",
    "job-accept",
    "inventory",
    "gradients",
    "applied",
)


def draw_setting(seed: int) -> Setting:
    """What is trained in a schedule."""
    source = random.Random(f"several at a seat {seed}")
    if source.randrange(ONE_IN_SEATS) == 0:
        return source.choice(SEATS)
    source = random.Random(f"going on {seed}")
    if source.randrange(ONE_IN) == 0:
        return source.choice(GOING_ON)
    return random.Random(f"setting {seed}").choice(SETTINGS)


def draw_faults(seed: int, setting: Setting, moments: Sequence[Moment], length: float) -> list[Fault]:
    """The faults of a schedule.

    Args:
        moments: of the undisturbed run.
        length: how long that takes.
    """
    source = random.Random(f"schedule {seed}")
    return [_draw(source, setting, moments, length) for _ in range(source.choice((1, 1, 2, 2, 3, 4, 5, 6)))]


SPOILT = tuple(one for one in (*SETTINGS, *GOING_ON) if "defences" not in str(one.job) + str(one.peer))
"""Settings in which files go bad: those whose noise does not depend on which batches there were."""


def draw_spoilt(seed: int) -> Setting:
    """What is trained where files go bad."""
    return random.Random(f"spoilt setting {seed}").choice(SPOILT)


def spoil(seed: int, setting: Setting, moments: Sequence[Moment], length: float) -> list[Fault]:
    """Files that go bad in a schedule, and for how long."""
    source = random.Random(f"spoil {seed}")
    at_work = [moment for moment in moments if moment.step and moment.step < setting.steps]

    def when() -> float | When:
        # Before the run begins, it only begins without the patient.
        return _draw_when(source, setting, source.choice((moments, at_work, at_work, at_work)), length)

    return [
        Fault(
            "spoil",
            source.choice([HUB, *setting.sites]),
            when(),
            {"patient": source.choice(PATIENTS), "repaired": source.choice((2.0, 30.0, 90_000.0, 90_000.0))},
        )
        for _ in range(source.choice((1, 1, 1, 2)))
    ]


def _draw(source: random.Random, setting: Setting, moments: Sequence[Moment], length: float) -> Fault:
    kind = source.choices(list(KINDS), list(KINDS.values()))[0]
    on_line = kind in ("cut", "part", "oneway", "slow", "tamper")
    hosts = list(setting.sites) if on_line else [HUB, *setting.sites]
    host = source.choice(hosts)
    return Fault(
        kind, host, _draw_when(source, setting, moments, length), _draw_options(source, kind, setting)
    )


def _draw_when(
    source: random.Random, setting: Setting, moments: Sequence[Moment], length: float
) -> float | When:
    how = source.random()
    if how < 0.3:
        return source.uniform(0.0, 1.2 * length)
    after = source.choice((0.0, 0.0, 0.0, source.uniform(0.0, 0.01), source.uniform(0.0, 1.0)))
    if how < 0.85:
        moment = source.choice(moments)
        return When(moment.who, moment.told, moment.message, moment.step, 0, after)
    # What happens again, or at all, only after another fault.
    who = source.choice([HUB, *setting.sites])
    told = source.choice(("send", "sent", "got"))
    return When(who, told, source.choice(RECOVERING), None, source.randint(1, 12), after)


def _draw_options(source: random.Random, kind: str, setting: Setting) -> dict[str, Any]:
    # Silence is noticed after 15 to 20 s; what is shorter than that costs a pause, not a site.
    longest = (22.0, 45.0) if setting.goes_on else (15.0, 28.0)
    brief = source.choice((source.uniform(0.01, 1.0), source.uniform(1.0, 15.0), source.uniform(*longest)))
    long = source.choice((brief, brief, source.uniform(28.0, 120.0)))
    if source.random() < 0.05:
        long = source.uniform(200.0, 900.0)
    if kind in ("kill", "power"):
        return {"back": long}
    if kind == "stop":
        return {"seconds": brief}
    if kind == "cut":
        return {"notice": source.choice(("both", "both", "site", "hub"))}
    if kind == "part":
        return {"seconds": long}
    if kind == "oneway":
        return {"seconds": brief, "up": source.random() < 0.5}
    if kind == "slow":
        return {"factor": source.choice((10.0, 100.0, 500.0)), "seconds": long}
    if kind == "tamper":
        what = source.choice(("lost", "twice", "cut", "flipped", "swapped", "reset"))
        return {"what": what, "up": source.random() < 0.5, "skip": source.choice((0, 0, 0, 1, 2, 3, 5, 8))}
    if kind == "jump":
        return {"leap": brief, "all": source.random() < 0.3}
    if kind == "full":
        return {"seconds": long}
    if kind == "crawl":
        return {"each": source.uniform(1.0, 20.0), "seconds": brief}
    if kind == "crash":
        operation = source.choice(("write", "fsync", "replace", "replaced", "unlink"))
        name = source.choice((r"step-", r"step-", r"step-", r".*"))
        return {
            "operation": operation,
            "name": name,
            "skip": source.choice((0, 0, 1, 2, 3, 5)),
            "power": source.random() < 0.4,
        }
    return {}
