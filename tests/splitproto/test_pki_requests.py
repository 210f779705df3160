"""A site makes its own key; the CA signs what it has checked, and nothing else."""

from __future__ import annotations

import errno
import os
import shutil
import ssl
import stat
import subprocess
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from splitproto import pki
from splitproto.identity import Credentials
from splitproto.pki import PkiError

NOW = datetime.now(UTC)
NORTH = "spiffe://demo/splitproto/client/north"


@pytest.fixture
def ca(tmp_path: Path) -> Path:
    pki.create_ca(tmp_path / "ca", "demo", now=NOW)
    return tmp_path / "ca"


@pytest.fixture
def site(tmp_path: Path) -> Path:
    return tmp_path / "site"


def shaken(server: Credentials, client: Credentials) -> None:
    """A whole handshake in memory; raises ssl.SSLError."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    sides = (
        client.client_context().wrap_bio(to_client, to_server, server_hostname="localhost"),
        server.server_context().wrap_bio(to_server, to_client, server_side=True),
    )
    for _ in range(3):
        for side in sides:
            try:
                side.do_handshake()
            except ssl.SSLWantReadError:
                continue
    for side in sides:
        side.do_handshake()


def test_the_key_stays_at_the_site(ca: Path, site: Path) -> None:
    asked = pki.read_request(pki.request(site, "demo", "client", "north"))
    assert stat.S_IMODE((site / "north.key").stat().st_mode) == 0o600
    assert b"PRIVATE" not in (site / "north.csr").read_bytes()
    path, identity = pki.sign(ca, asked, now=NOW)
    assert identity.uri == NORTH
    assert not (ca / "north.key").exists()
    for name in ("ca.crt", "ca.crl"):
        shutil.copy(ca / name, site)
    shutil.copy(path, site)
    north = Credentials(site / "ca.crt", site / "north.crt", site / "north.key", site / "ca.crl")
    hub = pki.issue(ca, "coordinator", "hub", hosts=["localhost"], now=NOW)
    shaken(Credentials(hub.ca, hub.certificate, hub.key, ca / "ca.crl"), north)
    with pytest.raises(PkiError, match=r"north\.key: exists and is not overwritten"):
        pki.request(site, "demo", "client", "north")


def test_both_ends_show_the_same_fingerprint_and_it_binds_key_and_names(site: Path, tmp_path: Path) -> None:
    path = pki.request(site, "demo", "client", "north")
    shutil.copy(path, tmp_path / "arrived.csr")
    shown = pki.describe(tmp_path / "arrived.csr")
    assert shown["fingerprint"] == pki.read_request(path).fingerprint
    assert shown["uri"] == [NORTH]
    assert shown["key"] == "EC secp256r1"
    other = pki.read_request(pki.request(tmp_path / "other", "demo", "client", "north"))
    assert other.fingerprint != shown["fingerprint"]


def test_a_name_that_is_taken_is_refused_and_renewal_keeps_the_earlier_until_it_ends(
    ca: Path, tmp_path: Path
) -> None:
    pki.issue(ca, "client", "north", now=NOW)
    asked = pki.read_request(pki.request(tmp_path / "b", "demo", "client", "north"))
    before = (ca / "north.crt").read_bytes()
    with pytest.raises(PkiError, match="the name north is taken: if the same site renews"):
        pki.sign(ca, asked, now=NOW)
    assert (ca / "north.crt").read_bytes() == before
    pki.sign(ca, asked, now=NOW, renew=True)
    assert (ca / "north.crt").read_bytes() != before
    hub = pki.read_request(
        pki.request(tmp_path / "c", "demo", "coordinator", "north", hosts=["north.example"])
    )
    with pytest.raises(PkiError, match="the name north belongs to a client"):
        pki.sign(ca, hub, now=NOW, renew=True)
    serials = {
        x509.load_pem_x509_certificate(path.read_bytes()).serial_number for path in ca.glob("north*.crt")
    }
    assert len(serials) == 2
    crl = x509.load_pem_x509_crl(pki.revoke(ca, "north", now=NOW).read_bytes())
    assert {entry.serial_number for entry in crl} == serials, "revoking a site revokes all its certificates"
    pki.sign(ca, asked, now=NOW)


def test_revoking_a_site_leaves_one_whose_name_begins_alike(ca: Path) -> None:
    for name in ("north", "north.b", "north.b.c"):
        pki.issue(ca, "client", name, now=NOW)
    crl = x509.load_pem_x509_crl(pki.revoke(ca, "north", now=NOW).read_bytes())
    assert len(crl) == 1
    assert (ca / "north.b.crt").exists()
    assert (ca / "north.b.c.crt").exists()


def request_file(
    path: Path,
    *extensions: tuple[x509.ExtensionType, bool],
    key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey | ed25519.Ed25519PrivateKey | None = None,
    names: tuple[x509.GeneralName, ...] = (x509.UniformResourceIdentifier(NORTH),),
) -> Path:
    key = key or ec.generate_private_key(ec.SECP256R1())
    builder = x509.CertificateSigningRequestBuilder().subject_name(
        x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "north")])
    )
    if names:
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    for extension, critical in extensions:
        builder = builder.add_extension(extension, critical=critical)
    digest = None if isinstance(key, ed25519.Ed25519PrivateKey) else hashes.SHA256()
    path.write_bytes(builder.sign(key, digest).public_bytes(serialization.Encoding.PEM))
    return path


def test_what_the_ca_decides_itself_is_ignored(ca: Path, tmp_path: Path) -> None:
    path = request_file(
        tmp_path / "x.csr",
        (x509.BasicConstraints(ca=False, path_length=None), True),
        (x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CODE_SIGNING]), False),
        key=rsa.generate_private_key(65537, 3072),
    )
    signed, _ = pki.sign(ca, pki.read_request(path), now=NOW)
    made = x509.load_pem_x509_certificate(signed.read_bytes())
    purposes = set(made.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value)
    assert purposes == {ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH}


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda p: request_file(p, (x509.BasicConstraints(True, None), True)), "asks for a CA certificate"),
        (
            lambda p: request_file(
                p, (x509.UnrecognizedExtension(x509.ObjectIdentifier("1.2.3.4"), b"\x05\x00"), False)
            ),
            r"asks for the extension 1\.2\.3\.4",
        ),
        (lambda p: request_file(p, names=()), "asks for 0 URI names"),
        (
            lambda p: request_file(p, names=(x509.UniformResourceIdentifier(NORTH),) * 2),
            "asks for 2 URI names",
        ),
        (
            lambda p: request_file(p, names=(x509.UniformResourceIdentifier("spiffe://demo/x"),)),
            "not spiffe://<federation>",
        ),
        (
            lambda p: request_file(
                p, names=(x509.UniformResourceIdentifier(NORTH), x509.RFC822Name("root@example.org"))
            ),
            "neither a URI nor a host",
        ),
        (lambda p: request_file(p, key=rsa.generate_private_key(65537, 2048)), "RSA key has 2048 bits"),
        (lambda p: request_file(p, key=ec.generate_private_key(ec.SECP256K1())), "on the curve secp256k1"),
        (lambda p: request_file(p, key=ed25519.Ed25519PrivateKey.generate()), "neither EC nor RSA"),
        (
            lambda p: (p.write_bytes(b"-----BEGIN CERTIFICATE REQUEST-----\nAA\n"), p)[1],
            "not a PEM certificate req",
        ),
    ],
)
def test_requests_that_are_refused(ca: Path, tmp_path: Path, make: object, words: str) -> None:
    with pytest.raises(PkiError, match=words) as caught:
        pki.read_request(make(tmp_path / "x.csr"))  # type: ignore[operator]
    assert "\n" not in str(caught.value)


def test_a_request_that_was_changed_on_its_way_is_refused(site: Path) -> None:
    path = pki.request(site, "demo", "client", "north")
    der = x509.load_pem_x509_csr(path.read_bytes()).public_bytes(serialization.Encoding.DER)
    body = der.replace(b"client/north", b"client/south")
    assert body != der
    path.write_text(ssl.DER_cert_to_PEM_cert(body).replace("CERTIFICATE", "CERTIFICATE REQUEST"))
    with pytest.raises(PkiError, match="was not signed with its own key"):
        pki.read_request(path)


def test_another_federations_request_is_refused(ca: Path, site: Path) -> None:
    asked = pki.read_request(pki.request(site, "elsewhere", "client", "north"))
    with pytest.raises(PkiError, match="for federation elsewhere, this CA is of demo"):
        pki.sign(ca, asked, now=NOW)


def test_openssl_reads_a_request_and_makes_one_that_is_signed(ca: Path, site: Path, tmp_path: Path) -> None:
    if shutil.which("openssl") is None:
        pytest.skip("needs the openssl command")
    path = pki.request(site, "demo", "coordinator", "hub", hosts=["hub.example", "192.0.2.7"])
    seen = subprocess.run(
        ["openssl", "req", "-in", path, "-noout", "-verify", "-text"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert (
        "URI:spiffe://demo/splitproto/coordinator/hub, DNS:hub.example, IP Address:192.0.2.7" in seen.stdout
    )
    made = tmp_path / "own.csr"
    subprocess.run(
        ["openssl", "req", "-new", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-keyout",
         tmp_path / "own.key", "-out", made, "-subj", "/CN=north", "-addext", f"subjectAltName=URI:{NORTH}"],
        capture_output=True, check=True,
    )  # fmt: skip
    assert pki.sign(ca, pki.read_request(made), now=NOW)[1].site == "north"


# ---- file systems without hard links


@pytest.mark.parametrize("code", [errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS])
def test_everything_works_where_no_hard_link_can_be_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def no_links(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "link", no_links)
    folder = tmp_path / "pki"
    pki.create_ca(folder, "demo", now=NOW)
    pki.issue(folder, "client", "north", now=NOW)
    (folder / "south.crt").write_text("mine")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(PkiError, match=r"south\.crt: exists"):
        pki.issue(folder, "client", "south", now=NOW)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert stat.S_IMODE((folder / "north.key").stat().st_mode) == 0o600


def test_a_vfat_disk(tmp_path: Path) -> None:
    """The real thing, where one can be mounted."""
    if os.geteuid() != 0 or shutil.which("mkfs.vfat") is None:
        pytest.skip("needs root and mkfs.vfat")
    image, disk = tmp_path / "image", tmp_path / "disk"
    image.write_bytes(bytes(4 << 20))
    disk.mkdir()
    subprocess.run(["mkfs.vfat", image], capture_output=True, check=True)
    mounted = subprocess.run(["mount", "-o", "loop,umask=077", image, disk], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip("no vfat can be mounted here")
    try:
        pki.create_ca(disk / "pki", "demo", now=NOW)
        assert pki.issue(disk / "pki", "client", "north", now=NOW).identity.site == "north"
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


def test_signing_beyond_the_cas_end_is_refused(ca: Path, site: Path) -> None:
    asked = pki.read_request(pki.request(site, "demo", "client", "north"))
    with pytest.raises(PkiError, match="the CA ends on"):
        pki.sign(ca, asked, now=NOW + timedelta(days=3600))
    assert not (ca / "north.crt").exists()
