"""Codings that differ by level: runs, what is kept of them, and peers that cannot do it or do not keep to it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from splitpeer.attacks.view import coordinator_view
from splitpeer.captures.reader import open_capture
from splitpeer.captures.redefend import defended
from splitpeer.cli import main
from splitpeer.coordinator import remote_site
from splitpeer.coordinator.record import RunRecord, codings_in
from splitpeer.daemon import happenings as h
from splitpeer.errors import ConfigError, JobFailed
from splitpeer.export.half import half_of
from splitpeer.federation.terms import judge
from splitpeer.settings.job import Wire
from splitpeer.site import client
from splitpeer.site.invitation import objections, offer_to
from splitpeer.training import forms
from splitpeer.training.forms import activations_form, in_words
from splitproto.errors import SchemaMismatch, TensorError
from splitproto.messages import Activations, Gradients
from splitproto.negotiation import FEATURES, Offer

from .scene import Scene
from .test_auto import NEVER
from .test_codings import FEW, replay
from .test_frozen import FROZEN, assert_same
from .test_misbehaviour import altered, run

VALUES = [2 * 32**2, 4 * 16**2, 4 * 8**2, 8 * 4**2, 8 * 2**2]
"""Of one sample, by level."""
MIXED = ["int4", "int4", "int8", "f16", "f32"]
BY_LEVEL = dict(zip(("x0", "x1", "x2", "x3", "x4"), MIXED, strict=True))


@pytest.mark.parametrize(
    ("precision", "there", "back"),
    [("f32", MIXED, "int8"), ("f32", ["f32", "f16", "int8", "int4", "f32"], MIXED),
     ("bf16", None, ["bf16", "int4", "f16", "bf16", "int8"]), ("f32", ["f32"] * 5, None)],
)  # fmt: skip
async def test_a_run_is_the_whole_network_with_each_level_as_it_travels(
    scene: Scene, precision: str, there: list[str] | None, back: str | list[str] | None
) -> None:
    """SP-11.21-6, SP-11.21-8: bit for bit, a level that is not coded is exact, and octets are those of each level."""
    wire = {way: coding for way, coding in (("activations", there), ("gradients", back)) if coding}
    scene.cast("flair", "t1", training={**FEW, "precision": precision}, wire=wire)
    ran = await scene.together(curious=("hub",))
    assert ran.result is not None and ran.result.complete, ran
    scene.assert_exact(as_travelled=True)
    if {precision, *(there or ()), *(back or ())} == {"f32"}:
        scene.assert_exact()
        assert defended(open_capture(scene.capture("hub")), {}), (
            "values as they are, so a defence may act on them"
        )
    ways = [one if isinstance(one, list) else [one or precision] * 5 for one in (there, back)]
    octets = 2 * 2 * sum(forms.octets(form, m) for way in ways for form, m in zip(way, VALUES, strict=True))
    # Heads, frames and checkpoints come on top.
    assert octets < ran.result.bytes_per_step < octets + 8000
    sent = next(
        r.message for r in open_capture(scene.capture("hub")).records() if isinstance(r.head, Activations)
    )
    coded = {name: array.dtype == np.uint8 for name, array in sent.tensors.items()}
    assert list(coded.values()) == [form not in ("f32", "bf16") for form in ways[0]]


async def test_a_list_is_of_the_levels_that_are_sent(scene: Scene) -> None:
    """SP-11.21-8: in the order of `levels`, as [model] widths."""
    scene.cast(
        "t1", training=FEW, model={"features": [2, 4, 4, 8, 8, 4], "levels": [1, 4]},
        wire={"activations": ["int4", "f32"], "gradients": ["f32", "int8"]},
    )  # fmt: skip
    ran = await scene.together()
    assert ran.result is not None and ran.result.complete, ran
    scene.assert_exact(as_travelled=True)


async def test_the_bank_keeps_each_level_as_it_came(scene: Scene) -> None:
    """The decoder is trained on what was read, bit for bit."""
    scene.cast("flair", "t1", training={**FROZEN, "steps": 6}, wire={"activations": MIXED})
    ran = await scene.together()
    assert ran.result is not None and ran.result.complete, ran
    assert_same(scene)
    index = json.loads(next((scene.folder / "hub" / "state").glob("*/bank/bank.json")).read_text())
    assert index["precision"] == BY_LEVEL


async def test_one_direction_may_be_measured_where_the_other_is_a_list(scene: Scene) -> None:
    """The coordinator requires every coding that it may choose, and what the list needs (SP-11.22-3)."""
    wire = {"activations": "auto", "gradients": MIXED, "auto_s": NEVER}
    scene.cast("t1", training=FEW, wire=wire)
    ran = await scene.together()
    assert ran.result is not None and ran.result.complete, ran
    record = json.loads((scene.folder / "hub" / "state" / "try.run.json").read_text())
    assert record["codings"] == {"activations": "int4", "gradients": MIXED}


# --- kept, recorded, exported -------------------------------------------------------------------------------


def test_a_run_keeps_its_list_and_is_recorded_exported_and_driven_again(
    scene: Scene, capsys: pytest.CaptureFixture[str]
) -> None:
    """SP-11.21-7: what is attacked is what was read."""
    wire = {"activations": MIXED, "gradients": "int8"}
    scene.cast("flair", "t1", training={**FEW, "steps": 2}, wire=wire)
    ran = asyncio.run(scene.together(curious=("hub", "site-t1")))
    assert ran.result is not None and ran.result.complete, ran

    capture = open_capture(scene.capture("hub"))
    assert capture.header.job is not None and capture.header.job.activations == tuple(MIXED)
    sent = next(
        r.message for r in capture.records() if r.peer == "site-t1" and isinstance(r.head, Activations)
    )
    read = activations_form(capture.header.job).from_wire(sent.tensors)
    assert np.array_equal(read["x4"], sent.tensors["x4"]), "not coded"
    view = coordinator_view(capture, "t1", mode="train", step=1, choose=lambda samples: samples)
    assert view.form == BY_LEVEL
    for shot in (shot for target in view.targets for shot in target.shots):
        assert all(np.array_equal(shot.activations[name], array[shot.index]) for name, array in read.items())

    hub = scene.folder / "hub"
    for site, more in (
        ("hub", ("coordinator", "--config", hub / "peer.toml", "--job", hub / "job.toml")),
        ("site-t1", ("client", "--config", scene.folder / "site-t1" / "peer.toml")),
    ):
        code, shown, error = replay(capsys, scene.capture(site), "--json", "--drive", *more)
        assert code == 0, error + shown
        assert json.loads(shown)["agrees"] and json.loads(shown)["largest"] == 0
    assert in_words(capture.header.job) == "int4 int4 int8 f16 f32, gradients int8"
    code, shown, _ = replay(capsys, scene.capture("hub"))
    assert code == 0 and "int4 int4 int8" in shown
    code, _, error = replay(
        capsys, scene.capture("hub"), "--out", scene.folder / "x.cap", "--defence", "dropout:0.5", "--seed", 1
    )
    assert code == 4 and "sent as int4 int4 int8 f16 f32" in error
    assert half_of(scene.config("hub"), "try", scene.settings).facts["precision"] == BY_LEVEL
    assert half_of(scene.config("site-t1"), "try", None).facts["precision"] == BY_LEVEL

    later = {**wire, "activations": "auto"}
    for other in ({}, {**wire, "activations": "int4"}, {**wire, "activations": MIXED[::-1]}, later):
        scene.job(training={**FEW, "steps": 2}, wire=other)
        with pytest.raises(ConfigError, match="has changed since run"):
            half_of(scene.config("hub"), "try", scene.settings)


@pytest.mark.parametrize(
    "way", ["f32", "auto", [], ["auto"], ["int9"], ["int8", 8], {"int8": 1}, 8, ["f32"] * 17]
)
def test_a_record_names_codings_or_is_refused(way: object) -> None:
    for codings in (
        {"activations": "int8", "gradients": None},
        {"activations": ["f32", "int4"], "gradients": "f16"},
    ):
        assert codings_in({"codings": codings})
        with pytest.raises((ValueError, TypeError)):
            codings_in({"codings": {**codings, "gradients": way}})


def test_a_run_is_resumed_with_its_list_alone(scene: Scene) -> None:
    """SP-11-2: the terms of a run stay."""
    wire = {"activations": MIXED, "gradients": "int8"}
    scene.cast("t1", training=FEW, wire=wire)

    async def until_it_began() -> None:
        async with scene.running() as on:
            while not list((scene.folder / "hub" / "state").glob("try.run.json")):
                assert not on.tasks["hub"].done()
                await asyncio.sleep(0.01)

    asyncio.run(until_it_began())

    def record(resume: bool) -> RunRecord:
        return RunRecord(scene.config("hub"), scene.settings, resume, h.Reporter())

    begun = record(resume=True)
    assert begun.codings == (tuple(MIXED), "int8")
    for other in ({}, {**wire, "activations": "int4"}, {**wire, "activations": MIXED[::-1]},
                  {**wire, "gradients": ["int8"] * 5}, {**wire, "activations": "auto"}):  # fmt: skip
        scene.job(training=FEW, wire=other)
        with pytest.raises(ConfigError) as refused:
            record(resume=True)
        assert "activations travel as int4 int4 int8 f16 f32 and gradients as int8: change it back" in str(
            refused.value
        )
        assert record(resume=False).run != begun.run, "--fresh"


# --- refused ------------------------------------------------------------------------------------------------


SUM = {"model": {"features": [2, 4, 4, 8, 8, 4], "fusion": "secure-sum"}}
FORMS = "f32, bf16, f16, int8, int4"


@pytest.mark.parametrize(
    ("listed", "more", "said"),
    [(MIXED[1:], {}, "lists 4 codings, and 5 levels are sent: write one for each, the finest first"),
     ([*MIXED, "f16"], {}, "lists 6 codings, and 5 levels are sent"),
     (MIXED, {"model": {"features": [2, 4, 4, 8, 8, 4], "levels": [1, 4]}}, "lists 5 codings, and 2 levels are sent"),
     ([], {}, f": [] is not one of {FORMS}"),
     (["int5", *MIXED[1:]], {}, f": 'int5' is not one of {FORMS}"),
     (["none", *MIXED[1:]], {}, f": 'none' is not one of {FORMS}"),
     ([8, *MIXED[1:]], {}, f": 8 is not one of {FORMS}"),
     ([MIXED], {}, f"is not one of {FORMS}"),
     (["auto", *MIXED[1:]], {}, ': "auto" chooses one coding for all levels: write it alone, not in a list'),
     ("f32", {}, ": 'f32' is not one of f16, int8, int4, auto, nor a list with one for each level"),
     (["bf16", *MIXED[1:]], {}, ': "bf16" is not [training] precision, as which a level travels that is not coded: '
      'write "f32"'),
     (MIXED, {"training": {"steps": 1, "precision": "bf16"}}, 'write "bf16"'),
     (MIXED, SUM, "[wire]: what travels of a sum is not coded; remove it")],
)  # fmt: skip
@pytest.mark.parametrize("way", ["activations", "gradients"])
def test_a_list_that_cannot_be_is_one_line(
    scene: Scene, capsys: pytest.CaptureFixture[str], way: str, listed: Any, more: dict[str, Any], said: str
) -> None:
    """Of `config check` and of `serve`."""
    scene.cast("flair", "t1", wire={way: listed}, **more)
    hub = scene.folder / "hub"
    for command in (
        ("config", "check", hub / "job.toml"),
        ("serve", "--config", hub / "peer.toml", "--job", hub / "job.toml"),
    ):
        with pytest.raises(SystemExit) as left:
            main([*map(str, command)])
        (line,) = capsys.readouterr().err.splitlines()
        assert left.value.code == 4 and "job.toml: " in line and said in line, line
        assert f"[wire] {way}" in line or more is SUM


def test_a_list_is_shown_and_loads_again_to_the_same(
    scene: Scene, capsys: pytest.CaptureFixture[str]
) -> None:
    scene.cast("t1", wire={"activations": MIXED, "gradients": "auto"})
    job = scene.folder / "hub" / "job.toml"
    for command in ("check", "show"):
        with pytest.raises(SystemExit) as left:
            main(["config", command, str(job)])
        assert not left.value.code
    shown = capsys.readouterr().out.partition("\n")[2]
    assert 'activations = ["int4", "int4", "int8", "f16", "f32"]' in shown
    job.write_text(shown)
    assert scene.settings.wire == Wire(activations=tuple(MIXED), gradients="auto")


@pytest.mark.parametrize(
    ("wire", "missing"),
    [({"gradients": MIXED}, "coding.levels"), ({"gradients": MIXED}, "coding.f16"),
     ({"activations": "auto", "gradients": MIXED}, "coding.levels")],
)  # fmt: skip
async def test_a_peer_that_cannot_do_it_is_refused_before_the_job(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, wire: dict[str, Any], missing: str
) -> None:
    """SP-10-1, SP-11.21-8, SP-11.22-3."""
    scene.cast("t1", training={"steps": 1}, wire=wire)

    def older(**given: Any) -> Offer:
        return Offer(**{**given, "features": tuple(name for name in given["features"] if name != missing)})

    monkeypatch.setattr(client, "Offer", older)
    async with scene.running() as on:
        await asyncio.wait([on.tasks["site-t1"]], timeout=30)
        error = on.tasks["site-t1"].exception()
    assert error is not None and str(error).endswith(f"the client does not offer {missing}"), error


def test_only_a_list_needs_the_feature(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """A peer without it takes part in any other job."""
    scene.cast("t1", training={"steps": 1}, wire={"activations": "int8", "gradients": "f16"})

    def older(**given: Any) -> Offer:
        return Offer(**{**given, "features": tuple(n for n in given["features"] if n != "coding.levels")})

    monkeypatch.setattr(client, "Offer", older)
    ran = asyncio.run(scene.together())
    assert ran.result is not None and ran.result.complete, ran


@pytest.mark.parametrize("way", ["activations", "gradients"])
@pytest.mark.parametrize(
    ("precision", "refused"), [(["f32", "int4", "int8"], "f16"), (["int4", "int8", "f16"], "f32")]
)
def test_a_site_judges_every_entry(scene: Scene, way: str, precision: list[str], refused: str) -> None:
    """SP-11-2, SP-11.21-8: also that a level is not coded."""
    scene.cast("t1", training={"steps": 1}, wire={"activations": MIXED, "gradients": "int8", way: MIXED})
    if way == "gradients":
        scene.job(training={"steps": 1}, wire={"activations": "int8", "gradients": MIXED})
    scene.client("t1", policy={"coordinators": ["hub"], "precision": precision})
    said = f"precision {refused} is not allowed here (policy: {', '.join(precision)})"
    assert objections(scene.settings, scene.config("site-t1")) == [said]
    ran = asyncio.run(scene.together())
    assert isinstance(ran.error, JobFailed) and said in str(ran.error)


@pytest.mark.parametrize(
    ("listed", "said"),
    [(MIXED[1:], "the job lists 4 codings for the 5 levels that are sent"),
     ([*MIXED, "int8"], "the job lists 6 codings for the 5 levels that are sent"),
     (["bf16", *MIXED[1:]], "the job lists another precision among its codings than f32")],
)  # fmt: skip
def test_a_site_declines_a_list_that_is_not_of_its_levels(scene: Scene, listed: list[str], said: str) -> None:
    """SP-11.21-8: whatever the coordinator's own check says."""
    scene.cast("t1", training={"steps": 1}, wire={"activations": MIXED})
    config, offer = scene.config("site-t1"), offer_to(scene.settings, "site-t1")
    judge(offer, config)
    for way in ("activations", "gradients"):
        wrong = replace(offer, job=replace(offer.job, **{way: tuple(listed)}))
        with pytest.raises(SchemaMismatch) as refused:
            judge(wrong, config)
        assert said in str(refused.value)
    with pytest.raises(SchemaMismatch, match=r"coding\.levels was not agreed"):
        judge(offer, config, [name for name in FEATURES if name not in ("release", "coding.levels")])


def _zeros(tensors: Any) -> Any:
    """Of the shapes that are due: the peer of fifty lines knows no coding."""
    return {n: np.zeros(a.shape, np.uint8 if a.ndim == 2 else np.float32) for n, a in tensors.items()}


def spoiled(level: str) -> Callable[[Any], Any]:
    """With a scale of a level that is NaN."""

    def change(tensors: Any) -> Any:
        array = tensors[level].copy()
        array[0, :2] = (0xC0, 0x7F)
        return {**tensors, level: array}

    return change


def as_another(level: str, octets: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """With a level as something else than the list says."""
    return lambda tensors: {**tensors, level: octets(tensors[level])}


OTHER = {
    "float32 in place of int4": as_another("x1", lambda array: np.zeros((len(array), 4, 16, 16), np.float32)),
    "int8 in place of int4": as_another(
        "x1", lambda array: np.zeros((len(array), forms.octets("int8", VALUES[1])), np.uint8)
    ),
    "int8 in place of float32": as_another(
        "x4", lambda array: np.zeros((len(array), forms.octets("int8", VALUES[4])), np.uint8)
    ),
}


@pytest.mark.parametrize("change", OTHER.values(), ids=OTHER)
async def test_a_site_that_codes_a_level_otherwise_is_named(
    scene: Scene, change: Callable[[Any], Any]
) -> None:
    """SP-11-9, SP-11.21-5: by its descriptors, before memory is taken for values."""
    scene.cast("t1", training={"steps": 1}, wire={"activations": MIXED})
    error, _ = await run(scene, altered(Activations, tensors=lambda t: change(_zeros(t))))
    assert isinstance(error, JobFailed) and "site-t1 sent other tensors than the job describes" in str(error)


async def test_a_scale_is_looked_at_where_the_level_has_one(scene: Scene) -> None:
    """SP-11.21-5."""
    scene.cast("t1", training={"steps": 1}, wire={"activations": MIXED})
    error, _ = await run(scene, altered(Activations, tensors=lambda t: spoiled("x2")(_zeros(t))))
    assert isinstance(error, JobFailed), error
    assert "a scale of a tensor coded as int8 is negative or not finite" in str(error)


@pytest.mark.parametrize(
    ("change", "expected"),
    [(spoiled("x0"), TensorError), *((change, SchemaMismatch) for change in OTHER.values())],
    ids=["spoiled", *OTHER],
)
async def test_a_site_refuses_gradients_that_are_coded_otherwise(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, change: Callable[[Any], Any], expected: type[Exception]
) -> None:
    """SP-11-10, SP-11.21-5: the site's weights stay as they are, and its link ends."""
    scene.cast("t1", training={"steps": 1}, wire={"gradients": MIXED})
    real = Gradients
    monkeypatch.setattr(remote_site, "Gradients", lambda step, tensors: real(step, change(tensors)))
    ran = await scene.together()
    assert isinstance(ran.error, JobFailed), ran
    assert f"{expected.name}" in str(ran.error) or isinstance(ran.clients["site-t1"], expected), ran  # type: ignore[attr-defined]
    (folder,) = (scene.folder / "site-t1" / "state").glob("try-*")
    assert not list(folder.glob("step-00000001*"))
