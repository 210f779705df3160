"""`[model] weights` of a site: its run starts from a file of `splitpeer pretrain`, and from that alone."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from splitpeer.errors import ConfigError, DataError
from splitpeer.models import build_encoder
from splitpeer.pretraining import encoder_file
from splitpeer.pretraining.encoder_file import EncoderFacts, Past
from splitpeer.site import first_weights

from .scene import Scene

OTHERS = Past("phantom", "regions", 240, 500, 8, "adam", 5e-3, None, (3.0, 1.0))
OWN = Past("own", "none", 6, 50, 8, "adam", 5e-3, None, (3.0, 1.0))


def write(
    scene: Scene, name: str, *, seed: int = 99, modality: str = "flair", past: Past = OTHERS, **over: Any
) -> Path:
    """An encoder file in the site's folder; random weights are weights like any."""
    backbone = over.pop("backbone", None) or scene.settings.model.backbone()
    rules = [over.pop("rule", "zscore-nonzero")]
    path = scene.folder / "site-flair" / name
    described = EncoderFacts.of(backbone, (modality,), rules, (), scene.settings.data.window, [past])
    encoder_file.write(path, build_encoder(backbone, seed=seed).state_dict(), described)
    return path


@pytest.fixture
def stage(scene: Scene) -> Scene:
    scene.cast("flair", "t1")
    return scene


async def test_a_run_starts_from_the_file(stage: Scene, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    """Bit for bit: it is the whole network with these weights in its place."""
    file = encoder_file.read(write(stage, "pretrained.safetensors"))
    stage.client("flair", model={"weights": "pretrained.safetensors"})
    network = stage.network()
    network.encoders["flair"].load_state_dict(dict(file.tensors))
    with caplog.at_level("INFO"):
        ran = await stage.together()
    assert ran.result.complete, ran
    monkeypatch.setattr(Scene, "network", lambda self: network)
    stage.assert_exact()
    (record,) = (stage.folder / "site-flair" / "state").glob("*/weights.json")
    assert json.loads(record.read_text()) == {
        "flair": {"digest": file.digest, "noise": 0.0, "rate": 0.0, "own": False, "seeded": False}
    }
    accepted = [r.fields for r in caplog.records if r.getMessage() == "job.accepted"]
    assert [fields.get("weights") for fields in accepted].count(f"flair {file.digest}") == 1
    trail = (stage.folder / "site-flair" / "state" / "audit.jsonl").read_text()
    assert file.digest in trail
    assert file.digest not in (stage.folder / "site-t1" / "state" / "audit.jsonl").read_text()


async def test_defences_stand_around_them(stage: Scene) -> None:
    """A defended encoder has the file's weights inside, and no others."""
    write(stage, "pretrained.safetensors")
    weights = {"model": {"weights": {"flair": "pretrained.safetensors"}}}
    stage.client("flair", policy={"defences": ["dropout:0.5"]}, **weights)
    ran = await stage.together()
    assert ran.result.complete, ran
    (record,) = (stage.folder / "site-flair" / "state").glob("*/weights.json")
    assert list(json.loads(record.read_text())) == ["flair"]


async def test_a_resumed_run_keeps_to_its_checkpoints(stage: Scene, caplog: Any) -> None:
    first = encoder_file.read(write(stage, "pretrained.safetensors"))
    stage.client("flair", model={"weights": "pretrained.safetensors"})
    async with stage.running() as on:
        while not any(line.get("step", 0) >= 6 for line in stage.metrics()):
            await _moment()
        for stop in on.stops.values():
            stop.set()
        for task in on.tasks.values():
            await task
    losses = stage.losses()
    assert len(losses) < 12
    # By now the file is another, which must not count.
    write(stage, "pretrained.safetensors", seed=5)
    with caplog.at_level("INFO"):
        ran = await stage.together(resume=True)
    assert ran.result.complete, ran
    assert stage.losses()[: len(losses)] == losses
    accepted = [r.fields.get("weights") for r in caplog.records if r.getMessage() == "job.accepted"]
    assert f"flair {first.digest}" in accepted


async def interrupted(stage: Scene) -> None:
    """A run of which the sites have checkpoints."""
    async with stage.running() as on:
        while not any(line.get("step", 0) >= 6 for line in stage.metrics()):
            await _moment()
        for stop in on.stops.values():
            stop.set()
        for task in on.tasks.values():
            await task
    assert len(stage.losses()) < 12


async def resumed(stage: Scene) -> BaseException | None:
    """How the site's end of the resumed run is."""
    stage.job(deadlines={"join_s": 2})
    return (await stage.together(resume=True)).clients["site-flair"]


async def test_a_resumed_run_is_judged_by_what_its_encoder_learned_behind(stage: Scene) -> None:
    """Not by the file, which may be another by then, nor without looking: the noise must still be added."""
    model = {"weights": "pretrained.safetensors"}
    write(stage, "pretrained.safetensors", past=replace(OTHERS, noise=0.2, rate=1.0))
    enough = {"defences": ["gaussian:0.2"], "min_encoder_noise": 0.2, "min_encoder_rate": 1.0}
    stage.client("flair", model=model, policy=enough)
    await interrupted(stage)
    write(stage, "pretrained.safetensors", past=replace(OTHERS, noise=0.5, rate=9.0))
    for policy, said in (
        ({"defences": ["gaussian:0.1"]}, "learned behind noise of 0.2, and [policy] defences add 0.1"),
        (
            {"min_encoder_noise": 0.3},
            "min_encoder_noise = 0.3, and the encoder of seat flair learned with 0.2",
        ),
        ({"min_encoder_rate": 2.0}, "min_encoder_rate = 2, and the encoder of seat flair learned with 1"),
    ):
        stage.client("flair", model=model, policy={**enough, **policy})
        error = await resumed(stage)
        assert isinstance(error, ConfigError), error
        assert said in str(error) and "weights.json" in str(error)


async def test_a_resumed_run_without_a_record_started_from_random_weights(stage: Scene) -> None:
    await interrupted(stage)
    stage.client("flair", policy={"min_encoder_noise": 0.2, "defences": ["gaussian:0.2"]})
    error = await resumed(stage)
    assert isinstance(error, ConfigError), error
    assert "seat flair starts from random weights" in str(error)


@pytest.mark.parametrize(
    "record",
    [
        b'{"flair": "00ff"}',
        b'{"flair": {"digest": "00", "noise": 0.2, "own": false, "seeded": false}}',
        b'{"flair": {"digest": "00", "noise": true, "rate": 0.0, "own": false, "seeded": false}}',
        b'{"flair": 1}',
        b"[]",
    ],
)
def test_a_record_that_says_something_else_is_not_guessed(tmp_path: Path, record: bytes) -> None:
    (tmp_path / "weights.json").write_bytes(record)
    with pytest.raises(DataError, match=r"weights.json: cannot be read: put it back, or start a new run"):
        first_weights.noted(tmp_path)


async def _moment() -> None:
    import asyncio

    await asyncio.sleep(0.01)


@pytest.mark.parametrize(
    ("over", "model", "said"),
    [
        ({"modality": "t1"}, {}, "its channels: t1, the job's: flair"),
        ({"rule": "none"}, {}, "its normalisation: none, the job's: zscore-nonzero"),
        ({}, {"weights": "gone.safetensors"}, "gone.safetensors: no such file"),
        (
            {},
            {"weights": {"t1": "pretrained.safetensors"}},
            "[model] weights names seat t1, this site fills flair",
        ),
    ],
)
async def test_what_does_not_fit_ends_the_site_in_one_line(
    stage: Scene, over: dict[str, Any], model: dict[str, Any], said: str
) -> None:
    write(stage, "pretrained.safetensors", **over)
    stage.job(deadlines={"join_s": 2})
    stage.client("flair", model={"weights": "pretrained.safetensors", **model})
    ran = await stage.together()
    error = ran.clients["site-flair"]
    assert isinstance(error, DataError | ConfigError)
    assert said in str(error)
    assert error.exit_code == 4
    assert not list((stage.folder / "site-flair" / "state").glob("*/step-*"))


async def test_another_cut_is_refused(stage: Scene) -> None:
    from splitpeer.models import make_backbone

    wider = make_backbone("basic-unet", 2, {"features": (4, 4, 4, 8, 8, 4)})
    write(stage, "pretrained.safetensors", backbone=wider)
    stage.job(deadlines={"join_s": 2})
    stage.client("flair", model={"weights": "pretrained.safetensors"})
    error = (await stage.together()).clients["site-flair"]
    assert "does not fit this job: its cut: 4@1x1" in str(error)
    # The coordinator and the other sites are told in general words.
    assert "pretrained" not in (stage.folder / "hub" / "state" / "audit.jsonl").read_text()


async def test_a_budget_does_not_cover_weights_of_own_images(stage: Scene) -> None:
    write(stage, "pretrained.safetensors", past=OWN)
    stage.job(deadlines={"join_s": 2})
    policy = {"defences": ["dp-gaussian:5.0,clip=1"], "epsilon": 500.0, "delta": 1e-5}
    private = {"initial_weights": "private"}
    stage.client("flair", model={"weights": "pretrained.safetensors"}, policy=policy, runtime=private)
    error = (await stage.together()).clients["site-flair"]
    assert isinstance(error, ConfigError), error
    assert "epsilon promises nothing about weights made from own images" in str(error)


def test_a_file_instead_of_a_network_leaves_the_network_to_the_job(stage: Scene) -> None:
    from splitpeer.federation.terms import backbone_for, job_on_wire

    write(stage, "pretrained.safetensors")
    stage.client("flair", model={"weights": "pretrained.safetensors"})
    config = stage.config("site-flair")
    assert config.model is not None
    assert config.model.network is None
    assert config.model.weights == stage.folder / "site-flair" / "pretrained.safetensors"
    assert backbone_for(job_on_wire(stage.settings), config) == stage.settings.model.backbone()
