"""dFIL for a report: what Gaussian noise alone bounds, in one sentence."""

from __future__ import annotations

import numpy as np
import torch

from splitpeer.attacks.base import Knowledge, View
from splitpeer.defences.activation.noise import rms
from splitpeer.defences.kinds import parse_all
from splitpeer.defences.specs import Noise, by_place
from splitpeer.privacy.dfil import dfil, mse_floor


def gaussian_bound(view: View, knowledge: Knowledge, images: np.ndarray) -> str | None:
    """The bound on unbiased attackers where Gaussian noise covers every level that says anything; else None.

    Args:
        images: float32 [N, 1, *spatial] under attack, in normalised intensities (deviation about 1).
    """
    model = knowledge.model
    written = parse_all(by_place(view.defences).activations, "activations")
    noises = [d for d in written if d.kind.additive_noise == Noise("gaussian", "rms")]
    if model is None or not noises:
        return None
    with torch.no_grad():
        levels = model(torch.from_numpy(np.asarray(images, np.float32)))
    widths = {name: float(rms(tensor).mean()) for name, tensor in levels.items()}
    sigma = {
        name: width
        * float(np.hypot.reduce([float(d.values["scale"]) for d in noises if d.covers(name)] or [0.0]))
        for name, width in widths.items()
    }
    # A level that was withheld says nothing, whatever noise it has.
    sigma = {name: value if widths[name] > 0 else float("inf") for name, value in sigma.items()}
    if any(value == 0 for value in sigma.values()):
        return None
    kept = all(d.kept for d in noises)
    releases = 1 if kept else max(len(target.shots) for target in view.targets)
    found = float(np.median(dfil(model, images, sigma)))
    floor = float(mse_floor(found, releases))
    return (
        "Bound by the Gaussian noise alone: an attacker without prior knowledge (unbiased) has a mean squared error "
        f"of at least {floor:.3g} per voxel after {releases} release{'s' if releases > 1 else ''} (dFIL "
        f"{found:.3g}; the image's own variance is about 1). An attacker who knows what brains look like is not "
        "bound by it."
    )
