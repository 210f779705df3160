"""The coordinator together with other hospitals: their images of a patient by themselves, and with what was sent.

A site has its partners' images of nobody. So this is measured on people of whom all contrasts are at hand, and whose
images go through the site's own encoder: its own patients where the stand-ins are the same people, else the stand-ins.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from splitpeer.audit.cohort import Cohort, Samples, cut, shadow
from splitpeer.audit.experiment import Experiment
from splitpeer.audit.judge import make_judge
from splitpeer.audit.released import FrozenSeat, Onlooker, all_collude, one_colludes, read, sent
from splitpeer.audit.stand_in_partners import StandIns
from splitpeer.audit.wider import ALL_OTHERS, best_and_all, colluding_experiment
from splitpeer.data.channels import Channels
from splitpeer.data.geometry import Triple
from splitpeer.defences.image.stack import ImageStack
from splitpeer.errors import AttackImpossible
from splitpeer.report.model import Source
from splitproto.records import Sample, Seat

ONE, ALL = "one-colludes", "others-collude"
"""Folders of the coordinator with one other hospital, and with all of them."""
LEAST = 2
"""People of each kind: under attack, and to learn from."""


@dataclass(frozen=True)
class Complete:
    """People of whom this site's and its partners' contrasts are at hand."""

    cohort: Cohort
    targets: Samples
    others: Samples
    """From whom the adversary learns."""
    source: str
    """Who they are, in words."""

    @classmethod
    def find(
        cls, own: Cohort, partners: StandIns, targets: Sequence[Sample], training: Collection[bytes], window: Triple,
        images: int, seed: int,
    ) -> Complete:  # fmt: skip
        """The site's own patients if the partners' images are of them, else the stand-ins.

        Args:
            targets: windows of the site's own patients that are attacked anyway.
            training: its patients from whom the adversary may learn.
            images: that it learns from.

        Raises:
            AttackImpossible: of nobody all contrasts are at hand.
        """
        both = Cohort({**partners.cohort.images, **own.images})
        held = set(both.keys())
        known = [sample for sample in targets if sample.key in held]
        learned = [key for key in training if key in held]
        if len(known) >= LEAST and len(learned) >= LEAST:
            others = shadow(both, window, images, seed, learned)
            return cls(both, cut(both, known, window), others, "the same patients at all hospitals")
        if partners.own is None:
            raise AttackImpossible(
                f"{partners.source} shows no patient in this hospital's contrasts too: add folders of them"
            )
        both = Cohort({**partners.cohort.images, **partners.own.images})
        keys = both.keys()
        count = min(max(len(targets), LEAST), len(keys) // 3)
        if count < LEAST:
            raise AttackImpossible(f"{partners.source} shows {len(keys)} people in all contrasts: give more")
        attacked = shadow(both, window, count, seed, keys[:count])
        others = shadow(both, window, images, seed, keys[count:])
        return cls(both, attacked, others, partners.source)

    def shown(
        self, parts: Sequence[FrozenSeat], site: str, stacks: Mapping[str, ImageStack]
    ) -> dict[str, np.ndarray]:
        """By seat, the people under attack as each encoder sees them: float32 [N, channels, *spatial].

        Args:
            stacks: defences of this site's images, by modality.
        """
        found = {}
        for part in parts:
            own = stacks if part.site == site else {}
            channels = Channels(self.cohort.images, {part.seat.name: part.seat.modalities}, own)
            window = self._window
            found[part.seat.name] = channels.batch(part.seat.name, self.targets.samples, window, None)
        return found

    @property
    def _window(self) -> Triple:
        x, y, z = (*next(iter(self.targets.images.values())).shape[2:], 1)[:3]
        return x, y, z


@dataclass(frozen=True)
class Allies:
    """A site that is audited, and hospitals that may work with the coordinator.

    Args:
        alone: reads this site's values only.
        partners: who stands in for the others.
        parts: theirs, in a secure sum.
        stacks: defences of this site's images, by modality.
    """

    alone: Onlooker
    partners: StandIns
    parts: Sequence[FrozenSeat] = ()
    stacks: Mapping[str, ImageStack] = field(default_factory=dict)

    def experiments(self, people: Complete, source: Source) -> Iterator[tuple[str, Experiment]]:
        """Folder and adversary: the coordinator with the hospital whose images say most of this site's, and with all
        of them."""
        wanted = self.alone.seat.modalities
        judge = make_judge(wanted, people.targets, people.others, tumour=False)
        seats = [
            Seat(site, tuple(m for seat in of for m in seat.modalities))
            for site, of in self.partners.seats.items()
        ]
        others = [seat for seat in seats if set(wanted).isdisjoint(seat.modalities)]
        for known in best_and_all(judge, wanted[0], others):
            every = known.name == ALL_OTHERS or len(seats) == 1
            adversary, samples = self._helped(known.name, every=every), people.targets.samples
            images = people.shown(adversary.parts, self.alone.site, self.stacks)
            levels = read(sent(adversary.parts, samples, images), adversary.job)
            one = adversary.experiment(samples, levels, judge, people.others, source)
            yield ALL if every else ONE, colluding_experiment(one, known)

    def _helped(self, by: str, *, every: bool) -> Onlooker:
        """Whose values are left to the coordinator; without a sum, it reads this site's by themselves in any case."""
        if self.alone.job.fusion is None:
            return self.alone
        sites = self.alone.job.fusion.parties
        if every:
            return replace(self.alone, summed=all_collude(sites))
        left = tuple(part for part in self.parts if part.site != by)
        return replace(self.alone, parts=(*self.alone.parts, *left), summed=one_colludes(sites))
