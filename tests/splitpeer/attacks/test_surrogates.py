"""Attacks that train networks of their own: PCAT, SDAR, query-free, UnSplit, FORA."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from splitpeer.attacks.base import Attack, Knowledge, Shot, Target, View
from splitpeer.attacks.catalogue import make_attack, reads_traffic
from splitpeer.attacks.image.fora import FORA, mk_mmd
from splitpeer.attacks.image.query_free import QueryFree
from splitpeer.attacks.image.sdar import PCAT, SDAR
from splitpeer.attacks.image.unsplit import UnSplit
from splitpeer.attacks.networks import critic, image_decoder
from splitpeer.attacks.runner import run
from splitpeer.defences.network import build_network
from splitpeer.defences.randomness import Release
from splitpeer.errors import AttackImpossible
from splitpeer.models import build_decoder, site_seed, unet_backbone
from splitproto.records import Sample, Seat

from .watch import painted

FEATURES = (4, 4, 8, 8, 16, 4)
SITES = ("t1", "t2")
WINDOWS = {2: (32, 32), 3: (32, 32, 32)}


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def heads(count: int, dimensions: int, seed: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Round heads with bands of their own, a tumour in most, in two contrasts; and masks."""
    source, window = np.random.default_rng(seed), WINDOWS[dimensions]
    grid = np.indices(window) / 32 - 0.5
    away = np.sqrt((grid**2).sum(axis=0))
    waves = source.uniform(5, 12, (count, dimensions, *[1] * dimensions))
    bands = np.sin((waves * grid).sum(axis=1) + source.uniform(0, 6, (count, *[1] * dimensions)))
    plain = ((bands + 0.5) * (away < 0.45))[:, None].astype(np.float32)
    image, masks = painted(plain, seed)
    return {"t1": image, "t2": (0.5 * plain - image).astype(np.float32)}, masks


def world(dimensions: int = 2, defences: tuple[str, ...] = ()) -> tuple[View, Knowledge, np.ndarray]:
    """What a coordinator saw of t1, what it may know, and the truth."""
    count = 4 if dimensions == 2 else 1
    truth, _ = heads(count, dimensions, seed=1)
    samples = tuple(Sample(n.to_bytes(16, "big"), (0, 0, n)) for n in range(count))
    sent = {}
    for site in SITES:
        network = build_network(unet_backbone(dimensions, FEATURES), written=defences if site == "t1" else (),
                                key=b"k" * 32, seed=site_seed(1, site))  # fmt: skip
        release = (Release(b"r" * 16, "evaluate", 1, 0, samples),) if defences and site == "t1" else ()
        with torch.no_grad():
            sent[site] = {
                name: z.numpy() for name, z in network(torch.from_numpy(truth[site]), *release).items()
            }
    targets = tuple(
        Target(
            sample,
            (
                Shot("evaluate", 1, n, None, {name: z[n] for name, z in sent["t1"].items()},
                     {"t2": {name: z[n] for name, z in sent["t2"].items()}}),
            ),
        )
        for n, sample in enumerate(samples)
    )  # fmt: skip
    view = View(
        role="coordinator", site="a", seat=Seat("t1", ("t1",)),
        seats=tuple(Seat(m, (m,)) for m in SITES), backbone=unet_backbone(dimensions, FEATURES),
        window=WINDOWS[dimensions], targets=targets, defences=defences,
    )  # fmt: skip
    shadow, masks = heads(12 if dimensions == 2 else 2, dimensions, seed=2)
    decoder = build_decoder(unet_backbone(dimensions, FEATURES), SITES, seed=site_seed(1, "coordinator"))
    return view, Knowledge(shadow=shadow, shadow_masks=masks, decoder=decoder), truth["t1"]


def small(kind: type[Attack], seed: int = 0) -> Any:
    settings: dict[type[Attack], dict[str, int]] = {
        PCAT: {"steps": 9, "batch": 4},
        SDAR: {"steps": 9, "batch": 4},
        QueryFree: {"steps": 9, "batch": 4, "iterations": 3},
        UnSplit: {"rounds": 4, "image_steps": 3, "network_steps": 3},
        FORA: {"steps": 4, "inverse_steps": 12, "batch": 4},
    }
    return kind(seed=seed, **settings[kind])


def shortened(attack: Attack, names: Sequence[str], value: int) -> Attack:
    return replace(attack, **{name: value for name in names if hasattr(attack, name)})


def falls(values: Sequence[float]) -> bool:
    third = max(1, len(values) // 3)
    return bool(np.mean(values[-third:]) < np.mean(values[:third]))


ALL = [PCAT, SDAR, QueryFree, UnSplit, FORA]


@pytest.mark.parametrize("kind", ALL)
def test_it_runs_repeats_and_improves_its_own_objective(kind) -> None:
    view, knowledge, truth = world()
    attack = small(kind)
    told: list[tuple[str, int, int]] = []
    result = run(attack, view, knowledge, lambda *state: told.append(state))
    assert result.images.shape == truth.shape and result.images.dtype == np.float32
    assert np.isfinite(result.images).all() and result.images.std() > 0
    assert result.attack == kind.name and result.goal == "image" and result.views == 1
    assert "published" in result.settings and result.settings["seed"] == 0
    assert told and all(done <= total for _, done, total in told)
    if kind is FORA:
        assert falls(result.history["image"])
    elif kind in (PCAT, SDAR):
        assert falls(result.history["task"])
        assert falls(result.history["image"])
        # A discriminator that cannot move adds nothing, and a result with it would say nothing.
        assert kind is PCAT or falls(result.history["discriminator"])
    else:
        assert falls(result.history["loss"])
    assert np.array_equal(run(small(kind), view, knowledge).images, result.images)


def test_another_seed_is_another_adversary() -> None:
    view, knowledge, _ = world()
    results = [run(small(PCAT, seed), view, knowledge).images for seed in (0, 1)]
    assert not np.array_equal(*results)


def test_a_stand_in_recovers_structure() -> None:
    # The decoder is untrained here, so not even the contrast's sign is settled.
    view, knowledge, truth = world()
    found = run(PCAT(steps=60, batch=4, decoder_rate=3e-3), view, knowledge).images
    alike = np.abs(np.corrcoef(found.reshape(4, -1), truth.reshape(4, -1))[:4, 4:])
    own, others = np.diag(alike), alike[~np.eye(4, dtype=bool)]
    assert own.min() > others.max() + 0.1


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize(
    "defences", [("bottleneck:2", "dropout:0.5", "gaussian:1"), ("image/voxel-noise:0.5",)]
)
def test_known_defences_are_simulated(kind, defences) -> None:
    spoken = defences if not defences[0].startswith("image/") else ()
    view, knowledge, truth = world(defences=spoken)
    view = replace(view, defences=defences)
    for adaptive in (True, False):
        quick = shortened(small(kind), ("steps", "inverse_steps", "rounds", "iterations"), 2)
        result = run(quick, view, replace(knowledge, adaptive=adaptive))
        assert result.images.shape == truth.shape and np.isfinite(result.images).all()
        assert result.adaptive == adaptive


@pytest.mark.parametrize("kind", [SDAR, FORA])
def test_critics_see_all_that_was_sent_and_the_rest_only_what_is_attacked(kind) -> None:
    view, knowledge, truth = world()
    attack = shortened(small(kind), ("steps", "inverse_steps"), 2)
    others, _, _ = world(defences=("gaussian:0.1",))
    more = [shot for target in others.targets for shot in target.shots]
    alone = run(attack, view, knowledge)
    # What is the same to the bit is one release.
    twice = replace(view, targets=tuple(replace(t, shots=2 * t.shots) for t in view.targets))
    assert alone.settings["releases"] == run(attack, twice, knowledge).settings["releases"] == len(truth)
    busy = run(attack, replace(view, traffic=lambda: more), knowledge)
    assert busy.settings["releases"] == 2 * len(truth) and busy.images.shape == truth.shape
    turned = [replace(shot, seed=7) for shot in more]
    assert run(attack, replace(view, traffic=lambda: turned), knowledge).settings["releases"] == 2 * len(
        truth
    )


def test_every_learned_attack_has_twenty_epochs_unless_steps_are_given() -> None:
    for name in (
        "inverse",
        "refined",
        "sum-search",
        "query-free",
        "pcat",
        "sdar",
        "fora",
        "gradient-network",
    ):
        settings = make_attack(name).settings()
        assert settings["epochs"] >= 20 and settings["steps"] is None, name
    assert reads_traffic(["pca", "sdar:steps=2"]) and not reads_traffic(["pca", "whitebox", "cafe"])


@pytest.mark.parametrize("kind", ALL)
def test_volumes_too(kind) -> None:
    view, knowledge, truth = world(dimensions=3)
    attack = shortened(
        small(kind),
        ("steps", "inverse_steps", "rounds", "iterations", "image_steps", "network_steps", "batch"),
        1,
    )
    assert run(attack, view, knowledge).images.shape == truth.shape


@pytest.mark.parametrize("kind", ALL)
def test_what_it_lacks_is_said_in_one_line(kind) -> None:
    view, knowledge, _ = world()
    attack = small(kind)

    def refused(view: View, knowledge: Knowledge, match: str) -> None:
        with pytest.raises(AttackImpossible, match=match) as caught:
            run(attack, view, knowledge)
        assert "\n" not in str(caught.value)

    refused(replace(view, role="client"), knowledge, "coordinator's capture")
    refused(replace(view, targets=()), knowledge, "no sample")
    if kind is UnSplit:
        refused(view, replace(knowledge, architecture=False), "which network")
        return
    refused(view, replace(knowledge, shadow={}), "other patients")
    wrong = {m: images[..., :16] for m, images in knowledge.shadow.items()}
    refused(view, replace(knowledge, shadow=wrong), "expected")
    unknown = replace(view, defences=("never-heard-of:1",))
    refused(unknown, knowledge, "cannot be simulated")
    if kind is FORA:
        return
    refused(view, replace(knowledge, shadow={"t1": knowledge.shadow["t1"]}), "t2 images")
    refused(view, replace(knowledge, shadow_masks=None), "masks")
    refused(view, replace(knowledge, shadow_masks=knowledge.shadow_masks[:3]), "equally many")
    refused(view, replace(knowledge, shadow_masks=knowledge.shadow_masks[:, :1]), "regions")
    refused(view, replace(knowledge, decoder=None), "coordinator's half")
    foreign = build_decoder(unet_backbone(2, FEATURES), ("t1",), seed=0)
    refused(view, replace(knowledge, decoder=foreign), "decoder takes")


@pytest.mark.parametrize("kind", ALL)
def test_it_can_be_interrupted_and_leaves_the_decoder_as_it_was(kind) -> None:
    def stop(what: str, done: int, total: int) -> None:
        raise KeyboardInterrupt

    view, knowledge, _ = world()
    before = {name: tensor.clone() for name, tensor in knowledge.decoder.state_dict().items()}
    with pytest.raises(KeyboardInterrupt):
        run(small(kind), view, knowledge, stop)
    assert all(torch.equal(before[name], tensor) for name, tensor in knowledge.decoder.state_dict().items())
    assert all(parameter.requires_grad for parameter in knowledge.decoder.parameters())


def test_mk_mmd_is_zero_for_one_sample_twice_and_grows_with_distance() -> None:
    source = torch.Generator().manual_seed(0)
    a, b = torch.randn((40, 5), generator=source), torch.randn((40, 5), generator=source)
    assert abs(mk_mmd(a, a).item()) < 1e-6
    assert mk_mmd(a, b).item() < mk_mmd(a, b + 1).item() < mk_mmd(a, b + 3).item()


@pytest.mark.parametrize("dimensions", [2, 3])
@pytest.mark.parametrize("levels", [("x0", "x4"), ("x3", "x4"), ("x4",)])
def test_networks_take_any_levels(dimensions, levels) -> None:
    tensors = {name: torch.zeros(2, 4, *[32 // 2 ** int(name[1:])] * dimensions) for name in levels}
    channels, cut = dict.fromkeys(levels, 4), unet_backbone(dimensions, FEATURES).cut
    assert image_decoder(cut, channels, 0)(tensors).shape == (2, 1, *[32] * dimensions)
    assert critic(cut, channels, 0)(tensors).shape == (2,)
