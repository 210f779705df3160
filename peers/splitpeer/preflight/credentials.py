"""Our own certificate, key, CA and revocation list, judged as a peer of the federation will judge them."""

from __future__ import annotations

import ssl
import tempfile
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID

from splitpeer.errors import ConfigError
from splitpeer.preflight.finding import Finding
from splitpeer.settings.peer import PeerConfig
from splitproto import pki
from splitproto.hosts import without_zone
from splitproto.identity import Credentials

WARN = timedelta(days=30)
"""A certificate that ends sooner is worth a warning."""
WARN_LIST = timedelta(days=14)
"""The same for a revocation list."""
_NO_ISSUER = frozenset((2, 18, 19, 20, 21))
"""X509_V_ERR_*: no chain of issuers up to a trusted root."""


def check_credentials(config: PeerConfig, now: datetime) -> list[Finding]:
    """The files of [tls]: that they can be used, and that the others will accept them."""
    try:
        own = config.credentials()
    except ConfigError as error:
        return [Finding("certificate", "problem", str(error))]
    chain, authorities = _load(own.certificate), _load(own.ca)
    found = list(_dates(own, chain, authorities, now))
    found += _revocation(own, chain[0], now)
    # Dates and lists say what they are about better than OpenSSL does; it judges all the rest.
    if all(finding.level != "problem" for finding in found):
        found += _judged_by_a_peer(config, own, chain, authorities)
    if all(finding.level != "problem" for finding in found):
        days = own.days_left(now)
        found.insert(0, Finding("certificate", "ok", f"{own.identity.uri}, good for {days:.0f} days"))
    return found


def _load(path: Path) -> list[x509.Certificate]:
    return x509.load_pem_x509_certificates(path.read_bytes())


# --- dates ----------------------------------------------------------------------------------------------


def _dates(
    own: Credentials, chain: list[x509.Certificate], authorities: list[x509.Certificate], now: datetime
) -> Iterator[Finding]:
    for path, certificates in ((own.certificate, chain), (own.ca, authorities)):
        for certificate in certificates:
            who = f"{path}: {_name(certificate)}"
            begins, ends = certificate.not_valid_before_utc, certificate.not_valid_after_utc
            if now < begins:
                yield Finding(
                    "clock",
                    "problem",
                    f"{who} is not yet valid: it begins {begins:%Y-%m-%d %H:%M} UTC and this machine's clock says "
                    f"{now:%Y-%m-%d %H:%M} UTC: set the clock, or wait",
                )
            elif now >= ends:
                yield Finding(
                    "certificate", "problem", f"{who} expired on {ends:%Y-%m-%d}: have the CA issue another"
                )
            elif ends - now < WARN:
                yield Finding(
                    "certificate",
                    "warning",
                    f"{who} ends in {_days(ends - now)}: renew it",
                )


def _days(left: timedelta) -> str:
    return f"{left / timedelta(days=1):.0f} days"


# --- revocation -----------------------------------------------------------------------------------------


def _revocation(own: Credentials, leaf: x509.Certificate, now: datetime) -> Iterator[Finding]:
    if own.crl is None:
        yield Finding(
            "revocation",
            "warning",
            "no [tls] crl: a site that the CA has revoked is still let in: fetch the CA's list and name it there",
        )
        return
    lists = _lists(own.crl)
    if not any(listed.issuer == leaf.issuer for listed in lists):
        yield Finding(
            "revocation",
            "problem",
            f"{own.crl}: holds no list of {leaf.issuer.rfc4514_string()}, which issued our certificate: fetch the list "
            "of that CA; lists of several CAs may follow one another",
        )
    for listed in lists:
        until = listed.next_update_utc
        if listed.last_update_utc > now:
            yield Finding(
                "clock",
                "problem",
                f"{own.crl}: is not yet valid: it begins {listed.last_update_utc:%Y-%m-%d %H:%M} UTC and this "
                f"machine's clock says {now:%Y-%m-%d %H:%M} UTC: set the clock",
            )
        elif until is not None and until <= now:
            yield Finding(
                "revocation",
                "problem",
                f"{own.crl}: outdated since {until:%Y-%m-%d}, so every peer is refused: fetch a fresh list from the CA "
                "(there: splitpeer pki crl)",
            )
        elif until is not None and until - now < WARN_LIST:
            yield Finding(
                "revocation",
                "warning",
                f"{own.crl}: outdated in {_days(until - now)}, then every peer is refused: fetch a fresh list",
            )
        if listed.issuer == leaf.issuer and listed.get_revoked_certificate_by_serial_number(
            leaf.serial_number
        ):
            yield Finding(
                "certificate",
                "problem",
                f"{own.certificate}: the CA has revoked it (serial {leaf.serial_number:x}): ask the CA for another",
            )


def _lists(path: Path) -> list[x509.CertificateRevocationList]:
    end = b"-----END X509 CRL-----"
    return [x509.load_pem_x509_crl(part + end) for part in path.read_bytes().split(end)[:-1]]


# --- the handshake --------------------------------------------------------------------------------------


def _judged_by_a_peer(
    config: PeerConfig, own: Credentials, chain: list[x509.Certificate], authorities: list[x509.Certificate]
) -> list[Finding]:
    """A whole handshake in memory with a peer that trusts our CA and shows a certificate made for this moment."""
    listens = config.peer.role == "coordinator"
    host = next(iter(_hosts(chain[0])), None)
    if listens and host is None:
        return [
            Finding(
                "certificate",
                "problem",
                f"{own.certificate}: names no host, and sites check the name that they dial: have it issued with "
                "splitpeer pki request --host",
            )
        ]
    error = _rehearse(own, host if listens else None)
    if error is None:
        return []
    return [Finding("certificate", "problem", _cause(own, chain, authorities, error))]


def _rehearse(own: Credentials, host: str | None) -> ssl.SSLCertVerificationError | None:
    """What the peer finds wrong with us; `host`: we listen, and are dialled by that name."""
    with tempfile.TemporaryDirectory(prefix="splitpeer-") as folder:
        made = Path(folder)
        now = datetime.now(UTC)
        pki.create_ca(made, "preflight", now=now)
        peer = pki.issue(made, "coordinator", "peer", hosts=["localhost"], now=now)
        judge = Credentials(own.ca, peer.certificate, peer.key, own.crl)
        judged = Credentials(made / "ca.crt", own.certificate, own.key)
        server, client = (judged, judge) if host else (judge, judged)
        to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
        sides = (
            client.client_context().wrap_bio(to_client, to_server, server_hostname=host or "localhost"),
            server.server_context().wrap_bio(to_server, to_client, server_side=True),
        )
        for _ in range(3):
            for side in sides:
                try:
                    side.do_handshake()
                except ssl.SSLWantReadError:
                    continue
                except ssl.SSLCertVerificationError as error:
                    return error
    return None


def _hosts(certificate: x509.Certificate) -> Iterator[str]:
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    yield from names.get_values_for_type(x509.DNSName)
    yield from (without_zone(str(address)) for address in names.get_values_for_type(x509.IPAddress))


# --- whose fault it is ----------------------------------------------------------------------------------


def _cause(
    own: Credentials,
    chain: list[x509.Certificate],
    authorities: list[x509.Certificate],
    error: ssl.SSLCertVerificationError,
) -> str:
    if error.verify_code in _NO_ISSUER and (text := _no_issuer(own, chain, authorities)):
        return text
    above = _issuers(chain, authorities)
    for certificate in above:
        where = own.ca if certificate in authorities else own.certificate
        if text := _form(certificate, leaf=certificate == chain[0]):
            whose = (
                "yours; ask the CA to issue it again" if certificate == chain[0] else "the CA has to fix it"
            )
            return f"{where}: {_name(certificate)} {text} ({whose})"
    return (
        f"{own.certificate}: the others will refuse it ({error.verify_message}): have the CA issue it in the form that "
        "docs/running.md describes"
    )


def _no_issuer(own: Credentials, chain: list[x509.Certificate], authorities: list[x509.Certificate]) -> str:
    top = _issuers(chain, authorities)[-1]
    held = ", ".join(_name(one) for one in authorities)
    if top in authorities and top.subject != top.issuer:
        return (
            f"{own.ca}: holds the intermediate {_name(top)} but not its root {top.issuer.rfc4514_string()}: "
            "add the root's certificate to the file"
        )
    if any(one.subject == top.issuer for one in authorities):
        return (
            f"{own.ca}: its CA {top.issuer.rfc4514_string()} has the right name but did not sign {_name(top)}: "
            "one of them is outdated: fetch the federation's present ca.crt, or have the certificate issued again"
        )
    return (
        f"{own.certificate}: {_name(top)} was issued by {top.issuer.rfc4514_string()}, but {own.ca} holds {held}: "
        "if that issuer is an intermediate add its certificate to the end of the certificate file, else this is the "
        "ca.crt of another federation"
    )


def _issuers(chain: list[x509.Certificate], authorities: list[x509.Certificate]) -> list[x509.Certificate]:
    """From our certificate upwards, as far as the files hold issuers."""
    found = [chain[0]]
    while (below := found[-1]).subject != below.issuer:
        for one in (*chain[1:], *authorities):
            if one not in found and one.subject == below.issuer and _signed(below, one):
                found.append(one)
                break
        else:
            break
    return found


def _signed(certificate: x509.Certificate, issuer: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(issuer)
    except Exception:  # a bad signature, or a key of an unknown kind
        return False
    return True


def _form(certificate: x509.Certificate, *, leaf: bool) -> str:
    """What RFC 5280 asks of a certificate's extensions and this one lacks; empty if nothing was found."""
    usage, constraints = (
        _extension(certificate, x509.KeyUsage),
        _extension(certificate, x509.BasicConstraints),
    )
    if (
        _extension(certificate, x509.AuthorityKeyIdentifier) is None
        and certificate.subject != certificate.issuer
    ):
        return "has no authorityKeyIdentifier (in openssl: authorityKeyIdentifier = keyid)"
    if not leaf:
        if constraints is None or not constraints.value.ca:
            return "may not issue certificates: its basicConstraints is not CA:TRUE"
        if not constraints.critical:
            return "has a basicConstraints that is not critical (in openssl: basicConstraints = critical, CA:TRUE)"
        if usage is None:
            return "has no keyUsage (in openssl: keyUsage = critical, keyCertSign, cRLSign)"
        if not usage.value.key_cert_sign:
            return (
                "has a keyUsage without keyCertSign (in openssl: keyUsage = critical, keyCertSign, cRLSign)"
            )
        if _extension(certificate, x509.SubjectKeyIdentifier) is None:
            return "has no subjectKeyIdentifier (in openssl: subjectKeyIdentifier = hash)"
        return ""
    if usage is not None and not usage.value.digital_signature:
        return "has a keyUsage without digitalSignature, which TLS 1.3 needs"
    purposes = _extension(certificate, x509.ExtendedKeyUsage)
    wanted = {ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH}
    if purposes is not None and not wanted <= set(purposes.value):
        return "was issued for another purpose (in openssl: extendedKeyUsage = clientAuth, serverAuth)"
    return ""


def _extension(certificate: x509.Certificate, kind: type[x509.ExtensionType]) -> x509.Extension | None:  # type: ignore[type-arg]
    try:
        return certificate.extensions.get_extension_for_class(kind)
    except x509.ExtensionNotFound:
        return None


def _name(certificate: x509.Certificate) -> str:
    return (
        certificate.subject.rfc4514_string() or f"the certificate with serial {certificate.serial_number:x}"
    )
