"""``splitpeer pki``: the federation's own certificate authority."""

from __future__ import annotations

import sys
from datetime import UTC, datetime
from pathlib import Path

import click

from splitpeer.cli.options import FILE, echo_json, json_option
from splitpeer.cli.terminal import echo
from splitpeer.errors import ConfigError
from splitproto import pki as authority

_folder = click.option(
    "--dir", "folder", type=FILE, default=Path("pki"), show_default=True, help="The CA's folder."
)
_role = click.option("--role", type=click.Choice(["client", "coordinator"]), required=True)
_site = click.option("--site", required=True, help="Name of the site, e.g. north.")
_hosts = click.option("--host", "hosts", multiple=True, help="DNS name or IP address that others dial.")
_days = click.IntRange(min=1)
_list_days = click.option(
    "--days", type=_days, default=authority.CRL_DAYS, show_default=True, help="How long the list is valid."
)


@click.group()
def pki() -> None:
    """Keep the federation's certificates: one CA, one certificate per site.

    Each site makes its own key (request), and the CA signs what the site asks for (sign). A hospital with a CA of
    its own needs none of this: its certificates only have to have the form that docs/running.md describes.
    """


@pki.command()
@click.option("--federation", required=True, help="Name of the federation, e.g. glioma.example.")
@click.option("--days", type=_days, default=3650, show_default=True)
@_folder
def init(federation: str, days: int, folder: Path) -> None:
    """Create the CA, its revocation list, and the federation's salt for patient keys."""
    certificate = authority.create_ca(folder, federation, days=days, now=datetime.now(UTC))
    echo(f"{certificate}: CA of federation {federation}; give it, ca.crl and federation.salt to every site")
    echo(f"{folder / 'ca.key'}: signs certificates; keep it here, and a copy offline")
    echo(
        f"{folder / 'ca.crl'}: good for {min(days, authority.CRL_DAYS)} days; sign it again before then with "
        "splitpeer pki crl, and give it to every site: an outdated list refuses everybody"
    )


@pki.command()
@_role
@_site
@click.option("--federation", required=True, help="Name of the CA's federation, e.g. glioma.example.")
@_hosts
@click.option("--dir", "folder", type=FILE, default=Path("pki"), show_default=True, help="Where to write.")
def request(role: str, site: str, federation: str, hosts: tuple[str, ...], folder: Path) -> None:
    """At the site: make its key, which stays here, and a request for the CA to sign."""
    _coordinators_are_dialled(role, hosts)
    path = authority.request(folder, federation, role, site, hosts=hosts)
    echo(f"{path.with_suffix('.key')}: the private key; it never leaves this machine")
    echo(f"{path}: send this to the federation's CA, and read its fingerprint to them by telephone:")
    echo(_in_groups(authority.read_request(path).fingerprint))


@pki.command()
@click.argument("file", type=FILE)
@click.option("--fingerprint", help="The one that the site read out; without it, you are asked.")
@click.option("--renew", is_flag=True, help="The site has a certificate already, which stays valid.")
@click.option("--days", type=_days, default=397, show_default=True)
@_folder
def sign(file: Path, fingerprint: str | None, renew: bool, days: int, folder: Path) -> None:
    """At the CA: sign the request in FILE, once the site has confirmed its fingerprint."""
    asked = authority.read_request(file)
    _coordinators_are_dialled(asked.role, asked.hosts)
    named = f" ({', '.join(asked.hosts)})" if asked.hosts else ""
    echo(f"{file}: {asked.role} {asked.site}{named} of federation {asked.federation}, {asked.key_kind}")
    echo(_in_groups(asked.fingerprint))
    _confirmed(asked.fingerprint, fingerprint)
    path, identity = authority.sign(folder, asked, days=days, now=datetime.now(UTC), renew=renew)
    echo(f"{path}: {identity.uri}, until {identity.not_after:%Y-%m-%d}")
    echo(f"give it, with ca.crt and ca.crl, to {asked.site}; federation.salt on a confidential channel")


@pki.command()
@_role
@_site
@_hosts
@click.option("--days", type=_days, default=397, show_default=True)
@_folder
def issue(role: str, site: str, hosts: tuple[str, ...], days: int, folder: Path) -> None:
    """For demonstrations: make certificate and key for a site here.

    In production use request and sign, so that no key travels. Coordinators need --host, clients do not.
    """
    _coordinators_are_dialled(role, hosts)
    issued = authority.issue(folder, role, site, hosts=hosts, days=days, now=datetime.now(UTC))
    echo(f"{issued.certificate}: {issued.identity.uri}, until {issued.identity.not_after:%Y-%m-%d}")
    echo(f"{issued.key}: give it, with the certificate, ca.crt, ca.crl and federation.salt, to {site} only")


@pki.command()
@click.option("--site", required=True)
@_list_days
@_folder
def revoke(site: str, days: int, folder: Path) -> None:
    """Revoke a site's certificates and sign ca.crl again."""
    path = authority.revoke(folder, site, now=datetime.now(UTC), days=days)
    echo(
        f"{path}: {site} is revoked; give the file to every site: where [tls] crl is not set, it changes nothing"
    )


@pki.command()
@_list_days
@_folder
def crl(days: int, folder: Path) -> None:
    """Sign ca.crl again, before it expires."""
    path = authority.write_crl(folder, now=datetime.now(UTC), days=days)
    echo(f"{path}: good for {days} days; give it to every site")


@pki.command()
@click.argument("file", type=FILE)
@json_option
def show(file: Path, as_json: bool) -> None:
    """Show what is in FILE: a certificate, a request, or a revocation list."""
    described = authority.describe(file)
    if as_json:
        echo_json(described)
        return
    for key, value in described.items():
        echo(f"{key:11} {', '.join(value) if isinstance(value, list) else value}")


def _coordinators_are_dialled(role: str, hosts: tuple[str, ...]) -> None:
    if role == "coordinator" and not hosts:
        raise click.UsageError(
            "a coordinator is dialled by name: give it with --host, e.g. --host hub.example.org"
        )


def _in_groups(fingerprint: str) -> str:
    """``fingerprint  0123 4567 ...``: four digits at a time can be read aloud."""
    return "fingerprint  " + " ".join(fingerprint[at : at + 4] for at in range(0, len(fingerprint), 4))


def _confirmed(fingerprint: str, given: str | None) -> None:
    if given is not None:
        if "".join(c for c in given.lower() if c not in " :-") != fingerprint:
            raise ConfigError(
                "the fingerprint is another: this is not the request that the site made; ask for it again"
            )
        return
    if not sys.stdin.isatty():
        raise ConfigError(
            "there is no terminal to confirm the fingerprint on: give what the site read with --fingerprint"
        )
    if not click.confirm("Does the site read the same fingerprint to you?", err=True):
        raise ConfigError("not signed: ask the site for its request again")
