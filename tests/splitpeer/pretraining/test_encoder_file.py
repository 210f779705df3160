"""The file of an encoder's weights: whole or not at all, and only for the job that it fits."""

from __future__ import annotations

import json
import stat
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch

from splitpeer.errors import DataError
from splitpeer.models import build_encoder, make_backbone
from splitpeer.pretraining import encoder_file
from splitpeer.pretraining.encoder_file import EncoderFacts, Past
from splitpeer.storage import checkpoint

BACKBONE = make_backbone("basic-unet", 2, {"features": (2, 4, 4, 8, 8, 4)})
PAST = Past("phantom", "regions", 240, 500, 8, "adam", 5e-3, None, (3.25, 1.0 / 3))
DESCRIBED = EncoderFacts.of(BACKBONE, ("t1",), ("zscore-nonzero",), (2.0, 2.0, 6.0), (96, 96), [PAST])


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "encoder.safetensors"
    encoder_file.write(path, build_encoder(BACKBONE, seed=4).state_dict(), DESCRIBED)
    return path


def test_what_is_written_is_read(path: Path) -> None:
    found = encoder_file.read(path)
    assert found.described == DESCRIBED
    written = build_encoder(BACKBONE, seed=4).state_dict()
    assert all(torch.equal(written[name], tensor) for name, tensor in found.tensors.items())
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert not found.described.saw_own_images
    assert replace(DESCRIBED, stages=(replace(PAST, data="own"),)).saw_own_images


def test_its_metadata_are_json_that_any_reader_of_safetensors_shows(path: Path) -> None:
    with safetensors.safe_open(path, "pt") as file:
        meta = json.loads(file.metadata()["splitpeer.meta"])
    assert meta["network"] == "basic-unet"
    assert meta["stages"][0]["patients"] == 240
    assert meta["step"] == 500


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"network": "residual-unet"}, "its network: basic-unet, the job's: residual-unet"),
        (
            {"backbone": {"features": (2, 4, 4, 8, 16, 4)}},
            "its cut: 2@1x1 4@2x2 4@4x4 8@8x8 8@16x16, the job's: 2@1x1",
        ),
        ({"backbone": {"features": (2, 4, 4, 8, 8, 6)}}, "its settings: "),
        ({"modalities": ("t2",)}, "its channels: t1, the job's: t2"),
        ({"modalities": ("t1", "t2")}, "its channels: t1, the job's: t1, t2"),
        (
            {"normalisation": ("window:0.0,4.0",)},
            "its normalisation: zscore-nonzero, the job's: window:0.0,4.0",
        ),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(path: Path, change: dict, said: str) -> None:
    if "backbone" in change:
        other = make_backbone("basic-unet", 2, change["backbone"])
        wanted = EncoderFacts.of(other, ("t1",), ("zscore-nonzero",), (), (96, 96))
    else:
        wanted = replace(DESCRIBED, **change)
    with pytest.raises(DataError) as refused:
        encoder_file.read(path).refuse_misfit(wanted)
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


def test_levels_that_are_not_sent_windows_and_spacing_are_the_jobs_affair(path: Path) -> None:
    fewer = make_backbone("basic-unet", 2, {"features": (2, 4, 4, 8, 8, 4)}, (1, 4))
    encoder_file.read(path).refuse_misfit(EncoderFacts.of(fewer, ("t1",), ("zscore-nonzero",), (), (64, 64)))


def test_a_file_that_was_touched_is_refused(path: Path) -> None:
    whole = path.read_bytes()
    for spoilt in (
        whole[:-1],
        whole[: len(whole) // 2],
        b"",
        whole[:-5] + bytes([whole[-5] ^ 1]) + whole[-4:],
    ):
        path.write_bytes(spoilt)
        with pytest.raises(DataError, match="torn or altered"):
            encoder_file.read(path)
    path.unlink()
    with pytest.raises(DataError, match="no such file"):
        encoder_file.read(path)


def test_metadata_that_say_too_little_or_something_newer(path: Path) -> None:
    tensors, meta, _ = checkpoint.read(path)
    for key, said in (("stages", "incomplete"), ("network", "incomplete"), ("edition", "is of edition")):
        fewer = {name: value for name, value in meta.items() if name != key}
        path.write_bytes(checkpoint.encode(meta["step"], tensors, fewer)[0])
        with pytest.raises(DataError, match=said):
            encoder_file.read(path)


@pytest.mark.parametrize(
    ("stages", "said"),
    [
        ([{"rate": None}], "incomplete or contradicts itself"),
        ([{"noise": None}], "incomplete or contradicts itself"),
        ([{"noise": -0.1}], "incomplete or contradicts itself"),
        ([{"rate": "nan"}], "incomplete or contradicts itself"),
        ([{"rate": True}], "incomplete or contradicts itself"),
        ([{"bound": 1.0}], "incomplete or contradicts itself"),
        # Steps without noise teach an encoder to show images again.
        ([{"noise": 0.2, "rate": 1.0}, {}], "incomplete or contradicts itself"),
    ],
)
def test_what_an_encoder_learned_behind_is_said_and_not_guessed(
    path: Path, stages: list[dict[str, Any]], said: str
) -> None:
    """A default would let an encoder pass for one that learned behind noise, or hide that it did."""
    tensors, meta, _ = checkpoint.read(path)
    (usual,) = meta["stages"]
    gone = {name for change in stages for name, value in change.items() if value is None}
    meta["stages"] = [
        {name: value for name, value in {**usual, **change}.items() if name not in gone} for change in stages
    ]
    path.write_bytes(checkpoint.encode(meta["step"], tensors, meta)[0])
    with pytest.raises(DataError, match=said):
        encoder_file.read(path)


def test_noise_and_its_price_are_those_of_the_last_stage(path: Path) -> None:
    tensors = encoder_file.read(path).tensors
    first, last = replace(PAST, noise=0.5, rate=3.0), replace(PAST, noise=0.2, rate=1.0)
    encoder_file.write(path, tensors, replace(DESCRIBED, stages=(first, last)))
    described = encoder_file.read(path).described
    assert (described.noise, described.rate) == (0.2, 1.0)


def test_weights_of_another_shape_or_without_numbers_change_nothing(path: Path) -> None:
    encoder = build_encoder(BACKBONE, seed=9)
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    found = encoder_file.read(path)
    name = next(iter(found.tensors))
    for bad, said in (
        ({name: found.tensors[name]}, "not those of this encoder"),
        ({**found.tensors, name: found.tensors[name][:1]}, "not those of this encoder"),
        ({**found.tensors, name: found.tensors[name] * float("nan")}, "not finite"),
    ):
        with pytest.raises(DataError, match=said):
            replace(found, tensors=bad).load_into(encoder)
        assert all(torch.equal(before[one], tensor) for one, tensor in encoder.state_dict().items())
    found.load_into(encoder)
    assert all(torch.equal(found.tensors[one], tensor) for one, tensor in encoder.state_dict().items())
