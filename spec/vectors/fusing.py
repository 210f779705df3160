"""Cases of SP-11.18: secure fusion. Computed from the words of the specification; the library only packs octets."""

from __future__ import annotations

import hashlib
import hmac
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import timedelta
from functools import cache
from typing import Any

import numpy as np
from certificates import CA, FEDERATION, NOW, OTHER, ROOT, ROOT_KEY, Plan, crl
from common import RUN, Case, refused
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms

from splitproto import codec

SITES = ("a", "b", "c")
SECRETS = {
    site: bytes(range(start, start + 32)) for site, start in zip(SITES, (0x01, 0x41, 0x81), strict=True)
}
SERVICE = {
    site: bytes(range(start, start + 32)) for site, start in zip(SITES, (0x21, 0x61, 0xA1), strict=True)
}
"""Of the keys of the service."""
ASKED: dict[str, Any] = {
    "mode": "train",
    "step": 7,
    "batch": 0,
    "digest": hashlib.sha256(b"a batch").hexdigest(),
    "history": hashlib.sha256(b"a history").hexdigest(),
}
TERMS: dict[str, Any] = {"bits": 16, "range": 4.0, "parties": 3}
LEVELS = ["x0", "x4"]
AGREED: dict[str, Any] = {
    "name": "brats", "dimensions": 2, "network": "basic-unet", "settings": [{"name": "features", "values": [2, 1]}],
    "cut": [{"name": "x0", "channels": 2, "stride": [1, 1]}, {"name": "x4", "channels": 1, "stride": [16, 16]}],
    "levels": [0, 1], "precision": "f32", "window": [96, 96], "spacing": [], "augment": False, "batch": 1, "steps": 10,
    "optimiser": "adam", "learning_rate": 0.005, "weight_decay": 0.0, "schedule": "one-cycle",
    "seconds_per_step": 120.0, "fusion": TERMS,
}  # fmt: skip
"""A job as `job-offer` has it, its fields in the order of their table."""
MISMATCH = refused("fusion-mismatch", "semantics")
REVOKED = 0x3003
FIELD = 2**255 - 19
SMALL = {
    "zero": 0,
    "one": 1,
    "minus-one": FIELD - 1,
    "eighth": 0x00B8495F16056286FDB1329CEB8D09DA6AC49FF1FAE35616AEB8413B7C7AEBE0,
    "other-eighth": 0x57119FD0DD4E22D8868E1C58C45C44045BEF839C55B1D0B1248C50A3BC959C5F,
    "field": FIELD,
    "high-bit": 1 << 255,
}
"""Points of small order: they yield zeros with every secret (RFC 7748, section 6.1)."""


# --- as the specification says it -------------------------------------------------------------------------


def hkdf(secret: bytes, salt: bytes, info: bytes) -> bytes:
    """RFC 5869 with SHA-256, 32 octets."""
    extracted = hmac.digest(salt, secret, "sha256")
    return hmac.digest(extracted, info + b"\x01", "sha256")


def public(secret: bytes) -> bytes:
    """X25519."""
    return X25519PrivateKey.from_private_bytes(secret).public_key().public_bytes_raw()


@cache
def shared(secret: bytes, peer: bytes) -> bytes:
    """X25519."""
    return X25519PrivateKey.from_private_bytes(secret).exchange(X25519PublicKey.from_public_bytes(peer))


def names(site: str, partner: str, secrets: Mapping[str, bytes]) -> list[Any]:
    """Two sites and their public keys, as they begin each array."""
    first, second = sorted((site, partner))
    return [first, second, public(secrets[first]), public(secrets[second])]


def of_epoch(site: str, partner: str, epoch: int, run: bytes = RUN) -> bytes:
    """SP-11.18-17: what the two share in an epoch of the service."""
    found = shared(SERVICE[site], public(SERVICE[partner]))
    for number in range(1, epoch + 1):
        info = b"splitproto-1 fusion epoch" + codec.encode([*names(site, partner, SERVICE), number])
        found = hkdf(found, run, info)
    return found


def key(
    site: str, partner: str, level: str, asked: dict[str, Any], run: bytes = RUN, epoch: int = 0
) -> bytes:
    """SP-11.18-10; of an epoch of the service, SP-11.18-17."""
    question: list[Any] = [asked["mode"], asked["step"], asked["batch"]]
    question += [bytes.fromhex(asked["digest"]), bytes.fromhex(asked["history"]), level]
    secrets = SERVICE if epoch else SECRETS
    info = b"splitproto-1 fusion mask" + codec.encode(names(site, partner, secrets) + question)
    between = (
        of_epoch(site, partner, epoch, run) if epoch else shared(SECRETS[site], public(SECRETS[partner]))
    )
    return hkdf(between, run, info)


def mask(site: str, level: str, words: Sequence[int], bits: int, asked: dict[str, Any]) -> list[int]:
    """SP-11.18-11: words and check words, masked, from 0 to 2^bits - 1."""
    plain = [*words, *([0] * 8)]
    size = bits // 8
    for partner in SITES:
        if partner != site:
            cipher = Cipher(
                algorithms.ChaCha20(key(site, partner, level, asked), bytes(16)), None
            ).encryptor()
            stream = cipher.update(bytes(len(plain) * size))
            sign = 1 if site < partner else -1
            plain = [
                (word + sign * int.from_bytes(stream[n * size :][:size], "little")) % (1 << bits)
                for n, word in enumerate(plain)
            ]
    return plain


def packed(words: Sequence[int], bits: int) -> str:
    """Little-endian octets of words, signed or not."""
    return b"".join((word % (1 << bits)).to_bytes(bits // 8, "little") for word in words).hex()


def terms_digest(agreed: dict[str, Any]) -> bytes:
    """SP-11.18-6."""
    return hashlib.sha256(codec.encode(agreed)).digest()


def follow(history: bytes, step: int, batch: bytes, tensors: Mapping[str, bytes]) -> bytes:
    """SP-11.18-12."""
    named = b"".join(bytes([len(name)]) + name.encode() + octets for name, octets in tensors.items())
    return hashlib.sha256(history + step.to_bytes(8, "big") + batch + named).digest()


def scale(terms: dict[str, Any]) -> float:
    """SP-11.18-3."""
    return float(((1 << terms["bits"] - 1) - 1) // terms["parties"] / terms["range"])


# --- cases --------------------------------------------------------------------------------------------------


def fusion() -> Iterator[Case]:
    """Integers, keys, masks, sums and the proof of keys."""
    yield from integers()
    yield from schedule()
    yield from sums()
    yield from offers()


def integers() -> Iterator[Case]:
    """Terms; floats to integers and back."""
    for name, changed, notes in (
        ("bits-24", {"bits": 24}, "16 or 32"),
        ("range-zero", {"range": 0.0}, "2^-20 at least"),
        ("range-large", {"range": 2.0**21}, "2^20 at most"),
    ):
        terms = {**TERMS, **changed}
        yield {
            "name": name, "operation": "terms", "notes": f"SP-11.18-1: {notes}", "terms": terms,
            "expect": refused("schema-mismatch", "semantics"),
        }  # fmt: skip
    yield {
        "name": "terms", "operation": "terms", "notes": "SP-11.18-1, SP-11.18-6", "terms": TERMS,
        "job": codec.encode(AGREED).hex(), "expect": {"sha256": terms_digest(AGREED).hex()},
    }  # fmt: skip

    values = [0.0, -0.0, 1.0, -1.0, 0.5, 3.999, 4.0, -4.0, 4.5, -1e30, 1e-9, 0.1]
    for terms in (TERMS, {**TERMS, "bits": 32}, {**TERMS, "parties": 4, "range": 0.3}):
        floats = np.array(values, "<f4")
        clipped = [min(max(float(value), -terms["range"]), terms["range"]) for value in floats]
        words = [round(value * scale(terms)) for value in clipped]  # Python rounds ties to even
        outside = sum(abs(float(value)) > terms["range"] for value in floats)
        name = f"quantise-{terms['bits']}-{terms['parties']}"
        yield {
            "name": name, "operation": "quantise", "notes": "SP-11.18-3", "terms": terms,
            "values": floats.tobytes().hex(), "expect": {"words": packed(words, terms["bits"]), "clipped": outside},
        }  # fmt: skip
    tie = {**TERMS, "range": 10922 / 2}  # a scale of 2
    halves = np.array([0.25, 0.75, -0.25, -0.75, 1.25], "<f4")
    yield {
        "name": "quantise-ties", "operation": "quantise", "notes": "SP-11.18-3: ties to even", "terms": tie,
        "values": halves.tobytes().hex(), "expect": {"words": packed([0, 2, 0, -2, 2], 16), "clipped": 0},
    }  # fmt: skip
    for name, wrong in (("nan", math.nan), ("infinite", math.inf)):
        yield {
            "name": f"quantise-{name}", "operation": "quantise", "notes": "SP-11.18-3", "terms": TERMS,
            "values": np.array([wrong], "<f4").tobytes().hex(), "expect": refused("tensor", "tensors"),
        }  # fmt: skip
    totals = [0, 1, -1, 10922, -32766, 32766]
    floats = np.array([total / scale(TERMS) for total in totals]).astype("<f4")
    yield {
        "name": "restore", "operation": "restore", "notes": "SP-11.18-4", "terms": TERMS,
        "words": packed(totals, 16), "expect": {"values": floats.tobytes().hex()},
    }  # fmt: skip


def schedule() -> Iterator[Case]:
    """History, keys and masks."""
    tensors = [np.array([[1.0, -2.0], [0.5, 0.0]], "<f4").tobytes(), np.array([3.0], "<f4").tobytes()]
    begun, batch, other = bytes(32), bytes.fromhex(ASKED["digest"]), hashlib.sha256(b"another batch").digest()
    both = dict(zip(LEVELS, tensors, strict=True))
    cut = {"x0": tensors[0][:4], "x4": tensors[0][4:] + tensors[1]}
    for name, notes, before, step, of, gradients in (
        ("first", "", begun, 1, batch, both),
        ("next", "", bytes.fromhex(ASKED["history"]), 8, batch, {"x4": tensors[1]}),
        ("other-batch", ": other samples give other weights", begun, 1, other, both),
        ("other-tensors", ": the same octets, cut elsewhere", begun, 1, batch, cut),
    ):
        yield {
            "name": f"history-{name}", "operation": "history", "notes": f"SP-11.18-12{notes}", "history": before.hex(),
            "step": step, "digest": of.hex(),
            "gradients": [{"name": key, "octets": octets.hex()} for key, octets in gradients.items()],
            "expect": {"history": follow(before, step, of, gradients).hex()},
        }  # fmt: skip
    for site, partner, level, changed, notes in (
        ("a", "b", "x0", {}, "of the site that adds"),
        ("b", "a", "x0", {}, "of the one that subtracts: the same"),
        ("a", "c", "x0", {}, "another partner"),
        ("a", "b", "x4", {}, "another level"),
        ("a", "b", "x0", {"mode": "evaluate"}, "another mode"),
        ("a", "b", "x0", {"step": 8}, "another step"),
        ("a", "b", "x0", {"batch": 1}, "another batch"),
        ("a", "b", "x0", {"digest": bytes(32).hex()}, "other samples"),
        ("a", "b", "x0", {"history": bytes(32).hex()}, "other gradients before it"),
    ):
        asked = {**ASKED, **changed}
        yield {
            "name": "-".join(["key", site, partner, level, *changed]), "operation": "key",
            "notes": f"SP-11.18-10: {notes}", "run": RUN.hex(), "site": site, "secret": SECRETS[site].hex(),
            "partner": partner, "public": public(SECRETS[partner]).hex(), "question": asked, "level": level,
            "expect": {"key": key(site, partner, level, asked).hex(), "public": public(SECRETS[site]).hex()},
        }  # fmt: skip
    yield from epochs()
    yield {
        "name": "key-of-nobody", "operation": "key", "notes": "SP-11.18-8: a point of small order", "run": RUN.hex(),
        "site": "a", "secret": SECRETS["a"].hex(), "partner": "b", "public": bytes(32).hex(), "question": ASKED,
        "level": "x0", "expect": MISMATCH,
    }  # fmt: skip
    for bits in (16, 32):
        for site in SITES:
            words = [0, 1, -1, (1 << bits - 1) - 1, -(1 << bits - 1)]
            masked = mask(site, "x0", words, bits, ASKED)
            others = {partner: public(SECRETS[partner]).hex() for partner in SITES if partner != site}
            yield {
                "name": f"mask-{bits}-{site}", "operation": "mask", "notes": "SP-11.18-11", "run": RUN.hex(),
                "site": site, "secret": SECRETS[site].hex(), "partners": others, "question": ASKED, "level": "x0",
                "bits": bits, "words": packed(words, bits),
                "expect": {"words": packed(masked[:-8], bits), "check": packed(masked[-8:], bits)},
            }  # fmt: skip


def epochs() -> Iterator[Case]:
    """Keys of the service, from those that the sites agree on."""
    asked = {**ASKED, "mode": "infer"}
    for site, partner, epoch, notes in (
        ("a", "b", 1, "the first"),
        ("b", "a", 1, "the first, at the other site"),
        ("a", "b", 2, "of the first alone"),
        ("a", "c", 3, "one after the other"),
    ):
        yield {
            "name": f"epoch-{site}-{partner}-{epoch}", "operation": "epoch", "notes": f"SP-11.18-17: {notes}",
            "run": RUN.hex(), "site": site, "secret": SERVICE[site].hex(), "partner": partner,
            "public": public(SERVICE[partner]).hex(), "epoch": epoch, "question": asked, "level": "x0",
            "expect": {
                "shared": of_epoch(site, partner, epoch).hex(),
                "key": key(site, partner, "x0", asked, epoch=epoch).hex(),
            },
        }  # fmt: skip


def sums() -> Iterator[Case]:
    """What three sites send for one batch -> what can be read."""
    plain = {
        "a": ([100, -5, 0, 7], [1, 2]),
        "b": ([-300, 5, 0, 1], [10, -20]),
        "c": ([1, 10922, -10922, 0], [0, 5]),
    }

    def answers(**asked: dict[str, Any]) -> dict[str, dict[str, str]]:
        found = {}
        for site, levels in plain.items():
            masked = [
                mask(site, level, words, 16, asked.get(site, ASKED))
                for level, words in zip(LEVELS, levels, strict=True)
            ]
            named = {level: packed(words[:-8], 16) for level, words in zip(LEVELS, masked, strict=True)}
            found[site] = {**named, "check": "".join(packed(words[-8:], 16) for words in masked)}
        return found

    totals = [[sum(of[n][place] for of in plain.values()) for place in range((4, 2)[n])] for n in range(2)]
    read = [
        np.array([word / scale(TERMS) for word in words]).astype("<f4").tobytes().hex() for words in totals
    ]
    good = answers()
    about = {"operation": "sum", "terms": TERMS}
    shown = dict(zip(LEVELS, read, strict=True))
    yield {"name": "sum", "notes": "SP-11.18-4", **about, "answers": good, "expect": {"values": shown}}
    two = {site: good[site] for site in ("a", "b")}
    yield {
        "name": "sum-of-two",
        "notes": "SP-11.18-14: a site is missing",
        **about,
        "answers": two,
        "expect": MISMATCH,
    }
    for name, changed, notes in (
        ("other-batch", {"digest": bytes(32).hex()}, "one site was asked about other samples"),
        ("other-history", {"history": bytes(32).hex()}, "one site had other gradients"),
        ("other-step", {"step": 8}, "one site answered another step"),
    ):
        wrong = answers(b={**ASKED, **changed})
        yield {"name": name, "notes": f"SP-11.18-14: {notes}", **about, "answers": wrong, "expect": MISMATCH}


def leaf_key(site: str) -> ec.EllipticCurvePrivateKey:
    """Of a site's certificate: known to everybody, for tests only."""
    scalar = int.from_bytes(hashlib.sha256(f"splitproto test site {site}".encode()).digest(), "big")
    return ec.derive_private_key(scalar, ec.SECP256R1())


def certificate(site: str, **changed: Any) -> bytes:
    """DER."""
    plan = Plan(key=leaf_key(site), uris=(f"spiffe://glioma/splitproto/client/{site}",), **changed)  # type: ignore[arg-type]
    return x509.load_pem_x509_certificate(plan.pem().encode()).public_bytes(serialization.Encoding.DER)


def signature(
    site: str, run: bytes, terms: bytes, shown: bytes, uri: str = "", service: bytes = b""
) -> bytes:
    """SP-11.18-6, with the nonce of RFC 6979, so that it is the same every time."""
    named = uri or f"spiffe://{FEDERATION}/splitproto/client/{site}"
    both = [shown, service or public(SERVICE["b"])]
    signed = b"splitproto-1 fusion key" + codec.encode([named, run, terms, *both])
    return leaf_key(site).sign(signed, ec.ECDSA(hashes.SHA256(), deterministic_signing=True))


def outdated_lists(case: Callable[..., Case], shown: bytes, revoked: bytes) -> Iterator[Case]:
    """What is past its nextUpdate vouches for nobody, and still revokes."""
    past, mine = replace_year(NOW), {"site": "b", "public": shown.hex()}
    outdated, fresh = crl(REVOKED, since=past, until=past + timedelta(days=9)), past + timedelta(days=10)
    yield case("offer-outdated-list", "SP-11.18-8", MISMATCH, outdated)
    yield case("offer-outdated-newer-list", "SP-11.18-8: of another certificate", mine, crl() + outdated)
    yield case(
        "offer-revoked-by-outdated-list", "SP-11.18-8: it is newer than the one in force", MISMATCH, crl() + outdated,
        chain=[revoked],
    )  # fmt: skip
    yield case(
        "offer-no-longer-revoked", "SP-11.18-8: by a list that is newer still", mine, outdated + crl(since=fresh),
        chain=[revoked],
    )  # fmt: skip


def offers() -> Iterator[Case]:
    """A key offer -> whose it is, or why it is refused."""
    terms, shown = terms_digest(AGREED), public(SECRETS["b"])
    own = [certificate("b")]
    good: dict[str, Any] = {
        "public": shown, "service": public(SERVICE["b"]), "signature": signature("b", RUN, terms, shown), "chain": own,
    }  # fmt: skip

    def case(name: str, notes: str, expect: Any, revoked: str = "", **changed: Any) -> Case:
        offer = {**good, **changed}
        listed = {field: offer[field].hex() for field in ("public", "service", "signature")}
        chain = [der.hex() for der in offer["chain"]]
        more = {"crl": revoked} if revoked else {}
        return {
            "name": name, "operation": "offer", "notes": notes, "run": RUN.hex(), "terms": terms.hex(),
            "now": NOW.isoformat(), "federation": FEDERATION, "ca": CA.pem(), **more, "partners": ["b", "c"],
            "offer": {**listed, "chain": chain}, "expect": expect,
        }  # fmt: skip

    yield case("offer", "SP-11.18-6", {"site": "b", "public": shown.hex()})
    yield case("offer-not-revoked", "SP-11.18-8", {"site": "b", "public": shown.hex()}, crl(REVOKED))
    other = public(SECRETS["c"])
    yield case("offer-other-key", "SP-11.18-8: the coordinator put another key in", MISMATCH, public=other)
    yield case(
        "offer-other-service-key", "SP-11.18-6: the coordinator put another key in", MISMATCH,
        service=public(SERVICE["c"]),
    )  # fmt: skip
    replayed = signature("b", RUN[::-1], terms, shown)
    yield case("offer-other-run", "SP-11.18-6: of another run", MISMATCH, signature=replayed)
    lesser = signature("b", RUN, terms_digest({**AGREED, "fusion": {**TERMS, "parties": 2}}), shown)
    yield case("offer-other-terms", "SP-11.18-6: for a sum of two sites", MISMATCH, signature=lesser)
    coarser = signature("b", RUN, terms_digest({**AGREED, "spacing": [8.0, 8.0, 8.0]}), shown)
    yield case("offer-other-job", "SP-11.18-6: for images on a coarser grid", MISMATCH, signature=coarser)
    named = signature("b", RUN, terms, shown, f"spiffe://{FEDERATION}/splitproto/client/c")
    yield case("offer-other-name", "SP-11.18-6: signed under another name", MISMATCH, signature=named)
    forged = signature("c", RUN, terms, shown, f"spiffe://{FEDERATION}/splitproto/client/b")
    yield case(
        "offer-forged", "SP-11.18-8: not signed with the certificate's key", MISMATCH, signature=forged
    )
    yield case("offer-unsigned", "SP-11.18-8", MISMATCH, signature=b"")
    yield case("offer-other-ca", "SP-11.18-8", MISMATCH, chain=[certificate("b", by=OTHER)])
    revoked = certificate("b", serial=REVOKED)
    yield case("offer-revoked", "SP-11.18-8", MISMATCH, crl(REVOKED), chain=[revoked])
    yield from outdated_lists(case, shown, revoked)
    over = replace_year(NOW)
    ended, policy = refused("certificate-ended", "semantics"), refused("policy-refused", "semantics")
    yield case(
        "offer-expired", "SP-11.18-8: nothing else is wrong", ended, chain=[certificate("b", end=over)]
    )
    stranger: Case = {"signature": signature("d", RUN, terms, shown), "chain": [certificate("d", end=over)]}
    for name, expect, listed, changed in (
        ("other-key", MISMATCH, "", {"public": other}),
        ("other-run", MISMATCH, "", {"signature": replayed}),
        ("other-ca", MISMATCH, "", {"chain": [certificate("b", by=OTHER, end=over)]}),
        ("revoked", MISMATCH, crl(REVOKED), {"chain": [certificate("b", serial=REVOKED, end=over)]}),
        ("stranger", policy, "", stranger),
    ):  # fmt: skip
        of_it: dict[str, Any] = {"chain": [certificate("b", end=over)], **changed}
        yield case(f"offer-expired-{name}", "SP-11.18-8: what else is wrong counts", expect, listed, **of_it)
    yield case(
        "offer-not-yet-valid", "SP-11.18-8", MISMATCH, chain=[certificate("b", start=replace_year(NOW, 1))]
    )
    nothing = b"\x30\x03\x02\x01\x01"
    yield case("offer-no-certificate", "SP-11.18-8", MISMATCH, chain=[nothing])
    yield case("offer-surplus-garbage", "SP-11.18-8: cannot be read", MISMATCH, chain=[*own, nothing])
    other_site = certificate("c")
    mine = {"site": "b", "public": shown.hex()}
    yield case("offer-surplus", "SP-11.18-8: ignored", mine, crl(REVOKED), chain=[*own, other_site, *own])
    lookalike = cannot_sign()
    yield case(
        "offer-surplus-of-another-kind", "SP-11.18-8: the name of the CA over a key that signs nothing: ignored", mine,
        crl(REVOKED), chain=[*own, lookalike],
    )  # fmt: skip
    newer = own[0].replace(b"\xa0\x03\x02\x01\x02", b"\xa0\x03\x02\x01\x03", 1)
    yield case("offer-version-4", "SP-11.18-8: a version that X.509 lacks", MISMATCH, chain=[newer])
    for which, number in SMALL.items():
        point = number.to_bytes(32, "little")
        signed = signature("b", RUN, terms, point)
        yield case(
            f"offer-small-order-{which}", "SP-11.18-8: X25519 yields zeros", MISMATCH, public=point, signature=signed
        )  # fmt: skip
    zero = bytes(32)
    signed = signature("b", RUN, terms, shown, service=zero)
    yield case(
        "offer-small-order-service",
        "SP-11.18-8: X25519 yields zeros",
        MISMATCH,
        service=zero,
        signature=signed,
    )
    stranger = {"signature": signature("d", RUN, terms, shown), "chain": [certificate("d")]}
    yield case("offer-stranger", "SP-11.18-8: no partner", refused("policy-refused", "semantics"), **stranger)
    for name, uri in (
        ("role", "glioma/splitproto/coordinator/b"),
        ("federation", "lung/splitproto/client/b"),
    ):
        plan = replace(Plan(key=leaf_key("b")), uris=(f"spiffe://{uri}",))  # type: ignore[arg-type]
        der = x509.load_pem_x509_certificate(plan.pem().encode()).public_bytes(serialization.Encoding.DER)
        signed = signature("b", RUN, terms, shown, f"spiffe://{uri}")
        yield case(f"offer-other-{name}", "SP-11.18-8", MISMATCH, chain=[der], signature=signed)


def replace_year(moment: Any, years: int = -1) -> Any:
    """A year before, or as many later."""
    return moment.replace(year=moment.year + years)


def cannot_sign() -> bytes:
    """A certificate with the subject of the CA and an X25519 key, in DER."""
    key = X25519PrivateKey.from_private_bytes(SECRETS["c"]).public_key()
    builder = x509.CertificateBuilder(ROOT.subject, ROOT.subject, key, 7, NOW, replace_year(NOW, 1))
    return builder.sign(ROOT_KEY, hashes.SHA256()).public_bytes(serialization.Encoding.DER)
