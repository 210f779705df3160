"""Entries in order: adaptive with naive, the worst of each configuration, configurations side by side."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from splitpeer.leakage.scores import Score
from splitpeer.report.bands import Band, image_band, mask_band
from splitpeer.report.model import UNDEFENDED, Entry
from splitpeer.report.names import brief, key
from splitpeer.report.store import Arrays, Folder
from splitpeer.report.text import share

GUESSED = 0.5
"""AUC of who names members at random."""


@dataclass(frozen=True)
class ReportFinding:
    """One card of the page: an attack on one modality under one configuration, with its naive form."""

    entry: Entry
    folder: int
    arrays: Arrays
    naive: Entry | None = None
    where: str = ""
    """Modality, with the site where several sites have it (see `Places`)."""
    patients: tuple[str, ...] = ()
    """See `AuditRun.patients`."""

    @property
    def counts(self) -> bool:
        """Whether it may speak for its configuration: naive attacks on a defence may not."""
        return self.entry.adaptive or self.entry.configuration == UNDEFENDED

    @property
    def strongest(self) -> Entry:
        """The form that recovered more: almost always the adaptive one."""
        if self.naive is None or (leakage(self.naive) or 0.0) <= (leakage(self.entry) or 0.0):
            return self.entry
        return self.naive

    @property
    def band(self) -> Band | None:
        """How much the strongest form recovered, in words; None where it was not measured."""
        scores = self.strongest.scores
        return image_band(scores) if self.entry.goal == "image" else mask_band(scores)

    @property
    def word(self) -> str:
        """The word of its band."""
        return self.band.word if self.band else "not measured"

    @property
    def leaked(self) -> float:
        """`leakage`, 0 where it was not measured."""
        return self.leakage or 0.0

    @property
    def leakage(self) -> float | None:
        """The figure by which attacks are ranked."""
        return leakage(self.strongest)


class Places:
    """How the page names what was attacked: by modality, with the site where several sites have that modality."""

    def __init__(self, folders: Sequence[Folder]) -> None:
        sites: dict[str, set[str]] = {}
        for entry in (entry for folder in folders if folder.run for entry in folder.run.entries):
            sites.setdefault(entry.modality, set()).add(entry.site)
        self._several = {modality for modality, found in sites.items() if len(found - {""}) > 1}

    def __call__(self, entry: Entry) -> str:
        """Such as "T1", or "T1 at north"."""
        told = entry.modality in self._several and entry.site
        return f"{entry.modality} at {entry.site}" if told else entry.modality


@dataclass
class Configuration:
    """Everything that was found about one set of defences."""

    name: str
    images: list[ReportFinding] = field(default_factory=list)
    masks: list[ReportFinding] = field(default_factory=list)
    dice: float | None = None
    dice_by_region: dict[str, float | None] = field(default_factory=dict)
    hd95: dict[str, float | None] = field(default_factory=dict)
    """By region, mm."""
    volume_ml: dict[str, dict[str, float]] = field(default_factory=dict)
    """By region."""

    @property
    def alone(self) -> list[ReportFinding]:
        """Attacks on images without the help of hospitals; where there is none, all."""
        return [finding for finding in self.images if not finding.entry.clear] or self.images

    @property
    def helped(self) -> bool:
        """Whether hospitals showed the coordinator their images in all of its attacks."""
        return bool(self.images) and all(finding.entry.clear for finding in self.images)

    @property
    def worst_image(self) -> ReportFinding | None:
        """The attack on images that recovered most, without the help of hospitals where there is any such."""
        return worst(self.alone)

    @property
    def worst_mask(self) -> ReportFinding | None:
        """The attack on labels that recovered most."""
        return worst(self.masks)

    @property
    def naive_only(self) -> bool:
        """Attacked, but only by adversaries who ignore the defence."""
        return bool(self.images) and not any(finding.counts for finding in self.images)


def leakage(entry: Entry) -> float | None:
    """SSIM inside the brain, or leak-AUC; None where there was no truth."""
    score = entry.scores.get("ssim" if entry.goal == "image" else "auc")
    return None if score is None else score.mean


def worst(findings: Iterable[ReportFinding]) -> ReportFinding | None:
    """The one that recovered most, of those that count and were measured."""
    measured = [finding for finding in findings if finding.counts and finding.leakage is not None]
    return max(measured, key=lambda finding: finding.leakage or 0.0, default=None)


def pair(folders: Sequence[Folder]) -> list[ReportFinding]:
    """A finding for every attack that ran; a naive one is shown with its adaptive form if there is one."""
    findings: list[ReportFinding] = []
    where = Places(folders)
    for number, folder in enumerate(folders):
        entries = [e for e in folder.run.entries if e.status != "impossible"] if folder.run else []
        taken: set[str] = set()
        pairs: list[tuple[Entry, Entry | None]] = []
        for entry in entries:
            if not entry.adaptive:
                continue
            rivals = [e for e in entries if not e.adaptive and _subject(e) == _subject(entry)]
            alike = [e for e in rivals if (e.views, e.levels) == (entry.views, entry.levels)]
            naive = next(iter(alike or rivals), None)
            if naive is not None:
                taken.add(naive.id)
            pairs.append((entry, naive))
        pairs.extend((e, None) for e in entries if not e.adaptive and e.id not in taken)
        patients = folder.run.patients if folder.run else ()
        findings.extend(
            ReportFinding(entry, number, folder.arrays, naive, where(entry), patients)
            for entry, naive in pairs
        )
    return findings


@dataclass(frozen=True)
class MemberFinding:
    """One attack on membership: how well it tells the patients that a network was trained on."""

    entry: Entry
    where: str
    told: Score
    """Of a patient of each kind, how often the right one is named."""
    found: Score
    """Share of those who were trained on that is found with at most 1 % false alarms."""

    @property
    def sentence(self) -> str:
        """In words."""
        return (
            f"{self.entry.title} on {self.where}, {brief(self.entry.configuration)}: of a patient who was trained on "
            f"and one who was not, the right one is named in {_share(self.told)} of cases (guessing: 50 %), over "
            f"{self.told.patients} patients; with at most 1 % false alarms {_share(self.found)} of the former are "
            f"found (guessing: 1 %). {self._meaning}"
        )

    @property
    def _meaning(self) -> str:
        if self.told.low is not None and self.told.low > GUESSED:
            return "So what was sent tells who took part."
        return "So this attack does not tell who took part, within what so few patients can show."


def members(folders: Sequence[Folder]) -> list[MemberFinding]:
    """Of all attacks on membership that were scored."""
    where, made = Places(folders), []
    for entry in (entry for folder in folders if folder.run for entry in folder.run.entries):
        told, found = entry.scores.get("member_auc"), entry.scores.get("member_tpr")
        if entry.goal == "member" and told is not None and found is not None:
            made.append(MemberFinding(entry, where(entry), told, found))
    return made


def _share(score: Score) -> str:
    between = (
        "" if score.low is None or score.high is None else f" [{share(score.low)} to {share(score.high)}]"
    )
    return f"{share(score.mean)}{between}"


def mean_dice(values: Mapping[str, float | None]) -> float | None:
    """The mean as given, else over the regions given."""
    regions = [value for name, value in values.items() if name != "mean" and value is not None]
    given = values.get("mean")
    return given if given is not None else (sum(regions) / len(regions) if regions else None)


def _subject(entry: Entry) -> tuple[object, ...]:
    return (entry.goal, entry.attack, entry.modality, entry.site, key(entry.configuration), entry.trained)


def configurations(folders: Sequence[Folder], findings: Sequence[ReportFinding]) -> list[Configuration]:
    """Side by side: undefended first, then by what leaks, most first."""
    found: dict[tuple[str, ...], Configuration] = {}

    def of(name: str) -> Configuration:
        return found.setdefault(key(name), Configuration(brief(name)))

    for finding in findings:
        if finding.entry.goal == "member":  # a table of its own (`members`)
            continue
        one = of(finding.entry.configuration)
        (one.images if finding.entry.goal == "image" else one.masks).append(finding)
    for run in (folder.run for folder in folders if folder.run is not None):
        for name, values in run.dice.items():
            one = of(name)
            one.dice_by_region, one.dice = dict(values), mean_dice(values)
            one.hd95, one.volume_ml = run.hd95.get(name, {}), run.volume_ml.get(name, {})

    def order(one: Configuration) -> tuple[bool, float, str]:
        most = one.worst_image
        return one.name != UNDEFENDED, -((most.leakage or 0.0) if most else 0.0), one.name

    return sorted(found.values(), key=order)
