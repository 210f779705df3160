"""The demo's last part: what its coordinator kept, and one hospital recorded, is attacked, and a report written."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing.pool import AsyncResult, Pool
from pathlib import Path
from statistics import fmean

import torch

from splitpeer.attacks.base import silent
from splitpeer.attacks.collusion import remaining
from splitpeer.audit.capture_audit import CaptureAudit
from splitpeer.audit.cohort import Cohort, cut, shadow
from splitpeer.audit.experiment import Experiment, parse_order
from splitpeer.audit.judge import make_judge
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
from splitpeer.audit.run_folder import OTHERS, RunFolder
from splitpeer.audit.wider import colluding_experiment
from splitpeer.data.layouts import find_labels
from splitpeer.data.phantom.cohort import write_phantom
from splitpeer.data.pseudonym import load_salt, pseudonym
from splitpeer.data.sampling import split_patients
from splitpeer.demo.federation import HUB, SITES, Federation
from splitpeer.demo.private import PrivateJob, coordinator_bank
from splitpeer.errors import JobFailed
from splitpeer.federation.halves import client_half
from splitpeer.federation.terms import job_on_wire, window_of
from splitpeer.report.build import write_report
from splitpeer.report.model import Source
from splitpeer.settings.job import JobConfig
from splitpeer.site import first_weights
from splitpeer.storage.bank import Bank
from splitpeer.training.sums import over_seats
from splitproto.messages import Job, Seat

SEAT = "t1"
"""At which a hospital records the gradients that it is sent."""
PATIENTS = 4
"""Patients held out whose evaluation the coordinator records and that are attacked."""
STRANGERS = 24
"""Phantom patients of another seed: the adversary's own similar images."""
QUICK = ("inverse:steps=40,width=16",)
"""On every contrast; the one that shows most is then attacked by `ATTACKS`."""
ATTACKS = ("pca", "whitebox:iterations=150", "inverse:steps=120,width=16")
SITE_ATTACKS = ("gradient-norm",)
SHADOW = 400
"""Images that the adversary draws from its strangers."""
SUM = "sum"
KNOWN, COLLUDE = "others-known", "others-collude"
READ = {
    SUM: "the sum",
    KNOWN: "one hospital's values",
    COLLUDE: "one hospital's values and all others' images",
}
"""Folder of an attack on the private demo, and what it reads."""
SEARCH = "sum-search:steps=120,width=16,iterations=50"
"""Of the sum, beside `ATTACKS`; it begins with their network."""
ATTACK_S = 3600.0
"""The attacks on sums, at most."""
LEFT_OUT = (
    "Neighbouring slices of a sum, and the coordinator with one hospital, are left out for time: splitpeer audit "
    "measures both on a hospital's own images.",
    "Membership of the patients from whom the encoders learned before the run.",
)
SYNTHETIC = (
    "These are synthetic patients and short attacks: the figures show the mechanism, and are no bound on what better "
    "ones find in the sum; docs/private.md has the result of longer ones. The adversary holds the encoders of all "
    "hospitals, which a real coordinator does not, unless the hospital that made them tells. These encoders learned "
    "without noise, which the preset for hospitals refuses unless they allow it (min_encoder_noise): the demo does."
)

Progress = Callable[[str, int, int], None]


def recorded_keys(federation: Federation) -> list[str]:
    """Pseudonyms, in hexadecimal, of a few patients that the job will hold out."""
    salt = load_salt(federation.salt)
    cases = find_labels(federation.data / "labels", "folder")
    keys = [pseudonym(salt, case.patient) for case in cases]
    _, held_out = split_patients(keys, federation.job.validation, federation.job.seed)
    return [key.hex() for key in held_out[:PATIENTS]]


def attack_and_report(federation: Federation, page: Path, progress: Progress) -> dict[str, float]:
    """Attack both captures and write `report.html`; returns a few figures for the terminal."""
    strangers = _strangers(federation)
    write_phantom(strangers, STRANGERS, seed=federation.job.seed + 1000)
    audit = partial(
        CaptureAudit, salt=federation.salt, truth=federation.data, convention="msd", seed=federation.job.seed,
        shadow_images=SHADOW, finder_steps=150,
    )  # fmt: skip
    run = partial(_run, progress)
    shown: dict[str, float] = {}
    most: tuple[Experiment, RunFolder] | None = None
    folders = []
    for seat in SITES.values():
        weights = _last_checkpoint(federation.folder / federation.site_of(seat) / "state")
        asked = audit(
            federation.capture("hub"), seat=seat, samples=PATIENTS,
            knows=(f"weights={weights}", f"shadow={strangers}"),
        )  # fmt: skip
        experiment, folder = _opened(federation, asked, f"images-{seat}")
        shown[seat] = max(run(experiment, folder, QUICK).values(), default=0.0)
        most = (experiment, folder) if most is None or shown[seat] >= max(shown.values()) else most
        folders.append(folder.folder)
    figures = {f"{seat}, quick {QUICK[0].partition(':')[0]} ssim": value for seat, value in shown.items()}
    figures["mean over contrasts, ssim"] = fmean(shown.values())
    if most is not None:
        figures |= run(*most, ATTACKS)
    # What the hospital's own image shows, with the same strangers' labels, is the floor of what the gradients show.
    site = federation.site_of(SEAT)
    hospital = audit(federation.capture(site), samples=48, step=1, knows=(f"shadow={strangers}",))
    experiment, folder = _opened(federation, hospital, "labels")
    figures |= run(experiment, folder, SITE_ATTACKS)
    write_report([*folders, folder.folder], page)
    return figures


def _opened(federation: Federation, asked: CaptureAudit, name: str) -> tuple[Experiment, RunFolder]:
    experiment = asked.experiment()
    folder = federation.folder / "attack" / name
    return experiment, asked.open_folder(experiment, folder, commands=("splitpeer demo",))


def _run(
    progress: Progress, experiment: Experiment, folder: RunFolder, attacks: Sequence[str]
) -> dict[str, float]:
    """The main figure of each attack, by its name and contrast."""
    orders, figures = [parse_order(written) for written in attacks], {}
    for outcome in experiment.run(orders, folder, progress=progress):
        figure = "ssim" if outcome.result.goal == "image" else "auc"
        name = f"{outcome.modality}, {outcome.result.attack} {figure}"
        figures[name] = outcome.scores[figure].mean or 0.0
    return figures


def _last_checkpoint(state: Path) -> Path:
    found = sorted(state.glob("*/step-*.safetensors"))
    if not found:
        raise JobFailed(f"{state}: no checkpoint to take the site's weights from")
    return found[-1]


# --- the private demo ------------------------------------------------------------------------


@dataclass(frozen=True)
class AttackEffort:
    """How hard the sums are attacked."""

    attacks: tuple[str, ...] = ATTACKS
    search: str = SEARCH
    """Of the sum, beside `attacks`; it begins with their network."""
    together: tuple[str, ...] = ATTACKS[1:2]
    """Where all others help: the strongest there; the floor, a network on their images, takes as long as an attack."""
    tumour: bool = True
    """Look for tumours in what was rebuilt."""

    def on(self, name: str) -> tuple[str, ...]:
        """Those of one experiment."""
        if name == COLLUDE:
            return self.together
        return (*self.attacks, self.search) if name == SUM else self.attacks


EFFORT = AttackEffort()


class SumAttacks:
    """Of a private demo: attacks on the sums that were kept, and on what all other hospitals together could subtract.

    The adversary is stronger than a real one: it holds the encoders of all hospitals. All that it needs is there
    when the hospitals stop, so it works beside the training, in two processes of one thread each.

    Args:
        federation: its files are written.
        job: its settings.
        effort: how hard they try.
    """

    def __init__(self, federation: Federation, job: PrivateJob, effort: AttackEffort) -> None:
        self._folder, self._job, self._effort = federation.folder, job, effort
        self._pool: Pool | None = None
        self._running: list[AsyncResult[tuple[list[Path], dict[str, float]]]] = []
        write_phantom(_strangers(federation), min(STRANGERS, job.strangers), seed=job.seed + 1000)

    def start(self) -> None:
        """Begin, if that was not done."""
        if self._pool is None:
            self._pool = multiprocessing.get_context("spawn").Pool(2, torch.set_num_threads, (1,))
            self._running = [
                self._pool.apply_async(_attack_sums, (self._folder, self._job, self._effort, names))
                for names in ((KNOWN, COLLUDE), (SUM,))
            ]

    def stop(self) -> None:
        """End what runs, done or not."""
        if self._pool is not None:
            self._pool.terminate()
            self._pool.join()

    def report(self, page: Path) -> dict[str, float]:
        """Wait for all, and write the page.

        Returns:
            A few figures for the terminal; of the sum, that of the contrast that shows most, and the mean over all.

        Raises:
            JobFailed: there is no feature bank, or they take too long.
        """
        self.start()
        folders: list[Path] = []
        figures: dict[str, float] = {}
        for one in self._running:
            try:
                done, found = one.get(ATTACK_S)
            except multiprocessing.TimeoutError:
                raise JobFailed(f"the attacks were not done in {ATTACK_S / 60:.0f} minutes") from None
            folders += done
            figures |= found
        write_report(folders, page)
        return figures


def _attack_sums(
    folder: Path, job: PrivateJob, effort: AttackEffort, names: Collection[str]
) -> tuple[list[Path], dict[str, float]]:
    """In a process of its own: those of the experiments that are named; their folders, and their figures."""
    federation, folders = Federation(folder, job), []
    figures: dict[str, float] = {}
    for name, experiment, parties in _experiments(federation, job, names, tumour=effort.tumour):
        opened = experiment.open_folder(
            folder / "attack" / name, commands=("splitpeer demo --private",), notes=(SYNTHETIC,)
        )
        opened.not_tested, opened.promises = (*LEFT_OUT, *OTHERS), promises(parties)
        for attack in effort.on(name):
            found = _run(silent, experiment, opened, (attack,)).values()
            title = f"{attack.partition(':')[0]} on {READ[name]}"
            figures[f"{title}, ssim"] = max(found, default=0.0)
            if len(found) > 1:
                figures[f"{title}, mean over contrasts, ssim"] = fmean(found)
        folders.append(opened.folder)
    return folders, figures


def _strangers(federation: Federation) -> Path:
    return federation.folder / "strangers"


def _experiments(
    federation: Federation, job: PrivateJob, names: Collection[str], *, tumour: bool
) -> Iterator[tuple[str, Experiment, int]]:
    """Of those that are named: name, adversary, and number of hospitals."""
    config = JobConfig.load(federation.hub / "job.toml")
    on_wire, window, salt = job_on_wire(config), window_of(job_on_wire(config)), load_salt(federation.salt)
    if on_wire.fusion is None:
        raise JobFailed("the job has no secure fusion")
    cohort = Cohort.read(federation.data, tuple(SITES.values()), salt=salt, convention="msd")
    if cohort.labels is None or (bank := Bank.open(coordinator_bank(federation))) is None:
        raise JobFailed(f"{federation.hub}: no feature bank; the log of the coordinator says why")
    keys = [bytes.fromhex(key) for key in recorded_keys(federation)]
    samples = most_in_bank(bank, on_wire, keys, cohort.labels)
    strangers = Cohort.read(_strangers(federation), tuple(SITES.values()), salt=salt[::-1], convention="msd")
    others, truth = shadow(strangers, window, SHADOW), cut(cohort, samples, window)
    parts = _parts(federation, job, config, on_wire)
    own, sums = [part for part in parts if part.seat.name == SEAT], sums_of(bank, samples)
    theirs = sent([part for part in parts if part.seat.name != SEAT], samples, truth.images)
    # What the coordinator and all others have together: the sum without their own parts.
    left = remaining(sums, [over_seats(by_seat) for by_seat in theirs.values()], on_wire.fusion)
    # A finder of tumours for each contrast that is attacked takes as long as an attack.
    attacked = tuple(SITES.values()) if SUM in names else (SEAT,)
    judge = make_judge(attacked, truth, others, finder_steps=150, tumour=tumour)
    source = Source(role="coordinator", site=HUB, federation=config.job.name, run=bank.contents.run.hex())
    sites = on_wire.fusion.parties
    for name, of, reads, levels in (
        (KNOWN, own, known_partners(sites), left),
        (SUM, parts, sum_of(sites), sums),
    ):
        one = Onlooker(on_wire, tuple(of), own[0].site, (), reads, SITES, seed=job.seed)
        experiment = one.experiment(samples, levels, judge, others, source)
        if name in names:
            yield name, experiment, sites
        if name == KNOWN and COLLUDE in names:
            together = colluding_experiment(experiment, others_of(parts, own[0].site))
            view = replace(together.view, summed=all_collude(sites))
            yield COLLUDE, replace(together, view=view), sites


def _parts(federation: Federation, job: PrivateJob, config: JobConfig, on_wire: Job) -> list[FrozenSeat]:
    """All hospitals' encoders, as their files have them."""
    found = []
    for site, modality in SITES.items():
        seat, backbone = Seat(modality, (modality,)), config.model.backbone()
        half = client_half(on_wire, backbone, seat, (), key=bytes(32), seed=job.seed, device="cpu")
        first_weights.give(
            half.network,
            federation.folder / site / job.weights(site),
            on_wire,
            backbone,
            seat,
        )
        found.append(FrozenSeat(site, seat, quiet(half)))
    return found
