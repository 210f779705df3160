"""The loss is the formula in its docstring."""

from __future__ import annotations

import pytest
import torch
from monai.losses import DiceLoss

from splitpeer.training.loss import region_loss


def test_formula() -> None:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(4, 3, 8, 8, generator=generator)
    target = (torch.rand(4, 3, 8, 8, generator=generator) > 0.7).float()
    target[:, 2] = 0  # a region that no image of the batch has
    p = logits.sigmoid()
    bce = -(target * p.log() + (1 - target) * (1 - p).log()).mean()
    dice = 0.0
    for region in range(3):
        both = (p[:, region] * target[:, region]).sum()
        dice += 1 - (2 * both + 1e-5) / (p[:, region].sum() + target[:, region].sum() + 1e-5)
    assert region_loss(logits, target).item() == pytest.approx((2 * bce + dice).item(), rel=1e-5)


def test_three_dimensions_and_other_types() -> None:
    logits, target = (
        torch.zeros(1, 3, 4, 4, 4, dtype=torch.bfloat16),
        torch.ones(1, 3, 4, 4, 4, dtype=torch.uint8),
    )
    loss = region_loss(logits, target)
    assert loss.dtype == torch.float32
    assert loss.shape == ()


def test_the_dice_term_is_monais() -> None:
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(2, 3, 4, 8, 8, generator=generator)
    target = (torch.rand(2, 3, 4, 8, 8, generator=generator) > 0.7).float()
    cross_entropy = torch.nn.functional.binary_cross_entropy_with_logits(logits, target)
    theirs = 2 * cross_entropy + DiceLoss(sigmoid=True, batch=True, reduction="sum")(logits, target)
    # Sums of 512 float32 terms, in another order: 512 roundings of 2^-24 at worst.
    assert region_loss(logits, target).item() == pytest.approx(theirs.item(), rel=512 * 2**-24)
