"""Files that are not the PEM expected: the line names what they are and a command that works."""

from __future__ import annotations

import os
import shutil
import ssl
import struct
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.serialization import pkcs7, pkcs12
from hypothesis import given
from hypothesis import strategies as st

from splitproto import pki, secretfile
from splitproto.errors import IdentityError
from splitproto.identity import Credentials, Identity
from splitproto.secretfile import how_to_close, open_to_others

NOW = datetime.now(UTC)
PEM, DER = serialization.Encoding.PEM, serialization.Encoding.DER


@pytest.fixture
def own(tmp_path: Path) -> Credentials:
    pki.create_ca(tmp_path, "demo", now=NOW)
    issued = pki.issue(tmp_path, "client", "north", now=NOW)
    return Credentials(issued.ca, issued.certificate, issued.key, tmp_path / "ca.crl")


def refused(own: Credentials) -> str:
    with pytest.raises(IdentityError) as caught:
        Credentials(own.ca, own.certificate, own.key, own.crl)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def works(said: str, source: Path) -> bytes:
    """What the command in the line writes."""
    command = said[said.index("openssl ") :].rstrip(")")
    if "pkcs12" in command:
        command += " -passin pass:secret"
    subprocess.run(command, shell=True, check=True, capture_output=True)
    return source.with_name(source.name + ".pem").read_bytes()


needs_openssl = pytest.mark.skipif(shutil.which("openssl") is None, reason="needs the openssl command")


@needs_openssl
@pytest.mark.parametrize("which", ["ca", "certificate", "key", "crl"])
def test_der_is_converted_by_the_command_that_is_shown(own: Credentials, which: str) -> None:
    path: Path = getattr(own, which)
    before = path.read_bytes()
    flag = {"key": "pkey", "crl": "crl"}.get(which, "x509")
    command = ["openssl", flag, "-in", path, "-outform", "DER"]
    path.write_bytes(subprocess.run(command, capture_output=True, check=True).stdout)
    said = refused(own)
    assert "it is DER: convert it with openssl" in said
    path.with_name(path.name + ".pem").touch(mode=0o600)
    path.write_bytes(works(said, path))
    Credentials(own.ca, own.certificate, own.key, own.crl)
    assert which == "key" or path.read_bytes().split() == before.split()


@needs_openssl
@pytest.mark.parametrize("which", ["certificate", "key"])
def test_pkcs12_is_converted_by_the_command_that_is_shown(own: Credentials, which: str) -> None:
    path: Path = getattr(own, which)
    key: Any = serialization.load_pem_private_key(own.key.read_bytes(), None)
    certificate = x509.load_pem_x509_certificate(own.certificate.read_bytes())
    bundle = pkcs12.serialize_key_and_certificates(
        b"x", key, certificate, None, serialization.BestAvailableEncryption(b"secret")
    )
    path.write_bytes(bundle)
    said = refused(own)
    assert "it is PKCS#12: convert it with openssl pkcs12" in said
    path.with_name(path.name + ".pem").touch(mode=0o600)
    path.write_bytes(works(said, path))
    assert Credentials(own.ca, own.certificate, own.key, own.crl).identity.site == "north"


@needs_openssl
@pytest.mark.parametrize("encoding", [PEM, DER])
def test_pkcs7_is_converted_by_the_command_that_is_shown(own: Credentials, encoding: Any) -> None:
    chain = [x509.load_pem_x509_certificate(path.read_bytes()) for path in (own.certificate, own.ca)]
    own.certificate.write_bytes(pkcs7.serialize_certificates(chain, encoding))
    said = refused(own)
    assert "it is PKCS#7" in said
    assert works(said, own.certificate).count(b"BEGIN CERTIFICATE") == 2


@pytest.mark.parametrize(
    ("which", "content", "words"),
    [
        ("certificate", b"", "the file is empty"),
        ("key", b"\n", "the file is empty"),
        ("ca", b"\xff\xfe-\0-\0", "UTF-16 text"),
        ("crl", b"\xfe\xed\xfe\xed\0\0\0\2", "Java key store"),
        ("certificate", b"-----BEGIN CERTIFICATE REQUEST-----\nAA\n", "which the CA must sign first"),
        (
            "certificate",
            b"-----BEGIN PRIVATE KEY-----\nAA\n",
            "it is a private key: name the certificate here",
        ),
        ("key", b"-----BEGIN CERTIFICATE-----\nAA\n", "it is a certificate: name the private key here"),
        ("key", b"-----BEGIN OPENSSH PRIVATE KEY-----\nAA\n", "it is an OpenSSH key"),
        ("ca", b"-----BEGIN CERTIFICATE-----\nAA\n-----END CERTIFICATE-----\n", "it is damaged"),
        ("crl", b"0\x03\x02\x01\x05", "DER of an unknown kind, or damaged"),
        ("crl", b"<html>", "expected a file that starts with -----BEGIN X509 CRL-----"),
    ],
)
def test_other_files_are_named(own: Credentials, which: str, content: bytes, words: str) -> None:
    path: Path = getattr(own, which)
    path.write_bytes(content)
    said = refused(own)
    assert words in said
    assert str(path) in said


# ---- certificates that no CA should issue


def certificate_der(own: Credentials) -> bytes:
    return x509.load_pem_x509_certificate(own.certificate.read_bytes()).public_bytes(DER)


@pytest.mark.parametrize("version", [0, 3, 7, 255])
def test_an_unknown_version_is_an_identity_error(own: Credentials, version: int) -> None:
    der = certificate_der(own)
    assert der.count(b"\xa0\x03\x02\x01\x02") == 1
    bad = der.replace(b"\xa0\x03\x02\x01\x02", b"\xa0\x03\x02\x01" + bytes([version]))
    with pytest.raises(IdentityError, match="cannot be read"):
        Identity.from_certificate(bad)
    own.certificate.write_text(ssl.DER_cert_to_PEM_cert(bad))
    assert "not a PEM certificate: it is damaged" in refused(own)


@pytest.mark.parametrize("serial", [b"\x02\x01\x00", b"\x02\x01\xff", b"\x02\x14" + b"\x80" * 20])
def test_a_serial_number_that_is_not_positive_is_an_identity_error(own: Credentials, serial: bytes) -> None:
    certificate = x509.load_pem_x509_certificate(own.certificate.read_bytes())
    number = certificate.serial_number.to_bytes(certificate.serial_number.bit_length() // 8 + 1, "big")
    old = b"\x02" + bytes([len(number)]) + number
    body = certificate.tbs_certificate_bytes
    start = 4 if body[1] == 0x82 else 3
    assert old in body
    content = body[start:].replace(old, serial)
    inner = b"\x30\x82" + struct.pack(">H", len(content)) + content
    rest = certificate_der(own)[4 + len(body) :]
    outer = b"\x30\x82" + struct.pack(">H", len(inner + rest)) + inner + rest
    with pytest.raises(IdentityError, match=r"serial number is not positive|cannot be read"):
        Identity.from_certificate(outer)


@pytest.fixture(scope="module")
def der(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = tmp_path_factory.mktemp("fuzz")
    pki.create_ca(folder, "demo", now=NOW)
    return certificate_der(pki.issue(folder, "coordinator", "hub", hosts=["hub.example", "::1"], now=NOW))


@given(data=st.data())
def test_a_mutated_certificate_is_an_identity_or_an_identity_error(der: bytes, data: st.DataObject) -> None:
    mutated = bytearray(der)
    for _ in range(data.draw(st.integers(1, 6))):
        at = data.draw(st.integers(0, len(mutated) - 1))
        kind = data.draw(st.sampled_from(("set", "insert", "delete", "double")))
        if kind == "set":
            mutated[at] = data.draw(st.integers(0, 255))
        elif kind == "insert":
            mutated[at:at] = data.draw(st.binary(min_size=1, max_size=8))
        elif kind == "double":
            mutated[at:at] = mutated[at : at + data.draw(st.integers(1, 40))]
        elif len(mutated) > 16:
            del mutated[at : at + data.draw(st.integers(1, 8))]
    try:
        identity = Identity.from_certificate(bytes(mutated))
    except IdentityError:
        return
    assert int(identity.serial, 16) > 0


# ---- secrets that others may read


def test_a_key_on_a_read_only_mount_gets_advice_that_works(
    own: Credentials, monkeypatch: pytest.MonkeyPatch
) -> None:
    own.key.chmod(0o640)
    assert f"chmod 600 {own.key}" in refused(own)

    class ReadOnly:
        f_flag = os.ST_RDONLY

    monkeypatch.setattr(os, "statvfs", lambda _: ReadOnly)
    said = refused(own)
    assert "LoadCredential=" in said
    assert "defaultMode: 0400" in said
    assert "chmod 600" not in said


@pytest.mark.parametrize("kind", ["vfat", "exfat", "fuseblk"])
def test_a_file_system_without_modes_is_named(
    own: Credentials, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(secretfile, "_file_system", lambda _: kind)
    assert f"{kind} keeps no modes: mount it with umask=077" in how_to_close(own.key)


def test_the_file_system_of_a_path_is_found() -> None:
    assert secretfile._file_system(Path("/proc/self/status")) == "proc"


def acl(*entries: tuple[int, int, int]) -> bytes:
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)


NOBODY = 0xFFFFFFFF


@pytest.mark.parametrize(
    ("mode", "entries", "is_open"),
    [
        (0o600, None, False),
        (0o440, None, True),
        (0o604, None, True),
        # What systemd makes of LoadCredential= for a unit with User=: the mask shows as the group's rights.
        (
            0o440,
            acl((1, 4, NOBODY), (2, 4, os.geteuid()), (4, 0, NOBODY), (16, 4, NOBODY), (32, 0, NOBODY)),
            False,
        ),
        (0o440, acl((1, 4, NOBODY), (2, 4, 54321), (4, 0, NOBODY), (16, 4, NOBODY), (32, 0, NOBODY)), True),
        (0o440, acl((1, 4, NOBODY), (4, 4, NOBODY), (16, 4, NOBODY), (32, 0, NOBODY)), True),
        (0o440, acl((1, 4, NOBODY), (4, 0, NOBODY), (8, 4, 7), (16, 4, NOBODY), (32, 0, NOBODY)), True),
        (0o440, b"\x02\0\0\0\1", True),
    ],
)
def test_an_access_list_says_who_may_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: int, entries: bytes | None, is_open: bool
) -> None:
    path = tmp_path / "key"
    path.touch()
    path.chmod(mode)

    def getxattr(*_: object) -> bytes:
        if entries is None:
            raise OSError(61, "No data available")
        return entries

    monkeypatch.setattr(os, "getxattr", getxattr)
    assert open_to_others(path) == is_open
