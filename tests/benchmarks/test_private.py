"""The parts of `benchmarks/private.py` that decide what its figures mean, at toy size."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from splitpeer.data.loader import SiteData
from splitpeer.defences.randomness import Release
from splitpeer.federation.terms import job_on_wire
from splitpeer.pretraining.information import InformationBottleneck
from splitpeer.training.split_round import Parties, Place, split_round

CONTRASTS = ("flair", "t1", "t1ce", "t2")


def known(slices: int, seed: int, size: int = 24) -> np.ndarray:
    """Labels of two regions and heights, [N, 3, size, size]: a square somewhere."""
    random, found = np.random.default_rng(seed), np.zeros((slices, 3, size, size), np.float32)
    for one in found:
        x, y, high = [*random.integers(0, size // 2, 2).tolist(), random.random()]
        one[0, x : x + 8, y : y + 8] = 1
        one[1, x : x + 4, y : y + 4] = 1
        one[2] = high
    return found


def values(of: np.ndarray, seed: int) -> np.ndarray:
    """Three channels that follow labels, place and height, and something of each patient's own."""
    random = np.random.default_rng(seed)
    ramp = np.linspace(-1, 1, of.shape[-1], dtype=np.float32)
    clean = np.stack(
        [of[:, 0] - 0.5 * of[:, 1], ramp[:, None] * of[:, 2], np.cos(3 * ramp) + of[:, 1]], axis=1
    )
    return (clean + 0.2 * random.standard_normal(clean.shape)).astype(np.float32)


def test_a_line_takes_surrogates_to_the_run_although_no_slice_is_on_both_sides() -> None:
    from private_outsider import line

    mixed = np.array([[0.0, -2.0, 0.0], [1.0, 0.0, 0.5], [0.0, 0.3, -1.0]], np.float32)
    ours, theirs = known(200, 1), known(200, 2)
    own = values(ours, 3)
    other = np.einsum("ij,njxy->nixy", mixed, values(theirs, 4)) + np.float32(0.7)
    taken = line(own, other, ours, theirs)
    with torch.no_grad():
        made = taken(torch.from_numpy(own)).numpy()
    wanted = np.einsum("ij,njxy->nixy", mixed, own) + np.float32(0.7)
    assert np.corrcoef(made.ravel(), wanted.ravel())[0, 1] > 0.97
    assert np.allclose(made.mean(axis=(0, 2, 3)), other.mean(axis=(0, 2, 3)), atol=1e-3)
    assert np.allclose(made.std(axis=(0, 2, 3)), other.std(axis=(0, 2, 3)), rtol=0.05)


def attack(figure: dict[str, float], presence: float = 0.5) -> dict[str, object]:
    scores = {
        name: {"mean": presence, "floors": {"guess": 0.4}}
        for name in ("tumour_presence", "tumour_volume", "tumour_side")
    }
    return {
        "patients": {c: [figure[c], figure[c] + 0.02] for c in CONTRASTS},
        "tumour": dict.fromkeys(CONTRASTS, scores),
    }


def test_the_figure_of_an_adversary_is_that_of_the_best_attack_on_each_contrast() -> None:
    from private_table import above_labels, readouts, worst

    low = dict.fromkeys(CONTRASTS, 0.1)
    results = {
        "row/7/inverse": attack(low | {"t1": 0.5, "t2": 0.3}),
        "row/7/search": attack(low | {"t1": 0.4, "t2": 0.45}, presence=0.8),
        "row/7/recipe": attack(low | {"flair": 0.2}),
        "labels/7": attack(low | {"flair": 0.15}),
        "other/7/inverse": attack(dict.fromkeys(CONTRASTS, 0.9)),
    }
    found = worst(results, "row", ("inverse", "neighbours", "search"), [7])
    assert found is not None
    assert (found.contrast, found.attack) == ("t1", "inverse")
    assert found.figure.mean == pytest.approx(0.51)
    assert found.average.mean == pytest.approx((0.51 + 0.46 + 2 * 0.11) / 4)
    assert above_labels(results, "row", [7]).startswith(".050 ")
    assert readouts(results, "row", ("inverse", "search"), [7]) == " / ".join([".800 (.400)"] * 3)
    assert worst(results, "row", ("neighbours",), [7]) is None


def test_the_table_has_a_line_for_each_row_and_says_what_was_not_made() -> None:
    from private_run import Row
    from private_table import markdown

    done = {"dice": {"mean": 0.85}, "patients": [0.8, 0.9], "octets_per_window": 1000, "seconds": 1.0}
    less = done | {"dice": {"mean": 0.84}, "patients": [0.79, 0.89]}
    results = {"joint/7": done, "sum/7": less, "sum/7/inverse": attack(dict.fromkeys(CONTRASTS, 0.3))}
    given = argparse.Namespace(
        seeds=[7], patients=4, validation=2, steps=3, pretraining_steps=3, strangers=4, shadow=4
    )
    head, _, joint, private, *_ = markdown(results, [Row("joint"), Row("sum")], given).splitlines()
    assert head.count("|") == joint.count("|") == private.count("|")
    assert joint.split("|")[3:7] == [" - ", " - ", " - ", " - "]
    assert " -.010 ± .000 " in private and ".310 ± " in private


# --- with a federation ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A frozen sum of a few small phantoms; the encoders have had one step."""
    import pretraining
    from private_run import Row, RowBench

    small = partial(pretraining.write_phantom, shape=(40, 40, 8), spacing_mm=(5, 5, 18), workers=1)
    given = argparse.Namespace(
        patients=4, validation=2, strangers=3, steps=2, pretraining_steps=1, batch=2, shadow=3, attack_steps=2,
        surrogate_steps=2, search_steps=1, readout_steps=2,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("private")
    row = Row("sum", strangers=3, widths=(1, 1, 2, 4, 8), secure=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretraining, "write_phantom", small)
        yield RowBench(folder, 7, given, row, folder)


@pytest.fixture(scope="module")
def federation(bench: Any) -> Any:
    from private_run import Federation

    made = Federation(bench, lambda line: None)
    made.recall()
    return made


@pytest.fixture(scope="module")
def strangers(bench: Any) -> Any:
    from private_attacks import People

    return People.of(bench, bench.strangers(3))


def test_a_decoder_is_recalled_and_trained_where_it_was_not_kept(bench: Any, federation: Any) -> None:
    from private_run import Federation

    again = Federation(bench, lambda line: None)
    before = again.parties.coordinator.network.state_dict()["decoder.final_conv.weight"].clone()
    again.recall()
    found, kept = (one.parties.coordinator.network.state_dict() for one in (again, federation))
    assert all(torch.equal(found[name], kept[name]) for name in kept)
    assert not torch.equal(before, found["decoder.final_conv.weight"])
    assert again.parties.coordinator.steps_done == 0, "it was read, not trained"


def test_networks_are_shown_what_the_coordinator_would_see(federation: Any, strangers: Any) -> None:
    from private_attacks import Look, Reader
    from private_run import levels_of
    from private_search import networks, predicted

    samples = strangers.slices()[:2]
    plain, three = (
        Reader(federation, strangers),
        Reader(federation, strangers, look=Look(labels=True, reach=1)),
    )
    shown, images = plain.pairs(samples)
    seen = levels_of(federation.seen(federation.sent(strangers.read(samples), samples, b"")))
    assert seen.keys() == shown.keys()
    for name, level in seen.items():
        assert np.allclose(shown[name].numpy(), level * plain.scales[name], atol=1e-5)
        assert three.channels[name] == 3 * level.shape[1] + 3 * (federation.bench.task.channels + 1)
    # The search computes the same, but for the rounding of the integers.
    made = predicted(networks(federation), images, summing=True)
    assert all(np.allclose(made[name].detach().numpy(), seen[name], atol=4e-3) for name in seen)
    # Below the lowest slice there is none: it stands in for itself.
    around, _ = three.pairs(samples)
    assert samples[0].origin == (0, 0, 0)
    assert torch.equal(around["x0"][0, 1], around["x0"][0, 0])
    assert torch.equal(around["x0"][0, 2], around["x0"][1, 0])
    # Mirrored, images and sums belong together.
    turned, flipped = plain.pairs(samples, mirrored=True)
    assert torch.equal(flipped, images.flip(2)) and not torch.equal(turned["x0"], shown["x0"])
    again = predicted(networks(federation), flipped, summing=True)
    assert np.allclose(turned["x0"].numpy() / plain.scales["x0"], again["x0"].detach().numpy(), atol=4e-3)


def few_values(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of so few slices no place has five values on both sides."""
    import private_outsider as outsider

    for name, value in {"FEWEST": 1, "GRID": 6, "HEIGHTS": 1}.items():
        monkeypatch.setattr(outsider, name, value)


def test_an_adversary_whose_own_encoders_are_the_true_ones_is_aligned_to_read_them(
    federation: Any, strangers: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else nothing of a bad alignment would be seen: figures of other encoders are low either way."""
    import private_outsider as outsider
    from private_run import levels_of

    monkeypatch.setattr(outsider, "ENTROPY", 0)
    few_values(monkeypatch)
    run = outsider.of_the_run(federation)
    made = outsider.aligned(federation, strangers, run)
    samples = strangers.slices()[3:7]
    images = strangers.read(samples)
    read = made.reads(images, samples, b"")
    true = levels_of(federation.seen(federation.sent(images, samples, b"")))
    for name in ("x0", "x1", "x2"):
        assert np.corrcoef(read[name].ravel(), true[name].ravel())[0, 1] > 0.9, name
    # Trained on, they still feed the run's decoder, and change.
    taught = outsider.taught(federation, made, strangers, run, 2, lambda line: None)
    other = taught.reads(images, samples, b"")
    assert other.keys() == read.keys() and not np.array_equal(other["x0"], read["x0"])


def test_the_judge_of_surrogates_sees_a_shift(federation: Any) -> None:
    import private_outsider as outsider

    run = outsider.of_the_run(federation)
    judge = outsider.Judge(federation, run)
    known = torch.from_numpy(run.known)
    true = {key: torch.from_numpy(level) for key, level in run.levels.items()}
    assert judge.moments(true, known).item() < 1e-3
    apart = judge.moments({key: 2 * level + level.std() for key, level in true.items()}, known)
    assert apart.item() > 0.5


def test_slices_with_the_most_tumour_and_without_any(bench: Any, strangers: Any) -> None:
    from private_attacks import healthy, middle, tumour

    keys = strangers.masks.keys()
    assert all(tumour(strangers.masks, one.key)[one.origin[2]] > 0 for one in middle(strangers.masks, keys))
    free = healthy(strangers.masks, keys)
    assert free and all(tumour(strangers.masks, one.key)[one.origin[2]] == 0 for one in free)


def test_an_attack_leaves_a_figure_a_guess_and_read_outs(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from private_leak import Attacker

    few_values(monkeypatch)
    attacker = Attacker(bench, lambda line: None, bench.given)
    names = ("inverse", "search", "surrogates", "labels")
    for name in names:
        found = attacker.attack(name)
        assert found["patients"].keys() == set(CONTRASTS)
        assert all(len(values) == len(attacker.victims) for values in found["patients"].values())
        assert {"tumour_presence", "tumour_volume", "tumour_side"} <= found["tumour"]["t1"].keys()
        assert found["tumour"]["t1"]["tumour_presence"]["samples"] == len(attacker.targets)
    assert len(list((bench.folder / "guesses").iterdir())) == len(names)


def test_pretraining_under_a_price_is_the_joint_step_with_noise_and_a_rate(bench: Any) -> None:
    from private_run import halves, priced

    course = replace(bench, row=replace(bench.row, strangers=0))
    job = job_on_wire(course.job)
    random = np.random.default_rng(0)
    target = (random.random((2, course.task.channels, 96, 96)) < 0.2).astype(np.float32)
    read = {Place(c, c): random.standard_normal((2, 1, 96, 96)).astype(np.float32) for c in CONTRASTS}

    def losses(noise: float, rate: float, count: int) -> tuple[list[float], float]:
        """Of some steps; and what gets through at the end, of what did at first."""
        parties = halves(course, job)
        if noise:
            parties = priced(parties, replace(bench.row, noise=noise, rate=rate), 2, 7)
        release = Release(b"", "train", 1, 0, ())
        first = nats(parties)
        made = [split_round(parties, read, target, release, terms=job.fusion) for _ in range(count)]
        return made, nats(parties) / first

    def nats(parties: Parties) -> float:
        narrow = InformationBottleneck(0.5, 0.0)
        with torch.no_grad():
            return sum(
                narrow.nats({n: z.numpy() for n, z in half.network(torch.from_numpy(read[place])).items()})
                for place, half in parties.sites.items()
            )

    (joint,), _ = losses(0.0, 0.0, 1)
    (hardly,), _ = losses(1e-5, 0.0, 1)
    (noisy,), _ = losses(0.5, 0.0, 1)
    # Noise of 1e-5 moves a value by less than the step of the sum's integers, some to the next one.
    assert hardly == pytest.approx(joint, abs=1e-3) and noisy != joint
    assert losses(0.5, 10.0, 4)[1] < losses(0.5, 0.0, 4)[1], "what is paid for gets less"


def test_logits_are_bounded_and_decided_by_their_mean_at_first(bench: Any) -> None:
    from private import octets
    from private_logits import CLIP
    from private_run import Federation

    row = replace(bench.row, name="logits", logits=True)
    federation = Federation(replace(bench, row=row), lambda line: None)
    samples = federation_samples(federation)
    seen = federation.seen(federation.once(samples))
    ((place, levels),) = seen.items()
    assert levels.keys() == {"x0"} and levels["x0"].shape[1] == bench.task.channels
    assert np.abs(levels["x0"]).max() < 4 * CLIP
    network = federation.parties.coordinator.network
    with torch.no_grad():
        said = network({place.seat: {"x0": torch.from_numpy(levels["x0"])}})
    assert torch.allclose(said, torch.from_numpy(levels["x0"]) / 4)
    assert octets(federation) == 4 * 2 * bench.task.channels * 96 * 96
    federation.train()
    assert federation.parties.coordinator.steps_done == 2


def federation_samples(federation: Any) -> list[Any]:
    from private_attacks import People

    run = People(federation.patients, federation.bench.masks(federation.bench.cohort()), federation.window)
    return run.slices()[:3]


# --- labels of a joint run over a sum ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def joint(bench: Any) -> Any:
    """Both halves trained over a sum for two steps, and what came back."""
    from private_run import Federation

    made = Federation(
        replace(bench, row=replace(bench.row, name="joint, sum", strangers=0)), lambda line: None
    )
    made.recall()
    return made


def test_a_joint_run_over_a_sum_is_trained_as_in_one_round_and_its_gradient_is_kept(joint: Any) -> None:
    from private_run import Federation

    from splitpeer.data.sampling import TrainingSchedule

    bench, again = joint.bench, Federation(joint.bench, lambda line: None)
    masks, (training, _) = bench.masks(bench.cohort()), bench.split()
    schedule = TrainingSchedule(training, masks, window=bench.window, batch=2, steps=2, seed=bench.seed,
                                positive_fraction=bench.job.data.positive_fraction)  # fmt: skip
    samples, _ = schedule.batch(0)
    target = SiteData(masks).batch(samples, bench.window, None, None)
    release = Release(b"", "train", 1, 0, tuple(samples))
    back: list[dict[str, np.ndarray]] = []
    half = again.parties.sites[Place("t1", "t1")]
    backward = half.backward
    half.backward = lambda gradient: (back.append(gradient), backward(gradient))[1]
    split_round(again.parties, again.read(again.patients, samples), target, release, terms=again.job.fusion)
    noted = joint.gradients()
    for row, sample in enumerate(samples):
        kept = noted.shots[sample][0]
        assert (kept.step, kept.index) == (1, row) and kept.gradients.keys() == back[0].keys()
        assert all(np.array_equal(kept.gradients[name], back[0][name][row]) for name in back[0])
    assert joint.bench.row.one_gradient and not replace(bench.row, strangers=3).one_gradient
    assert all(masks.window(s.key, s.origin, bench.window).any() for s in noted.followed)
    assert {t.sample for t in noted.early()} == {s for step in (0, 1) for s in schedule.batch(step)[0]}


def test_a_site_is_attacked_for_labels_and_held_against_its_own_image(
    joint: Any, bench: Any, strangers: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import private_labels
    from private_leak import GRADIENT, Attacker

    learned = "gradient-network:batches=2,steps=2,width=4,job_steps=2"
    monkeypatch.setattr(private_labels, "ATTACKED", {
        private_labels.EARLY: ("gradient-norm",), private_labels.ALL: ("gradient-field", learned),
    })  # fmt: skip
    monkeypatch.setattr(private_labels, "MOST", 1)
    found = Attacker(joint.bench, lambda line: None, bench.given).attack(GRADIENT)["masks"]
    assert found.keys() == set(CONTRASTS)
    for attacks in found.values():
        assert attacks.keys() == {
            "gradient-norm, early steps", "gradient-field, all releases", f"{learned}, all releases",
        }  # fmt: skip
        for scores in attacks.values():
            assert {private_labels.OWN_IMAGE, "mean mask of other patients"} <= scores["auc"]["floors"].keys()
            assert scores["advantage_auc"]["mean"] is not None and scores["auc"]["each"]


def test_the_table_says_what_the_gradient_adds_to_the_better_floor() -> None:
    from private_run import Row
    from private_table import markdown, outlines

    def label(auc: float, own: float, others: float) -> dict[str, Any]:
        floors = {"own image and other patients' labels": own, "mean mask of other patients": others}
        return {
            "auc": {"each": [auc, auc + 0.02], "floors": floors},
            "advantage_auc": {"each": [auc - own, auc + 0.02 - own]},
        }

    masks = {
        "t1": {"gradient-norm, early steps": label(0.9, 0.8, 0.7)},
        "flair": {"gradient-norm, early steps": label(0.95, 0.92, 0.7), "other": label(0.9, 0.6, 0.88)},
    }
    done = {"dice": {"mean": 0.85}, "patients": [0.8, 0.9], "octets_per_window": 1000, "seconds": 1.0}
    results = {"joint/7": done, "sum/7": done, "sum/7/gradient": {"masks": masks}}
    found = outlines(results, "sum", [7])
    assert (found.contrast, found.attack) == ("t1", "gradient-norm, early steps")
    assert found.gained.mean == pytest.approx(0.11) and outlines(results, "joint", [7]) is None
    given = argparse.Namespace(
        seeds=[7], patients=4, validation=2, steps=3, pretraining_steps=3, strangers=4, shadow=4
    )
    *_, row = markdown(results, [Row("joint"), Row("sum")], given).splitlines()[:4]
    assert "(.800, .700; t1, gradient-norm, early steps) | .110 ± " in row
