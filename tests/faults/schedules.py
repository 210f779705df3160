"""Schedules of faults, each a function of its seed, and the verdict on what came of it.

A schedule takes a setting, one to six faults at drawn times or at drawn moments of the protocol, and runs. What may
come of it: the weights, losses, scores and masks of the undisturbed run, bit for bit; or a refusal from `REFUSALS`,
by a fault that justifies it. Anything else is a defect, above all somebody who waits for ever.
"""

from __future__ import annotations

import random
import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch

from splitpeer.errors import DataError, DeadlinePassed, DiskTrouble, JobFailed

from .disk import Crash, wipe
from .laboratory import HUB, Laboratory, Moment, Setting, make_federation, run_id
from .memory import Tamper
from .virtual import Hang

THREE = ("flair", "t1", "t2")
NOISE = ["gaussian:0.5"]
SETTINGS = (
    Setting("plain"),
    Setting("three", THREE, {"training": {"steps": 8, "checkpoint_every": 2}, "evaluation": {"every": 4}}),
    Setting("bf16", job={"training": {"steps": 12, "checkpoint_every": 5, "precision": "bf16"}}),
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
        peer={"policy": {"defences": ["gaussian:0.5,kept=true"], "image_defences": ["voxel-noise:0.5"]}},
    ),
    Setting("dropout", THREE, {"training": {"steps": 10, "checkpoint_every": 4, "modality_dropout": 0.35}}),
    Setting(
        "one ahead", job={"training": {"steps": 14, "ahead": 1, "optimiser": "sgd", "schedule": "cosine"}}
    ),
    Setting(
        "far ahead", job={"training": {"steps": 14, "ahead": 8, "checkpoint_every": 5, "keep_checkpoints": 1}}
    ),
)
"""By drawing one of few, the undisturbed run is computed once."""


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


def draw_faults(seed: int, setting: Setting, usual: Reference) -> list[Fault]:
    """The faults of a schedule."""
    source = random.Random(f"schedule {seed}")
    return [_draw(source, setting, usual) for _ in range(source.choice((1, 1, 2, 2, 3, 4, 5, 6)))]


def _draw(source: random.Random, setting: Setting, usual: Reference) -> Fault:
    kind = source.choices(list(KINDS), list(KINDS.values()))[0]
    on_line = kind in ("cut", "part", "oneway", "slow", "tamper")
    hosts = list(setting.sites) if on_line else [HUB, *setting.sites]
    host = source.choice(hosts)
    return Fault(kind, host, _draw_when(source, setting, usual), _draw_options(source, kind))


def _draw_when(source: random.Random, setting: Setting, usual: Reference) -> float | When:
    how = source.random()
    if how < 0.3:
        return source.uniform(0.0, 1.2 * usual.length)
    after = source.choice((0.0, 0.0, 0.0, source.uniform(0.0, 0.01), source.uniform(0.0, 1.0)))
    if how < 0.85:
        moment = source.choice(usual.moments)
        return When(moment.who, moment.told, moment.message, moment.step, 0, after)
    # What happens again, or at all, only after another fault.
    who = source.choice([HUB, *setting.sites])
    told = source.choice(("send", "sent", "got"))
    return When(who, told, source.choice(RECOVERING), None, source.randint(1, 12), after)


def _draw_options(source: random.Random, kind: str) -> dict[str, Any]:
    brief = source.choice((source.uniform(0.01, 1.0), source.uniform(1.0, 15.0), source.uniform(15.0, 28.0)))
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


# --- what should come of it ----------------------------------------------------------------------------------


@dataclass
class Reference:
    """The undisturbed run."""

    weights: dict[str, dict[str, torch.Tensor]]
    losses: list[float | None]
    dice: dict[str, float]
    masks: dict[str, np.ndarray]
    moments: list[Moment]
    length: float


@dataclass(frozen=True)
class Refusal:
    """A way in which a party may give up, if there was a fault that justifies it."""

    who: str
    """"hub" or "site"."""
    error: type[Exception]
    text: str
    """Regular expression."""
    justified: Callable[[Laboratory, list[Fault]], bool]


def _hub_failed(lab: Laboratory, faults: list[Fault]) -> bool:
    return lab.nodes[HUB].error is not None


def _hub_is_done(lab: Laboratory, faults: list[Fault]) -> bool:
    return lab.nodes[HUB].done


def _no_room(lab: Laboratory, faults: list[Fault]) -> bool:
    """A disk was full, and no service manager tries again."""
    return not lab.manager and any(fault.kind == "full" for fault in faults)


def _a_site_is_down(lab: Laboratory, faults: list[Fault]) -> bool:
    """One has refused to go on, and no service manager tries again."""
    return not lab.manager and any(
        isinstance(lab.nodes[site].error, DiskTrouble) for site in lab.setting.sites
    )


def _too_long(lab: Laboratory, faults: list[Fault]) -> bool:
    """Somebody was out of reach for longer than the coordinator's patience, and no service manager tries again."""
    return not lab.manager and sum(fault.seconds for fault in faults) > lab.setting.patience


REFUSALS = (
    # Nobody answers any more, or the coordinator said why it failed.
    Refusal("site", JobFailed, r"the coordinator ended the job", _hub_failed),
    Refusal("site", DeadlinePassed, r"gave up on tcp://", _hub_is_done),
    # No room where it is needed to go on at all. With a service manager nothing of the kind is an end.
    Refusal("site", DiskTrouble, r"No space left on device", _no_room),
    Refusal(
        "hub", DiskTrouble, r"No space left on device|checkpoint of the last step was not written", _no_room
    ),
    Refusal("hub", DeadlinePassed, r"missing after|did not come back within", _a_site_is_down),
    # Waiting has an end.
    Refusal("hub", DeadlinePassed, r"missing after|did not come back within", _too_long),
    Refusal("site", DeadlinePassed, r"gave up on tcp://", _too_long),
)
"""What is documented, and nothing else."""


@dataclass
class Outcome:
    """What came of a schedule."""

    seed: int
    setting: Setting
    faults: list[Fault]
    problem: str = ""
    """Empty: as it should be."""
    refused: str = ""
    """A refusal that is documented; empty: the undisturbed result."""
    story: str = ""
    virtual: float = 0.0

    @property
    def headline(self) -> str:
        return f"seed {self.seed} ({self.setting.name}): " + (self.problem or self.refused or "exact")

    def explain(self) -> str:
        """For a failed test."""
        listed = "\n".join(f"  {fault}" for fault in self.faults)
        last = "\n".join(self.story.splitlines()[-40:])
        return (
            f"{self.headline}\nfaults:\n{listed}\nthe last of the story:\n{last}\n"
            f"all of it: python -m tests.faults.replay {self.seed}"
        )


class Bench:
    """Runs schedules; keeps what undisturbed runs gave.

    Args:
        folder: for files; default: in memory, if the system has such a place.
    """

    def __init__(self, folder: Path | None = None) -> None:
        place = "/dev/shm" if folder is None and Path("/dev/shm").is_dir() else None
        self.folder = folder or Path(tempfile.mkdtemp(prefix="splitproto-faults-", dir=place))
        self.federation = self.folder / "federation"
        make_federation(self.federation)
        self._references: dict[tuple[str, int], Reference] = {}
        self._count = 0

    def close(self) -> None:
        """Remove everything."""
        wipe(self.folder)

    def laboratory(self, setting: Setting, seed: int, **options: Any) -> Laboratory:
        """A new one."""
        self._count += 1
        torch.set_num_threads(1)
        return Laboratory(self.federation, self.folder / f"lab{self._count}", setting, seed, **options)

    def reference(self, setting: Setting, run: int = 0) -> Reference:
        """What the setting gives when nothing happens. The noise of defences depends on the run."""
        noisy = "defences" in str(setting.job) + str(setting.peer)
        key = setting.name, run if noisy else 0
        if key not in self._references:
            lab = self.laboratory(setting, 0, run=key[1])
            try:
                lab.run()
                for node in lab.nodes.values():
                    if node.error is not None:
                        raise node.error
                self._references[key] = _result(lab)
            except BaseException:
                print(lab.text())
                raise
            finally:
                lab.close()
        return self._references[key]

    def schedule(self, seed: int) -> tuple[Setting, list[Fault]]:
        """The setting and the faults of a seed."""
        setting = random.Random(f"setting {seed}").choice(SETTINGS)
        return setting, draw_faults(seed, setting, self.reference(setting))

    def run(self, seed: int) -> Outcome:
        """One schedule."""
        setting, faults = self.schedule(seed)
        return self.play(seed, setting, faults)

    def play(self, seed: int, setting: Setting, faults: list[Fault]) -> Outcome:
        """Run these faults and judge."""
        outcome = Outcome(seed, setting, faults)
        lab = self.laboratory(setting, seed, manager=seed % 2 == 1)
        try:
            arm(lab, faults)
            try:
                lab.run()
            except Hang as hang:
                outcome.problem = f"HANG: {hang}"
            else:
                self._judge(outcome, lab)
            outcome.story, outcome.virtual = lab.text(), lab.loop.now
        finally:
            lab.close()
        return outcome

    def _judge(self, outcome: Outcome, lab: Laboratory) -> None:
        outcome.problem = _complaints(lab)
        if outcome.problem:
            return
        refused = []
        for name, node in lab.nodes.items():
            if node.error is None:
                continue
            known = [
                refusal
                for refusal in REFUSALS
                if (refusal.who == HUB) == (name == HUB)
                and type(node.error) is refusal.error
                and re.search(refusal.text, str(node.error))
            ]
            if not any(refusal.justified(lab, outcome.faults) for refusal in known):
                outcome.problem = f"{name} ended with {type(node.error).__name__}: {node.error}"
                return
            refused.append(f"{name}: {type(node.error).__name__}")
        outcome.refused = ", ".join(refused)
        if lab.nodes[HUB].error is None:
            run = _number_of_run(lab)
            outcome.problem = _differences(self.reference(outcome.setting, run), lab)


def _complaints(lab: Laboratory) -> str:
    for life, context in lab.loop.complaints:
        error = context.get("exception")
        return f"{life}: {context['message']}: {error!r}"
    return ""


def _number_of_run(lab: Laboratory) -> int:
    return next(n for n in range(100) if run_id(n).hex() == lab.result["run"])


def _result(lab: Laboratory) -> Reference:
    result = lab.result
    masks = {
        path.name: np.asarray(nib.load(path).dataobj)
        for path in sorted((lab.output / "predictions").glob("*"))
    }
    return Reference(
        lab.weights(lab.setting.steps), _losses(lab), result["dice"], masks, lab.moments, lab.loop.now
    )


def _losses(lab: Laboratory) -> list[float | None]:
    """Of every step; what a rollback made void is left out."""
    kept: list[float | None] = []
    for line in lab.metrics():
        if line.get("rollback"):
            del kept[line["step"] :]
        elif "loss" in line:
            if line["step"] != len(kept) + 1:
                raise AssertionError(f"metrics.jsonl: step {line['step']} after step {len(kept)}")
            kept.append(line["loss"])
    return kept


def _differences(usual: Reference, lab: Laboratory) -> str:
    """What is not as in the undisturbed run."""
    if not lab.result["complete"]:
        return "the result is not complete"
    try:
        found = _result(lab)
    except (DataError, AssertionError, ValueError, KeyError) as error:
        return f"no result: {error}"
    for who, tensors in usual.weights.items():
        if tensors.keys() != found.weights[who].keys():
            return f"{who} has other tensors"
        for name, tensor in tensors.items():
            if not torch.equal(tensor, found.weights[who][name]):
                return f"the weights of {who} differ ({name})"
    if usual.losses != found.losses:
        return f"the losses differ: {found.losses} for {usual.losses}"
    if str(usual.dice) != str(found.dice):
        return f"Dice differs: {found.dice} for {usual.dice}"
    if usual.masks.keys() != found.masks.keys() or any(
        not np.array_equal(mask, found.masks[name]) for name, mask in usual.masks.items()
    ):
        return "the masks differ"
    return ""
