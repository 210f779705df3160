"""What a run with absences should have come to: its own history, computed again in one process.

The laboratory notes what happened to each half, in order: newly made, a step of the decoder with these seats,
gradients applied at a site, a step skipped by a site, a half saved, a half rolled back. From that alone, and without
wire, links or checkpoints on disk, the halves, losses, scores and masks are computed again. They must be those on
disk, bit for bit: then each site has applied the gradients of each step that it took part in once, to the weights that
it should have had.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import nibabel as nib
import numpy as np
import torch

from splitpeer.coordinator import savepoints, trainer
from splitpeer.data.layouts import find_images, find_labels
from splitpeer.data.loader import SiteData
from splitpeer.data.pseudonym import load_salt
from splitpeer.data.sampling import TrainingSchedule, split_patients
from splitpeer.data.volumes import Volumes
from splitpeer.federation import batches
from splitpeer.federation.evaluation import Plan, Scoring
from splitpeer.federation.terms import job_on_wire
from splitpeer.models import build_split_network
from splitpeer.settings.job import JobConfig
from splitpeer.settings.peer import PeerConfig
from splitpeer.site import job as site_job
from splitpeer.storage import checkpoint
from splitpeer.training.forms import WireForm, activations_form, gradients_form
from splitpeer.training.optimiser import make_optimiser, make_schedule
from splitpeer.training.split_step import ClientHalf, CoordinatorHalf

from .federation import HUB, SEED, site_of
from .laboratory import Laboratory
from .virtual import LIFE


@dataclass(frozen=True)
class Deed:
    """What was done to a half."""

    who: str
    deed: str
    """"new", "train", "apply", "advance", "save", "back" or "without"."""
    step: int
    modalities: tuple[str, ...] = ()
    """Of "train": who took part."""
    keys: tuple[bytes, ...] = ()
    """Of "without": all patients that are withdrawn."""


@contextmanager
def noted(history: list[Deed]) -> Iterator[None]:
    """While this is open, `history` grows."""

    def wrap(owner: Any, name: str, deed: Callable[..., Deed], *, first: bool = False) -> Any:
        real = getattr(owner, name)

        def wrapped(self: Any, *args: Any, **options: Any) -> Any:
            if first:
                history.append(deed(self, *args))
            result = real(self, *args, **options)
            if not first:
                history.append(deed(self, *args))
            return result

        return mock.patch.object(owner, name, wrapped)

    def who() -> str:
        life = LIFE.get()
        assert life is not None
        return life.name

    job, hub = site_job.SiteJob, trainer.Trainer
    with ExitStack() as stack:
        for patch in (
            wrap(job, "__init__", lambda *_: Deed(who(), "new", 0), first=True),
            wrap(job, "apply", lambda self, gradients: Deed(who(), "apply", gradients.step)),
            wrap(job, "advance", lambda self, step: Deed(who(), "advance", step)),
            wrap(job, "rollback", lambda self, step: Deed(who(), "back", step)),
            # Who dies in the middle of it may have written it.
            wrap(job, "save", lambda self, step, *_: Deed(who(), "save", step), first=True),
            wrap(hub, "__init__", lambda *_: Deed(HUB, "new", 0), first=True),
            wrap(
                hub,
                "_train",
                lambda self, arrived, target, forward, out: Deed(
                    HUB, "train", forward.step, tuple(sorted(site.seat_names for site in arrived))
                ),
            ),
            wrap(
                batches.TrainingStream,
                "withdraw",
                lambda self, keys: Deed(HUB, "without", 0, keys=tuple(sorted(keys))),
                first=True,
            ),
            wrap(savepoints.Savepoints, "_load", lambda self, step: Deed(HUB, "back", step)),
        ):
            stack.enter_context(patch)
        yield


class Retrace:
    """All halves, in one process."""

    def __init__(self, lab: Laboratory) -> None:
        setting = lab.setting
        self._setting = setting
        job = self._job = JobConfig.load(lab.folder / HUB / "job.toml")
        network = build_split_network(
            job.model.backbone(),
            sorted(setting.modalities),
            job.model.fusion,
            job_seed=SEED,
        )
        self.hub = CoordinatorHalf(network.decoder, *self._trained_by(network.decoder))
        self.sites = {
            m: ClientHalf(network.encoders[m], *self._trained_by(network.encoders[m]))
            for m in setting.modalities
        }
        hub = PeerConfig.load(lab.folder / HUB / "peer.toml", environ={})
        assert hub.data.labels is not None and hub.data.salt is not None
        salt = load_salt(hub.data.salt)
        self._masks = Volumes(find_labels(hub.data.labels, "folder"), salt=salt, labels="msd")
        self._images = {
            m: SiteData(Volumes(find_images(lab.federation / "data" / m, "folder", m), salt=salt))
            for m in setting.modalities
        }
        # Those that all could use when the run began.
        keys = sorted(bytes.fromhex(key) for key in _record(lab)["patients"])
        self._training, self._held_out = split_patients(keys, job.data.validation, job.job.seed)
        self._out: frozenset[bytes] = frozenset()  # patients that are withdrawn
        self._window = (*job.data.window, 1)[:3]
        self._batches: dict[frozenset[bytes], TrainingSchedule] = {}
        self._saved: dict[tuple[str, int], Any] = {}
        self._gradients: dict[tuple[str, int], Any] = {}
        self._last: dict[str, Any] = {}  # as it was when last at the last step
        self._left: dict[tuple[str, int], Any] = {}  # what was lost with a process, or undone
        self.losses: dict[int, float | None] = {}
        self._saved[HUB, 0] = self.hub.state()

    def _batch(self, step: int) -> Any:
        """Drawn as if those who are withdrawn had never been there."""
        job = self._job
        if self._out not in self._batches:
            self._batches[self._out] = TrainingSchedule(
                [key for key in self._training if key not in self._out],
                self._masks,
                window=self._window,
                batch=job.training.batch,
                steps=job.training.steps,
                seed=job.job.seed,
                positive_fraction=job.data.positive_fraction,
            )
        return self._batches[self._out].batch(step - 1)

    def _trained_by(self, part: torch.nn.Module) -> tuple[Any, Any]:
        training = self._job.training
        optimiser = make_optimiser(
            part.parameters(), training.optimiser, training.learning_rate, training.weight_decay
        )
        return optimiser, make_schedule(optimiser, training.schedule, training.steps)

    def _halves(self) -> Iterator[tuple[str, Any]]:
        yield HUB, self.hub
        for modality, half in self.sites.items():
            yield site_of(modality), half

    def follow(self, history: list[Deed]) -> None:
        """Do all that was done."""
        halves = dict(self._halves())
        first = {who: half.state() for who, half in halves.items()}
        for deed in history:
            half = halves[deed.who]
            if deed.deed in ("new", "back"):
                self._left[deed.who, half.steps_done] = half.state()
            if deed.deed == "without":
                # SP-11.13-6: no patient comes back, whatever is started again.
                assert self._out <= set(deed.keys), "a patient was taken back"
                self._out = frozenset(deed.keys)
            elif deed.deed == "new":
                half.load(*first[deed.who])
            elif deed.deed == "train":
                self._train(deed)
            elif deed.deed == "back":
                half.load(*self._saved[deed.who, deed.step])
            elif deed.deed == "advance":
                half.advance(deed.step)
            elif deed.deed == "save":
                assert half.steps_done == deed.step, f"{deed.who} saved {deed.step} at {half.steps_done}"
                self._saved[deed.who, deed.step] = half.state()
            else:
                # Once: taken out. It may be late, where the others have gone on without this site.
                half.backward(self._gradients.pop((deed.who, deed.step)))
            if half.steps_done == self._job.training.steps:
                self._last[deed.who] = half.state()

    @property
    def withdrawn(self) -> frozenset[bytes]:
        """Whom the run was made without in the end."""
        return self._out

    def saved(self, who: str, step: int) -> dict[str, torch.Tensor] | None:
        """What the checkpoint of `step` must hold."""
        known = self._saved.get((who, step))
        return None if known is None else known[0]

    def score(self, modalities: Sequence[str], masks: Path) -> dict[str, float]:
        """Evaluate the halves of the last step, as far as these modalities go; writes the masks."""
        steps, job = self._job.training.steps, self._job
        for who, half in self._halves():
            if who in self._last:
                half.load(*self._last[who])
        plan = Plan.of(
            [key for key in self._held_out if key not in self._out],
            self._masks,
            self._window,
            job.evaluation.overlap,
            job.evaluation.batch,
            steps,
        )
        scoring = Scoring(
            plan, self._masks, self._window, masks, made_from=dict.fromkeys(plan.keys, modalities)
        )
        absent = [m for m in self._setting.modalities if m not in modalities]
        for index, forward in enumerate(plan.forwards):
            activations = {}
            for m in modalities:
                image = self._images[m].batch(forward.samples, self._window, None, m)
                activations[m] = self._over_the_wire(self.sites[m].evaluate(image), activations_form)
            scoring.add(index, self.hub.predict(activations, absent))
        return scoring.dice.result() if len(scoring.dice) else {}

    def _train(self, deed: Deed) -> None:
        samples, drawn = self._batch(deed.step)
        seed = drawn if self._job.data.augment else None
        assert self.hub.steps_done == deed.step - 1, f"{deed} after {self.hub.steps_done}"
        activations = {}
        for m in deed.modalities:
            site, now = self.sites[m], None
            if site.steps_done != deed.step - 1:
                # Sent before its process died, used before it was known: all go back afterwards.
                assert (site_of(m), deed.step - 1) in self._left, f"{deed}: {m} is at {site.steps_done}"
                now = site.state()
                site.load(*self._left[site_of(m), deed.step - 1])
            image = self._images[m].batch(samples, self._window, seed, m)
            activations[m] = self._over_the_wire(site.forward(image), activations_form)
            if now is not None:
                site.load(*now)
        if activations:
            target = SiteData(self._masks).batch(samples, self._window, seed, None)
            absent = [m for m in self._setting.modalities if m not in deed.modalities]
            self.losses[deed.step], gradients = self.hub.step(activations, target, absent)
            for m, sent in gradients.items():
                self._gradients[site_of(m), deed.step] = self._over_the_wire(sent, gradients_form)
        else:
            self.hub.advance(deed.step)
            self.losses[deed.step] = None
        # The coordinator may write its half of any step, and says so too late for one who dies meanwhile.
        self._saved[HUB, deed.step] = self.hub.state()

    def _over_the_wire(self, arrays: Any, form: Callable[[Any], WireForm]) -> Any:
        of = form(job_on_wire(self._job))
        return of.from_wire(of.to_wire(arrays))


def differences(lab: Laboratory, history: list[Deed]) -> str:
    """What on the parties' disks is not what the history gives; empty: nothing."""
    again = Retrace(lab)
    try:
        again.follow(history)
    except (AssertionError, KeyError, ValueError, RuntimeError) as error:
        return f"the history cannot be followed: {type(error).__name__}: {error}"
    steps, run = lab.setting.steps, lab.result["run"]
    scored, holders = lab.result["made_from"], {HUB, *_holders(lab, steps)}
    if problem := _unlike_metrics(lab, again, steps):
        return problem
    for who in lab.nodes:
        folder = lab.folder / who / "state" / f"try-{run}"
        held = checkpoint.available(folder)
        if steps not in held and who in holders:
            return f"{who} has no checkpoint of step {steps}"
        for step in held:
            found, wanted = checkpoint.load(folder, step)[0], again.saved(who, step)
            if wanted is None:
                return f"{who} has a checkpoint of step {step}, which it never made"
            if found.keys() != wanted.keys():
                return f"{who} has other tensors"
            for name, tensor in wanted.items():
                if not torch.equal(tensor, found[name]):
                    return f"the weights of {who} at step {step} are not those of its history ({name})"
    masks = lab.folder / "again"
    if problem := _unlike_record(lab, again):
        return problem
    dice = again.score(scored, masks)
    if str(dice) != str(lab.result["dice"]):
        return f"Dice differs: {lab.result['dice']} for {dice}"
    return "" if _volumes(masks) == _volumes(lab.output / "predictions") else "the masks differ"


def _record(lab: Laboratory) -> Any:
    return json.loads((lab.folder / HUB / "state" / "try.run.json").read_text())


def _unlike_record(lab: Laboratory, again: Retrace) -> str:
    """SP-11.13-4: who is withdrawn is durable."""
    listed = {bytes.fromhex(item["key"]) for item in _record(lab)["withdrawn"]}
    return "" if listed == again.withdrawn else f"{len(listed)} patients are in the record"


def _volumes(folder: Path) -> dict[str, bytes]:
    return {path.name: np.asarray(nib.load(path).dataobj).tobytes() for path in sorted(folder.glob("*"))}


def _unlike_metrics(lab: Laboratory, again: Retrace, steps: int) -> str:
    kept: list[dict[str, Any]] = []
    for line in lab.metrics():
        if line.get("rollback"):
            del kept[line["step"] :]
        elif "loss" in line:
            if line["step"] != len(kept) + 1:
                return f"metrics.jsonl: step {line['step']} after step {len(kept)}"
            kept.append(line)
    told = [line["loss"] for line in kept]
    wanted = [again.losses[step] for step in range(1, steps + 1)]
    return "" if told == wanted else f"the losses differ: {told} for {wanted}"


def _holders(lab: Laboratory, step: int) -> list[str]:
    """Sites that the coordinator has heard to hold their half of `step`, when it last wrote its own."""
    lines = [line for _, line in lab.story if f"{HUB} logs job.checkpoint step={step} " in line + " "]
    return [site for site in lab.setting.sites if lines and re.search(rf'[=" ]{site} [0-9a-f]', lines[-1])]
