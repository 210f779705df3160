"""Every network of the registry: split, it is the whole, bit for bit; with one site it is MONAI's own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from monai.networks.nets import DynUNet, SwinUNETR
from pydantic import ValidationError
from torch import nn
from torch.optim import Optimizer

from splitpeer.defences.randomness import Release
from splitpeer.models import (
    Backbone,
    build_encoder,
    build_split_network,
    encoder_parameters,
    make_backbone,
)
from splitpeer.models.registry import NETWORKS, backbone_of, on_wire
from splitpeer.models.seeding import seeded
from splitpeer.settings.job import Model
from splitpeer.training.loss import region_loss
from splitpeer.training.optimiser import Schedule, make_optimiser
from splitpeer.training.split_round import Parties, Place, split_round
from splitpeer.training.split_step import ClientHalf, CoordinatorHalf
from splitproto.records import Job, Sample
from tests.networks import SMALL
from tests.splitpeer.models.halves import SITES, both_ways, images, window

DOCS = Path(__file__).parents[3] / "docs" / "networks.md"
Make = Callable[[int], nn.Module]
BOTH = pytest.mark.parametrize("dimensions", [2, 3])
ALL = pytest.mark.parametrize("name", list(NETWORKS))


def backbone(name: str, dimensions: int, levels: tuple[int, ...] | None = None) -> Backbone:
    return make_backbone(name, dimensions, SMALL[name], levels)


@BOTH
@ALL
@pytest.mark.parametrize("fusion", ["concat", "mean"])
def test_split_equals_whole_bit_for_bit(name: str, dimensions: int, fusion: str) -> None:
    both_ways(backbone(name, dimensions), fusion)


@ALL
def test_every_setting_of_a_network_is_a_key_of_job_toml(name: str) -> None:
    written = {key: list(values) for key, values in SMALL[name].items()}
    assert Model(network=name, **written).backbone() == backbone(name, 2)
    assert Model(network=name, **NETWORKS[name].defaults).backbone() == Model(network=name).backbone()
    with pytest.raises(ValidationError, match="extra_forbidden"):
        Model(network=name, fetures=[8])


def trainable(part: nn.Module) -> tuple[Optimizer, Schedule]:
    optimiser = make_optimiser(part.parameters())
    return optimiser, Schedule(optimiser, "constant", 3)


@ALL
def test_training_over_the_halves_is_the_whole_networks_bit_for_bit(name: str) -> None:
    of = backbone(name, 2)
    whole, apart = (build_split_network(of, SITES, job_seed=1) for _ in range(2))
    optimiser, _ = trainable(whole)
    sites = {
        Place(site, site): ClientHalf(apart.encoders[site], *trainable(apart.encoders[site]))
        for site in SITES
    }
    parties = Parties(CoordinatorHalf(apart.decoder, *trainable(apart.decoder)), sites, {})
    x = images(of)
    target = (x["t1"] > 1).float().repeat(1, 3, 1, 1)
    for step in (1, 2, 3):
        loss = region_loss(whole(x), target)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        release = Release(bytes(16), "train", step, 0, (Sample(bytes(16), (0, 0, 0)),) * 2)
        given = {Place(site, site): image.numpy() for site, image in x.items()}
        assert split_round(parties, given, target.numpy(), release) == loss.item()
    trained = apart.state_dict()
    assert all(torch.equal(tensor, trained[key]) for key, tensor in whole.state_dict().items())


@BOTH
@ALL
def test_a_network_decodes_without_the_levels_that_stay(name: str, dimensions: int) -> None:
    bottleneck = backbone(name, dimensions).cut.bottleneck
    of = backbone(name, dimensions, (1, bottleneck))
    network = build_split_network(of, SITES, job_seed=1)
    logits = network(images(of))
    assert logits.shape == (2, 3, *window(of))
    logits.sum().backward()
    decoder = [p.grad for p in network.decoder.parameters()]
    assert all(gradient is not None for gradient in decoder)


def residual_unet(dimensions: int) -> nn.Module:
    steps = [1, 2, 2]
    widths = SMALL["residual-unet"]["features"]
    return DynUNet(dimensions, 1, 3, [3] * 3, steps, steps[1:], filters=widths, res_block=True)


def swin_unetr(dimensions: int) -> nn.Module:
    (size,), (side,) = SMALL["swin-unetr"]["feature_size"], SMALL["swin-unetr"]["window_size"]
    depths, heads = SMALL["swin-unetr"]["depths"], SMALL["swin-unetr"]["num_heads"]
    return SwinUNETR(1, 3, 2, depths, heads, side, feature_size=size, spatial_dims=dimensions)


LISTED_TWICE = ("skip_layers.", "heads.")
"""Under these names DynUNet has its blocks again, nested."""


@BOTH
@pytest.mark.parametrize(("name", "monai"), [("residual-unet", residual_unet), ("swin-unetr", swin_unetr)])
def test_one_site_is_monais_network_bit_for_bit(name: str, monai: Make, dimensions: int) -> None:
    """BasicUNet's is in test_basic_unet.py."""
    of = backbone(name, dimensions)
    ours = build_split_network(of, ["t1"], job_seed=3)
    theirs = monai(dimensions)
    weights = {**ours.encoders["t1"].state_dict(), **ours.decoder.state_dict()}
    own = {key for key, _ in theirs.named_parameters() if not key.startswith(LISTED_TWICE)}
    assert set(weights) == own, "neither more nor fewer, and no buffers"
    theirs.load_state_dict(weights, strict=False)
    x = images(of, ("t1",))
    mine, expected = ours(x), theirs(x["t1"])
    assert torch.equal(mine, expected)
    mine.square().mean().backward()
    expected.square().mean().backward()
    gradients = {**dict(ours.encoders["t1"].named_parameters()), **dict(ours.decoder.named_parameters())}
    compared = 0
    for key, parameter in theirs.named_parameters():
        if key in gradients:
            assert torch.equal(gradients[key].grad, parameter.grad), key
            compared += 1
    assert compared == len(gradients)


def test_a_residual_network_may_have_a_stride_of_its_own_on_every_axis() -> None:
    of = make_backbone("residual-unet", 3, {"features": (4, 6, 8), "strides": (1, 1, 1, 2, 2, 1, 2, 2, 2)})
    assert [one.stride for one in of.cut.levels] == [(1, 1, 1), (2, 2, 1), (4, 4, 2)]
    sent = build_encoder(of, seed=1)(torch.zeros(1, 1, 8, 8, 2))
    assert {n: tuple(t.shape) for n, t in sent.items()} == of.cut.shapes(1, (8, 8, 2))


@ALL
def test_weights_come_from_the_seed_and_are_counted(name: str) -> None:
    of = backbone(name, 2)
    torch.manual_seed(1)
    first = build_encoder(of, seed=4).state_dict()
    torch.manual_seed(2)
    assert all(
        torch.equal(value, first[key]) for key, value in build_encoder(of, seed=4).state_dict().items()
    )
    other = build_encoder(of, seed=5).state_dict()
    assert any(not torch.equal(value, first[key]) for key, value in other.items())


def test_group_normalisation_starts_at_one_and_zero() -> None:
    first = seeded(lambda: nn.Sequential(nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4)), 4)
    assert first[1].weight.eq(1).all() and first[1].bias.eq(0).all()


@pytest.mark.parametrize("kind", [nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm])
@pytest.mark.parametrize("affine", [True, False])
def test_normalisation_over_the_batch_is_refused(kind: type[nn.Module], affine: bool) -> None:
    """Else what is sent of one patient depends on the others of the batch."""
    with pytest.raises(TypeError, match="the other patients of its batch; use GroupNorm"):
        seeded(lambda: nn.Sequential(kind(4, affine=affine)), 4)


@BOTH
@ALL
@pytest.mark.parametrize("channels", [1, 3])
def test_weights_are_counted_without_making_any(name: str, dimensions: int, channels: int) -> None:
    bottleneck = backbone(name, dimensions).cut.bottleneck
    for levels in (None, (bottleneck,), (0, 1, bottleneck)):
        of = backbone(name, dimensions, levels)
        made = sum(p.numel() for p in build_encoder(of, channels, seed=4).parameters())
        assert encoder_parameters(of, channels) == made


@ALL
def test_a_job_carries_every_network(name: str) -> None:
    """SP-11.8-4."""
    of = backbone(name, 3)
    job = Job(
        name="try", **on_wire(of), precision="f32", window=(64, 64, 64), spacing=(), augment=False, batch=1, steps=1,
        optimiser="sgd", learning_rate=1.0, weight_decay=0.0, schedule="constant", seconds_per_step=1.0,
    )  # fmt: skip
    assert backbone_of(job) == of


@pytest.mark.parametrize(
    ("name", "settings", "text"),
    [
        ("residual-unet", {"features": (4,)}, "features must be 2 to 16"),
        ("residual-unet", {"features": (4, 6), "strides": (1, 2, 2)}, "strides must be"),
        ("residual-unet", {"features": (4, 6), "strides": (1, 0)}, "strides must be"),
        ("residual-unet", {"features": (4, 6), "strides": (1, 3)}, "strides must be 1 or 2"),
        ("residual-unet", {"features": (4, 6), "strides": (4, 4)}, "strides must be 1 or 2"),
        ("residual-unet", {"depths": (1, 2)}, "no setting 'depths'"),
        ("swin-unetr", {"feature_size": (25,)}, "one multiple of 12 up to 252"),
        ("swin-unetr", {"feature_size": (264,)}, "one multiple of 12 up to 252"),
        ("swin-unetr", {"depths": (2, 2)}, "depths must be 4 numbers from 1 to 24"),
        ("swin-unetr", {"depths": (2, 2, 2, 25)}, "depths must be 4 numbers from 1 to 24"),
        ("swin-unetr", {"num_heads": (5, 6, 12, 24)}, r"divisors of \[24, 48, 96, 192\]"),
        ("swin-unetr", {"num_heads": (3,)}, r"divisors of \[24, 48, 96, 192\]"),
        ("swin-unetr", {"window_size": (23,)}, "product at most 512"),
        ("swin-unetr", {"window_size": (1,)}, "each at least 2"),
        ("swin-unetr", {"window_size": (4, 4, 4)}, "one number, or 2"),
        ("no-such-net", {}, f"known are {', '.join(NETWORKS)}"),
    ],
)
def test_impossible_settings_say_why(name: str, settings, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        make_backbone(name, 2, settings)


@ALL
def test_the_docs_have_a_row_for_it_with_every_setting(name: str) -> None:
    rows = [line for line in DOCS.read_text().splitlines() if line.startswith(f"| `{name}`")]
    assert rows, f"{name} has no row in the first table of docs/networks.md"
    assert all(f"`{setting}`" in rows[0] for setting in NETWORKS[name].defaults), rows[0]
