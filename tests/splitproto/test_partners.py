"""Keys that sites show each other: signed, relayed and checked. Forged octets are in the vectors `fusion`."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import dsa, ec, ed448, ed25519, rsa, x25519

from splitproto import partners, pki
from splitproto.errors import CertificateEnded, FusionMismatch, IdentityError, PolicyRefused
from splitproto.identity import OWN_UNUSABLE, revocation_lists
from splitproto.partners import Keys, Trust
from splitproto.records import KeyOffer

RUN, TERMS = bytes(range(16)), bytes(32)
NOW = datetime(2026, 11, 28, 12, tzinfo=UTC)
SITES = ("a", "b", "c")
KEYS = {site: Keys(bytes([n + 1]) * 32, bytes([n + 11]) * 32) for n, site in enumerate(SITES)}
NEW = Keys(bytes([9]) * 32, bytes([19]) * 32)
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
    signed = {"run": RUN, "terms": TERMS, "keys": KEYS.get(site, NEW), **changed}
    key, chain = ((folder / f"{site}.{ending}").read_bytes() for ending in ("key", "crt"))
    return partners.sign(key, chain, **signed)


def trust(folder: Path, crl: Path | None = None, **changed: Any) -> Trust:
    listed = None if crl is None else crl.read_bytes()
    return replace(Trust.read("glioma", (folder / "ca.crt").read_bytes(), listed, SITES), **changed)


def accept(folder: Path, offers: list[KeyOffer], *, parties: int = 3, **changed: Any) -> dict[str, Keys]:
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
        (offer(folder, "b", keys=KEYS["c"]), "that of another site"),
        (offer(folder, "b", keys=KEYS["a"]), "that of another site"),
        (replace(good, service=NEW.service), "not signed by it"),
        *(
            (offer(folder, "b", keys=keys), "that of another site")
            for keys in (
                KEYS["b"]._replace(service=KEYS["c"].service),
                KEYS["b"]._replace(service=KEYS["a"].training),
                KEYS["b"]._replace(service=KEYS["b"].training),
            )
        ),
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
    gone, b = offer(folder, "gone", keys=NEW), offer(folder, "b")
    everybody = (*SITES, "gone")
    accept(folder, [b, gone], crl=pki.write_crl(folder, now=NOW), partners=everybody)
    fresh = pki.revoke(folder, "gone", now=NOW)
    with pytest.raises(FusionMismatch, match="site gone"):
        accept(folder, [b, gone], crl=fresh, partners=everybody)
    old = pki.write_crl(folder, now=NOW - timedelta(days=60), days=30)
    with pytest.raises(FusionMismatch, match="fetch a fresh list"):
        accept(folder, [b, offer(folder, "c")], crl=old)


def federation(folder: Path, name: str, *sites: str) -> tuple[bytes, bytes]:
    """CA certificate and revocation list of a CA of its own, made two days ago."""
    folder.mkdir()
    pki.create_ca(folder, name, now=NOW - timedelta(days=2))
    for site in sites:
        pki.issue(folder, "client", site, now=NOW - timedelta(days=1))
    return (folder / "ca.crt").read_bytes(), (folder / "ca.crl").read_bytes()


def test_of_a_file_of_several_lists_the_newest_of_the_issuer_counts(tmp_path: Path) -> None:
    """SP-11.18-8, SP-6-2: as OpenSSL reads the file, and in whatever order the lists are in it."""
    ca, _ = federation(tmp_path / "one", "glioma", "b", "c")
    shown = {site: offer(tmp_path / "one", site) for site in "bc"}
    old = pki.write_crl(tmp_path / "one", now=NOW - timedelta(hours=3)).read_bytes()
    new = pki.revoke(tmp_path / "one", "b", now=NOW - timedelta(hours=1)).read_bytes()
    for lists in (new, old + new, new + old):
        ours = Trust.read("glioma", ca, lists, SITES)
        with pytest.raises(FusionMismatch, match=r"b .*has been revoked"):
            partners.verify(shown["b"], RUN, TERMS, ours, NOW)
        assert partners.verify(shown["c"], RUN, TERMS, ours, NOW).site == "c"
    with pytest.raises(IdentityError, match="not PEM"):
        Trust.read("glioma", ca, b"nothing", SITES)
    for half in ((ca, old + new[:200]), (ca[:200], old), (b"", old)):
        # As while a file is replaced: it is tried again.
        with pytest.raises(IdentityError, match=f"{OWN_UNUSABLE}.*not PEM") as one:
            Trust.read("glioma", *half, SITES)
        assert one.value.reason == OWN_UNUSABLE and "\n" not in str(one.value)


def listed(
    folder: Path,
    made: datetime,
    *extensions: x509.ExtensionType,
    gone: int | None = None,
    back: bool = False,
    days: float = 9,
) -> bytes:
    """A list of the CA in `folder`, of a kind that `splitpeer pki` does not make."""
    ca = x509.load_pem_x509_certificate((folder / "ca.crt").read_bytes())
    key = serialization.load_pem_private_key((folder / "ca.key").read_bytes(), None)
    builder = (
        x509.CertificateRevocationListBuilder()
        .issuer_name(ca.subject)
        .last_update(made)
        .next_update(made + timedelta(days=days))
    )
    if gone is not None:
        revoked = x509.RevokedCertificateBuilder().serial_number(gone).revocation_date(made)
        if back:
            revoked = revoked.add_extension(x509.CRLReason(x509.ReasonFlags.remove_from_crl), critical=False)
        builder = builder.add_revoked_certificate(revoked.build())
    for extension in extensions:
        builder = builder.add_extension(extension, critical=True)
    return builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)  # type: ignore[arg-type]


def test_a_list_of_a_part_vouches_for_nobody(tmp_path: Path) -> None:
    """SP-11.18-8: a newer delta list is no reason to forget what the complete one revokes; it may revoke more."""
    one = tmp_path / "one"
    ca, _ = federation(one, "glioma", "b", "c")
    shown, delta = {site: offer(one, site) for site in "bc"}, x509.DeltaCRLIndicator(1)
    serial = {
        site: x509.load_pem_x509_certificate((one / f"{site}.crt").read_bytes()).serial_number
        for site in "bc"
    }
    of_cas = x509.IssuingDistributionPoint(None, None, False, True, None, False, False)

    def ago(hours: float) -> datetime:
        return NOW - timedelta(hours=hours)

    def refused(lists: bytes) -> list[str]:
        ours, found = Trust.read("glioma", ca, lists, SITES), []
        for site, offered in shown.items():
            try:
                partners.verify(offered, RUN, TERMS, ours, NOW)
            except FusionMismatch:
                found.append(site)
        return found

    base = listed(one, ago(3), gone=serial["b"])
    assert refused(base) == ["b"]
    assert refused(base + listed(one, ago(1), delta)) == ["b"]
    assert refused(base + listed(one, ago(1), of_cas)) == ["b"]
    assert refused(listed(one, ago(1), delta, gone=serial["c"]) + base) == ["b", "c"]
    assert refused(listed(one, ago(5), delta, gone=serial["c"]) + base) == ["b"], "the complete list is newer"
    assert refused(base + listed(one, ago(1), delta, gone=serial["c"], back=True)) == ["b"]
    assert refused(listed(one, ago(1), delta)) == ["b", "c"], "nobody can be checked"


def test_what_an_outdated_list_has_revoked_stays_revoked(tmp_path: Path) -> None:
    """SP-11.18-8: an outdated list vouches for nobody; that a certificate is revoked does not end with the list."""
    one = tmp_path / "one"
    ca, _ = federation(one, "glioma", "b", "c")
    shown, delta = {site: offer(one, site) for site in "bc"}, x509.DeltaCRLIndicator(1)
    serial = x509.load_pem_x509_certificate((one / "c.crt").read_bytes()).serial_number
    base = listed(one, NOW - timedelta(hours=9))

    def refused(*lists: bytes) -> list[str]:
        ours, found = Trust.read("glioma", ca, b"".join(lists), SITES), []
        for site, offered in shown.items():
            try:
                partners.verify(offered, RUN, TERMS, ours, NOW)
            except FusionMismatch:
                found.append(site)
        return found

    short = listed(one, NOW - timedelta(hours=5), delta, gone=serial, days=0.1)
    assert refused(base) == []
    assert refused(base, short) == ["c"], "a delta list"
    assert refused(base, listed(one, NOW - timedelta(hours=5), gone=serial, days=0.1)) == ["c"], (
        "a complete list"
    )
    assert refused(base, short, listed(one, NOW - timedelta(hours=1))) == [], (
        "a newer complete list knows better"
    )
    assert refused(listed(one, NOW - timedelta(hours=9), days=0.1), short) == ["b", "c"], (
        "nobody can be checked"
    )


def test_a_list_speaks_for_the_ca_that_signed_it_and_for_no_namesake(tmp_path: Path) -> None:
    """SP-11.18-8: one CA took the place of another of the same name; a third has another name."""
    made = [federation(tmp_path / "before", "glioma", "b"), federation(tmp_path / "after", "glioma", "c"),
            federation(tmp_path / "other", "other")]  # fmt: skip
    b, c = offer(tmp_path / "before", "b"), offer(tmp_path / "after", "c")
    cas, (before, after, other) = b"".join(ca for ca, _ in made), (listed for _, listed in made)
    for lists in (before + after, after + before, other + before + after):
        ours = Trust.read("glioma", cas, lists, SITES)
        assert [partners.verify(one, RUN, TERMS, ours, NOW).site for one in (b, c)] == ["b", "c"]
    with pytest.raises(FusionMismatch, match="c cannot be checked"):
        partners.verify(c, RUN, TERMS, Trust.read("glioma", cas, before, SITES), NOW)
    revoked = pki.revoke(tmp_path / "after", "c", now=NOW - timedelta(hours=1)).read_bytes()
    for lists in (before + revoked, revoked + before):
        with pytest.raises(FusionMismatch, match=r"c .*has been revoked"):
            partners.verify(c, RUN, TERMS, Trust.read("glioma", cas, lists, SITES), NOW)


def test_a_renewal_that_is_half_done_is_our_own_trouble_in_one_line(folder: Path) -> None:
    """Key and certificate are two files; whoever reads them between two writes may try again."""
    key, chain = (folder / "a.key").read_bytes(), (folder / "a.crt").read_bytes()
    for half in ((key, chain[:200]), (key, b""), (key[:60], chain), ((folder / "b.key").read_bytes(), chain)):
        with pytest.raises(IdentityError, match=OWN_UNUSABLE) as one:
            partners.sign(*half, RUN, TERMS, KEYS["a"])
        assert "\n" not in str(one.value)


def test_a_certificate_that_has_ended_is_refused(folder: Path) -> None:
    own = offer(folder, "a")
    offers = [offer(folder, "b"), offer(folder, "c")]
    with pytest.raises(CertificateEnded, match="site b has ended since"):
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
        shown = KeyOffer(*KEYS["a"], key.sign(signed, partners._PSS, hashes.SHA256()), ders)
        if "error" in case["expect"]:
            ends = case["name"] in ("expired", "intermediate-expired")
            with pytest.raises(CertificateEnded if ends else (FusionMismatch, PolicyRefused)):
                partners.verify(shown, RUN, TERMS, ours, now)
        else:
            assert partners.verify(shown, RUN, TERMS, ours, now).site == case["expect"]["site"]
        judged += 1
    assert judged > 40


# --- octets of a stranger ---------------------------------------------------------------------------------


def lookalike(folder: Path, key: Any) -> bytes:
    """A certificate with the subject of the CA, for another key, in DER."""
    subject = x509.load_pem_x509_certificate((folder / "ca.crt").read_bytes()).subject
    signer = ec.generate_private_key(ec.SECP256R1())
    builder = x509.CertificateBuilder(subject, subject, key, 78, NOW, NOW + timedelta(days=9))
    return builder.sign(signer, hashes.SHA256()).public_bytes(serialization.Encoding.DER)


def strange_chains(folder: Path) -> dict[str, tuple[bytes, ...]]:
    """What may come in `chain`: 1 to 4 octet strings of up to 8192 octets, which is all that the codec says."""
    (leaf,), chance = offer(folder, "b").chain, random.Random(7)
    (other,) = offer(folder, "c").chain
    kinds = {
        "x25519": x25519.X25519PrivateKey.generate(),
        "ed25519": ed25519.Ed25519PrivateKey.generate(),
        "ed448": ed448.Ed448PrivateKey.generate(),
        "dsa": dsa.generate_private_key(1024),
        "secp256k1": ec.generate_private_key(ec.SECP256K1()),
        "rsa": rsa.generate_private_key(65537, 1024),
    }
    found = {name: (leaf, lookalike(folder, key.public_key())) for name, key in kinds.items()}
    alien = lookalike(folder, kinds["x25519"].public_key())
    # An object identifier that nobody knows, in place of that of the key.
    found["unknown key"] = (leaf, alien.replace(b"\x06\x03\x2b\x65\x6e", b"\x06\x03\x2b\x65\x7f"))
    newer = leaf.replace(b"\xa0\x03\x02\x01\x02", b"\xa0\x03\x02\x01\x03", 1)
    assert newer != leaf
    garbage = {
        "none": b"", "null": b"\x05\x00", "a number": b"\x30\x03\x02\x01\x01", "longest": bytes(8192),
        "endless": b"\x30\x84\xff\xff\xff\xff" + bytes(8186), "deep": b"\x30\x80" * 4096, "version 4": newer,
        "noise": chance.randbytes(8192), "behind": leaf + b"\x00",
        "an open length": b"\x30\x80" + leaf[4:] + b"\x00\x00",
    }  # fmt: skip
    found |= {f"leaf: {name}": (octets,) for name, octets in garbage.items()}
    found |= {f"extra: {name}": (leaf, octets) for name, octets in garbage.items()}
    found |= {
        "loop": (leaf, leaf, leaf, leaf),
        "crossed": (leaf, alien, other, alien),
        "swapped": (alien, leaf),
    }
    for at in range(0, len(leaf), 3):
        found[f"cut at {at}"] = (leaf[:at],)
        flipped = bytearray(leaf)
        flipped[at] ^= 1 << chance.randrange(8)
        found[f"octet {at} of the leaf"] = (bytes(flipped),)
        found[f"octet {at} of an extra"] = (leaf, bytes(flipped))
    return found


@pytest.mark.parametrize("listed", [False, True], ids=["without a list", "with a revocation list"])
def test_whatever_comes_as_a_chain_is_good_or_refused_in_one_line(folder: Path, listed: bool) -> None:
    """SP-11.18-8: one bad offer must not end the process that reads it."""
    good = offer(folder, "b")
    ours = trust(folder, pki.write_crl(folder, now=NOW) if listed else None)
    taken, said = [], []
    for name, chain in strange_chains(folder).items():
        try:
            partners.verify(replace(good, chain=chain), RUN, TERMS, ours, NOW)
            taken.append(name)
        except FusionMismatch as refused:
            said.append(str(refused))
    assert len(said) > 300
    assert all("\n" not in line and len(line) < 300 for line in said)
    # What is not needed for the chain is ignored where it can be read.
    kinds = {"x25519", "ed25519", "ed448", "dsa", "secp256k1", "rsa", "unknown key", "loop", "crossed"}
    assert kinds <= set(taken)
    assert all(
        name in kinds or (name.startswith("octet ") and name.endswith("of an extra")) for name in taken
    )


def test_whatever_comes_as_a_signature_is_refused(folder: Path) -> None:
    good, ours = offer(folder, "b"), trust(folder)
    chance = random.Random(8)
    strange = [b"", b"\x30\x00", b"\x30\x06\x02\x01\x00\x02\x01\x00", bytes(1024), good.signature + b"\x00"]
    strange += [chance.randbytes(size) for size in (1, 64, 72, 1024)]
    for at in range(len(good.signature)):
        flipped = bytearray(good.signature)
        flipped[at] ^= 1 << chance.randrange(8)
        strange.append(bytes(flipped))
    for signature in strange:
        with pytest.raises(FusionMismatch, match="not signed by it"):
            partners.verify(replace(good, signature=signature), RUN, TERMS, ours, NOW)


def test_moments_at_which_a_certificate_does_not_hold(folder: Path) -> None:
    good, ours = offer(folder, "b"), trust(folder)
    for now in (NOW - timedelta(days=2), NOW - timedelta(days=900)):
        with pytest.raises(FusionMismatch, match="does not hold"):
            partners.verify(good, RUN, TERMS, ours, now)


def test_what_ended_is_told_from_what_is_wrong(folder: Path, tmp_path: Path) -> None:
    """SP-11.18-8: a certificate that held until it ended is another's trouble; everything else is refused as before."""
    good, ours, late = offer(folder, "b"), trust(folder), NOW + timedelta(days=500)
    with pytest.raises(CertificateEnded, match=r"^the certificate of site b has ended since") as ended:
        partners.verify(good, RUN, TERMS, ours, late)
    assert ended.value.retry
    pki.create_ca(tmp_path, "glioma", now=NOW)
    pki.issue(tmp_path, "client", "b", now=NOW)
    gone = x509.load_der_x509_certificate(good.chain[0]).serial_number
    revokes = listed(folder, late, gone=gone)
    for wrong, judge, words in (
        (replace(good, public=bytes([7]) * 32), ours, "is not signed by it"),
        (offer(folder, "b", run=bytes(16)), ours, "is not signed by it"),
        (offer(folder, "b", keys=KEYS["b"]._replace(training=bytes(32))), ours, "small order"),
        (offer(folder, "b", keys=KEYS["b"]._replace(service=bytes(32))), ours, "small order"),
        (offer(tmp_path, "b"), ours, "does not hold"),
        (good, replace(ours, partners=frozenset("a")), "is not among our partners"),
        (good, replace(ours, revocations=revocation_lists(revokes)), "has been revoked"),
        (good, replace(ours, revocations=revocation_lists(listed(folder, NOW))), "cannot be checked"),
    ):
        with pytest.raises((FusionMismatch, PolicyRefused), match=words):
            partners.verify(wrong, RUN, TERMS, judge, late)


def test_a_statement_counts_while_its_certificate_is_valid(folder: Path) -> None:
    key, chain = (folder / "b.key").read_bytes(), (folder / "b.crt").read_bytes()
    signature, shown = partners.signed_statement(key, chain, lambda uri: b"label" + uri.encode())
    ours = trust(folder)

    def checked(now: datetime) -> str:
        return partners.check_statement(shown, signature, lambda uri: b"label" + uri.encode(), ours, now).site

    assert checked(NOW) == "b"
    with pytest.raises(IdentityError, match="it has ended"):
        checked(NOW + timedelta(days=500))


def test_a_key_that_everybody_can_use_is_refused(folder: Path) -> None:
    """SP-11.18-8: the coordinator, which has no key of its own, sees it too."""
    for point in (bytes(32), b"\x01" + bytes(31)):
        with pytest.raises(FusionMismatch, match="site b is a point of small order"):
            partners.verify(
                offer(folder, "b", keys=KEYS["b"]._replace(training=point)), RUN, TERMS, trust(folder), NOW
            )


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
