"""Test vectors of what both sides compute from data: patients, batches, terms, steps and images."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from splitproto import messages, records, tensors
from splitproto.codings import CODINGS
from splitproto.fields import read_map
from splitproto.tensors import Descriptor
from tests.spec.reading import (
    VECTORS,
    Case,
    cases,
    check,
    compare,
    of_the_peer,
    value_of,
)


@pytest.mark.parametrize("case", cases("digests", "batch"))
def test_batch_digest(case: Case) -> None:
    pytest.importorskip("monai")
    sampling = of_the_peer("data.sampling")
    samples = [sampling.Sample(bytes.fromhex(s["key"]), tuple(s["origin"])) for s in case["samples"]]
    compare(
        case, sampling.batch_digest(case["step"], samples, value_of(case["seed"]), case.get("places")).hex()
    )


@pytest.mark.parametrize("case", cases("digests", "pseudonym"))
def test_pseudonym(case: Case) -> None:
    pseudonym = of_the_peer("data.pseudonym")
    compare(case, pseudonym.pseudonym(bytes.fromhex(case["salt"]), case["patient"]).hex())


@pytest.mark.parametrize("case", cases("digests", "salt-check"))
def test_salt_check(case: Case) -> None:
    pseudonym = of_the_peer("data.pseudonym")
    compare(case, pseudonym.salt_check(bytes.fromhex(case["salt"])).hex())


@pytest.mark.parametrize("case", cases("digests", "salt-file"))
def test_salt_file(case: Case) -> None:
    pseudonym = of_the_peer("data.pseudonym")
    try:
        found = {"salt": pseudonym.parse_salt(bytes.fromhex(case["content"])).hex()}
    except ValueError:
        found = {"refused": True}
    assert found == case["expect"]


@pytest.mark.parametrize("case", cases("digests", "augmentation"))
def test_augmentation(case: Case) -> None:
    augment = of_the_peer("data.augment")
    seed, expect = value_of(case["seed"]), case["expect"]
    plan = augment.derive(seed, case["index"], case["modality"])
    assert (list(plan.flips), plan.turns) == (expect["flips"], expect["turns"])
    if case["modality"] is not None:
        assert (plan.scale, plan.shift) == (expect["scale"], expect["shift"])
    image = np.frombuffer(bytes.fromhex(case["image"]), "<f4").reshape(1, *case["shape"])
    out = augment.augment(image, seed, case["index"], case["modality"])
    assert list(out.shape[1:]) == expect["shape"]
    assert out.tobytes().hex() == expect["image"]


# --- terms, learning --------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", cases("learning", "terms"))
def test_terms(case: Case) -> None:
    """SP-11-2."""
    judged(case)


@pytest.mark.parametrize("case", cases("learning", "kinds"))
def test_kinds_of_jobs(case: Case) -> None:
    """SP-11.17-1, SP-11.17-2, SP-11.17-9, SP-11.18-1, SP-11.18-2."""
    judged(case)


def judged(case: Case) -> None:
    """What a site without another policy against it makes of an offer whose schema it would compute itself."""
    terms = of_the_peer("federation.terms")
    job = records.Job(**read_map(records.Job, value_of(case["job"]), "job"))
    seats, wanted = (records.Seat("t1", ("t1",)),), case.get("policy", ())

    def work() -> list[Descriptor]:
        try:
            described = terms.seat_descriptors(job, seats)
        except ValueError:
            described = ()
        policy = SimpleNamespace(
            levels=range(5),
            precision=(*tensors.DTYPES, *CODINGS),
            recorded_by_coordinator=True,
            max_message_bytes=1 << 40,
            normalisation=("zscore-nonzero", "zscore", "percentile", "window", "none"),
            defences=(),
            image_defences=(),
            share_encoder=True,
            encoders="frozen" if "frozen" in wanted else "any",
            fusion="secure-sum" if "sum" in wanted else "any",
            releases="once" if "once" in wanted else "any",
            partners=tuple(case.get("partners", ())),
            min_partners=2,
        )
        offer = messages.JobOffer(bytes(16), seats, job, tensors.schema_digest(described))
        terms.judge(
            offer,
            SimpleNamespace(policy=policy, model=None, peer=SimpleNamespace(modalities=("t1",), held="t1")),
            # Every dtype: what is unknown to version 1 is refused even where it was agreed.
            [*case.get("agreed", ()), *(f"dtype.{name}" for name in tensors.DTYPES)],
        )
        return list(described)

    described = check(case, work)
    if described is not None:
        assert [d.to_wire() for d in described] == case["expect"]["descriptors"]
        assert tensors.schema_digest(described).hex() == case["expect"]["sha256"]


def learner(case: Case) -> tuple[Any, Any, Any]:
    """One float32 parameter, its optimiser and the schedule of it."""
    torch = pytest.importorskip("torch")
    optimiser = of_the_peer("training.optimiser")
    parameter = torch.nn.Parameter(torch.tensor(case.get("weights", [0.0])))
    made = optimiser.make_optimiser(
        [parameter],
        case.get("optimiser", "adam"),
        case.get("learning_rate", 1.0),
        case.get("weight_decay", 0.0),
    )
    return parameter, made, optimiser.make_schedule(made, case["schedule"], case["steps"])


@pytest.mark.parametrize("case", cases("learning", "schedule"))
@pytest.mark.parametrize("name", ["adam", "sgd"])
def test_learning_rate(case: Case, name: str) -> None:
    _, optimiser, schedule = learner({**case, "optimiser": name})
    schedule.seek(case["step"] - 1)
    (group,) = optimiser.param_groups
    momentum = group["betas"][0] if name == "adam" else group["momentum"]
    expect = {key: value_of(value) for key, value in case["expect"].items()}
    assert {"factor": group["lr"], "momentum": momentum} == pytest.approx(expect, rel=1e-12)


@pytest.mark.parametrize("case", cases("learning", "optimiser"))
def test_optimiser(case: Case) -> None:
    """SP-11.10-1."""
    parameter, optimiser, schedule = learner(case)
    for step, gradient, expected in zip(
        case["made"], case["gradients"], case["expect"]["weights"], strict=True
    ):
        schedule.seek(step - 1)
        parameter.grad = parameter.new_tensor(gradient)
        optimiser.step()
        assert parameter.tolist() == pytest.approx(expected, rel=0, abs=2e-6)


@pytest.mark.parametrize("case", cases("learning", "average"))
def test_average(case: Case) -> None:
    """SP-11.16-4."""
    averaging = of_the_peer("training.averaging")
    weights = [{"w": np.frombuffer(bytes.fromhex(one), "<f4")} for one in case["weights"]]
    found = averaging.average(weights, case["patients"])["w"]
    assert found.astype("<f4").tobytes().hex() == case["expect"]["average"]


@pytest.mark.parametrize("case", cases("learning", "weights"))
def test_weights_that_may_be_averaged(case: Case) -> None:
    """SP-11.16-3."""
    averaging = of_the_peer("training.averaging")
    found = averaging.flaw({"w": np.frombuffer(bytes.fromhex(case["weights"]), "<f4")})
    assert (found is None) is case["expect"]["averaged"]


@pytest.mark.parametrize("case", cases("learning", "loss"))
def test_loss_and_its_gradient(case: Case) -> None:
    """SP-11.20-5, SP-11.20-11: where a voxel is of a region, the gradient of that region is negative."""
    torch = pytest.importorskip("torch")
    samples, channels, *spatial = case["shape"]
    exclusive, expect = case["exclusive"], case["expect"]
    given = np.frombuffer(bytes.fromhex(case["logits"]), "<f4").reshape(case["shape"])
    mask = np.frombuffer(bytes.fromhex(case["mask"]), "u1").reshape(samples, channels - exclusive, *spatial)
    logits = torch.from_numpy(given.copy()).requires_grad_()
    loss = of_the_peer("training.loss").task_loss(logits, torch.from_numpy(mask.copy()), exclusive=exclusive)
    loss.backward()
    gradient = np.array(expect["gradient"]).reshape(case["shape"])
    assert loss.item() == pytest.approx(expect["loss"], rel=1e-5)
    assert np.abs(logits.grad.numpy() - gradient).max() <= 1e-5 * np.abs(gradient).max()
    of_region = gradient[:, 1:] if exclusive else gradient
    assert ((of_region < 0) == mask.astype(bool)).all()


@pytest.mark.parametrize("case", cases("learning", "sides"))
def test_nobody_is_trained_on_and_scored(case: Case) -> None:
    """SP-11.20-13."""
    sides = of_the_peer("site.sides").Sides(None)

    def answer(asked: list[dict[str, Any]]) -> dict[str, int]:
        for one in asked:
            persons = [bytes.fromhex(person) for person in one["persons"]]
            if one["message"] == "logits":
                sides.train(persons)
            else:
                sides.score(*persons)
        return {"answered": len(asked)}

    if "error" in case["expect"]:
        answer(case["asked"][:-1])
    assert check(case, lambda: answer(case["asked"])) in (case["expect"], None)


# --- images -----------------------------------------------------------------------------------------------


def data_case(case: Case) -> tuple[Any, Any]:
    """The site's reader, and a file as one of its cases."""
    volumes, layouts = (of_the_peer(f"data.{name}") for name in ("volumes", "layouts"))
    return volumes, layouts.Case("p", VECTORS / "data" / case["file"])


@pytest.mark.parametrize("case", cases("data", "window"))
def test_window_of_a_file(case: Case) -> None:
    volumes, file = data_case(case)
    augment = of_the_peer("data.augment")
    spacing = None if case["spacing"] is None else tuple(case["spacing"])
    header = volumes.read_header(file)
    grid, expect = volumes.grid_of(file, header, spacing), case["expect"]
    found = {name: list(getattr(grid, name)) for name in expect["grid"]}
    assert found["shape"] == expect["grid"]["shape"]
    for name, numbers in found.items():
        assert numbers == pytest.approx(expect["grid"][name], rel=0, abs=1e-5)
    if case["kind"] == "image":
        rule = of_the_peer("data.normalisation").Normaliser.parse(case.get("normalisation", "zscore-nonzero"))
        held = volumes.Volumes([file], salt=bytes(32), spacing=spacing, normalisation=rule)
        out = held.window(held.keys()[0], tuple(case["origin"]), (*case["window"], 1)[:3])
    else:
        # The numbers of a mask; what they mean is its convention's affair.
        held = volumes.Volumes([file], salt=bytes(32), spacing=spacing)
        voxels, _ = volumes.read_voxels(file)
        held._volume = lambda key: volumes.resample(voxels, header.geometry, grid, nearest=True)[None]
        out = held.window(held.keys()[0], tuple(case["origin"]), (*case["window"], 1)[:3])
    if len(case["window"]) == 2:
        out = out[..., 0]
    if case["seed"] is not None:
        out = augment.augment(out, case["seed"], case["index"], case["modality"])
    assert list(out.shape[1:]) == expect["shape"]
    wanted = np.frombuffer(bytes.fromhex(expect["values"]), "<f4").reshape(out.shape)
    np.testing.assert_allclose(out, wanted, rtol=0, atol=1e-4 if case["kind"] == "image" else 0)


@pytest.mark.parametrize("case", cases("data", "unusable"))
def test_file_that_cannot_be_used(case: Case) -> None:
    volumes, file = data_case(case)
    errors_of = of_the_peer("errors")
    held = volumes.Volumes([file], salt=bytes(32))
    with pytest.raises(errors_of.DataError):
        held.window(held.keys()[0], (0, 0, 0), (1, 1, 1))


@pytest.mark.parametrize("case", cases("data", "grids"))
def test_grids_agree(case: Case) -> None:
    geometry = of_the_peer("data.geometry")
    one, other = (
        geometry.Geometry(**{name: tuple(numbers) for name, numbers in case[which].items()})
        for which in ("one", "other")
    )
    assert bool(geometry.differences(one, other)) == ("error" in case["expect"])
    assert bool(geometry.differences(other, one)) == ("error" in case["expect"])
