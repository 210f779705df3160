"""The split step is the whole network's step, bit for bit; a half can be saved and resumed."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from splitpeer.errors import DataError, JobFailed
from splitpeer.models import build_decoder, build_encoder, build_split_network, site_seed, unet_backbone
from splitpeer.training.loss import region_loss
from splitpeer.training.optimiser import make_optimiser, make_schedule
from splitpeer.training.split_step import ClientHalf, CoordinatorHalf

FEATURES = (2, 4, 4, 8, 8, 4)  # narrow, for speed
SHAPES = {2: (4, 64, 64), 3: (1, 32, 32, 32)}  # batch, then window
STEPS = 10
ALL_LEVELS = (0, 1, 2, 3, 4)
JOB_SEED = 42
SITES = ("T1", "T1Gd", "T2", "FLAIR")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def batch(dimensions: int, sites: tuple[str, ...], step: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
    source = np.random.default_rng(step)
    size, *window = SHAPES[dimensions]
    images = {site: source.standard_normal((size, 1, *window), dtype=np.float32) for site in sites}
    target = (sum(images.values()) > 1.5).astype(np.float32)
    return images, np.repeat(target, 3, axis=1)


def halves(
    dimensions: int,
    sites: tuple[str, ...],
    levels: tuple[int, ...] = ALL_LEVELS,
    fusion: str = "concat",
    lr: float = 5e-3,
) -> tuple[dict[str, ClientHalf], CoordinatorHalf]:
    clients = {}
    for site in sites:
        encoder = build_encoder(unet_backbone(dimensions, FEATURES, levels), seed=site_seed(JOB_SEED, site))
        optimiser = make_optimiser(encoder.parameters(), lr=lr)
        clients[site] = ClientHalf(encoder, optimiser, make_schedule(optimiser, "one-cycle", STEPS))
    decoder = build_decoder(
        unet_backbone(dimensions, FEATURES, levels), sites, fusion, seed=site_seed(JOB_SEED, "coordinator")
    )
    optimiser = make_optimiser(decoder.parameters(), lr=lr)
    return clients, CoordinatorHalf(decoder, optimiser, make_schedule(optimiser, "one-cycle", STEPS))


def over_the_wire(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What a link does at least: bytes out, other memory in, read-only."""
    return {
        name: np.frombuffer(array.tobytes(), dtype=np.float32).reshape(array.shape)
        for name, array in arrays.items()
    }


def split_step(clients, coordinator, images, target) -> float:
    sent = {site: over_the_wire(client.forward(images[site])) for site, client in clients.items()}
    loss, gradients = coordinator.step(sent, target)
    for site, client in clients.items():
        client.backward(over_the_wire(gradients[site]))
    return loss


def assert_same_weights(network, clients, coordinator) -> None:
    parties = {
        **{f"encoders.{site}": c.network for site, c in clients.items()},
        "decoder": coordinator.network,
    }
    split = {f"{prefix}.{name}": t for prefix, n in parties.items() for name, t in n.state_dict().items()}
    whole = network.state_dict()
    assert split.keys() == whole.keys()
    different = [name for name in whole if not torch.equal(whole[name], split[name])]
    assert different == []


@pytest.mark.parametrize(
    ("dimensions", "sites", "levels", "fusion"),
    [
        (2, SITES[:2], ALL_LEVELS, "concat"),
        (2, SITES, ALL_LEVELS, "concat"),
        (2, SITES, (1, 2, 3, 4), "concat"),
        (2, SITES[:2], (0, 1, 2, 4), "mean"),
        (2, SITES, ALL_LEVELS, "mean"),
        (3, SITES, ALL_LEVELS, "concat"),
        (3, SITES[:2], (1, 2, 3, 4), "mean"),
    ],
)
def test_split_training_is_the_whole_networks_training(dimensions, sites, levels, fusion) -> None:
    network = build_split_network(
        unet_backbone(dimensions, FEATURES, levels), sites, fusion, job_seed=JOB_SEED
    )
    optimiser = make_optimiser(network.parameters(), lr=5e-3)
    schedule = make_schedule(optimiser, "one-cycle", STEPS)
    clients, coordinator = halves(dimensions, sites, levels, fusion)
    assert_same_weights(network, clients, coordinator)
    before = network.state_dict()["encoders.T1.conv_0.conv_0.conv.weight"].clone()
    for step in range(STEPS):
        images, target = batch(dimensions, sites, step)
        loss = region_loss(
            network({site: torch.from_numpy(image) for site, image in images.items()}),
            torch.from_numpy(target),
        )
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        assert split_step(clients, coordinator, images, target) == loss.item(), f"step {step}"
    assert_same_weights(network, clients, coordinator)
    assert not torch.equal(network.state_dict()["encoders.T1.conv_0.conv_0.conv.weight"], before)


def test_labels_at_a_site_change_nothing() -> None:
    clients, coordinator = halves(2, SITES[:2])
    others, u_shaped = halves(2, SITES[:2])
    for step in range(3):
        images, target = batch(2, SITES[:2], step)
        expected = split_step(clients, coordinator, images, target)
        sent = {site: over_the_wire(client.forward(images[site])) for site, client in others.items()}
        logits = u_shaped.decode(sent)
        leaf = torch.tensor(logits, requires_grad=True)
        loss = region_loss(leaf, torch.as_tensor(target))
        loss.backward()
        for site, gradients in u_shaped.apply(leaf.grad.numpy()).items():
            others[site].backward(gradients)
        assert loss.item() == expected
    ours, theirs = coordinator.state()[0], u_shaped.state()[0]
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_no_copies_where_safe() -> None:
    clients, coordinator = halves(2, ("T1",))
    images, target = batch(2, ("T1",), 0)
    sent = clients["T1"].forward(images["T1"])
    assert not any(array.flags.writeable for array in sent.values()), "the graph needs this memory unchanged"
    assert all(array.dtype == np.float32 and array.flags.c_contiguous for array in sent.values())
    received = {name: array.copy() for name, array in sent.items()}
    unchanged = {name: array.copy() for name, array in sent.items()}
    coordinator.step({"T1": received}, target)
    assert all(np.array_equal(received[name], unchanged[name]) for name in received)


def test_odd_arrays_are_taken() -> None:
    clients, coordinator = halves(2, ("T1",))
    images, _ = batch(2, ("T1",), 0)
    sent = clients["T1"].forward(images["T1"])
    reference = coordinator.predict({"T1": sent})
    strided = {name: np.repeat(array, 2, axis=-1)[..., ::2] for name, array in sent.items()}
    offset = {}
    for name, array in sent.items():
        raw = bytearray(array.nbytes + 1)
        raw[1:] = array.tobytes()
        offset[name] = np.frombuffer(raw, dtype=np.float32, offset=1).reshape(array.shape)
        assert not offset[name].flags.aligned
    for odd in (strided, offset):
        assert np.array_equal(coordinator.predict({"T1": odd}), reference)


def test_predictions() -> None:
    clients, coordinator = halves(2, SITES[:2])
    images, target = batch(2, SITES[:2], 0)
    sent = {site: client.forward(images[site]) for site, client in clients.items()}
    evaluated = {site: client.evaluate(images[site]) for site, client in clients.items()}
    assert all(np.array_equal(sent[s][name], evaluated[s][name]) for s in sent for name in sent[s])
    probabilities = coordinator.predict(evaluated)
    assert probabilities.shape == target.shape
    assert probabilities.dtype == np.float32
    assert 0 <= probabilities.min() < probabilities.max() <= 1
    assert clients["T1"].network.training and coordinator.network.training
    _, gradients = coordinator.step(sent, target)
    clients["T1"].backward(gradients["T1"])  # evaluation left the pending step alone
    assert clients["T1"].steps_done == 1


def test_saved_and_taken_up_again_it_goes_on_as_if_never_stopped() -> None:
    clients, coordinator = halves(2, SITES[:2])
    parties = {**clients, "coordinator": coordinator}
    for step in range(4):
        split_step(clients, coordinator, *batch(2, SITES[:2], step))
    saved = {name: half.state() for name, half in parties.items()}
    kept = {name: {k: t.clone() for k, t in tensors.items()} for name, (tensors, _) in saved.items()}
    losses = [split_step(clients, coordinator, *batch(2, SITES[:2], step)) for step in range(4, 8)]

    fresh, fresh_coordinator = halves(2, SITES[:2])
    rolled_back = [(clients, coordinator), (fresh, fresh_coordinator)]  # the same process, and a new one
    for again, again_coordinator in rolled_back:
        for name, half in {**again, "coordinator": again_coordinator}.items():
            half.load(*saved[name])
            assert half.steps_done == 4
        assert [split_step(again, again_coordinator, *batch(2, SITES[:2], s)) for s in range(4, 8)] == losses
    for name, (tensors, _) in saved.items():
        assert all(torch.equal(tensors[k], kept[name][k]) for k in tensors), "a saved state never changes"


def test_a_state_of_another_network_is_refused_whole() -> None:
    clients, coordinator = halves(2, SITES[:2])
    before = clients["T1"].state()[0]
    with pytest.raises(DataError, match="does not fit"):
        clients["T1"].load(*coordinator.state())
    tensors, meta = halves(2, SITES[:2])[0]["T2" if "T2" in clients else "T1Gd"].state()
    tensors["optimiser/nobody/exp_avg"] = torch.zeros(3)
    with pytest.raises(DataError, match="nobody"):
        clients["T1"].load(tensors, meta)
    after = clients["T1"].state()[0]
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_misuse() -> None:
    clients, coordinator = halves(2, ("T1",))
    client = clients["T1"]
    images, target = batch(2, ("T1",), 0)
    with pytest.raises(RuntimeError, match="pending"):
        client.backward({})
    with pytest.raises(RuntimeError, match="pending"):
        coordinator.apply(target)
    sent = client.forward(images["T1"])
    with pytest.raises(ValueError, match="target is"):
        coordinator.step({"T1": sent}, target[:, :2])
    with pytest.raises(ValueError, match="expected exactly"):
        coordinator.step({}, target)
    _, gradients = coordinator.step({"T1": sent}, target)
    with pytest.raises(ValueError, match="gradients of"):
        client.backward({"x0": gradients["T1"]["x0"]})
    with pytest.raises(ValueError, match="gradient of x0"):
        client.backward({**gradients["T1"], "x0": gradients["T1"]["x1"]})
    client.backward(gradients["T1"])
    with pytest.raises(RuntimeError, match="pending"):
        client.backward(gradients["T1"])


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_divergence_stops_the_job_and_says_what_to_do(value: float) -> None:
    clients, coordinator = halves(2, ("T1",))
    client = clients["T1"]
    images, target = batch(2, ("T1",), 0)
    sent = {name: array.copy() for name, array in client.forward(images["T1"]).items()}
    weights = {**coordinator.state()[0], **client.state()[0]}
    _, gradients = CoordinatorHalf.step(halves(2, ("T1",))[1], {"T1": sent}, target)
    sent["x0"][0, 0, 0, 0] = value
    with pytest.raises(JobFailed, match=r"step 0 .*lower the learning rate"):
        coordinator.step({"T1": sent}, target)
    # Where the labels are at a site, before anybody is asked for a loss; and what comes back is looked at as well.
    with pytest.raises(JobFailed, match=r"the prediction at step 0 .*lower the learning rate"):
        coordinator.decode({"T1": sent})
    gradient = np.zeros_like(coordinator.decode({"T1": {**sent, "x0": np.zeros_like(sent["x0"])}}))
    gradient.flat[0] = value
    with pytest.raises(JobFailed, match=r"the gradient of the logits at step 0 .*lower the learning rate"):
        coordinator.apply(gradient)
    bad = {name: array.copy() for name, array in gradients["T1"].items()}
    bad["x2"][0] = value
    with pytest.raises(JobFailed, match=r"gradient of x2 .*lower the learning rate"):
        client.backward(bad)
    now = {**coordinator.state()[0], **client.state()[0]}
    assert all(torch.equal(weights[name], now[name]) for name in weights)
    client.backward(gradients["T1"])


def test_a_site_may_be_left_out_when_the_job_says_so() -> None:
    clients, coordinator = halves(2, SITES[:2])
    images, target = batch(2, SITES[:2], 0)
    sent = {"T1": clients["T1"].forward(images["T1"])}
    _, gradients = coordinator.step(sent, target, absent=["T1Gd"])
    assert gradients.keys() == {"T1"}
    clients["T1"].backward(gradients["T1"])
    assert coordinator.predict(sent, absent=["T1Gd"]).shape == target.shape
