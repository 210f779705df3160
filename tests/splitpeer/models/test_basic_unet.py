"""The split network is MONAI's BasicUNet, its weights are reproducible, its shapes are known beforehand."""

from __future__ import annotations

import hashlib
import subprocess
import sys

import pytest
import torch
from monai.networks.nets import BasicUNet

from splitpeer.models import (
    build_decoder,
    build_encoder,
    build_split_network,
    site_seed,
    unet_backbone,
)
from splitpeer.models.basic_unet import Decoder

ALL_LEVELS = (0, 1, 2, 3, 4)
FEATURES = (4, 6, 8, 10, 12, 4)
WINDOWS = {2: (32, 48), 3: (32, 16, 32)}
MODALITIES = ("T1", "FLAIR")


def image(dimensions: int, batch: int = 2, seed: int = 0) -> torch.Tensor:
    return torch.randn(batch, 1, *WINDOWS[dimensions], generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dimensions", [2, 3])
def test_one_site_is_basic_unet_bit_for_bit(dimensions: int) -> None:
    network = build_split_network(unet_backbone(dimensions, FEATURES), ["T1"], job_seed=3)
    whole = BasicUNet(dimensions, 1, 3, FEATURES)
    whole.load_state_dict(
        {**network.encoders["T1"].state_dict(), **network.decoder.state_dict()}, strict=True
    )
    x = image(dimensions)
    ours, theirs = network({"T1": x}), whole(x)
    assert torch.equal(ours, theirs)
    ours.square().mean().backward()
    theirs.square().mean().backward()
    mine = {**dict(network.encoders["T1"].named_parameters()), **dict(network.decoder.named_parameters())}
    assert list(mine) == [name for name, _ in whole.named_parameters()]
    for name, parameter in whole.named_parameters():
        assert torch.equal(mine[name].grad, parameter.grad), name


@pytest.mark.parametrize("dimensions", [2, 3])
@pytest.mark.parametrize("levels", [ALL_LEVELS, (1, 2, 3, 4), (0, 2, 4), (4,)])
@pytest.mark.parametrize("fusion", ["concat", "mean"])
def test_levels_and_fusion(dimensions: int, levels: tuple[int, ...], fusion: str) -> None:
    network = build_split_network(unet_backbone(dimensions, FEATURES, levels), MODALITIES, fusion, job_seed=1)
    x = {modality: image(dimensions, seed=index) for index, modality in enumerate(MODALITIES)}
    sent = network.encoders["T1"](x["T1"])
    assert list(sent) == [f"x{level}" for level in levels]
    assert {name: tuple(t.shape) for name, t in sent.items()} == (
        unet_backbone(dimensions, FEATURES, levels).cut.shapes(2, WINDOWS[dimensions])
    )
    logits = network(x)
    assert logits.shape == (2, 3, *WINDOWS[dimensions])
    logits.sum().backward()
    assert all(p.grad is not None for p in network.parameters()), "every parameter takes part in training"


def test_order_of_modalities_is_the_order_of_concatenation() -> None:
    network = build_split_network(unet_backbone(2, FEATURES), MODALITIES, job_seed=1)
    sent = {m: network.encoders[m](image(2, seed=i)) for i, m in enumerate(MODALITIES)}
    again = dict(reversed(sent.items()))
    assert torch.equal(network.decoder(sent), network.decoder(again))
    swapped = {"T1": sent["FLAIR"], "FLAIR": sent["T1"]}
    assert not torch.equal(network.decoder(sent), network.decoder(swapped))


@pytest.mark.parametrize("fusion", ["concat", "mean"])
def test_a_modality_may_be_absent_only_when_said_so(fusion: str) -> None:
    network = build_split_network(unet_backbone(2, FEATURES), MODALITIES, fusion=fusion, job_seed=1)
    t1 = network.encoders["T1"](image(2))
    with pytest.raises(ValueError, match="expected exactly"):
        network.decoder({"T1": t1})
    alone = network.decoder({"T1": t1}, absent=["FLAIR"])
    zeros = {name: torch.zeros_like(t) for name, t in t1.items()}
    same = {"T1": t1, "FLAIR": zeros if fusion == "concat" else t1}
    torch.testing.assert_close(alone, network.decoder(same), rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="expected exactly"):
        network.decoder({}, absent=MODALITIES)


@pytest.mark.parametrize("dimensions", [2, 3])
def test_decoder_starts_from_almost_no_tumour(dimensions: int) -> None:
    decoder = build_decoder(unet_backbone(dimensions, FEATURES), MODALITIES, seed=5)
    assert torch.equal(decoder.final_conv.bias, torch.full((3,), -2.0))


def test_shapes_of_the_default_network() -> None:
    # The table of wire sizes: 240 x 240, one slice, 2,707,200 values.
    shapes = unet_backbone(2, (32, 32, 64, 128, 256, 32)).cut.shapes(1, (240, 240))
    assert shapes["x0"] == (1, 32, 240, 240)
    assert shapes["x4"] == (1, 256, 15, 15)
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) == 2_707_200


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: unet_backbone(2, FEATURES, (0, 1, 2, 3)), "bottleneck"),
        (lambda: unet_backbone(2, FEATURES, (4, 5)), "levels"),
        (lambda: unet_backbone(2, FEATURES, (4, 4)), "levels"),
        (lambda: unet_backbone(4, FEATURES), "dimensions"),
        (lambda: unet_backbone(2, (8, 8)), "six"),
        (lambda: unet_backbone(2, (8, 8, 9, 8, 8, 8)), "even"),
        (lambda: build_decoder(unet_backbone(2, FEATURES), ["T1", "T1"], seed=1), "distinct"),
        (lambda: build_decoder(unet_backbone(2, FEATURES), ["T1"], fusion="product", seed=1), "fusion"),
        (lambda: unet_backbone(2, FEATURES).cut.shapes(1, (96, 100)), "divisible by 16"),
        (lambda: unet_backbone(3, FEATURES).cut.shapes(1, (96, 96)), "3 sizes"),
        (lambda: unet_backbone(2, FEATURES).cut.shapes(1, (16, 16)), "32"),
        (
            lambda: build_encoder(unet_backbone(2, FEATURES), seed=1)(torch.zeros(1, 1, 24, 32)),
            "divisible by 16",
        ),
    ],
)
def test_impossible_settings_say_why(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_levels_that_do_not_match_are_refused() -> None:
    network = build_split_network(unet_backbone(2, FEATURES), ["T1"], job_seed=1)
    sent = network.encoders["T1"](image(2))
    with pytest.raises(ValueError, match="T1 sent"):
        network.decoder({"T1": {name: t for name, t in sent.items() if name != "x0"}})


def fingerprint(module: torch.nn.Module) -> str:
    """SHA-256 over every bit of the parameters."""
    return hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in module.parameters())).hexdigest()


def test_same_seed_same_bits_in_another_process() -> None:
    program = (
        "import hashlib, torch; from splitpeer.models import *\n"
        "torch.rand(7)\n"
        "e = build_encoder(unet_backbone(2, (4, 6, 8, 10, 12, 4)), seed=site_seed(11, 'FLAIR'))\n"
        "print(hashlib.sha256(b''.join(p.detach().numpy().tobytes() for p in e.parameters())).hexdigest())"
    )
    alone = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    together = build_split_network(unet_backbone(2, FEATURES), MODALITIES, job_seed=11)
    assert alone.strip() == fingerprint(together.encoders["FLAIR"])


def test_building_neither_moves_nor_follows_the_global_generator() -> None:
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    first = build_encoder(unet_backbone(2, FEATURES), seed=4)
    build_encoder(unet_backbone(2, FEATURES), seed=None)
    assert torch.equal(torch.rand(3), expected)
    torch.manual_seed(2)
    assert fingerprint(build_encoder(unet_backbone(2, FEATURES), seed=4)) == fingerprint(first)


def test_without_a_seed_weights_are_private() -> None:
    torch.manual_seed(1)
    first = build_encoder(unet_backbone(2, FEATURES), seed=None)
    torch.manual_seed(1)
    assert fingerprint(build_encoder(unet_backbone(2, FEATURES), seed=None)) != fingerprint(first)


def test_every_bit_of_a_seed_counts() -> None:
    # torch's CPU generator would keep only the low 32 bits: few enough for an attacker to try them all.
    low = build_encoder(unet_backbone(2, FEATURES), seed=5)
    high = build_encoder(unet_backbone(2, FEATURES), seed=5 + (1 << 40))
    assert fingerprint(low) != fingerprint(high)


def test_weights_follow_torchs_own_distribution() -> None:
    wide = (32, 32, 32, 32, 32, 32)
    ours = build_decoder(unet_backbone(2, wide), MODALITIES, seed=1)
    theirs = Decoder(unet_backbone(2, wide), MODALITIES)
    for (name, a), (_, b) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        if a.numel() > 2000:
            assert a.std().item() == pytest.approx(b.std().item(), rel=0.1), name
            assert a.abs().max().item() == pytest.approx(b.abs().max().item(), rel=0.02), name


def test_site_seeds() -> None:
    seeds = {site_seed(job, name) for job in range(20) for name in ("T1", "T2", "coordinator")}
    assert len(seeds) == 60
    assert all(0 <= seed < 1 << 63 for seed in seeds)
    assert site_seed(0, "T1") == site_seed(0, "T1")
