"""Lines for the terminal: names of files, sites and peers in them cannot steer the terminal or forge a line."""

from __future__ import annotations

import click

from splitproto.errors import printable


def echo(text: str = "", *, err: bool = False) -> None:
    """Print one line; control characters, line breaks and direction marks in it become "?"."""
    click.echo(printable(text), err=err)
