"""Run folders to one page and its JSON."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

import splitproto
from splitpeer.defences.kinds import KINDS
from splitpeer.errors import DataError
from splitpeer.report import bands, text, words
from splitpeer.report.cards import Card, groups
from splitpeer.report.findings import Places, configurations, members, pair
from splitpeer.report.frontier import svg
from splitpeer.report.model import UNDEFENDED, AuditRun, Point, Promise
from splitpeer.report.names import brief, kind
from splitpeer.report.patients import by_patient
from splitpeer.report.store import Folder, load_run
from splitpeer.report.tables import (
    attack_rows,
    budget,
    configuration_row,
    digests,
    provenance,
    read_and_not_read,
    region_rows,
    sources,
)
from splitpeer.report.verdict import answers, under
from splitpeer.storage import durable

PAGE = Path(__file__).parent / "page"
SECTIONS = (
    ("verdict", "The answers"),
    ("leaves", "What leaves the hospital"),
    ("images", "What the coordinator can see of the images"),
    ("labels", "What the other hospitals can see of the labels"),
    ("members", "Whom the network learned from"),
    ("defences", "What each defence buys, and at what Dice"),
    ("budget", "Privacy budget"),
    ("untested", "What was not tested"),
    ("glossary", "Words"),
    ("repeat", "To repeat this"),
)


def write_report(
    folders: Sequence[Path], out: Path, *, title: str | None = None, now: datetime | None = None
) -> Path:
    """`out` and, next to it, the same with .json; returns the path of the JSON.

    Args:
        folders: run folders (`store.save_run`), or folders with a sweep's frontier.json.
        out: the page; an older one is replaced.
        title: heading of the page.
        now: date on the page.

    Raises:
        DataError: a folder cannot be read, or `out` cannot be written.
    """
    read = [load_run(Path(folder)) for folder in folders]
    beside = out.with_suffix(".json")
    if beside == out:
        raise DataError(f"{out}: the page needs another ending than .json, such as report.html")
    report = Report(read, title, now or datetime.now(UTC))
    page, data = report.page(beside.name), report.data()
    machine = json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        for path, content in ((out, page), (beside, machine)):
            durable.replace(path, content.encode(), mode=0o666, sync=False)
    except OSError as error:
        raise DataError(f"{out}: cannot be written: {error.strerror}") from None
    return beside


class Report:
    """Everything the page says, gathered once."""

    def __init__(self, folders: Sequence[Folder], title: str | None, now: datetime) -> None:
        self.folders, self.now = folders, now
        self.runs: list[tuple[Folder, AuditRun]] = [(f, f.run) for f in folders if f.run is not None]
        self.findings = pair(folders)
        self.configurations = configurations(folders, self.findings)
        self.undefended = next((one.dice for one in self.configurations if one.name == UNDEFENDED), None)
        self.points: list[Point] = [p for f in folders if f.frontier for p in f.frontier.points]
        self.frozen = bool(self.runs) and all(run.capture.frozen for _, run in self.runs)
        self.answers = answers(self.configurations, self.points, frozen=self.frozen)
        names = sorted({run.capture.federation for _, run in self.runs if run.capture.federation})
        self.title = title or "What leaks" + (f": {', '.join(names)}" if names else "")
        self.made_by = f"splitpeer {splitproto.__version__}"

    def data(self) -> dict[str, Any]:
        """For machines: the answers, the table, and every run folder whole."""
        return {
            "format": 1,
            "title": self.title,
            "made_by": self.made_by,
            "made": self.now.isoformat(timespec="seconds"),
            "answers": [asdict(answer) for answer in self.answers],
            "bands": {
                "image": [asdict(band) for band in bands.IMAGE_BANDS],
                "mask": [asdict(band) for band in bands.MASK_BANDS],
            },
            "configurations": [
                {
                    key: asdict(value) if key == "band" and value else value
                    for key, value in configuration_row(one, self.undefended).items()
                }
                for one in self.configurations
            ],
            "frontier": [point.model_dump(mode="json") for point in self.points],
            "not_tested": self.not_tested(),
            "folders": [
                {
                    "path": str(folder.path),
                    "digests": digests(folder.path),
                    "run": json.loads(folder.run.model_dump_json()) if folder.run else None,
                }
                for folder in self.folders
            ],
        }

    def page(self, json_name: str) -> str:
        """The whole HTML document."""
        style = (PAGE / "page.css").read_text(encoding="utf-8")
        script = (PAGE / "page.js").read_text(encoding="utf-8")
        cards = [
            Card(finding, number, self.folders[finding.folder].path.name if len(self.folders) > 1 else "")
            for number, finding in enumerate(self.findings, 1)
        ]
        images = [card for card in cards if card.finding.entry.goal == "image"]
        masks = [card for card in cards if card.finding.entry.goal == "mask"]
        compared = [one for one in self.configurations if one.images or one.masks or one.dice is not None]
        return (
            _environment()
            .get_template("page.html.jinja")
            .render(
                title=self.title,
                subtitle=self._subtitle(),
                sections=SECTIONS,
                style=Markup(style),  # noqa: S704 - our own file
                script=Markup(script),  # noqa: S704 - our own file
                style_hash=_hash(style),
                script_hash=_hash(script),
                answers=self.answers,
                notes=[*dict.fromkeys(note for _, run in self.runs for note in run.notes)],
                image_bands=bands.IMAGE_BANDS,
                image_steps=bands.IMAGE_STEPS,
                mask_bands=bands.MASK_BANDS,
                sources=sources(self.runs),
                frozen=self.frozen,
                sums=read_and_not_read(self.runs),
                averages=any(run.capture.averages for _, run in self.runs),
                image_groups=groups(images),
                image_rows=attack_rows(images),
                image_patients=by_patient([card.finding for card in images]),
                mask_groups=groups(masks),
                mask_rows=attack_rows(masks),
                mask_patients=by_patient([card.finding for card in masks]),
                members=members(self.folders),
                table=[configuration_row(one, self.undefended) for one in compared],
                regions=region_rows(compared),
                promises=self._promises(),
                frontier={"svg": svg(self.points), "points": self.points} if self.points else None,
                budgets=[budget(run.privacy) for _, run in self.runs if run.privacy],
                not_tested=self.not_tested(),
                glossary=words.glossary({name for one in self.configurations for name in one.dice_by_region}),
                provenance=[provenance(folder) for folder in self.folders],
                json_name=json_name,
                made_by=self.made_by,
                under=under,
                digits=lambda name: 1 if name in words.DECIBEL else 2,
            )
        )

    def not_tested(self) -> list[str]:
        """What the runs say, what could not run, and what no run can test."""
        lines = [line for _, run in self.runs for line in run.not_tested]
        # One run that tests it is enough.
        tested = {line for line in words.UNLESS_TESTED for _, run in self.runs if line not in run.not_tested}
        lines = [line for line in lines if line not in tested]
        where = Places(self.folders)
        for _, run in self.runs:
            for entry in run.entries:
                if entry.status == "impossible":
                    why = (entry.reason or "not possible").rstrip(".")
                    lines.append(f"{entry.title} on {where(entry)}, {under(entry.configuration)}: {why}.")
        if not any(finding.entry.goal == "image" for finding in self.findings):
            lines.append("Attacks on images: none is in these folders.")
        if not self.frozen and not any(finding.entry.goal == "mask" for finding in self.findings):
            lines.append("Attacks on labels: none is in these folders.")
        return [*dict.fromkeys(lines), *words.NEVER_TESTED]

    def _subtitle(self) -> str:
        attacks = len({finding.entry.attack for finding in self.findings})
        count = text.plural(attacks, "attack") if attacks else "A sweep of configurations"
        over = f", {len(self.folders)} run folders" if len(self.folders) > 1 else ""
        return f"Leakage report. {count}{over}. {self.now:%d %B %Y}."

    def _promises(self) -> list[dict[str, Any]]:
        known: dict[str, Promise] = {}
        for _, run in self.runs:
            known |= run.promises
        specs = [spec for one in self.configurations for spec in one.name.split(" + ") if spec != UNDEFENDED]
        names = list(dict.fromkeys(map(kind, specs)))
        if any(name not in known for name in names):
            known = _catalogue() | known
        return [{"name": name, **known[name].model_dump()} for name in names if name in known]


def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(PAGE), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters |= {
        "figure": text.figure,
        "signed": text.signed,
        "share": text.share,
        "metric": text.metric,
        "settings": text.settings,
        "plural": text.plural,
        "brief": brief,
    }
    return environment


def _catalogue() -> dict[str, Promise]:
    """What the defences say of themselves."""
    return {
        name: Promise(title=one.title, promise=one.promise, guarantee=one.guarantee)
        for name, one in KINDS.items()
    }


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
