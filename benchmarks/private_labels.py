"""What a site reads off the gradient that all are sent of a secure sum: the outline of the tumour, which it lacks.

Two floors need no gradient: the mean outline of strangers whose masks the site has, and what a network that learned
from them finds in the site's own image. What an attack shows beyond the better one is the gradient's.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from private_attacks import People, Told
from private_run import Federation, RowBench

from splitpeer.attacks.base import Result, Target, View
from splitpeer.attacks.budget import Budget
from splitpeer.attacks.catalogue import make_attack
from splitpeer.attacks.runner import run_doubled
from splitpeer.audit.cohort import Samples
from splitpeer.audit.experiment import parse_order, site_knowledge
from splitpeer.audit.judge import Judge
from splitpeer.data.loader import SiteData
from splitpeer.leakage.measure import OWN_IMAGE
from splitpeer.leakage.own_image import OwnImage
from splitpeer.report.names import SUM
from splitproto.records import Sample, Seat

EARLY, ALL = "early steps", "all releases"
ATTACKED = {
    EARLY: ("gradient-norm", "gradient-projector"),
    ALL: (
        "gradient-norm",
        "gradient-field",
        "gradient-field:together=8",
        "gradient-projector",
        "gradient-network",
    ),
}
"""Of one release in the first steps, before anything is learned; and of all releases of the windows sent most often."""
MOST = 4
"""Times what the settings of an attack say."""
SHADOW = 800
"""Slices of strangers that the site has, at most."""


def masks_from(federation: Federation, strangers: People, told: Told) -> dict[str, Any]:
    """By contrast of the site and attack, figures of the outlines: {"t1": {"gradient-norm, early steps": {...}}}."""
    bench, noted = federation.bench, federation.gradients()
    run = People(federation.patients, bench.masks(bench.cohort()), federation.window)
    found: dict[str, dict[str, Any]] = {}
    slices = strangers.slices()
    shadow = samples_of(bench, strangers, slices[:: max(1, -(-len(slices) // SHADOW))])
    for contrast in federation.patients:
        seat = Seat(contrast, (contrast,))
        own = own_image(bench, seat, shadow)
        for when, attacks in ATTACKED.items():
            targets = noted.early() if when == EARLY else noted.all()
            truth = samples_of(bench, run, [target.sample for target in targets])
            judge = Judge(truth, own=own)
            view = seen_at(federation, seat, targets)
            for written in attacks:
                result = attacked(view, truth, shadow, judge, written, bench.seed)
                (outcome,) = judge.outcomes(view, result)
                scores = {name: json.loads(json.dumps(one.to_json())) for name, one in outcome.scores.items()}
                found.setdefault(contrast, {})[f"{written}, {when}"] = scores
                told(f"{written}, {when}, at {contrast}: AUC {scores['auc']['mean']:.3f}, "
                     f"own image {scores['auc']['floors'][OWN_IMAGE]:.3f}")  # fmt: skip
    return found


def attacked(view: View, truth: Samples, shadow: Samples, judge: Judge, written: str, seed: int) -> Result:
    """By one attack, its budget doubled while that gains."""
    order = parse_order(written)
    attack = make_attack(order.attack, seed=seed, **order.settings)
    known = site_knowledge(view, truth, shadow)
    return run_doubled(attack, view, known, Budget(MOST), lambda result: judge.merit(view, result))


def seen_at(federation: Federation, seat: Seat, targets: tuple[Target, ...]) -> View:
    """What the site at a seat is sent of these windows."""
    return View(
        role="client", site=seat.name, seat=seat, seats=(seat,), backbone=federation.bench.job.model.backbone(),
        window=tuple(federation.job.window), targets=targets, fusion="secure-sum", summed=SUM,
    )  # fmt: skip


def own_image(bench: RowBench, seat: Seat, shadow: Samples) -> OwnImage:
    """What the site at a seat learns from strangers, without a gradient."""
    images, outlines = shadow.at(seat), shadow.outlines
    if images is None or outlines is None:
        raise ValueError("strangers have all contrasts, and masks")
    return OwnImage.train(
        images, outlines, shadow.patients, shadow.heights, steps=bench.given.readout_steps, seed=bench.seed
    )


def samples_of(bench: RowBench, people: People, samples: Sequence[Sample]) -> Samples:
    """Windows with their images and masks."""
    images = {place.seat: array for place, array in people.read(samples).items()}
    masks = SiteData(people.masks).batch(samples, people.window, None, None)
    return Samples(tuple(samples), images, np.asarray(masks, np.uint8), bench.task)
