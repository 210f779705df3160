"""The CA of an institution: a root and an intermediate, in every form that such CAs come in."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

PEM = serialization.Encoding.PEM
BOTH = (ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH)


@dataclass
class Form:
    """What a certificate is made with; a test spoils one of these."""

    usage: bool = True
    identifiers: bool = True
    critical: bool = True
    purposes: tuple[x509.ObjectIdentifier, ...] = BOTH


@dataclass
class Entity:
    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey

    @property
    def pem(self) -> bytes:
        return self.certificate.public_bytes(PEM)

    @property
    def key_pem(self) -> bytes:
        return self.key.private_bytes(PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())


def usage(*, signs: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs,
        key_cert_sign=signs,
        crl_sign=signs,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def make(name: str, issuer: Entity | None, form: Form, uri: str = "", hosts: tuple[str, ...] = ()) -> Entity:
    """A CA, or with `uri` a peer."""
    now, key = datetime.now(UTC), ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    above = issuer.certificate.subject if issuer else subject
    signer = issuer.key if issuer else key
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(above)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(days=300))
        .add_extension(x509.BasicConstraints(ca=not uri, path_length=None), critical=form.critical)
    )
    if form.usage:
        builder = builder.add_extension(usage(signs=not uri), critical=True)
    if form.identifiers:
        builder = builder.add_extension(
            x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False
        ).add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False
        )
    if uri:
        names = [x509.UniformResourceIdentifier(uri), *map(x509.DNSName, hosts)]
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        builder = builder.add_extension(x509.ExtendedKeyUsage(form.purposes), critical=False)
    return Entity(builder.sign(signer, hashes.SHA256()), key)


@dataclass
class Institution:
    """Root, intermediate and one site's certificate."""

    root: Entity
    middle: Entity
    site: Entity

    @classmethod
    def of(
        cls, root: Form | None = None, middle: Form | None = None, site: Form | None = None
    ) -> Institution:
        top = make("Institute Root CA", None, root or Form())
        below = make("Institute Issuing CA", top, middle or Form())
        uri = "spiffe://demo/splitproto/client/north"
        return cls(top, below, make("north", below, site or Form(), uri))

    def install(self, folder: Path, *, ca: str = "root", chain: str = "site middle") -> None:
        """Put the files where the scene's peer.toml looks for them; `ca` and `chain`: what is in them, in order."""

        def joined(names: str) -> bytes:
            return b"".join(getattr(self, name).pem for name in names.split())

        (folder / "ca.crt").write_bytes(joined(ca))
        (folder / "north.crt").write_bytes(joined(chain))
        (folder / "north.key").write_bytes(self.site.key_pem)
        (folder / "north.key").chmod(0o600)
        (folder / "ca.crl").unlink(missing_ok=True)
