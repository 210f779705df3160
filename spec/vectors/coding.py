"""Cases of codings, value by value, from the words of the specification (SP-11.21) and not by the library."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from fractions import Fraction

from common import Case, as_json, refused
from talk import JOB

from splitproto.fields import write_map

GREATEST = {"int8": 127, "int4": 7}
LARGEST, SMALLEST = 3.4028234663852886e38, 2.0**-149
"""Of the positive numbers of binary32."""


def octets(coding: str, values: int) -> int:
    """SP-11.21-2: of one sample."""
    if coding == "f16":
        return 2 + 2 * values
    return 2 * -(-values // 64) + (values if coding == "int8" else -(-values // 2))


def encoded(coding: str, values: Sequence[float]) -> bytes:
    """SP-11.21-3, SP-11.21-4: one sample."""
    if coding == "f16":
        largest = max(map(abs, values))
        exponent = int.from_bytes(struct.pack(">f", largest), "big") >> 23
        power = max(exponent - 14, 1) - 127
        return scale_octets(2.0**power) + b"".join(struct.pack("<e", value * 2.0**-power) for value in values)
    blocks = [values[first : first + 64] for first in range(0, len(values), 64)]
    scales = [scale_of(block, GREATEST[coding]) for block in blocks]
    integers = [
        0 if scale == 0 else round(single(value / scale))
        for block, scale in zip(blocks, scales, strict=True)
        for value in block
    ]
    head = b"".join(map(scale_octets, scales))
    if coding == "int8":
        return head + struct.pack(f"{len(integers)}b", *integers)
    four = [integer & 15 for integer in integers] + [0] * (len(integers) % 2)
    return head + bytes(low | high << 4 for low, high in zip(four[::2], four[1::2], strict=True))


def scale_of(block: Sequence[float], greatest: int) -> float:
    """The least bfloat16 that is not below the largest magnitude divided by `greatest`."""
    quotient = single(max(map(abs, block)) / greatest)
    bits = int.from_bytes(struct.pack(">f", quotient), "big") >> 16
    while Fraction(bfloat(bits)) < Fraction(quotient):
        bits += 1
    return bfloat(bits)


def single(value: float) -> float:
    """The nearest binary32: a quotient of two of them, rounded to binary64 first, comes to the same."""
    return float(struct.unpack("<f", struct.pack("<f", value))[0])


def bfloat(bits: int) -> float:
    """A bfloat16."""
    return float(struct.unpack(">f", struct.pack(">HH", bits, 0))[0])


def scale_octets(scale: float) -> bytes:
    """Of a number that is a bfloat16."""
    return struct.pack("<f", scale)[2:]


def floats(values: Sequence[float]) -> str:
    """A row of float32, in hexadecimal."""
    return struct.pack(f"<{len(values)}f", *values).hex()


def codings() -> Iterator[Case]:
    """Samples -> octets -> samples."""
    yield from _encoding()
    yield from _decoding()
    yield from _levels()


def _encoding() -> Iterator[Case]:
    ramp = [single((n - 40) / 7) for n in range(96)]
    samples: dict[str, tuple[str, list[list[float]]]] = {
        "small": ("SP-11.21-2: a scale, then values in C order", [[1.0, -2.0, 0.5, 0.0]]),
        "two-samples": ("SP-11.21-2: each sample by itself", [[1.0, -2.0, 0.5], [1e3, 1.0, -1e-3]]),
        "zeros": ("SP-11.21-4: 0 where the scale is 0", [[0.0, -0.0, 0.0]]),
        "one-block": ("SP-11.21-4: exactly one block", [[*ramp[:64]]]),
        "blocks": ("SP-11.21-4: a short last block", [ramp]),
        "one-more": ("SP-11.21-4: a block of one value", [[*ramp[:64], 1e-6]]),
        "outlier": ("SP-11.21-4: it spoils its own block only", [[*ramp[:3], 1e4, *ramp[4:]]]),
        "ties": ("SP-11.21-4: to nearest, ties to even",
                 [[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5, -127.0, 7.0, 3.5]]),
        "ties-of-7": ("SP-11.21-4: to nearest, ties to even", [[7.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 6.5, -7.0]]),
        "scale-up": ("SP-11.21-4: the scale is rounded up", [[127.01, 126.6, -127.01, 7.001, -1.0]]),
        "tiny": ("SP-11.21-4: subnormal numbers", [[2.0**-126, -(2.0**-130), 2.0**-140, SMALLEST, 0.0]]),
        "smallest": ("SP-11.21-4: divided, the largest is 0", [[SMALLEST, -SMALLEST, 0.0]]),
        "gradient": ("SP-11.21-3: values that binary16 lacks", [[1e-9, -3e-10, 2.5e-12, 7e-14, 0.0]]),
        "huge": ("SP-11.21-3: values that binary16 lacks", [[1e38, -2e38, 3e30, 1.0]]),
        "largest": ("SP-11.21-4: divided first: nothing overflows", [[LARGEST, -LARGEST, LARGEST / 3]]),
        "power": ("SP-11.21-3: the largest at a power of two", [[2.0**-20, 2.0**-20 * (2 - 2**-20), 1.0]]),
    }  # fmt: skip
    for name, (notes, listed) in samples.items():
        rows = [[single(value) for value in row] for row in listed]
        for coding in ("f16", "int8", "int4"):
            yield _case("encode", f"{coding}-{name}", coding, notes,
                        samples=[floats(row) for row in rows],
                        expect={"coded": [encoded(coding, row).hex() for row in rows]})  # fmt: skip
    for name, value in (("nan", "0000c07f"), ("infinite", "0000807f"), ("minus-infinite", "000080ff")):
        for coding in ("f16", "int8", "int4"):
            yield _case("encode", f"{coding}-of-{name}", coding, "SP-11.21-2: a value that is not finite",
                        samples=[floats([1.0, 2.0]), floats([1.0]) + value],
                        expect=refused("tensor", "tensors"))  # fmt: skip


def _decoding() -> Iterator[Case]:
    one = scale_octets(1.0)

    def good(name: str, coding: str, notes: str, coded: list[bytes], values: list[list[float]]) -> Case:
        expect = {"samples": [floats(row) for row in values]}
        return _case("decode", name, coding, notes, coded=[row.hex() for row in coded],
                     values=len(values[0]), expect=expect)  # fmt: skip

    def bad(
        name: str, coding: str, notes: str, coded: list[bytes], values: int, error: str = "tensor"
    ) -> Case:
        layer = "tensors" if error == "tensor" else "semantics"
        return _case("decode", name, coding, notes, coded=[row.hex() for row in coded],
                     values=values, expect=refused(error, layer))  # fmt: skip

    halves = struct.pack("<3e", 1.0, -0.5, 65504.0)
    yield good("f16-any-scale", "f16", "SP-11.21-3: no power of two, which no sender makes",
               [scale_octets(1.5) + halves], [[1.5, -0.75, 98256.0]])  # fmt: skip
    yield good("f16-zero-scale", "f16", "SP-11.21-3", [bytes(2) + halves[:2]], [[0.0]])
    infinity = float("inf")
    yield good("f16-infinite", "f16", "SP-11.21-5: a value that is not finite, as it may be without a coding",
               [one + bytes.fromhex("007c00fc003c")], [[infinity, -infinity, 1.0]])  # fmt: skip
    yield good("f16-overflow", "f16", "SP-11.21-5", [scale_octets(2.0**120) + halves],
               [[2.0**120, -(2.0**119), infinity]])  # fmt: skip
    yield good("int8-lowest", "int8", "SP-11.21-4: -128, which no sender makes", [one + b"\x80\x7f\xff\x00"],
               [[-128.0, 127.0, -1.0, 0.0]])  # fmt: skip
    yield good("int8-zero-scale", "int8", "SP-11.21-4", [bytes(2) + b"\x05\x00"], [[0.0, 0.0]])
    yield good("int8-overflow", "int8", "SP-11.21-5", [scale_octets(2.0**122) + b"\x7f\x81\x01"],
               [[infinity, -infinity, 2.0**122]])  # fmt: skip
    yield good("int8-two-samples", "int8", "SP-11.21-2: each has scales of its own",
               [one + b"\x01\x02", scale_octets(0.5) + b"\x01\xfe"], [[1.0, 2.0], [0.5, -1.0]])  # fmt: skip
    yield good("int4-nibbles", "int4", "SP-11.21-4: the first value in the lower four bits", [one + b"\x21\xf7"],
               [[1.0, 2.0, 7.0, -1.0]])  # fmt: skip
    yield good(
        "int4-lowest", "int4", "SP-11.21-4: -8, which no sender makes", [one + b"\x88"], [[-8.0, -8.0]]
    )
    yield good("int4-left-over", "int4", "SP-11.21-4: four bits that are not looked at", [one + b"\x21\xf3"],
               [[1.0, 2.0, 3.0]])  # fmt: skip
    for what, bits in (
        ("negative", 0xBF80), ("minus-zero", 0x8000), ("infinite", 0x7F80), ("minus-infinite", 0xFF80),
        ("nan", 0x7FC0), ("least-nan", 0x7F81), ("minus-nan", 0xFFC0),
    ):  # fmt: skip
        wrong = bits.to_bytes(2, "little")
        for coding, body in (("f16", bytes(4)), ("int8", bytes(2)), ("int4", bytes(1))):
            rows = [one + body, wrong + body]
            yield bad(f"{coding}-scale-{what}", coding, "SP-11.21-5: the scale of the second sample", rows, 2)
    later = one + 0x7FC0.to_bytes(2, "little")
    yield bad("int8-later-scale", "int8", "SP-11.21-5: of the second block", [later + bytes(65)], 65)
    yield bad("int4-later-scale", "int4", "SP-11.21-5: of the second block", [later + bytes(33)], 65)
    for coding, body in (("f16", bytes(6)), ("int8", bytes(3)), ("int4", bytes(2))):
        for what, row in (("short", one + body[1:]), ("long", one + body + b"\0")):
            yield bad(f"{coding}-{what}", coding, "SP-11.21-5", [row], 3, "schema-mismatch")


def _levels() -> Iterator[Case]:
    """A list is in the order of `levels`, also where some levels of the cut are not sent."""
    strides = [{"name": f"x{n}", "channels": 1, "stride": [8, 8]} for n in range(5)]
    base = {**write_map(JOB, "job"), "cut": strides, "window": [16, 16]}
    values = [[7.0, -1.0, 0.25, 3.5], [0.1, 100.0, -2.0, 0.0]]
    for name, notes, levels, listed, precision in (
        ("mixed", "the finest first", [0, 1, 2, 3, 4], ["int4", "int4", "int8", "f16", "f32"], "f32"),
        ("sent", "an entry for each level that is sent", [1, 3, 4], ["int8", "f32", "int4"], "f32"),
        ("bf16", "precision, where a level is not coded", [2, 4], ["bf16", "f16"], "bf16"),
    ):
        job = {**base, "levels": levels, "activations": listed, "precision": precision}
        tensors = {
            f"x{level}": [octets_of(form, [single(v) for v in row]).hex() for row in values]
            for level, form in zip(levels, listed, strict=True)
        }
        yield {
            "name": f"levels-{name}", "operation": "levels", "notes": f"SP-11.21-8: {notes}", "job": as_json(job),
            "samples": [floats(row) for row in values], "expect": {"tensors": tensors},
        }  # fmt: skip


def octets_of(form: str, values: Sequence[float]) -> bytes:
    """One sample as it travels; the numbers of these cases are rounded to bfloat16 without a tie."""
    if form == "f32":
        return struct.pack(f"<{len(values)}f", *values)
    if form == "bf16":
        bits = [int.from_bytes(struct.pack(">f", value), "big") + 0x8000 >> 16 for value in values]
        return struct.pack(f"<{len(bits)}H", *bits)
    return encoded(form, values)


def _case(operation: str, name: str, coding: str, notes: str, **more: object) -> Case:
    return {"name": f"{operation}-{name}", "operation": operation, "notes": notes, "coding": coding, **more}
