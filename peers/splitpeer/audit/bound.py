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
    scales = {
        name: float(np.hypot.reduce([float(d.values["scale"]) for d in noises if d.covers(name)] or [0.0]))
        for name in levels
    }
    widths = {name: rms(tensor).flatten().tolist() for name, tensor in levels.items()}
    # A level that was withheld says nothing, whatever noise it has.
    told = [name for name, of in widths.items() if max(of) > 0]
    if not told or any(scales[name] == 0 for name in told):
        return None
    kept = all(d.kept for d in noises)
    releases = 1 if kept else max(len(target.shots) for target in view.targets)
    # Each patient under its own noise; the largest of them holds for all.
    found = max(
        float(dfil(model, images[n : n + 1], {
            name: scales[name] * of[n] if of[n] > 0 else float("inf") for name, of in widths.items()
        })[0])
        for n in range(len(images))
    )  # fmt: skip
    floor = float(mse_floor(found, releases))
    return (
        "Bound by the Gaussian noise alone, for the patient with the weakest protection: an attacker without prior "
        "knowledge (unbiased) has a mean squared error "
        f"of at least {floor:.3g} per voxel after {releases} release{'s' if releases > 1 else ''} (dFIL "
        f"{found:.3g}; the image's own variance is about 1). An attacker who knows what brains look like is not "
        "bound by it, nor one who has kept noise in several poses or from several weights."
    )
