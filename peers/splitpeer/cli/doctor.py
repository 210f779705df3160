"""``splitpeer doctor``: everything that can be wrong before a job, one line per check."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from splitpeer.cli.options import config_option, echo_json, json_option, load_peer, set_option
from splitpeer.cli.terminal import echo
from splitpeer.errors import ConfigError
from splitpeer.preflight import Finding, exit_code, preflight


@click.command()
@click.option("--offline", is_flag=True, help="Do not dial the coordinator.")
@config_option
@set_option
@json_option
def doctor(offline: bool, config_file: Path | None, settings: tuple[str, ...], as_json: bool) -> None:
    """Check settings, certificates, salt, data, disk, clock and limits, and dial the coordinator.

    Exit codes: 0 no problem (there may be warnings), 4 something here is wrong, 2 only the connection is.
    """
    try:
        config = load_peer(config_file, settings)
    except ConfigError as error:
        findings = [Finding("settings", "problem", str(error))]
    else:
        findings = [Finding("settings", "ok", str(config.source)), *preflight(config, online=not offline)]
    if as_json:
        echo_json([asdict(finding) for finding in findings])
    else:
        for finding in findings:
            echo(finding.line())
    raise click.exceptions.Exit(exit_code(findings))
