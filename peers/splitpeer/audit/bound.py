"""dFIL for a report: what Gaussian noise alone bounds, in one sentence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from splitpeer.attacks.base import Knowledge, View
from splitpeer.defences.kinds import parse_all
from splitpeer.defences.specs import Noise, Spec, by_place
from splitpeer.privacy.dfil import Model, dfil, mean_floor, mse_floor
from splitpeer.privacy.prior import prior_information


def gaussian_bound(view: View, knowledge: Knowledge, images: np.ndarray) -> str | None:
    """The bounds on unbiased and on any attackers, where Gaussian noise covers every level that tells; else None.

    Args:
        images: float32 [N, 1, *spatial] under attack, in normalised intensities (deviation about 1).
    """
    model = knowledge.model
    written = parse_all(by_place(view.defences).activations, "activations")
    noises = [d for d in written if d.kind.additive_noise == Noise("gaussian", "rms")]
    if model is None or not noises:
        return None
    if _bent(written):
        return None
    with torch.no_grad():
        levels = model(torch.from_numpy(np.asarray(images, np.float32)))
    # A level that was withheld says nothing, whatever noise it has.
    told = [name for name, tensor in levels.items() if bool(tensor.any())]
    scales = {
        name: float(np.hypot.reduce([float(d.values["scale"]) for d in noises if d.covers(name)] or [0.0]))
        if name in told
        else float("inf")
        for name in levels
    }
    if not told or any(scales[name] == 0 for name in told):
        return None
    releases = 1 if all(d.kept for d in noises) else max(len(target.shots) for target in view.targets)
    found = float(max(_each(model, images, scales)))
    others = _any_attacker(view, knowledge, images, scales, releases)
    shown = f"{releases} release{'s' if releases > 1 else ''}"
    return (
        "Bound by the Gaussian noise alone, for the patient with the weakest protection: an attacker without prior "
        "knowledge (unbiased) has a mean squared error "
        f"of at least {float(mse_floor(found, releases)):.3g} per voxel after {shown} (dFIL "
        f"{found:.3g}; the image's own variance is about 1). {others} "
        "Neither binds one who has kept noise in several poses or from several weights."
    )


def _bent(written: Sequence[Spec]) -> bool:
    """Whether values jump before the noise, where a derivative says nothing."""
    last = max((n for n, d in enumerate(written) if d.kind.additive_noise), default=0)
    return any(d.kind.rounds or (d.kind.sparse and not d.kind.drops) for d in written[:last])


def _each(
    model: Model, images: np.ndarray, scales: Mapping[str, float], *, head: bool = False
) -> list[float]:
    """dFIL of every image, each under its own noise; if `head`, per voxel inside the head."""
    single = [images[n : n + 1] for n in range(len(images))]
    return [
        float(dfil(model, one, scales, follows=True, inside=one != 0 if head else None)[0]) for one in single
    ]


def _any_attacker(
    view: View, knowledge: Knowledge, images: np.ndarray, scales: Mapping[str, float], releases: int
) -> str:
    """What holds for attackers who know what brains look like."""
    shadow = knowledge.shadow.get(view.seat.name)
    try:
        if shadow is None or knowledge.model is None:
            raise ValueError("none are known")
        prior = prior_information(np.asarray(shadow, np.float32))
    except ValueError:
        return "Of an attacker who knows what brains look like it says nothing: that needs images of other patients."
    # The largest is at least the mean that the theorem asks for, and comparable with the other bound.
    largest = np.array(max(_each(knowledge.model, images, scales, head=True)))
    return (
        "An attacker who knows what brains look like, biased or not, has on average over patients at least "
        f"{mean_floor(largest, prior, releases):.3g} per voxel inside the head (van Trees), if all that is known of a "
        "voxel beforehand is what its neighbours "
        f"tell: information {prior:.3g}, estimated from {len(shadow)} images of others, and from below: better "
        "knowledge of brains lowers this bound."
    )
