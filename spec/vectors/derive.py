"""Cases of what both sides compute by themselves, from the words of the specification and not by the library."""

from __future__ import annotations

import hashlib
import hmac
import struct
import unicodedata
from collections.abc import Iterator
from typing import Any

import numpy as np
from common import DIALLER, KEY, LISTENER, OTHER_KEY, SALT, SEED, Case, as_json, refused

from splitproto import codec

SCHEMA = [[f"x{n}", "f32", [1, width, 96 >> n, 96 >> n]] for n, width in enumerate((32, 32, 64, 128, 256))]
FIRST = [(KEY, (72, 72, 80))]
WHOLE = [(KEY, (0, 0, 0))]


def batch_digest(
    step: int,
    seed: int | None,
    samples: list[tuple[bytes, tuple[int, int, int]]],
    places: list[int] | None = None,
) -> bytes:
    """SP-11.6."""
    octets = b"splitproto batch v1" + step.to_bytes(8, "big")
    octets += b"\0" if seed is None else b"\1" + seed.to_bytes(8, "big")
    octets += len(samples).to_bytes(4, "big")
    for key, origin in samples:
        octets += bytes([len(key)]) + key + struct.pack(">iii", *origin)
    for place in places or ():
        octets += place.to_bytes(4, "big")
    return hashlib.sha256(octets).digest()


def patient_key(salt: bytes, patient: str) -> bytes:
    """SP-11.5-1 and SP-11.5-2."""
    text = unicodedata.normalize("NFC", patient.strip("\t\n\v\f\r ")).encode()
    return hmac.new(salt, b"splitproto patient v1\0" + text, hashlib.sha256).digest()[:16]


def salt_check(salt: bytes) -> bytes:
    """SP-11.5-4."""
    return hmac.new(salt, b"splitproto salt v1\0", hashlib.sha256).digest()[:8]


def schema_digest(described: list[list[Any]]) -> bytes:
    """SP-11.8."""
    return hashlib.sha256(codec.encode(described)).digest()


def binding(dialler: bytes, listener: bytes) -> bytes:
    """SP-6-8."""
    return hashlib.sha256(dialler + listener).digest()


def augmentation(seed: int, index: int, modality: str | None) -> dict[str, Any]:
    """SP-11.7."""
    material = b"splitproto augment v1" + seed.to_bytes(8, "big") + index.to_bytes(4, "big")
    base = hashlib.sha256(material).digest()
    result: dict[str, Any] = {"flips": [bool(base[0] >> axis & 1) for axis in range(3)], "turns": base[1] & 3}
    if modality is not None:
        grey = hashlib.sha256(material + modality.encode()).digest()
        result["scale"] = 0.9 + 0.2 * (grey[2] * 256 + grey[3]) / 65535
        result["shift"] = -0.1 + 0.2 * (grey[4] * 256 + grey[5]) / 65535
    return result


def augmented(image: np.ndarray, plan: dict[str, Any]) -> np.ndarray:
    """SP-11.7 applied to an image [x, y] or [x, y, z] of float32, voxel by voxel."""
    for axis in range(image.ndim):
        if plan["flips"][axis]:
            image = np.take(image, range(image.shape[axis] - 1, -1, -1), axis)
    n = image.shape[0]
    for _ in range(plan["turns"] if image.shape[0] == image.shape[1] else 0):
        image = np.array([[image[j, n - 1 - i] for j in range(n)] for i in range(n)], np.float32)
    if "scale" in plan:
        scale, shift = np.float32(plan["scale"]), np.float32(plan["shift"])
        flat = [x * scale + shift if x != 0 else x for x in image.ravel()]
        image = np.array(flat, np.float32).reshape(image.shape)
    return image


def every_pose() -> Iterator[tuple[int, int]]:
    """A seed and an index for each of the 32 combinations of flips and quarter turns, and each pose's number."""
    found: set[tuple[Any, ...]] = set()
    for seed in range(2000):
        plan = augmentation(seed, 3, None)
        pose = (*plan["flips"], plan["turns"])
        if pose not in found:
            found.add(pose)
            yield seed, sum(flip << axis for axis, flip in enumerate(plan["flips"])) + 8 * plan["turns"]
        if len(found) == 32:
            return


def derivations() -> Iterator[Case]:
    """What both sides compute by themselves and must find equal."""

    def case(operation: str, name: str, notes: str, expect: Any, **inputs: Any) -> Case:
        return {"name": name, "operation": operation, "notes": notes, **inputs, "expect": expect}

    yield case(
        "binding",
        "binding",
        "SP-6-8: the dialler's certificate first",
        {"sha256": binding(DIALLER, LISTENER).hex()},
        dialler=DIALLER.hex(),
        listener=LISTENER.hex(),
    )
    yield case(
        "binding",
        "binding-other-way",
        "SP-6-8: the dialler's first, whichever is the greater number",
        {"sha256": binding(LISTENER, DIALLER).hex()},
        dialler=LISTENER.hex(),
        listener=DIALLER.hex(),
    )
    yield case(
        "binding",
        "binding-swapped",
        "SP-6-8: the order counts",
        refused("binding-mismatch", "channel"),
        dialler=DIALLER.hex(),
        listener=LISTENER.hex(),
        claimed=binding(LISTENER, DIALLER).hex(),
    )

    yield case(
        "schema",
        "schema",
        "SP-11.8: five levels of a slice",
        {"sha256": schema_digest(SCHEMA).hex()},
        descriptors=SCHEMA,
    )
    first = [["x0", "f32", [1, 2]], ["x1", "f32", [3]]]
    yield case("schema", "schema-two", "SP-11.8", {"sha256": schema_digest(first).hex()}, descriptors=first)
    yield case(
        "schema",
        "schema-order",
        "SP-11.8: the order counts",
        refused("schema-mismatch", "semantics"),
        descriptors=first[::-1],
        claimed=schema_digest(first).hex(),
    )

    def batch(
        name: str,
        step: int,
        seed: int | None,
        samples: list[Any],
        notes: str,
        claimed: bytes | None = None,
        places: list[int] | None = None,
    ) -> Case:
        inputs: dict[str, Any] = {"step": step, "seed": as_json(seed)}
        inputs["samples"] = [{"key": key.hex(), "origin": list(origin)} for key, origin in samples]
        if places is not None:
            inputs["places"] = places
        if claimed is not None:
            return case(
                "batch", name, notes, refused("misaligned", "semantics"), **inputs, claimed=claimed.hex()
            )
        return case(
            "batch", name, notes, {"sha256": batch_digest(step, seed, samples, places).hex()}, **inputs
        )

    two = [(KEY, (72, 72, 80)), (OTHER_KEY, (-16, 0, 2147483647))]
    yield batch("batch", 1, SEED, two, "SP-11.6: origins are two's complement")
    yield batch("batch-unseeded", 1, None, two, "SP-11.6: without augmentation")
    yield batch("batch-seed-0", 1, 0, two, "SP-11.6: seed 0 is not the absence of one")
    yield batch("batch-highest", (1 << 53) - 1, (1 << 64) - 1, FIRST, "SP-11.6: the highest step and seed")
    yield batch("batch-swapped", 1, SEED, two[::-1], "SP-11-5: the order counts", batch_digest(1, SEED, two))
    yield batch("batch-other-step", 2, SEED, two, "SP-11-5", batch_digest(1, SEED, two))
    yield batch("batch-places", 1, SEED, two, "SP-11.6: after all samples", places=[0, 3])
    yield batch(
        "batch-places-usual", 1, SEED, two, "SP-11.6: said, though it is the usual ones", places=[0, 1]
    )
    other, notes = batch_digest(1, SEED, two, [0, 2]), "SP-11-5: another place"
    yield batch("batch-other-place", 1, SEED, two, notes, other, places=[0, 3])
    yield batch("batch-places-not-hashed", 1, SEED, two, "SP-11.6", batch_digest(1, SEED, two), places=[0, 1])

    for name, patient, notes in (
        ("patient", "BraTS20_Training_001", "SP-11.5-1"),
        ("patient-accent", "Müller", "SP-11.5-2: composed"),
        ("patient-accent-decomposed", "Mu\u0308ller", "SP-11.5-2: the same key as composed"),
        ("patient-hangul-decomposed", "\u1112\u1161\u11ab", "SP-11.5-2: the key of U+D55C"),
        ("patient-angstrom", "\u212b", "SP-11.5-2: the key of U+00C5, to which NFC maps it"),
        ("patient-ligature", "\ufb01", "SP-11.5-2: NFC, not NFKC: a ligature is not two letters"),
        ("patient-case", "brats20_training_001", "SP-11.5-2: case counts"),
        ("patient-space", "BraTS20_Training_001 ", "SP-11.5-2: the same key as without the space"),
        ("patient-spaces", "\t\n\v\f\r BraTS20_Training_001\r\n", "SP-11.5-2: all that is removed"),
        ("patient-inner-space", "BraTS20 Training 001", "SP-11.5-2: spaces inside count"),
        ("patient-no-break-space", "BraTS20_Training_001\u00a0", "SP-11.5-2: only ASCII is removed"),
        ("patient-zeros", "1", "SP-11.5-2: not the key of 001"),
        ("patient-long", "P" * 200, "SP-11.5-1: longer than a block of SHA-256"),
        ("patient-beyond-16-bits", "P\U0001f600", "SP-11.5-1: four octets of UTF-8"),
    ):
        expect = {"key": patient_key(SALT, patient).hex()}
        yield case("pseudonym", name, notes, expect, salt=SALT.hex(), patient=patient)
    longer = bytes(range(96))
    expect = {"key": patient_key(longer, "P001").hex()}
    yield case(
        "pseudonym", "patient-long-salt", "SP-11.5-1: HMAC hashes a salt of more than 64 octets", expect,
        salt=longer.hex(), patient="P001",
    )  # fmt: skip
    other = patient_key(bytes(32), "BraTS20_Training_001")
    yield case(
        "pseudonym",
        "patient-other-salt",
        "SP-11.5-1: another salt, another key: no patient in common",
        refused("misaligned", "semantics"),
        salt=SALT.hex(),
        patient="BraTS20_Training_001",
        claimed=other.hex(),
    )

    for name, salt, notes in (
        ("salt-check", SALT, "SP-11.5-4"),
        ("salt-check-long", longer, "SP-11.5-4: a salt of 96 octets"),
    ):
        yield case("salt-check", name, notes, {"check": salt_check(salt).hex()}, salt=salt.hex())
    yield case(
        "salt-check",
        "salt-check-other",
        "SP-11.5-4: another salt",
        refused("misaligned", "semantics"),
        salt=SALT.hex(),
        claimed=salt_check(bytes(32)).hex(),
    )
    written = SALT.hex().encode()
    for name, content, notes in (
        ("salt-file", written + b"\n", "SP-11.5-3"),
        ("salt-file-no-newline", written, "SP-11.5-3: the line feed may be missing"),
        ("salt-file-crlf", written + b"\r\n", "SP-11.5-3: white space after the digits"),
        ("salt-file-upper-case", written.upper() + b"\n", "SP-11.5-3: the same salt"),
        ("salt-file-byte-order-mark", b"\xef\xbb\xbf" + written + b"\n", "SP-11.5-3: the mark is skipped"),
    ):
        yield case("salt-file", name, notes, {"salt": SALT.hex()}, content=content.hex())
    yield case(
        "salt-file", "salt-file-longer", "SP-11.5-3: more than 32 octets", {"salt": longer.hex()},
        content=(longer.hex().encode() + b"\n").hex(),
    )  # fmt: skip
    for name, content, notes in (
        ("salt-file-raw", SALT, "SP-11.5-3: the octets themselves"),
        ("salt-file-short", written[:-2] + b"\n", "SP-11.5-3: 62 digits"),
        ("salt-file-odd", written + b"0\n", "SP-11.5-3: 65 digits"),
        (
            "salt-file-two-lines",
            written[:32] + b"\n" + written[32:] + b"\n",
            "SP-11.5-3: a line break inside",
        ),
        ("salt-file-prefix", b"0x" + written + b"\n", "SP-11.5-3: digits only"),
        ("salt-file-utf-16", b"\xff\xfe" + written.decode().encode("utf-16-le"), "SP-11.5-3: not ASCII"),
    ):
        yield case("salt-file", name, notes, {"refused": True}, content=content.hex())

    image = np.array([[0, 1, 2], [-1, 0.5, 0], [3, -2.25, 1e-3]], "<f4")
    wide = np.array([[0, 1, 2], [-1, 0.5, 0]], "<f4")
    for name, seed, index, modality, array in (
        ("augment-t1", SEED, 0, "t1", image),
        ("augment-flair", SEED, 0, "flair", image),
        ("augment-mask", SEED, 0, None, image),
        ("augment-second", SEED, 1, "t1ce", image),
        ("augment-not-square", SEED, 1, "t1", wide),
        ("augment-seed-0", 0, 0, "t2", image),
        ("augment-seed-max", (1 << 64) - 1, 4095, "t2", image),
    ):
        plan = augmentation(seed, index, modality)
        notes = "SP-11.7: no quarter turns where sx is not sy" if array is wide else "SP-11.7"
        result = augmented(array, plan)
        yield case(
            "augmentation",
            name,
            notes,
            {**plan, "shape": list(result.shape), "image": result.astype("<f4").tobytes().hex()},
            seed=as_json(seed),
            index=index,
            modality=modality,
            shape=list(array.shape),
            image=array.tobytes().hex(),
        )
    volume = np.array([[[1, 2], [3, 4]], [[5, 6], [7, 0]]], "<f4")
    for seed, pose in every_pose():
        slice_pose = pose % 8 < 4
        for shape, array in (("volume", volume), ("slice", image))[: 2 if slice_pose else 1]:
            plan = augmentation(seed, 3, None)
            result = augmented(array, plan)
            yield case(
                "augmentation",
                f"augment-{shape}-pose-{pose}",
                "SP-11.7: a mask; flips, then quarter turns",
                {**plan, "shape": list(result.shape), "image": result.astype("<f4").tobytes().hex()},
                seed=seed,
                index=3,
                modality=None,
                shape=list(array.shape),
                image=array.tobytes().hex(),
            )
    for turns in (1, 2, 3):
        seed = next(seed for seed in range(2000) if augmentation(seed, 3, None)["turns"] == turns)
        plan = augmentation(seed, 3, None)
        yield case(
            "augmentation",
            f"augment-not-square-turns-{turns}",
            "SP-11.7: no quarter turns where sx is not sy, not even two of them",
            {**plan, "shape": [2, 3], "image": augmented(wide, plan).astype("<f4").tobytes().hex()},
            seed=seed,
            index=3,
            modality=None,
            shape=[2, 3],
            image=wide.tobytes().hex(),
        )
    # z is not flipped in 2-D: the same decisions with the flip along z.
    seed = next(seed for seed in range(2000) if augmentation(seed, 3, None)["flips"] == [False, False, True])
    plan = augmentation(seed, 3, None)
    yield case(
        "augmentation",
        "augment-slice-flip-z",
        "SP-11.7: z is not flipped in 2-D",
        {**plan, "shape": [3, 3], "image": augmented(image, plan).astype("<f4").tobytes().hex()},
        seed=seed,
        index=3,
        modality=None,
        shape=[3, 3],
        image=image.tobytes().hex(),
    )
