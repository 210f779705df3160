"""A coordinator that cheats, simulated; the site that watches its gradients; attacks that the wire does not allow."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import pytest
import torch

from splitpeer.attacks.catalogue import CATALOGUE, described, make_attack
from splitpeer.attacks.hijack.fsha import FSHA
from splitpeer.attacks.not_applicable import NOT_APPLICABLE
from splitpeer.errors import AttackImpossible
from splitpeer.models import build_decoder, build_encoder, site_seed, unet_backbone
from splitpeer.site.probes import ProbeAnswers
from splitpeer.training.optimiser import make_optimiser, make_schedule
from splitpeer.training.split_step import ClientHalf, CoordinatorHalf
from splitproto.errors import CodecError
from splitproto.messages import (
    MESSAGES,
    WITH_TENSORS,
    Activations,
    Applied,
    Gradients,
    Probe,
    decode_head,
    encode,
)
from splitproto.states import SERVICES

from .watch import GradientWatch, describe, honest_training, painted

FEATURES = (4, 4, 8, 8, 16, 4)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def heads(count: int, seed: int) -> np.ndarray:
    source = np.random.default_rng(seed)
    grid = np.indices((32, 32)) / 32 - 0.5
    waves = source.uniform(5, 12, (count, 2, 1, 1))
    bands = np.sin((waves * grid).sum(axis=1) + source.uniform(0, 6, (count, 1, 1)))
    return ((bands + 0.5) * (np.sqrt((grid**2).sum(axis=0)) < 0.45))[:, None].astype(np.float32)


def test_a_hijacked_site_sends_what_can_be_seen_and_a_watch_notices() -> None:
    private, tumours = painted(heads(24, 1), 1)
    public, own_encoder = heads(24, 2), build_encoder(unet_backbone(2, FEATURES), seed=5)
    encoder = build_encoder(unet_backbone(2, FEATURES), seed=6)
    initial = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    # Fewer steps at higher rates end anywhere: roundings decide.
    attack = FSHA(pilot_steps=300, critic_rate=1e-3)
    hijacked = attack.simulate(encoder, private, public)

    def similar(images: np.ndarray) -> float:
        return float(
            np.mean([np.corrcoef(a.ravel(), b.ravel())[0, 1] for a, b in zip(images, private, strict=True)])
        )

    assert similar(hijacked.images) > similar(hijacked.before) + 0.1
    assert len(hijacked.gradients) == len(hijacked.inputs) == attack.steps
    assert all(torch.equal(initial[name], tensor) for name, tensor in encoder.state_dict().items())

    # The site simulates with a task and a decoder of its own; the coordinator's task is another.
    watch = GradientWatch()
    watch.fit(honest_training(own_encoder, *painted(private, 9), steps=50, seed=3))
    honest = list(honest_training(encoder, private, tumours, steps=30, seed=4))
    false_alarms = np.mean([watch.odd(*step) > 1 for step in honest])
    caught = np.mean([watch.odd(*step) > 1 for step in zip(hijacked.gradients, hijacked.inputs, strict=True)])
    assert caught >= 0.9 and false_alarms <= 0.2
    alarms = [watch.tell(*step) for step in zip(hijacked.gradients, hijacked.inputs, strict=True)]
    assert any(alarms)
    alarms = [watch.tell(*step) for step in honest]
    assert not any(alarms[10:])  # the window has forgotten what was before


def test_a_watch_judges_shape_and_not_size() -> None:
    source = np.random.default_rng(0)
    gradients = {f"x{n}": source.standard_normal((2, 4, 32 >> n, 32 >> n)) for n in range(3)}
    images = heads(2, 0)
    small = {name: 1e-6 * gradient for name, gradient in gradients.items()}
    assert np.allclose(describe(gradients, images), describe(small, images), atol=1e-6)


def test_hijacking_repeats_and_needs_masks_for_a_disguise() -> None:
    images, masks = painted(heads(6, 0), 0)
    encoder = build_encoder(unet_backbone(2, FEATURES), seed=6)
    quick = {"steps": 2, "pilot_steps": 2, "batch": 2}
    first, again = (FSHA(**quick).simulate(encoder, images, images) for _ in range(2))
    assert np.array_equal(first.images, again.images)
    with pytest.raises(AttackImpossible, match="masks"):
        FSHA(**quick, disguise=0.5).simulate(encoder, images, images)
    disguised = FSHA(**quick, disguise=0.5).simulate(encoder, images, images, masks)
    assert disguised.settings["disguise"] == 0.5
    FSHA(**quick, disguise=0.5).simulate(encoder, images, images, masks[:, :1])  # a task of one region
    with pytest.raises(AttackImpossible, match="four simulated steps"):
        GradientWatch().fit([])


@pytest.mark.parametrize("name", sorted(NOT_APPLICABLE))
def test_what_no_capture_can_feed_is_refused_in_one_line(name) -> None:
    with pytest.raises(AttackImpossible, match=r"capture|recording") as caught:
        make_attack(name)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 200
    words = described(name)
    assert words.title and words.plain and words.goal == "image"


def test_what_is_not_applicable_is_complete() -> None:
    assert set(NOT_APPLICABLE) == {"cafe", "gradient-inversion", "fsha"}
    assert not set(NOT_APPLICABLE) & set(CATALOGUE)


def test_tensors_cross_the_wire_as_activations_and_their_gradients_and_weights_only_to_be_averaged() -> None:
    """A coordinator that cheats needs no gradients where encoders are averaged.

    It plants weights of its choice as an `average`: the site checks their names, shapes and that they are finite
    (SP-11.16-3), not where they come from. So a site declines such jobs unless its `[policy] share_encoder` is true.
    """
    weights = {"shared", "average"}
    labels, masks = {"logits", "loss-gradients", "prediction"}, {"segmented"}
    zeros = {"probe", "probed"}
    assert {"activations", "gradients"} | weights | labels | masks | zeros == WITH_TENSORS
    assert (
        not ProbeAnswers("hub", 99).to(Probe(1, 9, {"octets": np.ones(9, np.uint8)})).tensors["octets"].any()
    )
    # To and from the site that has the labels, and to the one that asked: no weights either.
    assert {service for service, names in SERVICES.items() if labels & set(names)} == {"label"}
    assert {service for service, names in SERVICES.items() if masks & set(names)} == {"infer"}
    assert {service for service, names in SERVICES.items() if weights & set(names)} == {"average"}
    carrying = {name for name, cls in MESSAGES.items() if "tensors" in {f.name for f in fields(cls)}}
    assert carrying == WITH_TENSORS
    # No other field of any message can hold an array, either: nothing is longer than a digest but words and lists.
    assert {f.name for f in fields(Gradients)} == {"step", "tensors"}
    assert {f.name for f in fields(Activations)} == {"mode", "step", "batch", "digest", "tensors"}
    head, _ = encode(Gradients(step=1, tensors={"x0": np.zeros((1, 2), np.float32)}))
    smuggled = head.replace(b"gradients", b"applied", 1).replace(bytes([0xA0 + 9]), bytes([0xA0 + 7]), 1)
    with pytest.raises(CodecError):
        decode_head(smuggled)
    assert encode(Applied(step=1))[1] == []


def test_a_gradient_has_the_shape_of_the_activations_it_answers_and_of_no_weight() -> None:
    images, masks = painted(heads(2, 0), 0)
    encoder, decoder = (
        build_encoder(unet_backbone(2, FEATURES), seed=1),
        build_decoder(unet_backbone(2, FEATURES), ("t1",), seed=site_seed(1, "c")),
    )
    halves = []
    for kind, network in ((ClientHalf, encoder), (CoordinatorHalf, decoder)):
        optimiser = make_optimiser(network.parameters())
        halves.append(kind(network, optimiser, make_schedule(optimiser, "constant", 1)))
    site, hub = halves
    sent = site.forward(images)
    _, returned = hub.step({"t1": sent}, masks.astype(np.float32))
    expected = unet_backbone(2, FEATURES).cut.shapes(2, (32, 32))
    assert {name: g.shape for name, g in returned["t1"].items()} == expected
    assert {name: a.shape for name, a in sent.items()} == expected
    with pytest.raises(ValueError, match="expected"):  # a site takes nothing else for a gradient
        site.backward({"conv_0.conv_0.conv.weight": np.zeros((4, 1, 3, 3), np.float32)})
