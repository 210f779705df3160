"""`splitpeer status`: what daemons on this machine are doing, and what they wait for."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypeGuard

import click
from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from splitpeer.cli.inference_counts import STATES, at_coordinator, at_site, at_sites, by_site, is_whole
from splitpeer.cli.options import FILE, echo_json, heads_option, json_option, load_heads, set_option
from splitpeer.cli.terminal import duration, echo
from splitpeer.daemon.observe import PeerHead, Seen, look
from splitpeer.daemon.status_schema import NAME, VERSION, SiteStatus, Wait, WorkStatus
from splitproto.errors import printable

REFRESH_S = 1.0
NOT_RUNNING, SILENT = 1, 3
_PLAIN_WIDTH = 10_000  # output that is not for a terminal has no broken lines
_STYLES = {"running": "green", "silent": "yellow", "stopped": "dim", "died": "red", "never": "dim"}
_STATES: dict[str, str] = {
    "awaited": "yellow",
    "joining": "yellow",
    "present": "green",
    "lost": "red",
    "absent": "red",
    "returned": "yellow",
    "catching up": "yellow",
}
_Figure = Literal[
    "seats",
    "loss",
    "dice",
    "hd95",
    "volume_ml",
    "checkpoints",
    "absence",
    "made_from",
    "missing",
    "withdrawn",
    "bank",
    "released",
    "privacy",
    "job",
    "tls",
]
_LINES: tuple[tuple[_Figure, ...], ...] = (
    ("seats",),
    ("bank", "released"),
    ("privacy",),
    ("loss", "dice"),
    ("hd95", "volume_ml"),
    ("checkpoints", "absence"),
    ("made_from", "missing", "withdrawn"),
)


_BROKEN = ("waits for", "serves", "was asked", "asked for here")
"""Columns whose text may take several lines."""
_WORDS: dict[str, str] = {
    "seats": "patients by seat:",
    "hd95": "HD95 in mm",
    "volume_ml": "volume in ml",
    "released": "windows released:",
}


@click.command()
@click.argument("files", nargs=-1, type=FILE, metavar="[PEER_TOML]...")
@heads_option
@set_option
@json_option
@click.option("--watch", is_flag=True, help="Show it again every second, until Ctrl-C.")
def status(
    files: tuple[Path, ...],
    config_files: tuple[Path, ...],
    settings: tuple[str, ...],
    as_json: bool,
    watch: bool,
) -> None:
    """Show what a daemon does: which step, who is connected, what it waits for and for how long still.

    Several peer.toml of this machine make one table. Exit code 0: running; 1: one does not run; 3: one runs but
    has given no sign of life for 15 seconds.
    """
    heads = load_heads((*config_files, *files), settings)
    seen = [look(head) for head in heads]
    if watch:
        seen = _watch(heads, seen, as_json)
    elif as_json:
        echo_json([one.as_json() for one in seen])
    else:
        _print(_console(), seen)
    raise click.exceptions.Exit(code(seen))


def code(seen: Sequence[Seen]) -> int:
    """The exit code for what was seen."""
    if not all(one.runs for one in seen):
        return NOT_RUNNING
    return SILENT if any(one.state == "silent" for one in seen) else 0


def _watch(heads: Sequence[PeerHead], seen: list[Seen], as_json: bool) -> list[Seen]:
    """Until Ctrl-C; returns what was seen last."""
    console = _console()
    live = (
        None if as_json or not console.is_terminal else Live(console=console, auto_refresh=False, screen=True)
    )
    try:
        if live is not None:
            live.start()
        while True:
            if as_json:
                click.echo(json.dumps([one.as_json() for one in seen]))
            elif live is None:
                _print(console, seen)
                echo()
            else:
                live.update(render(seen, terminal=True), refresh=True)
            time.sleep(REFRESH_S)
            seen = [look(head) for head in heads]
    except KeyboardInterrupt:
        return seen
    finally:
        if live is not None:
            live.stop()
            _print(console, seen)


def _console() -> Console:
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = _PLAIN_WIDTH
    return console


def _print(console: Console, seen: Sequence[Seen]) -> None:
    if console.is_terminal:
        console.print(render(seen, terminal=True))
        return
    with console.capture() as capture:
        console.print(render(seen, terminal=False))
    # Tables fill their columns with spaces, which are nothing to a program.
    for line in capture.get().rstrip("\n").split("\n"):
        echo(line.rstrip())


# --- how it looks ------------------------------------------------------------------------------------------


def render(seen: Sequence[Seen], *, terminal: bool) -> RenderableType:
    """One daemon in a few lines, several in a table; then a table of each coordinator's sites."""
    parts: list[RenderableType] = []
    if len(seen) == 1:
        parts.append(_in_lines(seen[0]))
    else:
        parts.append(_overview(seen, terminal))
        if any(known := [one for one in seen if one.runs and is_whole(one.work["inference"])]):
            parts += [Text(), _inference(known, terminal)]
    for one in seen:
        if one.sites and one.runs:
            parts.append(Text())
            if len(seen) > 1:
                parts.append(Text(f"sites of {one.site}:"))
            parts.append(_sites(one, terminal))
            if _has_table(one.work["patients"]):
                parts += [Text(), _patients(one, terminal)]
        if one.runs and is_whole(one.work["serving"]):
            parts += [Text(), _requests(one, terminal)]
    return Group(*parts)


def _in_lines(one: Seen) -> Text:
    text = Text()
    text.append(f"{one.site}", style="bold")
    text.append(f" ({one.role}): ")
    text.append(headline(one), style=_STYLES[one.state])
    work = one.work
    lines = [_join(_named(work, "job"), _run(work))]
    if one.runs:
        lines.append(_progress(one))
        lines += [_link(one), _join(_named(work, "tls"), _traffic(work) if one.state == "running" else "")]
    lines += [_join(*(_named(work, name) for name in names)) for names in _LINES]
    lines.append(_join(*(_said(name, value) for name, value in one.further.items())))
    if one.runs:
        lines += [_waiting(one, wait) for wait in one.waits if not (wait["who"] and one.sites)]
        lines += at_site(one)
    for line in lines:
        if line:
            text.append(f"\n  {line}")
    return text


def headline(one: Seen) -> str:
    """What it does, or since when it does nothing, in one line."""
    sign = duration(one.last_sign)
    if one.other_version is not None:
        does = f"{one.state} (pid {one.pid or 'unknown'})" if one.runs else "not running"
        return f"{does}; its {NAME} is of version {one.other_version}, and this splitpeer reads {VERSION}"
    if one.state == "never":
        return f"not running, and no daemon has used {one.config} yet"
    if one.state == "died" and one.phase == "draining":
        return f"not running: ended while it was draining, before it was done, last seen {sign} ago"
    if one.state == "died":
        return f"not running: died without reporting why, last seen {sign} ago ({_doing(one)})"
    if one.state == "stopped":
        how, why = ("failed", f": {one.cause}") if one.cause else ("stopped", "")
        return f"not running: {how} {sign} ago ({_doing(one)}){why}"
    who = f"pid {one.pid}" if one.pid else "pid unknown"
    if one.state == "silent":
        since = f"since {sign}" if one.document else "and never did"
        return f"does not answer {since}: stopped, hanging, or its disk is full ({who}; {_doing(one)})"
    if not one.document:
        return f"starting ({who})"
    stale = (
        "" if one.stale is None else f"; its disk is full or failing: figures of {duration(one.stale)} ago"
    )
    return f"{one.phase} for {duration(one.age(one.whole['phase_since']))} ({who}, up {_up(one)}){stale}"


def _doing(one: Seen) -> str:
    return _join(one.phase or "starting", one.step)


def _up(one: Seen) -> str:
    return duration(one.age(one.whole["started"]))


def _run(work: WorkStatus) -> str:
    return f"run {str(work['run'])[:12]}" if work["run"] else ""


def _progress(one: Seen) -> str:
    step, steps = one.work["step"], one.work["steps"]
    percent = f" ({100 * step / steps:.0f} %)" if _number(step) and _number(steps) and steps else ""
    return _join(one.step + percent, f"{rate} steps/s" if (rate := _rate(one)) else "", _left(one, " left"))


def _rate(one: Seen) -> str:
    rate = one.work["step_per_s"]
    return f"{rate:.3g}" if one.state == "running" and _number(rate) else ""


def _left(one: Seen, suffix: str = "") -> str:
    """At the present rate, evaluations not counted."""
    step, steps, rate = one.work["step"], one.work["steps"], one.work["step_per_s"]
    if (
        not (one.state == "running" and _number(step) and _number(steps) and _number(rate))
        or rate <= 0
        or steps <= step
    ):
        return ""
    return duration((steps - step) / rate) + suffix


def _link(one: Seen) -> str:
    address, hub = str(one.work["address"] or ""), str(one.work["coordinator"] or "")
    if one.role == "coordinator":
        return f"listens at {address}" if address else ""
    return f"coordinator {hub} {address}".replace("  ", " ").rstrip() if hub or address else ""


def _traffic(work: WorkStatus) -> str:
    rates = (("in", work["octets_in_per_s"]), ("out", work["octets_out_per_s"]))
    return " ".join(f"{rate / 1e6:.1f} MB/s {way}" for way, rate in rates if _number(rate))


def _named(work: WorkStatus, name: _Figure) -> str:
    return _said(name, work[name])


def _said(name: str, value: object) -> str:
    return (
        "" if value in (None, "", [], {}) else f"{_WORDS.get(name, name.replace('_', ' '))} {_shown(value)}"
    )


def _shown(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        # Of long lists, such as checkpoints, show the newest.
        cut = value[-4:]
        return ("... " if len(cut) < len(value) else "") + " ".join(map(_shown, cut))
    if isinstance(value, dict):
        return " ".join(f"{key} {_shown(item)}" for key, item in value.items())
    return printable(str(value))


def _waiting(one: Seen, wait: Wait) -> str:
    who = f"{wait['who']}: " if wait["who"] else ""
    return f"waits for {who}{_wait_in_words(one, wait)}"


def _patience(one: Seen, wait: Wait) -> str:
    until = one.age(wait["until"])
    left = "" if until is None else f"{duration(-until)} left" if until < 0 else "time is up"
    return _join(duration(one.age(wait["since"])), left)


def _overview(seen: Sequence[Seen], terminal: bool) -> Table:
    table = _table(terminal, "peer", "does", "step", "steps/s", "left", "waits for")
    for one in seen:
        does = _phase(one) if one.runs else "failed" if one.cause else one.state
        step = one.step.removeprefix("step ").replace(" of ", "/")
        waits = _waits_for(one) if one.runs else _gone(one)
        if one.other_version is not None:
            waits = f"{NAME} is of version {one.other_version}"
        table.add_row(one.site, Text(does, _STYLES[one.state]), step, _rate(one), _left(one), Text(waits))
    return table


def _phase(one: Seen) -> str:
    if one.state == "silent":
        return f"silent {duration(one.last_sign)}".rstrip()
    if one.stale is not None:
        return f"disk full, {duration(one.stale)} old"
    return f"{one.phase} {duration(one.age(one.whole['phase_since']))}" if one.document else "starting"


def _gone(one: Seen) -> str:
    if one.state == "never":
        return ""
    last = f"{duration(one.last_sign)} ago: {one.phase}"
    return last + (f": {one.cause}" if one.cause else "")


def _waits_for(one: Seen) -> str:
    """A coordinator's sites have a table of their own, so their names are enough."""
    return _join(*(str(w["who"]) if w["who"] else _wait_in_words(one, w) for w in one.waits))


def _wait_in_words(one: Seen, wait: Wait) -> str:
    return f"{_shown(wait['what'])} ({_patience(one, wait)})"


def _sites(one: Seen, terminal: bool) -> Table:
    table = _table(terminal, "site", "seats", "state", "step", "MB/s in", "out", "waits for")
    waits = {wait["who"]: wait for wait in one.waits}
    for name, known in one.sites.items():
        state = str(known["state"] or "")
        since = duration(one.age(known["state_since"]))
        wait = waits.get(name)
        reason = _shown(known["cause"] or "") if state in ("absent", "returned") and wait is None else ""
        table.add_row(
            name,
            _shown(known["seats"] or ""),
            Text(f"{state} {since}".rstrip(), _STATES.get(state, "")),
            _applied(known),
            _megabytes(known["octets_in_per_s"]),
            _megabytes(known["octets_out_per_s"]),
            Text(_wait_in_words(one, wait) if wait else reason),
        )
    return table


def _patients(one: Seen, terminal: bool) -> RenderableType:
    """Patients by site and seat: a row for each site, a column for each seat, and how complete the patients are."""
    table_of = one.work["patients"]
    seats = [str(seat) for seat in table_of["seats"]]
    table = _table(terminal, "patients filled by", *seats)
    for site, filled in table_of["fills"].items():
        table.add_row(str(site), *(_shown(filled[seat]) if seat in filled else "" for seat in seats))
    counts = ", ".join(f"{n} of {len(seats)} seats: {count}" for n, count in table_of["with_seats"].items())
    total = f"{table_of['used']} patients ({counts}), held out {table_of['held_out']}"
    return Group(Text(f"{total} ({table_of['held_out_complete']} of them complete)"), table)


def _requests(one: Seen, terminal: bool) -> RenderableType:
    """Requests for segmentations: a row for each site that has ever asked."""
    heading, listed = Text(at_coordinator(one)), by_site(one)
    if not listed:
        return heading
    table = _table(terminal, "requests of", *STATES)
    for row in listed:
        table.add_row(*map(Text, row))
    return Group(heading, table)


def _inference(sites: Sequence[Seen], terminal: bool) -> Table:
    """What sites are asked for, and ask for: a row for each."""
    table = _table(terminal, "inference at", *_BROKEN[1:])
    for row in at_sites(sites):
        table.add_row(*map(Text, row))
    return table


def _has_table(found: object) -> bool:
    """A file that anybody may have written holds one that can be shown."""
    return (
        isinstance(found, dict)
        and all(isinstance(found.get(key), int) for key in ("used", "held_out", "held_out_complete"))
        and isinstance(found.get("seats"), list)
        and isinstance(found.get("with_seats"), dict)
        and isinstance(fills := found.get("fills"), dict)
        and all(isinstance(filled, dict) for filled in fills.values())
    )


def _applied(known: SiteStatus) -> str:
    return "" if known["applied"] is None else _shown(known["applied"])


def _megabytes(rate: object) -> str:
    return f"{rate / 1e6:.1f}" if _number(rate) else ""


def _table(terminal: bool, *columns: str) -> Table:
    # Without a terminal two spaces keep the columns apart, on one the box has one and the padding one.
    table = Table(box=box.SIMPLE_HEAD if terminal else None, show_edge=False, pad_edge=False,
                  padding=(0, 1, 0, 0) if terminal else (0, 2, 0, 0))  # fmt: skip
    for name in columns:
        right = name in ("step", "steps/s", "left", "MB/s in", "out", *STATES)
        table.add_column(name, justify="right" if right else "left", no_wrap=name not in _BROKEN)
    return table


def _join(*parts: str) -> str:
    return ", ".join(part for part in parts if part)


def _number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)
