"""`splitpeer report`: run folders to one page."""

from __future__ import annotations

from pathlib import Path

import click

from splitpeer.cli.options import FILE, echo_json, json_option, private_files
from splitpeer.cli.terminal import echo


@click.command()
@click.argument("folders", nargs=-1, required=True, type=FILE, metavar="RUN_FOLDER...")
@click.option("--out", type=FILE, default=Path("report.html"), show_default=True, help="The page to write.")
@click.option("--title", help="Heading of the page.")
@json_option
def report(folders: tuple[Path, ...], out: Path, title: str | None, as_json: bool) -> None:
    """Write the results of attacks as one HTML page, and as JSON next to it.

    RUN_FOLDER is what `splitpeer attack` or `splitpeer audit` wrote; several become one page. The page needs
    no network and contains pictures of patients: treat it like the images.
    """
    private_files()
    from splitpeer.report.build import write_report

    beside = write_report(folders, out, title=title)
    if as_json:
        echo_json({"page": str(out), "json": str(beside)})
    else:
        echo(f"{out}, {beside}")
