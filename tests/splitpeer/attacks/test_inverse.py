"""Inverse networks: learned from other patients, through the site's network and its defences."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from splitpeer.attacks.base import Knowledge
from splitpeer.attacks.catalogue import make_attack
from splitpeer.attacks.image.inverse import InverseAttack, Refined
from splitpeer.attacks.runner import run
from splitpeer.errors import AttackImpossible

from .image_attacks import encoder, heads, likeness, look

IMAGES, SHADOW = heads(2, 1), {"t1": heads(60, 2)}
SMALL: Any = {"steps": 40, "batch": 8, "width": (8,)}


def test_it_recovers_the_image_from_queries_alone() -> None:
    granted = Knowledge(model=encoder(), queries=True, shadow=SHADOW)
    result = run(InverseAttack(**SMALL), look(IMAGES, encoder()), granted)
    assert result.images.shape == IMAGES.shape and likeness(result.images, IMAGES) > 0.8
    assert "held out" in result.notes[0] and result.settings["steps"] == 40


def test_trained_on_defended_tensors_it_beats_one_that_was_not() -> None:
    view = look(IMAGES, encoder(), defences=["dropout:0.5", "gaussian:1"])
    aware, naive = (
        likeness(run(InverseAttack(**SMALL), view, Knowledge(model=encoder(), shadow=SHADOW, adaptive=a)).images,
                 IMAGES)
        for a in (True, False)
    )  # fmt: skip
    assert aware > naive


def test_patients_are_held_out_and_the_better_of_two_sizes_is_kept() -> None:
    view, patients = look(IMAGES, encoder()), tuple(f"p{n // 6}" for n in range(60))
    granted = Knowledge(model=encoder(), shadow=SHADOW, shadow_patients=patients)
    result = run(InverseAttack(epochs=2, width=(4, 16)), view, granted)
    assert "network of width 16 after" in result.notes[0] and result.merit is not None and result.merit > 0
    assert result.spent is not None and result.spent.effort == "epochs 2"
    # What the patients who are held out look like teaches it nothing.
    spoiled = {"t1": SHADOW["t1"].copy()}
    spoiled["t1"][54:] = 0
    small = InverseAttack(epochs=1, width=(4,))
    first, again = (run(small, view, replace(granted, shadow=held)).images for held in (SHADOW, spoiled))
    assert np.array_equal(first, again)


def test_refining_improves_it_and_needs_weights() -> None:
    view, granted = look(IMAGES, encoder()), Knowledge(model=encoder(), shadow=SHADOW)
    plain = run(InverseAttack(**SMALL), view, granted)
    refined = run(Refined(iterations=40, **SMALL), view, granted)
    assert likeness(refined.images, IMAGES) > likeness(plain.images, IMAGES) + 0.02
    assert refined.attack == "refined" and refined.settings["iterations"] == 40
    with pytest.raises(AttackImpossible, match="not only queries"):
        run(Refined(), view, replace(granted, queries=True))


def test_augmented_releases_come_back_upright() -> None:
    view = look(IMAGES, encoder(), mode="train", step=6, seeds=(1, 2))
    granted = Knowledge(model=encoder(), weights_step=5, shadow=SHADOW)
    assert likeness(run(InverseAttack(**SMALL), view, granted).images, IMAGES) > 0.7


def test_noise_on_the_image_and_volumes() -> None:
    view = look(IMAGES, encoder(), defences=["image/voxel-noise:0.5"])
    granted = Knowledge(model=encoder(), shadow=SHADOW)
    assert run(Refined(steps=2, width=(8,)), view, granted).images.shape == IMAGES.shape
    network, volumes = encoder(dimensions=3), heads(1, 3, (32, 32, 16))
    granted = Knowledge(model=network, shadow={"t1": heads(4, 4, (32, 32, 16))})
    assert (
        run(InverseAttack(steps=2, batch=2, width=(4,)), look(volumes, network), granted).images.shape
        == volumes.shape
    )


def test_the_same_seed_gives_the_same_bits() -> None:
    view = look(IMAGES, encoder(), defences=["gaussian:1"])
    granted = Knowledge(model=encoder(), shadow=SHADOW)
    first, again, other = (
        run(InverseAttack(steps=3, seed=s, width=(4,)), view, granted).images for s in (0, 0, 1)
    )
    assert np.array_equal(first, again) and not np.array_equal(first, other)


def test_an_interrupt_goes_through() -> None:
    def stop(what: str, done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(InverseAttack(), look(IMAGES, encoder()), Knowledge(model=encoder(), shadow=SHADOW), stop)


def test_what_it_cannot_do_it_says_in_one_line() -> None:
    view = look(IMAGES, encoder())
    cases = {
        "weights or queries": Knowledge(shadow=SHADOW),
        "t1 images of other patients": Knowledge(model=encoder(), shadow={"flair": SHADOW["t1"]}),
        "expected at least two of": Knowledge(model=encoder(), shadow={"t1": heads(4, 1, (48, 48))}),
        "does not fit the capture at x0": Knowledge(model=encoder(levels=(3, 4)), shadow=SHADOW),
    }
    for words, granted in cases.items():
        with pytest.raises(AttackImpossible, match=words) as failure:
            run(InverseAttack(steps=1), view, granted)
        assert "\n" not in str(failure.value)


@pytest.mark.parametrize("name", ["pca", "whitebox", "inverse", "refined", "first-step"])
def test_the_catalogue_knows_them(name: str) -> None:
    attack = make_attack(name, seed=3)
    assert attack.name == name and attack.seed == 3 and attack.plain and attack.source and attack.title
