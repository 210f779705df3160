"""Defences in real jobs: the same live and offline, in training and evaluation, and the same octets whatever breaks."""

from __future__ import annotations

import asyncio
import shutil
import signal
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from splitpeer.data.loader import SiteData
from splitpeer.defences.key import for_peer, from_seed
from splitpeer.defences.randomness import Release
from splitpeer.defences.stack import defend, make_stack
from splitpeer.errors import ConfigError
from splitpeer.site import job as site_job
from splitpeer.storage import checkpoint
from splitpeer.training.forms import WireForm

EVERYTHING = ["bottleneck:2@0,1", "adversary:0.5,networks=2,restart=6,width=4", "clip:60", "gaussian:0.3",
              "laplace:0.1", "dropout:0.3"]  # fmt: skip
POLICY = {"coordinators", "defences", "image_defences"}
CHANNELS = {"x0": 2, "x1": 4, "x2": 4, "x3": 8, "x4": 8}


class Wire:
    """What every site sent and got, by (modality, mode, step, batch), each time it happened."""

    def __init__(self) -> None:
        self.sent: dict[tuple[str, str, int, int], list[tuple[object, object]]] = defaultdict(list)
        self.got: dict[tuple[str, int], list[dict[str, np.ndarray]]] = defaultdict(list)

    def first(
        self, modality: str, mode: str = "train", step: int = 1
    ) -> tuple[object, dict[str, np.ndarray]]:
        """(Forward, tensors) of the first batch."""
        forward, sent = self.sent[modality, mode, step, 0][0]
        return forward, sent.tensors

    def repeated(self) -> int:
        """How many batches left more than once; each time with the same octets."""
        count = 0
        for times in self.sent.values():
            octets = {b"".join(array.tobytes() for array in sent.tensors.values()) for _, sent in times}
            assert len(octets) == 1
            count += len(times) > 1
        return count


@pytest.fixture
def wire(monkeypatch: pytest.MonkeyPatch) -> Iterator[Wire]:
    seen = Wire()
    forward, apply = site_job.SiteJob.forward, site_job.SiteJob.apply

    def listened(self, asked):
        sent = forward(self, asked)
        seen.sent[self.seats[0].name, asked.mode, asked.step, asked.batch].append((asked, sent))
        return sent

    def heard(self, gradients):
        seen.got[self.seats[0].name, gradients.step].append(gradients.tensors)
        apply(self, gradients)

    monkeypatch.setattr(site_job.SiteJob, "forward", listened)
    monkeypatch.setattr(site_job.SiteJob, "apply", heard)
    return seen


def release_of(forward, run: bytes = b"", target: np.ndarray | None = None) -> Release:
    return Release(run, forward.mode, forward.step, forward.batch, forward.samples, target)


def stack_of(written: list[str], key: bytes, **options: object):
    return make_stack(written, key=key, channels=CHANNELS, dimensions=2, **options)


def digest_of(state: Path) -> str:
    """Of what one party's half was after the first step."""
    (run,) = [path for path in state.iterdir() if [*path.glob("step-*")]]
    return checkpoint.load(run, 1)[2]


def same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return list(a) == list(b) and all(a[name].tobytes() == b[name].tobytes() for name in a)


async def run_of(scene, wire: Wire, number: int, policy=None, hub=None, **job) -> Wire:
    """One job with its own states; what went over the wire in it."""
    scene.cast("flair", "t1", **job)
    scene.coordinator(runtime={"initial_weights": 7}, peer={"state": f"state-{number}"})
    for modality in scene.modalities:
        given = {"coordinators": ["hub"], **((policy or {}) if modality == "t1" else {})}
        scene.client(modality, peer={"state": f"state-{number}"}, policy=given)
    wire.sent.clear()
    wire.got.clear()
    ran = await scene.together()
    assert ran.result is not None, ran
    assert ran.result.complete, ran
    seen = Wire()
    seen.sent.update({k: list(v) for k, v in wire.sent.items()})
    seen.got.update({k: list(v) for k, v in wire.got.items()})
    return seen


async def test_clean_traffic_defended_offline_is_what_the_live_defence_sends(scene, wire) -> None:
    written = ["clip:60", "gaussian:0.5", "dropout:0.4", "quantise:6@0"]
    short = {"training": {"steps": 2}}
    clean = await run_of(scene, wire, 0, **short)
    live = await run_of(scene, wire, 1, {"defences": written}, **short)
    stack = stack_of(written, from_seed(7, "site-t1"))
    forward, recorded = clean.first("t1")
    again, sent = live.first("t1")
    assert again.digest == forward.digest
    assert same(defend(stack, recorded, release_of(forward, b"any run")), sent)
    assert not same(recorded, sent)
    assert same(clean.first("flair")[1], live.first("flair")[1]), "the other site defends nothing"
    # Evaluation too. (The clean run's weights are others by then; the share of zeros is not.)
    _, evaluated = live.first("t1", "evaluate", 2)
    assert (evaluated["x0"] == 0).mean() == pytest.approx(0.4, abs=0.1)
    assert all(array.shape[1] == CHANNELS[name] for name, array in evaluated.items())
    narrow = await run_of(scene, wire, 2, {"defences": written}, training={"steps": 1, "precision": "bf16"})
    assert same(WireForm("bf16").to_wire(sent), narrow.first("t1")[1]), "the wire's precision comes last"


async def test_what_a_site_does_is_announced_and_what_the_coordinator_does_too(
    scene, wire, monkeypatch
) -> None:
    """SP-11-30."""
    from splitpeer.site.client import Client

    offers, jobs = [], []
    join = Client._join

    async def joined(self, session):
        job = await join(self, session)
        jobs.append(job)
        return job

    def offered(offer, *arguments):
        offers.append(offer)
        return judge(offer, *arguments)

    from splitpeer.site import client

    judge = client.judge
    monkeypatch.setattr(client, "judge", offered)
    monkeypatch.setattr(Client, "_join", joined)
    await run_of(
        scene,
        wire,
        0,
        {"defences": ["dropout:0.5"], "image_defences": ["voxel-noise:0.3"]},
        training={"steps": 1},
        defences={"gradients": ["max-norm"]},
    )
    assert {offer.defences for offer in offers} == {("max-norm",)}
    by_site = {job.seats[0].name: job.defences for job in jobs}
    assert by_site == {
        "flair": (),
        "t1": ("image/voxel-noise:scale=0.3,background=false", "dropout:rate=0.5,kept=false,rescale=false"),
    }


async def test_gradients_are_defended_for_each_site_and_not_for_the_decoder(scene, wire) -> None:
    written, short = ["marvell:0.3", "gaussian:0.5", "dropout:0.2"], {"training": {"steps": 1}}
    clean = await run_of(scene, wire, 0, **short)
    loss = scene.losses()
    decoder = digest_of(scene.folder / "hub" / "state-0")
    live = await run_of(scene, wire, 1, **short, defences={"gradients": written})
    assert scene.losses() == loss
    assert digest_of(scene.folder / "hub" / "state-1") == decoder
    forward, _ = clean.first("t1")
    target = SiteData(scene.masks()).batch(forward.samples, (32, 32, 1), forward.seed, None)
    for modality in scene.modalities:
        key = for_peer(from_seed(7, "hub"), f"site-{modality}")
        expected = defend(stack_of(written, key, place="gradients"), clean.got[modality, 1][0],
                          release_of(forward, target=target))  # fmt: skip
        assert same(expected, live.got[modality, 1][0])
    assert not same(live.got["t1", 1][0], clean.got["t1", 1][0])


async def test_image_noise_is_the_same_in_training_and_evaluation(scene, wire, monkeypatch) -> None:
    """What the encoder is given is one noisy volume, cut and turned."""
    shown = []
    batch = SiteData.batch

    def looked(self, samples, window, seed, modality, **options):
        arrays = batch(self, samples, window, seed, modality, **options)
        if modality == "t1" and self.image_defences:
            shown.append((samples, window, seed, arrays, self))
        return arrays

    monkeypatch.setattr(SiteData, "batch", looked)
    await run_of(scene, wire, 0, {"image_defences": ["voxel-noise:0.5"]}, training={"steps": 2})
    assert {seed is None for *_, seed, _, _ in shown} == {True, False}

    class Noisy:
        """Volumes whose noise is in them."""

        def __init__(self, data: SiteData) -> None:
            self._data, self._made = data, {}

        def window(self, key, origin, size):
            if key not in self._made:
                volumes, shape = self._data.volumes, self._data.volumes.geometry(key).shape
                whole = volumes.window(key, (0, 0, 0), shape)
                self._made[key] = self._data.image_defences.window(whole, key, (0, 0, 0), shape)
            pad = np.pad(self._made[key], [(0, 0)] + [(64, 64)] * 3)
            return pad[
                (slice(None), *(slice(o + 64, o + 64 + n) for o, n in zip(origin, size, strict=True)))
            ].copy()

    noisy = SiteData(Noisy(shown[0][-1]))
    for samples, window, seed, arrays, _ in shown:
        assert np.array_equal(arrays, batch(noisy, samples, window, seed, "t1"))


async def test_the_key_is_the_sites_own_unless_runs_are_to_repeat(scene, wire) -> None:
    scene.cast("flair", "t1", training={"steps": 1})
    for modality, policy in (("flair", {}), ("t1", {"defences": ["gaussian:1"]})):
        scene.client(
            modality, runtime={"initial_weights": "private"}, policy={"coordinators": ["hub"], **policy}
        )
    ran = await scene.together()
    assert ran.result is not None, ran
    assert not (scene.folder / "site-flair" / "state" / "defence.key").exists()
    path = scene.folder / "site-t1" / "state" / "defence.key"
    assert path.stat().st_mode & 0o777 == 0o600
    forward, sent = wire.first("t1")
    assert len(path.read_bytes()) == 32
    assert len(forward.samples) == len(sent["x0"])


# --- whatever breaks ---------------------------------------------------------------------------------------


async def until(true, on, timeout: float = 60.0) -> None:
    async with asyncio.timeout(timeout):
        while not true():
            assert not {name: task.exception() for name, task in on.tasks.items() if task.done()}
            await asyncio.sleep(0.002)


def defended(scene, **job) -> None:
    scene.cast("flair", "t1", **job)
    scene.coordinator(runtime={"initial_weights": 7})
    for modality in scene.modalities:
        scene.client(modality, policy={"coordinators": ["hub"], "defences": EVERYTHING,
                                       "image_defences": ["voxel-noise:0.2"]})  # fmt: skip


async def test_lost_links_and_rollbacks_send_the_same_octets_again(scene, wire, monkeypatch) -> None:
    """SP-11-16, SP-11-34."""
    from splitpeer.site import client
    from splitproto import dial
    from splitproto.errors import LinkLost

    defended(
        scene,
        training={"steps": 14, "checkpoint_every": 100},
        evaluation={"every": 7, "overlap": 0.25, "batch": 32},
        defences={"gradients": ["max-norm", "laplace:0.2"]},
    )
    cuts: list[tuple[str, int]] = []

    async def fragile(*arguments, **keywords):
        session = await dial(*arguments, **keywords)
        send = session.send

        async def cutting(sent, *arguments, **keywords):
            due = (type(sent).__name__, getattr(sent, "step", None))
            if due in (("Activations", 3), ("Activations", 7)) and cuts.count(due) < 2:
                cuts.append(due)
                session.carrier_lost(LinkLost("cut by the test"))
                return
            await send(sent, *arguments, **keywords)

        session.send = cutting
        return session

    monkeypatch.setattr(client, "dial", fragile)
    async with scene.running() as on:
        await until(lambda: len(scene.losses()) >= 9, on)
        # The site comes back without its checkpoints, but with its key: all go back to the start.
        on.stops["site-t1"].set()
        await asyncio.wait((on.tasks.pop("site-t1"),), timeout=60)
        (key,) = (scene.folder / "site-t1").rglob("holder.key")
        kept = scene.folder / "site-t1" / "lost" / key.parent.name
        kept.mkdir(parents=True, mode=0o700)
        shutil.copy2(key, kept)
        state = {"peer": {"state": "lost"}}
        scene.client("t1", **state, policy=scene.config("site-t1").policy.model_dump(include=POLICY))
        async with scene.running(only=["site-t1"]) as second:
            await asyncio.wait((on.tasks["hub"], second.tasks["site-t1"]), timeout=60)
            assert on.tasks["hub"].exception() is None
            assert second.tasks["site-t1"].exception() is None
    assert len(cuts) == 4
    (rollback,) = [line["step"] for line in scene.metrics() if line.get("rollback")]
    assert rollback == 0
    assert wire.repeated() >= 2 * 9
    for (modality, step), times in wire.got.items():
        assert all(same(times[0], other) for other in times), (modality, step)
    first: dict[int, float] = {}
    for line in scene.metrics():
        if "loss" in line:
            assert line["loss"] == first.setdefault(line["step"], line["loss"])


async def test_killed_and_started_again_it_ends_as_if_nothing_had_been(scene, wire) -> None:
    """A site's process is killed; losses and all that was trained are those of a run that was left alone."""
    job = {"training": {"steps": 14, "checkpoint_every": 4}, "defences": {"gradients": ["gaussian:0.3"]}}
    defended(scene, **job)
    hub, clients = scene.start_all()
    await asyncio.to_thread(scene.until_step, 6)
    clients["t1"].signal(signal.SIGKILL)
    await asyncio.to_thread(hub.until, r"site\.(left|lost) .*site-t1")
    again = scene.start("site-t1")
    assert await asyncio.to_thread(hub.code) == 0, hub.said
    assert await asyncio.to_thread(again.code) == 0, again.said
    assert any(line.get("rollback") for line in scene.metrics())
    losses, weights = scene.losses(), scene.weights(14)
    for who in ("hub", "site-flair", "site-t1"):
        (scene.folder / who / "state").rename(scene.folder / who / "state-killed")
    ran = await scene.together()
    assert ran.result is not None, ran
    assert scene.losses() == losses
    undisturbed = scene.weights(14)
    assert undisturbed.keys() == weights.keys()
    assert [name for name in weights if not torch.equal(weights[name], undisturbed[name])] == []
    assert "encoders.t1.stack.defences.0.squeeze.x0.weight" in weights


# --- settings ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("policy", "text"),
    [
        (
            {"defences": ["dropout:2"]},
            r"\[policy\] defences: 'dropout:2': rate must be a number from 0 to 1, not '2'",
        ),
        (
            {"defences": ["blur"]},
            r"\[policy\] defences: defence 'blur' is unknown; known are adversary, bottleneck",
        ),
        ({"defences": ["marvell:0.3"]}, r"\[policy\] defences: marvell defends gradients, not activations"),
        (
            {"image_defences": ["gaussian:1"]},
            r"\[policy\] image_defences: gaussian defends activations and gradients",
        ),
        ({"defences": "dropout:0.5"}, r"\[policy\] defences must be a valid list"),
    ],
)
def test_a_policy_that_cannot_be_kept_is_refused_in_one_line(scene, policy, text: str) -> None:
    scene.cast("t1")
    scene.client("t1", policy={"coordinators": ["hub"], **policy})
    with pytest.raises(ConfigError, match=text) as caught:
        scene.config("site-t1")
    assert "\n" not in str(caught.value)


def test_gradient_defences_of_a_job(scene) -> None:
    scene.cast("t1", defences={"gradients": ["bottleneck:2"]})
    with pytest.raises(
        ConfigError, match=r"\[defences\] gradients: bottleneck defends activations, not gradients"
    ):
        _ = scene.settings
    scene.cast("t1", model={"levels": [1, 4]}, defences={"gradients": ["gaussian:1@0"]})
    from splitpeer.coordinator.coordinator import Coordinator
    from splitpeer.daemon.console import LogView

    with pytest.raises(
        ConfigError, match=r"job\.toml: \[defences\] gradients: .*level 0 is not sent; sent are x1, x4"
    ):
        Coordinator(scene.config("hub"), scene.settings, asyncio.Event(), LogView())
