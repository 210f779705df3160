"""Many configurations, each trained, recorded, attacked and judged: Dice against leakage.

A configuration that is done has `point.json` with the digest of all that it came from; a sweep that was
stopped continues with the rest. Configurations run in several processes; under `torchrun` every rank takes
its share of them, on as many machines as one likes (`shares.py`).
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch

from splitpeer.attacks.budget import Budget
from splitpeer.attacks.catalogue import reads_traffic
from splitpeer.attacks.image.kept_noise import applies
from splitpeer.attacks.view import coordinator_view
from splitpeer.audit.breadth import attack_every_seat, attack_together, once, people, tell_members
from splitpeer.audit.breadth import record as record_wider
from splitpeer.audit.cohort import Cohort, Samples, cut, most_tumour, shadow
from splitpeer.audit.experiment import (
    ALL_STEPS,
    Experiment,
    Order,
    Strangers,
    graded_steps,
    image_experiment,
    joint_experiment,
    label_experiment,
    parse_order,
    posed_experiment,
)
from splitpeer.audit.frontier import FrontierPoint, save
from splitpeer.audit.judge import Judge, Outcome, make_judge
from splitpeer.audit.knowledge import with_models
from splitpeer.audit.plan import SweepConfiguration, SweepHead, SweepPlan, fingerprint
from splitpeer.audit.rehearsal import Protection, Recording, Rehearsal, Rehearsed
from splitpeer.audit.run_folder import RunFolder, applied
from splitpeer.audit.shares import share_of
from splitpeer.audit.wider import neighbour_experiment, recorded_around, shadow_beside, slices_around
from splitpeer.captures.reader import open_capture
from splitpeer.data.geometry import spacing_of
from splitpeer.data.sampling import split_patients
from splitpeer.errors import ConfigError, JobFailed
from splitpeer.federation.seats import seats_of
from splitpeer.federation.terms import job_on_wire, window_of
from splitpeer.leakage.scores import highest_floor, of_each_worst
from splitpeer.ranks.torchrun import Rank
from splitpeer.report.model import configuration
from splitpeer.settings.job import JobConfig
from splitpeer.storage import durable, reading

log = logging.getLogger(__name__)
SALT = bytes(32)
DONE = "point.json"
_RECORDED_STEPS = 2
"""At both ends, by all parties; the site under attack records more (`site_capture_mib`)."""


@dataclass(frozen=True)
class SweepTask:
    """One configuration with one seed. Holds what the files said when the sweep began."""

    plan: SweepPlan
    job: JobConfig
    out: Path
    configuration: SweepConfiguration
    seed: int
    keep_captures: bool = False
    device: str = "cpu"

    @property
    def folder(self) -> Path:
        """Its run folder."""
        return self.out / f"{self.configuration.slug}-seed{self.seed}"

    def digest(self) -> str:
        """Digest of all that its result depends on."""
        kept = self.job.model_dump(mode="json", exclude={"output", "deadlines"})
        shared = self.plan.model_dump(mode="json", exclude={"configuration"})
        return fingerprint(shared, kept, _written(self.configuration), self.seed)

    def done(self) -> dict[str, Any] | None:
        """Its `point.json`, if it is of these settings."""
        try:
            found = reading.document(self.folder / DONE, follow=True)
        except (OSError, ValueError):
            return None
        return found if found.get("digest") == self.digest() else None


def _written(configuration: SweepConfiguration) -> dict[str, Any]:
    """Its description from the file; an unused key must not invalidate old results."""
    everything = configuration.model_dump(mode="json")
    return {name: value for name, value in everything.items() if value or name not in ("also_after", "wire")}


def sweep(
    plan_file: Path, job_file: Path, out: Path, *, workers: int = 1, keep_captures: bool = False, device: str = "cpu",
    told: Callable[[str, int, int], None] = lambda what, done, total: None, budget: str | None = None,
    rank: Rank | None = None,
) -> list[dict[str, Any]]:  # fmt: skip
    """Run the configurations that are not done yet; returns the `point.json` of each, in the plan's order.

    Args:
        rank: of several, which share the configurations; only the first returns and writes what all found.

    Raises:
        ConfigError, DataError: a file that cannot be used.
        RankLost: another rank ended.
    """
    plan, job = (
        SweepPlan.load(plan_file, {"sweep.budget": budget} if budget else None),
        JobConfig.load(job_file),
    )
    for one in plan.all():
        try:
            _job_of(one, job)
        except ConfigError as error:
            problem = str(error).removeprefix(f"{job.source}: ")
            raise ConfigError(f"{plan_file}: [configuration] {one.name}: {problem}") from None
    tasks = [
        SweepTask(plan, job, out, configuration, seed, keep_captures, device)
        for configuration in plan.all()
        for seed in plan.sweep.seeds
    ]
    with share_of(rank, fingerprint([task.digest() for task in tasks])) as share:
        if share.leads:
            prepare(plan, out)
        share.begin()
        if not share.leads:
            prepare(plan, out)  # nothing, unless its folder is another one
        mine = tasks[share.number :: share.of]
        _play_all(mine, workers, told)
        found = share.joined([point for task in mine if (point := task.done()) is not None])
    if not share.leads:
        return []
    by_digest = {point["digest"]: point for point in found}
    points = [
        # Who met other attacks than the rest is shown, and not compared.
        point | {"ranked": point.get("complete", True) and not task.configuration.attacks}
        for task in tasks
        if (point := by_digest.get(task.digest())) is not None
    ]
    save([FrontierPoint(**{k: p[k] for k in FrontierPoint.__dataclass_fields__}) for p in points], out)
    return points


def _play_all(tasks: Sequence[SweepTask], workers: int, told: Callable[[str, int, int], None]) -> None:
    """Those that are not done yet, in processes of their own."""
    left = [task for task in tasks if task.done() is None]
    ready = len(tasks) - len(left)
    told("already done", ready, len(tasks))
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_alone) as pool:
        running = {pool.submit(play, task): task for task in left}
        try:
            for future in as_completed(running):
                point = future.result()
                ready += 1
                told(
                    f"{point['name']}: Dice {point['dice']:.3f}, leakage {point['leakage']:.3f}",
                    ready,
                    len(tasks),
                )
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def prepare(plan: SweepPlan, out: Path) -> None:
    """Render the phantom, if no folder of images is named."""
    out.mkdir(parents=True, exist_ok=True)
    if plan.data.folder is None or plan.data.shadow is None:
        from splitpeer.data.phantom.cohort import write_phantom

        if plan.data.folder is None:
            write_phantom(out / "data", plan.data.patients, seed=plan.data.seed)
        if plan.data.shadow is None:
            write_phantom(out / "shadow", plan.data.shadow_patients, seed=plan.data.shadow_seed)


def _alone() -> None:
    torch.set_num_threads(1)


@dataclass(frozen=True)
class _Scene:
    """What all configurations of a plan share within one process."""

    cohort: Cohort
    targets: Samples
    strangers: Strangers
    judge: Judge
    beside: Mapping[int, np.ndarray]
    """The strangers' images around theirs, by distance in slices; empty: not asked for."""


_scenes: dict[str, _Scene] = {}
"""The scene of this process."""


def _scene(task: SweepTask) -> _Scene:
    key = fingerprint(task.plan.model_dump(mode="json"), task.job.model_dump(mode="json"), str(task.out))
    if key not in _scenes:
        _scenes.clear()
        _scenes[key] = _make_scene(task)
    return _scenes[key]


def _make_scene(task: SweepTask) -> _Scene:
    plan, job, out = task.plan, task.job, task.out
    window = window_of(job_on_wire(job))
    seats = {seat.name: seat for seat in seats_of(job).seats}
    if plan.sweep.seat not in seats:
        raise ConfigError(f"{job.source}: no site of this job fills {plan.sweep.seat}")
    modalities = [modality for seat in seats.values() for modality in seat.modalities]
    read = partial(Cohort.read, convention=job.task.task(plan.data.convention),
                   spacing=spacing_of(job.data.spacing), rule=job.task.rule)  # fmt: skip
    cohort = read(plan.data.folder or out / "data", modalities, salt=SALT)
    strangers = read(plan.data.shadow or out / "shadow", modalities, salt=SALT[::-1] + b"s")
    if cohort.labels is None:
        raise ConfigError("a sweep needs masks")
    _, held_out = split_patients(cohort.keys(), job.data.validation, job.job.seed, cohort.labels.subjects())
    targets = cut(cohort, most_tumour(cohort, held_out[: plan.sweep.targets], window), window)
    others = shadow(strangers, window, plan.sweep.shadow)
    seat = seats[plan.sweep.seat]
    known = Strangers.met(seat, others, task.device)
    beside = shadow_beside(strangers, others.samples, window, seat) if plan.sweep.neighbours else {}
    judged = modalities if plan.sweep.every else seat.modalities
    return _Scene(cohort, targets, known, make_judge(judged, targets, others), beside)


def _job_of(one: SweepConfiguration, job: JobConfig) -> JobConfig:
    """With the levels and codings of a configuration. Raises ConfigError: the job cannot have them."""
    table = job.resolved()
    if one.levels is not None:
        table["model"]["levels"] = list(one.levels)
    if one.wire is not None:
        table["wire"] = one.wire.model_dump(mode="json", exclude_none=True)
    return JobConfig.of_table(table, job.source)


def play(task: SweepTask) -> dict[str, Any]:
    """Train, record, attack and judge one configuration; returns its point."""
    scene, head, one = _scene(task), task.plan.sweep, task.configuration
    job = _job_of(one, task.job)
    protection = Protection(one.defences, one.image, one.gradients)
    rehearsal = Rehearsal(job, scene.cohort, protection, task.folder, seed=task.seed, device=task.device)
    defended = bool(protection.defences or protection.image)
    further = slices_around(scene.cohort, scene.targets.samples) if head.neighbours else ()
    learning = reads_traffic((*(one.attacks or (*head.attacks, *head.many)), *head.joint))
    recording = Recording(
        first=_RECORDED_STEPS, last=head.traffic_steps if learning else _RECORDED_STEPS, site_mib=head.site_capture_mib,
        targets=scene.targets.samples, views=max(head.views), seats=(head.seat,), also_after=one.also_after,
        poses=head.poses if defended and not one.attacks else 0,
        further=tuple(dict.fromkeys((*further, *(people(rehearsal, head) if head.members else ())))),
    )  # fmt: skip
    played = rehearsal.play(recording)
    experiment = replace(
        image_experiment(rehearsal, played, head.seat, scene.judge, scene.strangers.samples, task.device),
        budget=Budget.read(head.budget),
    )
    folder = _open_folder(experiment, played, task)
    outcomes = _attack_images(experiment, rehearsal, played, folder, task)
    together, members = list[Outcome](), list[Outcome]()
    if not one.attacks:
        outcomes += attack_every_seat(experiment, rehearsal, played, scene.strangers.samples, head, folder)
        together = attack_together(experiment, head, folder)
        members = tell_members(experiment, rehearsal, played, head, folder)
    masks, complete = _attack_labels(rehearsal, played, folder, task, scene.strangers)
    if not task.keep_captures:
        for capture in task.folder.glob("*.cap"):
            capture.unlink()
    point = _point(one.name, played, outcomes, masks)
    record = asdict(point) | {
        "complete": complete and folder.complete,
        "digest": task.digest(), "seed": task.seed, "defences": protection.label,
        "levels": list(job.model.backbone().levels), "regions": played.dice, "hd95": played.hd95,
        "figures": [_figure(outcome) for outcome in (*outcomes, *masks)],
        "wider": record_wider(outcomes, together, members),
    }  # fmt: skip
    durable.replace(task.folder / DONE, (json.dumps(record, indent=2) + "\n").encode(), sync=False)
    return record


def _open_folder(experiment: Experiment, played: Rehearsed, task: SweepTask) -> RunFolder:
    view = experiment.view
    command = (
        f"splitpeer audit --sweep {task.plan.source.name} --job {task.job.source.name} --out {task.out.name}"
    )
    reached = {configuration(applied(view), view.gradient_defences): played}
    return experiment.open_folder(task.folder, commands=(command,), reached=reached)


def _attack_images(
    experiment: Experiment, rehearsal: Rehearsal, played: Rehearsed, folder: RunFolder, task: SweepTask
) -> list[Outcome]:
    head, one = task.plan.sweep, task.configuration
    outcomes: list[Outcome] = []
    if one.also_after:
        # Who holds weights of several steps compares what was sent under each.
        compared = _every_step(experiment, played, head.seat, (*one.also_after, task.job.training.steps))
        outcomes += compared.run([Order("kept-noise")], folder, naive=False)
    seen = max(len(target.shots) for target in experiment.view.targets)
    for number, views in enumerate(sorted(v for v in head.views if v <= seen) or [seen]):
        orders = [replace(parse_order(a), views=views) for a in one.attacks or _usual(head, many=number > 0)]
        for order in orders:
            # The naive form is shown once, next to the adaptive one.
            naive = number == 0 and order.attack in head.naive
            outcomes += experiment.run([order], folder, naive=naive)
    if posed := posed_experiment(experiment, rehearsal, played, head.seat):
        orders = [Order("kept-noise")] if applies(posed.view) else []
        outcomes += posed.run([*orders, *map(parse_order, _usual(head, many=True))], folder, naive=False)
    if head.joint and not one.attacks:
        together = joint_experiment(experiment, played)
        outcomes += together.run([replace(parse_order(a), views=1) for a in head.joint], folder, naive=False)
    if head.neighbours and not one.attacks:
        around = recorded_around(experiment.view, open_capture(played.capture))
        near = neighbour_experiment(experiment, around, _scene(task).beside)
        outcomes += near.run(once(head.neighbours), folder, naive=False)
    if not outcomes:
        raise ConfigError(f"none of the attacks {', '.join(head.attacks)} could be run on {one.name}")
    return outcomes


def _usual(head: SweepHead, *, many: bool) -> tuple[str, ...]:
    """The attacks for one view, or for many."""
    return head.many if many and head.many else head.attacks


def _every_step(experiment: Experiment, played: Rehearsed, seat: str, steps: Sequence[int]) -> Experiment:
    """`experiment` on all releases of its samples, by an adversary that holds the weights of all `steps`."""
    samples = [target.sample for target in experiment.view.targets]
    view = coordinator_view(
        open_capture(played.capture), seat, mode="evaluate", every_step=True, choose=lambda _: samples
    )
    weights = [played.weights(seat, step) for step in steps]
    return replace(experiment, view=view, knowledge=with_models(experiment.knowledge, view, weights))


def _attack_labels(
    rehearsal: Rehearsal, played: Rehearsed, images: RunFolder, task: SweepTask, strangers: Strangers
) -> tuple[list[Outcome], bool]:
    """What a site reads off its first gradient, its last and all together, and whether every attack ran."""
    head = task.plan.sweep
    first, last = graded_steps(open_capture(played.site_capture(head.seat)), head.seat)
    outcomes, complete = [], True
    for name, step in (("first-step", first), ("last-step", last), (ALL_STEPS, None)):
        experiment = replace(
            label_experiment(rehearsal, played, head.seat, step, strangers, task.device, every=step is None),
            budget=Budget.read(head.budget),
        )
        folder = experiment.open_below(images, f"labels-{name}")
        attacks = (*head.label_attacks, *(head.learned_label_attacks if step is None else ()))
        for outcome in experiment.run([parse_order(written) for written in attacks], folder):
            outcome.result.settings["step"] = step if step is not None else ALL_STEPS
            outcomes.append(outcome)
        complete = complete and folder.complete
    return outcomes, complete


def _point(
    name: str, played: Rehearsed, images: Sequence[Outcome], masks: Sequence[Outcome]
) -> FrontierPoint:
    def ssim(outcome: Outcome) -> float:
        return outcome.scores["ssim"].mean or 0.0

    if (dice := played.dice.get("mean")) is None:
        raise JobFailed(
            "no mask of the patients held out holds any region: there is no Dice to compare; hold out others"
        )
    worst = max(images, key=ssim)
    score = worst.scores["ssim"]
    tumour = [o.scores["tumour_dice"].mean for o in images if "tumour_dice" in o.scores]
    every = of_each_worst([o.scores["ssim"] for o in images if o.scores["ssim"].each])
    return FrontierPoint(
        name=name, dice=dice, leakage=ssim(worst), by=_by(worst), views=worst.result.views,
        floor=highest_floor(score) or 0.0, tumour=max((t for t in tumour if t is not None), default=None),
        mask_auc=_most(masks, "auc"), low=score.low, high=score.high, patients=score.patients,
        each_worst=every.mean, worst_tenth=every.worst, advantage_auc=_most(masks, "advantage_auc"),
        advantage_dice=_most(masks, "advantage_dice"),
    )  # fmt: skip


def _by(outcome: Outcome) -> str:
    """The attack, on which contrast, and what it read beyond that contrast's tensors."""
    reads = f" ({outcome.view.reads})" if outcome.view.reads else ""
    return f"{outcome.result.attack} on {outcome.modality}{reads}"


def _most(outcomes: Sequence[Outcome], figure: str) -> float | None:
    means = [outcome.scores[figure].mean for outcome in outcomes if figure in outcome.scores]
    return max((mean for mean in means if mean is not None), default=None)


def _plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The budget, ours and where it is scaled the published one, as JSON holds it."""
    return {name: value for name, value in settings.items() if isinstance(value, int | float | str)}


def _figure(outcome: Outcome) -> dict[str, Any]:
    result = outcome.result
    return {
        "attack": result.attack, "goal": result.goal, "adaptive": result.adaptive, "views": result.views,
        "modality": outcome.modality, "reads": outcome.view.reads,
        "seconds": result.seconds, "settings": _plain(result.settings), "step": result.settings.get("step"),
        "spent": asdict(result.spent) if result.spent else None,
        "scores": {name: score.to_json() for name, score in outcome.scores.items()},
    }  # fmt: skip
