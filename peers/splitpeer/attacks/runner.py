"""Runs an attack: checks what it needs, times it, and says under which assumptions its result was obtained."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from splitpeer.attacks.base import Attack, Knowledge, Progress, Result, View, silent
from splitpeer.attacks.budget import Budget, doubled, scaled, spent
from splitpeer.errors import AttackImpossible


@dataclass(frozen=True)
class Need:
    """One thing that an adversary must be granted."""

    what: str
    """In words; `{images}`: the modalities of the first seat whose images are missing."""
    how: str
    """What to type."""
    granted: Callable[[View, Knowledge], bool]


_SHADOW = "--knows shadow=DIR"

NEEDS: dict[str, Need] = {
    "encoder": Need(
        "the site's encoder, its weights or queries", "--knows weights=FILE", lambda v, k: k.model is not None
    ),
    "weights": Need(
        "the weights of the site's encoder, not only queries", "--knows weights=FILE",
        lambda v, k: k.model is not None and not k.queries,
    ),
    "weights of any step": Need(
        "the weights of the site's encoder at one step or more", "--knows weights=FILE for each step",
        lambda v, k: bool(k.models) or (k.model is not None and not k.queries),
    ),
    "initial weights": Need(
        "the initial weights, handed out by the coordinator", "--knows initial=FILE",
        lambda v, k: k.initial_model is not None,
    ),
    "architecture": Need(
        "to know which network it is", "the job names it", lambda v, k: k.architecture
    ),
    "shadow": Need("{images} images of other patients", _SHADOW, lambda v, k: v.seat.name in k.shadow),
    "shadow of all": Need(
        "{images} images of other patients", _SHADOW, lambda v, k: {seat.name for seat in v.seats} <= set(k.shadow)
    ),
    "shadow masks": Need(
        "the masks of the other patients", f"put labels/ into the folder of {_SHADOW}, and name --convention",
        lambda v, k: k.shadow_masks is not None,
    ),
    "decoder": Need("the coordinator's half", "--knows decoder=FILE", lambda v, k: k.decoder is not None),
}  # fmt: skip
"""What `Attack.needs` may name."""


def run(attack: Attack, view: View, knowledge: Knowledge, progress: Progress = silent) -> Result:
    """Attack all targets of `view`.

    Raises:
        AttackImpossible: the view or the knowledge lacks what the attack needs; the text says what.
        KeyboardInterrupt: `progress` raised it.
    """
    check(attack, view, knowledge)
    began = time.perf_counter()
    found = attack.recover(view, knowledge, progress)
    published = {"published": attack.published} if attack.published else {}
    return Result(
        attack=attack.name,
        goal=attack.goal,
        images=found.images,
        adaptive=knowledge.adaptive or not attack.has_naive_form,
        assumptions=((attack.evidence,) if attack.evidence else ()) + knowledge.assumptions(attack.uses),
        settings={**attack.settings(), **published, **found.settings},
        views=found.views,
        seconds=time.perf_counter() - began + found.saved,
        notes=found.notes,
        history=found.history,
        merit=found.merit,
        spent=spent(attack, 1),
    )


def run_doubled(
    attack: Attack, view: View, knowledge: Knowledge, budget: Budget, judge: Callable[[Result], float | None],
    progress: Progress = silent,
) -> Result:  # fmt: skip
    """`run` with the attack's budget doubled as long as that gains; the best result, and what all of them took.

    Args:
        judge: the figure of merit of a result, higher is better; None: the adversary's own counts.

    Raises as `run`.
    """
    if not attack.budget:
        return run(attack, view, knowledge, progress)
    seconds = 0.0

    def attempt(times: int) -> tuple[Result, float | None]:
        nonlocal seconds
        result = run(scaled(attack, times), view, knowledge, progress)
        seconds += result.seconds
        figure = judge(result)
        return result, result.merit if figure is None else figure

    best, times, curve, stopped = doubled(attempt, budget)
    return replace(best, seconds=seconds, spent=spent(attack, times, curve, stopped))


def check(attack: Attack, view: View, knowledge: Knowledge) -> None:
    """Raises AttackImpossible where the view is another role's or empty, or something needed is not granted."""
    if attack.role != view.role:
        wanted = {"coordinator": "coordinator", "client": "site"}[attack.role]
        raise AttackImpossible(
            f"{attack.name} works on a {wanted}'s capture, and a {view.role} recorded this capture"
        )
    if not view.targets:
        raise AttackImpossible(f"{attack.name}: the view holds no sample; record more, or choose others")
    for need in (NEEDS[name] for name in attack.needs):
        if not need.granted(view, knowledge):
            seat = next((s for s in (view.seat, *view.seats) if s.name not in knowledge.shadow), view.seat)
            what = need.what.format(images=" and ".join(seat.modalities))
            raise AttackImpossible(f"{attack.name} needs {what}: {need.how}")
