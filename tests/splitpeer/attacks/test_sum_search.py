"""All images of a quantised sum are searched together."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from splitpeer.attacks.base import Knowledge
from splitpeer.attacks.evidence import gather
from splitpeer.attacks.image import inverse
from splitpeer.attacks.image.inverse import InverseAttack, Refined
from splitpeer.attacks.image.sum_search import SumSearch, contrast_metric, coupled_variation, nearest
from splitpeer.attacks.joint import joint_knowledge, joint_view
from splitpeer.attacks.runner import run
from splitproto.records import Fusion, Seat

from .image_attacks import encoder, heads, likeness, look

TERMS = Fusion(16, 8.0, 2)
ENCODERS = (encoder(1, levels=(0, 4)), encoder(2, levels=(0, 4)))


def contrasts(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Two contrasts of the same heads, which share most of their anatomy."""
    first = heads(count, seed)
    return first, (0.9 * first + 0.3 * heads(count, seed + 50) * (first != 0)).astype(np.float32)


TRUTH, SHADOW = contrasts(2, 1), contrasts(24, 2)


def scene():
    views = [
        replace(look(images, network), seat=Seat(name, (name,)), site=name)
        for name, images, network in zip(("t1", "t2"), TRUTH, ENCODERS, strict=True)
    ]
    known = [
        Knowledge(model=network, weights_step=5, shadow={name: images})
        for name, images, network in zip(("t1", "t2"), SHADOW, ENCODERS, strict=True)
    ]
    return joint_view(views, TERMS), joint_knowledge(views, known, TERMS)


def test_the_search_finds_all_images_that_a_network_only_guesses() -> None:
    view, knowledge = scene()
    network = InverseAttack(steps=10, width=(4,))
    guess = run(network, view, knowledge).images
    result = run(SumSearch(steps=10, width=(4,), iterations=40), view, knowledge)
    for n in range(2):
        found = likeness(result.images[:, n : n + 1], TRUTH[n])
        assert found > 0.8 and found > likeness(guess[:, n : n + 1], TRUTH[n]) + 0.1
    assert any(note.startswith("from the nearest patient") for note in result.notes)


def test_changes_at_one_place_cost_less_than_at_two() -> None:
    step = torch.zeros(1, 2, 8, 8)
    step[:, 0, :4] = 1
    apart = step.clone()
    step[:, 1, :4], apart[:, 1, :, :4] = 1, 1
    metric = contrast_metric(torch.cat([step, step + 0.1 * torch.randn(1, 2, 8, 8)]))
    assert coupled_variation(step, metric) < 0.5 * coupled_variation(apart, metric)
    single = contrast_metric(torch.randn(3, 1, 8, 8))
    assert torch.allclose(single, torch.ones(1, 1), atol=0.02)


def test_the_nearest_patient_is_the_one_whose_values_they_are() -> None:
    view, knowledge = scene()
    evidence = gather([t.shots for t in view.targets], None, masked=False)[0]
    shadow = torch.from_numpy(np.concatenate(SHADOW, 1))
    shadow[[5, 9]] = torch.from_numpy(np.concatenate(TRUTH, 1))
    assert nearest(knowledge.model, shadow, evidence).tolist() == [5, 9]


def test_one_adversary_trains_a_network_once_for_all_attacks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit as if each trained its own; another budget, view or encoder is another network."""
    trained: list[str] = []
    asked = inverse.train

    def counted(*given: Any, **more: Any) -> Any:
        trained.append(more["what"])
        return asked(*given, **more)

    monkeypatch.setattr(inverse, "train", counted)
    view, knowledge = scene()
    network = {"steps": 4, "width": (4,)}
    attacks = [InverseAttack(**network), Refined(**network, iterations=3), SumSearch(**network, iterations=2)]
    alone = [run(attack, *scene()) for attack in attacks]
    trained.clear()
    together = [run(attack, view, knowledge) for attack in attacks]
    assert len(trained) == 1
    for one, other in zip(together, alone, strict=True):
        assert np.array_equal(one.images, other.images) and one.notes == other.notes
    # An attack that used it again says what it would have taken: its effort is the whole.
    spared = knowledge.trained[next(iter(knowledge.trained))][1]
    assert all(one.seconds > spared for one in together)
    attacks[0] = replace(attacks[0], steps=8)
    changed = replace(view, targets=(view.targets[1], view.targets[1]))
    other = replace(knowledge, model=copy.deepcopy(knowledge.model))
    for attack, seen, known in (
        (attacks[0], view, knowledge),
        (attacks[1], changed, knowledge),
        (attacks[2], view, other),
        (replace(attacks[1], width=(4, 8)), view, knowledge),
    ):
        run(attack, seen, known)
    assert len(trained) == 5
