"""`splitpeer defences`: what can be written in [policy] defences, image_defences and [defences] gradients."""

from __future__ import annotations

import math
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from splitpeer.cli.options import echo_json, json_option
from splitpeer.defences.kinds import KINDS
from splitpeer.defences.specs import DefenceKind, Parameter

_WHERE = {
    "activations": "peer.toml [policy] defences",
    "image": "peer.toml [policy] image_defences",
    "gradients": "job.toml [defences] gradients",
}


@click.command()
@json_option
def defences(as_json: bool) -> None:
    """List all defences: parameters, where they act, and what each promises."""
    listed = [_described(kind) for kind in KINDS.values()]
    if as_json:
        echo_json(listed)
        return
    table = Table("defence", "parameters (default; range)", "of", "promise", show_lines=True)
    for one in listed:
        parameters = [
            f"{p['name']} ({_word(p['default'])}{_span(p)}): {p['meaning']}" for p in one["parameters"]
        ]
        title = f"[bold]{one['name']}[/]\n{one['title']}"
        table.add_row(title, "\n".join(parameters), "\n".join(one["places"]), one["promise"])
    console = Console()
    console.print(table)
    console.print(
        "Write name:value,parameter=value@levels, as in dropout:0.5 or gaussian:1,kept=true@0,1; "
        "the first parameter needs no name, and without levels all are meant. Where: "
        + "; ".join(f"{place}: {where}" for place, where in _WHERE.items()) + ".",
        markup=False,
        highlight=False,
    )  # fmt: skip


def _described(kind: DefenceKind) -> dict[str, Any]:
    return {
        "name": kind.name,
        "title": kind.title,
        "places": [place for place in _WHERE if place in kind.places],
        "parameters": [_parameter(name, parameter) for name, parameter in kind.options.items()],
        "guarantee": kind.guarantee,
        "promise": kind.promise,
        "offline": kind.offline,
        "source": kind.source,
    }


def _parameter(name: str, parameter: Parameter) -> dict[str, Any]:
    switch = isinstance(parameter.default, bool)
    return {
        "name": name,
        "default": parameter.default,
        "low": None if switch else parameter.low,
        "high": None if switch or math.isinf(parameter.high) else parameter.high,
        "meaning": parameter.meaning,
    }


def _word(value: float | int | bool) -> str:
    return str(value).lower() if isinstance(value, bool) else f"{value:g}"


def _span(parameter: dict[str, Any]) -> str:
    if parameter["low"] is None:
        return ""
    high = "any" if parameter["high"] is None else _word(parameter["high"])
    return f"; {_word(parameter['low'])} to {high}"
