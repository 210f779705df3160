"""Keys that sites show each other: signed, relayed and checked. Forged octets are in the vectors `fusion`."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

from splitproto import partners, pki
from splitproto.errors import FusionMismatch, IdentityError, PolicyRefused
from splitproto.messages import KeyOffer
from splitproto.partners import Trust

RUN, TERMS = bytes(range(16)), bytes(32)
NOW = datetime(2026, 11, 28, 12, tzinfo=UTC)
SITES = ("a", "b", "c")
KEYS = {site: bytes([n + 1]) * 32 for n, site in enumerate(SITES)}
CERTIFICATES = Path(__file__).parents[2] / "spec" / "vectors" / "certificates.json"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A federation's CA and its sites."""
    made = tmp_path_factory.mktemp("partners")
    pki.create_ca(made, "glioma", now=NOW)
    for site in SITES:
        pki.issue(made, "client", site, now=NOW)
    pki.issue(made, "coordinator", "hub", hosts=["localhost"], now=NOW)
    return made


def offer(folder: Path, site: str, *, role: str = "client", **changed: Any) -> KeyOffer:
    signed = {"run": RUN, "terms": TERMS, "public": KEYS.get(site, bytes(32)), **changed}
    key, chain = ((folder / f"{site}.{ending}").read_bytes() for ending in ("key", "crt"))
    return partners.sign(key, chain, **signed)


def trust(folder: Path, crl: Path | None = None, **changed: Any) -> Trust:
    listed = None if crl is None else crl.read_bytes()
    return replace(Trust.read("glioma", (folder / "ca.crt").read_bytes(), listed, SITES), **changed)


def accept(folder: Path, offers: list[KeyOffer], *, parties: int = 3, **changed: Any) -> dict[str, bytes]:
    return partners.accept(offers, offer(folder, "a"), RUN, TERMS, parties, trust(folder, **changed), NOW)


def test_partners_are_accepted_on_proof_and_named_by_their_certificates(folder: Path) -> None:
    """SP-11.18-6, SP-11.18-8."""
    found = accept(folder, [offer(folder, "b"), offer(folder, "c")])
    assert found == {"b": KEYS["b"], "c": KEYS["c"]}


def test_keys_that_prove_nothing_are_refused_in_one_line(folder: Path) -> None:
    """SP-11.18-8."""
    good, c = offer(folder, "b"), offer(folder, "c")
    hub = offer(folder, "hub")
    for wrong, words in (
        (replace(good, public=bytes(32)), "not signed by it"),
        (replace(good, signature=c.signature), "not signed by it"),
        (offer(folder, "b", run=bytes(16)), "not signed by it"),
        (offer(folder, "b", terms=b"x" * 32), "not signed by it"),
        (c, "came twice"),
        (offer(folder, "b", public=KEYS["c"]), "that of another site"),
        (offer(folder, "b", public=KEYS["a"]), "that of another site"),
        (offer(folder, "a"), "came twice"),
        (replace(good, chain=(b"nothing",)), "does not hold"),
        (hub, "no site of glioma"),
    ):
        with pytest.raises(FusionMismatch, match=words) as caught:
            accept(folder, [c, wrong])
        assert "\n" not in str(caught.value)


def test_their_number_is_that_of_the_terms_and_of_the_policy(folder: Path) -> None:
    """SP-11.18-8: "two at least"."""
    b, c = offer(folder, "b"), offer(folder, "c")
    with pytest.raises(FusionMismatch, match="2 are needed"):
        accept(folder, [b])
    with pytest.raises(FusionMismatch, match="3 are needed"):
        accept(folder, [b, c], parties=4)
    with pytest.raises(PolicyRefused, match="1 partners in the sum, our policy wants 2"):
        accept(folder, [b], parties=2)
    assert accept(folder, [b], parties=2, least=1) == {"b": KEYS["b"]}
    with pytest.raises(PolicyRefused, match="wants 3"):
        accept(folder, [b, c], least=3)
    with pytest.raises(PolicyRefused, match="site c is not among our partners"):
        accept(folder, [b, c], partners=("a", "b"))


def test_a_revoked_partner_and_an_outdated_list_are_refused(folder: Path) -> None:
    """SP-11.18-8: "its own revocation list included"."""
    pki.issue(folder, "client", "gone", now=NOW)
    gone, b = offer(folder, "gone", public=bytes([9]) * 32), offer(folder, "b")
    everybody = (*SITES, "gone")
    accept(folder, [b, gone], crl=pki.write_crl(folder, now=NOW), partners=everybody)
    fresh = pki.revoke(folder, "gone", now=NOW)
    with pytest.raises(FusionMismatch, match="site gone"):
        accept(folder, [b, gone], crl=fresh, partners=everybody)
    old = pki.write_crl(folder, now=NOW - timedelta(days=60), days=30)
    with pytest.raises(FusionMismatch, match="fetch a fresh list"):
        accept(folder, [b, offer(folder, "c")], crl=old)


def test_a_certificate_that_has_ended_is_refused(folder: Path) -> None:
    own = offer(folder, "a")
    offers = [offer(folder, "b"), offer(folder, "c")]
    with pytest.raises(FusionMismatch, match="does not hold"):
        partners.accept(offers, own, RUN, TERMS, 3, trust(folder), NOW + timedelta(days=20 * 365))


def test_certificates_are_judged_as_in_a_handshake() -> None:
    """SP-11.18-8, SP-6-2: the cases of dialling peers among the vectors, all but the chain that may be let through."""
    content = json.loads(CERTIFICATES.read_text())
    common, judged = content["common"], 0
    now = datetime.fromisoformat(common["now"])
    for case in content["cases"]:
        # SP-14-7: an issuer without subject key identifier SHOULD be refused
        if case["dialled"] is not None or case["name"] == "intermediate-no-key-identifier":
            continue
        chain = x509.load_pem_x509_certificates(case["chain"].encode())
        ders = tuple(one.public_bytes(serialization.Encoding.DER) for one in chain)
        crl = case["crl"].encode() if "crl" in case else None
        ours = Trust.read("glioma", common["ca"].encode(), crl, common["allowed"]["client"])
        key = serialization.load_pem_private_key(common["key"].encode(), None)
        assert isinstance(key, rsa.RSAPrivateKey)
        try:
            uri = partners.Identity.from_certificate(ders[0]).uri
        except IdentityError:
            uri = "spiffe://glioma/splitproto/client/a"
        signed = partners.statement(uri, RUN, TERMS, KEYS["a"])
        shown = KeyOffer(KEYS["a"], key.sign(signed, partners._PSS, hashes.SHA256()), ders)
        if "error" in case["expect"]:
            with pytest.raises((FusionMismatch, PolicyRefused)):
                partners.verify(shown, RUN, TERMS, ours, now)
        else:
            assert partners.verify(shown, RUN, TERMS, ours, now).site == case["expect"]["site"]
        judged += 1
    assert judged > 40


@pytest.mark.parametrize(
    "curve", [ec.SECP256R1(), ec.SECP384R1(), ec.SECP521R1()], ids=lambda curve: curve.name
)
def test_keys_on_every_curve_of_tls_sign(folder: Path, curve: ec.EllipticCurve, tmp_path: Path) -> None:
    """SP-11.18-6."""
    key = ec.generate_private_key(curve)
    shown = partners.sign(pem(key), certificate(folder, key.public_key()), RUN, TERMS, KEYS["b"])
    assert partners.verify(shown, RUN, TERMS, trust(folder), NOW).site == "b"
    with pytest.raises(FusionMismatch):
        partners.verify(replace(shown, public=bytes(32)), RUN, TERMS, trust(folder), NOW)


def test_a_key_of_another_kind_is_refused_with_the_fix(folder: Path) -> None:
    key = ed25519.Ed25519PrivateKey.generate()
    with pytest.raises(IdentityError, match="P-256"):
        partners.sign(pem(key), certificate(folder, key.public_key()), RUN, TERMS, KEYS["b"])


def pem(key: Any) -> bytes:
    form = serialization.PrivateFormat.PKCS8
    octets: bytes = key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption())
    return octets


def certificate(folder: Path, key: Any) -> bytes:
    """That of site b, for another key."""
    model = x509.load_pem_x509_certificate((folder / "b.crt").read_bytes())
    authority = serialization.load_pem_private_key((folder / "ca.key").read_bytes(), None)
    builder = x509.CertificateBuilder(
        model.issuer, model.subject, key, 77, model.not_valid_before_utc, model.not_valid_after_utc
    )
    for extension in model.extensions:
        if not isinstance(extension.value, x509.SubjectKeyIdentifier):
            builder = builder.add_extension(extension.value, extension.critical)
    return builder.sign(authority, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)  # type: ignore[arg-type]


def test_the_partners_of_a_run_never_change() -> None:
    """SP-11.18-9."""
    kept = {"b": KEYS["b"], "c": KEYS["c"]}
    partners.check_unchanged(kept, dict(reversed(kept.items())))
    for found, words in (
        ({"b": KEYS["b"]}, "partner c is gone"),
        ({**kept, "d": bytes(32)}, "partner d is new"),
        ({**kept, "b": bytes(32)}, "partner b has another key"),
    ):
        with pytest.raises(FusionMismatch, match=words):
            partners.check_unchanged(kept, found)
