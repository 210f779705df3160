"""White-box reconstruction: exact if undefended; each defence faces an attacker who knows it and one who does not."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from splitpeer.attacks.base import Knowledge, View
from splitpeer.attacks.evidence import gather, weights_of
from splitpeer.attacks.image.first_step import FirstStep
from splitpeer.attacks.image.whitebox import Misfit, WhiteBox, denoised
from splitpeer.attacks.optimise import adam, lbfgs, total_variation
from splitpeer.attacks.runner import run
from splitpeer.attacks.simulated_defences import SimulatedDefences
from splitpeer.errors import AttackImpossible

from .image_attacks import encoder, heads, likeness, look

IMAGES = heads(2, 1)


def solve(view: View, adaptive: bool = True, iterations: int = 60, **granted: object) -> np.ndarray:
    knowledge = Knowledge(**{"model": encoder(), "adaptive": adaptive, **granted})
    return run(WhiteBox(iterations=iterations, schedules="joint"), view, knowledge).images


def test_undefended_it_recovers_the_image() -> None:
    network = encoder()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    result = run(WhiteBox(iterations=60), look(IMAGES, network), Knowledge(model=network, weights_step=5))
    assert likeness(result.images, IMAGES) > 0.99
    assert result.images.shape == IMAGES.shape and result.images.dtype == np.float32
    assert result.settings["iterations"] == 60 and sum(": " in note for note in result.notes) >= 1
    # What was granted is as it was.
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())
    assert all(p.requires_grad for p in network.parameters())


def test_from_the_mean_of_shadow_images_as_well() -> None:
    found = solve(look(IMAGES, encoder()), shadow={"t1": heads(20, 9)})
    assert likeness(found, IMAGES) > 0.98


def test_zeros_give_a_dropout_mask_away() -> None:
    view = look(IMAGES, encoder(), defences=["dropout:0.5,rescale=true"])
    aware, naive = (likeness(solve(view, adaptive), IMAGES) for adaptive in (True, False))
    assert aware > 0.95
    assert aware > naive + 0.1


@pytest.mark.parametrize("defence", ["topk:0.5", "clip:5", "quantise:8", "withhold@0"])
def test_other_defences_meet_who_knows_of_them(defence: str) -> None:
    view = look(IMAGES, encoder(), defences=[defence])
    aware = likeness(solve(view, iterations=60), IMAGES)
    assert aware > (0.4 if defence == "withhold@0" else 0.9)


def test_a_secret_rotation_is_found_beside_the_images() -> None:
    images = heads(4, 7)
    view = look(images, encoder(), defences=["projection:1"])
    aware, naive = (
        likeness(solve(view, adaptive, iterations=n), images) for adaptive, n in ((True, 80), (False, 20))
    )
    assert aware > 0.9
    assert aware > naive + 0.1


def test_many_views_beat_one_under_fresh_noise_and_not_under_kept_noise() -> None:
    def likeness_of(defence: str, views: int) -> float:
        return likeness(solve(look(IMAGES, encoder(), defences=[defence], views=views)), IMAGES)

    fresh, kept = "gaussian:1", "gaussian:1,kept=true"
    assert 1 - likeness_of(fresh, 20) < (1 - likeness_of(fresh, 1)) / 3
    # To the bit: who sees the same twice has learned nothing, and knows it.
    one, many = (solve(look(IMAGES, encoder(), defences=[kept], views=n)) for n in (1, 20))
    assert np.array_equal(one, many)


def test_augmented_releases_of_one_set_of_weights_are_explained_together() -> None:
    view = look(IMAGES, encoder(), defences=["dropout:0.8"], mode="train", step=6, seeds=(1, 2, 3))
    single = replace(view, targets=tuple(replace(t, shots=t.shots[:1]) for t in view.targets))
    together = likeness(solve(view, weights_step=5), IMAGES)
    assert together > 0.9
    assert together > likeness(solve(single, weights_step=5), IMAGES)


@pytest.mark.parametrize("defence", ["quantise:2", "dropout:0.9,kept=true"])
def test_what_repeats_to_the_bit_falls_to_other_poses(defence: str) -> None:
    """Poses and gains are as good as fresh draws: what is rounded off or left out differs in each."""
    view = look(IMAGES, encoder(), defences=[defence], mode="train", step=6, seeds=(None, 1, 2, 3, 4, 5))
    single = replace(view, targets=tuple(replace(t, shots=t.shots[:1]) for t in view.targets))
    together = likeness(solve(view, weights_step=5), IMAGES)
    assert together > 0.95
    assert 1 - together < (1 - likeness(solve(single, weights_step=5), IMAGES)) / 2


@pytest.mark.parametrize("defence", ["quantise:2", "dropout:0.9"])
def test_other_patients_do_not_make_it_weaker(defence: str) -> None:
    """Their mean is a poor start where values are missing or rounded, and says badly how far these scatter.

    Who has them may leave them aside: everything is searched from the principal component too, under the effects that
    the defences have there, and the likelier end is kept. By the scatter alone: the exact law of rounding finds back
    from the mean as well (`test_likelihood`)."""
    view = look(IMAGES, encoder(), defences=[defence])
    others = {"t1": heads(12, 2)}

    def found(schedules: str, shadow: dict[str, np.ndarray]) -> np.ndarray:
        attack = WhiteBox(iterations=60, schedules=schedules, law="scatter")
        return run(attack, view, Knowledge(model=encoder(), shadow=shadow)).images

    mean, both = found("joint,shallow", others), found("joint,shallow,component", others)
    alone = found("joint,shallow,component", {})
    # What is kept without them is among what is compared with them.
    assert (unlikely(view, both) <= unlikely(view, alone) * (1 + 1e-5)).all()
    assert (unlikely(view, both) <= unlikely(view, mean) * (1 + 1e-5)).all()
    # .883 (rounded) and .537 (missing) before; .914 and .861 without them.
    assert likeness(both, IMAGES) > 0.8


def unlikely(view: View, images: np.ndarray) -> np.ndarray:
    """Minus the logarithm of how likely each image is by what was seen, as the attack itself sees it."""
    evidence = gather([list(t.shots) for t in view.targets], view.seat.modalities, masked=True)
    misfit = Misfit(encoder(), evidence, adaptive=True)
    x = torch.from_numpy(images)
    misfit.calibrate(SimulatedDefences(view, encoder(), 0), x)
    with torch.no_grad():
        return (misfit(x) + misfit.scale() + total_variation(x)).numpy()


def test_noise_on_the_image_is_taken_off_what_fits() -> None:
    view = look(IMAGES, encoder(), defences=["image/voxel-noise:1"])
    aware, unaware = (replace(view, defences=defences) for defences in (view.defences, ()))
    assert likeness(solve(aware), IMAGES) > likeness(solve(unaware), IMAGES) + 0.02
    assert likeness(denoised(torch.from_numpy(IMAGES), 0.0).numpy(), IMAGES) == pytest.approx(1)


def test_volumes() -> None:
    volumes = heads(1, 2, (32, 32, 16))
    network = encoder(dimensions=3)
    assert likeness(solve(look(volumes, network), model=network, iterations=40), volumes) > 0.95


def test_the_same_seed_gives_the_same_bits() -> None:
    view = look(IMAGES, encoder(), defences=["gaussian:0.5"])
    first, again = solve(view, iterations=10), solve(view, iterations=10)
    assert np.array_equal(first, again)


def test_an_interrupt_goes_through() -> None:
    def stop(what: str, done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(WhiteBox(), look(IMAGES, encoder()), Knowledge(model=encoder()), stop)


def test_the_step_of_a_batch_tells_whose_weights_made_it() -> None:
    trained = look(IMAGES, encoder(), mode="train", step=1)
    assert weights_of(trained.targets[0].shots[0]) == 0
    assert weights_of(look(IMAGES, encoder(), step=1).targets[0].shots[0]) == 1


def test_the_first_step_by_who_handed_out_the_weights() -> None:
    early = look(IMAGES, encoder(), mode="train", step=1)
    late = look(IMAGES, encoder(2), mode="train", step=9)
    view = replace(early, targets=(*early.targets[:1], late.targets[1]))
    result = run(FirstStep(iterations=40), view, Knowledge(initial_model=encoder()))
    assert likeness(result.images[:1], IMAGES[:1]) > 0.98
    assert not result.images[1].any() and "1 of 2 samples" in result.notes[-1]
    assert "the initial weights, handed out by the coordinator" in result.assumptions


def test_what_it_cannot_do_it_says_in_one_line() -> None:
    view = look(IMAGES, encoder())
    other = encoder(dimensions=2, levels=(3, 4))
    cases = {
        "needs the weights": (view, Knowledge()),
        "--knows weights=FILE": (view, Knowledge(model=encoder(), queries=True)),
        "from the weights of step 4": (view, Knowledge(model=encoder(), weights_step=4)),
        "do not fit the capture: x0": (view, Knowledge(model=other)),
        "cannot be simulated": (replace(view, defences=("fog:3",)), Knowledge(model=encoder())),
    }
    for words, (seen, knowledge) in cases.items():
        with pytest.raises(AttackImpossible, match=words) as failure:
            run(WhiteBox(iterations=1), seen, knowledge)
        assert "\n" not in str(failure.value)
    with pytest.raises(AttackImpossible, match="handed out"):
        run(FirstStep(), view, Knowledge())
    with pytest.raises(AttackImpossible, match="before the first update"):
        run(FirstStep(), view, Knowledge(initial_model=encoder()))
    with pytest.raises(ValueError, match="schedule must be"):
        WhiteBox(schedules="joint,backwards")
    with pytest.raises(ValueError, match="law must be"):
        WhiteBox(law="unwritten")


class TestMinimising:
    def test_lbfgs_finds_each_samples_own_minimum(self) -> None:
        scales = torch.tensor([1.0, 1e4, 1e-3]).view(3, 1)
        goal = torch.arange(12.0).view(3, 4)
        steep = torch.tensor([1.0, 10.0, 100.0, 1000.0])
        found = lbfgs(lambda x: (scales * steep * (x - goal).square()).sum(1), torch.zeros(3, 4), 60)
        assert torch.allclose(found, goal, atol=1e-2)

    def test_a_neighbour_does_not_matter(self) -> None:
        start, goal = torch.zeros(2, 4), torch.arange(8.0).view(2, 4)

        def bent(x: torch.Tensor, goal: torch.Tensor) -> torch.Tensor:
            return ((x - goal).abs() ** 3 + (x * goal).cos()).sum(1)

        both = lbfgs(lambda x: bent(x, goal), start, 15)
        alone = lbfgs(lambda x: bent(x, goal[:1]), start[:1], 15)
        assert torch.equal(both[:1], alone)

    def test_adam_finds_it_too(self) -> None:
        goal = torch.tensor([[0.5, -0.5]])
        found = adam(lambda x: (x - goal).square().sum(1), torch.zeros(1, 2), 100, rate=0.1)
        assert torch.allclose(found, goal, atol=1e-2)

    def test_total_variation_does_not_depend_on_gain_and_offset(self) -> None:
        images = torch.from_numpy(heads(2, 3))
        assert torch.allclose(total_variation(images), total_variation(3 * images + 1), rtol=1e-4)
        assert bool((total_variation(torch.randn(2, 1, 32, 32)) > total_variation(images)).all())


class TestRehearsing:
    """The adversary learns what defences do from its own draws of them."""

    def effects(self, *defences: str) -> tuple[float, float, float]:
        view = look(IMAGES, encoder(), defences=defences)
        with torch.no_grad():
            clean = encoder()(torch.from_numpy(IMAGES))
        effect = SimulatedDefences(view, None, 0).effects(clean)["x0"]
        return float(effect.gain[0]), float(effect.scatter[0]), float(clean["x0"][0].square().mean().sqrt())

    def test_gain_and_scatter(self) -> None:
        gain, scatter, size = self.effects("gaussian:0.5")
        assert gain == pytest.approx(1, abs=0.02) and scatter == pytest.approx(0.5 * size, rel=0.05)
        gain, scatter, _ = self.effects("dropout:0.5,rescale=true")
        assert gain == pytest.approx(2, rel=1e-5) and scatter == pytest.approx(0, abs=1e-4)
        gain, _, _ = self.effects("dropout:0.5", "gaussian:0.5")
        assert gain == pytest.approx(0.5, abs=0.03)

    def test_many_views_are_drawn_as_few_whose_scatter_shrinks(self) -> None:
        view = look(IMAGES, encoder(), defences=["gaussian:1"])
        with torch.no_grad():
            clean = encoder()(torch.from_numpy(IMAGES))
        simulation = SimulatedDefences(view, None, 0)

        def scatter(views: int) -> float:
            seen = simulation.averaged(clean, 0, views, {"x0": False})["x0"]
            return float((seen.mean - clean["x0"]).std())

        assert scatter(4) == pytest.approx(scatter(1) / 2, rel=0.1)
        assert scatter(100) == pytest.approx(scatter(1) / 10, rel=0.1)

    def test_kept_noise_does_not_shrink(self) -> None:
        view = look(IMAGES, encoder(), defences=["gaussian:1,kept=true"])
        with torch.no_grad():
            clean = encoder()(torch.from_numpy(IMAGES))
        simulation = SimulatedDefences(view, None, 0)
        one, many = (simulation.averaged(clean, 0, n, {"x0": False})["x0"].mean for n in (1, 100))
        assert torch.allclose(one, many, atol=1e-5)


def test_evidence_counts_what_was_seen() -> None:
    view = look(IMAGES, encoder(), defences=["dropout:0.5"], views=8)
    (evidence,) = gather([t.shots for t in view.targets], "t1", masked=True)
    seen = evidence.levels["x0"]
    with torch.no_grad():
        clean = encoder()(torch.from_numpy(IMAGES))["x0"]
    known = seen.count > 0
    assert seen.masked and 0.99 < known.float().mean() < 1 and 3.9 < seen.count.mean() < 4.1
    assert torch.allclose(seen.mean[known], clean[known], atol=1e-5)
    (naive,) = gather([t.shots for t in view.targets], "t1", masked=False)
    assert not naive.levels["x0"].masked and bool((naive.levels["x0"].count == 8).all())
