"""`splitpeer trail`: the audit trail of this peer, checked line by line."""

from __future__ import annotations

from pathlib import Path

import click

from splitpeer.cli.options import FILE, config_option, echo_json, json_option, load_peer, set_option
from splitpeer.cli.terminal import echo


@click.command()
@click.argument("file", type=FILE, required=False)
@config_option
@set_option
@json_option
def trail(file: Path | None, config_file: Path | None, settings: tuple[str, ...], as_json: bool) -> None:
    """Show the audit trail (FILE, or audit.jsonl in [peer] state) and follow its chain; exit code 4 if it breaks."""
    from splitpeer.daemon.trail import NAME, entries, verify

    path = file or load_peer(config_file, settings).peer.state / NAME
    verdict = verify(path)
    listed = entries(path)
    if as_json:
        echo_json({"file": str(path), "whole": verdict.whole, "problem": verdict.problem,
                   "last_chain": verdict.last_chain, "entries": listed})  # fmt: skip
    else:
        for entry in listed:
            fields = " ".join(f"{k}={v}" for k, v in entry.items() if k not in ("n", "time", "event"))
            echo(f"{entry.get('time')}  {entry.get('event')}  {fields}")
        state = "whole" if verdict.whole else f"broken: {verdict.problem}"
        echo(f"{path}: {verdict.entries} lines, {state}; last chain {verdict.last_chain}", err=True)
    raise click.exceptions.Exit(0 if verdict.whole else 4)
