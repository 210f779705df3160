"""What a coordinator reads off the gradient of its own logits, where the labels are at a site: the masks.

The loss's gradient by a logit is, but for a factor, p - t: what the network says less what is true. The coordinator
knows p, so it knows t, exactly and in one release. Noise on the gradient leaves a test between two known values at each
voxel, and a window comes again in later steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import numpy as np
import torch
from torch import Tensor

from splitpeer.attacks.base import Attack, Knowledge, Progress, Recovered, View
from splitpeer.attacks.label.gradients import by_step, smoothed
from splitpeer.attacks.pose import pose_of, turn_back
from splitpeer.errors import AttackImpossible

LOGITS = "logits"
"""Name of the tensor, among a release's activations and gradients."""
_EXCLUSIVE = 1e-3
"""Of the largest gradient: sums over the channels that are smaller are zero, so the network chooses one class."""
_SHARPEST = 1e-12


@dataclass(frozen=True, kw_only=True)
class LogitGradient(Attack):
    """The target is where the gradient of a region's logit is below what it would be at a voxel as likely as not.

    Plain: minus the gradient; where it is positive, the voxel is of the region. Where the gradient is defended and the
    adversary knows: the likelihood ratio of the two values that the cross-entropy allows at this logit, summed over the
    releases of a window, each weighted by its own noise, then smoothed, as masks are.
    """

    name = "logit-gradient"
    title = "Gradient of the logits, voxel by voxel"
    source = "derived from the loss; compare Li et al. 2022 (arXiv 2102.08504)"
    goal = "mask"
    role = "coordinator"
    evidence = "its own logits, and the gradients that the site of the labels sent back"
    plain = (
        "The coordinator looks at the correction that it is sent for its own prediction: that is the mask."
    )

    smooth: float = 1.0
    """Smoothing of the scores where gradients are defended: standard deviation in voxels."""

    def recover(self, view: View, knowledge: Knowledge, progress: Progress) -> Recovered:
        """Scores float32 [N, *spatial], as the sample lies; above 0 is target, where nothing is defended."""
        steps, adaptive = by_step(view, None), bool(view.gradient_defences) and knowledge.adaptive
        if not any(LOGITS in shot.gradients for of_step in steps for _, shot in of_step):
            raise AttackImpossible(f"{self.name}: the labels of this capture are not at a site")
        total = torch.zeros((len(view.targets), *view.window), device=self.device)
        count = torch.zeros(len(view.targets), device=self.device)
        for done, shots in enumerate(steps, 1):
            for target, shot in shots:
                gradient, logits = (
                    torch.from_numpy(np.array(part[LOGITS], np.float32)).to(self.device)
                    for part in (shot.gradients, shot.activations)
                )
                score = _scores(gradient, logits, adaptive=adaptive)
                total[target] += turn_back(score[None], pose_of(shot, None))[0]
                count[target] += 1
            progress(self.title, done, len(steps))
        if not adaptive:
            total /= count.reshape(-1, *[1] * view.dimensions).clamp(min=1)
        return Recovered(
            (smoothed(total, self.smooth) if adaptive else total).float().cpu().numpy(),
            int(count.max()),
            settings={"steps": len(steps)},
        )


def _scores(gradient: Tensor, logits: Tensor, *, adaptive: bool) -> Tensor:
    """Of one release: gradients and logits [channels, *window] to [*window]."""
    size = gradient.abs().amax().clamp(min=_SHARPEST)
    exclusive = len(gradient) > 1 and bool(gradient.sum(0).abs().amax() < _EXCLUSIVE * size)
    # Of one class per voxel: the target is where it is not the background, whose gradient has the other sign.
    signs = gradient[:1].neg() if exclusive else gradient
    likely = logits.softmax(0)[:1].neg() + 1 if exclusive else logits.sigmoid()
    if not adaptive:
        return -signs.amin(0)
    # Both losses move a logit by `factor` times p - t, and a little more in the same direction.
    factor = _factor(gradient, logits, exclusive=exclusive)
    evidence = factor * (likely - 0.5) - signs
    return evidence.amax(0) * factor / signs.square().mean().clamp(min=_SHARPEST)


def _factor(gradient: Tensor, logits: Tensor, *, exclusive: bool) -> Tensor:
    """What p - t is multiplied by: the slope of the gradient over p, which noise leaves in the mean."""
    p = logits.softmax(0)[:1] if exclusive else logits.sigmoid()
    values = gradient[:1] if exclusive else gradient
    centred = p - p.mean()
    spread = centred.square().mean()
    slope = (centred * values).mean() / spread.clamp(min=_SHARPEST)
    least = values.square().mean().sqrt() / prod(values.shape) ** 0.5
    return torch.where(slope > least, slope, 2 * values.square().mean().sqrt())
