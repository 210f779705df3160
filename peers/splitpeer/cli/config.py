"""``splitpeer config``: are the settings right, and which hold?"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from splitpeer.cli.options import FILE, echo_json, json_option, load_peer, set_option
from splitpeer.cli.terminal import echo
from splitpeer.errors import ConfigError
from splitpeer.preflight import Finding, exit_code, preflight
from splitpeer.settings.job import JobConfig
from splitpeer.settings.loading import has_section, to_toml
from splitpeer.settings.peer import PeerConfig
from splitproto.errors import printable

_file = click.argument("file", type=FILE, required=False)


@click.group()
def config() -> None:
    """Check or show a peer.toml or a job.toml.

    FILE defaults to $SPLITPEER_CONFIG, ./peer.toml or ~/.config/splitpeer/peer.toml. Settings come from, first
    wins: --set, the environment (SPLITPEER_SECTION__KEY), the file, defaults.
    """


@config.command()
@_file
@set_option
@json_option
def check(file: Path | None, settings: tuple[str, ...], as_json: bool) -> None:
    """Check FILE; for a peer.toml also certificates, salt, folders, disk and clock. Only doctor also dials."""
    loaded = _load(file, settings)
    if isinstance(loaded, JobConfig):
        sites = ", ".join(f"{site} ({', '.join(held)})" for site, held in loaded.sites.items())
        seats = ", ".join(
            seat if modalities == (seat,) else f"{seat} ({', '.join(modalities)})"
            for seat, modalities in loaded.channels().items()
        )
        unused = [Finding("seats", "warning", f"{loaded.source}: {text}") for text in loaded.unused()]
        if as_json:
            echo_json([asdict(one) for one in (Finding("settings", "ok", str(loaded.source)), *unused)])
        else:
            echo(f"{loaded.source}: ok: job {loaded.job.name}, sites {sites}; seats {seats}")
            for finding in unused:
                echo(f"splitpeer: {printable(finding.text)}", err=True)
        return
    findings = preflight(loaded)
    if as_json:
        echo_json([asdict(finding) for finding in findings])
        raise click.exceptions.Exit(exit_code(findings))
    if problems := [finding.text for finding in findings if finding.level == "problem"]:
        raise ConfigError("; ".join(problems))
    (own,) = (f.text for f in findings if (f.check, f.level) == ("certificate", "ok"))
    echo(f"{loaded.source}: ok: {own}")
    if loaded.policy is not None and loaded.policy.preset == "private":
        echo(
            "preset private: only jobs that keep our encoder frozen, sum over us and at least "
            f"{loaded.policy.min_partners} of {', '.join(loaded.policy.partners) or 'no partners yet'}, and ask for "
            "each window once; every other job is declined"
        )
    for finding in findings:
        if finding.level == "warning":
            echo(f"splitpeer: {printable(finding.text)}", err=True)


@config.command()
@_file
@set_option
@json_option
def show(file: Path | None, settings: tuple[str, ...], as_json: bool) -> None:
    """Show every setting in effect, defaults included."""
    values = _load(file, settings).resolved()
    if as_json:
        echo_json(values)
    else:
        click.echo(to_toml(values), nl=False)


def _load(file: Path | None, settings: tuple[str, ...]) -> PeerConfig | JobConfig:
    if file is not None and has_section(file, "job"):
        if settings:
            raise click.UsageError("--set is for peer.toml: a job is what its file says.")
        return JobConfig.load(file)
    return load_peer(file, settings)
