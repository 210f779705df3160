"""``splitpeer pki``: the federation's own certificate authority."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import click

from splitpeer.cli.options import FILE, echo_json, json_option
from splitproto import pki as authority

_folder = click.option(
    "--dir", "folder", type=FILE, default=Path("pki"), show_default=True, help="The CA's folder."
)
_days = click.IntRange(min=1)


@click.group()
def pki() -> None:
    """Keep the federation's certificates: one CA, one certificate per site.

    A hospital with a CA of its own needs none of this: certificates of the form that the specification
    describes are all that peers ask for.
    """


@pki.command()
@click.option("--federation", required=True, help="Name of the federation, e.g. glioma.example.")
@click.option("--days", type=_days, default=3650, show_default=True)
@_folder
def init(federation: str, days: int, folder: Path) -> None:
    """Create the CA and the federation's salt for patient keys."""
    certificate = authority.create_ca(folder, federation, days=days, now=datetime.now(UTC))
    click.echo(f"{certificate}: CA of federation {federation}; give it and federation.salt to every site")
    click.echo(f"{folder / 'ca.key'}: signs certificates; keep it here, and a copy offline")


@pki.command()
@click.option("--role", type=click.Choice(["client", "coordinator"]), required=True)
@click.option("--site", required=True, help="Name of the site, e.g. north.")
@click.option("--host", "hosts", multiple=True, help="DNS name or IP under which others dial it.")
@click.option("--days", type=_days, default=397, show_default=True)
@_folder
def issue(role: str, site: str, hosts: tuple[str, ...], days: int, folder: Path) -> None:
    """Issue a certificate and key for one site. Coordinators need --host, clients do not."""
    if role == "coordinator" and not hosts:
        raise click.UsageError(
            "a coordinator is dialled by name: give it with --host, e.g. --host hub.example.org"
        )
    issued = authority.issue(folder, role, site, hosts=hosts, days=days, now=datetime.now(UTC))
    click.echo(f"{issued.certificate}: {issued.identity.uri}, until {issued.identity.not_after:%Y-%m-%d}")
    click.echo(f"{issued.key}: give it, with the certificate, ca.crt and federation.salt, to {site} only")


@pki.command()
@click.option("--site", required=True)
@click.option("--days", type=_days, default=30, show_default=True, help="Until the list is outdated.")
@_folder
def revoke(site: str, days: int, folder: Path) -> None:
    """Revoke a site's certificate and sign ca.crl anew."""
    path = authority.revoke(folder, site, now=datetime.now(UTC), days=days)
    click.echo(f"{path}: {site} is revoked; give the file to every site that checks revocation")


@pki.command()
@click.option("--days", type=_days, default=30, show_default=True, help="Until the list is outdated.")
@_folder
def crl(days: int, folder: Path) -> None:
    """Sign ca.crl anew, before it is outdated."""
    click.echo(f"{authority.write_crl(folder, now=datetime.now(UTC), days=days)}: good for {days} days")


@pki.command()
@click.argument("file", type=FILE)
@json_option
def show(file: Path, as_json: bool) -> None:
    """Show whom a certificate FILE names and how long it holds."""
    described = authority.describe(file)
    if as_json:
        echo_json(described)
        return
    for key, value in described.items():
        click.echo(f"{key:11} {', '.join(value) if isinstance(value, list) else value}")
