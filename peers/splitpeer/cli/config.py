"""``splitpeer config``: are the settings right, and which hold?"""

from __future__ import annotations

from collections.abc import Iterable
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
@click.option(
    "--job", "job_file", type=FILE, help="Also check whether this site would accept the job of this job.toml."
)
@set_option
@json_option
def check(file: Path | None, job_file: Path | None, settings: tuple[str, ...], as_json: bool) -> None:
    """Check FILE; for a peer.toml also certificates, salt, folders, disk and clock. Only doctor also dials.

    With --job, every reason is named for which this site would decline that job. Nothing is sent.
    """
    loaded = _load(file, settings)
    if isinstance(loaded, JobConfig):
        if job_file is not None:
            raise click.UsageError("--job is for a site's peer.toml: FILE is a job.toml itself.")
        _check_job(loaded, as_json=as_json)
        return
    findings = preflight(loaded)
    if job_file is not None:
        findings += _invited(JobConfig.load(job_file), loaded)
    if as_json:
        echo_json([asdict(finding) for finding in findings])
        raise click.exceptions.Exit(exit_code(findings))
    problems = [found for found in findings if found.level == "problem"]
    reasons = [found.text for found in problems if found.check == "job"]
    told = [found.text for found in problems if found.check != "job"]
    if reasons:
        told.append(f"{job_file}: would be declined: {'; '.join(reasons)}")
    if told:
        raise ConfigError("; ".join(told))
    for name in ("certificate", "policy", "job"):
        for finding in findings:
            if (finding.check, finding.level) == (name, "ok"):
                echo(finding.text if name != "certificate" else f"{loaded.source}: ok: {finding.text}")
    _warn(findings)


def _check_job(job: JobConfig, *, as_json: bool) -> None:
    sites = ", ".join(f"{site} ({', '.join(held)})" for site, held in job.sites.items())
    seats = ", ".join(
        seat if modalities == (seat,) else f"{seat} ({', '.join(modalities)})"
        for seat, modalities in job.channels().items()
    )
    unused = [Finding("seats", "warning", f"{job.source}: {text}") for text in job.unused()]
    if as_json:
        echo_json([asdict(one) for one in (Finding("settings", "ok", str(job.source)), *unused)])
        return
    wire = "; how tensors travel is chosen when the run is started ([wire] auto)" if job.wire.auto else ""
    echo(f"{job.source}: ok: job {job.job.name}, sites {sites}; seats {seats}{wire}")
    _warn(unused)


def _invited(job: JobConfig, config: PeerConfig) -> list[Finding]:
    """Whether this site would accept the job. Raises ConfigError: it is not one of its sites, or no site."""
    from splitpeer.site.invitation import networks, objections, reservations

    if config.policy is None:
        raise click.UsageError("--job is for a site's peer.toml: a coordinator has no policy.")
    if found := objections(job, config):
        return [Finding("job", "problem", reason) for reason in found]
    accepted = Finding("job", "ok", f"{job.source}: ok: job {job.job.name} would be accepted")
    doubts = [Finding("job", "warning", text) for text in reservations(job, config)]
    return [accepted, *(Finding("job", "ok", text) for text in networks(config)), *doubts]


def _warn(findings: Iterable[Finding]) -> None:
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
