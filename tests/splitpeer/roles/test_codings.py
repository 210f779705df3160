"""Codings of activations and gradients: runs, banks, captures, and peers that do not keep to them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from splitpeer.attacks.view import coordinator_view, site_view
from splitpeer.captures.reader import open_capture
from splitpeer.cli import main
from splitpeer.coordinator import remote_site
from splitpeer.errors import JobFailed
from splitpeer.site import client
from splitpeer.site.encoders import Encoders
from splitpeer.training import forms, split_round
from splitpeer.training.forms import activations_form
from splitproto import codings
from splitproto.errors import SchemaMismatch, TensorError
from splitproto.messages import Activations, Gradients
from splitproto.negotiation import Offer

from .scene import Scene
from .test_frozen import FROZEN, assert_same
from .test_misbehaviour import altered, run

FEW: dict[str, Any] = {"steps": 4, "batch": 2, "checkpoint_every": 3, "learning_rate": 1e-3}


@pytest.mark.parametrize(
    ("precision", "there", "back"),
    [("f32", "int8", "int8"), ("f32", "f16", "int4"), ("bf16", "int4", None), ("f32", None, "f16"),
     ("bf16", None, None)],
)  # fmt: skip
async def test_a_run_is_the_whole_network_with_the_coding_at_its_cut(
    scene: Scene, precision: str, there: str | None, back: str | None
) -> None:
    """SP-11.8-3, SP-11.21-1, SP-11.21-6: bit for bit, and fewer octets."""
    wire = {name: coding for name, coding in (("activations", there), ("gradients", back)) if coding}
    scene.cast("flair", "t1", training={**FEW, "precision": precision}, wire=wire)
    ran = await scene.together()
    assert ran.result is not None and ran.result.complete, ran
    scene.assert_exact(as_travelled=True)
    exact, read = scene.whole()[1].state_dict(), scene.weights(FEW["steps"])
    assert not all(torch.equal(exact[name], tensor) for name, tensor in read.items())
    values = [2 * 32**2, 4 * 16**2, 4 * 8**2, 8 * 4**2, 8 * 2**2]
    octets = 2 * 2 * sum(forms.octets(one or precision, m) for one in (there, back) for m in values)
    # Heads, frames and checkpoints come on top.
    assert octets < ran.result.bytes_per_step < octets + 8000


async def test_frozen_encoders_release_coded_windows_and_the_bank_keeps_them_so(scene: Scene) -> None:
    """SP-11.21-1, SP-11.21-2: the decoder is trained on what was read, bit for bit."""
    scene.cast("flair", "t1", training={**FROZEN, "steps": 6}, wire={"activations": "int8"})
    ran = await scene.together()
    assert ran.result is not None and ran.result.complete, ran
    assert_same(scene)
    index = json.loads(next((scene.folder / "hub" / "state").glob("*/bank/bank.json")).read_text())
    assert index["precision"] == "int8"
    shapes = {tuple(shape[1:]) for one in index["releases"] for shape in one["tensors"].values()}
    assert (codings.row_octets("int8", 2 * 32**2),) in shapes


# --- recorded -----------------------------------------------------------------------------------------------


@pytest.fixture
def recorded(scene: Scene) -> Iterator[Scene]:
    scene.cast("flair", "t1", training={**FEW, "steps": 2}, wire={"activations": "int4", "gradients": "int8"})
    ran = asyncio.run(scene.together(curious=("hub", "site-t1")))
    assert ran.result is not None and ran.result.complete, ran
    return scene


def replay(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as left:
        main(["replay", *map(str, arguments)])
    said = capsys.readouterr()
    return int(left.value.code or 0), said.out, said.err


def test_an_attack_sees_what_was_read_and_a_peer_that_is_driven_again_says_the_same(
    recorded: Scene, capsys: pytest.CaptureFixture[str]
) -> None:
    """SP-11.21-7."""
    scene = recorded
    capture = open_capture(scene.capture("hub"))
    sent = next(
        r.message for r in capture.records() if r.peer == "site-t1" and isinstance(r.head, Activations)
    )
    read = activations_form(capture.header.job).from_wire(sent.tensors)
    view = coordinator_view(capture, "t1", mode="train", step=1, choose=lambda samples: samples)
    shots = {shot.index: shot for target in view.targets for shot in target.shots}
    for row, shot in shots.items():
        assert shot.activations.keys() == read.keys()
        for name, array in read.items():
            assert np.array_equal(shot.activations[name], array[row])
    assert len(np.unique(shots[0].activations["x4"])) <= 15, "four bits of one block of 32 values"
    mine = site_view(open_capture(scene.capture("site-t1")), "t1", steps=(1,))
    assert mine.targets[0].shots[0].gradients["x0"].shape == (2, 32, 32)
    assert mine.targets[0].shots[0].gradients["x0"].dtype == np.float32

    hub = scene.folder / "hub"
    for site, more in (
        ("hub", ("coordinator", "--config", hub / "peer.toml", "--job", hub / "job.toml")),
        ("site-t1", ("client", "--config", scene.folder / "site-t1" / "peer.toml")),
    ):
        code, shown, error = replay(capsys, scene.capture(site), "--json", "--drive", *more)
        assert code == 0, error + shown
        found = json.loads(shown)
        assert found["agrees"] and found["largest"] == 0 and found["steps"] == 2, found
    code, _, error = replay(
        capsys, scene.capture("hub"), "--out", scene.folder / "x.cap", "--defence", "dropout:0.5", "--seed", 1
    )
    assert code == 4 and "sent as int4" in error


# --- refused ------------------------------------------------------------------------------------------------


async def test_a_peer_that_does_not_know_the_coding_is_refused_before_the_job(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SP-10-1, SP-11.21-1."""
    scene.cast("t1", training={"steps": 1}, wire={"activations": "int8"})

    def older(**given: Any) -> Offer:
        kept = tuple(name for name in given["features"] if not name.startswith("coding."))
        return Offer(**{**given, "features": kept})

    monkeypatch.setattr(client, "Offer", older)
    async with scene.running() as on:
        await asyncio.wait([on.tasks["site-t1"]], timeout=30)
        error = on.tasks["site-t1"].exception()
    assert error is not None and "coding.int8" in str(error), error


def test_a_site_declines_what_its_policy_does_not_list(scene: Scene) -> None:
    """SP-11-2."""
    scene.cast("t1", training={"steps": 1}, wire={"gradients": "int4"})
    scene.client("t1", policy={"coordinators": ["hub"], "precision": ["f32", "int8"]})
    ran = asyncio.run(scene.together())
    assert isinstance(ran.error, JobFailed)
    assert "precision int4 is not allowed here (policy: f32, int8)" in str(ran.error)


def spoiled(tensors: Any) -> Any:
    coded = {name: array.copy() for name, array in tensors.items()}
    coded["x2"][0, :2] = (0xC0, 0x7F)
    return coded


def _read_off(tensors: Any) -> Any:
    """What the peer of fifty lines makes of float32, as octets of the right length."""
    return {name: np.zeros(array.shape, np.uint8) for name, array in tensors.items()}


@pytest.mark.parametrize(
    ("change", "words"),
    [(lambda t: spoiled(_read_off(t)), "a scale of a tensor coded as int8 is negative or not finite"),
     (lambda t: {n: a[:, 1:] for n, a in _read_off(t).items()}, "site-t1 sent other tensors than the job describes")],
)  # fmt: skip
async def test_a_site_whose_octets_are_no_coding_is_named(
    scene: Scene, change: Callable[[Any], Any], words: str
) -> None:
    """SP-11.21-5."""
    scene.cast("t1", training={"steps": 1}, wire={"activations": "int8"})
    error, _ = await run(scene, altered(Activations, tensors=change))
    assert isinstance(error, JobFailed)
    assert words in str(error)


@pytest.mark.parametrize(
    ("change", "expected"),
    [(spoiled, TensorError), (lambda t: {n: a[:, 1:] for n, a in t.items()}, SchemaMismatch),
     (lambda t: {n: np.zeros(a.shape, np.float32) for n, a in t.items()}, SchemaMismatch)],
)  # fmt: skip
async def test_a_site_refuses_gradients_that_are_no_coding(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, change: Callable[[Any], Any], expected: type[Exception]
) -> None:
    """SP-11-10, SP-11.21-5: the site's weights stay as they are, and its link ends."""
    scene.cast("t1", training={"steps": 1}, wire={"gradients": "int8"})
    real = Gradients

    def sent(step: int, tensors: Any) -> Gradients:
        return real(step, change(tensors))

    monkeypatch.setattr(remote_site, "Gradients", sent)
    ran = await scene.together()
    assert isinstance(ran.error, JobFailed), ran
    assert f"{expected.name}" in str(ran.error) or isinstance(ran.clients["site-t1"], expected), ran  # type: ignore[attr-defined]
    (folder,) = (scene.folder / "site-t1" / "state").glob("try-*")
    assert not list(folder.glob("step-00000001*"))


async def test_a_site_whose_activations_are_nan_says_so(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SP-11.21-2: they are not sent; as one line about images, and no error of the wire."""
    scene.cast("t1", training={"steps": 1}, wire={"activations": "int8"})
    right = Encoders.forward

    def spoilt(self: Encoders, *given: Any) -> Any:
        return {
            seat: {name: array * np.float32(np.nan) for name, array in levels.items()}
            for seat, levels in right(self, *given).items()
        }

    monkeypatch.setattr(Encoders, "forward", spoilt)
    ran = await scene.together()
    for error in (ran.error, ran.clients["site-t1"]):
        assert isinstance(error, JobFailed), ran
        assert "the activations of step 1 are not finite numbers: check this site's images" in str(error)


@pytest.mark.parametrize(
    ("wire", "cause"),
    [({"gradients": "int8"}, "the gradients for site site-t1 hold NaN or infinity: lower [training] learning_rate"),
     ({}, "the gradient of x0 at step 0 is not a finite number; lower the learning rate")],
    ids=["coded", "uncoded"],
)  # fmt: skip
async def test_gradients_that_a_defence_spoils_end_the_run_in_one_line(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, wire: dict[str, str], cause: str
) -> None:
    """SP-11.21-2, SP-11-10: coded, the coordinator finds NaN; uncoded, the site does."""
    scene.cast("t1", training={"steps": 1}, wire=wire, defences={"gradients": ["gaussian:1"]})

    def spoilt(_: Any, gradients: Any, __: Any) -> Any:
        return {name: array * np.float32(np.nan) for name, array in gradients.items()}

    monkeypatch.setattr(split_round, "defend", spoilt)
    ran = await scene.together()
    for error in (ran.error, ran.clients["site-t1"]):
        assert isinstance(error, JobFailed) and cause in str(error), ran
        assert "\n" not in str(error)
