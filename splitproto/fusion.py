"""Secure fusion (SP-11.18): integers whose masks cancel in the sum over all sites, so that only the sum can be read.

A site rounds its values to integers and adds, for each partner, words of a keystream that only the two of them know;
the partner subtracts the same words. How partners prove their keys is in `partners.py`. Keys are arguments: there is no
chance, clock or file here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass, field, replace

import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from . import codec
from .errors import FusionMismatch, SchemaMismatch, SiteFailed, TensorError
from .records import Fusion
from .tensors import DTYPES, Array, wire_view

SECRET_BYTES = 32
"""Size of each of a site's two X25519 keys, made for one run and kept with it (SP-11.18-5)."""
CHECK = "check"
"""Name of the tensor of check words."""
CHECK_WORDS = 8
"""For each level: with 16 bits, masks that do not cancel pass once in 2^128."""
BEGINNING = bytes(32)
"""History before step 1."""
LOWEST_RANGE, HIGHEST_RANGE = 2.0**-20, 2.0**20
MOST_EPOCHS = 1 << 14
"""Epochs of the service that one `settled` may pass over: each costs an HKDF for every partner (SP-11.18-18)."""
_LABEL = b"splitproto-1 fusion mask"
_EPOCH = b"splitproto-1 fusion epoch"


# --- integers -------------------------------------------------------------------------------------------


def check_terms(terms: Fusion) -> None:
    """SP-11.18-1. Raises SchemaMismatch: terms that nobody can keep to."""
    if terms.bits not in (16, 32):
        raise SchemaMismatch(f"fusion: words of {terms.bits} bits: 16 and 32 are possible")
    if not LOWEST_RANGE <= terms.range <= HIGHEST_RANGE:
        raise SchemaMismatch(f"fusion: range {terms.range:g} is not from 2^-20 to 2^20")


def dtype_of(terms: Fusion) -> str:
    """Dtype of the words on the wire: i16 or i32."""
    return f"i{terms.bits}"


def greatest(terms: Fusion) -> int:
    """SP-11.18-3: largest integer of one site; the sum of all parties cannot wrap."""
    return ((1 << terms.bits - 1) - 1) // terms.parties


def quantise(values: Array, terms: Fusion) -> tuple[Array, int]:
    """Floats as integers (SP-11.18-3), and how many were out of range and clipped.

    Args:
        values: f32 or f64, any shape.

    Returns:
        i16 or i32, of the same shape.

    Raises:
        TensorError: a value is not finite.
    """
    exact = np.asarray(values, np.float64)
    if not np.isfinite(exact).all():
        raise TensorError("a value to be summed is not finite")
    clipped = int(np.count_nonzero(np.abs(exact) > terms.range))
    scale = greatest(terms) / terms.range
    words = np.rint(np.clip(exact, -terms.range, terms.range) * scale)
    return words.astype(DTYPES[dtype_of(terms)]), clipped


def restore(total: Array, terms: Fusion) -> Array:
    """The sum as floats (SP-11.18-4): i16 or i32 -> f32, of the same shape."""
    return (total.astype(np.float64) / (greatest(terms) / terms.range)).astype(np.float32)


def add_up(parts: Sequence[Array]) -> Array:
    """The sum of all sites' words, modulo 2^16 or 2^32.

    Args:
        parts: i16 or i32, of one shape and dtype.
    """
    total = np.zeros(parts[0].shape, _unsigned(parts[0].dtype))
    for part in parts:
        total += part.view(_unsigned(part.dtype))
    return total.view(parts[0].dtype)


def summed(parts: Sequence[Mapping[str, Array]], terms: Fusion) -> dict[str, Array]:
    """The sum of each level over all sites as the coordinator reads it, f32 of the same shape.

    Args:
        parts: of each site, its words by level, of equal shapes and dtypes, masked or not; check words do not matter.
    """
    return {
        level: restore(add_up([one[level] for one in parts]), terms) for level in parts[0] if level != CHECK
    }


def _unsigned(dtype: np.dtype[np.generic]) -> np.dtype[np.generic]:
    return np.dtype(f"<u{dtype.itemsize}")


# --- masks ----------------------------------------------------------------------------------------------


def public_of(secret: bytes) -> bytes:
    """The X25519 public key of 32 secret octets."""
    return X25519PrivateKey.from_private_bytes(secret).public_key().public_bytes_raw()


def follow(history: bytes, step: int, batch: bytes, gradients: Mapping[str, Array]) -> bytes:
    """SP-11.18-12: the history after `step` was applied.

    Args:
        batch: the digest of the step's `forward`.
        gradients: by name, in the order of the message.
    """
    found = hashlib.sha256(history + step.to_bytes(8, "big") + batch)
    for name, tensor in gradients.items():
        found.update(len(name.encode()).to_bytes(1, "big") + name.encode())
        found.update(wire_view(tensor))
    return found.digest()


@dataclass(frozen=True, slots=True)
class Asked:
    """What is asked of all sites at once: one batch, under the weights that a history has led to."""

    mode: str
    step: int
    batch: int
    digest: bytes
    history: bytes = BEGINNING


@dataclass(frozen=True)
class Masking:
    """The masks of one site in one run: of its training, or of one epoch of its service."""

    run: bytes
    site: str
    public: bytes
    """The site's own public key."""
    partners: Mapping[str, bytes]
    """Name of each other site -> its public key."""
    shared: Mapping[str, bytes] = field(repr=False)
    """Name of each other site -> 32 octets that only the two know."""

    @classmethod
    def agreed(cls, run: bytes, site: str, secret: bytes, partners: Mapping[str, bytes]) -> Masking:
        """By X25519, from this site's secret.

        Raises:
            FusionMismatch: a partner's key is no key.
        """
        shared = {name: _agreed(secret, name, key) for name, key in partners.items()}
        return cls(run, site, public_of(secret), dict(partners), shared)

    def following(self, epoch: int) -> Masking:
        """SP-11.18-17: the masks of `epoch`, where these are those of the epoch before it (of epoch 1: as `agreed`
        yields them from the keys of the service). There is no way back."""
        shared = {}
        for partner, before in self.shared.items():
            info = _EPOCH + codec.encode([*self._pair(partner), epoch])
            shared[partner] = HKDF(SHA256(), 32, self.run, info).derive(before)
        return replace(self, shared=shared)

    def key(self, partner: str, question: Asked, level: str) -> bytes:
        """SP-11.18-10: the key that this site and `partner` use for one level of one answer."""
        asked = [question.mode, question.step, question.batch, question.digest, question.history, level]
        info = _LABEL + codec.encode([*self._pair(partner), *asked])
        return HKDF(SHA256(), 32, self.run, info).derive(self.shared[partner])

    def _pair(self, partner: str) -> list[str | bytes]:
        """Names and public keys of this site and a partner, in the order of the names."""
        own, other = (self.site, self.public), (partner, self.partners[partner])
        (first, first_key), (second, second_key) = sorted((own, other))
        return [first, second, first_key, second_key]

    def conceal(self, question: Asked, level: str, words: Array) -> tuple[Array, Array]:
        """SP-11.18-11: words of a level plus masks, and its check words: zeros plus masks.

        Args:
            words: i16 or i32, any shape.

        Returns:
            The same dtype and shape; the same dtype, [CHECK_WORDS].
        """
        unsigned = _unsigned(words.dtype)
        plain = np.concatenate([words.reshape(-1), np.zeros(CHECK_WORDS, words.dtype)]).view(unsigned)
        for partner in sorted(self.partners):
            stream = keystream(self.key(partner, question, level), plain.nbytes).view(unsigned)
            # "the site whose name sorts first adds, the other subtracts"
            if self.site < partner:
                plain += stream
            else:
                plain -= stream
        concealed = plain.view(words.dtype)
        return concealed[:-CHECK_WORDS].reshape(words.shape), concealed[-CHECK_WORDS:]


def _agreed(secret: bytes, partner: str, public: bytes) -> bytes:
    try:
        peer = X25519PublicKey.from_public_bytes(public)
        return X25519PrivateKey.from_private_bytes(secret).exchange(peer)
    except ValueError:
        # RFC 7748, section 6.1: a point of small order gives zero, which everybody knows.
        raise FusionMismatch(f"the key of partner {partner} is not usable") from None


def keystream(key: bytes, octets: int) -> Array:
    """ChaCha20 with counter and nonce zero: u8 [octets]."""
    cipher = Cipher(algorithms.ChaCha20(key, bytes(16)), mode=None).encryptor()
    return np.frombuffer(cipher.update(bytes(octets)), np.uint8)


def answer_digest(tensors: Mapping[str, Array]) -> str:
    """SHA-256 of the octets of an answer's tensors, in their order, in hexadecimal."""
    digest = hashlib.sha256()
    for tensor in tensors.values():
        digest.update(wire_view(tensor))
    return digest.hexdigest()


class Given:
    """SP-11.18-13: the answers that a site has given in a run, so that no question gets a second one.

    Args:
        kept: question -> answer of an earlier process, as `record` had them kept.
    """

    def __init__(self, kept: Mapping[str, str] | None = None) -> None:
        self._kept = dict(kept or {})

    def record(self, question: Asked, tensors: Mapping[str, Array], keep: Callable[[str, str], None]) -> None:
        """These tensors are about to be sent, or what masks make of them.

        Args:
            keep: called with question and answer, both hexadecimal, if they were not sent before. Once it returns, no
                loss of power undoes them; what it raises is raised here, and the question counts as not answered.

        Raises:
            SiteFailed: something else was sent then.
        """
        asked = hashlib.sha256(codec.encode(list(astuple(question)))).hexdigest()
        answer, given = answer_digest(tensors), self._kept.get(asked)
        if given is None:
            keep(asked, answer)
            self._kept[asked] = answer
        elif given != answer:
            raise SiteFailed(
                f"the answer to {question.mode} {question.step}, batch {question.batch}, is not the one that was given "
                "before, and a second one would show what the masks hide: was the site's network or machine changed?"
            )


# --- messages -------------------------------------------------------------------------------------------


def rounded(levels: Mapping[str, Array], terms: Fusion) -> tuple[dict[str, Array], int]:
    """Each level as integers, and how many values were clipped. Raises TensorError.

    Args:
        levels: f32 [samples, channels, *space] by name, in the job's order.
    """
    found = {level: quantise(values, terms) for level, values in levels.items()}
    return {level: words for level, (words, _) in found.items()}, sum(
        outside for _, outside in found.values()
    )


def masked(masks: Masking, question: Asked, words: Mapping[str, Array]) -> dict[str, Array]:
    """The tensors of `activations` (SP-11.18-2), of integers by level."""
    tensors, checks = dict[str, Array](), list[Array]()
    for level, plain in words.items():
        tensors[level], check = masks.conceal(question, level, plain)
        checks.append(check)
    return {**tensors, CHECK: np.stack(checks)}


def answer(
    masks: Masking, question: Asked, levels: Mapping[str, Array], terms: Fusion
) -> tuple[dict[str, Array], int]:
    """See `rounded` and `masked`."""
    words, clipped = rounded(levels, terms)
    return masked(masks, question, words), clipped


def totals(answers: Mapping[str, Mapping[str, Array]], terms: Fusion) -> dict[str, Array]:
    """What the coordinator reads: the sum of each level over all sites, f32 [samples, channels, *space].

    Args:
        answers: by site, the tensors that it sent for one question; shapes and dtypes are checked.

    Raises:
        FusionMismatch: a site is missing, or the masks do not cancel.
    """
    if len(answers) != terms.parties:
        raise FusionMismatch(f"the sum of {len(answers)} sites was asked for, it needs {terms.parties}")
    # SP-11.18-14: "MUST NOT be used"
    if add_up([one[CHECK] for one in answers.values()]).any():
        raise FusionMismatch(f"the masks of {', '.join(sorted(answers))} do not cancel")
    return summed([*answers.values()], terms)
