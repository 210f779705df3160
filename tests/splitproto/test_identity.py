"""Certificates, allow-lists and TLS errors, with real certificates and real handshakes through memory."""

from __future__ import annotations

import ssl
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from splitproto import pki
from splitproto.errors import IdentityError, NotAuthorised
from splitproto.identity import AllowList, Credentials, Identity, explain, uri_of

NOW = datetime.now(UTC)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A federation's CA with a coordinator that listens as localhost and a client."""
    folder = tmp_path_factory.mktemp("federation") / "pki"
    pki.create_ca(folder, "demo", now=NOW)
    pki.issue(folder, "coordinator", "hub", hosts=["localhost", "127.0.0.1"], now=NOW)
    pki.issue(folder, "client", "north", now=NOW)
    return folder


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another CA that calls itself the same."""
    folder = tmp_path_factory.mktemp("stranger") / "pki"
    pki.create_ca(folder, "demo", now=NOW)
    pki.issue(folder, "coordinator", "hub", hosts=["localhost"], now=NOW)
    pki.issue(folder, "client", "north", now=NOW)
    return folder


def credentials(folder: Path, site: str, crl: Path | None = None) -> Credentials:
    return Credentials(folder / "ca.crt", folder / f"{site}.crt", folder / f"{site}.key", crl)


def pem(path: Path, *certificates: x509.Certificate) -> Path:
    path.write_bytes(b"".join(c.public_bytes(serialization.Encoding.PEM) for c in certificates))
    return path


def handcrafted(
    folder: Path, site: str, *names: str, purposes: tuple[x509.ObjectIdentifier, ...] | None = None
) -> Path:
    """A certificate signed by the CA in `folder`, with any URI names and purposes."""
    key = ec.generate_private_key(ec.SECP256R1())
    ca = x509.load_pem_x509_certificate((folder / "ca.crt").read_bytes())
    ca_key = serialization.load_pem_private_key((folder / "ca.key").read_bytes(), None)
    both = (ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH)
    builder = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, site)]))
        .issuer_name(ca.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(NOW - timedelta(hours=1))
        .not_valid_after(NOW + timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.ExtendedKeyUsage(purposes or both), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(
                ca.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
            ),
            critical=False,
        )
    )
    if names:
        uris = [x509.UniformResourceIdentifier(name) for name in names]
        builder = builder.add_extension(x509.SubjectAlternativeName(uris), critical=False)
    (folder / f"{site}.key").touch(0o600)
    (folder / f"{site}.key").write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )
    return pem(folder / f"{site}.crt", builder.sign(ca_key, hashes.SHA256()))


class Side:
    """One end of a TLS connection in memory: what it met is in `error`, what it read in `received`."""

    def __init__(self, context: ssl.SSLContext, host: str | None = None) -> None:
        self.incoming, self.outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.server = host is None
        self.tls = context.wrap_bio(self.incoming, self.outgoing, self.server, host)
        self.error: ssl.SSLError | None = None
        self.done = False
        self.received = b""

    def turn(self) -> bytes:
        """Go on as far as possible; returns what must go to the other end, alerts included."""
        if self.error is None:
            try:
                if not self.done:
                    self.tls.do_handshake()
                    self.done = True
                self.received += self.tls.read(1024)
            except ssl.SSLWantReadError:
                pass
            except ssl.SSLError as error:
                self.error = error
        return self.outgoing.read()

    @property
    def words(self) -> str:
        assert self.error is not None
        text = explain(self.error, local_is_server=self.server)
        assert "\n" not in text
        assert text == text.strip()
        assert "{" not in text
        return text


def shake(server: ssl.SSLContext, client: ssl.SSLContext, host: str = "localhost") -> tuple[Side, Side]:
    listening, dialling = Side(server), Side(client, host)
    for _ in range(6):
        listening.incoming.write(dialling.turn())
        dialling.incoming.write(listening.turn())
    return listening, dialling


# ---- handshakes


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1"])
def test_both_sides_know_each_other(folder: Path, host: str) -> None:
    hub, north = credentials(folder, "hub"), credentials(folder, "north")
    server, client = shake(hub.server_context(), north.client_context(), host)
    assert (server.error, client.error) == (None, None)
    assert client.tls.version() == server.tls.version() == "TLSv1.3"
    seen = Identity.from_certificate(server.tls.getpeercert(binary_form=True) or b"")
    assert seen == north.identity
    assert seen.uri == "spiffe://demo/splitproto/client/north"
    assert Identity.from_certificate(client.tls.getpeercert(binary_form=True) or b"") == hub.identity


def test_the_server_sends_no_tickets(folder: Path) -> None:
    context = credentials(folder, "hub").server_context()
    server, client = shake(context, credentials(folder, "north").client_context())
    assert server.done
    assert client.tls.session is None or not client.tls.session.has_ticket


def test_a_server_of_another_ca_is_refused_by_the_client(folder: Path, stranger: Path) -> None:
    server, client = shake(
        credentials(stranger, "hub").server_context(), credentials(folder, "north").client_context()
    )
    assert "listening peer was not issued by our CA" in client.words
    assert "dialling peer does not know the CA of our certificate" in server.words
    assert not client.done


def test_a_client_of_another_ca_is_refused_by_the_server(
    folder: Path, stranger: Path, tmp_path: Path
) -> None:
    both = tmp_path / "both.crt"
    both.write_bytes((folder / "ca.crt").read_bytes() + (stranger / "ca.crt").read_bytes())
    intruder = Credentials(both, stranger / "north.crt", stranger / "north.key")
    server, client = shake(credentials(folder, "hub").server_context(), intruder.client_context())
    assert client.done, "TLS 1.3: the client is done before it is judged"
    assert "dialling peer was not issued by our CA" in server.words
    assert "listening peer does not know the CA of our certificate" in client.words


@pytest.mark.parametrize(
    ("start", "days", "local", "remote"),
    [
        (
            NOW - timedelta(days=30),
            -1,
            "has expired",
            "our certificate, or its own revocation list (CRL), has expired",
        ),
        (NOW + timedelta(days=1), 30, "is not yet valid", "our certificate"),
    ],
)
def test_a_certificate_out_of_its_time(
    folder: Path, start: datetime, days: int, local: str, remote: str
) -> None:
    for role, site in (("client", f"late{days}"), ("coordinator", f"hub{days}")):
        site = site.replace("-", "x")
        pki.issue(folder, role, site, hosts=["localhost"], now=NOW, not_before=start, days=days)
    late, hub = credentials(folder, f"late{days}".replace("-", "x")), credentials(folder, "hub")
    server, client = shake(hub.server_context(), late.client_context())
    assert local in server.words
    assert "clock" in server.words
    assert remote in client.words
    late_hub = credentials(folder, f"hub{days}".replace("-", "x"))
    server, client = shake(late_hub.server_context(), credentials(folder, "north").client_context())
    assert local in client.words
    assert remote in server.words


def test_a_host_name_that_the_certificate_lacks(folder: Path) -> None:
    contexts = credentials(folder, "hub").server_context(), credentials(folder, "north").client_context()
    server, client = shake(*contexts, "hub.example.org")
    assert "does not name the host that we dialled (hub.example.org)" in client.words
    assert "refuses our certificate" in server.words
    _, client = shake(*contexts, "10.0.0.1")
    assert "does not name the address that we dialled (10.0.0.1)" in client.words


def test_a_client_that_speaks_tls_1_2_only(folder: Path) -> None:
    old = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    old.load_verify_locations(folder / "ca.crt")
    old.load_cert_chain(folder / "north.crt", folder / "north.key")
    server, client = shake(credentials(folder, "hub").server_context(), old)
    assert "does not speak TLS 1.3" in server.words
    assert "TLS 1.3" in client.words


def test_a_server_that_speaks_tls_1_2_only(folder: Path) -> None:
    old = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    old.load_cert_chain(folder / "hub.crt", folder / "hub.key")
    server, client = shake(old, credentials(folder, "north").client_context())
    assert "does not speak TLS 1.3" in client.words
    assert "TLS 1.3" in server.words


def test_a_client_without_certificate(folder: Path) -> None:
    bare = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    bare.load_verify_locations(folder / "ca.crt")
    server, client = shake(credentials(folder, "hub").server_context(), bare)
    assert "sent no certificate" in server.words
    assert "asks for a certificate and we sent none" in client.words


def test_a_certificate_for_servers_only_is_no_client(folder: Path) -> None:
    handcrafted(
        folder,
        "web",
        "spiffe://demo/splitproto/client/web",
        purposes=(ExtendedKeyUsageOID.SERVER_AUTH,),
    )
    server, client = shake(
        credentials(folder, "hub").server_context(), credentials(folder, "web").client_context()
    )
    assert "was issued for another purpose: it needs clientAuth" in server.words
    assert "refuses the purpose of our certificate" in client.words


def test_revocation(tmp_path: Path) -> None:
    folder = tmp_path / "pki"
    pki.create_ca(folder, "demo", now=NOW)
    pki.issue(folder, "coordinator", "hub", hosts=["localhost"], now=NOW)
    good, bad = pki.issue(folder, "client", "good", now=NOW), pki.issue(folder, "client", "bad", now=NOW)
    bad_context = bad.client_context()
    hub = credentials(folder, "hub", pki.write_crl(folder, now=NOW))
    assert shake(hub.server_context(), bad_context)[0].error is None

    pki.revoke(folder, "bad", now=NOW)
    server, client = shake(hub.server_context(), bad_context)  # contexts are rebuilt: the new CRL counts
    assert "has been revoked" in server.words
    assert "revoked" in client.words
    assert shake(hub.server_context(), good.client_context())[0].error is None

    pki.write_crl(folder, now=NOW - timedelta(days=60), days=30)  # outdated: fails closed
    server, client = shake(hub.server_context(), good.client_context())
    assert "CRL is outdated" in server.words
    assert client.error is not None


def test_a_crl_of_another_ca_refuses_everybody(folder: Path, stranger: Path) -> None:
    hub = credentials(folder, "hub", pki.write_crl(stranger, now=NOW))
    server, _ = shake(hub.server_context(), credentials(folder, "north").client_context())
    assert "cannot be checked for revocation" in server.words


@pytest.mark.parametrize(
    ("noise", "words"),
    [
        (b"\x00" * 64, "not TLS 1.3"),
        (b"GET / HTTP/1.1\r\n\r\n", "speaks plain HTTP"),
        (b"\xff\x00\x00\x00\x00\x00\x00\x00\x01\x7f", "not TLS 1.3"),  # a ZMTP greeting
    ],
)
def test_something_else_than_tls(folder: Path, noise: bytes, words: str) -> None:
    server = Side(credentials(folder, "hub").server_context())
    server.incoming.write(noise)
    server.turn()
    assert words in server.words


def test_a_damaged_record(folder: Path) -> None:
    server, client = shake(
        credentials(folder, "hub").server_context(), credentials(folder, "north").client_context()
    )
    client.tls.write(b"gradients")
    record = bytearray(client.outgoing.read())
    record[-1] ^= 1
    server.incoming.write(bytes(record))
    client.incoming.write(server.turn())
    client.turn()
    assert "lost or altered" in server.words
    assert "altered bytes" in client.words


def test_every_other_error_is_one_line_too() -> None:
    error = ssl.SSLError(1, "[SSL: SOMETHING_NEW]\nevil {their} line (_ssl.c:1)")
    for local_is_server in (True, False):
        assert "\n" not in explain(error, local_is_server=local_is_server)
    verify = ssl.SSLCertVerificationError(1, "x")
    verify.verify_code, verify.verify_message = 999, "a\nnew {reason}"
    assert "\n" not in explain(verify, local_is_server=True)


# ---- identities


def der(path: Path) -> bytes:
    return x509.load_pem_x509_certificate(path.read_bytes()).public_bytes(serialization.Encoding.DER)


@pytest.mark.parametrize(
    "uri",
    [
        "spiffe://demo/splitproto/client/North",
        "spiffe://demo/splitproto/client/../hub",
        "spiffe://demo/splitproto/client/..",
        "spiffe://demo/splitproto/client/north/",
        "spiffe://demo/splitproto/client/north?x",
        "spiffe://demo/splitproto/client/no%72th",
        "spiffe://demo:443/splitproto/client/north",
        "spiffe://user@demo/splitproto/client/north",
        "spiffe://demo/splitproto/client/",
        "spiffe://demo/splitproto/client/" + "n" * 64,
        "spiffe://demo/other/client/north",
        "spiffe:///splitproto/client/north",
        "SPIFFE://demo/splitproto/client/north",
        "https://demo/splitproto/client/north",
        "spiffe://demo/splitproto/client/north\n",
    ],
)
def test_only_one_spelling_is_an_identity(folder: Path, uri: str) -> None:
    with pytest.raises(IdentityError) as caught:
        Identity.from_certificate(der(handcrafted(folder, "odd", uri)))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_exactly_one_uri(folder: Path) -> None:
    one, two = "spiffe://demo/splitproto/client/a", "spiffe://demo/splitproto/coordinator/b"
    assert Identity.from_certificate(der(handcrafted(folder, "odd", one))).site == "a"
    with pytest.raises(IdentityError, match="2 URI names, exactly one"):
        Identity.from_certificate(der(handcrafted(folder, "odd", one, two)))
    with pytest.raises(IdentityError, match="0 URI names"):
        Identity.from_certificate(der(handcrafted(folder, "odd")))
    with pytest.raises(IdentityError, match="cannot be read"):
        Identity.from_certificate(b"\x30\x03\x02\x01\x01")


@pytest.mark.parametrize("part", ["", "A", "-a", ".", "a/b", "a b", "é", "a" * 64, "a\n"])
def test_names(part: str) -> None:
    assert uri_of("f", "client", "a" * 63).endswith("a" * 63)
    for parts in ((part, "r", "s"), ("f", part, "s"), ("f", "r", part)):
        with pytest.raises(IdentityError, match="lowercase letters"):
            uri_of(*parts)


# ---- allow-lists


def test_the_allow_list(folder: Path) -> None:
    north = credentials(folder, "north").identity
    allowed = AllowList({"client": ["north"]}, "job.toml [sites]")
    allowed.check(north, "demo")
    with pytest.raises(
        NotAuthorised, match=r"client 'south' is not on our allow-list .*job.toml \[sites\]: add"
    ) as e:
        allowed.check(replace(north, site="south"), "demo")
    assert "job.toml" not in e.value.reason, "the refused peer does not learn where the list is"
    with pytest.raises(NotAuthorised, match="coordinator 'north'"):
        allowed.check(replace(north, role="coordinator"), "demo")
    with pytest.raises(NotAuthorised, match="'other', we are of 'demo'"):
        allowed.check(replace(north, federation="other"), "demo")
    with pytest.raises(NotAuthorised):
        AllowList({}, "nobody").check(north, "demo")


def test_an_allow_list_is_never_a_wildcard() -> None:
    with pytest.raises(IdentityError):
        AllowList({"client": ["*"]}, "x")
    with pytest.raises(TypeError):
        AllowList({"client": "north"}, "x")
    with pytest.raises(TypeError):
        AllowList({"client": ["north"]}, "x").sites["client"] = frozenset({"south"})  # type: ignore[index]


# ---- files


def test_unusable_files(folder: Path, tmp_path: Path) -> None:
    good = credentials(folder, "north")
    text = tmp_path / "text"
    text.write_text("not PEM")
    text.chmod(0o600)
    open_key = tmp_path / "open.key"
    open_key.write_bytes(good.key.read_bytes())
    open_key.chmod(0o640)
    locked = tmp_path / "locked.key"
    locked.touch(0o600)
    locked.write_bytes(
        ec.generate_private_key(ec.SECP256R1()).private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"secret"),
        )
    )
    missing = tmp_path / "missing"
    for change, expected in [
        ({"ca": missing}, "no such file"),
        ({"certificate": missing}, "no such file"),
        ({"key": missing}, "no such file"),
        ({"crl": missing}, "no such file"),
        ({"certificate": tmp_path}, "Is a directory"),
        ({"ca": text}, "not a PEM CA certificate"),
        ({"ca": good.certificate}, "not a CA certificate"),
        ({"certificate": text}, "not a PEM certificate"),
        ({"key": text}, "not a PEM private key"),
        ({"crl": text}, "not a PEM revocation list"),
        ({"key": folder / "hub.key"}, "does not belong to the certificate"),
        ({"key": open_key}, f"chmod 600 {open_key}"),
        ({"key": locked}, "has a passphrase"),
        ({"certificate": folder / "ca.crt", "key": folder / "ca.key"}, "names 'spiffe://demo'"),
    ]:
        with pytest.raises(IdentityError) as caught:
            replace(good, **change)
        assert expected in str(caught.value)
        assert "\n" not in str(caught.value)
        assert str(tmp_path) not in caught.value.reason, "a peer never reads our paths"


def test_rotation_is_noticed_without_a_restart(folder: Path, tmp_path: Path) -> None:
    for name in ("ca.crt", "north.crt", "north.key"):
        (tmp_path / name).touch(0o600)
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    kept = credentials(tmp_path, "north")
    assert kept.identity.site == "north"
    assert 395 < kept.days_left(NOW) < 398
    assert kept.days_left(NOW + timedelta(days=500)) < 0
    for suffix in ("crt", "key"):
        (tmp_path / f"north.{suffix}").write_bytes((folder / f"hub.{suffix}").read_bytes())
    assert kept.identity.site == "hub"
    kept.client_context()
    (tmp_path / "north.key").chmod(0o644)
    with pytest.raises(IdentityError, match="chmod 600"):
        kept.client_context()


def test_contexts_are_as_strict_as_promised(folder: Path) -> None:
    own = credentials(folder, "hub")
    for context in (own.server_context(), own.client_context()):
        assert context.minimum_version == context.maximum_version == ssl.TLSVersion.TLSv1_3
        assert context.verify_mode is ssl.CERT_REQUIRED
        assert context.verify_flags & ssl.VERIFY_X509_STRICT
        assert context.cert_store_stats() == {"x509": 1, "x509_ca": 1, "crl": 0}
    assert own.server_context().num_tickets == 0
    assert own.client_context().check_hostname
