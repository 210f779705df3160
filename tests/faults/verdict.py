"""Which outcomes of a schedule are allowed, and whether one of them came about.

The weights, losses, scores and masks of the undisturbed run, bit for bit; where steps are made without a site that is
away, those that the run's own history gives (`retrace`); or a refusal from `REFUSALS`, by a fault that justifies it.
Anything else is a defect, above all a party that waits for ever.
"""

from __future__ import annotations

import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch

from splitpeer.errors import DataError, DeadlinePassed, DiskTrouble, JobFailed

from .disk import wipe
from .federation import HUB, Setting, make_federation
from .laboratory import Laboratory, run_id
from .retrace import Deed, differences, noted
from .schedules import Fault, arm, draw_faults, draw_setting, draw_spoilt, spoil
from .stand_ins import Moment
from .virtual import Hang


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
    name: str
    """For the summary."""
    text: str
    """Regular expression."""
    justified: Callable[[Laboratory, list[Fault], str], bool]
    """Whether the party named may end so."""


def _hub_failed(lab: Laboratory, faults: list[Fault], who: str) -> bool:
    return lab.nodes[HUB].error is not None


def _hub_is_done(lab: Laboratory, faults: list[Fault], who: str) -> bool:
    return lab.nodes[HUB].done


def _no_room(lab: Laboratory, faults: list[Fault], who: str) -> bool:
    """A disk was full, and no service manager tries again, or none needs to."""
    tries_again = lab.manager and not lab.nodes[who].left_alone
    return not tries_again and any(fault.kind == "full" for fault in faults)


def _a_site_is_down(lab: Laboratory, faults: list[Fault], who: str) -> bool:
    """One has refused to go on, and no service manager tries again."""
    return not lab.manager and any(
        isinstance(lab.nodes[site].error, DiskTrouble) for site in lab.setting.sites
    )


def _too_long(lab: Laboratory, faults: list[Fault], who: str) -> bool:
    """Somebody was out of reach for longer than the coordinator's patience, and no service manager tries again."""
    return not lab.manager and sum(fault.seconds for fault in faults) > lab.setting.patience


def _files_went_bad(lab: Laboratory, faults: list[Fault], who: str) -> bool:
    """More than may be withdrawn, or too few patients are left."""
    return lab.struck.count("spoil") > 1


TOO_MANY = r"and may withdraw 1 |patients are left, 2 are needed|none of \d masks can be used"
GAVE_UP = r"missing after|did not come back within|its links keep breaking|least_sites is"
REFUSALS = (
    # Nobody answers any more, or the coordinator said why it failed.
    Refusal("site", JobFailed, "told of the failure", r"the coordinator ended the job", _hub_failed),
    Refusal("site", DeadlinePassed, "nobody listens any more", r"gave up on tcp://", _hub_is_done),
    # No room where it is needed to go on at all. With a service manager nothing of the kind is an end.
    Refusal("site", DiskTrouble, "disk full", r"No space left on device", _no_room),
    Refusal(
        "hub", DiskTrouble, "disk full", r"No space left on device|checkpoint of the last step was not written",
        _no_room,
    ),
    Refusal("hub", DeadlinePassed, "a site's disk was full", GAVE_UP, _a_site_is_down),
    # More files went bad than a run can do without.
    Refusal("hub", JobFailed, "too many files went bad", TOO_MANY, _files_went_bad),
    Refusal("hub", DataError, "too many files went bad", TOO_MANY, _files_went_bad),
    # Waiting has an end.
    Refusal("hub", DeadlinePassed, "away for longer than return_s", GAVE_UP, _too_long),
    Refusal("site", DeadlinePassed, "away for longer than reconnect_s", r"gave up on tcp://", _too_long),
)  # fmt: skip
"""What is documented, and nothing else."""


@dataclass
class Outcome:
    """What came of a schedule."""

    seed: int
    setting: Setting
    faults: list[Fault]
    problem: str = ""
    """Empty: as it should be."""
    refusals: dict[str, str] = field(default_factory=dict)
    """By party, the documented refusal with which it ended."""
    struck: Counter[str] = field(default_factory=Counter)
    """Accidents that did happen, by kind: the moment of others never came."""
    starts: int = 0
    """Processes that were started, beyond one a party."""
    rollbacks: int = 0
    """How often all went back to a checkpoint."""
    absences: int = 0
    """How often the run went on without a site."""
    withdrawals: int = 0
    """How many patients were withdrawn."""
    virtual: float = 0.0
    story: str = ""

    @property
    def complete(self) -> bool:
        """The run came to its end, with the result that it should have."""
        return not self.problem and HUB not in self.refusals

    @property
    def headline(self) -> str:
        refused = ", ".join(f"{who} refused: {why}" for who, why in self.refusals.items())
        came = "its own history" if self.absences or self.withdrawals else "exact"
        told = "; ".join(part for part in (came if self.complete else "", refused) if part)
        return f"seed {self.seed} ({self.setting.name}): " + (self.problem or told)

    def explain(self) -> str:
        """For a failed test."""
        listed = "\n".join(f"  {fault}" for fault in self.faults)
        last = "\n".join(self.story.splitlines()[-40:])
        return (
            f"{self.headline}\nfaults:\n{listed}\nthe last of the story:\n{last}\n"
            f"all of it: python -m tests.faults.replay {self.seed}"
        )


def summary(played: Sequence[Outcome]) -> Iterator[str]:
    """Lines for people, on schedules without a problem."""
    complete = [one for one in played if one.complete]
    own = sum(one.absences > 0 for one in complete)
    deaf = sum(bool(one.refusals) for one in complete)
    yield (
        f"{len(played)} played as they should: {len(complete) - own} exact, {own} as their own history with absences "
        f"gives (in {deaf} of both a site did not hear of the end), {len(played) - len(complete)} refused as documented"
    )
    refusals = Counter("; ".join(sorted(set(one.refusals.values()))) for one in played if not one.complete)
    for refusal, count in refusals.most_common():
        yield f"  refused {count}: {refusal}"
    yield (
        f"{sum(one.rollbacks for one in played)} rollbacks, {sum(one.absences for one in played)} absences, "
        f"{sum(one.starts for one in played)} restarts, {sum(one.virtual for one in played) / 3600:.1f} virtual hours"
    )
    kinds = sum((one.struck for one in played), Counter())
    yield f"{kinds.total()} accidents: " + ", ".join(f"{kind} {count}" for kind, count in kinds.most_common())


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
        setting = draw_setting(seed)
        usual = self.reference(setting)
        return setting, draw_faults(seed, setting, usual.moments, usual.length)

    def run(self, seed: int) -> Outcome:
        """One schedule."""
        setting, faults = self.schedule(seed)
        return self.play(seed, setting, faults)

    def run_spoilt(self, seed: int, *, others: bool) -> Outcome:
        """One in which files go bad; `others`: together with other accidents."""
        setting = draw_spoilt(seed)
        usual = self.reference(setting)
        faults = spoil(seed, setting, usual.moments, usual.length)
        if others:
            faults += draw_faults(seed, setting, usual.moments, usual.length)
        return self.play(seed, setting, faults)

    def play(self, seed: int, setting: Setting, faults: list[Fault]) -> Outcome:
        """Run these faults and judge."""
        outcome = Outcome(seed, setting, faults)
        lab = self.laboratory(setting, seed, manager=seed % 2 == 1)
        history: list[Deed] = []
        try:
            arm(lab, faults)
            try:
                with noted(history):
                    lab.run()
            except Hang as hang:
                outcome.problem = f"HANG: {hang}"
            else:
                self._judge(outcome, lab, history)
            outcome.story, outcome.virtual = lab.text(), lab.loop.now
            outcome.struck = Counter(lab.struck)
            outcome.starts = sum(max(0, node.starts - 1) for node in lab.nodes.values())
            outcome.rollbacks = outcome.story.count(f"{HUB} logs job.rollback ")
            outcome.absences = outcome.story.count(f"{HUB} logs site.absent ")
            outcome.withdrawals = outcome.story.count(f"{HUB} logs patient.withdrawn ")
        finally:
            lab.close()
        return outcome

    def _judge(self, outcome: Outcome, lab: Laboratory, history: list[Deed]) -> None:
        outcome.problem = _complaints(lab)
        if outcome.problem:
            return
        for name, node in lab.nodes.items():
            if node.error is None:
                continue
            known = [
                refusal
                for refusal in REFUSALS
                if (refusal.who == HUB) == (name == HUB)
                and type(node.error) is refusal.error
                and re.search(refusal.text, str(node.error))
                and refusal.justified(lab, outcome.faults, name)
            ]
            if not known:
                outcome.problem = f"{name} ended with {type(node.error).__name__}: {node.error}"
                return
            outcome.refusals[name] = f"{known[0].error.__name__} ({known[0].name})"
        if lab.nodes[HUB].error is None:
            if outcome.setting.goes_on or "spoil" in lab.struck:
                outcome.problem = differences(lab, history) or _too_hasty(lab, outcome.faults)
            else:
                run = _number_of_run(lab)
                outcome.problem = _differences(self.reference(outcome.setting, run), lab)


def _complaints(lab: Laboratory) -> str:
    for life, context in lab.loop.complaints:
        error = context.get("exception")
        return f"{life}: {context['message']}: {error!r}"
    return ""


def _number_of_run(lab: Laboratory) -> int:
    return next(n for n in range(100) if run_id(n).hex() == lab.result["run"])


def _too_hasty(lab: Laboratory, faults: list[Fault]) -> str:
    """Whether a site was gone on without although nothing kept it away for long."""
    brief = all(
        (fault.kind in ("kill", "stop", "part") or fault.options.get("notice") == "both") for fault in faults
    )
    absent = [line for _, line in lab.story if f"{HUB} logs site.absent " in line]
    if brief and absent and sum(fault.seconds for fault in faults) < lab.setting.patience / 4:
        return f"for no good reason: {absent[0].strip()}"
    return ""


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
