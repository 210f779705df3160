"""What a bundle's own code computes is what this project's networks compute; in ONNX but for rounding."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from splitpeer.export import networks, onnx_file
from splitpeer.export.bundle import SCRIPTS
from splitpeer.export.half import DECODER, DECODER_FILE, ENCODERS, Half, built, encoder_file
from splitpeer.export.scripts.network import Encoders, SplitNetwork, as_read
from splitpeer.models import build_decoder, build_encoder
from splitpeer.models.cut import Backbone
from splitpeer.models.registry import NETWORKS, make_backbone
from splitpeer.training.forms import WireForm
from splitproto.codings import CODINGS, decode, encode

SMALL: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "basic-unet": ({"features": [2, 4, 4, 8, 8, 4]}, (32, 32, 32)),
    "residual-unet": ({"features": [2, 4, 4]}, (16, 16, 8)),
    "swin-unetr": ({"feature_size": [12], "window_size": [2]}, (64, 32, 32)),
}
CHANNELS = {"a": 1, "b": 2}


def halves(
    backbone: Backbone, fusion: str, window: tuple[int, ...]
) -> tuple[Half, Half, torch.Tensor, torch.Tensor]:
    """Encoders and decoder as exported, an image of all seats, and the logits of this project's own network."""
    encoders = {seat: build_encoder(backbone, count, seed=1).eval() for seat, count in CHANNELS.items()}
    decoder = build_decoder(backbone, tuple(CHANNELS), fusion, seed=2).eval()
    source = torch.Generator().manual_seed(3)
    x = torch.randn(2, sum(CHANNELS.values()), *window[: backbone.dimensions], generator=source)
    with torch.no_grad():
        parts = dict(zip(CHANNELS, x.split(list(CHANNELS.values()), 1), strict=True))
        logits = decoder({seat: encoders[seat](part) for seat, part in parts.items()})
    cut, size = backbone.cut, list(window[: backbone.dimensions])
    facts = {
        "party": "x", "window": size, "precision": "f32", "sum": None,
        "cut": {cut.levels[n].name: [cut.levels[n].channels, list(cut.shape(n, size)[1:])] for n in cut.sent},
        "seats": {seat: [str(n) for n in range(count)] for seat, count in CHANNELS.items()},
    }  # fmt: skip
    made = {seat: networks.encoder(backbone, count) for seat, count in CHANNELS.items()}
    weights = {encoder_file(seat): network.state_dict() for seat, network in encoders.items()}
    fused = networks.decoder(backbone, tuple(CHANNELS), fusion, 3)
    return (
        Half({**facts, "kind": ENCODERS, "encoders": made}, weights),
        Half({**facts, "kind": DECODER, "decoder": fused}, {DECODER_FILE: decoder.state_dict()}),
        x,
        logits,
    )


@pytest.mark.parametrize("dimensions", [2, 3])
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("narrow", [False, True])
def test_a_bundle_computes_what_the_run_did_bit_for_bit(network, dimensions, narrow) -> None:
    settings, window = SMALL[network]
    whole = make_backbone(network, dimensions, settings)
    levels = (1, whole.cut.bottleneck)
    backbone = make_backbone(network, dimensions, settings, levels, (1, 2)) if narrow else whole
    for fusion in ("concat", "mean") if dimensions == 2 else ("concat",):
        encoders, decoder, x, logits = halves(backbone, fusion, window)
        joined = SplitNetwork(built(encoders), built(decoder)).eval()
        with torch.no_grad():
            assert torch.equal(joined(x), logits)


@pytest.mark.parametrize("coding", CODINGS)
@pytest.mark.parametrize("shape", [(3, 5, 7, 3), (2, 8, 16, 16), (1, 2, 4, 4, 4)])
def test_levels_are_read_as_the_coordinator_reads_them(coding: str, shape: tuple[int, ...]) -> None:
    """SP-11.21-3, SP-11.21-4."""
    drawn = np.random.default_rng(4)
    level = (drawn.normal(size=shape) * np.exp(3 * drawn.normal(size=shape))).astype(np.float32)
    level[0, 0] = 0
    read = decode(encode(level, coding), coding, shape[1:])
    assert np.array_equal(as_read(torch.from_numpy(level), coding).numpy(), read)


def test_a_bundle_reads_each_level_as_the_run_did() -> None:
    """SP-11.21-8: a level that is not coded is left as it is."""
    backbone = make_backbone("basic-unet", 2, SMALL["basic-unet"][0])
    encoders, decoder, x, _ = halves(backbone, "concat", (32, 32))
    by_level = dict(zip(backbone.cut.names, ("int4", "f32", "bf16", "f16", "int8"), strict=True))
    shapes = {name: shape[1:] for name, shape in backbone.cut.shapes(1, (32, 32)).items()}
    with torch.no_grad():
        levels = {name: tensor.numpy() for name, tensor in built(encoders)(x).items()}
        read = WireForm(by_level, shapes).read(levels)
        wanted = built(decoder)({name: torch.from_numpy(array) for name, array in read.items()})
        joined = SplitNetwork(built(encoders), built(decoder), by_level).eval()
        assert torch.equal(joined(x), wanted)


def test_seats_that_are_absent_are_zeros() -> None:
    backbone = make_backbone("basic-unet", 2, SMALL["basic-unet"][0])
    encoders, decoder, x, _ = halves(backbone, "concat", (32, 32))
    own = build_decoder(backbone, tuple(CHANNELS), "concat", seed=2).eval()
    made = networks.make({**decoder.facts["decoder"], "absent": ["b"]})
    made.network.load_state_dict(dict(decoder.weights[DECODER_FILE]))
    one = built(encoders, "a")
    with torch.no_grad():
        got = SplitNetwork(Encoders({"a": one.encoders[0]}, CHANNELS, absent=["b"]), made).eval()(x[:, :1])
        sent = {name.removeprefix("a/"): tensor for name, tensor in one(x[:, :1]).items()}
        assert torch.equal(got, own({"a": sent}, absent=["b"]))


@pytest.mark.parametrize(("dimensions", "kind"), [(2, ENCODERS), (3, DECODER)])
def test_onnx_computes_the_same_but_for_rounding(dimensions, kind, capfd, recwarn) -> None:
    backbone = make_backbone("residual-unet", dimensions, {"features": [2, 4]})
    encoders, decoder, *_ = halves(backbone, "concat", (16, 16, 16))
    half = decoder
    if kind == ENCODERS:
        one = {"a": encoders.facts["encoders"]["a"]}
        half = Half({**encoders.facts, "seats": {"a": ["0"]}, "encoders": one}, encoders.weights)
    (made,) = onnx_file.exported(half)
    assert made.apart is not None
    assert made.apart <= onnx_file.tolerance(built(half)) < 1e-4
    said = capfd.readouterr()
    assert (said.out, said.err) == ("", "")
    assert not list(recwarn)


def test_the_code_of_a_bundle_needs_torch_monai_numpy_and_safetensors_alone() -> None:
    folder = Path(networks.built.__file__).parent
    assert {path.name for path in folder.glob("*.py")} == set(SCRIPTS)
    for name in SCRIPTS:
        for node in ast.walk(ast.parse((folder / name).read_text())):
            names = [one.name for one in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            allowed = {
                "__future__",
                "collections",
                "monai",
                "numpy",
                "pathlib",
                "safetensors",
                "torch",
                "typing",
            }
            assert {one.partition(".")[0] for one in names} <= allowed


def test_only_networks_of_a_bundle_are_made() -> None:
    for target in ("os.system", "scripts.network.load", "scripts.network.torch", "scripts.inference.cases"):
        with pytest.raises(ValueError, match="is no network of a bundle"):
            networks.make({"_target_": target})
