"""Patient by patient: an adversary runs every attack, and for each patient the one that works best there counts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from splitpeer.leakage.scores import Score, of_each_worst
from splitpeer.report.findings import ReportFinding
from splitpeer.report.model import UNDEFENDED
from splitpeer.report.names import brief
from splitpeer.report.text import upper_first

FIGURE = {"image": "ssim", "mask": "advantage_auc"}
"""By goal: likeness, and how much more than the site's own image a map shows."""


@dataclass(frozen=True)
class ByPatient:
    """One adversary on one contrast."""

    configuration: str
    reads: str
    """What it reads beyond one seat's tensors."""
    where: str
    score: Score
    """Of each patient the largest figure, with the interval over patients."""
    worst: str
    """The patient of whom most is shown, by the first digits of the pseudonym; empty: not known."""
    by: str
    """The attack that shows it."""
    attacks: int

    @property
    def adversary(self) -> str:
        """For a table."""
        defence = "no defence" if self.configuration == UNDEFENDED else brief(self.configuration)
        return ", ".join(filter(None, (defence, self.reads)))

    @property
    def most(self) -> float | None:
        """The figure of the worst patient."""
        return max((value for value in self.score.each if value is not None), default=None)


def by_patient(findings: Sequence[ReportFinding]) -> list[ByPatient]:
    """A row for each adversary, contrast and set of patients; findings that do not count are left out."""
    groups: dict[tuple[object, ...], list[ReportFinding]] = {}
    for finding in findings:
        entry = finding.strongest
        score = entry.scores.get(FIGURE.get(entry.goal, ""))
        if finding.counts and score is not None and any(value is not None for value in score.each):
            who = (finding.patients, len(score.each))
            groups.setdefault((entry.configuration, entry.reads, finding.where, who), []).append(finding)
    return [_row(group) for group in groups.values()]


def _row(group: Sequence[ReportFinding]) -> ByPatient:
    entry, figure = group[0].strongest, FIGURE[group[0].entry.goal]
    every = of_each_worst([finding.strongest.scores[figure] for finding in group])
    known = [-1.0 if value is None else value for value in every.each]
    place = max(range(len(known)), key=lambda number: known[number])
    best = max(group, key=lambda finding: _at(finding, figure, place))
    names = group[0].patients if len(group[0].patients) == len(known) else ()
    return ByPatient(
        entry.configuration, entry.reads, group[0].where, every, names[place] if names else "",
        upper_first(best.strongest.title), len(group),
    )  # fmt: skip


def _at(finding: ReportFinding, figure: str, place: int) -> float:
    value = finding.strongest.scores[figure].each[place]
    return -1.0 if value is None else value
