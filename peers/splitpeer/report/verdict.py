"""The three answers at the top of the page, from the findings."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from splitpeer.leakage.measure import OWN_IMAGE
from splitpeer.leakage.scores import Score, highest_floor
from splitpeer.report.bands import Band, recognised, tumour_shows
from splitpeer.report.findings import Configuration, ReportFinding, worst
from splitpeer.report.model import UNDEFENDED, Point
from splitpeer.report.names import SUM, brief
from splitpeer.report.patients import by_patient
from splitpeer.report.text import lower_first, share, signed, upper_first
from splitpeer.report.words import NEIGHBOURS

SMALL_COST = 0.03
"""Dice that a defence may cost to count as cheap here; a choice of this page, not of nature."""
WORTH_NAMING = 0.05
"""Likeness by which a defence must lower the worst case to be named as a gain."""


@dataclass(frozen=True)
class Answer:
    """One question of the privacy officer and what was found."""

    question: str
    short: str
    band: Band | None = None
    details: tuple[str, ...] = ()


def answers(
    found: Sequence[Configuration], points: Sequence[Point] = (), *, frozen: bool = False
) -> tuple[Answer, Answer, Answer]:
    """What the coordinator sees, what the other hospitals see, what defences buy.

    Args:
        frozen: no run sends a gradient.
    """
    return images(found), labels(found, frozen=frozen), defences(found, points)


def under(name: str) -> str:
    """How a sentence names a configuration: "without a defence", "under dropout:0.5", "in a secure sum of ..."."""
    if name.startswith(SUM):
        return f"in a {brief(name)}"
    return "without a defence" if name == UNDEFENDED else f"under {brief(name)}"


def images(found: Sequence[Configuration]) -> Answer:
    """Question 1."""
    question = "What can the coordinator see of our images?"
    tested = [one for one in found if one.images]
    if not tested:
        return Answer(question, "Not tested in these runs.")
    judged = [(one, worst) for one in tested if (worst := one.worst_image)]
    if not judged:
        return Answer(
            question,
            "Not measured: see the pictures."
            if any(finding.counts for one in tested for finding in one.images)
            else "Not judged: only adversaries who ignore the defence were tried.",
            details=("Without the true images, or without an adversary who knows the defence, no figure says "
                     "how much was recovered.",),
        )  # fmt: skip
    # A question of the coordinator: what it sees with the help of hospitals is told after that.
    alone = [pair for pair in judged if not pair[0].helped] or judged
    first, most = alone[0]
    details = [_image_sentence(finding) for finding in _by_place(first.alone)]
    details += _patient_by_patient(first)
    details += _beyond_likeness(first)
    details.append(_assumed(most))
    best, least = alone[-1]
    if best is not first and least.leaked < most.leaked:
        details.append(
            f"Least was seen {under(best.name)}: {least.word} ({_likeness(least)}){_tumour_words(best)}."
        )
    details += _with_neighbours(first)
    details += [
        _helped_sentence(finding, one.name)
        for one in tested
        if not (one is first and one.helped)
        for finding in _by_help(one)
    ]
    short = f"{upper_first(most.word)}, {under(first.name)}."
    return Answer(question, short, most.band, tuple(details))


def labels(found: Sequence[Configuration], *, frozen: bool = False) -> Answer:
    """Question 2."""
    question = "What can the other hospitals see of the labels?"
    if frozen:
        return Answer(
            question,
            "Nothing: no gradient is sent.",
            details=("Encoders are frozen: a hospital is asked for its windows once, and gets nothing back. It knows "
                     "which windows of its own patients were asked for, and so which of them have a usable mask.",),
        )  # fmt: skip
    judged = [(one, worst) for one in found if (worst := one.worst_mask)]
    if not judged:
        tested = any(one.masks for one in found)
        short = "Not measured: see the maps." if tested else "Not tested in these runs."
        return Answer(question, short)
    first, most = judged[0]
    details = [_mask_sentence(finding) for finding in _by_place(first.masks)]
    details.append(_assumed(most))
    best, least = min(judged, key=lambda pair: pair[1].leaked)
    if best is not first and least.leaked < most.leaked:
        details.append(f"Least was seen {under(best.name)}: {least.word} (AUC {least.leaked:.2f}).")
    short = f"{upper_first(most.word)}, {under(first.name)}."
    return Answer(question, short, most.band, tuple(details))


def defences(found: Sequence[Configuration], points: Sequence[Point]) -> Answer:
    """Question 3. A sweep's points speak where there are more of them."""
    question = "What does each defence buy, and at what Dice?"
    rows = [
        Row(
            one.name,
            one.dice,
            one.worst_image.leaked,
            highest_floor(one.worst_image.strongest.scores["ssim"]),
        )
        for one in found
        if one.worst_image and one.dice is not None
    ]
    if len(points) > len(rows):
        rows = [Row(brief(point.name), point.dice, point.leakage, point.floor) for point in points]
    plain = next((row for row in rows if row.name == UNDEFENDED), None)
    defended = [row for row in rows if row.name != UNDEFENDED]
    if not defended:
        tried = [one.name for one in found if one.name != UNDEFENDED and one.worst_image]
        if tried:
            return Answer(question, "The gain is in the table below; its cost in Dice is not in these runs.")
        if any(one.name != UNDEFENDED for one in found):
            return Answer(
                question,
                "No defence was judged: that needs the true images and an adversary who knows the defence.",
            )
        return Answer(question, "No defence was tried in these runs.")
    details = []
    if plain is None:
        least = min(defended, key=lambda row: row.leakage)
        return Answer(
            question,
            f"Least leakage: {least.name}, likeness {least.leakage:.2f} at Dice {least.dice:.2f}.",
            details=("No run without a defence is among these, so the cost is not known.",),
        )
    cheap = [
        row
        for row in defended
        if plain.dice - row.dice <= SMALL_COST and plain.leakage - row.leakage >= WORTH_NAMING
    ]
    details.append(f"Without a defence: Dice {plain.dice:.2f}, worst likeness {plain.leakage:.2f}.")
    points_of = f"{100 * SMALL_COST:.0f} points of Dice"
    if cheap:
        best = min(cheap, key=lambda row: row.leakage)
        short = f"For at most {points_of}: likeness {best.leakage:.2f} instead of {plain.leakage:.2f}, by {best.name}."
        details.append(f"{best.name}: Dice {best.dice:.2f}{_floor_words(best)}.")
    else:
        short = f"Nothing that was tried lowers the worst case by much for at most {points_of}."
    least = min(defended, key=lambda row: row.leakage)
    if not cheap or least.name != best.name:
        details.append(
            f"The least leakage of all: {least.name}, likeness {least.leakage:.2f}, at Dice {least.dice:.2f}"
            f"{_floor_words(least)}."
        )
    useless = [row.name for row in defended if row.leakage > plain.leakage - WORTH_NAMING]
    if useless:
        details.append(f"Little or no gain against an adversary who knows the defence: {', '.join(useless)}.")
    return Answer(question, short, None, tuple(details))


@dataclass(frozen=True)
class Row:
    """One configuration: Dice and the worst likeness."""

    name: str
    dice: float
    leakage: float
    floor: float | None


def _floor_words(row: Row) -> str:
    return "" if row.floor is None else f" (an average image reaches {row.floor:.2f})"


def _by_place(findings: Sequence[ReportFinding]) -> list[ReportFinding]:
    """The worst of each modality, and of each of several sites that have it, most first."""
    names = sorted({finding.where for finding in findings})
    most = [worst(f for f in findings if f.where == name) for name in names]
    return sorted((one for one in most if one), key=lambda one: -(one.leakage or 0.0))


def _likeness(finding: ReportFinding) -> str:
    score = finding.strongest.scores["ssim"]
    floor = highest_floor(score)
    who = (
        f"{' and '.join(finding.entry.clear)} alone show"
        if finding.entry.clear
        else "an average image reaches"
    )
    beside = "" if floor is None else f"; {who} {floor:.2f}"
    return f"likeness {score.mean:.2f} of 1{_between(score)}{beside}"


def _between(score: Score) -> str:
    """The interval of a figure, in brackets that follow it."""
    return "" if score.low is None or score.high is None else f" [{score.low:.2f} to {score.high:.2f}]"


def _patient_by_patient(one: Configuration) -> list[str]:
    """What counts for a patient is the attack that works best on this patient."""
    sentences = []
    for row in sorted(by_patient(one.images), key=lambda row: (row.where, row.reads)):
        every, reads = row.score, f", {row.reads}" if row.reads else ""
        if row.attacks > 1 and every.mean is not None and every.worst is not None:
            sentences.append(
                f"{row.where}{reads}, each patient by the attack that works best: likeness {every.mean:.2f}"
                f"{_between(every)} on average, {every.worst:.2f} in the worst tenth of {every.patients}."
            )
    return sentences


def _image_sentence(finding: ReportFinding) -> str:
    score = finding.strongest.scores["ssim"]
    several = score.worst is not None and score.patients > 1
    tail = f"; worst tenth of patients {score.worst:.2f}" if several else ""
    what = f"{finding.where}: {finding.word}"
    return f"{what} by {lower_first(finding.entry.title)} ({_likeness(finding)}{tail})."


def _with_neighbours(one: Configuration) -> list[str]:
    """What the slices above and below add to the same attack on each slice by itself."""
    near = [finding for finding in one.alone if NEIGHBOURS in finding.entry.reads]
    return [
        f"{finding.where}, each slice read together with those above and below it, by "
        f"{lower_first(finding.entry.title)} ({_likeness(finding)})."
        for finding in _by_place(near)
    ]


def _by_help(one: Configuration) -> list[ReportFinding]:
    """The worst of each place for each set of images that hospitals show the coordinator."""
    helped = [finding for finding in one.images if finding.entry.clear]
    sets = dict.fromkeys(finding.entry.clear for finding in helped)
    return [finding for clear in sets for finding in _by_place([f for f in helped if f.entry.clear == clear])]


def _helped_sentence(finding: ReportFinding, name: str) -> str:
    gained = finding.strongest.scores.get("advantage_ssim")
    adds = ""
    if gained is not None and gained.mean is not None:
        adds = f"; what was sent adds {signed(gained.mean)}{_between(gained)}"
    return (
        f"With hospitals that show it {' and '.join(finding.entry.clear)} of the same patient, {finding.where} by "
        f"{lower_first(finding.entry.title)}, {under(name)} ({_likeness(finding)}{adds})."
    )


def _beyond_likeness(one: Configuration) -> list[str]:
    """Tumour and identity, by whichever attack shows them best: not always the one with the highest likeness."""
    said = []
    if finding := _best(one, "tumour_dice", tumour_shows):
        score = finding.strongest.scores["tumour_dice"]
        ceiling = "" if score.ceiling is None else f", against {score.ceiling:.2f} in the true image"
        said.append(f"The target can be found in the reconstruction (Dice {score.mean:.2f}{ceiling}).")
    if finding := _best(one, "reidentification", recognised):
        score = finding.strongest.scores["reidentification"]
        said.append(
            f"The patient can be picked out: {share(score.mean)} of {score.patients} patients fit their own image best"
            f"{_between(score)} ({share(highest_floor(score) or 0)} by chance)."
        )
    return said


def _best(
    one: Configuration, name: str, holds: Callable[[Mapping[str, Score]], bool]
) -> ReportFinding | None:
    found = [finding for finding in one.images if finding.counts and holds(finding.strongest.scores)]
    return max(found, key=lambda finding: finding.strongest.scores[name].mean or 0.0, default=None)


def _tumour_words(one: Configuration) -> str:
    return "; the target can still be found" if _best(one, "tumour_dice", tumour_shows) else ""


def _mask_sentence(finding: ReportFinding) -> str:
    scores = finding.strongest.scores
    best = scores.get("dice_otsu") or scores.get("dice_oracle")
    dice = f", Dice {best.mean:.2f}" if best is not None and best.mean is not None else ""
    floor = highest_floor(scores["auc"])
    beside = "" if floor is None else f"; without gradients: {floor:.2f}"
    gained = scores.get("advantage_auc")
    more = ""
    if gained is not None and gained.mean is not None:
        more = f" Its own image with other patients' labels shows {scores['auc'].floors[OWN_IMAGE]:.2f}: the gradient "
        more += f"adds {max(gained.mean, 0.0):.2f}{_between(gained)}."
    return (
        f"The hospital with {finding.where}: {finding.word} by {lower_first(finding.entry.title)} "
        f"(AUC {scores['auc'].mean:.2f}{_between(scores['auc'])}{dice}{beside}).{more}"
    )


def _assumed(finding: ReportFinding) -> str:
    words = finding.strongest.assumptions
    return (
        "The adversary was granted: " + ("; ".join(words) if words else "nothing but what it received") + "."
    )
