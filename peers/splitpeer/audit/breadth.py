"""A sweep beyond one seat and one adversary: every contrast, sites that help, who was trained on; and their table.

Every contrast is attacked once by a quick attack; the one that shows most is attacked like the seat of the plan, on one
release. Many releases, poses and labels are the plan's seat's alone: recording them at every site would take
several gigabytes a configuration.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import mean
from typing import Any

from splitpeer.attacks.budget import FIXED
from splitpeer.audit.cohort import Samples
from splitpeer.audit.experiment import Experiment, Order, image_experiment, parse_order
from splitpeer.audit.judge import Outcome, drawn_from
from splitpeer.audit.plan import SweepHead
from splitpeer.audit.rehearsal import Rehearsal, Rehearsed
from splitpeer.audit.run_folder import RunFolder
from splitpeer.audit.wider import (
    colluding_experiment,
    helpers,
    members_and_others,
    membership_experiment,
    membership_order,
    recorded_of,
)
from splitpeer.captures.reader import open_capture
from splitproto.records import Sample

READ_OFF = ("tumour_presence", "tumour_volume", "tumour_side")


def once(written: Sequence[str]) -> list[Order]:
    """Attacks on one release of each sample."""
    return [replace(parse_order(text), views=1) for text in written]


def attack_every_seat(
    experiment: Experiment, rehearsal: Rehearsal, played: Rehearsed, others: Samples, head: SweepHead, folder: RunFolder
) -> list[Outcome]:  # fmt: skip
    """`head.every` on each seat; then `head.attacks` on the one that shows most, unless it is the plan's seat.

    Args:
        experiment: on the plan's seat.
    """
    if not head.every:
        return []
    found: list[Outcome] = []
    seats: dict[str, Experiment] = {}
    shown: dict[str, float] = {}
    for name in rehearsal.seats:
        one = experiment
        if name != head.seat:
            one = image_experiment(rehearsal, played, name, experiment.judge, others, experiment.device)
        quick = list(replace(one, budget=FIXED).run(once(head.every), folder, naive=False))
        seats[name], shown[name] = one, max(map(likeness, quick), default=0.0)
        found += quick
    most = max(shown, key=lambda name: shown[name])
    if most != head.seat:
        deep = replace(seats[most], budget=experiment.budget)
        found += deep.run(once(head.attacks), folder, naive=False)
    return [outcome for outcome in found if outcome.scores]


def attack_together(experiment: Experiment, head: SweepHead, folder: RunFolder) -> list[Outcome]:
    """`head.collusion` by the coordinator with one other site, the one whose image says most, and with all others."""
    if not head.collusion:
        return []
    found: list[Outcome] = []
    for seat in helpers(experiment):
        found += colluding_experiment(experiment, seat).run(once(head.collusion), folder, naive=False)
    return [outcome for outcome in found if outcome.scores]


def people(rehearsal: Rehearsal, head: SweepHead) -> tuple[Sample, ...]:
    """Whose membership is asked for."""
    seat = next(seat for site in rehearsal.sites for seat in site.seats if seat.name == head.seat)
    training, held_out = (
        rehearsal.filling(keys, seat) for keys in (rehearsal.training, rehearsal.validation)
    )
    return members_and_others(rehearsal.cohort, training, held_out, rehearsal.window, head.members)


def tell_members(
    experiment: Experiment, rehearsal: Rehearsal, played: Rehearsed, head: SweepHead, folder: RunFolder
) -> list[Outcome]:
    """The attack `membership` on as many training patients as others."""
    if not head.members:
        return []
    asked = recorded_of(experiment.view, open_capture(played.capture), people(rehearsal, head))
    wider = membership_experiment(experiment, asked, rehearsal.cohort, rehearsal.training, rehearsal.window)
    return list(wider.run([membership_order(rehearsal.config)], folder, naive=False))


def likeness(outcome: Outcome) -> float:
    """Mean SSIM inside the body; 0 where it was not measured."""
    return (outcome.scores["ssim"].mean or 0.0) if "ssim" in outcome.scores else 0.0


# --- figures ---------------------------------------------------------------------------------------------


def of_contrasts(images: Sequence[Outcome]) -> dict[str, float]:
    """By modality, the most that any attack of a coordinator alone showed."""
    found: dict[str, float] = {}
    for outcome in images:
        found[outcome.modality] = max(likeness(outcome), found.get(outcome.modality, 0.0))
    return found


def record(
    images: Sequence[Outcome], together: Sequence[Outcome], members: Sequence[Outcome]
) -> dict[str, Any]:
    """`wider` of a `point.json`: by contrast, what a tumour finder reads off, collusions, membership."""
    read_off = {
        name: max((o.scores[name].mean or 0.0 for o in images if name in o.scores), default=None) for name in READ_OFF
    }  # fmt: skip
    return {
        "contrasts": of_contrasts(images),
        "read_off": read_off,
        "together": [
            {
                "with": list(outcome.view.clear), "attack": outcome.result.attack, "ssim": likeness(outcome),
                "floor": outcome.scores["ssim"].floors.get(drawn_from(outcome.view.clear)),
            }
            for outcome in together
        ],
        "members": {name: score.to_json() for outcome in members for name, score in outcome.scores.items()},
    }  # fmt: skip


def breadth_table(points: Sequence[Mapping[str, Any]]) -> list[str]:
    """A table of its own: one row for each configuration, seeds averaged; nothing where no point has these figures."""
    wider = [point for point in points if any((point.get("wider") or {}).values())]
    if not wider:
        return []
    heads = ["configuration", "contrast that shows most", "mean over contrasts", "tumour told: there / size / side",
             "coordinator with one site (floor)", "with all others (floor)", "trained on: AUC",
             "found at 1 % false alarms"]  # fmt: skip
    lines = ["", "| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    names = dict.fromkeys(point["name"] for point in wider)
    rows = [_row(name, [point["wider"] for point in wider if point["name"] == name]) for name in names]
    return [*lines, *rows, "", _LEGEND]


_LEGEND = (
    "Tumour told: share of samples in which a network that learned from other patients tells from a reconstruction "
    "that there is a tumour, the smaller of true and found size over the larger, and the side; by the contrast and "
    "attack that show most. Floor of a collusion: the contrast drawn from the helping sites' own images, without "
    "anything that was sent. Trained on: guessing gives .5, and .01; in brackets exact 95 % intervals."
)


def _row(name: str, found: Sequence[Mapping[str, Any]]) -> str:
    contrasts: dict[str, list[float]] = {}
    for one in found:
        for modality, value in one["contrasts"].items():
            contrasts.setdefault(modality, []).append(value)
    means = {modality: mean(values) for modality, values in contrasts.items()}
    most = max(means, key=lambda modality: means[modality], default=None)
    read_off = [_mean([one["read_off"].get(figure) for one in found]) for figure in READ_OFF]
    sizes = sorted({len(pair["with"]) for one in found for pair in one["together"]})
    pairs = [_together(found, size) for size in (sizes[:1] + sizes[1:][-1:])] + ["-", "-"]
    cells = [
        name, "-" if most is None else f"{most} {means[most]:.2f}", _two(mean(means.values()) if means else None),
        " / ".join(map(_two, read_off)), *pairs[:2], _member(found, "member_auc"), _member(found, "member_tpr"),
    ]  # fmt: skip
    return "| " + " | ".join(cells) + " |"


def _together(found: Sequence[Mapping[str, Any]], size: int) -> str:
    pairs = [pair for one in found for pair in one["together"] if len(pair["with"]) == size]
    most = _mean([max(pair["ssim"] for pair in pairs)]) if pairs else None
    return f"{', '.join(pairs[0]['with'])}: {_two(most)} ({_two(_mean([pair['floor'] for pair in pairs]))})"


def _member(found: Sequence[Mapping[str, Any]], figure: str) -> str:
    scores = [one["members"][figure] for one in found if figure in one["members"]]
    most = max(scores, key=lambda score: score["mean"], default=None)
    return "-" if most is None else f"{_two(most['mean'])} ({_two(most['low'])}-{_two(most['high'])})"


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return mean(known) if known else None


def _two(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
