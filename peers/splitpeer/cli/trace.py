"""`splitpeer trace`: where the time of a run's steps went, as a timeline and a picture."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from splitpeer.cli.options import FILE, echo_json, json_option
from splitpeer.cli.terminal import echo
from splitpeer.errors import ConfigError
from splitproto.errors import printable

if TYPE_CHECKING:
    from splitpeer.timeline.summary import PartTimes

MOST_COLUMNS = 8
"""Parties in the table."""


@click.command()
@click.argument("folders", nargs=-1, required=True, type=FILE, metavar="RUN_FOLDER...")
@click.option(
    "--steps", metavar="FIRST-LAST", help="Steps, as 10-20 or 12. Default: all that the files hold."
)
@click.option(
    "-o", "--out", type=FILE, default=Path("trace.json"), show_default=True,
    help="The timeline: open it in chrome://tracing or ui.perfetto.dev.",
)  # fmt: skip
@click.option(
    "--picture", type=FILE, help="Draw the steps as PNG or SVG; without --steps, three that are typical."
)
@json_option
def trace(
    folders: tuple[Path, ...], steps: str | None, out: Path, picture: Path | None, as_json: bool
) -> None:
    """Show where the time of a run's steps went, for each party whose files you name.

    RUN_FOLDER is the [output] folder of a coordinator, the [peer] state of a site, or a metrics.jsonl. Of a folder
    with several, the newest is taken. A last line torn by a crash is ignored. Writes a timeline (--out), and prints
    the median of each part in milliseconds.
    The clocks of different machines must agree.
    """
    from splitpeer.storage import durable
    from splitpeer.timeline import chrome
    from splitpeer.timeline.recorded import chosen, read_all
    from splitpeer.timeline.summary import summarise

    window = _range(steps)
    every = read_all(folders)
    for file in (file for one in every for file in one.torn):
        echo(
            f"splitpeer: {file}: the last line is incomplete (a crash while it was written) and was ignored",
            err=True,
        )
    recorded = every if window is None else chosen(every, *window)
    wrote = [str(out)]
    if picture is not None:
        from splitpeer.timeline.picture import draw, typical

        draw(every, *(window or typical(every)), picture)
        wrote.append(str(picture))
    try:
        durable.replace(out, (json.dumps(chrome.document(recorded)) + "\n").encode(), mode=0o666)
    except OSError as error:
        raise durable.refusal(error, f"{out}:", "--out") from None
    found = {one.party: summarise(one) for one in recorded}
    if as_json:
        echo_json({"wrote": wrote, "parties": {party: asdict(times) for party, times in found.items()}})
        return
    _print(found)
    numbers = [step.number for one in recorded for step in one.steps]
    echo(f"wrote {' and '.join(wrote)}: steps {min(numbers)} to {max(numbers)} of {', '.join(found)}")


def _range(steps: str | None) -> tuple[int, int] | None:
    """Raises ConfigError."""
    if steps is None:
        return None
    found = re.fullmatch(r"(\d{1,9})(?:-(\d{1,9}))?", steps, re.ASCII)
    first, last = (int(found[1]), int(found[2] or found[1])) if found else (1, 0)
    if first > last:
        raise ConfigError(f'--steps "{steps}": give two numbers, the smaller first, such as 10-20, or one')
    return first, last


def _print(found: Mapping[str, PartTimes]) -> None:
    from rich.console import Console
    from rich.table import Table

    from splitpeer.timeline.parts import LINK, PARTS

    shown = dict(list(found.items())[:MOST_COLUMNS])
    more = f"; {len(found) - len(shown)} more parties: --json" if len(found) > len(shown) else ""
    table = Table(title=f"Median milliseconds of a step{more}", title_justify="left")
    table.add_column("part")
    table.add_column("counts as")
    for party in shown:
        table.add_column(printable(party), justify="right")
    table.add_row("step", "", *(f"{times.step:.1f}" for times in shown.values()), end_section=True)
    order = {name: place for place, name in enumerate(PARTS)}
    named = {part for times in shown.values() for part in times.parts}
    for part in sorted(named, key=lambda part: (order.get(part, len(order)), part)):
        cells = [_cell(times, part) for times in shown.values()]
        table.add_row(printable(part), PARTS[part].kind if part in PARTS else "other", *cells)
    table.add_row("in no part", "", *(f"{times.rest:.1f}" for times in shown.values()), end_section=True)
    for name in LINK:
        if any(name in times.link for times in shown.values()):
            cells = [f"{times.link[name]:.2f}" if name in times.link else "" for times in shown.values()]
            table.add_row(f"links: {name}", "within parts", *cells)
    table.add_section()
    for part in PARTS:
        if any(part in times.last for times in shown.values()):
            table.add_row(f"{part}: last", "wait", *(_last(times, part) for times in shown.values()))
    Console(width=None if sys.stdout.isatty() else 160).print(table)


def _cell(times: PartTimes, part: str) -> str:
    if part not in times.parts:
        return ""
    return f"{times.parts[part]:.1f}" + (f" ({times.single[part]}x)" if part in times.single else "")


def _last(times: PartTimes, part: str) -> str:
    if (one := times.last.get(part)) is None:
        return ""
    return f"{printable(one.site)}, {one.steps} of {times.steps}: +{one.behind:.1f}"
