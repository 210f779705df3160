"""How many segmentations were asked for, and what came of them, in the words of `splitpeer status`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from splitpeer.cli.terminal import duration
from splitpeer.daemon.observe import Seen
from splitproto.errors import printable

STATES = ("waiting", "running", "segmented", "refused", "cancelled", "failed")
"""Of requests at a coordinator."""
_OF_A_SITE = ("waiting", "running", "segmented", "cancelled", "failed")
_ANSWERS = ("answered", "refused", "unable")


def is_whole(told: object) -> bool:
    """Whether `work.serving` or `work.inference`, of a file that anybody may have written, can be shown."""
    return (
        isinstance(told, Mapping)
        and isinstance(told.get("waiting"), int)
        and isinstance(told.get("running"), int)
        and isinstance(askers := told.get("askers"), Mapping)
        and all(isinstance(counts, Mapping) for counts in askers.values())
    )


def at_coordinator(one: Seen) -> str:
    """Which run it serves, and how many requests there are."""
    told: Mapping[str, Any] = one.work["serving"]
    step = f" with the weights of step {_number(told, 'step')}" if one.phase == "serving" else ""
    serves = "is served" if told.get("serves") else "is not served yet"
    counts = {
        "waiting": told["waiting"],
        "running": told["running"],
        "ended": told.get("finished"),
    }
    run = printable(str(told.get("run") or ""))[:12]
    return (
        f"inference: run {run} {serves}{step}; {_counted(counts, all_of=True)}{_last(one, told.get('last'))}"
    )


def by_site(one: Seen) -> list[tuple[str, ...]]:
    """For each site that has ever asked a coordinator: its name, and how many of its requests are in each state."""
    askers: Mapping[str, Mapping[str, Any]] = one.work["serving"]["askers"]
    return [
        (printable(str(site)), *(str(_number(counts, state)) for state in STATES))
        for site, counts in askers.items()
    ]


def at_site(one: Seen) -> list[str]:
    """Lines: whether a site serves, who has asked it, and what its own people have asked for."""
    if not is_whole(told := one.work["inference"]):
        return []
    asked = "; ".join(
        f"{printable(str(who))}: {_counted(counts, _ANSWERS)}" for who, counts in told["askers"].items()
    )
    return [
        f"inference: {_serves(told)}",
        f"asked by {asked}{_last(one, told.get('answered_last'))}" if asked else "asked by nobody so far",
        f"asked for here: {_counted(told, _OF_A_SITE) or 'nothing so far'}{_last(one, told.get('last'))}",
    ]


def at_sites(sites: Sequence[Seen]) -> list[tuple[str, ...]]:
    """The same as rows of a table: site, whether it serves, what it was asked, and what was asked for there."""
    rows: list[tuple[str, ...]] = []
    for one in sites:
        told: Mapping[str, Any] = one.work["inference"]
        answers: Counter[str] = Counter()
        for counts in told["askers"].values():
            answers.update({name: _number(counts, name) for name in _ANSWERS})
        rows.append((one.site, _serves(told), _counted(answers, _ANSWERS), _counted(told, _OF_A_SITE)))
    return rows


def _serves(told: Mapping[str, Any]) -> str:
    """`[policy] inference`, and why nobody can ask at the moment."""
    serves = told.get("serves")
    why = ", no link now" if serves is None else ", the job has no [inference]" if serves is False else ""
    return printable(str(told.get("policy") or "")) + why


def _counted(counts: Mapping[str, Any], names: Sequence[str] | None = None, *, all_of: bool = False) -> str:
    """Such as `3 answered, 1 refused`; those that are 0 only with `all_of`."""
    shown = {name: _number(counts, name) for name in names or counts}
    return ", ".join(f"{count} {name}" for name, count in shown.items() if count or all_of)


def _number(counts: Mapping[str, Any], name: str) -> int:
    return number if isinstance(number := counts.get(name), int) else 0


def _last(one: Seen, moment: object) -> str:
    age = one.age(moment)
    return "" if age is None else f", the last {duration(age)} ago"
