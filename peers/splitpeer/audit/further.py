"""What an audit attacks besides the samples alone: slices around them, sites that help, and who was trained on."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from splitpeer.attacks.base import Progress, Target
from splitpeer.attacks.budget import FIXED
from splitpeer.audit.cohort import Cohort
from splitpeer.audit.experiment import Experiment, Order
from splitpeer.audit.run_folder import RunFolder
from splitpeer.audit.together import Allies, Complete
from splitpeer.audit.wider import (
    members_and_others,
    membership_experiment,
    neighbour_experiment,
    slices_around,
)
from splitpeer.data.geometry import Triple
from splitpeer.errors import AttackImpossible
from splitpeer.models import Decoder
from splitproto.records import Sample

MEMBERS = 100
"""Training patients, and as many others, of whom it is asked who was trained on, at most."""
MEMBER_SLICES = 4
"""Of each of them."""
NO_STRANGERS = (
    "Membership of the patients who are trained on: it is told against people who are not, of whom the adversary has "
    "images and masks: give --shadow DIR with labels/, --labels and --convention."
)
ONE_RELEASE = (
    "Slices around a sample, and values read with the help of other hospitals, are of one release each."
)
Released = Callable[[Sequence[Sample]], tuple[Target, ...]]
"""What the coordinator would read of these windows, once."""


@dataclass(frozen=True)
class Further:
    """Further experiments of one adversary, into the run folder of its first.

    Args:
        one: its experiment on one release of each sample.
        released: see `Released`.
        cohort: of the site, with masks or what stands in for them.
        orders: attacks on wider views, with the effort they were found to be worth.
    """

    one: Experiment
    released: Released
    cohort: Cohort
    orders: Sequence[Order]
    folder: RunFolder
    progress: Progress

    def neighbours(self, beside: Callable[[], Mapping[int, np.ndarray]]) -> None:
        """Read the slices above and below each sample with it; a job of volumes has none.

        Args:
            beside: the adversary's own images around its own (see `shadow_beside`).
        """
        if self.one.view.dimensions != 2:
            return
        samples = [target.sample for target in self.one.view.targets]
        try:
            released = self.released(slices_around(self.cohort, samples))
            wider = neighbour_experiment(self.one, released, beside())
        except AttackImpossible as error:
            self.leave_out(f"Neighbouring slices: {error}.")
            return
        attack(wider, self.orders, self.folder, self.progress)

    def members(
        self, training: Sequence[bytes], held_out: Sequence[bytes], window: Triple, order: Order,
        decoder: Decoder | None = None,
    ) -> None:  # fmt: skip
        """Ask who of the patients was trained on.

        Args:
            order: see `membership_order`.
            decoder: the coordinator's half, where this site's levels are all that it takes.
        """
        asked = members_and_others(self.cohort, training, held_out, window, MEMBERS, MEMBER_SLICES)
        told = membership_experiment(self.one, self.released(asked), self.cohort, training, window, decoder)
        attack(told, [order], self.folder, self.progress)

    def together(self, allies: Allies, training: Sequence[bytes], images: int) -> list[Path]:
        """Read the site's values with the help of other hospitals; returns the run folders, below this one's.

        Args:
            training: patients of the site from whom the adversary may learn.
            images: that it learns from.
        """
        view, samples = self.one.view, [target.sample for target in self.one.view.targets]
        x, y, z = (*view.window, 1)[:3]
        own = self.cohort.at(view.seat.modalities)
        try:
            people = Complete.find(Cohort(own.images), allies.partners, samples, training, (x, y, z), images,
                                   self.one.seed)  # fmt: skip
        except AttackImpossible as error:
            self.leave_out(f"Hospitals that work together: {error}.")
            return []
        folders = []
        for name, experiment in allies.experiments(people, self.one.source):
            opened = experiment.open_folder(
                self.folder.folder / name, commands=self.folder.commands, notes=[whose(people), ONE_RELEASE]
            )
            opened.not_tested, opened.promises = self.folder.not_tested, self.folder.promises
            attack(experiment, self.orders, opened, self.progress)
            folders.append(opened.folder)
        return folders

    def leave_out(self, sentence: str) -> None:
        """Say why something was not tested."""
        self.folder.not_tested = (*self.folder.not_tested, sentence)
        self.folder.save()


def whose(people: Complete) -> str:
    """On whom the help of other hospitals was tried."""
    return (
        f"What hospitals show that work with the coordinator was measured on people of whom all contrasts are at hand "
        f"({people.source}), through this hospital's encoder. What their images show by themselves is the floor: a "
        "network that learned from other people draws one contrast from the others."
    )


def attack(experiment: Experiment, orders: Collection[Order], folder: RunFolder, progress: Progress) -> None:
    """With the effort that the orders say, and no more."""
    for _ in replace(experiment, budget=FIXED).run([*orders], folder, naive=False, progress=progress):
        pass
