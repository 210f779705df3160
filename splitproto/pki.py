"""A private certificate authority for one federation: create it, issue and revoke certificates of peers.

Everything lies in one folder, by default ``pki/``, which stays with whoever runs the federation::

    ca.crt            everybody's trust anchor          give to every site
    ca.key            signs certificates and the CRL    never leaves this folder
    ca.crl            revoked certificates, if any      give to every site, before it is outdated
    federation.salt   64 hex digits                     give to every site, keep from everybody else
    <site>.crt/.key   one peer                          give to that site only

Certificates follow RFC 5280 strictly (`VERIFY_X509_STRICT`) and SPIFFE X509-SVID: P-256 keys, one URI name
``spiffe://<federation>/splitproto/<role>/<site>``, DNS and IP names for peers that listen. A hospital with a
CA of its own needs none of this, only certificates of that form. No clock inside: `now` is an argument.
"""

from __future__ import annotations

import ipaddress
import os
import re
import secrets
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from splitproto.errors import SplitprotoError
from splitproto.identity import Credentials, check_name, uri_of

__all__ = ["PkiError", "create_ca", "describe", "issue", "revoke", "write_crl"]

_SKEW = timedelta(hours=1)
"""Certificates start this long before `now`: the clocks of two hospitals differ."""
_HOST = re.compile(
    r"(?=.{1,253}\Z)[A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?(?:\.[A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?)*"
)


class PkiError(SplitprotoError):
    """What was asked of the CA cannot be done. One line, names the file and the fix; never on the wire."""


def create_ca(folder: Path, federation: str, *, days: float = 3650, now: datetime) -> Path:
    """Create ``ca.crt``, ``ca.key`` and ``federation.salt`` in `folder` (made, mode 0700, if absent).

    Returns the path of ``ca.crt``. Raises `PkiError` if one of the files exists, `IdentityError` for a name
    that is none.
    """
    check_name("federation", federation)
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, federation),
            x509.NameAttribute(NameOID.COMMON_NAME, "splitproto CA"),
        ]
    )
    identifier = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(_second(now - _SKEW))
        .not_valid_after(_end(now, days))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(sign_others=True), critical=True)
        .add_extension(identifier, critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier), critical=False
        )
        # A signing certificate bears the trust domain without a path (SPIFFE X509-SVID section 3.1).
        .add_extension(_alternative_names(f"spiffe://{federation}", ()), critical=False)
        .sign(key, hashes.SHA256())
    )
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise PkiError(f"{folder}: cannot make the folder: {error.strerror}") from error
    _write_new(
        {
            folder / "ca.key": (_pem_key(key), 0o600),
            folder / "federation.salt": (secrets.token_hex(32).encode() + b"\n", 0o600),
            folder / "ca.crt": (certificate.public_bytes(serialization.Encoding.PEM), 0o644),
        }
    )
    return folder / "ca.crt"


def issue(
    folder: Path,
    role: str,
    site: str,
    *,
    hosts: Sequence[str] = (),
    days: float = 397,
    now: datetime,
    not_before: datetime | None = None,
) -> Credentials:
    """Issue ``<site>.crt`` and ``<site>.key`` with the CA in `folder`; a certificate for both TLS directions.

    Args:
        folder: where `create_ca` put the CA.
        role, site: who it is for; the federation is the CA's.
        hosts: DNS names and IP addresses under which others dial this peer (peers that listen only).
        days: validity from `now`, fractions too; 397 is what public CAs keep to, IHE ATNA advises at most two years.
        now: the present, with time zone.
        not_before: start of validity; default one hour before `now`.

    Raises `PkiError` (files exist, no CA, a host that is none, the CA ends earlier) or `IdentityError`.
    """
    authority, authority_key = _load_ca(folder)
    federation = _federation(folder, authority)
    uri = uri_of(federation, role, _site(site))
    start, end = _second(not_before or now - _SKEW), _end(now, days)
    if end > authority.not_valid_after_utc:
        until = authority.not_valid_after_utc.date()
        raise PkiError(
            f"{folder / 'ca.crt'}: the CA ends on {until}: issue for fewer days, or create a new CA"
        )
    if start >= end:
        raise PkiError(f"the certificate would end on {end.date()}, before it begins: give more days")
    key = ec.generate_private_key(ec.SECP256R1())
    certificate = (
        x509.CertificateBuilder()
        .subject_name(
            x509.Name(
                [
                    x509.NameAttribute(NameOID.ORGANIZATION_NAME, federation),
                    x509.NameAttribute(NameOID.ORGANIZATIONAL_UNIT_NAME, role),
                    x509.NameAttribute(NameOID.COMMON_NAME, site),
                ]
            )
        )
        .issuer_name(authority.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(start)
        .not_valid_after(end)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(sign_others=False), critical=True)
        .add_extension(
            x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH]),
            critical=False,
        )
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(_authority_identifier(authority), critical=False)
        .add_extension(_alternative_names(uri, hosts), critical=False)
        .sign(authority_key, hashes.SHA256())
    )
    paths = folder / f"{site}.crt", folder / f"{site}.key"
    _write_new(
        {
            paths[1]: (_pem_key(key), 0o600),
            paths[0]: (certificate.public_bytes(serialization.Encoding.PEM), 0o644),
        }
    )
    return Credentials(ca=folder / "ca.crt", certificate=paths[0], key=paths[1])


def revoke(folder: Path, site: str, *, now: datetime, days: float = 30) -> Path:
    """Put the certificate of `site` on ``ca.crl`` and sign it anew; returns the path of the CRL.

    The certificate and its key are kept as ``<site>.<serial>.revoked.crt/.key``, which makes room for a new
    issue. Peers that check revocation must be given the new file. Raises `PkiError`.
    """
    certificate = _load_certificate(folder / f"{_site(site)}.crt")
    path = write_crl(folder, now=now, days=days, revoked=[certificate.serial_number])
    kept = f"{site}.{certificate.serial_number:x}.revoked"
    for suffix in (".crt", ".key"):
        if (folder / f"{site}{suffix}").exists():
            os.rename(folder / f"{site}{suffix}", folder / f"{kept}{suffix}")
    return path


def write_crl(folder: Path, *, now: datetime, days: float = 30, revoked: Sequence[int] = ()) -> Path:
    """Sign ``ca.crl`` anew, with the entries it had and the serial numbers in `revoked`; returns its path.

    It is outdated after `days`; from then on peers that check revocation refuse everybody, so sign and
    distribute it in time. Raises `PkiError`.
    """
    authority, key = _load_ca(folder)
    path = folder / "ca.crl"
    number, entries = 0, {}
    if path.exists():
        try:
            old = x509.load_pem_x509_crl(path.read_bytes())
            number = old.extensions.get_extension_for_class(x509.CRLNumber).value.crl_number
        except (ValueError, x509.ExtensionNotFound, OSError) as error:
            raise PkiError(f"{path}: not a CRL of this CA: restore it from a backup") from error
        entries = {entry.serial_number: entry.revocation_date_utc for entry in old}
    entries |= {serial: _second(now) for serial in revoked if serial not in entries}
    builder = (
        x509.CertificateRevocationListBuilder()
        .issuer_name(authority.subject)
        .last_update(_second(now - _SKEW))
        .next_update(_end(now, days))
        .add_extension(x509.CRLNumber(number + 1), critical=False)
        .add_extension(_authority_identifier(authority), critical=False)
    )
    for serial, when in entries.items():
        builder = builder.add_revoked_certificate(
            x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(when).build()
        )
    pem = builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
    try:
        os.replace(_write_temporary(path, pem, 0o644), path)
    except OSError as error:
        raise PkiError(f"{path}: cannot be written: {error.strerror}") from error
    return path


def describe(path: Path) -> dict[str, str | list[str]]:
    """A certificate file for people: names, hosts, issuer, validity (ISO 8601, UTC), serial and SHA-256.

    Raises `PkiError` for a file that holds no certificate.
    """
    certificate = _load_certificate(path)
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        names = x509.SubjectAlternativeName([])
    addresses = names.get_values_for_type(x509.IPAddress)
    return {
        "file": str(path),
        "subject": certificate.subject.rfc4514_string(),
        "issuer": certificate.issuer.rfc4514_string(),
        "uri": list(names.get_values_for_type(x509.UniformResourceIdentifier)),
        "hosts": [*names.get_values_for_type(x509.DNSName), *map(str, addresses)],
        "not_before": certificate.not_valid_before_utc.isoformat(),
        "not_after": certificate.not_valid_after_utc.isoformat(),
        "serial": f"{certificate.serial_number:x}",
        "sha256": certificate.fingerprint(hashes.SHA256()).hex(),
    }


def _site(site: str) -> str:
    if site == "ca":
        raise PkiError("the name 'ca' belongs to the CA's own files: choose another name for the site")
    return check_name("site", site)


def _second(moment: datetime) -> datetime:
    """X.509 knows no fractions of a second."""
    return moment.replace(microsecond=0)


def _end(now: datetime, days: float) -> datetime:
    try:
        return _second(now + timedelta(days=days))
    except OverflowError as error:
        raise PkiError(f"{days} days from now is beyond the calendar: give fewer") from error


def _usage(*, sign_others: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not sign_others,
        key_cert_sign=sign_others,
        crl_sign=sign_others,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _alternative_names(uri: str, hosts: Sequence[str]) -> x509.SubjectAlternativeName:
    return x509.SubjectAlternativeName([x509.UniformResourceIdentifier(uri), *map(_host, hosts)])


def _host(host: str) -> x509.DNSName | x509.IPAddress:
    try:
        return x509.IPAddress(ipaddress.ip_address(host.removeprefix("[").removesuffix("]")))
    except ValueError:
        if not _HOST.fullmatch(host):
            raise PkiError(
                f"{host!a} is neither a DNS name nor an IP address: give it without scheme and port"
            ) from None
        return x509.DNSName(host.lower())


def _authority_identifier(authority: x509.Certificate) -> x509.AuthorityKeyIdentifier:
    identifier = authority.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    return x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier)


def _load_certificate(path: Path) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(path.read_bytes())
    except FileNotFoundError:
        raise PkiError(f"{path}: no such certificate") from None
    except OSError as error:
        raise PkiError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise PkiError(f"{path}: not a PEM certificate") from error


def _load_ca(folder: Path) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    path = folder / "ca.key"
    if not (path.exists() and (folder / "ca.crt").exists()):
        raise PkiError(f"{folder}: no CA here: create one with splitpeer pki init")
    certificate = _load_certificate(folder / "ca.crt")
    try:
        key = serialization.load_pem_private_key(path.read_bytes(), password=None)
    except OSError as error:
        raise PkiError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, TypeError) as error:
        raise PkiError(f"{path}: not an unencrypted PEM private key") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != certificate.public_key():
        raise PkiError(f"{path}: the key does not belong to ca.crt: restore the pair from a backup")
    return certificate, key


def _federation(folder: Path, authority: x509.Certificate) -> str:
    names = authority.subject.get_attributes_for_oid(NameOID.ORGANIZATION_NAME)
    if len(names) != 1:
        raise PkiError(
            f"{folder / 'ca.crt'}: was not made by splitpeer pki init: issue with the tools of that CA"
        )
    return check_name("federation", str(names[0].value))


def _pem_key(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _write_temporary(path: Path, data: bytes, mode: int) -> Path:
    """`data` on disk under a temporary name beside `path`, never readable by more people than `mode` says."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return temporary


def _write_new(files: Mapping[Path, tuple[bytes, int]]) -> None:
    """Write all files or none; each appears complete, and none replaces another."""
    made: list[Path] = []
    try:
        for path, (data, mode) in files.items():
            temporary = _write_temporary(path, data, mode)
            try:
                os.link(temporary, path)  # unlike a rename, fails if somebody was there first
                made.append(path)
            finally:
                temporary.unlink()
    except OSError as error:
        for earlier in made:
            earlier.unlink()
        if isinstance(error, FileExistsError):
            raise PkiError(f"{path}: exists and is not overwritten: move it away first") from error
        raise PkiError(f"{path}: cannot be written: {error.strerror}") from error
