"""How much effort an attack is given: its budget is doubled until that gains less than a hundredth.

An attack with a small budget tells a hospital that it is safe. So steps, iterations or epochs are doubled as long as
the figure of merit still rises, or until a named limit. The figure is the judge's, by the truth, which no adversary
has: an audit asks what leaks to one that chose its effort well. That choice can be too lucky by the noise of the
figure, never too unlucky. Without the truth the adversary's own figure decides, on patients that it held out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from splitpeer.attacks.base import Attack, Spending, Stopped
from splitpeer.errors import ConfigError

GAIN = 0.01
MOST = 16
"""Four doublings: about the published effort of most attacks."""
AUTO = "auto"

Found = TypeVar("Found")


@dataclass(frozen=True)
class Budget:
    """How often a budget is doubled."""

    most: int = MOST
    """At most so many times what the settings of the attack say; 1: exactly that."""
    gain: float = GAIN
    """Another doubling must have gained this much of the figure."""
    patience: int = 1
    """So many doublings in a row without that end it."""

    @classmethod
    def read(cls, written: str | int) -> Budget:
        """`auto`, or the largest multiple. Raises ConfigError."""
        if written == AUTO:
            return cls()
        try:
            most = int(written)
        except ValueError:
            most = 0
        if most < 1:
            raise ConfigError(
                f"budget {written!r}: write auto, or how many times the settings' effort at most (1: just that)"
            )
        return cls(most)


FIXED = Budget(most=1)
"""What the settings say, and no more."""


def doubled(
    attempt: Callable[[int], tuple[Found, float | None]], budget: Budget
) -> tuple[Found, int, tuple[tuple[int, float], ...], Stopped]:
    """The best of attempts at 1, 2, 4 ... times an effort.

    Args:
        attempt: (times) to what was found and its figure, higher is better; None: nobody can judge, which ends it.

    Returns:
        What was found at the best times, these times, the curve, and why no more was tried.
    """
    times, curve = 1, []
    best, figure = attempt(times)
    if figure is None:
        return best, times, (), "fixed"
    curve.append((times, figure))
    kept, reached, idle = times, figure, 0
    stopped: Stopped = "fixed" if budget.most == 1 else "limit"
    while times * 2 <= budget.most:
        times *= 2
        found, figure = attempt(times)
        if figure is None:
            break
        curve.append((times, figure))
        gained = figure - reached
        if gained > 0:
            best, kept, reached = found, times, figure
        idle = idle + 1 if gained < budget.gain else 0
        if idle >= budget.patience:
            stopped = "converged"
            break
    return best, kept, tuple(curve), stopped


def scaled(attack: Attack, times: int) -> Attack:
    """The attack with `times` its budget."""
    if times == 1:
        return attack
    more: dict[str, Any] = {name: value * times for name, value in _efforts(attack).items()}
    return replace(attack, **more)


def spent(
    attack: Attack, times: int, curve: tuple[tuple[int, float], ...] = (), stopped: Stopped = "fixed"
) -> Spending | None:
    """The account of `attack` at `times` its budget; None for one that has no budget."""
    efforts = _efforts(attack)
    if not efforts:
        return None
    words = ", ".join(f"{name.replace('_', ' ')} {value * times}" for name, value in efforts.items())
    return Spending(words, times, curve, stopped, attack.published)


def _efforts(attack: Attack) -> dict[str, int]:
    """Its budget's settings; where all its steps are given, its epochs say nothing."""
    found = {name: getattr(attack, name) for name in attack.budget}
    held = {name: value for name, value in found.items() if value is not None}
    steps = [value for name, value in found.items() if name.endswith("steps")]
    if steps and None not in steps:
        held.pop("epochs", None)
    return held
