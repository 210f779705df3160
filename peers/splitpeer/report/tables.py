"""Rows of the page's tables, and the sentences with them."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from splitpeer.leakage.scores import Score, highest_floor
from splitpeer.report import bands
from splitpeer.report.cards import Card
from splitpeer.report.findings import Configuration, ReportFinding
from splitpeer.report.model import UNDEFENDED, AuditRun, Entry, Privacy, RunNetwork, configuration
from splitpeer.report.store import ARRAYS, ATTACK, FRONTIER, Folder
from splitpeer.report.text import figure, plural, signed, upper_first
from splitpeer.report.verdict import under


def attack_rows(cards: Sequence[Card]) -> list[dict[str, Any]]:
    """A row of the overview for each form of each attack; a naive one may belong to several, and is listed once."""
    rows = {
        (card.finding.folder, entry.id): (card, entry) for card in reversed(cards) for entry in card.variants
    }
    order = dict.fromkeys((card.finding.folder, entry.id) for card in cards for entry in card.variants)
    return [_attack_row(*rows[one]) for one in order]


def _attack_row(card: Card, entry: Entry) -> dict[str, Any]:
    means = {name: score.mean for name, score in entry.scores.items()}
    main = entry.scores.get("ssim" if entry.goal == "image" else "auc")
    knows = "knows the defence" if entry.adaptive else "ignores it"
    return {
        "entry": entry,
        "where": card.finding.where,
        "title": upper_first(entry.title),
        "folder": card.folder,
        "anchor": card.anchor,
        "knows": "no defence" if entry.configuration == UNDEFENDED else knows,
        "likeness": means.get("ssim"),
        "likeness_between": _between(entry.scores.get("ssim"), figure),
        "auc": means.get("auc"),
        "advantage": means.get("advantage_auc"),
        "advantage_between": _between(entry.scores.get("advantage_auc")),
        "tumour": means.get("tumour_dice"),
        "picked": means.get("reidentification"),
        "dice": means.get("dice_otsu"),
        "floor": highest_floor(main) if main else None,
        "effort": "–"
        if entry.effort is None
        else f"{entry.effort.told} / {entry.effort.published or 'ours alone'}",
        "counts": card.finding.counts,
        "band": (bands.image_band if entry.goal == "image" else bands.mask_band)(entry.scores),
    }


def _between(score: Score | None, shown: Callable[[float | None], str] = signed) -> str:
    """The interval of a figure, with its sign unless said otherwise; empty where there is none."""
    if score is None or score.low is None or score.high is None:
        return ""
    return f"{shown(score.low)} to {shown(score.high)}"


def configuration_row(one: Configuration, undefended: float | None) -> dict[str, Any]:
    """Dice and the worst leakage found; `undefended` is the Dice without a defence."""
    image, mask = one.worst_image, one.worst_mask
    tumour = [f.strongest.scores["tumour_dice"].mean for f in one.images
              if f.counts and "tumour_dice" in f.strongest.scores]  # fmt: skip
    change = None
    if one.dice is not None and undefended is not None and one.name != UNDEFENDED:
        change = one.dice - undefended
    return {
        "name": one.name,
        "dice": one.dice,
        "change": change,
        "hd95": one.hd95.get("mean"),
        "likeness": image.leakage if image else None,
        "floor": highest_floor(image.strongest.scores["ssim"]) if image else None,
        "by": _by(image) if image else "–",
        "tumour": max((value for value in tumour if value is not None), default=None),
        "auc": mask.leakage if mask else None,
        "band": image.band if image else None,
        "naive_only": one.naive_only,
    }


def region_rows(found: Sequence[Configuration]) -> list[dict[str, Any]]:
    """Dice, distance and volumes of each region under each configuration, where they were measured."""
    return [
        {
            "name": one.name,
            "region": region,
            "dice": dice,
            "hd95": one.hd95.get(region),
            "predicted": one.volume_ml.get(region, {}).get("predicted"),
            "true": one.volume_ml.get(region, {}).get("true"),
        }
        for one in found
        for region, dice in one.dice_by_region.items()
        if region != "mean"
    ]


def _by(finding: ReportFinding) -> str:
    return f"{upper_first(finding.entry.title)}, {finding.where}, {plural(finding.strongest.views, 'view')}"


def sources(runs: Sequence[tuple[Folder, AuditRun]]) -> list[dict[str, Any]]:
    """What was recorded, and what crosses the wire for each sample; the same table once for all its runs."""
    found: list[tuple[RunNetwork, dict[str, Any]]] = []
    for folder, run in runs:
        entry = next((entry for network, entry in found if network == run.network), None)
        if entry is None:
            sent = [level for level in run.network.levels if level.sent]
            defences = dict.fromkeys(one for level in sent for one in level.defences)
            gradients = dict.fromkeys(one for level in sent for one in level.gradient_defences)
            entry = {
                "heading": upper_first(under(configuration(defences, gradients))),
                "hospitals": ", ".join(
                    f"{site} holds {held}" for site, held in sorted(run.network.sites.items())
                ),
                "runs": [],
                "levels": run.network.levels,
                "dimensions": run.network.dimensions,
                "total": _total(run),
            }
            found.append((run.network, entry))
        entry["runs"].append((folder.path.name if len(runs) > 1 else "", _recorded(run)))
    return [entry for _, entry in found]


def read_and_not_read(runs: Sequence[tuple[Folder, AuditRun]]) -> dict[str, tuple[str, ...]]:
    """What the coordinator of a secure sum can see, and what it cannot; {}: it reads each hospital's own values."""
    summed = {run.capture.summed for _, run in runs}
    if not runs or None in summed:
        return {}
    frozen = all(run.capture.frozen for _, run in runs)
    count = max(sites for sites in summed if sites is not None)
    return {
        "What the coordinator can see": (
            f"For each window, {'once' if frozen else 'each time it is trained on or evaluated'}: the sum of {count} "
            f"hospitals' rounded values. {'It keeps that, and trains from it' if frozen else 'It trains from that'}.",
            "Which windows there are, of which pseudonym, and how large the volumes are. The labels, if it holds them, "
            "and then also which patients they are of.",
            "Which hospitals take part.",
        ),
        "What the coordinator cannot see": (
            "Images, encoders and patients' names: none of them is sent to it.",
            "A single hospital's values. What it receives of each are integers that look random, because masks are "
            f"added that only the hospitals know and that cancel in the sum. {_holds(count)}",
            "What the encoder would say of a patient in another pose or after more training: in this run, each window "
            "is asked for once. A further run with the same patients would be another view."
            if frozen
            else "What the gradient does to a single encoder: every hospital is sent the same one, that of the sum.",
        ),
        "What is not protected": (
            "The sum itself. It is computed from the images, and this page shows what an attack makes of it. “Others "
            "known” is what is left of one hospital if its partners' values are flat, or known to the coordinator.",
            "One hospital from all others: together with the coordinator they subtract their own values from the sum.",
            "Images from anyone who has the encoders: they make the attacks on this page as strong as they are. A "
            "coordinator that is run by the hospital that made them has them.",
            "What the decoder itself shows of the patients it was trained on.",
        ),
    }


def _holds(sites: int) -> str:
    """Under what assumption a hospital's values are hidden."""
    if sites > 2:
        return "This holds if at least two partners do not work with the coordinator."
    return (
        "This does not hold if the partner works with the coordinator: with three hospitals or more, one may."
    )


def _recorded(run: AuditRun) -> str:
    capture = run.capture
    named = f" ({capture.site})" if capture.site else ""
    who = "the coordinator" if capture.role == "coordinator" else "a hospital"
    sentences = [
        f"Rehearsed by a hospital on its own data: what {who} would see. Nothing has left the hospital."
        if capture.rehearsal
        else f"{'Kept' if capture.frozen else 'Recorded'} by {who}{named}: what it legitimately received and sent."
    ]
    counts = [
        plural(count, word)
        for count, word in ((capture.steps, "training step"), (capture.samples, "different sample"))
        if count is not None
    ]
    if counts:
        sentences.append(f"The recording covers {' and '.join(counts)}.")
    if not capture.complete:
        sentences.append("The recording was cut off; it was attacked up to its last whole record.")
    return " ".join(sentences)


def _total(run: AuditRun) -> str:
    sent = sum(level.octets for level in run.network.levels if level.sent)
    back = sum(level.gradient_octets or 0 for level in run.network.levels if level.sent)
    total = f"Together {figure(sent, 0)} bytes up"
    if back:
        total += f" and {figure(back, 0)} back in training"
    if run.network.image_octets:
        times = sent / run.network.image_octets
        total += (
            f". The image itself has {figure(run.network.image_octets, 0)} bytes: "
            f"{figure(times, 0 if times >= 2 else 1)} times as much is sent"
        )
    return total + "."


def budget(privacy: Privacy) -> dict[str, Any]:
    """A privacy budget and what it means."""
    if not privacy.guarantee or privacy.epsilon is None:
        return {
            "sentence": privacy.statement
            or "There is no differential privacy here: noise without guarantee.",
            "pairs": [],
        }
    pairs = [("Epsilon", f"{privacy.epsilon:.3g}")]
    if privacy.delta is not None:
        pairs.append(("Delta", f"{privacy.delta:.1g}"))
    if privacy.finds is not None and privacy.alarms is not None:
        pairs.append(
            (f"A test with {privacy.alarms:.0%} false alarms finds", f"{privacy.finds:.1%} of them at most")
        )
    if privacy.limit is not None:
        pairs.append(("Stops sending at", f"epsilon {privacy.limit:.3g}"))
    pairs.append(("Protects", f"each {privacy.unit}"))
    if privacy.releases is not None:
        pairs.append(("Counted", plural(privacy.releases, "release")))
    pairs += [
        (name, text)
        for name, text in (("Mechanism", privacy.mechanism), ("Accountant", privacy.accountant))
        if text
    ]
    sentence = (
        f"Differential privacy holds with epsilon {privacy.epsilon:.3g}: seeing everything that was sent can change "
        f"the odds of any guess about one {privacy.unit} by a factor of {_factor(privacy.epsilon)} at most. "
        f"That is {bands.epsilon_words(privacy.epsilon)}. {_found(privacy)}{privacy.statement}"
    )
    return {"sentence": sentence.strip(), "pairs": pairs}


def _found(privacy: Privacy) -> str:
    """What epsilon means in practice, followed by a blank."""
    if privacy.finds is None or privacy.alarms is None:
        return ""
    return (
        f"In practice: a test for images of one {privacy.unit} wrong in {privacy.alarms:.0%} of the others finds "
        f"{privacy.finds:.1%} at most. "
    )


def _factor(epsilon: float) -> str:
    if epsilon >= math.log(1e6):
        return "more than a million"
    factor = math.exp(epsilon)
    return figure(factor, 1 if factor < 100 else 0)


def provenance(folder: Folder) -> dict[str, Any]:
    """Where a run folder comes from: digests, settings of the network, commands."""
    run = folder.run
    pairs: list[tuple[str, str]] = []
    if run is not None:
        capture, network = run.capture, run.network
        pairs += [
            ("Capture", capture.file),
            ("Digest of the capture", capture.digest),
            ("Recorded", "" if capture.created is None else f"{_time(capture.created):%Y-%m-%d %H:%M} UTC"),
            ("Records", "" if capture.records is None else str(capture.records)),
            ("Run", capture.run),
            ("Job", capture.job),
            ("Attacked by", run.made_by),
        ]
        if network.network:
            told = [f"{name} {', '.join(map(str, values))}" for name, values in network.settings.items()]
            fusion = f"fusion {network.fusion or 'concat'}"
            kind = ", ".join((f"{network.dimensions}-D {network.network}", *told, fusion))
            pairs.append(("Network", kind))
        pairs += [(f"SHA-256 of {name}", digest) for name, digest in run.digests.items()]
    pairs += [(f"SHA-256 of {name}", digest) for name, digest in digests(folder.path).items()]
    return {
        "heading": str(folder.path),
        "pairs": [(name, text) for name, text in pairs if text],
        "commands": run.commands if run else (),
    }


def _time(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds, UTC)


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of the files that the page was made from."""
    found = {}
    for name in (ATTACK, ARRAYS, FRONTIER):
        if (folder / name).exists():
            with (folder / name).open("rb") as file:
                found[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found
