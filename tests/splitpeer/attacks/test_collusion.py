"""What the coordinator and sites that work with it have together: parts of a sum, and images in clear."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from splitpeer.attacks.base import Knowledge
from splitpeer.attacks.collusion import colluding_knowledge, colluding_view, folded, remaining
from splitpeer.attacks.image.inverse import InverseAttack
from splitpeer.attacks.runner import run
from splitpeer.attacks.simulated_defences import SimulatedDefences
from splitpeer.errors import AttackImpossible
from splitproto.fusion import Asked, Masking, answer, public_of, quantise, restore, totals
from splitproto.records import Fusion, Seat

from .image_attacks import encoder, heads, likeness, look

SITES = ("lmu", "tum", "ukm")
SECRETS = {site: bytes([n]) * 32 for n, site in enumerate(SITES, 1)}
QUESTION = Asked("release", 0, 3, bytes(32))
T2 = Seat("t2", ("t2",))


@pytest.mark.parametrize("bits", [16, 32])
def test_all_partners_and_the_coordinator_unmask_the_last_site(bits: int) -> None:
    terms = Fusion(bits, 4.0, len(SITES))
    source = np.random.default_rng(1)
    shapes = {"x0": (3, 2, 8, 8), "x1": (3, 4, 4, 4)}
    sent = {s: {n: source.normal(size=of).astype(np.float32) for n, of in shapes.items()} for s in SITES}
    masked = {}
    for site in SITES:
        partners = {other: public_of(SECRETS[other]) for other in SITES if other != site}
        masked[site], _ = answer(
            Masking.agreed(bytes(16), site, SECRETS[site], partners), QUESTION, sent[site], terms
        )
    total = totals(masked, terms)  # all that the coordinator reads by itself
    victim = {name: restore(quantise(values, terms)[0], terms) for name, values in sent["ukm"].items()}
    exact = {"rtol": 0, "atol": 0 if bits == 16 else 1e-5}
    for name, values in remaining(total, [sent["lmu"], sent["tum"]], terms).items():
        np.testing.assert_allclose(values, victim[name], **exact)
        assert not np.allclose(total[name], victim[name], atol=0.1)
    # One partner's help leaves the sum of the other two, and no more.
    for name, values in remaining(total, [sent["lmu"]], terms).items():
        both = sum(quantise(sent[s][name], terms)[0].astype(np.int64) for s in ("tum", "ukm"))
        np.testing.assert_allclose(values, restore(both, terms), **exact)


def test_an_image_is_folded_onto_a_grid_without_loss() -> None:
    image = torch.arange(2 * 4 * 6.0).reshape(1, 2, 4, 6)
    cells = folded(image, (2, 3))
    assert cells.shape == (1, 12, 2, 2)
    assert torch.equal(cells[0, :6, 1, 0], image[0, 0, 2:4, 0:3].flatten())
    assert torch.equal(folded(image, (1, 1)), image)


def scene(defence: str, network=None):
    network = network or encoder()
    truth, strangers = heads(3, 1), heads(40, 2)
    alike = {
        name: (0.9 * images + 0.2 * heads(len(images), seed) * (images != 0)).astype(np.float32)
        for name, images, seed in (("truth", truth, 51), ("shadow", strangers, 52))
    }
    view = look(truth, network, defences=[defence])
    return view, Knowledge(model=network, weights_step=5, shadow={"t1": strangers}), truth, alike


def test_an_image_in_clear_adds_to_what_noise_leaves() -> None:
    view, knowledge, truth, alike = scene("gaussian:8")
    small = InverseAttack(steps=30, width=(8,))
    alone = likeness(run(small, view, knowledge).images, truth)
    both = colluding_view(view, T2, alike["truth"])
    granted = colluding_knowledge(view, knowledge, T2, alike["shadow"])
    found = run(small, both, granted).images
    assert both.clear == ("t2",) and both.reads == "with t2 in clear" and found.shape == (3, 2, 32, 32)
    assert likeness(found[:, :1], truth) > alone + 0.15


def test_what_is_known_in_clear_is_not_defended() -> None:
    view, knowledge, _, alike = scene("gaussian:8")
    both = colluding_view(view, T2, alike["truth"])
    model = colluding_knowledge(view, knowledge, T2, None).model
    images = torch.from_numpy(np.concatenate([alike["truth"], alike["truth"]], 1))
    clean = model(images)
    sent = SimulatedDefences(both, model, 0).release(clean, 0)
    assert torch.equal(sent["x0"][:, -1:], images[:, 1:]) and not torch.equal(
        sent["x0"][:, 0], clean["x0"][:, 0]
    )


def test_a_deeper_level_takes_the_image_too() -> None:
    view, knowledge, _, alike = scene("gaussian:1", encoder(levels=(1, 2, 3, 4)))
    both = colluding_view(view, T2, alike["truth"])
    assert both.clear_channels == {"x1": 4}
    shapes = {n: v.shape for n, v in both.targets[0].shots[0].activations.items()}
    model = colluding_knowledge(view, knowledge, T2, None).model
    made = model(torch.zeros(1, 2, 32, 32))
    assert {name: tuple(values.shape[1:]) for name, values in made.items()} == shapes


def test_what_does_not_fit_is_refused() -> None:
    view, knowledge, _, alike = scene("gaussian:1")
    with pytest.raises(AttackImpossible, match="targets"):
        colluding_view(view, T2, alike["truth"][:1])
    turned = replace(view, targets=tuple(
        replace(t, shots=tuple(replace(s, seed=1) for s in t.shots)) for t in view.targets
    ))  # fmt: skip
    with pytest.raises(AttackImpossible, match="augmented"):
        colluding_view(turned, T2, alike["truth"])
    with pytest.raises(AttackImpossible, match="encoder"):
        colluding_knowledge(view, replace(knowledge, model=None), T2, None)
