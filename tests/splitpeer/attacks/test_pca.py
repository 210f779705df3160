"""The principal component: a picture without any knowledge, from one release, many, or one with gaps."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from splitpeer.attacks.base import Knowledge, View
from splitpeer.attacks.image.pca import PrincipalComponent
from splitpeer.attacks.runner import run
from splitpeer.errors import AttackImpossible

from .image_attacks import encoder, heads, likeness, look


def seen_by_nobody(view: View, adaptive: bool = True, level: int | None = None) -> np.ndarray:
    return run(PrincipalComponent(level=level), view, Knowledge(adaptive=adaptive)).images


def test_it_shows_the_picture_up_to_sign() -> None:
    images = heads(3, 1)
    result = run(PrincipalComponent(), look(images, encoder()), Knowledge())
    assert result.images.shape == (3, 1, 32, 32) and result.images.dtype == np.float32
    assert likeness(result.images, images) > 0.5
    assert result.assumptions == ("which defences run, with their parameters",)
    assert np.allclose(result.images.mean(axis=(2, 3)), 0, atol=1e-5)


def test_the_sign_of_an_eigenvector_is_not_the_librarys_to_choose(monkeypatch: pytest.MonkeyPatch) -> None:
    view, eigh = look(heads(3, 1), encoder()), torch.linalg.eigh
    usual = seen_by_nobody(view)
    monkeypatch.setattr(torch.linalg, "eigh", lambda matrix: (eigh(matrix)[0], -eigh(matrix)[1]))
    assert np.array_equal(seen_by_nobody(view), usual)


def test_gaps_are_filled_by_who_knows_of_dropout() -> None:
    images = heads(4, 2)
    view = look(images, encoder(), defences=["dropout:0.5"])
    aware, naive = (likeness(seen_by_nobody(view, adaptive), images) for adaptive in (True, False))
    assert aware > naive + 0.05


def test_many_views_beat_one_under_fresh_noise() -> None:
    images = heads(4, 3)
    one, many = (
        likeness(seen_by_nobody(look(images, encoder(), defences=["gaussian:3"], views=n)), images)
        for n in (1, 16)
    )
    assert many > one + 0.1


def test_augmented_releases_are_turned_back_before_they_are_taken_together() -> None:
    images = heads(3, 4)
    plain = likeness(seen_by_nobody(look(images, encoder())), images)
    turned = likeness(seen_by_nobody(look(images, encoder(), mode="train", seeds=(1, 2, 3, 4))), images)
    assert turned > 0.8 * plain
    view = look(images, encoder(), mode="train", seeds=(1, 2, 3, 4))
    forgotten = replace(
        view,
        targets=tuple(replace(t, shots=tuple(replace(s, seed=None) for s in t.shots)) for t in view.targets),
    )
    assert turned > likeness(seen_by_nobody(forgotten), images) + 0.1


def test_a_volume_and_a_deeper_level() -> None:
    volumes = heads(2, 5, (32, 32, 16))
    assert seen_by_nobody(look(volumes, encoder(dimensions=3))).shape == (2, 1, 32, 32, 16)
    assert seen_by_nobody(look(heads(2, 5), encoder()), level=2).shape == (2, 1, 32, 32)


def test_what_it_cannot_do_it_says_in_one_line() -> None:
    view = look(heads(2, 6), encoder(levels=(1, 4)))
    cases = {
        "level 0 was not sent": lambda: seen_by_nobody(view, level=0),
        "every level was withheld": lambda: seen_by_nobody(
            look(heads(2, 6), encoder(), defences=["withhold@0,1,2,3,4"])
        ),
        "holds no sample": lambda: seen_by_nobody(replace(view, targets=())),
        "have no activations": lambda: seen_by_nobody(
            replace(view, targets=(replace(view.targets[0], shots=()), view.targets[1]))
        ),
    }
    for words, attempt in cases.items():
        with pytest.raises(AttackImpossible, match=words) as failure:
            attempt()
        assert "\n" not in str(failure.value)
