"""Each loss is the formula in its docstring, and MONAI's."""

from __future__ import annotations

import pytest
import torch
from monai.losses import DiceCELoss, DiceLoss

from splitpeer.training.loss import class_loss, probabilities, region_loss, task_loss


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


def classes(
    shape: tuple[int, ...], channels: int, seed: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits of `channels` classes, the class of each voxel, and its regions (without the background)."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(shape[0], channels, *shape[1:], generator=generator)
    held = torch.randint(channels, (shape[0], 1, *shape[1:]), generator=generator)
    return logits, held, torch.cat([held == c for c in range(1, channels)], 1).float()


@pytest.mark.parametrize("shape", [(4, 8, 8), (2, 4, 8, 8)], ids=["slices", "volumes"])
@pytest.mark.parametrize("channels", [2, 3, 5])
def test_the_loss_of_classes_is_monais(shape: tuple[int, ...], channels: int) -> None:
    logits, held, target = classes(shape, channels, seed=3)
    theirs = DiceCELoss(to_onehot_y=True, softmax=True, include_background=False, batch=True)
    # Sums of 512 float32 terms, in another order: 512 roundings of 2^-24 at worst.
    assert class_loss(logits, target).item() == pytest.approx(theirs(logits, held).item(), rel=512 * 2**-24)


def test_gradients_of_classes_are_monais() -> None:
    logits, held, target = classes((2, 4, 8, 8), 3, seed=4)
    ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    class_loss(ours, target).backward()
    DiceCELoss(to_onehot_y=True, softmax=True, include_background=False, batch=True)(theirs, held).backward()
    assert ours.grad is not None and theirs.grad is not None
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-8)


def test_the_loss_of_the_task() -> None:
    logits, _, target = classes((2, 8, 8), 3, seed=5)
    assert torch.equal(task_loss(logits, target, exclusive=True), class_loss(logits, target))
    regions = logits[:, 1:]
    assert torch.equal(task_loss(regions, target, exclusive=False), region_loss(regions, target))
    assert torch.equal(probabilities(logits, exclusive=False), logits.sigmoid())
    torch.testing.assert_close(probabilities(logits, exclusive=True).sum(1), torch.ones(2, 8, 8))


def test_glioma_trains_as_it_always_did() -> None:
    """The loss of the preset, written out as the first edition had it: the same bits, and those of its gradient."""
    generator = torch.Generator().manual_seed(6)
    logits = torch.randn(4, 3, 16, 16, generator=generator)
    target = (torch.rand(4, 3, 16, 16, generator=generator) > 0.7).float()
    ours, before = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    loss = task_loss(ours, target, exclusive=False)
    loss.backward()
    cross_entropy = torch.nn.functional.binary_cross_entropy_with_logits(before, target)
    probability, axes = before.sigmoid(), (0, 2, 3)
    both, either = (probability * target).sum(axes), probability.sum(axes) + target.sum(axes)
    old = 2.0 * cross_entropy + (1 - (2 * both + 1e-5) / (either + 1e-5)).sum()
    old.backward()
    assert ours.grad is not None and before.grad is not None
    assert torch.equal(loss, old) and torch.equal(ours.grad, before.grad)
