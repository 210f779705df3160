"""Keys that sites show each other for secure fusion (SP-11.18-6 to SP-11.18-9): signed, relayed, and believed by nobody
but on proof.

The coordinator passes them on and could put its own in their place. So each is signed with the certificate's key of its
site, and a site checks what it gets against its own CA, revocation list and list of partners.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from typing import NamedTuple

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.x509.verification import PolicyBuilder, Store

from . import codec
from .errors import CertificateEnded, FusionMismatch, IdentityError, PolicyRefused
from .fields import write_map
from .fusion import SECRET_BYTES
from .identity import OWN_UNUSABLE, Credentials, Identity, is_partial, revocation_lists
from .records import Job, KeyOffer

_LABEL = b"splitproto-1 fusion key"
_HASHES = {"secp256r1": hashes.SHA256(), "secp384r1": hashes.SHA384(), "secp521r1": hashes.SHA512()}
_PSS = padding.PSS(padding.MGF1(hashes.SHA256()), hashes.SHA256.digest_size)


def terms_digest(job: Job) -> bytes:
    """SP-11.18-6: digest of what all sites of a run must agree on, which is the whole job.

    A partner that computed under other terms (another normalisation, another spacing) might add next to nothing to the
    sum, which then would be another site's values.
    """
    return hashlib.sha256(codec.encode(write_map(job, "job"))).digest()


class Keys(NamedTuple):
    """A site's two X25519 public keys of one run (SP-11.18-5)."""

    training: bytes
    service: bytes

    @classmethod
    def of(cls, offer: KeyOffer) -> Keys:
        """Those that an offer holds."""
        return cls(offer.public, offer.service)

    @classmethod
    def read(cls, written: str) -> Keys:
        """The inverse of `written`. Raises ValueError or TypeError."""
        octets = bytes.fromhex(written)
        if len(octets) != 2 * SECRET_BYTES:
            raise ValueError("not two keys")
        return cls(octets[:SECRET_BYTES], octets[SECRET_BYTES:])

    def written(self) -> str:
        """One after the other, in hexadecimal."""
        return (self.training + self.service).hex()


def statement(uri: str, run: bytes, terms: bytes, keys: Keys) -> bytes:
    """SP-11.18-6: what a site signs.

    Args:
        uri: the site's identity.
        terms: `terms_digest`.
        keys: the site's, for this run.
    """
    return _LABEL + codec.encode([uri, run, terms, *keys])


def sign(key_pem: bytes, chain_pem: bytes, run: bytes, terms: bytes, keys: Keys) -> KeyOffer:
    """This site's offer.

    Args:
        key_pem, chain_pem: contents of its key file and its certificate file, its own certificate first.

    Raises:
        IdentityError: the key is of a kind that does not sign here; or, with the reason `OWN_UNUSABLE`, one of them is
            not whole or they do not belong together, as in the middle of a renewal.
    """
    signature, chain = signed_statement(key_pem, chain_pem, lambda uri: statement(uri, run, terms, keys))
    return KeyOffer(*keys, signature, chain)


def signed_statement(
    key_pem: bytes, chain_pem: bytes, said: Callable[[str], bytes]
) -> tuple[bytes, tuple[bytes, ...]]:
    """Signature with a certificate's key, and the certificate's chain in DER, its own first.

    Args:
        key_pem, chain_pem: contents of the key file and the certificate file.
        said: from the certificate's URI to the octets to be signed, which begin with a label of their own.

    Raises:
        IdentityError: see `sign`.
    """
    try:
        certificates = x509.load_pem_x509_certificates(chain_pem)
        key = serialization.load_pem_private_key(key_pem, password=None)
    except (ValueError, TypeError) as error:
        raise IdentityError(OWN_UNUSABLE, "certificate or key is not whole PEM") from error
    if key.public_key() != certificates[0].public_key():
        raise IdentityError(OWN_UNUSABLE, "the key does not belong to the certificate")
    chain = tuple(one.public_bytes(serialization.Encoding.DER) for one in certificates)
    signed = said(Identity.from_certificate(chain[0]).uri)
    if isinstance(key, ec.EllipticCurvePrivateKey) and key.curve.name in _HASHES:
        return key.sign(signed, ec.ECDSA(_HASHES[key.curve.name])), chain
    if isinstance(key, rsa.RSAPrivateKey):
        return key.sign(signed, _PSS, hashes.SHA256()), chain
    raise IdentityError(
        "secure fusion needs a certificate with a key on P-256, P-384 or P-521, or an RSA key"
    )


@dataclass(frozen=True)
class Trust:
    """What an offer is checked against."""

    federation: str
    authorities: Sequence[x509.Certificate]
    revocations: Sequence[x509.CertificateRevocationList] | None
    """None: no list is configured."""
    partners: Collection[str]
    """Sites that may be in a sum with this one."""
    least: int = 2
    """Fewer partners are refused."""

    @classmethod
    def read(
        cls, federation: str, ca_pem: bytes, crl_pem: bytes | None, partners: Collection[str], least: int = 2
    ) -> Trust:
        """From the contents of files.

        Raises:
            IdentityError: with the reason `OWN_UNUSABLE`, one is not PEM, or not whole, as while it is replaced.
        """
        try:
            authorities = x509.load_pem_x509_certificates(ca_pem)
            revocations = None if crl_pem is None else revocation_lists(crl_pem)
        except ValueError as error:
            raise IdentityError(OWN_UNUSABLE, "CA certificate or revocation list is not PEM") from error
        return cls(federation, authorities, revocations, frozenset(partners), least)

    @classmethod
    def of(
        cls, credentials: Credentials, federation: str, partners: Collection[str], least: int = 2
    ) -> Trust:
        """With CA and revocation list as these files are now. Raises IdentityError."""
        crl = credentials.crl
        try:
            ca_pem, crl_pem = credentials.ca.read_bytes(), crl.read_bytes() if crl else None
        except OSError as error:
            raise IdentityError(OWN_UNUSABLE, "CA certificate or revocation list cannot be read") from error
        return cls.read(federation, ca_pem, crl_pem, partners, least)


def verify(offer: KeyOffer, run: bytes, terms: bytes, trust: Trust, now: datetime) -> Identity:
    """Who made `offer`, proven, for this run and these terms.

    Args:
        offer: any octets, within the limits of the message.
        now: with its time zone.

    Raises:
        FusionMismatch: forged, of another run or other terms, or of a certificate that our CA did not issue, or that
            was revoked; or a key that anybody can use.
        PolicyRefused: a site that is not among the partners.
        CertificateEnded: nothing is wrong with it but that its certificate has ended since: a new one is to be had.
    """
    identity, ended = _proven(offer.chain, trust, now)
    # SP-11.18-8: the name is the certificate's; nothing that the coordinator says changes it.
    if identity.federation != trust.federation or identity.role != "client":
        raise FusionMismatch(f"a fusion key of {identity.uri}, which is no site of {trust.federation}")
    check_signature(offer, identity, run, terms)
    if not all(_agrees(key) for key in Keys.of(offer)):
        raise FusionMismatch(f"the fusion key of site {identity.site} is a point of small order")
    if identity.site not in trust.partners:
        raise PolicyRefused(f"site {identity.site} is not among our partners")
    if ended:
        # SP-11.18-8: last, so that nothing that is wrong looks like something to wait for.
        raise CertificateEnded(
            f"the certificate of site {identity.site} has ended since it made its fusion key: a new one is waited for"
        )
    return identity


def check_signature(offer: KeyOffer, identity: Identity, run: bytes, terms: bytes) -> None:
    """Raises `FusionMismatch` unless `offer` was signed with its certificate's key for this run and these terms."""
    if not _signed(offer.chain, offer.signature, statement(identity.uri, run, terms, Keys.of(offer))):
        raise FusionMismatch(
            f"the fusion key of site {identity.site} is not signed by it for this run and its terms"
        )


def check_statement(
    chain: Sequence[bytes], signature: bytes, said: Callable[[str], bytes], trust: Trust, now: datetime
) -> Identity:
    """Who signed a statement, whatever the role: the inverse of `signed_statement`.

    Raises:
        IdentityError: forged, or with a certificate that our CA did not issue, that has ended, or that was revoked.
    """
    try:
        identity, ended = _proven(chain, trust, now, "a signature")
    except FusionMismatch as error:
        raise IdentityError(error.reason) from None
    if ended:
        raise IdentityError("a signature whose certificate does not hold: it has ended")
    if identity.federation != trust.federation:
        raise IdentityError(f"a signature of {identity.uri}, which is not of {trust.federation}")
    if not _signed(chain, signature, said(identity.uri)):
        raise IdentityError(f"the signature of {identity.role} {identity.site} does not hold")
    return identity


def _signed(chain: Sequence[bytes], signature: bytes, signed: bytes) -> bool:
    """Whether the first certificate's key made the signature."""
    with suppress(Exception):  # of many kinds, not all documented; the octets are a stranger's
        key = x509.load_der_x509_certificate(chain[0]).public_key()
        if isinstance(key, ec.EllipticCurvePublicKey):
            key.verify(signature, signed, ec.ECDSA(_HASHES[key.curve.name]))
            return True
        if isinstance(key, rsa.RSAPublicKey):
            key.verify(signature, signed, _PSS, hashes.SHA256())
            return True
    return False


def accept(
    offers: Sequence[KeyOffer],
    own: KeyOffer,
    run: bytes,
    terms: bytes,
    parties: int,
    trust: Trust,
    now: datetime,
) -> dict[str, Keys]:
    """SP-11.18-8: name -> public keys of all partners of a run, proven.

    Args:
        offers: those of `fusion-keys`.
        parties: sites in the sum, this one included.

    Raises:
        FusionMismatch, PolicyRefused, CertificateEnded: as `verify`, or their number or keys do not fit.
    """
    if len(offers) + 1 != parties:
        raise FusionMismatch(
            f"{len(offers)} fusion keys came for a sum of {parties} sites: {parties - 1} are needed"
        )
    if len(offers) < trust.least:
        raise PolicyRefused(f"{len(offers)} partners in the sum, our policy wants {trust.least} or more")
    found = dict[str, Keys]()
    names, seen = {Identity.from_certificate(own.chain[0]).site}, [*Keys.of(own)]
    for offer in offers:
        name, keys = verify(offer, run, terms, trust, now).site, Keys.of(offer)
        seen += keys
        if name in names or len(set(seen)) < len(seen):
            raise FusionMismatch(f"the fusion key of site {name} came twice, or is that of another site")
        names.add(name)
        found[name] = keys
    return found


def check_unchanged(kept: Mapping[str, Keys], found: Mapping[str, Keys]) -> None:
    """SP-11.18-9: the partners of a run stay who they were.

    Raises:
        FusionMismatch: names the first that is new, gone, or has another key.
    """
    for name in sorted({*kept, *found}):
        if kept.get(name) != found.get(name):
            what = "is new" if name not in kept else "is gone" if name not in found else "has another key"
            raise FusionMismatch(
                f"partner {name} {what}: the partners of a run never change, begin a new run"
            )


# --- certificates ---------------------------------------------------------------------------------------


def _proven(
    chain: Sequence[bytes], trust: Trust, now: datetime, what: str = "a fusion key"
) -> tuple[Identity, bool]:
    """SP-11.18-8: as in a handshake, SP-6-2 to SP-6-4, for the purpose of a client; and whether it held only until a
    certificate of the chain ended."""
    try:
        leaf, *between = (x509.load_der_x509_certificate(der) for der in chain)
        identity = Identity.from_certificate(chain[0])
        ends = sorted(end for one in (leaf, *between) if (end := one.not_valid_after_utc) < now)
        proven, ended = _chain(leaf, between, trust, now, ends)
    except Exception as error:  # of many kinds, not all documented; the octets are a stranger's
        raise FusionMismatch(f"{what} whose certificate does not hold: {_line(error)}") from None
    # Of what came with the leaf, only what was proven: nothing else has a key that could be asked anything.
    _not_revoked(leaf, proven[1] if len(proven) > 1 else leaf, trust, now, identity)
    return identity, ended


def _chain(
    leaf: x509.Certificate,
    between: list[x509.Certificate],
    trust: Trust,
    now: datetime,
    ends: Sequence[datetime],
) -> tuple[list[x509.Certificate], bool]:
    """The chain to a CA that holds now, or else held when one of its certificates ended. Raises as a verifier does."""
    usual: Exception | None = None
    for moment in (now, *ends):
        policy = PolicyBuilder().store(Store(list(trust.authorities))).time(moment)
        try:
            return policy.build_client_verifier().verify(leaf, between).chain, moment < now
        except Exception as error:
            usual = usual or error
    raise usual or ValueError("no moment")


def _agrees(public: bytes) -> bool:
    """SP-11.18-8: "X25519 yields no zeros with either key". Where it does, it does so with every secret."""
    try:
        X25519PrivateKey.from_private_bytes(bytes(32)).exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError:
        return False
    return True


def _not_revoked(
    leaf: x509.Certificate, issuer: x509.Certificate, trust: Trust, now: datetime, identity: Identity
) -> None:
    """A configured list that does not speak for the certificate now refuses it, as in TLS.

    Args:
        issuer: the one that the chain was proven with; another CA may have its name.
    """
    if trust.revocations is None:
        return
    key = issuer.public_key()
    heard = [
        listed
        for listed in trust.revocations
        if listed.issuer == leaf.issuer and listed.last_update_utc <= now and listed.is_signature_valid(key)  # type: ignore[arg-type]
    ]
    if complete := [listed for listed in heard if not is_partial(listed) and not _outdated(listed, now)]:
        # As OpenSSL does: an older list neither undoes a revocation nor adds one.
        newest = max(complete, key=lambda listed: listed.last_update_utc)
        # A newer one that is outdated vouches for nobody, and what it revoked stays revoked: only a complete list that
        # is newer still could tell otherwise.
        since = [one for one in heard if one is newest or one.last_update_utc > newest.last_update_utc]
        if not any(_revokes(one, leaf.serial_number) for one in since):
            return
        raise FusionMismatch(
            f"the certificate of site {identity.site} (serial {identity.serial}) has been revoked"
        )
    raise FusionMismatch(
        f"site {identity.site} cannot be checked for revocation: fetch a fresh list of its CA"
    )


def _outdated(listed: x509.CertificateRevocationList, now: datetime) -> bool:
    return (ends := listed.next_update_utc) is not None and ends < now


def _revokes(listed: x509.CertificateRevocationList, serial: int) -> bool:
    found = listed.get_revoked_certificate_by_serial_number(serial)
    if found is None:
        return False
    reasons = [one.value for one in found.extensions if isinstance(one.value, x509.CRLReason)]
    # In a delta list: it was on hold, and is good again.
    return not any(one.reason is x509.ReasonFlags.remove_from_crl for one in reasons)


def _line(error: Exception) -> str:
    return " ".join(str(error).partition(" (encountered")[0].split())[:200]
