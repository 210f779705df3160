"""Secure fusion in one process: what masked answers add up to, and a step that is made from the sum (SP-11.18)."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from splitpeer.defences.randomness import Release
from splitpeer.models import build_decoder, build_encoder, make_backbone
from splitpeer.training.loss import region_loss
from splitpeer.training.optimiser import Schedule, make_optimiser
from splitpeer.training.split_round import Parties, Place, split_round
from splitpeer.training.split_step import ClientHalf, CoordinatorHalf
from splitpeer.training.sums import SUM, fused, over_seats
from splitproto import fusion
from splitproto.records import Fusion, Sample

TERMS = Fusion(16, 4.0, 3)
WIDTHS = (1, 1, 2, 4, 8)
PLACES = (Place("a", "flair"), Place("b", "t1"), Place("b", "t1ce"), Place("c", "t2"))
OF = make_backbone("basic-unet", 2, {"features": (4, 4, 6, 8, 8, 4)}, widths=WIDTHS)
RELEASE = Release(bytes(16), "train", 1, 0, (Sample(bytes(16), (0, 0, 0)),) * 2)


def sent(seed: int = 0) -> dict[str, dict[str, dict[str, np.ndarray]]]:
    source = np.random.default_rng(seed)
    found: dict[str, dict[str, dict[str, np.ndarray]]] = {}
    for place in PLACES:
        found.setdefault(place.site, {})[place.seat] = {
            name: source.uniform(-1, 1, shape).astype(np.float32)
            for name, shape in OF.cut.shapes(2, (32, 32)).items()
        }
    return found


@pytest.mark.parametrize("bits", [16, 32])
def test_masked_answers_add_up_to_what_one_process_computes(bits: int) -> None:
    terms = Fusion(bits, TERMS.range, 3)
    secrets = {site: bytes([n + 1]) * 32 for n, site in enumerate("abc")}
    public = {site: fusion.public_of(secret) for site, secret in secrets.items()}
    question = fusion.Asked("train", 1, 0, bytes(32), fusion.BEGINNING)
    answers = {}
    for site, by_seat in sent().items():
        partners = {name: key for name, key in public.items() if name != site}
        masks = fusion.Masking.agreed(bytes(16), site, secrets[site], partners)
        answers[site], clipped = fusion.answer(masks, question, over_seats(by_seat), terms)
        assert clipped == 0
    summed, expected = fusion.totals(answers, terms), fused(sent(), terms)
    exact = {
        name: sum(over_seats(one)[name].astype(np.float64) for one in sent().values()) for name in expected
    }
    for name, array in expected.items():
        np.testing.assert_array_equal(summed[name], array)
        # Each of three sites rounds to the nearest integer, and the sum once more to float32.
        half = 0.5 * terms.range / fusion.greatest(terms)
        assert np.abs(array - exact[name]).max() <= 3 * half + 2**-22


def halves() -> Parties:
    sites = {}
    for number, place in enumerate(PLACES):
        encoder = build_encoder(OF, seed=number)
        optimiser = make_optimiser(encoder.parameters(), "adam", 0.01, 0.0)
        sites[place] = ClientHalf(encoder, optimiser, Schedule(optimiser, "constant", 9))
    decoder = build_decoder(OF, (SUM,), "sum", 3, seed=9)
    optimiser = make_optimiser(decoder.parameters(), "adam", 0.01, 0.0)
    return Parties(CoordinatorHalf(decoder, optimiser, Schedule(optimiser, "constant", 9)), sites)


def test_a_step_from_the_sum_is_nearly_that_of_the_network_that_adds_floats() -> None:
    """With words of 32 bits, rounding is below float32's own: the sum's gradient is each encoder's."""
    source = np.random.default_rng(1)
    images = {place: source.normal(size=(2, 1, 32, 32)).astype(np.float32) for place in PLACES}
    target = (source.random((2, 3, 32, 32)) < 0.2).astype(np.float32)
    parties = halves()
    before = {place: half.weights() for place, half in parties.sites.items()}
    loss = split_round(parties, images, target, RELEASE, terms=Fusion(32, 4.0, 3))
    whole = halves()
    encoders = {place: half.network for place, half in whole.sites.items()}
    outputs = {place: encoders[place](torch.from_numpy(images[place])) for place in PLACES}
    added = {name: sum(outputs[place][name] for place in PLACES) for name in OF.cut.names}
    decoder = whole.coordinator.network
    expected = region_loss(decoder({SUM: added}), torch.from_numpy(target))
    assert loss == pytest.approx(expected.item(), rel=1e-4)
    expected.backward()
    for place in PLACES:
        after = parties.sites[place].weights()
        assert any((after[name] != before[place][name]).any() for name in after)
        gradients = {name: parameter.grad.numpy() for name, parameter in encoders[place].named_parameters()}
        greatest = max(np.abs(gradient).max() for gradient in gradients.values())
        for name, gradient in gradients.items():
            if np.abs(gradient).max() < 1e-5 * greatest:
                continue  # a bias before a normalisation: zero but for rounding
            # Adam's first step is the learning rate times the sign: it agrees where the gradient is not tiny.
            clear = np.abs(gradient) > 1e-3 * np.abs(gradient).max()
            moved = (after[name] - before[place][name])[clear]
            assert (np.sign(moved) == -np.sign(gradient[clear])).mean() > 0.97, (place, name)


def test_a_run_from_sums_repeats_bit_for_bit() -> None:
    source = np.random.default_rng(2)
    images = {place: source.normal(size=(2, 1, 32, 32)).astype(np.float32) for place in PLACES}
    target = (source.random((2, 3, 32, 32)) < 0.2).astype(np.float32)
    runs = [halves(), halves()]
    losses = [[split_round(run, images, target, RELEASE, terms=TERMS) for _ in range(3)] for run in runs]
    assert losses[0] == losses[1] and len(set(losses[0])) == 3
    for place in PLACES:
        first, second = (run.sites[place].weights() for run in runs)
        for name, tensor in first.items():
            np.testing.assert_array_equal(tensor, second[name])
