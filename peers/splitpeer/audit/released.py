"""What a coordinator of frozen encoders keeps, or reads as a sum, as an experiment: one site's values, or all sites'.

Where the values come from is the caller's business: computed before anything leaves (`release_audit.py`), or read from
a feature bank.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from splitpeer.attacks.base import Knowledge, Shot, Target, View
from splitpeer.attacks.joint import NAME, JointEncoder
from splitpeer.audit.cohort import Samples
from splitpeer.audit.experiment import Experiment
from splitpeer.audit.judge import Judge
from splitpeer.audit.run_folder import network_of
from splitpeer.audit.wider import ALL_OTHERS
from splitpeer.data.volumes import Volumes
from splitpeer.defences.randomness import Release
from splitpeer.errors import DataError
from splitpeer.federation.terms import window_of
from splitpeer.models.registry import backbone_of
from splitpeer.report.model import Promise, Source
from splitpeer.report.names import SUM
from splitpeer.storage.bank import ALL_SITES, Bank, BankEntry
from splitpeer.training.forms import activations_form, gradients_form
from splitpeer.training.split_step import Arrays, ClientHalf
from splitpeer.training.sums import fused
from splitproto.fusion import dtype_of
from splitproto.records import Job, Sample, Seat

MODE = "release"
AT_ONCE = 16
"""Samples that are computed together."""


@dataclass(frozen=True)
class FrozenSeat:
    """One seat's part in what the coordinator reads."""

    site: str
    seat: Seat
    half: ClientHalf


def sent(
    parts: Sequence[FrozenSeat], samples: Sequence[Sample], images: Mapping[str, np.ndarray]
) -> dict[str, dict[str, Arrays]]:
    """What leaves the sites before masks are added, by site and seat: {"x0": float32 [N, C, *spatial], ...}.

    Args:
        images: by seat, float32 [N, channels, *spatial], as the encoder sees them.
    """
    found: dict[str, dict[str, Arrays]] = {}
    for part in parts:
        pieces = [
            part.half.evaluate(
                images[part.seat.name][first : first + AT_ONCE],
                Release(b"", MODE, 0, first, tuple(samples[first : first + AT_ONCE])),
            )
            for first in range(0, len(samples), AT_ONCE)
        ]
        joined = {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}
        found.setdefault(part.site, {})[part.seat.name] = joined
    return found


def read(values: Mapping[str, Mapping[str, Arrays]], job: Job) -> Arrays:
    """What the coordinator of `job` reads of them: the sum, or without one all of it, one seat after the other."""
    if job.fusion is not None:
        return fused(values, job.fusion)
    # SP-11.21-7: "what the coordinator reads are the decoded values, and an audit MUST be of those".
    form = activations_form(job)
    levels = [form.read(one) for by_seat in values.values() for one in by_seat.values()]
    return {name: np.concatenate([one[name] for one in levels], axis=1) for name in levels[0]}


@dataclass(frozen=True)
class Onlooker:
    """One adversary of a job with frozen encoders or a sum: whose parts its numbers are of, and what it is granted.

    Args:
        parts: of one site, or of all; their seats' modalities are the channels.
        site: whose images are judged.
        defences: what sites say that they apply, the same at all.
        summed: see `View.summed`.
        hospitals: all sites of the job, and what each holds.
    """

    job: Job
    parts: tuple[FrozenSeat, ...]
    site: str
    defences: tuple[str, ...]
    summed: str
    hospitals: Mapping[str, str]
    device: str = "cpu"
    seed: int = 0

    def experiment(
        self, samples: Sequence[Sample], levels: Arrays, judge: Judge, others: Samples, source: Source
    ) -> Experiment:
        """On `levels`, what the coordinator read: float32 [N, C, *spatial] by name.

        Args:
            others: the adversary's own patients, of all channels.
        """
        view = self._view(self.targets(samples, levels))
        source = source.model_copy(
            update={
                "role": "coordinator",
                "frozen": self.job.frozen,
                "steps": None if self.job.frozen else self.job.steps,
                "summed": self.job.fusion.parties if self.job.fusion is not None else None,
                "samples": len(samples),
                "job": self.job.name,
            }
        )
        job = self.job
        form = activations_form(job).form if job.fusion is None else dtype_of(job.fusion)
        back = "" if job.frozen else gradients_form(job).form
        network = network_of(view, self.hospitals, form, back=back)
        return Experiment(view, self._knowledge(view, others), judge, source, network, self.seed, self.device)

    def targets(self, samples: Sequence[Sample], levels: Arrays) -> tuple[Target, ...]:
        """These windows with what was read of them, as in `experiment`."""
        mode = MODE if self.job.frozen else "evaluate"
        shots = (
            Shot(mode, self._step, n, None, {name: array[n] for name, array in levels.items()})
            for n in range(len(samples))
        )
        return tuple(Target(sample, (shot,)) for sample, shot in zip(samples, shots, strict=True))

    @property
    def seat(self) -> Seat:
        """All channels as one seat; the site's own where it has a single one."""
        if len(self.parts) == 1:
            return self.parts[0].seat
        return Seat(NAME, tuple(modality for part in self.parts for modality in part.seat.modalities))

    @property
    def _step(self) -> int:
        """Whose weights the encoders have: of the job's last where they learn."""
        return 0 if self.job.frozen else self.job.steps

    def _view(self, targets: tuple[Target, ...]) -> View:
        return View(
            role="coordinator", site=self.site, seat=self.seat, seats=(self.seat,), backbone=backbone_of(self.job),
            window=tuple(self.job.window), targets=targets, defences=self.defences,
            fusion="secure-sum" if self.job.fusion is not None else "", summed=self.summed,
            form=activations_form(self.job).form if self.job.fusion is None else "f32",
        )  # fmt: skip

    def _knowledge(self, view: View, others: Samples) -> Knowledge:
        networks = [part.half.network for part in self.parts]
        widths = [len(part.seat.modalities) for part in self.parts]
        model = networks[0]
        if len(networks) > 1 or self.job.fusion is not None:
            model = JointEncoder(networks, widths, [part.site for part in self.parts], self.job.fusion)
        images = others.at(self.seat)
        shadow = {} if images is None else {self.seat.name: images}
        return Knowledge(
            model=model.eval(),
            weights_step=self._step,
            encoders=len(networks),
            shadow=shadow,
            shadow_masks=others.masks,
            shadow_patients=tuple(others.patients),
        )


def quiet(half: ClientHalf) -> ClientHalf:
    """`half`, whose encoder is never trained again: attacks ask for gradients of images only."""
    for parameter in half.network.parameters():
        parameter.requires_grad_(False)
    half.network.eval()
    return half


# --- names for the report ---------------------------------------------------------------------------------


def sum_of(sites: int) -> str:
    """How tables call the sum."""
    return f"{SUM} of {sites} hospitals"


def known_partners(sites: int) -> str:
    """The same where the adversary subtracts all parts but one."""
    return f"{sum_of(sites)}, others known"


def all_collude(sites: int) -> str:
    """The same where all others also show their images of the patients."""
    return f"{known_partners(sites)} with their images"


def one_colludes(sites: int) -> str:
    """The same where one of them does, and its part is subtracted."""
    return f"{sum_of(sites)}, one known with its images"


def others_of(parts: Sequence[FrozenSeat], site: str) -> Seat:
    """All channels of the other sites as one seat: what the coordinator holds in clear if all of them work with it."""
    return Seat(ALL_OTHERS, tuple(m for part in parts if part.site != site for m in part.seat.modalities))


def promises(sites: int) -> dict[str, Promise]:
    """What the page says of them."""
    return {
        sum_of(sites): Promise(
            title="Secure sum",
            promise=f"The coordinator reads the sum of {sites} hospitals' rounded values and no hospital's own, unless "
            "it works with all partners of a hospital but one. The sum itself is not protected.",
        ),
        known_partners(sites): Promise(
            title="Secure sum, worst case",
            promise="The partners' parts say nothing, because their maps are flat or because the coordinator knows "
            "them and subtracts them: what is left is this hospital's own rounded values. Whatever its partners "
            "send, these values show no more than this.",
        ),
        all_collude(sites): Promise(
            title="Coordinator and all partners together",
            promise="All others subtract their parts and show the coordinator their own images of the same patients. "
            "What these say of the image without any traffic is its floor: no protocol hides that.",
        ),
        one_colludes(sites): Promise(
            title="Coordinator and one partner together",
            promise="The partner subtracts its part, which leaves the sum of the others, and shows the coordinator its "
            "own images of the same patients. What these say of the image without any traffic is its floor.",
        ),
    }


SEARCH = "sum-search"
"""The attack that is made for sums; it runs on them whatever else is asked for."""


def of_a_sum(attacks: Sequence[str]) -> list[str]:
    """Attacks on a sum, of those that are asked for on one site's values."""
    return [*attacks, *([] if any(one.partition(":")[0] == SEARCH for one in attacks) else [SEARCH])]


# --- from a feature bank ----------------------------------------------------------------------------------


def most_in_bank(bank: Bank, job: Job, keys: Collection[bytes], masks: Volumes) -> list[Sample]:
    """For each of `keys` the window with most of what is segmented among those that were released."""
    window, chosen = window_of(job), []
    for key in keys:
        origins = dict.fromkeys(o for entry in _entries(bank) if entry.key == key for o in entry.origins)
        if origins:
            held = {origin: int(masks.window(key, origin, window).sum()) for origin in origins}
            chosen.append(Sample(key, max(held, key=lambda origin: held[origin])))
    return chosen


def sums_of(bank: Bank, samples: Sequence[Sample]) -> Arrays:
    """The sums that a bank holds of these windows: {"x0": float32 [N, C, *spatial], ...}.

    Raises:
        DataError: one is not there, or damaged.
    """
    place = {
        (entry.key, origin): (entry, row)
        for entry in _entries(bank)
        for row, origin in enumerate(entry.origins)
    }
    rows = []
    for sample in samples:
        if (found := place.get((sample.key, sample.origin))) is None:
            raise DataError(
                f"{bank.folder}: holds no sum of window {sample.origin} of {sample.key.hex()[:8]}"
            )
        rows.append({name: array[found[1]] for name, array in bank.get(found[0]).items()})
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def _entries(bank: Bank) -> Iterator[BankEntry]:
    return (entry for entry in bank.contents.releases if entry.site == ALL_SITES)
