"""A private certificate authority for one federation: create it, issue and revoke certificates of peers.

Everything lies in one folder, by default ``pki/``, which stays with the operator of the federation::

    ca.crt            everybody's trust anchor          give to every site
    ca.key            signs certificates and the CRL    never leaves this folder
    ca.crl            revoked certificates              give to every site, again before it is outdated
    federation.salt   64 hex digits                     give to every site, keep from everybody else
    <site>.csr        what a site asks for              comes from the site, whose key stays there
    <site>.crt        one peer                          give to that site
    <site>.key        its key, for demonstrations only  `issue` makes it here; `request` at the site

Certificates follow RFC 5280 strictly (`VERIFY_X509_STRICT`) and SPIFFE X509-SVID: P-256 keys, one URI name
``spiffe://<federation>/splitproto/<role>/<site>``, DNS and IP names for peers that listen. A hospital with a
CA of its own needs none of this, only certificates of that form. No clock inside: `now` is an argument.
"""

from __future__ import annotations

import hashlib
import ipaddress
import os
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, ExtensionOID, NameOID

from splitproto.errors import IdentityError, SplitprotoError
from splitproto.hosts import host_name, without_zone
from splitproto.identity import Credentials, Identity, check_name, split_uri, uri_of
from splitproto.newfile import write_new, write_temporary
from splitproto.recognise import convert
from splitproto.secretfile import how_to_close, open_to_others

__all__ = [
    "CRL_DAYS",
    "PkiError",
    "Request",
    "create_ca",
    "describe",
    "issue",
    "read_request",
    "request",
    "revoke",
    "sign",
    "write_crl",
]

CRL_DAYS = 90
"""Default validity of a revocation list; with an outdated one everybody is refused."""
MAX_FILE = 1 << 20
"""Largest certificate, request or revocation list that is read, in bytes."""
LEAST_RSA_BITS = 3000
"""Smallest RSA key in a request (BSI TR-02102-1)."""
CURVES = (ec.SECP256R1, ec.SECP384R1, ec.SECP521R1)
"""Curves of a key in a request: those that TLS 1.3 signs with."""

_SKEW = timedelta(hours=1)
"""Certificates start this long before `now`: the clocks of two hospitals differ."""
_IGNORED = frozenset(
    (
        ExtensionOID.BASIC_CONSTRAINTS,
        ExtensionOID.KEY_USAGE,
        ExtensionOID.EXTENDED_KEY_USAGE,
        ExtensionOID.SUBJECT_KEY_IDENTIFIER,
        ExtensionOID.AUTHORITY_KEY_IDENTIFIER,
    )
)
"""What a request may ask for without getting it: the CA alone decides on these."""


class PkiError(SplitprotoError):
    """The CA cannot do what was asked. One line with the file and the fix; never on the wire."""


def create_ca(folder: Path, federation: str, *, days: float = 3650, now: datetime) -> Path:
    """Create ``ca.crt``, ``ca.key``, ``federation.salt`` and an empty ``ca.crl``, good for `CRL_DAYS`, in `folder`
    (made, mode 0700, if absent).

    Returns the path of ``ca.crt``. Raises `PkiError` if one of the files exists, or for an invalid name.
    """
    _named("federation", federation)
    if (folder / "ca.crl").exists():
        raise PkiError(f"{folder / 'ca.crl'}: exists and is not overwritten: move it away first")
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
    _make_folder(folder)
    _write_all(
        {
            folder / "ca.key": (_pem_key(key), 0o600),
            folder / "federation.salt": (secrets.token_hex(32).encode() + b"\n", 0o600),
            folder / "ca.crt": (certificate.public_bytes(serialization.Encoding.PEM), 0o644),
        }
    )
    write_crl(folder, now=now, days=min(CRL_DAYS, days))
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

    Raises `PkiError`: files exist, no CA, an invalid name or host, the CA ends earlier.
    """
    key = ec.generate_private_key(ec.SECP256R1())
    path = folder / f"{_site(site)}.crt"
    certificate = _certify(folder, role, site, hosts, key.public_key(), days, now, not_before)
    _write_all(
        {
            path.with_name(f"{site}.key"): (_pem_key(key), 0o600),
            path: (certificate.public_bytes(serialization.Encoding.PEM), 0o644),
        }
    )
    return Credentials(ca=folder / "ca.crt", certificate=path, key=path.with_name(f"{site}.key"))


def _certify(
    folder: Path,
    role: str,
    site: str,
    hosts: Sequence[str],
    key: ec.EllipticCurvePublicKey | rsa.RSAPublicKey,
    days: float,
    now: datetime,
    not_before: datetime | None,
) -> x509.Certificate:
    """A certificate for both TLS directions, signed by the CA in `folder`."""
    authority, authority_key = _load_ca(folder)
    federation = _federation(folder, authority)
    uri = _uri(federation, role, site)
    start, end = _second(not_before or now - _SKEW), _end(now, days)
    if end > authority.not_valid_after_utc:
        until = authority.not_valid_after_utc.date()
        raise PkiError(
            f"{folder / 'ca.crt'}: the CA ends on {until}: issue for fewer days, or create a new CA"
        )
    if start >= end:
        raise PkiError(f"the certificate would end on {end.date()}, before it begins: give more days")
    return (
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
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(start)
        .not_valid_after(end)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(sign_others=False), critical=True)
        .add_extension(
            x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH]),
            critical=False,
        )
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
        .add_extension(_authority_identifier(authority), critical=False)
        .add_extension(_alternative_names(uri, hosts), critical=False)
        .sign(authority_key, hashes.SHA256())
    )


# --------------------------------------------------------------------------------------------------------
# A site makes its own key, the CA signs


@dataclass(frozen=True, slots=True)
class Request:
    """What a certificate request asks for; its signature and its key have been checked."""

    federation: str
    role: str
    site: str
    hosts: tuple[str, ...]
    key: ec.EllipticCurvePublicKey | rsa.RSAPublicKey
    key_kind: str
    """For people, such as ``EC secp256r1``."""
    fingerprint: str
    """SHA-256 of the DER request, 64 lowercase hexadecimal digits: the key and the names that it asks for."""


def request(folder: Path, federation: str, role: str, site: str, *, hosts: Sequence[str] = ()) -> Path:
    """Make ``<site>.key`` (mode 0600), which never leaves `folder`, and ``<site>.csr``, which goes to the CA.

    Returns the path of the request. Raises `PkiError`.
    """
    names = _alternative_names(_uri(federation, role, _site(site)), hosts)
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, federation),
            x509.NameAttribute(NameOID.ORGANIZATIONAL_UNIT_NAME, role),
            x509.NameAttribute(NameOID.COMMON_NAME, site),
        ]
    )
    asked = (
        x509.CertificateSigningRequestBuilder()
        .subject_name(subject)
        .add_extension(names, critical=False)
        .sign(key, hashes.SHA256())
    )
    _make_folder(folder)
    path = folder / f"{site}.csr"
    _write_all(
        {
            folder / f"{site}.key": (_pem_key(key), 0o600),
            path: (asked.public_bytes(serialization.Encoding.PEM), 0o644),
        }
    )
    return path


def read_request(path: Path) -> Request:
    """Read and check a certificate request. Raises `PkiError`: what is wrong with it, and who makes another."""
    data = _read(path, "certificate request")
    try:
        asked = x509.load_pem_x509_csr(data)
        good, key = asked.is_signature_valid, asked.public_key()
        extensions = list(asked.extensions)
    except Exception as error:  # many kinds, not all documented; the file comes from outside
        raise PkiError(
            f"{path}: not a PEM certificate request, or damaged: ask the site for it again"
        ) from error
    if not good:
        raise PkiError(f"{path}: was not signed with its own key: ask the site for a new request")
    known, kind = _known_key(path, key)
    uris: list[str] = []
    hosts: list[str] = []
    for extension in extensions:
        value = extension.value
        if isinstance(value, x509.BasicConstraints) and value.ca:
            raise PkiError(f"{path}: asks for a CA certificate: sites get none")
        if isinstance(value, x509.SubjectAlternativeName):
            for name in value:
                if isinstance(name, x509.UniformResourceIdentifier):
                    uris.append(name.value)
                elif isinstance(name, x509.DNSName | x509.IPAddress):
                    hosts.append(str(name.value))
                else:
                    raise PkiError(
                        f"{path}: asks for a name that is neither a URI nor a host: make it without"
                    )
        elif extension.oid not in _IGNORED:
            raise PkiError(f"{path}: asks for the extension {extension.oid.dotted_string}: make it without")
    if len(uris) != 1:
        raise PkiError(
            f"{path}: asks for {len(uris)} URI names, exactly one is needed: make it with splitpeer pki request"
        )
    try:
        federation, role, site = split_uri(uris[0])
    except IdentityError as error:
        raise PkiError(f"{path}: {error.reason}") from error
    fingerprint = hashlib.sha256(asked.public_bytes(serialization.Encoding.DER)).hexdigest()
    return Request(federation, role, site, tuple(hosts), known, kind, fingerprint)


def _known_key(path: Path, key: object) -> tuple[ec.EllipticCurvePublicKey | rsa.RSAPublicKey, str]:
    if isinstance(key, ec.EllipticCurvePublicKey):
        if isinstance(key.curve, CURVES):
            return key, f"EC {key.curve.name}"
        raise PkiError(f"{path}: its key is on the curve {key.curve.name}: make one on P-256")
    if isinstance(key, rsa.RSAPublicKey):
        if key.key_size >= LEAST_RSA_BITS:
            return key, f"RSA {key.key_size}"
        raise PkiError(
            f"{path}: its RSA key has {key.key_size} bits, {LEAST_RSA_BITS} or more are needed: make one on P-256"
        )
    raise PkiError(f"{path}: its key is neither EC nor RSA: make one on P-256")


def sign(
    folder: Path, asked: Request, *, days: float = 397, now: datetime, renew: bool = False
) -> tuple[Path, Identity]:
    """Sign a request with the CA in `folder`: writes ``<site>.crt`` there.

    Args:
        renew: the name may be taken; the earlier certificate is kept as ``<site>.<serial>.crt`` and stays valid.

    Raises `PkiError`: another federation, a name that is taken, the CA ends earlier.
    """
    authority, _ = _load_ca(folder)
    own = _federation(folder, authority)
    if asked.federation != own:
        raise PkiError(
            f"the request is for federation {asked.federation}, this CA is of {own}: send it to that CA, or ask the "
            f"site for one made with --federation {own}"
        )
    path = folder / f"{_site(asked.site)}.crt"
    if path.exists() and not renew:
        raise PkiError(
            f"{path}: the name {asked.site} is taken: if the same site renews its certificate add --renew, else "
            "revoke that one first, or ask the site to take another name"
        )
    certificate = _certify(folder, asked.role, asked.site, asked.hosts, asked.key, days, now, None)
    if path.exists():
        earlier = Identity.from_certificate(_load_certificate(path).public_bytes(serialization.Encoding.DER))
        if earlier.role != asked.role:
            raise PkiError(f"{path}: the name {asked.site} belongs to a {earlier.role}: take another name")
        os.rename(path, folder / f"{asked.site}.{earlier.serial}.crt")
    _write_all({path: (certificate.public_bytes(serialization.Encoding.PEM), 0o644)})
    return path, Identity.from_certificate(certificate.public_bytes(serialization.Encoding.DER))


# --------------------------------------------------------------------------------------------------------
# Revocation


def revoke(folder: Path, site: str, *, now: datetime, days: float = CRL_DAYS) -> Path:
    """Put every certificate of `site` on ``ca.crl`` and sign the list again; returns its path.

    The certificates, and the key if it is here, are kept as ``<site>.<serial>.revoked.crt/.key``: the name is free
    for another. Peers must be given the new list. Raises `PkiError`.
    """
    newest = folder / f"{_site(site)}.crt"
    paths = [newest, *(path for path in folder.glob(f"{site}.*.crt") if _is_renewed(path, site))]
    certificates = {path: _load_certificate(path) for path in paths}
    crl = write_crl(folder, now=now, days=days, revoked=[one.serial_number for one in certificates.values()])
    for path, certificate in certificates.items():
        kept = f"{site}.{certificate.serial_number:x}.revoked"
        os.rename(path, folder / f"{kept}.crt")
        if path == newest and (folder / f"{site}.key").exists():
            os.rename(folder / f"{site}.key", folder / f"{kept}.key")
    return crl


def _is_renewed(path: Path, site: str) -> bool:
    """Whether it is ``<site>.<serial>.crt``, and not that of a site whose name begins alike."""
    serial = path.name[len(site) + 1 : -len(".crt")]
    try:
        return f"{_load_certificate(path).serial_number:x}" == serial
    except PkiError:
        return False


def write_crl(folder: Path, *, now: datetime, days: float = CRL_DAYS, revoked: Sequence[int] = ()) -> Path:
    """Sign ``ca.crl`` again, with the entries it had and the serial numbers in `revoked`; returns its path.

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
        os.replace(write_temporary(path, pem, 0o644), path)
    except OSError as error:
        raise PkiError(f"{path}: cannot be written: {error.strerror}") from error
    return path


def describe(path: Path) -> dict[str, str | list[str]]:
    """A certificate, request or revocation list for people: names, validity (ISO 8601, UTC), serials and SHA-256.

    Raises `PkiError` for a file that holds none of these.
    """
    data = _read(path, "certificate")
    if b"-----BEGIN X509 CRL-----" in data:
        return _describe_list(path, data)
    if b"CERTIFICATE REQUEST-----" in data:
        asked = read_request(path)
        return {
            "file": str(path),
            "uri": [_uri(asked.federation, asked.role, asked.site)],
            "hosts": list(asked.hosts),
            "key": asked.key_kind,
            "fingerprint": asked.fingerprint,
        }
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


def _describe_list(path: Path, data: bytes) -> dict[str, str | list[str]]:
    try:
        listed = x509.load_pem_x509_crl(data)
        serials = [f"{entry.serial_number:x}" for entry in listed]
        until = listed.next_update_utc
        return {
            "file": str(path),
            "issuer": listed.issuer.rfc4514_string(),
            "last_update": listed.last_update_utc.isoformat(),
            "next_update": until.isoformat() if until else "never",
            "revoked": serials,
        }
    except Exception as error:  # many kinds, not all documented
        raise PkiError(
            f"{path}: not a PEM revocation list, or damaged: fetch it from the CA again"
        ) from error


def _named(kind: str, name: str) -> str:
    try:
        return check_name(kind, name)
    except IdentityError as error:
        raise PkiError(error.reason) from error


def _uri(federation: str, role: str, site: str) -> str:
    try:
        return uri_of(federation, role, site)
    except IdentityError as error:
        raise PkiError(error.reason) from error


def _site(site: str) -> str:
    if site == "ca":
        raise PkiError("the name 'ca' belongs to the CA's own files: choose another name for the site")
    return _named("site", site)


def _second(moment: datetime) -> datetime:
    """`when` in whole seconds: X.509 has no fractions."""
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
        name = without_zone(host_name(host.removeprefix("[").removesuffix("]")))
    except ValueError as error:
        raise PkiError(f"{error}: give it without scheme and port") from None
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _authority_identifier(authority: x509.Certificate) -> x509.AuthorityKeyIdentifier:
    identifier = authority.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    return x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier)


def _read(path: Path, what: str) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(MAX_FILE)
    except FileNotFoundError:
        raise PkiError(f"{path}: no such {what}") from None
    except OSError as error:
        raise PkiError(f"{path}: cannot be read: {error.strerror}") from error


def _load_certificate(path: Path) -> x509.Certificate:
    data = _read(path, "certificate")
    try:
        return x509.load_pem_x509_certificate(data)
    except Exception as error:  # many kinds, not all documented
        raise PkiError(f"{path}: not a PEM certificate: {convert(data, path, 'CERTIFICATE')}") from error


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise PkiError(f"{folder}: cannot make the folder: {error.strerror}") from error


def _load_ca(folder: Path) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    path = folder / "ca.key"
    if not (path.exists() and (folder / "ca.crt").exists()):
        raise PkiError(f"{folder}: no CA here: create one with splitpeer pki init")
    certificate = _load_certificate(folder / "ca.crt")
    try:
        shared = open_to_others(path)
        key = serialization.load_pem_private_key(path.read_bytes(), password=None)
    except OSError as error:
        raise PkiError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, TypeError) as error:
        raise PkiError(f"{path}: not an unencrypted PEM private key") from error
    if shared:
        raise PkiError(f"{path}: others on this machine may read the CA's key: {how_to_close(path)}")
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != certificate.public_key():
        raise PkiError(f"{path}: the key does not belong to ca.crt: restore the pair from a backup")
    return certificate, key


def _federation(folder: Path, authority: x509.Certificate) -> str:
    names = authority.subject.get_attributes_for_oid(NameOID.ORGANIZATION_NAME)
    if len(names) != 1:
        raise PkiError(
            f"{folder / 'ca.crt'}: was not made by splitpeer pki init: issue with the tools of that CA"
        )
    return _named("federation", str(names[0].value))


def _pem_key(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _write_all(files: Mapping[Path, tuple[bytes, int]]) -> None:
    """`write_new`, with its errors in words."""
    try:
        write_new(files)
    except FileExistsError as error:
        raise PkiError(f"{error.filename}: exists and is not overwritten: move it away first") from error
    except OSError as error:
        raise PkiError(f"{error.filename}: cannot be written: {error.strerror}") from error
