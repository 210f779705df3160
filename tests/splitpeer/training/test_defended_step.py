"""A site's half with defences: it trains through them, keeps what they learn, and never sends without them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from splitpeer.defences.network import Defended, build_network
from splitpeer.defences.randomness import Release
from splitpeer.defences.stack import defend, make_stack
from splitpeer.errors import DataError
from splitpeer.models import Encoder, basic_unet, build_decoder, build_encoder, site_seed, unet_backbone
from splitpeer.training.optimiser import make_optimiser, make_schedule
from splitpeer.training.split_step import ClientHalf, CoordinatorHalf
from splitproto.records import Sample

FEATURES = (2, 4, 4, 8, 8, 4)
WINDOW = {2: (3, 1, 32, 32), 3: (2, 1, 32, 32, 32)}
KEY = bytes(range(32))
STEPS = 12
MANY = (
    "bottleneck:1@0+nopeek:0.1+shredder:0.01+adversary:0.5,networks=2,restart=4,width=4"
    "+clip:20+gaussian:0.2+dropout:0.2"
)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def network(written: str, dimensions: int = 2, seed: int | None = 3) -> Encoder | Defended:
    return build_network(unet_backbone(dimensions, FEATURES), written=written, key=KEY, seed=seed)


def half_of(written: str, dimensions: int = 2) -> ClientHalf:
    encoder = network(written, dimensions)
    optimiser = make_optimiser(encoder.parameters(), lr=5e-3)
    return ClientHalf(encoder, optimiser, make_schedule(optimiser, "one-cycle", STEPS))


def decoder(dimensions: int = 2) -> CoordinatorHalf:
    made = build_decoder(unet_backbone(dimensions, FEATURES), ["t1"], seed=site_seed(3, "coordinator"))
    optimiser = make_optimiser(made.parameters(), lr=5e-3)
    return CoordinatorHalf(made, optimiser, make_schedule(optimiser, "one-cycle", STEPS))


def image(step: int, dimensions: int = 2) -> np.ndarray:
    return np.random.default_rng(step).standard_normal(WINDOW[dimensions], dtype=np.float32)


def release(step: int, mode: str = "train", count: int = 3) -> Release:
    return Release(
        b"r" * 16, mode, step, 0, tuple(Sample(bytes([i]) * 16, (0, 0, step)) for i in range(count))
    )


def steps(
    client: ClientHalf, coordinator: CoordinatorHalf, first: int, last: int, dimensions: int = 2
) -> list[bytes]:
    """Train; what left, octet for octet."""
    left = []
    for step in range(first, last + 1):
        x = image(step, dimensions)
        sent = client.forward(x, release(step, count=len(x)))
        left.append(b"".join(array.tobytes() for array in sent.values()))
        target = np.repeat((x > 1).astype(np.float32), 3, axis=1)
        _, gradients = coordinator.step({"t1": {name: array.copy() for name, array in sent.items()}}, target)
        client.backward(gradients["t1"])
    return left


def test_without_defences_it_is_the_encoder() -> None:
    bare = network("")
    assert type(bare) is basic_unet.Encoder
    plain = build_encoder(unet_backbone(2, FEATURES), seed=3).state_dict()
    assert list(plain) == list(bare.state_dict())
    defended = network(MANY).state_dict()
    assert all(torch.equal(defended[f"encoder.{name}"], tensor) for name, tensor in plain.items())


def test_the_model_alone_is_what_stands_before_clipping_and_chance() -> None:
    model, x = network("bottleneck:1+clip:1+gaussian:1+quantise:2"), torch.from_numpy(image(1))
    plain = model.encoder(x)
    for name, tensor in model(x).items():
        narrow = torch.tanh(model.stack.defences[0].squeeze[name](plain[name]))
        assert torch.equal(tensor[:, :1], narrow)
        assert not tensor[:, 1:].any()
    assert not torch.equal(model(x, release(1))["x0"], model(x)["x0"])


@pytest.mark.parametrize("written", ["dropout:0.5", "gaussian:1", "bottleneck:2+gaussian:1"])
def test_a_defended_network_sends_nothing_without_a_release(written: str) -> None:
    client = half_of(written)
    for send in (client.forward, client.evaluate):
        with pytest.raises(ValueError, match="sends nothing without a release"):
            send(image(1))


def test_evaluation_is_defended_too() -> None:
    client = half_of("dropout:0.5")
    evaluated = client.evaluate(image(1), release(0, "evaluate"))
    assert (evaluated["x0"] == 0).mean() == pytest.approx(0.5, abs=0.03)
    trained = client.forward(image(1), release(1))
    assert (trained["x0"] == 0).mean() == pytest.approx(0.5, abs=0.03)
    assert client.network.training


@pytest.mark.parametrize("dimensions", [2, 3])
def test_what_arrives_and_the_local_penalty_enter_one_backward(dimensions: int) -> None:
    client, x = half_of(MANY, dimensions), image(1, dimensions)
    sent = client.forward(x, release(1, count=len(x)))
    seeds = {
        name: np.random.default_rng(9).standard_normal(a.shape, dtype=np.float32) for name, a in sent.items()
    }
    twin = network(MANY, dimensions)
    twin.stack.begin(1)
    tensors = twin(torch.from_numpy(x), release(1, count=len(x)))
    loss = sum((tensor * torch.from_numpy(seeds[name])).sum() for name, tensor in tensors.items())
    (loss + twin.stack.penalty(torch.from_numpy(x), tensors)).backward()
    expected = {name: p.grad.clone() for name, p in twin.named_parameters()}
    applied = {}
    client.optimiser.step = lambda: applied.update(
        {name: p.grad.clone() for name, p in client.network.named_parameters()}
    )
    client.backward(seeds)
    assert applied.keys() == expected.keys()
    # Biases before a normalisation have no gradient but rounding.
    least = 1e-5 * max(gradient.abs().max().item() for gradient in expected.values())
    for name, gradient in expected.items():
        assert torch.allclose(applied[name], gradient, rtol=1e-3, atol=least), name


def test_a_level_withheld_needs_no_gradient() -> None:
    client, coordinator = half_of("withhold@0"), decoder()
    before = {name: tensor.clone() for name, tensor in client.network.state_dict().items()}
    steps(client, coordinator, 1, 2)
    assert any(not torch.equal(tensor, before[name]) for name, tensor in client.network.state_dict().items())
    everything = half_of("withhold@0,1,2,3,4")
    steps(everything, decoder(), 1, 2)
    assert everything.steps_done == 2


@pytest.mark.parametrize("dimensions", [2, 3])
def test_saved_and_taken_up_again_the_same_octets_leave(dimensions: int) -> None:
    last = 10 if dimensions == 2 else 5
    client, coordinator = half_of(MANY, dimensions), decoder(dimensions)
    steps(client, coordinator, 1, 3, dimensions)
    # A step is under way, and its network already drawn anew, when the checkpoint is made.
    x = image(4, dimensions)
    under_way = client.forward(x, release(4, count=len(x)))
    saved = client.state(), coordinator.state()
    expected = steps(client, coordinator, 4, last, dimensions)
    assert expected[0] == b"".join(array.tobytes() for array in under_way.values())
    assert len(set(expected)) == len(expected)
    fresh, fresh_coordinator = half_of(MANY, dimensions), decoder(dimensions)
    for again, other in ((client, coordinator), (fresh, fresh_coordinator)):
        again.load(*saved[0])
        other.load(*saved[1])
        assert steps(again, other, 4, last, dimensions) == expected
    tensors = saved[0][0]
    assert "model/stack.defences.0.squeeze.x0.weight" in tensors
    assert "optimiser/stack.defences.2.logits.x0/exp_avg" in tensors
    assert not any(KEY in tensor.numpy().tobytes() for tensor in tensors.values())


def test_a_network_that_starts_anew_forgets_its_moments() -> None:
    client, coordinator = half_of("adversary:1,networks=1,restart=4,width=4"), decoder()
    steps(client, coordinator, 1, 3)
    (parameter, *_) = client.network.stack.defences[0].networks[0].parameters()
    assert client.optimiser.state[parameter]["step"] == 3
    client.forward(image(4), release(4))
    assert parameter not in client.optimiser.state


def test_a_state_of_other_defences_is_refused() -> None:
    tensors, meta = half_of("bottleneck:1").state()
    with pytest.raises(DataError, match="does not fit this network"):
        half_of("bottleneck:2").load(tensors, meta)
    with pytest.raises(DataError, match="does not fit this network"):
        half_of("").load(tensors, meta)


def test_trained_parts_learn() -> None:
    client, coordinator = half_of(MANY), decoder()
    before = {name: tensor.clone() for name, tensor in client.network.named_parameters()}
    steps(client, coordinator, 1, 3)
    same = [name for name, tensor in client.network.named_parameters() if torch.equal(tensor, before[name])]
    assert same == []


def test_gradients_are_defended_as_arrays() -> None:
    arrays = {"x0": np.random.default_rng(0).standard_normal((3, 2, 32, 32), dtype=np.float32)}
    arrays["x0"].flags.writeable = False
    for written in (
        "gaussian:1",
        "laplace:1",
        "dropout:0.5",
        "clip:1",
        "quantise:4",
        "topk:0.1",
        "max-norm",
        "iso:1",
    ):
        stack = make_stack(written, key=KEY, channels={"x0": 2}, dimensions=2, place="gradients")
        sent = defend(stack, arrays, release(1))
        assert sent["x0"].dtype == np.float32
        assert sent["x0"].shape == (3, 2, 32, 32)
        assert not np.array_equal(sent["x0"], arrays["x0"]), written
        assert np.array_equal(sent["x0"], defend(stack, arrays, release(1))["x0"])


def test_private_entropy_is_the_default_for_trained_parts_as_well() -> None:
    one, other = network("bottleneck:2", seed=None), network("bottleneck:2", seed=None)
    seeded, again = network("bottleneck:2"), network("bottleneck:2")
    name = "stack.defences.0.squeeze.x0.weight"
    assert not torch.equal(one.state_dict()[name], other.state_dict()[name])
    assert torch.equal(seeded.state_dict()[name], again.state_dict()[name])
