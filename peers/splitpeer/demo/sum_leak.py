"""The private demo's last part: an adversary with all encoders attacks the sums that the coordinator kept."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import numpy as np

from splitpeer.attacks.base import silent
from splitpeer.attacks.collusion import remaining
from splitpeer.audit.cohort import Cohort, cut, shadow
from splitpeer.audit.experiment import Experiment
from splitpeer.audit.judge import make_judge, train_finders
from splitpeer.audit.released import (
    FrozenSeat,
    Onlooker,
    all_collude,
    known_partners,
    most_in_bank,
    others_of,
    promises,
    quiet,
    sent,
    sum_of,
    sums_of,
)
from splitpeer.audit.run_folder import OTHERS
from splitpeer.audit.wider import colluding_experiment
from splitpeer.data.pseudonym import load_salt
from splitpeer.demo.federation import HUB, SEAT, SITES, Federation
from splitpeer.demo.leak import SHADOW, run_attacks
from splitpeer.demo.private import COLLUDE, KNOWN, SUM, PrivateJob, coordinator_bank
from splitpeer.errors import JobFailed
from splitpeer.federation.halves import client_half
from splitpeer.federation.terms import job_on_wire, window_of
from splitpeer.report.model import Source
from splitpeer.settings.job import JobConfig
from splitpeer.site import first_weights
from splitpeer.storage.bank import Bank
from splitpeer.training.sums import over_seats
from splitproto.records import Seat

READ = {
    SUM: "the sum",
    KNOWN: "one hospital's values",
    COLLUDE: "one hospital's values and all others' images",
}
"""What each experiment's attacks read."""
LEFT_OUT = (
    "Neighbouring slices of a sum, white-box searches of it, and the coordinator with one hospital are left out for "
    "time: splitpeer audit measures them on a hospital's own images.",
    "Membership of the patients from whom the encoders learned before the run.",
)
SYNTHETIC = (
    "These are synthetic patients and short attacks: the figures show the mechanism, and are no bound on what better "
    "ones find in the sum; docs/private.md has the result of longer ones. The adversary holds the encoders of all "
    "hospitals, which a real coordinator does not, unless the hospital that made them tells. These encoders learned "
    "without noise, which the preset for hospitals refuses unless they allow it (min_encoder_noise): the demo does."
)


class SumLeak:
    """An adversary that learns from its own images, before there are any sums.

    Args:
        federation: the demo's, already set up; the strangers' images are written.
        job: the demo's settings.
        attacks: by experiment (`SUM`, `KNOWN`, `COLLUDE`).
        finder_steps: training steps of the networks that look for tumours; 0: there are none.

    Raises:
        JobFailed: the job has no secure fusion.
    """

    def __init__(
        self,
        federation: Federation,
        job: PrivateJob,
        attacks: Mapping[str, tuple[str, ...]],
        finder_steps: int,
    ) -> None:
        self._federation, self._job, self._attacks = federation, job, attacks
        self._config = JobConfig.load(federation.hub / "job.toml")
        on_wire = job_on_wire(self._config)
        if on_wire.fusion is None:
            raise JobFailed("the job has no secure fusion")
        self._on_wire, self._fusion, self._window = on_wire, on_wire.fusion, window_of(on_wire)
        self._salt = load_salt(federation.salt)
        strangers = Cohort.read(
            federation.strangers, tuple(SITES.values()), salt=self._salt[::-1], convention="msd"
        )
        self._others = shadow(strangers, self._window, SHADOW)
        # Only for contrasts that are attacked: training a finder takes as long as an attack.
        self._attacked = tuple(SITES.values()) if SUM in attacks else (SEAT,)
        self._finders = train_finders(self._attacked, self._others, finder_steps) if finder_steps else {}

    def attack(self) -> tuple[list[Path], dict[str, float]]:
        """Run the attacks. Returns the experiments' folders and their figures.

        Raises:
            JobFailed: there is no feature bank.
        """
        folders, figures = [], dict[str, float]()
        for name, experiment in self._experiments():
            opened = experiment.open_folder(
                self._federation.folder / "attack" / name,
                commands=("splitpeer demo --private",),
                notes=(SYNTHETIC,),
            )
            opened.not_tested, opened.promises = (*LEFT_OUT, *OTHERS), promises(self._fusion.parties)
            for attack in self._attacks[name]:
                found = run_attacks(silent, experiment, opened, (attack,)).values()
                title = f"{attack.partition(':')[0]} on {READ[name]}"
                figures[f"{title}, ssim"] = max(found, default=0.0)
                if len(found) > 1:
                    figures[f"{title}, mean over contrasts, ssim"] = fmean(found)
            folders.append(opened.folder)
        return folders, figures

    def _experiments(self) -> Iterator[tuple[str, Experiment]]:
        """The experiments that were asked for, with their names."""
        federation, config, on_wire = self._federation, self._config, self._on_wire
        cohort = Cohort.read(federation.data, tuple(SITES.values()), salt=self._salt, convention="msd")
        if cohort.labels is None or (bank := Bank.open(coordinator_bank(federation))) is None:
            raise JobFailed(f"{federation.hub}: no feature bank; the log of the coordinator says why")
        keys = [bytes.fromhex(key) for key in federation.recorded_keys()]
        samples = most_in_bank(bank, on_wire, keys, cohort.labels)
        truth, parts = cut(cohort, samples, self._window), self._parts()
        own, sums = [part for part in parts if part.seat.name == SEAT], sums_of(bank, samples)
        judge = make_judge(self._attacked, truth, self._others, finders=self._finders)
        source = Source(role="coordinator", site=HUB, federation=config.job.name, run=bank.contents.run.hex())
        sites = self._fusion.parties

        def seen(of: list[FrozenSeat], reads: str, levels: dict[str, np.ndarray]) -> Experiment:
            onlooker = Onlooker(on_wire, tuple(of), own[0].site, (), reads, SITES, seed=self._job.seed)
            return onlooker.experiment(samples, levels, judge, self._others, source)

        if SUM in self._attacks:
            yield SUM, seen(parts, sum_of(sites), sums)
        if self._attacks.keys() & {KNOWN, COLLUDE}:
            theirs = sent([part for part in parts if part.seat.name != SEAT], samples, truth.images)
            # What the coordinator and all others know together: the sum minus their own parts.
            left = remaining(sums, [over_seats(by_seat) for by_seat in theirs.values()], self._fusion)
            known = seen(own, known_partners(sites), left)
            if KNOWN in self._attacks:
                yield KNOWN, known
            if COLLUDE in self._attacks:
                together = colluding_experiment(known, others_of(parts, own[0].site))
                yield COLLUDE, replace(together, view=replace(together.view, summed=all_collude(sites)))

    def _parts(self) -> list[FrozenSeat]:
        """The encoders of all hospitals, read from their files."""
        found = []
        for site, modality in SITES.items():
            seat, backbone = Seat(modality, (modality,)), self._config.model.backbone()
            half = client_half(
                self._on_wire, backbone, seat, (), key=bytes(32), seed=self._job.seed, device="cpu"
            )
            weights = self._federation.folder / site / self._job.weights(site)
            first_weights.give(half.network, weights, self._on_wire, backbone, seat)
            found.append(FrozenSeat(site, seat, quiet(half)))
        return found
