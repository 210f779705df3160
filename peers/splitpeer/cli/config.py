"""``splitpeer config``: are the settings right, and which hold?"""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import click

from splitpeer.cli.options import FILE, echo_json, json_option, load_peer, set_option
from splitpeer.config import JobConfig, PeerConfig
from splitpeer.data.pseudonym import load_salt
from splitpeer.errors import ConfigError
from splitpeer.settings import has_section, to_toml

_WARN_DAYS = 30
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
def check(file: Path | None, settings: tuple[str, ...]) -> None:
    """Check FILE, and what a peer.toml names: certificate, key, salt, folders."""
    loaded = _load(file, settings)
    if isinstance(loaded, JobConfig):
        sites = ", ".join(f"{site} ({modality})" for site, modality in loaded.sites.items())
        click.echo(f"{loaded.source}: ok: job {loaded.job.name}, sites {sites}")
        return
    own = loaded.credentials()
    days = own.days_left(datetime.now(UTC))
    if days < 0:
        raise ConfigError(
            f"{own.certificate}: expired {own.identity.not_after:%Y-%m-%d}: have it issued anew"
        )
    if loaded.data.salt is not None:
        load_salt(loaded.data.salt)
    for key in ("images", "labels"):
        folder = getattr(loaded.data, key)
        listed = loaded.data.layout == "csv"
        if folder is not None and not (folder.is_file() if listed else folder.is_dir()):
            raise ConfigError(f"{loaded.source}: [data] {key}: {folder} is not a folder: correct the path")
    click.echo(f"{loaded.source}: ok: {own.identity.uri}, certificate good for {days:.0f} days")
    if days < _WARN_DAYS:
        click.echo(f"splitpeer: {own.certificate} ends in {days:.0f} days: renew it", err=True)


@config.command()
@_file
@set_option
@json_option
def show(file: Path | None, settings: tuple[str, ...], as_json: bool) -> None:
    """Show every setting as it holds, defaults included."""
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
