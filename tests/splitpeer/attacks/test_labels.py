"""What a site reads off its gradients: real split steps on heads with painted tumours, and what defends them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import mannwhitneyu

from splitpeer.attacks.base import Knowledge, Shot, Target, View
from splitpeer.attacks.label.field import GradientField, GradientProjector, pooled
from splitpeer.attacks.label.gradients import GradientCosine, GradientNorm, GradientSlice
from splitpeer.attacks.label.network import GradientNetwork
from splitpeer.attacks.label.schedule import WindowOrder
from splitpeer.attacks.runner import run
from splitpeer.data.augment import augment
from splitpeer.defences.randomness import Release
from splitpeer.defences.stack import defend, make_stack
from splitpeer.errors import AttackImpossible
from splitpeer.models import build_decoder, build_encoder, site_seed, unet_backbone
from splitpeer.training.optimiser import make_optimiser, make_schedule
from splitpeer.training.split_step import ClientHalf, CoordinatorHalf
from splitproto.records import Sample, Seat

FEATURES = (4, 4, 8, 8, 16, 4)
SITES = ("t1", "t2")
WINDOWS = {2: (64, 64), 3: (32, 32, 32)}
COUNT = {2: 8, 3: 2}


@pytest.fixture(autouse=True)
def one_thread():
    """A small network trained in another order of sums is another network."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def heads(dimensions: int, seed: int = 0) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Round noisy heads with a ball of tumour, two contrasts, and the nested masks."""
    source, window = np.random.default_rng(seed), WINDOWS[dimensions]
    grid = np.indices(window) / np.array(window).reshape(-1, *[1] * dimensions) - 0.5
    masks = np.zeros((COUNT[dimensions], 3, *window), np.float32)
    images = {m: source.standard_normal((len(masks), 1, *window)).astype(np.float32) for m in SITES}
    for number in range(len(masks) - 1):  # the last has none
        centre = source.uniform(-0.2, 0.2, dimensions).reshape(-1, *[1] * dimensions)
        away = np.sqrt(((grid - centre) ** 2).sum(axis=0))
        for region, radius in enumerate((0.14, 0.1, 0.06)):
            masks[number, region] = away < radius
        for k, image in enumerate(images.values()):
            image[number, 0] += (1.5 - k) * masks[number, 0]
    head = np.sqrt((grid**2).sum(axis=0)) < 0.45
    return {m: (image * head).astype(np.float32) for m, image in images.items()}, masks


def site_view(
    dimensions: int = 2,
    *,
    seeds: Sequence[int | None] = (None,),
    gradients: Sequence[str] = (),
    frozen: bool = False,
) -> tuple[View, np.ndarray]:
    """What t1 sees of training steps, one for each seed, and the whole tumour."""
    images, masks = heads(dimensions)
    rate = 1e-9 if frozen else 5e-3
    clients = {}
    for site in SITES:
        encoder = build_encoder(unet_backbone(dimensions, FEATURES), seed=site_seed(1, site))
        optimiser = make_optimiser(encoder.parameters(), lr=rate)
        clients[site] = ClientHalf(encoder, optimiser, make_schedule(optimiser, "constant", len(seeds)))
    decoder = build_decoder(unet_backbone(dimensions, FEATURES), SITES, seed=site_seed(1, "coordinator"))
    optimiser = make_optimiser(decoder.parameters(), lr=rate)
    hub = CoordinatorHalf(decoder, optimiser, make_schedule(optimiser, "constant", len(seeds)))
    samples = tuple(Sample(n.to_bytes(16, "big"), (0, 0, n)) for n in range(len(masks)))
    stack = make_stack(
        gradients, key=b"k" * 32, channels={f"x{n}": FEATURES[n] for n in range(5)}, dimensions=dimensions,
        place="gradients",
    )  # fmt: skip
    shots: list[list[Shot]] = [[] for _ in masks]
    for step, seed in enumerate(seeds, 1):

        def posed(arrays: np.ndarray, modality: str | None, seed: int | None = seed) -> np.ndarray:
            if seed is None:
                return arrays
            return np.stack([augment(array, seed, n, modality) for n, array in enumerate(arrays)])

        sent = {site: clients[site].forward(posed(images[site], site)) for site in SITES}
        target = posed(masks, None)
        _, returned = hub.step(sent, target)
        release = Release(b"r" * 16, "train", step, 0, samples, target.astype(np.uint8))
        given = defend(stack, returned["t1"], release) if stack else returned["t1"]
        for site in SITES:
            clients[site].backward(returned[site])
        for n in range(len(masks)):
            shots[n].append(
                Shot("train", step, n, seed, gradients={name: array[n] for name, array in given.items()})
            )
    targets = tuple(Target(sample, tuple(own)) for sample, own in zip(samples, shots, strict=True))
    view = View(
        role="client", site="a", seat=Seat("t1", ("t1",)), seats=(Seat("t1", ("t1",)),),
        backbone=unet_backbone(dimensions, FEATURES), window=WINDOWS[dimensions], targets=targets,
        gradient_defences=stack.specs,
    )  # fmt: skip
    return view, masks[:, 0] > 0


def auc(scores: np.ndarray, truth: np.ndarray) -> float:
    inside, outside = scores[truth], scores[~truth]
    return float(mannwhitneyu(inside, outside).statistic / inside.size / outside.size)


@pytest.mark.parametrize("dimensions", [2, 3])
def test_the_first_gradient_shows_the_tumour(dimensions) -> None:
    view, truth = site_view(dimensions)
    result = run(GradientNorm(), view, Knowledge())
    assert result.goal == "mask" and result.images.shape == truth.shape and result.images.dtype == np.float32
    assert auc(result.images, truth) >= 0.98
    assert result.views == 1
    for level, least in ((0, 0.98), (1, 0.97), (2, 0.9)):
        assert auc(run(GradientNorm(levels=(level,)), view, Knowledge()).images, truth) >= least


def test_scores_lie_in_the_volumes_orientation_whatever_the_augmentation() -> None:
    seeds = (3, 5, 8)
    view, truth = site_view(seeds=seeds)
    result = run(GradientNorm(levels=(0,)), view, Knowledge())
    assert result.views == len(seeds)
    assert auc(result.images, truth) >= 0.995  # .97 where the copies are left as they lie
    only_first = run(GradientNorm(levels=(0,), steps=1), view, Knowledge())
    assert only_first.views == 1


def test_noise_on_gradients_costs_the_plain_attack_more_than_the_adaptive_one() -> None:
    clean, truth = site_view()
    noisy, _ = site_view(gradients=["gaussian:8"])
    before = auc(run(GradientNorm(levels=(0,)), clean, Knowledge()).images, truth)
    plain = run(GradientNorm(levels=(0,)), noisy, Knowledge(adaptive=False))
    adaptive = run(GradientNorm(levels=(0,)), noisy, Knowledge())
    assert auc(plain.images, truth) < before - 0.02
    assert auc(adaptive.images, truth) > auc(plain.images, truth)
    assert adaptive.adaptive and not plain.adaptive


def test_steps_average_noise_away() -> None:
    noisy, truth = site_view(gradients=["gaussian:8"], seeds=(1, 2, 3, 4, 5, 6), frozen=True)
    one = run(GradientNorm(steps=1), noisy, Knowledge())
    all_of_them = run(GradientNorm(), noisy, Knowledge())
    assert auc(all_of_them.images, truth) > auc(one.images, truth) + 0.01


@pytest.mark.parametrize(("defence", "least"), [("max-norm", 0.8), ("marvell:0.3", 0.9), ("iso:1", 0.8)])
def test_noise_drawn_for_each_voxel_alone_does_not_hide_a_tumour_of_many(defence, least) -> None:
    defended, truth = site_view(gradients=[defence], seeds=range(8))
    plain = run(GradientNorm(levels=(0,), steps=1), defended, Knowledge(adaptive=False))
    adaptive = run(GradientNorm(), defended, Knowledge())
    assert auc(adaptive.images, truth) > max(least, auc(plain.images, truth) + 0.1)


def test_max_norm_falls_to_the_mean_of_releases() -> None:
    """Finding B: judged from one release it held best. What averaging must give is derived from the clean gradient.

    At a voxel max-norm sends g (1 + xi), xi of variance (G / |g|)^2 - 1 with G the largest norm. The mean of T releases
    has the norm |g| |1 + z sqrt((G / |g|)^2 - 1) / sqrt(T)| with z standard normal.
    """
    clean, truth = site_view(frozen=True)
    size = np.stack([np.linalg.norm(target.shots[0].gradients["x0"], axis=0) for target in clean.targets])
    source = np.random.default_rng(0)

    def expected(count: int) -> float:
        noise = source.standard_normal(size.shape) * np.sqrt((size.max() ** 2 - size**2) / count)
        return auc(np.abs(size + noise), truth)

    releases = (1, 10, 50)
    defended, _ = site_view(gradients=["max-norm"], seeds=[None] * max(releases), frozen=True)
    voxels, best = {}, {}
    for count in releases:
        mean = pooled(defended, steps=count)
        norms = np.stack([np.linalg.norm(target.shots[0].gradients["x0"], axis=0) for target in mean.targets])
        voxels[count] = auc(norms, truth)
        # About 1,200 voxels of tumour in 8 windows: the AUC of one draw scatters by .01.
        assert voxels[count] == pytest.approx(expected(count), abs=0.05)
        best[count] = auc(run(GradientField(steps=count), defended, Knowledge()).images, truth)
        assert best[count] > voxels[count] - 0.02  # all levels and neighbours do not make it worse
    assert voxels[1] + 0.05 < voxels[10] < voxels[50] - 0.05
    assert best[1] < 0.85 and best[10] > 0.93 and best[50] > 0.98


def test_releases_are_turned_back_before_they_are_averaged() -> None:
    view, truth = site_view(seeds=(3, 5, 8, 13), frozen=True)
    mean = pooled(view)
    assert [len(target.shots) for target in mean.targets] == [1] * len(view.targets)
    assert all(shot.seed is None for target in mean.targets for shot in target.shots)
    assert auc(run(GradientNorm(levels=(0,)), mean, Knowledge()).images, truth) >= 0.99
    groups = pooled(view, together=3)
    assert [len(target.shots) for target in groups.targets] == [2] * len(view.targets)
    found = run(GradientField(together=3), view, Knowledge())
    assert (found.views, found.settings["together"]) == (4, 3)


def test_a_release_of_much_energy_weighs_little() -> None:
    view, _ = site_view(seeds=(None, None), frozen=True)
    loud = tuple(
        Target(t.sample, (t.shots[0], Shot("train", 2, n, None, gradients={
            name: 100 * g for name, g in t.shots[1].gradients.items()})))
        for n, t in enumerate(view.targets)
    )  # fmt: skip
    mean = pooled(View(**{**view.__dict__, "targets": loud}))
    (shot,), quiet = mean.targets[0].shots, view.targets[0].shots[0]
    # Weights 1 and 1e-4: (1 + 100 * 1e-4) / (1 + 1e-4).
    np.testing.assert_allclose(shot.gradients["x0"], 1.0099 * quiet.gradients["x0"], rtol=1e-3, atol=1e-9)


def test_a_network_trained_on_played_jobs_reads_what_max_norm_leaves() -> None:
    """One release: the norm is gone, what neighbours have in common is not. It learns from other decoders alone."""
    view, truth = site_view(gradients=["max-norm"])
    own, _ = heads(2)
    others = [heads(2, seed) for seed in range(10, 14)]
    knowledge = Knowledge(
        shadow={"t1": np.concatenate([images["t1"] for images, _ in others])},
        shadow_masks=np.concatenate([masks for _, masks in others]),
    )
    attack = GradientNetwork(batches=14, steps=60, width=(8,))
    found = run(attack, view, knowledge)
    norm = auc(run(GradientNorm(), view, Knowledge()).images, truth)
    assert auc(found.images, truth) > max(0.8, norm + 0.05)
    assert "their masks" in found.assumptions and "its own images of the patients" not in found.assumptions
    # Who does not know of the defence learns to read sizes, which are gone.
    naive = run(attack, view, replace(knowledge, adaptive=False))
    assert auc(naive.images, truth) < auc(found.images, truth) - 0.1
    both = run(attack, view, replace(knowledge, own_images=own["t1"]))
    assert auc(both.images, truth) > auc(found.images, truth) - 0.02
    assert "its own images of the patients" in both.assumptions
    with pytest.raises(AttackImpossible, match="labels/"):
        run(attack, view, replace(knowledge, shadow_masks=None))
    with pytest.raises(AttackImpossible, match="cannot be simulated"):
        run(attack, replace(view, gradient_defences=("unheard-of:1",)), knowledge)


def test_the_axis_of_the_gradient_needs_no_sign() -> None:
    view, truth = site_view(gradients=["iso:1"], seeds=[None] * 10, frozen=True)
    found = run(GradientProjector(), view, Knowledge())
    assert auc(found.images, truth) > 0.9 and found.views == 10
    flipped = tuple(
        Target(t.sample, tuple(Shot(s.mode, s.step, s.index, s.seed, gradients={
            name: g * (-1) ** s.step for name, g in s.gradients.items()}) for s in t.shots))
        for t in view.targets
    )  # fmt: skip
    turned = View(**{**view.__dict__, "targets": flipped})
    np.testing.assert_array_equal(run(GradientProjector(), turned, Knowledge()).images, found.images)
    assert auc(run(GradientField(), turned, Knowledge()).images, truth) < auc(found.images, truth) - 0.1


def test_direction_and_slice() -> None:
    view, truth = site_view()
    direction = run(GradientCosine(levels=(0,)), view, Knowledge())
    assert auc(direction.images, truth) >= 0.8
    slices = run(GradientSlice(), view, Knowledge())
    assert (slices.images == slices.images[:, :1, :1]).all()  # one score per sample, and it says so
    assert any("where" in note for note in slices.notes)
    scores = slices.images[:, 0, 0]
    assert scores[-1] == scores.min()  # the one without tumour


def test_the_order_of_windows_tells_which_slices_hold_tumour() -> None:
    source, inside, slices = np.random.default_rng(0), range(9, 14), 24
    drawn = [
        int(source.choice(inside) if source.random() < 0.5 else source.integers(slices)) for _ in range(150)
    ]
    targets = tuple(
        Target(Sample(b"p" * 16, (0, 0, z)), tuple(Shot("train", n, 0, None) for n in range(drawn.count(z))))
        for z in range(slices)
    )
    view = View(role="client", site="a", seat=Seat("t1", ("t1",)), seats=(Seat("t1", ("t1",)),),
                backbone=unet_backbone(2, FEATURES, (0, 4)), window=(16, 16), targets=targets)  # fmt: skip
    result = run(WindowOrder(slices=slices), view, Knowledge())
    chance = result.images[:, 0, 0]
    assert chance[list(inside)].min() > 0.5 > np.delete(chance, list(inside)).max()
    assert result.images.shape == (slices, 16, 16)


def test_what_cannot_be_attacked_is_said_in_one_line() -> None:
    view, _ = site_view()
    silent = View(
        **{**view.__dict__, "targets": (Target(view.targets[0].sample, (Shot("train", 1, 0, None),)),)}
    )
    with pytest.raises(AttackImpossible, match="no gradient"):
        run(GradientNorm(), silent, Knowledge())
    with pytest.raises(AttackImpossible, match="site's capture"):
        run(GradientNorm(), View(**{**view.__dict__, "role": "coordinator"}), Knowledge())
    with pytest.raises(AttackImpossible, match="level 7"):
        run(GradientNorm(levels=(7,)), view, Knowledge())
    asked = Target(view.targets[0].sample, (Shot("evaluate", 1, 0, None),))
    nothing = View(**{**view.__dict__, "targets": (asked,)})
    with pytest.raises(AttackImpossible, match="no training window"):
        run(WindowOrder(), nothing, Knowledge())


def test_it_can_be_interrupted() -> None:
    def stop(what: str, done: int, total: int) -> None:
        raise KeyboardInterrupt

    view, _ = site_view()
    with pytest.raises(KeyboardInterrupt):
        run(GradientNorm(), view, Knowledge(), stop)
