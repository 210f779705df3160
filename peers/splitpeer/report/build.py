"""Run folders to one page and its JSON."""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

import splitproto
from splitpeer.errors import DataError
from splitpeer.report import bands, pictures, words
from splitpeer.report.findings import Configuration, Finding, configurations, pair
from splitpeer.report.frontier import svg
from splitpeer.report.model import UNDEFENDED, Point, Privacy, Promise, Run
from splitpeer.report.store import ARRAYS, ATTACK, FRONTIER, Folder, load_run
from splitpeer.report.verdict import answers, under

PAGE = Path(__file__).parent / "page"
SHOWN = 4
"""Samples a strip shows, spread evenly over all, so that nobody chose them."""
MINUS = "−"


def write_report(
    folders: Sequence[Path], out: Path, *, title: str | None = None, now: datetime | None = None
) -> Path:
    """`out` and, beside it, the same with .json; returns the path of the JSON.

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
    text = json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        for path, content in ((out, page), (beside, text)):
            part = path.with_name(path.name + ".part")
            part.write_text(content, encoding="utf-8")
            os.replace(part, path)
    except OSError as error:
        raise DataError(f"{out}: cannot be written: {error.strerror}") from None
    return beside


class Report:
    """Everything the page says, gathered once."""

    def __init__(self, folders: Sequence[Folder], title: str | None, now: datetime) -> None:
        self.folders, self.now = folders, now
        self.runs: list[tuple[Folder, Run]] = [(f, f.run) for f in folders if f.run is not None]
        self.findings = pair(folders)
        self.configurations = configurations(folders, self.findings)
        self.points: list[Point] = [p for f in folders if f.frontier for p in f.frontier.points]
        self.answers = answers(self.configurations, self.points)
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
                    for key, value in _table_row(one, None).items()
                }
                for one in self.configurations
            ],
            "frontier": [point.model_dump(mode="json") for point in self.points],
            "not_tested": self.not_tested(),
            "folders": [
                {
                    "path": str(folder.path),
                    "digests": _digests(folder.path),
                    "run": folder.run.model_dump(mode="json") if folder.run else None,
                }
                for folder in self.folders
            ],
        }

    def page(self, json_name: str) -> str:
        """The whole HTML document."""
        environment = Environment(
            loader=FileSystemLoader(PAGE), autoescape=True, undefined=StrictUndefined, trim_blocks=True
        )
        environment.filters |= {
            "figure": figure, "signed": signed, "share": share, "pretty": pretty,
            "metric": lambda name: words.METRICS.get(name) or _other_metric(name),
        }  # fmt: skip
        style = (PAGE / "page.css").read_text(encoding="utf-8")
        script = (PAGE / "page.js").read_text(encoding="utf-8")
        cards = [Card(finding, number) for number, finding in enumerate(self.findings, 1)]
        images = [card for card in cards if card.finding.entry.goal == "image"]
        masks = [card for card in cards if card.finding.entry.goal == "mask"]
        undefended = next((one.dice for one in self.configurations if one.name == UNDEFENDED), None)
        compared = [one for one in self.configurations if one.images or one.masks or one.dice is not None]
        return environment.get_template("page.html.jinja").render(
            title=self.title,
            subtitle=self._subtitle(),
            sections=(
                ("verdict", "The answers"),
                ("leaves", "What leaves the hospital"),
                ("images", "What the coordinator can see of the images"),
                ("labels", "What the other hospitals can see of the labels"),
                ("defences", "What each defence buys, and at what Dice"),
                ("budget", "Privacy budget"),
                ("untested", "What was not tested"),
                ("glossary", "Words"),
                ("repeat", "To repeat this"),
            ),
            style=Markup(style),  # noqa: S704 - our own file
            script=Markup(script),  # noqa: S704 - our own file
            style_hash=_hash(style),
            script_hash=_hash(script),
            answers=self.answers,
            notes=list(dict.fromkeys(note for _, run in self.runs for note in run.notes)),
            image_bands=bands.IMAGE_BANDS,
            image_steps=bands.IMAGE_STEPS,
            mask_bands=bands.MASK_BANDS,
            sources=[_source(folder, run) for folder, run in self.runs],
            image_groups=_groups(images),
            image_rows=[row for card in images for row in _attack_rows(card)],
            mask_groups=_groups(masks),
            mask_rows=[row for card in masks for row in _attack_rows(card)],
            table=[_table_row(one, undefended) for one in compared],
            promises=self._promises(),
            frontier={"svg": svg(self.points), "points": self.points} if self.points else None,
            budgets=[_budget(run.privacy) for _, run in self.runs if run.privacy],
            not_tested=self.not_tested(),
            glossary=words.GLOSSARY,
            provenance=[_provenance(folder) for folder in self.folders],
            json_name=json_name,
            made_by=self.made_by,
            under=under,
            digits=lambda name: 1 if name in words.DECIBEL else 2,
        )

    def not_tested(self) -> list[str]:
        """What the runs say, what could not run, and what no run can test."""
        lines = [line for _, run in self.runs for line in run.not_tested]
        for _, run in self.runs:
            lines += [
                f"{entry.title} on {entry.modality}, {under(entry.configuration)}: {entry.reason or 'not possible'}"
                for entry in run.entries
                if entry.status == "impossible"
            ]
        if not any(finding.entry.goal == "image" for finding in self.findings):
            lines.append("Attacks on images: none is in these folders.")
        if not any(finding.entry.goal == "mask" for finding in self.findings):
            lines.append("Attacks on labels: none is in these folders.")
        return [*dict.fromkeys(lines), *words.NEVER_TESTED]

    def _subtitle(self) -> str:
        attacks = len({finding.entry.attack for finding in self.findings})
        count = f"{attacks} attack{'' if attacks == 1 else 's'}" if attacks else "A sweep of configurations"
        over = f", {len(self.folders)} run folders" if len(self.folders) > 1 else ""
        return f"Leakage report. {count}{over}. {self.now:%d %B %Y}."

    def _promises(self) -> list[dict[str, Any]]:
        known: dict[str, Promise] = {}
        for _, run in self.runs:
            known |= run.promises
        specs = [spec for one in self.configurations for spec in one.name.split(" + ") if spec != UNDEFENDED]
        names = list(
            dict.fromkeys(spec.rpartition("/")[2].partition(":")[0].partition("@")[0] for spec in specs)
        )
        if any(name not in known for name in names):
            known = _catalogue() | known
        return [{"name": name, **known[name].model_dump()} for name in names if name in known]


class Card:
    """A finding with its pictures and words, as the page shows it."""

    def __init__(self, finding: Finding, number: int) -> None:
        self.finding, self.anchor = finding, f"attack-{number}"
        entry = finding.strongest
        self.variants = [finding.entry, *([finding.naive] if finding.naive else [])]
        names = [name for variant in self.variants for name in variant.scores]
        order = [name for name in words.METRICS if name in names]
        order += sorted({name for name in names if name not in words.METRICS})
        self.main = [name for name in order if name in words.MAIN]
        self.more = [name for name in order if name not in words.MAIN]
        self.flags = []
        if bands.tumour_shows(entry.scores):
            self.flags.append("the tumour can be found")
        if bands.recognised(entry.scores):
            self.flags.append("the patient can be picked out")
        first = next(iter(entry.scores.values()), None)
        self.basis = "" if first is None else (
            f"Mean over {_plural(first.patients, 'patient')}, {_plural(first.samples, 'sample')}. "
            "The interval is over patients."
        )  # fmt: skip
        self.strips, self.count, (self.width, self.height) = _strips(finding)
        self._name(entry.goal == "image")

    def _name(self, image: bool) -> None:
        entry, score = self.finding.strongest, self.finding.leakage
        what = f"{_plural(self.count, 'sample')} of {entry.modality}"
        reached = "" if score is None else f", {'likeness' if image else 'AUC'} {score:.2f}"
        outlined = " The true tumour is outlined in blue." if self.strips.get("outlined") else ""
        if image:
            found = (
                " What a network takes for tumour in it is outlined in orange."
                if self.strips.get("found_outlined")
                else ""
            )
            self.captions = {
                "truth": f"The true images ({what}).{outlined}",
                "found": f"Recovered by the coordinator, same grey window.{found}",
                "floor": "What an average brain looks like: this needs no attack.",
            }
            self.alts = {
                "truth": f"True images: {what}",
                "found": f"The same as recovered by {entry.title}, {under(entry.configuration)}{reached}",
                "floor": f"Average of other patients' images at the same level, {what}",
            }
        else:
            self.captions = {
                "truth": f"The true outline of the tumour, which this site does not hold ({what}).",
                "found": "The map that the site recovered: bright where it takes tissue for tumour.",
            }
            self.alts = {
                "truth": f"True outline of the tumour, drawn on {what}",
                "found": f"Map recovered by {entry.title}, {under(entry.configuration)}{reached}",
            }


def _strips(finding: Finding) -> tuple[dict[str, Any], int, tuple[int, int]]:
    """Data addresses of a finding's pictures, how many samples they show, and their size in pixels."""
    entry, arrays = finding.strongest, finding.arrays
    found = arrays.get(entry.id)
    if found is None or not len(found):
        return {}, 0, (0, 0)
    chosen = np.unique(np.linspace(0, len(found) - 1, min(SHOWN, len(found))).round().astype(int))
    rows = np.asarray(entry.rows if entry.rows is not None else range(len(found)))
    if len(rows) != len(found):
        raise DataError(
            f"{entry.id}: {len(found)} reconstructions, but {len(rows)} rows of the truth are named"
        )

    def take(name: str) -> Any:
        array = arrays.get(name)
        if array is None:
            return None
        if rows[chosen].max() >= len(array):
            raise DataError(f"{entry.id}: names row {rows[chosen].max()} of {name}, which has {len(array)}")
        return array[rows[chosen]]

    truth, floor, masks = take(f"truth_{entry.modality}"), take(f"floor_{entry.modality}"), take("masks")
    whole = (
        None if masks is None else masks[:, 0] if masks.ndim > found.ndim - (entry.goal == "image") else masks
    )
    tumour = arrays.get(f"tumour_{entry.id}")
    shown = found[chosen]
    spatial = shown.shape[2:] if entry.goal == "image" else shown.shape[1:]
    for name, array in (("truth", truth), ("floor", floor), ("masks", whole)):
        if array is not None and array.shape[-len(spatial) :] != spatial:
            raise DataError(
                f"{entry.id}: reconstructions are {spatial}, {name} {array.shape[-len(spatial) :]}"
            )
    if len(spatial) not in (2, 3) or not all(spatial):
        raise DataError(f"{entry.id}: an array {found.shape} is no set of images")
    if entry.goal == "image":
        strips: dict[str, Any] = dict(
            pictures.image_strips(truth, shown, whole, None if tumour is None else tumour[chosen], floor)
        )
        strips["outlined"] = truth is not None and whole is not None
        strips["found_outlined"] = tumour is not None
    else:
        strips = dict(pictures.mask_strips(truth, shown, whole))
    size = (pictures.SCALE * spatial[0] * len(chosen), pictures.SCALE * spatial[1])
    return strips, len(chosen), size


def _groups(cards: Sequence[Card]) -> list[dict[str, Any]]:
    """Cards by contrast and configuration, the strongest attack first."""
    found: dict[tuple[str, str], list[Card]] = {}
    for card in cards:
        found.setdefault((card.finding.entry.modality, card.finding.entry.configuration), []).append(card)

    def most(card: Card) -> float:
        return -(card.finding.leakage or 0.0)

    order = sorted(found, key=lambda name: (name[0], name[1] != UNDEFENDED, most(min(found[name], key=most))))
    return [
        {"heading": f"{modality}, {under(name)}", "cards": sorted(found[modality, name], key=most)}
        for modality, name in order
    ]


def _attack_rows(card: Card) -> list[dict[str, Any]]:
    rows = []
    for entry in card.variants:
        scores = entry.scores

        def mean(name: str, scores: Any = scores) -> float | None:
            return scores[name].mean if name in scores else None

        main = scores.get("ssim" if entry.goal == "image" else "auc")
        if entry.configuration == UNDEFENDED:
            knows = "no defence"
        else:
            knows = "knows the defence" if entry.adaptive else "ignores it"
        rows.append(
            {
                "entry": entry, "anchor": card.anchor, "knows": knows,
                "likeness": mean("ssim"), "auc": mean("auc"), "tumour": mean("tumour_dice"),
                "picked": mean("reidentification"), "dice": mean("dice_otsu"),
                "floor": bands.highest_floor(main) if main else None,
                "band": (bands.image_band if entry.goal == "image" else bands.mask_band)(scores),
            }
        )  # fmt: skip
    return rows


def _table_row(one: Configuration, undefended: float | None) -> dict[str, Any]:
    image, mask = one.worst_image, one.worst_mask
    score = image.strongest.scores["ssim"] if image else None
    tumour = [f.strongest.scores["tumour_dice"].mean for f in one.images
              if f.counts and "tumour_dice" in f.strongest.scores]  # fmt: skip
    return {
        "name": one.name,
        "dice": one.dice,
        "change": one.dice - undefended if one.dice is not None and undefended is not None and one.name != UNDEFENDED
        else None,
        "likeness": image.leakage if image else None,
        "floor": bands.highest_floor(score) if score else None,
        "by": _by(image) if image else "–",
        "tumour": max((t for t in tumour if t is not None), default=None),
        "auc": mask.leakage if mask else None,
        "band": image.band if image else None,
        "naive_only": one.naive_only,
    }  # fmt: skip


def _by(finding: Finding) -> str:
    return f"{finding.entry.title}, {finding.entry.modality}, {_plural(finding.strongest.views, 'sending')}"


def _source(folder: Folder, run: Run) -> dict[str, Any]:
    capture, network = run.capture, run.network
    who = "the coordinator" if capture.role == "coordinator" else "a hospital"
    named = f" ({capture.site})" if capture.site else ""
    if capture.rehearsal:
        sentence = "Rehearsed by a hospital on its own data before joining: nothing has left it. "
    else:
        sentence = f"Recorded by {who}{named}: what it legitimately received and sent. "
    if network.sites:
        sites = ", ".join(f"{site} holds {modality}" for site, modality in sorted(network.sites.items()))
        sentence += f"Hospitals: {sites}. "
    if capture.steps is not None or capture.samples is not None:
        parts = [
            _plural(count, word)
            for count, word in ((capture.steps, "training step"), (capture.samples, "different sample"))
            if count is not None
        ]
        sentence += f"The recording covers {' and '.join(parts)}. "  # fmt: skip
    if not capture.complete:
        sentence += "The recording was cut off; it was attacked up to its last whole record."
    sent = sum(level.octets for level in network.levels if level.sent)
    back = sum(level.gradient_octets or 0 for level in network.levels)
    total = f"Together {sent:,} octets up".replace(",", " ")
    total += f" and {back:,} back in training".replace(",", " ") if back else ""
    if network.image_octets:
        ratio = sent / network.image_octets
        times = f"{ratio:.0f} times" if ratio >= 2 else f"{ratio:.1f} times"
        total += f"; the image itself has {network.image_octets:,} octets, so {times} that is sent".replace(
            ",", " "
        )
    return {
        "heading": str(folder.path),
        "sentence": sentence.strip(),
        "levels": network.levels,
        "dimensions": network.dimensions,
        "total": total + ".",
    }


def _budget(privacy: Privacy) -> dict[str, Any]:
    if not privacy.guarantee or privacy.epsilon is None:
        return {"sentence": privacy.statement or "There is no differential privacy here: noise without guarantee.",
                "pairs": []}  # fmt: skip
    pairs = [("Epsilon", f"{privacy.epsilon:.3g}")]
    if privacy.delta is not None:
        pairs.append(("Delta", f"{privacy.delta:.1g}"))
    if privacy.limit is not None:
        pairs.append(("Stops sending at", f"epsilon {privacy.limit:.3g}"))
    pairs.append(("Protects", f"each {privacy.unit}"))
    if privacy.releases is not None:
        pairs.append(("Counted", _plural(privacy.releases, "release")))
    pairs += [(name, text) for name, text in
              (("Mechanism", privacy.mechanism), ("Accountant", privacy.accountant)) if text]  # fmt: skip
    factor = 2.718281828459045 ** min(privacy.epsilon, 700.0)
    times = (
        f"{factor:.2g}"
        if factor < 100
        else f"{factor:,.0f}".replace(",", " ")
        if factor < 1e6
        else f"{factor:.0e}"
    )
    sentence = (
        f"Differential privacy holds with epsilon {privacy.epsilon:.3g}: seeing everything that was sent can change "
        f"the odds of any guess about one {privacy.unit} by a factor of at most {times}. "
        f"That is {bands.epsilon_words(privacy.epsilon)}. {privacy.statement}"
    )
    return {"sentence": sentence.strip(), "pairs": pairs}


def _provenance(folder: Folder) -> dict[str, Any]:
    pairs: list[tuple[str, str]] = []
    run = folder.run
    if run is not None:
        capture = run.capture
        created = (
            ""
            if capture.created is None
            else f"{datetime.fromtimestamp(capture.created, UTC):%Y-%m-%d %H:%M} UTC"
        )
        pairs += [
            ("Capture", capture.file), ("Digest of the capture", capture.digest), ("Recorded", created),
            ("Records", "" if capture.records is None else str(capture.records)), ("Run", capture.run),
            ("Job", capture.job), ("Attacked by", run.made_by),
        ]  # fmt: skip
        if run.network.features:
            widths = ", ".join(map(str, run.network.features))
            fusion = run.network.fusion or "concat"
            pairs.append(("Network", f"{run.network.dimensions}-D U-Net, features {widths}, fusion {fusion}"))
        pairs += [(f"SHA-256 of {name}", digest) for name, digest in run.digests.items()]
    pairs += [(f"SHA-256 of {name}", digest) for name, digest in _digests(folder.path).items()]
    return {
        "heading": str(folder.path),
        "pairs": [(name, text) for name, text in pairs if text],
        "commands": run.commands if run else (),
    }


def _digests(folder: Path) -> dict[str, str]:
    """SHA-256 of what this page was made from."""
    found = {}
    for name in (ATTACK, ARRAYS, FRONTIER):
        if (folder / name).exists():
            with (folder / name).open("rb") as file:
                found[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def _catalogue() -> dict[str, Promise]:
    """What the defences say of themselves."""
    from splitpeer.defences.catalogue import CATALOGUE

    return {
        name: Promise(title=kind.title, promise=kind.promise, guarantee=kind.guarantee)
        for name, kind in CATALOGUE.items()
    }


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _plural(count: int, word: str) -> str:
    return f"{count} {word}{'' if count == 1 else 's'}"


def _other_metric(name: str) -> str:
    base, _, region = name.rpartition("_")
    return f"{words.METRICS[base]}, {region}" if base in words.METRICS else name


def figure(value: float | None, digits: int = 2) -> str:
    """A number for people: a dash where there is none, thousands apart."""
    if value is None:
        return "–"
    return f"{value:,.{digits}f}".replace(",", " ").replace("-", MINUS)


def signed(value: float | None) -> str:
    """A change, with its sign."""
    return "–" if value is None else f"{value:+.2f}".replace("-", MINUS)


def share(value: float | None) -> str:
    """A share in percent."""
    return "–" if value is None else f"{100 * value:.0f} %"


def pretty(value: Any) -> str:
    """Settings, one a line."""
    return "\n".join(
        f"{name} = {json.dumps(one, ensure_ascii=False, default=str)}" for name, one in value.items()
    )
