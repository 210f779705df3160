"""Budgets are doubled until that gains less than a hundredth: attacks with known curves."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest

from splitpeer.attacks.base import Attack, Knowledge, Progress, Recovered, Result, View
from splitpeer.attacks.budget import FIXED, Budget, Spending, doubled
from splitpeer.attacks.catalogue import CATALOGUE, make_attack
from splitpeer.attacks.runner import run, run_doubled
from splitpeer.errors import ConfigError

from .image_attacks import encoder, heads, look

CONVERGES = {1: 0.3, 2: 0.5, 4: 0.6, 8: 0.605, 16: 0.9}
RISES = {1: 0.1, 2: 0.2, 4: 0.3, 8: 0.4, 16: 0.5}
FALLS = {1: 0.5, 2: 0.4, 4: 0.9}


@dataclass(frozen=True, kw_only=True)
class Climbing(Attack):
    """Shows one grey for each step that it was given."""

    name, title, source, plain = "climbing", "climbing", "here", "Climbs."
    goal, role = "image", "coordinator"
    budget, published = ("steps", "rounds"), "5000 steps"

    steps: int = 10
    rounds: int | None = None

    def recover(self, view: View, knowledge: Knowledge, progress: Progress) -> Recovered:
        images = np.full((len(view.targets), 1, *view.window), float(self.steps), np.float32)
        return Recovered(images, 1, merit=self.steps / 1000 if knowledge.shadow else None)


def along(curve: dict[int, float]):
    """A judge to whom `curve` happens."""
    asked: list[int] = []

    def judge(result: Result) -> float:
        asked.append(times := round(float(result.images.max())) // 10)
        return curve[times]

    return judge, asked


VIEW = look(heads(2, 1), encoder())


@pytest.mark.parametrize(
    ("curve", "most", "tried", "kept", "why"),
    [
        (CONVERGES, 16, [1, 2, 4, 8], 8, "converged"),
        (RISES, 16, [1, 2, 4, 8, 16], 16, "limit"),
        (RISES, 4, [1, 2, 4], 4, "limit"),
        (RISES, 7, [1, 2, 4], 4, "limit"),
        (FALLS, 16, [1, 2], 1, "converged"),
        (RISES, 1, [1], 1, "fixed"),
    ],
)
def test_a_budget_is_doubled_while_that_gains(curve, most, tried, kept, why) -> None:
    judge, asked = along(curve)
    result = run_doubled(Climbing(), VIEW, Knowledge(), Budget(most), judge)
    assert asked == tried and result.images.max() == 10 * kept and result.settings["steps"] == 10 * kept
    assert result.spent == Spending(
        f"steps {10 * kept}", kept, tuple((n, curve[n]) for n in tried), why, "5000 steps"
    )


def test_the_gain_is_over_the_best_so_far_and_a_bare_hundredth_goes_on() -> None:
    def attempt(times: int) -> tuple[int, float]:
        return times, {1: 0.30, 2: 0.3125, 4: 0.315, 8: 1.0}[times]

    assert doubled(attempt, Budget()) == (4, 4, ((1, 0.30), (2, 0.3125), (4, 0.315)), "converged")


def test_settings_that_are_given_are_doubled_together() -> None:
    judge, _ = along({1: 0.1, 2: 0.2, 4: 0.2})
    result = run_doubled(Climbing(rounds=3), VIEW, Knowledge(), Budget(), judge)
    assert (result.settings["steps"], result.settings["rounds"]) == (20, 6)
    assert result.spent is not None and result.spent.effort == "steps 20, rounds 6"


def test_without_the_truth_the_adversarys_own_figure_decides_and_without_that_nothing_is_doubled() -> None:
    shadow = {"t1": heads(2, 9)}
    own = run_doubled(Climbing(), VIEW, Knowledge(shadow=shadow), Budget(4), lambda _: None)
    assert own.spent is not None and own.spent.curve == ((1, 0.01), (2, 0.02), (4, 0.04))
    blind = run_doubled(Climbing(), VIEW, Knowledge(), Budget(4), lambda _: None)
    assert blind.spent == Spending("steps 10", 1, (), "fixed", "5000 steps")


def test_an_attack_without_a_budget_runs_once() -> None:
    judge, asked = along({1: 0.1})
    bare = type("Bare", (Climbing,), {"budget": ()})
    assert run_doubled(bare(), VIEW, Knowledge(), Budget(), judge).spent is None and len(asked) <= 1
    assert run(Climbing(), VIEW, Knowledge()).spent == Spending("steps 10", 1, (), "fixed", "5000 steps")


def test_the_time_of_all_attempts_counts() -> None:
    judge, _ = along(RISES)
    seen: list[tuple[str, int, int]] = []
    result = run_doubled(Climbing(), VIEW, Knowledge(), Budget(4), judge, lambda *state: seen.append(state))
    assert result.seconds >= 0


@pytest.mark.parametrize("name", CATALOGUE)
def test_what_an_attack_names_as_its_budget_are_whole_numbers_of_its_settings(name: str) -> None:
    attack = make_attack(name)
    values = [attack.settings()[one] for one in attack.budget]
    assert all(value is None or isinstance(value, int) for value in values)
    assert not attack.budget or any(value for value in values)


def test_budgets_are_written_auto_or_a_multiple() -> None:
    assert Budget.read("auto") == Budget() and Budget.read("8") == Budget(8) and Budget.read(1) == FIXED
    for odd in ("0", "-2", "much", "1.5", ""):
        with pytest.raises(ConfigError, match="write auto"):
            Budget.read(odd)


def test_a_report_says_why_no_more_was_spent() -> None:
    spent = Spending("steps 20", 2, (), "limit", "")
    assert spent.told() == "steps 20 (at the limit: more may gain)"
    assert replace(spent, stopped="converged").told() == "steps 20 (more gains less than .01)"


def test_a_patient_budget_outlives_one_doubling_without_gain() -> None:
    def attempt(times: int) -> tuple[int, float]:
        return times, {1: 0.5, 2: 0.42, 4: 0.6, 8: 0.6, 16: 0.6, 32: 1.0}[times]

    best, times, curve, why = doubled(attempt, Budget(32, patience=2))
    assert (best, times, len(curve), why) == (4, 4, 5, "converged")
