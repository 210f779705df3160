"""``splitpeer init``: the first peer.toml or job.toml, filled in from the certificates found there."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import click

from splitpeer.cli.options import FILE, write_new
from splitpeer.cli.terminal import echo
from splitpeer.data.modalities import canonical_modality
from splitpeer.errors import ConfigError, DataError
from splitpeer.settings import templates
from splitpeer.settings.peer import PRIVATE
from splitproto.errors import IdentityError
from splitproto.identity import Identity, check_name, read_identity

_pki = click.option(
    "--pki", "pki_folder", type=FILE, default=Path("pki"), show_default=True, help="Folder of certificates."
)
_force = click.option("--force", is_flag=True, help="Overwrite.")


_ENCODERS = """\
its encoder, once there is a job.toml: one hospital makes those of all, and gives each its own on a confidential channel
  splitpeer pretrain --job job.toml --recipe --for-partners partners    # the others name the file that they are given
docs/private.md says who then knows what; no encoder may reach the coordinator"""
"""What a private site does next."""


@click.group(invoke_without_command=True)
@click.option("--role", type=click.Choice(["client", "coordinator"]))
@click.option(
    "--modality",
    "modalities",
    multiple=True,
    help="What a client's images show: any name, such as t1, adc or pet; once for each that it holds.",
)
@click.option("--site", help="Default: the one certificate of that role in the folder of certificates.")
@click.option("--federation", help="Default: the one in the certificate.")
@click.option("--coordinator", help="Address that a client dials, tcp://host:port.")
@click.option("--listen", help="Address that a coordinator listens on, tcp://host:port.")
@click.option("--images", type=FILE, help="A client's folder of images.")
@click.option("--labels", type=FILE, help="A coordinator's folder of masks.")
@click.option(
    "--convention",
    type=click.Choice(["msd", "brats", "brats2023", "nnunet", "task"]),
    help="What the numbers in a coordinator's masks mean.",
)
@click.option(
    "--crl/--no-crl",
    default=True,
    show_default=True,
    help="Refuse certificates revoked by ca.crl in that folder.",
)
@click.option("--private", is_flag=True, help="Accept private jobs only (docs/private.md).")
@click.option(
    "--partners", metavar="SITE,SITE,...", help="Sites that may be in a secure sum with this client."
)
@click.option("--output", type=FILE, default=Path("peer.toml"), show_default=True)
@_pki
@_force
@click.pass_context
def init(
    context: click.Context,
    /,
    role: str | None,
    modalities: tuple[str, ...],
    site: str | None,
    federation: str | None,
    pki_folder: Path,
    output: Path,
    force: bool,
    images: Path | None,
    labels: Path | None,
    crl: bool,
    private: bool,
    partners: str | None,
    **given: str | None,
) -> None:
    """Write a commented peer.toml; `splitpeer init job` writes job.toml, `init secret` hospitals.key."""
    if context.invoked_subcommand is not None:
        return
    if role is None:
        raise click.UsageError("Missing option '--role': client or coordinator.")
    held = _held(role, modalities, private=private)
    found = list(_identities(pki_folder))
    site, federation = _who(role, site, federation, found, pki_folder)
    others = _partners(partners, site, role, private=private)
    hubs = sorted({one.site for one in found if one.role == "coordinator"})

    def from_there(path: Path) -> str:
        """Paths in the file count from its own folder."""
        return (
            path.as_posix() if path.is_absolute() else Path(os.path.relpath(path, output.parent)).as_posix()
        )

    folders = {"images": images, "labels": labels}
    given |= {key: from_there(path) for key, path in folders.items() if path is not None}
    if not crl:
        echo(
            "splitpeer: --no-crl: revoked certificates are not refused; set [tls] crl as soon as there is a list",
            err=True,
        )
    text = templates.peer_toml(
        role=role,
        site=site,
        federation=federation,
        modality=held[0] if len(held) == 1 else held,
        pki=from_there(pki_folder),
        coordinators=hubs if len(hubs) == 1 else ["hub"],
        crl=crl,
        private=private,
        partners=others,
        **{key: value for key, value in given.items() if value is not None},
    )
    write_new(output, text, force=force)
    echo(
        f"{output}: {role} {site} of federation {federation}; edit it, then: splitpeer config check {output}"
    )
    if private:
        echo(_ENCODERS)


@init.command()
@click.option("--name", default="glioma", show_default=True, help="Name of the job.")
@click.option(
    "--site",
    "sites",
    multiple=True,
    metavar="SITE=MODALITY",
    help="Who takes part; once for each modality of a site.",
)
@click.option("--private", is_flag=True, help="A job that private sites accept (docs/private.md).")
@click.option("--output", type=FILE, default=Path("job.toml"), show_default=True)
@_force
def job(name: str, sites: tuple[str, ...], private: bool, output: Path, force: bool) -> None:
    """Write a commented job.toml, which belongs to the coordinator."""
    held: dict[str, list[str]] = {}
    for pair in sites:
        site, separator, modality = pair.partition("=")
        if not separator:
            raise click.UsageError(f"--site {pair}: write it as SITE=MODALITY.")
        of_site, kind = held.setdefault(_name(site), []), _modality(modality)
        if kind in of_site:
            raise click.UsageError(f"--site {pair}: name each modality of a site once.")
        of_site.append(kind)
    if private and held:
        _refuse_few(held)
    write_new(output, templates.job_toml(_name(name), held, private=private), force=force)
    todo = "edit it" if held else "fill in [sites]"
    echo(f"{output}: job {name}; {todo}, then: splitpeer config check {output}")


@init.command()
@click.option("--output", type=FILE, default=Path("hospitals.key"), show_default=True)
def secret(output: Path) -> None:
    """Make the secret from which all hospitals of a private job draw their encoders (docs/private.md).

    For the hospitals alone: a coordinator that has it can make their encoders.
    """
    from splitpeer.pretraining.secret import make

    made = make(output)
    echo(
        f"{output}: fingerprint {made.fingerprint}; give it to the other hospitals, never to the coordinator"
    )


def _held(role: str, modalities: Sequence[str], *, private: bool) -> tuple[str, ...]:
    """What a client holds; () at a coordinator. Raises UsageError: what was asked for is of the other role."""
    if (role == "client") != bool(modalities):
        raise click.UsageError(
            "--modality is for clients, and they need it: any name, such as t1, adc or pet."
        )
    if private and role != "client":
        raise click.UsageError("--private is for clients; a coordinator's is: splitpeer init job --private.")
    held = tuple(map(_modality, modalities))
    if len(set(held)) < len(held):
        raise click.UsageError(f"--modality {' '.join(held)}: name each once.")
    return held


def _partners(text: str | None, site: str, role: str, *, private: bool) -> tuple[str, ...]:
    """The sites of ``--partners``. Raises UsageError: they are not other sites, or too few for a private one."""
    if text is None:
        return ()
    if role != "client":
        raise click.UsageError("--partners is for clients; a coordinator's job names its sites.")
    partners = tuple(_name(one.strip()) for one in text.split(","))
    if len(set(partners)) < len(partners):
        raise click.UsageError(f"--partners {text}: name each once.")
    if site in partners:
        raise click.UsageError(f"--partners names {site}, which is this site: list the others only.")
    if private and len(partners) < PRIVATE["min_partners"]:
        raise click.UsageError(
            f"--partners {text}: a private site wants two or more: a single one can subtract its own part."
        )
    return partners


def _refuse_few(held: Mapping[str, Sequence[str]]) -> None:
    """Raises UsageError: sites with the preset would decline the job, or no job can be so."""
    if len(held) <= PRIVATE["min_partners"]:
        raise click.UsageError(
            "a private job needs three sites or more: with two, each can subtract its own part and read the other's."
        )
    first: dict[str, str] = {}
    for site, modalities in held.items():
        for modality in modalities:
            if (other := first.setdefault(modality, site)) != site:
                raise click.UsageError(
                    f"{other} and {site} both hold {modality}: in a private job each modality is one site's."
                )


def _who(
    role: str, site: str | None, federation: str | None, found: list[Identity], folder: Path
) -> tuple[str, str]:
    """Site and federation: as given, else from the only certificate that fits."""
    fitting = [one for one in found if one.role == role and site in (None, one.site)]
    if len(fitting) == 1:
        return fitting[0].site, federation or fitting[0].federation
    if site is None and fitting:
        sites = ", ".join(sorted(one.site for one in fitting))
        raise ConfigError(f"{folder}: certificates of several {role}s ({sites}): say which with --site")
    if site is None or federation is None:
        raise ConfigError(
            f"{folder}: no certificate of {role} {site or '<site>'}: get one (splitpeer pki request), name its "
            "folder with --pki, or give --site and --federation"
        )
    return _name(site), _name(federation)


def _identities(folder: Path) -> Iterable[Identity]:
    """The peers whose certificates are in `folder`; others (the CA's, a web server's) are ignored."""
    for path in sorted(folder.glob("*.crt")):
        try:
            yield read_identity(path)
        except IdentityError:
            continue


def _modality(text: str) -> str:
    try:
        return canonical_modality(text)
    except DataError as error:
        raise click.UsageError(str(error)) from error


def _name(text: str) -> str:
    try:
        return check_name("the name", text)
    except IdentityError as error:
        raise click.UsageError(error.reason) from error
