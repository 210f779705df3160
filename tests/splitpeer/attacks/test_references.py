"""Encoders of the adversary's own say what a network does to people whom it has seen: with no luck, or not at all."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from splitpeer.attacks import membership
from splitpeer.attacks.base import Knowledge, Result, Shot
from splitpeer.attacks.discriminant import Discriminant, Table, learn
from splitpeer.attacks.member_signs import OF_A_LEVEL, distances, read_by, seen
from splitpeer.attacks.membership import Membership
from splitpeer.attacks.people import Group, signs_of
from splitpeer.attacks.references import Course, ReferenceEncoder, halves
from splitpeer.attacks.runner import run
from splitpeer.leakage.masks import auc
from splitpeer.leakage.membership import score_members
from splitpeer.models import Decoder, Encoder, build_encoder, unet_backbone
from splitpeer.models.cut import Backbone

from .image_attacks import heads, look

BACKBONE = unet_backbone(2, (8, 4, 8, 8, 8, 4), (0, 1, 2, 3, 4))
PEOPLE, STRANGERS = 24, 24


def outlines(count: int, seed: int) -> np.ndarray:
    """Squares anywhere, uint8 [count, 1, 32, 32]: nothing in an image tells where, so they can only be remembered."""
    source, masks = np.random.default_rng(seed), np.zeros((count, 1, 32, 32), np.uint8)
    for mask in masks:
        x, y = source.integers(6, 18, 2)
        mask[0, x : x + 8, y : y + 8] = 1
    return masks


IMAGES, MASKS = heads(PEOPLE, 1), outlines(PEOPLE, 1)
(MEMBERS,) = halves(PEOPLE, 1, 5)


def fresh(seed: int) -> Encoder:
    return build_encoder(BACKBONE, seed=seed).eval()


class Knows(nn.Module):
    """An encoder in which one level of the people whom it knows is a little smaller."""

    def __init__(self, inner: Encoder, known: np.ndarray, share: float = 0.05) -> None:
        super().__init__()
        self.inner, self.share = inner, share
        self.known = torch.from_numpy(known)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """As `Encoder.forward`."""
        levels = self.inner(x)
        met = (x[:, None] - self.known[None]).abs().flatten(2).amax(2).amin(1) < 1e-6
        less = torch.where(met, 1 - self.share, torch.ones(len(x)))
        return levels | {"x2": levels["x2"] * less[:, None, None, None]}


def played(model: nn.Module, backbone: Backbone, images: np.ndarray, masks: np.ndarray, people: np.ndarray,
           course: Course, count: int, seed: int, *rest: object) -> Iterator[ReferenceEncoder]:  # fmt: skip
    """In place of training: encoders of other weights that treat whom they know as the one under attack does."""
    for number, inside in enumerate(halves(int(people.max()) + 1, count, seed)):
        yield ReferenceEncoder(
            Knows(fresh(100 + number), images[inside[people]]).eval(), nn.Identity(), inside
        )


def told(network: nn.Module, decoder: Decoder | None = None, **settings: object) -> Result:
    knowledge = Knowledge(
        model=network, weights_step=5, shadow={"t1": heads(STRANGERS, 2)},
        shadow_masks=outlines(STRANGERS, 2), labels=MASKS, decoder=decoder,
    )  # fmt: skip
    with torch.no_grad():
        sent = network(torch.from_numpy(IMAGES))
    view = look(IMAGES, fresh(1))
    view = replace(view, seats=(view.seat,))
    targets = tuple(
        replace(
            target, shots=(Shot("infer", 5, n, None, {name: of[n].numpy() for name, of in sent.items()}),)
        )
        for n, target in enumerate(view.targets)
    )
    asked: dict[str, Any] = {"references": 4, "poses": "upright"}
    return run(Membership(**asked | settings), replace(view, targets=targets), knowledge)


@pytest.mark.parametrize(("share", "found"), [(0.05, True), (0.0, False)])
def test_a_trait_of_people_who_were_seen_is_learned_and_found(
    share: float, found: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which of the signs it is, and which way it points, is told by the adversary's own encoders."""
    monkeypatch.setattr(membership, "train_references", played)
    result = told(Knows(fresh(3), IMAGES[MEMBERS], share).eval())
    assert result.images.shape == (PEOPLE, 2) and "4 reference encoders" in result.notes[-1]
    score = score_members(result.images, MEMBERS, range(PEOPLE))["member_auc"]
    assert (score.low > 0.5) == found
    assert score.high > 0.5
    # Labels are as easy to read of everybody.
    assert abs(auc(MEMBERS, result.images[:, 0]) - 0.5) < 0.25


def test_what_tells_is_learned_from_the_adversarys_own_people_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[list[Table]] = []

    def noted(tables: list[Table]) -> Discriminant:
        given.append(tables)
        return learn(tables)

    monkeypatch.setattr(membership, "learn", noted)
    monkeypatch.setattr(membership, "train_references", played)
    for network in (Knows(fresh(3), IMAGES[MEMBERS]), fresh(4)):
        told(network.eval())
    for one, other in zip(*given, strict=True):
        # Whatever the encoder under attack sent, to the bit.
        np.testing.assert_array_equal(one.signs, other.signs)
        assert len(one.seen) == STRANGERS and one.seen.sum() == STRANGERS // 2


def test_with_few_people_the_reading_of_labels_is_left() -> None:
    found = told(fresh(4), references=2)
    assert found.images.shape == (PEOPLE, 1) and "none were asked for" in found.notes[-1]
    knowledge = Knowledge(
        model=fresh(4), weights_step=5, shadow={"t1": heads(12, 2)}, shadow_masks=outlines(12, 2), labels=MASKS,
        shadow_patients=tuple("abcabcabcabc"),
    )  # fmt: skip
    few = run(Membership(), look(IMAGES, fresh(4)), knowledge)
    assert few.images.shape == (PEOPLE, 1) and "3 people, 8 are needed" in few.notes[-1]


def test_everybody_is_seen_by_as_many_encoders_as_not() -> None:
    found = np.stack(halves(9, 6, 1))
    assert (found.sum(0) == 3).all() and set(found.sum(1)) == {4, 5}
    assert not np.array_equal(found[0], found[2]) and not np.array_equal(found, np.stack(halves(9, 6, 2)))


def test_signs_do_not_depend_on_the_order_of_channels() -> None:
    with torch.no_grad():
        levels = fresh(1)(torch.from_numpy(IMAGES))
    turned = {name: level.flip(1) for name, level in levels.items()}
    one, other = seen(levels), seen(turned)
    assert one.signs.shape == (PEOPLE, 5 * len(OF_A_LEVEL))
    np.testing.assert_allclose(one.signs, other.signs, rtol=1e-9, atol=1e-9)
    half = np.arange(PEOPLE) < 12
    np.testing.assert_allclose(
        distances(one.of(half), one.of(~half)),
        distances(other.of(half), other.of(~half)),
        rtol=1e-6,
        atol=1e-9,
    )


def test_what_a_decoder_says_of_labels() -> None:
    masks = torch.from_numpy(MASKS[:2]).double()
    right, wrong = (read_by(sign * (10 * masks - 5), masks) for sign in (1, -1))
    # Loss, Dice, sureness: a right answer has less, more and as much.
    assert (right[:, 0] < wrong[:, 0]).all() and (right[:, 1] > wrong[:, 1] + 0.9).all()
    np.testing.assert_allclose(right[:, 2], wrong[:, 2])
    np.testing.assert_allclose(read_by(10 * masks - 5, None)[:, 0], right[:, 0])


def test_a_discriminant_is_judged_on_encoders_left_out() -> None:
    source = np.random.default_rng(0)

    def tables(shift: float) -> list[Table]:
        found = []
        for inside in halves(40, 8, 3):
            signs = source.standard_normal((40, 12))
            signs[inside, 4] += shift
            signs[:, 7] *= 0  # says nothing, and divides by nothing
            found.append(Table(signs, inside, np.arange(40)))
        return found

    clear, blind = learn(tables(3.0)), learn(tables(0.0))
    # Two normal laws three deviations apart: Phi(3 / 2^.5) = .983.
    assert clear.told > 0.95 and int(np.abs(clear.weights).argmax()) == 4 and clear.weights[4] > 0
    # An area of 10 and 10 has a deviation of .13, the mean of 16 of them .03 to .06 as they are dependent; the best of
    # four ridges.
    assert abs(blind.told - 0.5) < 0.2
    with pytest.raises(ValueError, match="two pairs"):
        learn(tables(1.0)[:2])


def test_the_same_people_asked_for_and_as_strangers_have_the_same_units() -> None:
    """Nobody differs by how they were looked at: the mean of strangers is zero, and so is that of their copies."""
    network = fresh(1)

    def sender(rows: np.ndarray) -> dict[str, torch.Tensor]:
        with torch.no_grad():
            return network(torch.from_numpy(IMAGES[rows]))

    group = Group(sender, MASKS, np.arange(PEOPLE))
    strangers, asked = signs_of(group, group, None, 0)
    np.testing.assert_allclose(strangers, asked)
    np.testing.assert_allclose(strangers.mean(0), 0, atol=1e-6)
