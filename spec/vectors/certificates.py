"""Cases of certificates: chains that a peer accepts and chains that it refuses (SP-6-2 to SP-6-5).

The keys are made of fixed primes and known to everybody: they are for tests only. RSA with PKCS #1 v1.5, because its
signatures are the same every time; a federation's own keys SHOULD be on P-256 (SP-6-2).
"""

from __future__ import annotations

import hashlib
import ipaddress
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

from common import Case, refused
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.x509.oid import ExtendedKeyUsageOID as Purpose
from cryptography.x509.oid import NameOID

FEDERATION = "glioma"
HOST, ADDRESS = "hub.glioma.example", "192.0.2.7"
NOW = datetime(2026, 11, 28, 12, tzinfo=UTC)
LONG_AGO, BEFORE = datetime(2020, 1, 1, tzinfo=UTC), datetime(2021, 1, 1, tzinfo=UTC)
LATER, FAR = datetime(2100, 1, 1, tzinfo=UTC), datetime(2120, 1, 1, tzinfo=UTC)
ALLOWED = {"client": ["a", "b"], "coordinator": ["hub"]}
BOTH = (Purpose.CLIENT_AUTH, Purpose.SERVER_AUTH)


def prime(letter: str, offset: int) -> int:
    """A prime of 1024 bits: the first at or behind a number made of hashes, which is `offset` away."""
    text = f"splitproto test prime {letter}"
    octets = b"".join(hashlib.sha256(f"{text} {n}".encode()).digest() for n in range(4))
    return (int.from_bytes(octets, "big") | 3 << 1022 | 1) + offset


def key_of(p: int, q: int) -> rsa.RSAPrivateKey:
    """The RSA key of two primes."""
    d = rsa.rsa_recover_private_exponent(65537, p, q)
    numbers = rsa.RSAPrivateNumbers(
        p,
        q,
        d,
        rsa.rsa_crt_dmp1(d, p),
        rsa.rsa_crt_dmq1(d, q),
        rsa.rsa_crt_iqmp(p, q),
        rsa.RSAPublicNumbers(65537, p * q),
    )
    return numbers.private_key(unsafe_skip_rsa_key_validation=True)


_A, _B, _C = prime("a", 2758), prime("b", 314), prime("c", 732)
ROOT_KEY, ISSUER_KEY, LEAF_KEY = key_of(_A, _B), key_of(_A, _C), key_of(_B, _C)


def named(common: str) -> x509.Name:
    """A subject."""
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])


def usage(*, signs: bool, certificates: bool = True) -> x509.KeyUsage:
    """Key usage of an authority, or of a peer."""
    return x509.KeyUsage(
        digital_signature=not signs, key_cert_sign=signs and certificates, crl_sign=signs, content_commitment=False,
        key_encipherment=False, data_encipherment=False, key_agreement=False, encipher_only=False, decipher_only=False,
    )  # fmt: skip


@dataclass(frozen=True)
class Authority:
    """Who signs."""

    subject: x509.Name
    key: rsa.RSAPrivateKey


ROOT = Authority(named("glioma CA"), ROOT_KEY)
ISSUER = Authority(named("glioma issuing CA"), ISSUER_KEY)
OTHER = Authority(named("glioma CA"), ISSUER_KEY)
"""Another CA under the same name."""


@dataclass(frozen=True)
class Plan:
    """One certificate."""

    subject: x509.Name = field(default_factory=lambda: named("a peer"))
    key: rsa.RSAPrivateKey = LEAF_KEY
    by: Authority = ROOT
    uris: Sequence[str] = ("spiffe://glioma/splitproto/client/a",)
    hosts: Sequence[x509.GeneralName] = ()
    start: datetime = LONG_AGO
    end: datetime = FAR
    purposes: Sequence[x509.ObjectIdentifier] = BOTH
    authority: bool = False
    constraints_critical: bool = True
    path_length: int | None = None
    signs_certificates: bool = True
    key_identifier: bool = True
    authority_identifier: bool = True
    extra: Sequence[tuple[x509.ExtensionType, bool]] = ()
    serial: int = 0x1001

    def pem(self) -> str:
        """Signed, as PEM."""
        builder = (
            x509.CertificateBuilder()
            .subject_name(self.subject)
            .issuer_name(self.by.subject)
            .public_key(self.key.public_key())
            .serial_number(self.serial)
            .not_valid_before(self.start)
            .not_valid_after(self.end)
            .add_extension(
                x509.BasicConstraints(self.authority, self.path_length), critical=self.constraints_critical
            )
            .add_extension(usage(signs=self.authority, certificates=self.signs_certificates), critical=True)
        )
        if self.key_identifier:
            builder = builder.add_extension(
                x509.SubjectKeyIdentifier.from_public_key(self.key.public_key()), critical=False
            )
        if self.authority_identifier:
            builder = builder.add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(self.by.key.public_key()), critical=False
            )
        if self.purposes and not self.authority:
            builder = builder.add_extension(x509.ExtendedKeyUsage(self.purposes), critical=False)
        names = [*map(x509.UniformResourceIdentifier, self.uris), *self.hosts]
        if names and not self.authority:
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        for extension, critical in self.extra:
            builder = builder.add_extension(extension, critical)
        return builder.sign(self.by.key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM).decode()


CA = Plan(subject=ROOT.subject, key=ROOT_KEY, authority=True, serial=1)
MIDDLE = Plan(subject=ISSUER.subject, key=ISSUER_KEY, authority=True, serial=2)
SITE = Plan()
BELOW = replace(SITE, by=ISSUER)
NAMES = (x509.DNSName(HOST), x509.IPAddress(ipaddress.ip_address(ADDRESS)))
HUB = Plan(uris=("spiffe://glioma/splitproto/coordinator/hub",), hosts=NAMES, serial=0x2002)


def crl(*serials: int, by: Authority = ROOT, since: datetime = LONG_AGO, until: datetime = FAR) -> str:
    """A revocation list."""
    builder = (
        x509.CertificateRevocationListBuilder()
        .issuer_name(by.subject)
        .last_update(since)
        .next_update(until)
        .add_extension(x509.CRLNumber(1), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(by.key.public_key()), critical=False
        )
    )
    for serial in serials:
        revoked = x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(LONG_AGO).build()
        builder = builder.add_revoked_certificate(revoked)
    return builder.sign(by.key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM).decode()


def common() -> dict[str, Any]:
    """What all cases share; the verifier's own certificates let the handshake be made for real."""
    key = LEAF_KEY.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return {
        "now": NOW.isoformat(),
        "federation": FEDERATION,
        "allowed": ALLOWED,
        "ca": CA.pem(),
        "key": key.decode(),
        "verifier": {"client": SITE.pem(), "coordinator": HUB.pem()},
    }


def certificates() -> Iterator[Case]:
    """A peer's chain, as its handshake shows it -> who it is, or why it is refused."""
    failed, nobody, stranger = "tls-failed", "identity-malformed", "not-authorised"

    def case(
        name: str, notes: str, *chain: Plan | str, error: str = "", dialled: str | None = None, **more: Any
    ) -> Case:
        shown = [plan if isinstance(plan, str) else plan.pem() for plan in chain]
        leaf = x509.load_pem_x509_certificate(shown[0].encode())
        if error:
            expect: dict[str, Any] = refused(error, "channel" if error == failed else "identity")
        else:
            uri = chain[0].uris[0] if isinstance(chain[0], Plan) else ""
            _, _, _, _, role, site = uri.split("/")
            digest = leaf.fingerprint(hashes.SHA256()).hex()
            expect = {"role": role, "site": site, "serial": f"{leaf.serial_number:x}", "sha256": digest}
        return {
            "name": name,
            "operation": {nobody: "identity", stranger: "permission"}.get(error, "chain"),
            "notes": notes,
            "dialled": dialled,
            "chain": "".join(shown),
            **more,
            "expect": expect,
        }

    yield case("client", "SP-6-2", SITE)
    yield case(
        "client-only",
        "SP-6-2: clientAuth is enough for a dialler",
        replace(SITE, purposes=(Purpose.CLIENT_AUTH,)),
    )
    yield case("coordinator", "SP-6-3: by its DNS name", HUB, dialled=HOST)
    yield case("coordinator-address", "SP-6-3: by its IP address", HUB, dialled=ADDRESS)
    server = replace(HUB, purposes=(Purpose.SERVER_AUTH,))
    yield case("coordinator-only", "SP-6-2: serverAuth is enough for a listener", server, dialled=HOST)
    yield case("intermediate", "SP-6-2: a chain of two", BELOW, MIDDLE)
    yield case("uri-among-others", "SP-6-4: one URI beside other names", replace(SITE, hosts=NAMES))
    yield case("not-revoked", "SP-6-2: the list names somebody else", SITE, crl=crl(0x2002))

    for name, notes, chain in (
        ("other-ca", "another CA of the same name", (replace(SITE, by=OTHER),)),
        ("self-signed", "signed by itself", (replace(SITE, by=Authority(SITE.subject, LEAF_KEY)),)),
        ("expired", "ended in 2021", (replace(SITE, end=BEFORE),)),
        ("not-yet-valid", "begins in 2100", (replace(SITE, start=LATER),)),
        ("intermediate-missing", "the certificate between is not shown", (BELOW,)),
        ("intermediate-not-authority", "the issuer is no CA: CA:FALSE", (BELOW, replace(MIDDLE, authority=False))),
        ("intermediate-may-not-sign", "the issuer lacks keyCertSign",
         (BELOW, replace(MIDDLE, signs_certificates=False))),
        ("intermediate-expired", "the issuer's own certificate ended", (BELOW, replace(MIDDLE, end=BEFORE))),
        ("intermediate-not-critical", "RFC 5280 4.2.1.9: basicConstraints of a CA are critical",
         (BELOW, replace(MIDDLE, constraints_critical=False))),
        ("intermediate-no-key-identifier", "RFC 5280 4.2.1.2: a CA has a subject key identifier",
         (BELOW, replace(MIDDLE, key_identifier=False))),
        ("no-authority-identifier", "RFC 5280 4.2.1.1: an authority key identifier is needed",
         (replace(SITE, authority_identifier=False),)),
        ("purpose-server-only", "a dialler needs clientAuth", (server,)),
        ("purpose-other", "codeSigning", (replace(SITE, purposes=(Purpose.CODE_SIGNING,)),)),
        ("unknown-critical", "an extension that is critical and unknown",
         (replace(SITE, extra=((x509.UnrecognizedExtension(x509.ObjectIdentifier("1.2.3.4"), b"\5\0"), True),)),)),
    ):  # fmt: skip
        yield case(name, f"SP-6-2: {notes}", *chain, error=failed)
    pem = SITE.pem().splitlines()
    pem[-2] = pem[-2][:-8] + ("AAAAAA==" if not pem[-2].endswith("AAAAAA==") else "BAAAAA==")
    yield case("signature", "SP-6-2: the signature is not the CA's", "\n".join(pem) + "\n", error=failed)
    client = replace(HUB, purposes=(Purpose.CLIENT_AUTH,))
    yield case(
        "purpose-client-only", "SP-6-2: a listener needs serverAuth", client, error=failed, dialled=HOST
    )
    other = replace(HUB, hosts=(x509.DNSName("other.example"),))
    yield case("other-host", "SP-6-3", other, error=failed, dialled=HOST)
    yield case(
        "no-host", "SP-6-3: no DNS name, no address", replace(HUB, hosts=()), error=failed, dialled=HOST
    )
    bare = replace(HUB, hosts=(), subject=named(HOST))
    yield case("common-name", "SP-6-3: common names do not count", bare, error=failed, dialled=HOST)
    as_name = replace(HUB, hosts=(x509.DNSName(ADDRESS),))
    yield case("address-as-name", "SP-6-3: an address is an IP name", as_name, error=failed, dialled=ADDRESS)
    yield case("other-address", "SP-6-3", HUB, error=failed, dialled="192.0.2.8")
    yield case("revoked", "SP-6-2: the list names it", SITE, error=failed, crl=crl(SITE.serial))
    yield case("list-outdated", "SP-6-2: it refuses everybody", SITE, error=failed, crl=crl(until=BEFORE))
    yield case("list-of-another", "SP-6-2: not signed by the CA", SITE, error=failed, crl=crl(by=OTHER))

    base = "spiffe://glioma/splitproto/client/a"
    for name, notes, uris in (
        ("none", "no URI", ()), ("two", "two", (base, "spiffe://glioma/splitproto/client/b")),
        ("twice", "one twice", (base, base)),
        ("scheme", "another scheme", ("https://glioma/splitproto/client/a",)),
        ("scheme-upper-case", "spelt otherwise", ("SPIFFE://glioma/splitproto/client/a",)),
        ("path-upper-case", "spelt otherwise", ("spiffe://glioma/Splitproto/client/a",)),
        ("site-upper-case", "upper case", ("spiffe://glioma/splitproto/client/A",)),
        ("federation-upper-case", "upper case", ("spiffe://Glioma/splitproto/client/a",)),
        ("slash-behind", "an empty segment", (base + "/",)), ("further", "a further segment", (base + "/b",)),
        ("short", "no site", ("spiffe://glioma/splitproto/client",)), ("site-empty", "no site", ("spiffe://glioma/splitproto/client/",)),
        ("federation-empty", "no federation", ("spiffe:///splitproto/client/a",)),
        ("double-slash", "an empty segment", ("spiffe://glioma//splitproto/client/a",)),
        ("percent", "percent-encoding", ("spiffe://glioma/splitproto/client/%61",)),
        ("port", "a port", ("spiffe://glioma:443/splitproto/client/a",)), ("query", "a query", (base + "?x",)),
        ("fragment", "a fragment", (base + "#x",)), ("user", "a user", ("spiffe://u@glioma/splitproto/client/a",)),
        ("long", "64 characters", ("spiffe://glioma/splitproto/client/" + "a" * 64,)),
        ("dash-first", "the first is a letter or digit", ("spiffe://glioma/splitproto/client/-a",)),
        ("dots", "the first is a letter or digit", ("spiffe://glioma/splitproto/client/..",)),
        ("newline", "a line feed at the end", (base + "\n",)), ("space", "a space at the end", (base + " ",)),
    ):  # fmt: skip
        yield case(f"uri-{name}", f"SP-6-4: {notes}", replace(SITE, uris=uris), error=nobody)

    def by_uri(name: str, notes: str, uri: str, base: Plan = SITE, **more: Any) -> Case:
        return case(name, f"SP-6-5: {notes}", replace(base, uris=(uri,)), error=stranger, **more)

    yield by_uri("other-federation", "another federation of the same CA", "spiffe://lung/splitproto/client/a")
    yield by_uri("not-listed", "no such site here", "spiffe://glioma/splitproto/client/c")
    yield by_uri("other-role", "listed, but in another role", "spiffe://glioma/splitproto/coordinator/a")
    yield by_uri("role-unknown", "no such role", "spiffe://glioma/splitproto/server/a")
    yield by_uri(
        "longest-names",
        "63 characters are a name, and not listed",
        "spiffe://glioma/splitproto/client/" + "a" * 63,
    )
    yield by_uri("client-as-coordinator", "a site that listens", base, HUB, dialled=HOST)
