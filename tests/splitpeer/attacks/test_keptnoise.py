"""Kept noise hides an image from who has one release of it, not from who has two poses, or two sets of weights."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from splitpeer.attacks.base import Knowledge, Shot, Target, View
from splitpeer.attacks.image.kept_noise import KeptNoise
from splitpeer.attacks.image.whitebox import WhiteBox
from splitpeer.attacks.runner import run
from splitpeer.defences.network import build_network
from splitpeer.defences.randomness import Release
from splitpeer.defences.stack import defend, make_stack
from splitpeer.errors import AttackImpossible
from splitpeer.models import unet_backbone
from splitproto.records import Sample, Seat

from .image_attacks import encoder, heads, look
from .image_attacks import likeness as similar

FEATURES, LEVELS = (6, 6, 6, 6, 6, 6), (0, 1, 2, 3, 4)


def image(number: int) -> np.ndarray:
    y, x = np.mgrid[:32, :32]
    head = ((y - 16) / 14) ** 2 + ((x - 16) / 12) ** 2 < 1
    waves = np.sin(x / (2 + number)) + np.cos(y / (3 + number)) + 2 * (np.hypot(x - 14 - number, y - 17) < 4)
    return ((waves - waves[head].mean()) / waves[head].std() * head).astype(np.float32)[None]


def scene(written: str) -> tuple[View, dict[int, torch.nn.Module], np.ndarray]:
    """Two samples, released under the weights of two steps, with one key."""
    truth = np.stack([image(0), image(1)])
    samples = tuple(Sample(bytes([n] * 16), (0, 0, n)) for n in range(2))
    channels = {f"x{level}": FEATURES[level] for level in LEVELS}
    stack = make_stack(written, key=bytes(32), channels=channels, dimensions=2)
    models = {
        step: build_network(unet_backbone(2, FEATURES, LEVELS), key=bytes(32), seed=step).eval()
        for step in (10, 20)
    }
    shots: list[list[Shot]] = [[], []]
    for step, model in models.items():
        with torch.no_grad():
            clean = {name: z.numpy() for name, z in model(torch.from_numpy(truth)).items()}
        sent = defend(stack, clean, Release(bytes(16), "evaluate", step, 0, samples))
        for n in range(2):
            shots[n].append(Shot("evaluate", step, n, None, {name: array[n] for name, array in sent.items()}))
    targets = tuple(Target(sample, tuple(of)) for sample, of in zip(samples, shots, strict=True))
    view = View(
        "coordinator",
        "site",
        Seat("t1", ("t1",)),
        (Seat("t1", ("t1",)),),
        unet_backbone(2, FEATURES, LEVELS),
        (32, 32),
        targets,
        stack.specs,
    )
    return view, models, truth


def likeness(found: np.ndarray, truth: np.ndarray) -> float:
    inside = truth != 0
    return min(float(np.corrcoef(f[i], t[i])[0, 1]) for f, t, i in zip(found, truth, inside, strict=True))


def test_two_sets_of_weights_see_through_noise_that_one_does_not() -> None:
    view, models, truth = scene("gaussian:3.0,kept=true")
    shadow = {"t1": np.stack([image(n) for n in range(5, 11)])}
    both = run(KeptNoise(iterations=150), view, Knowledge(models=models, shadow=shadow))
    last = Knowledge(model=models[20], weights_step=20, shadow=shadow)
    one = run(WhiteBox(iterations=80), view, last)
    assert likeness(both.images, truth) > 0.99
    assert likeness(one.images, truth) < 0.6
    assert both.views == 2 and "steps 10, 20" in both.assumptions[-1]
    again = run(KeptNoise(iterations=150), view, Knowledge(models=models, shadow=shadow))
    assert np.array_equal(both.images, again.images)


@pytest.mark.parametrize("seeds", [(1, 2, 3, 4), (None, 7, 8, 9)])
def test_several_poses_see_through_noise_that_one_does_not(seeds: tuple[int | None, ...]) -> None:
    """One set of weights is enough: what augmentation does to a window is known, the noise under it stays."""
    truth, network = heads(2, 1), encoder()
    view = look(truth, network, defences=["gaussian:6,kept=true"], mode="train", step=6, seeds=seeds)
    granted = Knowledge(model=network, weights_step=5, shadow={"t1": heads(12, 2)})
    found = run(KeptNoise(iterations=100), view, granted)
    one = replace(view, targets=tuple(Target(t.sample, t.shots[:1]) for t in view.targets))
    single = run(WhiteBox(iterations=60, schedules="joint"), one, granted)
    assert similar(found.images, truth) > 0.95 > 0.6 > similar(single.images, truth)
    assert found.views == len(seeds) and "the weights of the site's encoder" in found.assumptions


def test_weights_are_those_of_each_sample_whatever_the_order() -> None:
    """A sample that was sent under the later weights first is read with the later weights."""
    view, models, truth = scene("gaussian:3.0,kept=true")
    first, second = view.targets
    turned = replace(view, targets=(first, Target(second.sample, second.shots[::-1])))
    shadow = {"t1": np.stack([image(n) for n in range(5, 11)])}
    found = run(KeptNoise(iterations=150), turned, Knowledge(models=models, shadow=shadow))
    assert likeness(found.images, truth) > 0.99


def test_what_it_cannot_use_is_said_in_one_line() -> None:
    view, models, _ = scene("gaussian:1.0,kept=true")
    shadow = {"t1": np.stack([image(5)])}

    def refused(said: str, view: View = view, **granted: object) -> None:
        with pytest.raises(AttackImpossible) as caught:
            run(KeptNoise(iterations=1), view, Knowledge(**granted))  # type: ignore[arg-type]
        assert said in str(caught.value) and "\n" not in str(caught.value)

    refused("same weights, in the same pose", models={20: models[20]}, shadow=shadow)
    refused("the weights of the site's encoder", shadow=shadow)
    refused("the weights of the site's encoder", model=models[20], queries=True, shadow=shadow)
    refused("--knows shadow=", models=models)
    refused("no kept noise", view=replace(view, defences=()), models=models, shadow=shadow)
    fresh = replace(view, defences=("gaussian:scale=1,kept=false",))
    refused("gaussian is between", view=fresh, models=models, shadow=shadow)
    refused("dropout is between", view=replace(view, defences=("dropout:0.5", *view.defences)), models=models,
            shadow=shadow)  # fmt: skip
    single = tuple(Target(t.sample, t.shots[:1]) for t in view.targets)
    refused("same weights", view=replace(view, targets=single), models=models, shadow=shadow)
