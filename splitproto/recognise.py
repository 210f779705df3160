"""What a certificate, key or revocation list is that is not the PEM file expected, and the command that converts it."""

from __future__ import annotations

import shlex
from pathlib import PurePath
from typing import Literal

from cryptography import x509
from cryptography.hazmat.primitives import serialization

__all__ = ["Kind", "convert"]

Kind = Literal["CERTIFICATE", "PRIVATE KEY", "X509 CRL"]
_SIGNED_DATA = bytes.fromhex("06092a864886f70d010702")
"""Object identifier of PKCS#7 signed data (RFC 2315), which is how Windows exports chains (.p7b)."""
_COMMAND = {"CERTIFICATE": "x509", "PRIVATE KEY": "pkey", "X509 CRL": "crl"}
_FROM_PKCS12 = {
    "CERTIFICATE": "-nokeys -clcerts",
    "PRIVATE KEY": "-nocerts -nodes",
    "X509 CRL": "-nokeys -cacerts",
}
_WORDS = {
    "CERTIFICATE": "a certificate",
    "TRUSTED CERTIFICATE": "a certificate with OpenSSL's own trust settings",
    "CERTIFICATE REQUEST": "a certificate request, which the CA must sign first",
    "NEW CERTIFICATE REQUEST": "a certificate request, which the CA must sign first",
    "X509 CRL": "a revocation list",
    "PUBLIC KEY": "a public key",
    "OPENSSH PRIVATE KEY": "an OpenSSH key",
    "PGP PRIVATE KEY BLOCK": "a PGP key",
}


def convert(data: bytes, path: PurePath, wanted: Kind) -> str:
    """The fix for a file that does not hold what was `wanted`, as one clause; what is in it is never shown."""
    name = shlex.quote(str(path))
    out = f"-out {name}.pem"
    if not data.strip():
        return "the file is empty: put it there again"
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "it is UTF-16 text, as PowerShell writes it: save it as ASCII"
    if data.startswith(b"\xef\xbb\xbf"):
        return f"it begins with a byte order mark: remove it with sed -i '1s/^\\xEF\\xBB\\xBF//' {name}"
    if data.startswith(b"\xfe\xed\xfe\xed"):
        return (
            f"it is a Java key store: convert it with keytool -importkeystore -srckeystore {name} "
            f"-destkeystore {name}.p12 -deststoretype PKCS12, and that with openssl pkcs12"
        )
    if data.startswith(b"\x30"):
        if _is_pkcs12(data):
            return f"it is PKCS#12: convert it with openssl pkcs12 -in {name} {_FROM_PKCS12[wanted]} {out}"
        if _SIGNED_DATA in data[:32]:
            return f"it is PKCS#7: convert it with openssl pkcs7 -inform DER -in {name} -print_certs {out}"
        if (found := _der(data)) == wanted:
            return f"it is DER: convert it with openssl {_COMMAND[wanted]} -inform DER -in {name} {out}"
        if found is not None:
            return f"it is {_WORDS.get(found, 'a private key')} (in DER): name the {_named(wanted)} here"
        return "it is DER of an unknown kind, or damaged: export it again, as PEM"
    label = _label(data)
    if label in ("PKCS7", "CMS"):
        return f"it is PKCS#7: convert it with openssl pkcs7 -in {name} -print_certs {out}"
    if label == wanted or (wanted == "PRIVATE KEY" and label.endswith("PRIVATE KEY") and label not in _WORDS):
        return "it is damaged: put it there again"
    if label:
        words = _WORDS.get(label, "a private key" if label.endswith("PRIVATE KEY") else "something else")
        return f"it is {words}: name the {_named(wanted)} here"
    return f"expected a file that starts with -----BEGIN {wanted}-----"


def _named(wanted: Kind) -> str:
    return {"CERTIFICATE": "certificate", "PRIVATE KEY": "private key", "X509 CRL": "revocation list"}[wanted]


def _label(data: bytes) -> str:
    """What the first line of a PEM file says that it holds; empty where there is none."""
    _, begin, rest = data.partition(b"-----BEGIN ")
    label = rest[:40].partition(b"-----")[0]
    return label.decode("ascii", "replace") if begin and label.isascii() else ""


def _is_pkcs12(data: bytes) -> bool:
    """Whether a DER sequence begins with version 3, as a PFX does (RFC 7292 section 4)."""
    length = data[1:2]
    start = 2 + (length[0] & 0x7F if length and length[0] & 0x80 else 0)
    return data[start : start + 4] == b"\x02\x01\x03\x30"


def _der(data: bytes) -> Kind | None:
    """Which of the three kinds a DER file is. Any exception of a parser means: not that one."""
    for kind in ("CERTIFICATE", "X509 CRL", "PRIVATE KEY"):
        try:
            if kind == "CERTIFICATE":
                x509.load_der_x509_certificate(data)
            elif kind == "X509 CRL":
                x509.load_der_x509_crl(data)
            else:
                serialization.load_der_private_key(data, password=None)
        except TypeError:
            return "PRIVATE KEY"  # it is one, with a passphrase
        except Exception:  # noqa: S112
            continue
        return kind
    return None
