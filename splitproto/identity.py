"""Who is at the other end of a link: certificates, trust, and TLS errors in words.

A peer is named by one URI in its X.509 certificate, ``spiffe://<federation>/splitproto/<role>/<site>``
(the form of SPIFFE X509-SVID). "Signed by our CA" is authentication only; whether that role and site may
talk to us is decided by an explicit `AllowList` on each side, never by what a peer says about itself.

No clock and no socket here: contexts are used on `ssl.MemoryBIO` by the secure channel.
"""

from __future__ import annotations

import re
import ssl
import unicodedata
import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from types import MappingProxyType
from typing import Literal

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization

from splitproto.errors import IdentityError, NotAuthorised
from splitproto.recognise import convert
from splitproto.secretfile import how_to_close, open_to_others

NAME_RULE = "1 to 63 characters: lowercase letters, digits, '-', '.', '_'; the first one a letter or a digit"
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
_PATH = "splitproto"
OWN_UNUSABLE = "our own credentials cannot be used"
"""Reason of an `IdentityError` about our own files."""


def check_name(kind: str, name: str) -> str:
    """Return `name` if it may stand as federation, role or site (`NAME_RULE`), else raise `IdentityError`.

    The rule is narrower than SPIFFE's: names become file names and log fields, so there is no upper case, no
    '/' and no '..', and two names never differ in case only.
    """
    if not _NAME.fullmatch(name):
        raise IdentityError(f"{kind} {_shown(name)} is not a name: {NAME_RULE}{_close_name(name)}")
    return name


def _close_name(text: str) -> str:
    """The nearest name, as a fix; empty where there is none."""
    plain = unicodedata.normalize("NFKD", text[:200]).encode("ascii", "ignore").decode().lower()
    near = re.sub(r"[^a-z0-9._-]+", "-", plain).strip("-._")[:63]
    return f": write {near!r}" if _NAME.fullmatch(near) else ""


def uri_of(federation: str, role: str, site: str) -> str:
    """The URI subject alternative name of one peer; raises `IdentityError` for a part that is no name."""
    parts = (("federation", federation), ("role", role), ("site", site))
    federation, role, site = (check_name(kind, name) for kind, name in parts)
    return f"spiffe://{federation}/{_PATH}/{role}/{site}"


@dataclass(frozen=True, slots=True)
class Identity:
    """Who a certificate speaks for. Says nothing about trust: only a verified handshake does."""

    federation: str
    role: str
    site: str
    serial: str
    """Serial number, lowercase hexadecimal (up to 20 octets, RFC 5280 section 4.1.2.2)."""
    sha256: str
    """SHA-256 of the DER certificate, 64 lowercase hexadecimal digits."""
    not_after: datetime
    """End of validity, UTC."""

    @property
    def uri(self) -> str:
        """``spiffe://<federation>/splitproto/<role>/<site>``."""
        return f"spiffe://{self.federation}/{_PATH}/{self.role}/{self.site}"

    @classmethod
    def from_certificate(cls, der: bytes) -> Identity:
        """Read one DER certificate, e.g. `SSLObject.getpeercert(binary_form=True)`.

        Raises `IdentityError` unless it holds exactly one URI subject alternative name, of our form
        (SPIFFE X509-SVID section 2: more than one must be rejected).
        """
        try:
            # Some serial numbers that RFC 5280 forbids only make the parser warn; they are refused below.
            with warnings.catch_warnings(action="ignore"):
                certificate = x509.load_der_x509_certificate(der)
                serial, not_after = certificate.serial_number, certificate.not_valid_after_utc
            sha256 = certificate.fingerprint(hashes.SHA256()).hex()
            uris = _uris(certificate)
        except Exception as error:
            # The parser's exceptions are of many kinds and not all documented; the octets are a stranger's.
            raise IdentityError("the certificate cannot be read: issue it again with the CA") from error
        if not 0 < serial < 2**160:
            raise IdentityError("the certificate's serial number is not positive: issue it again with the CA")
        if len(uris) != 1:
            raise IdentityError(
                f"the certificate holds {len(uris)} URI names, exactly one is needed: "
                f"issue it again with spiffe://<federation>/{_PATH}/<role>/<site>"
            )
        federation, role, site = split_uri(uris[0])
        return cls(
            federation=federation,
            role=role,
            site=site,
            serial=f"{serial:x}",
            sha256=sha256,
            not_after=not_after,
        )


def _uris(certificate: x509.Certificate) -> list[str]:
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return []
    return names.get_values_for_type(x509.UniformResourceIdentifier)


def split_uri(uri: str) -> tuple[str, str, str]:
    """Federation, role and site of a URI; only the one spelling passes. Raises `IdentityError`."""
    parts = uri.removeprefix("spiffe://").split("/")
    if not (uri.startswith("spiffe://") and len(parts) == 4 and parts[1] == _PATH):
        raise IdentityError(
            f"the certificate names {_shown(uri)}, not spiffe://<federation>/{_PATH}/<role>/<site>: "
            "issue it again"
        )
    federation, role, site = parts[0], parts[2], parts[3]
    uri_of(federation, role, site)
    return federation, role, site


def _shown(text: str) -> str:
    """Text from outside, safe in one log line: quoted, ASCII, at most 120 characters."""
    return ascii(text if len(text) <= 120 else text[:117] + "...")


# --------------------------------------------------------------------------------------------------------
# Authorisation


@dataclass(frozen=True)
class AllowList:
    """The roles and sites that one side talks to: always spelled out, there is no "any".

    `owner` says where the list is kept, e.g. ``"peer.toml [policy] coordinators"``; it appears in our
    own log, while the refused peer only reads that it is not listed.
    """

    sites: Mapping[str, Collection[str]]
    """Role to the sites that may hold it."""
    owner: str

    def __post_init__(self) -> None:
        if any(isinstance(allowed, str) for allowed in self.sites.values()):
            raise TypeError("AllowList wants a collection of sites per role, not one string")
        sites = {
            check_name("role", role): frozenset(check_name("site", site) for site in allowed)
            for role, allowed in self.sites.items()
        }
        object.__setattr__(self, "sites", MappingProxyType(sites))

    def check(self, identity: Identity, federation: str) -> None:
        """Raise `NotAuthorised` unless `identity` is of `federation` and listed under its own role."""
        if identity.federation != federation:
            raise NotAuthorised(
                f"{identity.role} {identity.site!r} is of federation {identity.federation!r}, we are of "
                f"{federation!r}: use a certificate of the federation that both belong to"
            )
        if identity.site not in self.sites.get(identity.role, ()):
            raise NotAuthorised(
                f"{identity.role} {identity.site!r} is not on our allow-list",
                f"{self.owner}: add it there if it belongs here",
            )


# --------------------------------------------------------------------------------------------------------
# Own files


@dataclass(frozen=True, slots=True)
class Credentials:
    """The files one peer presents and trusts. Checked when made, and read again for each context, so that a
    rotated certificate or CRL (replaced by atomic rename) serves the next session without a restart.

    Raises `IdentityError`, one line with file and fix, for a missing or malformed file, a key that does not
    belong to the certificate, or a key that others on this machine may read.
    """

    ca: Path
    """PEM; every certificate in it may issue peers. The system's store is never consulted."""
    certificate: Path
    """PEM; own certificate first, then intermediates if any."""
    key: Path
    """PEM, unencrypted, mode 0600 or 0400: protection is the file system's (or `LoadCredential=`)."""
    crl: Path | None = None
    """PEM; when given, revocation is checked and an outdated list refuses every peer (fails closed)."""

    def __post_init__(self) -> None:
        self._check()

    @property
    def identity(self) -> Identity:
        """Who we are, from the certificate file as it is now."""
        return read_identity(self.certificate)

    def days_left(self, now: datetime) -> float:
        """Days until our certificate ends; negative when it has. `now` carries its time zone."""
        return (self.identity.not_after - now).total_seconds() / 86_400

    def server_context(self) -> ssl.SSLContext:
        """TLS 1.3 only, for the listening side: a client certificate of our CA is required."""
        context = self._context(ssl.PROTOCOL_TLS_SERVER)
        # Tickets would carry the client's chain over the wire again, for resumption that we never use.
        context.num_tickets = 0
        return context

    def client_context(self) -> ssl.SSLContext:
        """TLS 1.3 only, for the dialling side: chain, host name (DNS or IP) and purpose are checked."""
        context = self._context(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = True
        context.hostname_checks_common_name = False
        return context

    def _context(self, side: int) -> ssl.SSLContext:
        self._check()
        context = ssl.SSLContext(side)
        context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_3
        context.verify_mode = ssl.CERT_REQUIRED
        # Python sets STRICT by itself only from 3.13; all versions must judge alike (RFC 5280).
        context.verify_flags |= ssl.VERIFY_X509_STRICT
        try:
            context.load_cert_chain(self.certificate, self.key)
            context.load_verify_locations(self.ca)
            if self.crl is not None:
                context.load_verify_locations(self.crl)
                context.verify_flags |= ssl.VERIFY_CRL_CHECK_LEAF
        except (ssl.SSLError, OSError) as error:
            reason = getattr(error, "reason", None) or error.strerror or type(error).__name__
            raise _unusable(
                f"{self.certificate}, {self.key} and {self.ca} cannot be loaded together ({reason}): "
                "put certificate, key and CA of the same issue in place"
            ) from error
        return context

    def _check(self) -> None:
        for authority in _certificates(self.ca, "CA certificate"):
            if not _may_sign(authority):
                raise _unusable(
                    f"{self.ca}: not a CA certificate: name the CA's own certificate (ca.crt) here"
                )
        chain = _certificates(self.certificate, "certificate")
        keys, own = [_spki(one.public_key()) for one in chain], _private_spki(self.key)
        if own in keys[1:]:
            raise _unusable(
                f"{self.certificate}: our own certificate is number {keys.index(own) + 1} in the file and must be the "
                "first: put it there, then the intermediates"
            )
        if own != keys[0]:
            raise _unusable(
                f"{self.key}: the key does not belong to the certificate {self.certificate}: "
                "use the pair that was issued together"
            )
        if self.crl is not None:
            _revocations(self.crl)
        _ = self.identity


def read_identity(path: Path) -> Identity:
    """The identity that a PEM certificate file names (its first certificate). Raises `IdentityError`."""
    leaf = _certificates(path, "certificate")[0]
    try:
        return Identity.from_certificate(leaf.public_bytes(serialization.Encoding.DER))
    except IdentityError as error:
        raise _unusable(f"{path}: {error}") from error


def revocation_lists(pem: bytes) -> list[x509.CertificateRevocationList]:
    """All lists of a file, as OpenSSL reads it. Raises ValueError: there is none, or one is damaged."""
    begun = b"-----BEGIN X509 CRL-----"
    _, *lists = pem.split(begun)
    if not lists:
        raise ValueError("no revocation list in PEM")
    return [x509.load_pem_x509_crl(begun + one) for one in lists]


def is_partial(listed: x509.CertificateRevocationList) -> bool:
    """Whether it lists only a part of what a CA has revoked, so that its silence proves nothing.

    A delta list (RFC 5280, section 5.2.4), one for other certificates than those of peers, or for some reasons only.
    """
    try:
        found = [extension.value for extension in listed.extensions]
    except ValueError:
        return True
    return any(
        isinstance(one, x509.DeltaCRLIndicator)
        or (
            isinstance(one, x509.IssuingDistributionPoint)
            and bool(
                one.only_contains_ca_certs
                or one.only_contains_attribute_certs
                or one.only_some_reasons
                or one.indirect_crl
            )
        )
        for one in found
    )


def _unusable(line: str) -> IdentityError:
    """Paths stay in the detail: a peer may be told the reason, never where our files lie."""
    return IdentityError(OWN_UNUSABLE, line)


def _read(path: Path, what: str) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise _unusable(f"{path}: no such file: put the {what} there or correct the path") from None
    except OSError as error:
        raise _unusable(f"{path}: the {what} cannot be read: {error.strerror}") from error


def _certificates(path: Path, what: str) -> list[x509.Certificate]:
    pem = _read(path, what)
    try:
        return x509.load_pem_x509_certificates(pem)
    except Exception as error:
        raise _unusable(f"{path}: not a PEM {what}: {convert(pem, path, 'CERTIFICATE')}") from error


def _revocations(path: Path) -> x509.CertificateRevocationList:
    pem = _read(path, "revocation list")
    try:
        return x509.load_pem_x509_crl(pem)
    except Exception as error:
        raise _unusable(f"{path}: not a PEM revocation list: {convert(pem, path, 'X509 CRL')}") from error


def _private_spki(path: Path) -> bytes:
    pem = _read(path, "private key")
    if open_to_others(path):
        raise _unusable(f"{path}: others on this machine may read the private key: {how_to_close(path)}")
    try:
        key = serialization.load_pem_private_key(pem, password=None)
    except TypeError as error:  # OpenSSL would stop and ask on the terminal
        raise _unusable(
            f"{path}: the private key has a passphrase, a daemon cannot ask for it: "
            "store it without one, mode 0600"
        ) from error
    except Exception as error:  # ValueError, UnsupportedAlgorithm: never show what is in a key file
        raise _unusable(f"{path}: not a PEM private key: {convert(pem, path, 'PRIVATE KEY')}") from error
    return _spki(key.public_key())


def _spki(key: object) -> bytes:
    public_bytes = getattr(key, "public_bytes")  # noqa: B009  (a union of a dozen key classes)
    return bytes(public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo))


def _may_sign(certificate: x509.Certificate) -> bool:
    try:
        return certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    except (x509.ExtensionNotFound, x509.DuplicateExtension, ValueError):
        return False


# --------------------------------------------------------------------------------------------------------
# TLS errors in words

_SAME_CA = "both sides need the ca.crt of the same federation"
_REISSUE = "have it issued again by the federation's CA"
_CHAIN = "the certificate file there must hold the certificate, then each intermediate up to the root"
_CA_FORM = "the CA needs basicConstraints = critical, CA:TRUE and keyUsage = critical, keyCertSign, cRLSign"
_CLOCK = "check the clock of both machines, then renew the certificate"

# X509_V_ERR_* (openssl x509_vfy.h), what our own OpenSSL found wrong with {their} certificate.
_VERIFY = {
    2: "was not issued by our CA: " + _SAME_CA,
    3: "cannot be checked for revocation, our CRL is of another CA: fetch the CRL of the CA that issued it",
    7: "does not carry a valid signature of our CA: " + _REISSUE,
    9: "is not yet valid: " + _CLOCK,
    10: "has expired: " + _CLOCK,
    11: "cannot be checked for revocation, our CRL is not yet valid: check the clock of this machine",
    12: "cannot be checked for revocation, our CRL is outdated: fetch a fresh one from the CA",
    18: "is self-signed: " + _REISSUE,
    19: "was not issued by our CA: " + _SAME_CA,
    20: "was not issued by our CA: " + _SAME_CA,
    21: "was not issued by our CA: " + _SAME_CA,
    23: "has been revoked by the CA: ask the CA's operator, then have a new one issued",
    24: "was issued by one that may not issue others: " + _CHAIN,
    25: "has more intermediates above it than its CA allows (pathlen): " + _CHAIN,
    32: "was issued by one without keyCertSign in its keyUsage: " + _CA_FORM,
    79: "was issued by one that may not issue others: " + _CHAIN,
    85: "or one above it lacks the authority key identifier: "
    + _REISSUE
    + ", with authorityKeyIdentifier = keyid",
    86: "or one above it lacks the subject key identifier: " + _CA_FORM,
    89: "was issued by a CA whose basicConstraints is not critical: " + _CA_FORM,
    92: "was issued by a CA without keyUsage: " + _CA_FORM,
    26: "was issued for another purpose: it needs clientAuth and serverAuth, " + _REISSUE,
    62: "does not name the host that we dialled{host}: issue it with that host name, or dial one it names",
    64: "does not name the address that we dialled{host}: issue it with that address, or dial a name in it",
}

# RFC 8446 section 6.2: what the other side found wrong; "our" is the reader's side.
_ALERTS = {
    "UNKNOWN_CA": "does not know the CA of our certificate: " + _SAME_CA,
    "CERTIFICATE_EXPIRED": "says that our certificate, or its own revocation list (CRL), has expired: if ours is "
    "valid, fetch a fresh list there; else " + _CLOCK,
    "CERTIFICATE_REVOKED": "says that our certificate is revoked: ask the CA's operator for a new one",
    "BAD_CERTIFICATE": "refuses our certificate (host name, dates or form): its log names the reason",
    "UNSUPPORTED_CERTIFICATE": "refuses the purpose of our certificate: it needs clientAuth and serverAuth, "
    + _REISSUE,
    "CERTIFICATE_UNKNOWN": "could not judge our certificate (often its CRL): its log names the reason",
    "CERTIFICATE_REQUIRED": "asks for a certificate and we sent none: set certificate and key",
    "ACCESS_DENIED": "denies access: its log names the reason",
    "PROTOCOL_VERSION": "does not speak TLS 1.3, the only version used here: update it",
    "HANDSHAKE_FAILURE": "shares no cipher suite or group with us: allow the TLS 1.3 defaults on both sides",
    "DECRYPT_ERROR": "could not check our signature: certificate and key must be of one issue, on both sides",
    "BAD_RECORD_MAC": "lost or received altered bytes: the session is over, a new one starts",
    "INTERNAL_ERROR": "failed by itself: its log names the reason",
    "USER_CANCELED": "stopped the handshake: try again",
}

# Those of them that refuse a certificate.
_REFUSALS = frozenset(
    (
        "UNKNOWN_CA",
        "CERTIFICATE_EXPIRED",
        "CERTIFICATE_REVOKED",
        "BAD_CERTIFICATE",
        "UNSUPPORTED_CERTIFICATE",
        "CERTIFICATE_UNKNOWN",
        "CERTIFICATE_REQUIRED",
        "ACCESS_DENIED",
    )
)

_NOT_TLS = "sent something that is not TLS 1.3: is the address and port that of a splitproto listener?"
_DAMAGED = "bytes were lost or altered on the way: the session is over, a new one starts"

# Reasons that our own OpenSSL gives for what the other side sent.
_LOCAL = {
    "WRONG_VERSION_NUMBER": "{their} " + _NOT_TLS,
    "HTTP_REQUEST": "{their} speaks plain HTTP, not TLS 1.3: something else dialled this port",
    "HTTPS_PROXY_REQUEST": "{their} speaks to a web proxy, not TLS 1.3: something else dialled this port",
    "BAD_RECORD_TYPE": "{their} " + _NOT_TLS,
    "UNEXPECTED_MESSAGE": "{their} " + _NOT_TLS,
    "RECORD_LAYER_FAILURE": "{their} " + _NOT_TLS,
    "PACKET_LENGTH_TOO_LONG": "{their} " + _NOT_TLS,
    "UNSUPPORTED_PROTOCOL": "{their} does not speak TLS 1.3, the only version used here: update it",
    "VERSION_TOO_LOW": "{their} does not speak TLS 1.3, the only version used here: update it",
    "NO_SHARED_CIPHER": "{their} shares no cipher suite with us: allow the TLS 1.3 defaults on both sides",
    "PEER_DID_NOT_RETURN_A_CERTIFICATE": "{their} sent no certificate: set certificate and key on its side",
    "DECRYPTION_FAILED_OR_BAD_RECORD_MAC": _DAMAGED,
    "BAD_SIGNATURE": "{their} signed with a key that is not its certificate's: " + _REISSUE,
    "UNEXPECTED_EOF_WHILE_READING": "{their} closed without a farewell: its log names the reason",
}


def refused(error: ssl.SSLError) -> Literal["", "theirs", "ours"]:
    """Whose certificate a TLS failure refuses; empty: it may be damage by anybody in between."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return "theirs"
    _, _, alert = str(getattr(error, "reason", None) or "").partition("ALERT_")
    return "ours" if alert in _REFUSALS else ""


def claims(der: bytes) -> str:
    """URI names, issuer, serial number and dates of a certificate that was refused: one line, nothing of it proven."""
    try:
        certificate = x509.load_der_x509_certificate(der)
        uris = ", ".join(_shown(uri) for uri in _uris(certificate)[:2]) or "no URI"
        return (
            f"it names {uris}, issued by {_shown(certificate.issuer.rfc4514_string())}, "
            f"serial {certificate.serial_number:x}, valid {certificate.not_valid_before_utc:%Y-%m-%d} to "
            f"{certificate.not_valid_after_utc:%Y-%m-%d}"
        )
    except Exception:  # of many kinds, not all documented; the octets are a stranger's
        return "it cannot be read"


def explain(error: ssl.SSLError, *, local_is_server: bool) -> str:
    """One readable line for a TLS failure, as seen from our side: the cause, then the fix.

    `local_is_server`: we are the listening peer. A TLS 1.3 client finishes its handshake before the server
    has judged its certificate: the refusal reaches it as an alert, at its next read (RFC 8446, 4.4.2.4).
    """
    their = "the dialling peer" if local_is_server else "the listening peer"
    if isinstance(error, ssl.SSLCertVerificationError):
        text = _VERIFY.get(getattr(error, "verify_code", 0))
        message = str(getattr(error, "verify_message", ""))
        if text is None:
            return f"the certificate of {their} is refused ({_plain(message)}): {_REISSUE}"
        named = re.search(r"not valid for '([^']*)'", message)
        return f"the certificate of {their} " + text.format(host=f" ({named[1]})" if named else "")
    if isinstance(error, ssl.SSLEOFError):
        return _LOCAL["UNEXPECTED_EOF_WHILE_READING"].format(their=their)
    if isinstance(error, ssl.SSLZeroReturnError):
        return f"{their} closed the session: its log names the reason"
    reason = str(getattr(error, "reason", None) or "")
    # OpenSSL versions differ only in the prefix of ALERT_: TLSV1_, TLSV13_, SSLV3_, SSL/TLS_.
    _, is_alert, alert = reason.partition("ALERT_")
    if is_alert:
        return f"{their} " + _ALERTS.get(
            alert, f"refused the handshake ({_plain(alert)}): its log names the reason"
        )
    text = _LOCAL.get(
        reason, "TLS with {their} failed (" + _plain(reason or str(error)) + "): try a new session"
    )
    return text.format(their=their)


def _plain(text: str | None) -> str:
    return re.sub(r"[^ -~]|[{}]", "", text or "unknown reason").lower().replace("_", " ")[:120]
