"""The run folder of an experiment: outcomes are entered one by one, each on disk before the next."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

import splitproto
from splitpeer.attacks.base import Spending, View
from splitpeer.attacks.catalogue import described
from splitpeer.attacks.collusion import IN_CLEAR
from splitpeer.audit.judge import Judge, Outcome
from splitpeer.audit.rehearsal import Rehearsed
from splitpeer.report.model import AuditRun, Effort, Entry, Privacy, Promise, RunLevel, RunNetwork, Source
from splitpeer.report.store import ARRAYS, ATTACK, save_run
from splitpeer.report.words import COLLUSION, MEMBERSHIP
from splitpeer.training.forms import octets
from splitproto.codings import Form, form_at

FLOOR = "mean image of other patients"

MALICIOUS = (
    "A coordinator that breaks the protocol and sends crafted gradients (FSHA): recorded honest traffic cannot "
    "contain it; it is simulated separately, in 150 steps where the paper takes 10,000 to 100,000, and so is what a "
    "site could notice of it.",
)
OTHERS = (
    "Attribute inference, such as sex, age or scanner.",
    "Attacks with more computation, more similar images or more releases than stated with each figure.",
)


@dataclass
class RunFolder:
    """What `save` writes.

    Args:
        folder: of the run; it holds `attack.json` and `reconstructions.npz`.
        source: the capture that was attacked.
        sites: site to modality.
        commands: what to type to repeat the run.
    """

    folder: Path
    source: Source
    network: RunNetwork
    commands: tuple[str, ...] = ()
    digests: dict[str, str] = field(default_factory=dict)
    trained: bool = True
    """Whether the traffic was recorded under the defences, not re-defended offline."""
    reached: Mapping[str, Rehearsed] = field(default_factory=dict)
    """By configuration, the Dice of the network trained under it."""
    privacy: Privacy | None = None
    promises: Mapping[str, Promise] = field(default_factory=dict)
    """Of what is named like a defence, and is none of the catalogue."""
    notes: tuple[str, ...] = ()
    not_tested: tuple[str, ...] = (*MALICIOUS, *OTHERS)
    entries: list[Entry] = field(default_factory=list)
    arrays: dict[str, np.ndarray] = field(default_factory=dict)
    patients: tuple[str, ...] = ()
    """Under attack, in the order of the truth."""

    def keep_truth(self, judge: Judge) -> None:
        """Add the truth, for the pictures, and whose it is."""
        truth = judge.truth
        if truth is None:
            return
        self.patients = tuple(dict.fromkeys(truth.patients))
        for modality, images in truth.images.items():
            self.arrays[f"truth_{modality}"] = _small(images)
        if truth.outlines is not None:
            self.arrays["masks"] = truth.outlines.astype(np.uint8)
        for modality, channel in judge.channels.items():
            if FLOOR in channel.floors.images:
                self.arrays[f"floor_{modality}"] = _small(channel.floors.images[FLOOR])

    def enter(self, outcome: Outcome) -> Entry:
        """Add one outcome and write the folder."""
        result, view = outcome.result, outcome.view
        kind = described(result.attack)
        number = f"{len(self.entries) + 1:02d}"
        form = "adaptive" if result.adaptive else "naive"
        entry = Entry(
            id=f"{number}-{result.attack}-{form}",
            attack=result.attack,
            title=", ".join(filter(None, (kind.title, view.reads))),
            plain=kind.plain,
            goal=result.goal,
            modality=outcome.modality,
            site=view.site,
            reads=view.reads,
            clear=view.clear,
            adaptive=result.adaptive or not view.defended,
            defences=applied(view),
            gradient_defences=view.gradient_defences,
            trained=self.trained,
            levels=view.backbone.cut.names,
            views=result.views,
            assumptions=result.assumptions,
            settings=_plain(result.settings),
            effort=_effort(result.spent),
            seconds=round(result.seconds, 2),
            notes=result.notes,
            scores=outcome.scores,
        )
        self.entries.append(entry)
        if result.goal != "member":
            self.arrays[entry.id] = _small(result.images)
        if outcome.tumour is not None:
            self.arrays[f"tumour_{entry.id}"] = outcome.tumour.astype(np.uint8)
        self.save()
        return entry

    def could_not(
        self,
        attack: str,
        view: View,
        reason: str,
        *,
        status: Literal["interrupted", "impossible"] = "impossible",
    ) -> None:
        """Add an attack that did not run: the report says so."""
        kind = described(attack)
        self.entries.append(
            Entry(
                id=f"{len(self.entries) + 1:02d}-{attack}-{status}", attack=attack, title=kind.title, plain=kind.plain,
                goal=kind.goal, modality=" + ".join(view.seat.modalities), site=view.site, defences=applied(view),
                gradient_defences=view.gradient_defences, status=status, reason=reason,
            )
        )  # fmt: skip
        self.save()

    def _left_open(self) -> list[str]:
        """What only some runs test."""
        done = [entry for entry in self.entries if entry.status == "done"]
        told = {MEMBERSHIP: any(entry.goal == "member" for entry in done),
                COLLUSION: any(IN_CLEAR in entry.title for entry in done)}  # fmt: skip
        return [sentence for sentence, tested in told.items() if not tested]

    @property
    def refused(self) -> list[str]:
        """Attacks that did not run, each with the reason."""
        return [f"{entry.attack}: {entry.reason}" for entry in self.entries if entry.status != "done"]

    @property
    def complete(self) -> bool:
        """Whether every attack ran: one that could not must not be mistaken for one that found nothing."""
        return not self.refused

    def discard(self) -> None:
        """Remove what was written: nothing came of it."""
        for path in (self.folder / ATTACK, self.folder / ARRAYS):
            path.unlink(missing_ok=True)

    def save(self) -> None:
        """Write both files, whole."""
        save_run(
            self.folder,
            AuditRun(
                made_by=f"splitpeer {splitproto.__version__}",
                capture=self.source,
                network=self.network,
                entries=tuple(self.entries),
                patients=self.patients,
                dice={name: played.dice for name, played in self.reached.items()},
                hd95={name: played.hd95 for name, played in self.reached.items()},
                volume_ml={name: played.volume_ml for name, played in self.reached.items()},
                privacy=self.privacy,
                promises=dict(self.promises),
                not_tested=(*self.not_tested, *self._left_open()),
                commands=self.commands,
                digests=self.digests,
                notes=self.notes,
            ),
            self.arrays,
        )


def applied(view: View) -> tuple[str, ...]:
    """The defences of a view by name; a level that the job does not ask for counts as withheld, a sum as a defence."""
    missing = [str(level) for level in view.backbone.cut.withheld]
    named = (*([view.summed] if view.summed else []), *view.defences)
    return (*named, f"withhold@{','.join(missing)}") if missing else named


def network_of(view: View, sites: Mapping[str, str], form: Form, *, back: Form | None = None) -> RunNetwork:
    """What the job exchanges, per level of one sample.

    Args:
        form: of activations; a dtype where they are summed.
        back: of gradients, where it is another; empty: none come back.
    """
    cut, back = view.backbone.cut, form if back is None else back
    levels = []
    for level, one in enumerate(cut.levels):
        shape, sent = cut.shape(level, view.window), level in cut.sent
        count = int(np.prod(shape))
        # By level, there is nothing about one that is not sent; and no gradients of it come back.
        there = form_at(form, one.name) if sent or isinstance(form, str) else "f32"
        here = form_at(back, one.name) if sent else ""
        levels.append(
            RunLevel(
                name=one.name,
                shape=shape,
                octets=octets(there, count),
                precision=there,
                sent=sent,
                defences=view.defences,
                gradient_precision=here,
                gradient_octets=octets(here, count) if here else None,
                gradient_defences=view.gradient_defences if sent else (),
            )
        )
    return RunNetwork(
        dimensions=view.dimensions, window=view.window,
        network=view.backbone.network, settings=dict(view.backbone.settings), fusion=view.fusion,
        sites=dict(sites), levels=tuple(levels), image_octets=4 * int(np.prod(view.window)),
    )  # fmt: skip


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _effort(spent: Spending | None) -> Effort | None:
    if spent is None:
        return None
    return Effort(told=spent.told(), times=spent.times, curve=spent.curve, stopped=spent.stopped,
                  published=spent.published)  # fmt: skip


def _small(array: np.ndarray) -> np.ndarray:
    """Half precision is more than a picture needs."""
    return np.asarray(array, dtype=np.float16)


def _plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What JSON can hold."""

    def value(one: Any) -> Any:
        if isinstance(one, Mapping):
            return {str(k): value(v) for k, v in one.items()}
        if isinstance(one, str | int | float | bool | type(None)):
            return one
        if isinstance(one, Iterable):
            return [value(v) for v in one]
        return str(one)

    return {str(k): value(v) for k, v in settings.items()}
