"""The federation's own CA: what it writes, what it refuses, and that strict verifiers accept it."""

from __future__ import annotations

import re
import stat
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID
from cryptography.x509.verification import PolicyBuilder, Store

from splitproto import pki
from splitproto.pki import PkiError

NOW = datetime(2030, 5, 17, 12, 0, 30, 123456, tzinfo=UTC)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    pki.create_ca(tmp_path / "pki", "demo.example", now=NOW)
    return tmp_path / "pki"


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def load(path: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate(path.read_bytes())


def test_a_new_ca(folder: Path) -> None:
    assert {path.name for path in folder.iterdir()} == {"ca.crt", "ca.key", "ca.crl", "federation.salt"}
    crl = x509.load_pem_x509_crl((folder / "ca.crl").read_bytes())
    assert (len(crl), crl.next_update_utc) == (0, NOW.replace(microsecond=0) + timedelta(days=pki.CRL_DAYS))
    assert (mode(folder), mode(folder / "ca.key"), mode(folder / "federation.salt")) == (0o700, 0o600, 0o600)
    assert re.fullmatch(r"[0-9a-f]{64}\n", (folder / "federation.salt").read_text())
    ca = load(folder / "ca.crt")
    assert ca.extensions.get_extension_for_class(x509.BasicConstraints).critical
    assert ca.extensions.get_extension_for_class(x509.BasicConstraints).value.path_length == 0
    usage = ca.extensions.get_extension_for_class(x509.KeyUsage)
    assert usage.critical
    assert usage.value.key_cert_sign
    assert usage.value.crl_sign
    assert (
        ca.not_valid_before_utc < NOW < ca.not_valid_after_utc == datetime(2040, 5, 14, 12, 0, 30, tzinfo=UTC)
    )


def test_a_certificate(folder: Path) -> None:
    issued = pki.issue(folder, "coordinator", "hub", hosts=["hub.example.org", "192.0.2.7", "[::1]"], now=NOW)
    assert issued.identity.uri == "spiffe://demo.example/splitproto/coordinator/hub"
    assert 396.9 < issued.days_left(NOW) < 397
    assert mode(folder / "hub.key") == 0o600
    leaf = load(folder / "hub.crt")
    assert leaf.subject.rfc4514_string() == "CN=hub,OU=coordinator,O=demo.example"
    assert isinstance(leaf.public_key(), ec.EllipticCurvePublicKey)
    assert leaf.public_key().curve.name == "secp256r1"
    assert not leaf.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    purposes = leaf.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert set(purposes) == {ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH}
    shown = pki.describe(folder / "hub.crt")
    assert shown["hosts"] == ["hub.example.org", "192.0.2.7", "::1"]
    assert shown["uri"] == ["spiffe://demo.example/splitproto/coordinator/hub"]
    assert shown["sha256"] == issued.identity.sha256


def test_serials_and_keys_are_random(folder: Path) -> None:
    one, two = pki.issue(folder, "client", "a", now=NOW), pki.issue(folder, "client", "b", now=NOW)
    assert int(one.identity.serial, 16).bit_length() > 64
    assert one.identity.serial != two.identity.serial
    assert one.key.read_bytes() != two.key.read_bytes()


def test_a_second_strict_verifier_agrees(folder: Path) -> None:
    """pyca's verifier holds to the CA/Browser forum's profile; test_identity meets OpenSSL's strictness."""
    pki.issue(folder, "coordinator", "hub", hosts=["hub.example.org"], now=NOW)
    policy = PolicyBuilder().store(Store([load(folder / "ca.crt")])).time(NOW)
    chain = policy.build_server_verifier(x509.DNSName("hub.example.org")).verify(load(folder / "hub.crt"), [])
    assert len(chain) == 2
    assert policy.build_client_verifier().verify(load(folder / "hub.crt"), []).subjects is not None


def everything(folder: Path) -> Iterator[tuple[str, bytes]]:
    return ((path.name, path.read_bytes()) for path in sorted(folder.iterdir()))


@pytest.mark.parametrize("present", ["ca.crt", "ca.key", "ca.crl", "federation.salt"])
def test_a_ca_never_overwrites(tmp_path: Path, present: str) -> None:
    (tmp_path / present).write_text("mine")
    with pytest.raises(PkiError, match=f"{present}: exists and is not overwritten"):
        pki.create_ca(tmp_path, "demo", now=NOW)
    assert dict(everything(tmp_path)) == {present: b"mine"}, "all files or none, and no temporary ones"


@pytest.mark.parametrize("present", ["a.crt", "a.key"])
def test_an_issue_never_overwrites(folder: Path, present: str) -> None:
    (folder / present).write_text("mine")
    before = dict(everything(folder))
    with pytest.raises(PkiError, match=f"{present}: exists"):
        pki.issue(folder, "client", "a", now=NOW)
    assert dict(everything(folder)) == before


@pytest.mark.parametrize("site", ["A", "../a", "a/b", "", ".a", "a" * 64])
def test_sites_are_names(folder: Path, site: str) -> None:
    before = dict(everything(folder))
    with pytest.raises(PkiError, match="is not a name"):
        pki.issue(folder, "client", site, now=NOW)
    with pytest.raises(PkiError, match="is not a name"):
        pki.revoke(folder, site, now=NOW)
    assert dict(everything(folder)) == before


def test_the_ca_is_nobodys_site(folder: Path) -> None:
    for attempt in (
        lambda: pki.issue(folder, "client", "ca", now=NOW),
        lambda: pki.revoke(folder, "ca", now=NOW),
    ):
        with pytest.raises(PkiError, match="choose another name"):
            attempt()


@pytest.mark.parametrize(
    "host",
    [
        "tcp://hub",
        "hub:7443",
        "*.example.org",
        "-hub",
        "hub..",
        "",
        "straße",
        "a b",
        "a" * 64 + "." + "b" * 200,
    ],
)
def test_hosts_are_names_or_addresses(folder: Path, host: str) -> None:
    with pytest.raises(PkiError, match=r"neither a DNS name nor an IP address|two ASCII forms") as caught:
        pki.issue(folder, "coordinator", "hub", hosts=[host], now=NOW)
    assert "\n" not in str(caught.value)
    assert not (folder / "hub.key").exists()


def test_lifetimes_that_cannot_be(folder: Path) -> None:
    with pytest.raises(PkiError, match="the CA ends on 2040-05-14"):
        pki.issue(folder, "client", "a", days=3651, now=NOW)
    with pytest.raises(PkiError, match="beyond the calendar"):
        pki.issue(folder, "client", "a", days=10**8, now=NOW)
    with pytest.raises(PkiError, match="before it begins"):
        pki.issue(folder, "client", "a", days=-1, now=NOW)
    with pytest.raises(PkiError, match="beyond the calendar"):
        pki.create_ca(folder / "new", "demo", days=10**8, now=NOW)


def test_no_ca(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(PkiError, match="no CA here: create one"):
        pki.issue(tmp_path, "client", "a", now=NOW)
    (tmp_path / "file").write_text("")
    with pytest.raises(PkiError, match="cannot make the folder"):
        pki.create_ca(tmp_path / "file", "demo", now=NOW)
    pki.create_ca(tmp_path / "other", "demo", now=NOW)
    (folder / "ca.key").write_bytes((tmp_path / "other" / "ca.key").read_bytes())
    with pytest.raises(PkiError, match=r"does not belong to ca\.crt"):
        pki.issue(folder, "client", "a", now=NOW)
    (folder / "ca.key").write_text("nonsense")
    with pytest.raises(PkiError, match="not an unencrypted PEM private key"):
        pki.issue(folder, "client", "a", now=NOW)
    with pytest.raises(PkiError, match="no such certificate"):
        pki.describe(tmp_path / "x.crt")


@pytest.mark.parametrize("rights", [0o640, 0o604])
def test_a_ca_key_that_others_may_read_signs_nothing(folder: Path, rights: int) -> None:
    (folder / "ca.key").chmod(rights)
    for use in (lambda: pki.issue(folder, "client", "a", now=NOW), lambda: pki.write_crl(folder, now=NOW)):
        with pytest.raises(
            PkiError, match=r"ca\.key: others on this machine may read the CA's key: chmod 600"
        ):
            use()
    assert not (folder / "a.crt").exists()
    (folder / "ca.key").chmod(0o400)
    pki.issue(folder, "client", "a", now=NOW)


def test_revocation_adds_up_and_makes_room(folder: Path) -> None:
    serials = []
    for day in range(2):
        issued = pki.issue(folder, "client", "a", now=NOW)
        serials.append(int(issued.identity.serial, 16))
        path = pki.revoke(folder, "a", now=NOW + timedelta(days=day), days=7)
    crl = x509.load_pem_x509_crl(path.read_bytes())
    assert {entry.serial_number for entry in crl} == set(serials)
    assert crl.extensions.get_extension_for_class(x509.CRLNumber).value.crl_number == 3
    assert crl.next_update_utc == datetime(2030, 5, 25, 12, 0, 30, tzinfo=UTC)
    assert crl.is_signature_valid(load(folder / "ca.crt").public_key())  # type: ignore[arg-type]
    assert mode(path) == 0o644
    assert len(list(folder.glob("a.*.revoked.key"))) == 2
    pki.write_crl(folder, now=NOW + timedelta(days=30))
    assert len(x509.load_pem_x509_crl(path.read_bytes())) == 2, "entries are kept when it is signed anew"
    with pytest.raises(PkiError, match="no such certificate"):
        pki.revoke(folder, "a", now=NOW)
