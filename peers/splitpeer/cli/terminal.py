"""Lines for the terminal: names of files, sites and peers in them cannot steer the terminal or forge a line."""

from __future__ import annotations

import click

from splitproto.errors import printable


def echo(text: str = "", *, err: bool = False) -> None:
    """Print one line; control characters, line breaks and direction marks in it become "?"."""
    click.echo(printable(text), err=err)


def duration(seconds: float | None) -> str:
    """Such as `4 s`, `12 min`, `3 h 5 min`, `2 d 4 h`; empty if it is not known."""
    if seconds is None:
        return ""
    whole = max(0, round(seconds))
    if whole < 90:
        return f"{whole} s"
    minutes = round(whole / 60)
    if minutes < 90:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 36:
        return f"{hours} h {minutes} min" if minutes else f"{hours} h"
    days, hours = divmod(hours, 24)
    return f"{days} d {hours} h" if hours else f"{days} d"
