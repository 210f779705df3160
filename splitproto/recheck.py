"""Whether the certificates behind an open link are still good (SP-6-12 to SP-6-14): files and dates, no clock.

At the handshake OpenSSL judges certificates and CRL; a link may then live for a day. `Recheck` looks at the
same files again and says which links must end and which should make way for a new one. It never admits more:
a file that cannot be used changes nothing for open links, and is logged once.
"""

from __future__ import annotations

import hashlib
import logging
import re
import ssl
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from pathlib import Path

from cryptography import x509

from .errors import CertificateEnded, IdentityError, LocalError, SplitprotoError
from .identity import Credentials, Identity, is_partial

log = logging.getLogger(__name__)

NEAR_SHARE, NEAR_LONGEST = 20, timedelta(hours=1)
"""A certificate ends soon in the last twentieth of its life, or the last hour if that is shorter."""
_CRL = re.compile(rb"-----BEGIN X509 CRL-----.*?-----END X509 CRL-----", re.DOTALL)

Mark = tuple[int, int, int] | None
"""Tells whether a file was replaced: time of change, inode, size; None if there is none."""


@dataclass(frozen=True, slots=True)
class Made:
    """The credentials that a link was made with."""

    own: Identity
    files: bytes
    """`files_digest` at that time."""
    peer: Identity
    certificate: x509.Certificate
    """The peer's."""
    since: datetime


def files_digest(credentials: Credentials) -> bytes:
    """Digest of our certificate file and the CA list as they are now; empty if they cannot be read."""
    try:
        contents = [path.read_bytes() for path in (credentials.certificate, credentials.ca)]
    except OSError:
        return b""
    return hashlib.sha256(b"".join(hashlib.sha256(content).digest() for content in contents)).digest()


class Presented:
    """What a listener shows to the next peer, read again when one of its files was replaced.

    Args:
        credentials: their paths.
    """

    def __init__(self, credentials: Credentials) -> None:
        self._credentials = credentials
        self._marks: dict[Path, Mark] = {}
        self._made: tuple[Identity, bytes, ssl.SSLContext] | None = None

    def now(self) -> tuple[Identity, bytes, ssl.SSLContext]:
        """Identity, `files_digest` and TLS context. Raises `IdentityError`: the files cannot be used."""
        # Before they are read: a file replaced meanwhile is read again for the next peer.
        marks = {path: _mark(path) for path in _paths(self._credentials)}
        if self._made is None or marks != self._marks:
            self._made = None
            own, files = self._credentials.identity, files_digest(self._credentials)
            self._made, self._marks = (own, files, self._credentials.server_context()), marks
        return self._made


class Recheck:
    """Looks at one side's files, and judges links by what it found.

    Args:
        credentials: their paths.
    """

    def __init__(self, credentials: Credentials) -> None:
        self._credentials = credentials
        self._marks: dict[Path, Mark] = {}
        self._files = b""
        self._lists: dict[x509.Name, x509.CertificateRevocationList] = {}
        """The newest list seen, by issuer."""
        self._complained: set[str] = set()

    def look(self, now: datetime) -> None:
        """Read again what was replaced since the last look; `now` carries its time zone."""
        own = self._credentials
        marks = {path: _mark(path) for path in _paths(own)}
        if marks != self._marks:
            usable = self._read_own(now)
            if own.crl is not None:
                usable = self._read_lists(own.crl) and usable
            # An unusable file may be usable at the next look: half replaced, not yet valid, a slow disk.
            self._marks = marks if usable else {}
        for listed in self._outdated(now):
            self._complain(
                f"{own.crl}: outdated since {listed.next_update_utc:%Y-%m-%d %H:%M} UTC: open links stay, new ones "
                "are refused: fetch a fresh one from the CA"
            )

    def must_end(self, link: Made, now: datetime) -> LocalError | None:
        """The error with which `link` must end now, or None; it is sent to the peer."""
        listed = self._lists.get(link.certificate.issuer)
        serial = link.certificate.serial_number
        if listed is not None and listed.get_revoked_certificate_by_serial_number(serial) is not None:
            return IdentityError(
                f"the certificate of {link.peer.role} {link.peer.site} (serial {link.peer.serial}) has been "
                "revoked by the CA: ask the CA's operator for a new one"
            )
        for one in (link.peer, link.own):
            if now >= one.not_after:
                return CertificateEnded(
                    f"the certificate of {one.role} {one.site} ended at {one.not_after:%Y-%m-%d %H:%M:%S} UTC: renew it"
                )
        return None

    def should_rotate(self, link: Made, now: datetime, interval: float) -> str:
        """Why a new link should take the place of `link`; empty: it need not.

        Args:
            interval: seconds between two looks.
        """
        if self._outdated(now):
            return ""  # a new link would be refused
        if self._files and self._files != link.files:
            return "our certificate or CA list was replaced"
        ends = link.peer.not_after
        near = min((ends - link.certificate.not_valid_before_utc) / NEAR_SHARE, NEAR_LONGEST)
        left = ends - link.since
        if left <= near:
            # SP-6-13: "a peer that has no new certificate must not dial for ever"
            near = left / 2
            if near < timedelta(seconds=interval):
                return ""
        return "the peer's certificate ends soon" if now >= ends - near else ""

    # --- inside ----------------------------------------------------------------------------------------

    def _outdated(self, now: datetime) -> list[x509.CertificateRevocationList]:
        return [
            listed
            for listed in self._lists.values()
            if listed.next_update_utc is not None and listed.next_update_utc < now
        ]

    def _read_own(self, now: datetime) -> bool:
        """Take the files for new links, if one can be made with them."""
        try:
            # The checks of a new handshake that need no peer: key and certificate match, the CA is one.
            own = replace(self._credentials)
            certificate = x509.load_pem_x509_certificates(own.certificate.read_bytes())[0]
            if not certificate.not_valid_before_utc <= now < certificate.not_valid_after_utc:
                raise IdentityError("our certificate is not valid now", f"{own.certificate}: renew it")
        except (SplitprotoError, OSError, ValueError) as error:
            self._complain(f"{error}: open links stay as they are")
            return False
        self._files = files_digest(own)
        return True

    def _read_lists(self, path: Path) -> bool:
        """Take the lists that the CA has signed; False if one is not."""
        try:
            found = _CRL.findall(path.read_bytes())
            authorities = x509.load_pem_x509_certificates(self._credentials.ca.read_bytes())
        except (OSError, ValueError) as error:
            self._complain(
                f"{path}: cannot be read ({error}): open links stay, put the CA's revocation list there"
            )
            return False
        good = [listed for pem in found if (listed := _signed(pem, authorities)) is not None]
        if not good or len(good) < len(found):
            self._complain(
                f"{path}: not a revocation list of our CA: open links stay, fetch the one of the CA"
            )
        # A delta list would take the place of the complete one, and with it of what that revokes.
        for listed in (one for one in good if not is_partial(one)):
            held = self._lists.get(listed.issuer)
            # An attacker who can replace the file may have an older list, also signed, from before a revocation.
            if held is not None and listed.last_update_utc < held.last_update_utc:
                self._complain(
                    f"{path}: an older revocation list ({listed.last_update_utc:%Y-%m-%d %H:%M} UTC) than the one "
                    "before: for open links the newer one counts, fetch it from the CA"
                )
            else:
                self._lists[listed.issuer] = listed
        return bool(good)

    def _complain(self, line: str) -> None:
        """Log it once, not at every look."""
        if line not in self._complained:
            self._complained.add(line)
            log.warning("%s", line)


def _paths(own: Credentials) -> list[Path]:
    return [path for path in (own.certificate, own.key, own.ca, own.crl) if path is not None]


def _mark(path: Path) -> Mark:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_ino, status.st_size


def _signed(pem: bytes, authorities: list[x509.Certificate]) -> x509.CertificateRevocationList | None:
    """The list, if one of these CAs has signed it."""
    try:
        listed = x509.load_pem_x509_crl(pem)
        for authority in authorities:
            if authority.subject == listed.issuer and listed.is_signature_valid(authority.public_key()):  # type: ignore[arg-type]
                return listed
    except Exception:
        return None
    return None
