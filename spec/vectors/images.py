"""Cases of images: NIfTI files in, grids and windows out (SP-11.12, SP-11-23), from the words of the specification.

Writes the files of `data/` too. They show nobody: their voxels are made of hashes.
"""

from __future__ import annotations

import gzip
import hashlib
import itertools
import math
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from common import Case, refused
from derive import augmentation, augmented

SHAPE = (9, 8, 6)
PLACE = np.array([[1.0, 0, 0, -5.5], [0, 1.25, 0, 3.25], [0, 0, 2.0, 10], [0, 0, 0, 1]])
TYPES = {
    "u1": 2,
    "i2": 4,
    "i4": 8,
    "f4": 16,
    "f8": 64,
    "i1": 256,
    "u2": 512,
    "u4": 768,
    "i8": 1024,
    "u8": 1280,
}
AXES = {"R": (0, 1), "L": (0, -1), "A": (1, 1), "P": (1, -1), "S": (2, 1), "I": (2, -1)}


def voxels(salt: str = "image", most: int = 1000) -> np.ndarray:
    """Integers from 1 to `most` in no order, and zeros."""
    count = math.prod(SHAPE)
    octets = b"".join(hashlib.sha256(f"{salt} {n}".encode()).digest() for n in range(count // 16 + 1))
    values = np.frombuffer(octets, ">u2")[:count].astype(int) % most + 1
    values[:: 7 if most > 10 else 2] = 0
    return values.reshape(SHAPE)


# Writing --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Nifti:
    """One file: the voxels as stored, and what the header says."""

    stored: np.ndarray = field(default_factory=voxels)
    affine: np.ndarray = field(default_factory=lambda: PLACE)
    """Of the stored voxels; goes into the sform where there is one."""
    dtype: str = "i2"
    order: str = "<"
    version: int = 1
    slope: tuple[float, float] = (1.0, 0.0)
    sform: int = 1
    qform: int = 0
    quaternion: tuple[float, float, float] = (0.0, 0.0, 0.0)
    offset: tuple[float, float, float] = (0.0, 0.0, 0.0)
    pixdim: tuple[float, float, float, float] | None = None
    units: int = 2
    dim: tuple[int, ...] = ()
    code: int = 0
    packed: bool = False
    cut: int = 0

    def octets(self) -> bytes:
        """The whole file."""
        sizes = self.dim or self.stored.shape
        dim = (len(sizes), *sizes, *[1] * (7 - len(sizes)))
        spacing = np.sqrt(np.square(self.affine[:3, :3]).sum(0))
        pixdim = (*(self.pixdim or (1.0, *spacing)), *[1.0] * 4)
        datatype, bits = self.code or TYPES[self.dtype], np.dtype(self.dtype).itemsize * 8
        rows, o = self.affine[:3].ravel(), self.order
        if self.version == 1:
            head = bytearray(352)
            parts: list[tuple[int, str, tuple[Any, ...]]] = [
                (0, "i", (348,)), (40, "8h", dim), (70, "2h", (datatype, bits)), (76, "8f", pixdim),
                (108, "3f", (352.0, *self.slope)), (123, "B", (self.units,)), (252, "2h", (self.qform, self.sform)),
                (256, "6f", (*self.quaternion, *self.offset)), (280, "12f", tuple(rows)), (344, "4s", (b"n+1\0",)),
            ]  # fmt: skip
        else:
            head = bytearray(544)
            parts = [
                (0, "i", (540,)), (4, "8s", (b"n+2\0\r\n\x1a\n",)), (12, "2h", (datatype, bits)), (16, "8q", dim),
                (104, "8d", pixdim), (168, "q", (544,)), (176, "2d", self.slope), (344, "2i", (self.qform, self.sform)),
                (352, "6d", (*self.quaternion, *self.offset)), (400, "12d", tuple(rows)), (500, "i", (self.units,)),
            ]  # fmt: skip
        for place, form, values in parts:
            struct.pack_into(o + form, head, place, *values)
        data = bytes(head) + self.stored.astype(o + self.dtype).tobytes("F")
        data = data[: len(data) - self.cut]
        return stored_gzip(data) if self.packed else data


def stored_gzip(data: bytes) -> bytes:
    """gzip without compression, so that every library writes the same octets."""
    size = len(data)
    block = b"\x01" + struct.pack("<HH", size, size ^ 0xFFFF) + data
    return b"\x1f\x8b\x08\0\0\0\0\0\0\xff" + block + struct.pack("<II", zlib.crc32(data), size)


def stored_as(codes: str, array: np.ndarray, affine: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A volume in RAS, with its axes stored in the directions of `codes`; every voxel keeps its place."""
    order, move = [AXES[letter][0] for letter in codes], np.zeros((4, 4))
    move[3, 3] = 1
    flips = []
    for axis, letter in enumerate(codes):
        to, sign = AXES[letter]
        move[to, axis] = sign
        if sign < 0:
            move[to, 3] = array.shape[to] - 1
            flips.append(axis)
    return np.flip(array.transpose(order), tuple(flips)), affine @ move


def turned(x: float, z: float) -> np.ndarray:
    """`PLACE`, turned by so many degrees about x and then about z."""
    a, b = math.radians(x), math.radians(z)
    about_x = np.array([[1, 0, 0], [0, math.cos(a), -math.sin(a)], [0, math.sin(a), math.cos(a)]])
    about_z = np.array([[math.cos(b), -math.sin(b), 0], [math.sin(b), math.cos(b), 0], [0, 0, 1]])
    result = PLACE.copy()
    result[:3] = about_z @ about_x @ PLACE[:3]
    return result


# Reading, as SP-11.12 says --------------------------------------------------------------------------------


def read(data: bytes) -> tuple[np.ndarray, np.ndarray]:
    """SP-11.12-1 to SP-11.12-3: values float32, and the affine."""
    data = gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data
    o = "<" if struct.unpack_from("<i", data)[0] in (348, 540) else ">"

    def at(place: int, form: str) -> tuple[Any, ...]:
        return struct.unpack_from(o + form, data, place)

    if at(0, "i")[0] == 348:
        dim, (code,), pixdim, (start, slope, inter) = at(40, "8h"), at(70, "h"), at(76, "8f"), at(108, "3f")
        (qform, sform), quaternion, rows = at(252, "2h"), at(256, "6f"), at(280, "12f")
    else:
        dim, (code,), pixdim, (start,), (slope, inter) = (
            at(16, "8q"),
            at(12, "h"),
            at(104, "8d"),
            at(168, "q"),
            at(176, "2d"),
        )
        (qform, sform), quaternion, rows = at(344, "2i"), at(352, "6d"), at(400, "12d")
    shape = dim[1:4]
    kind = {number: name for name, number in TYPES.items()}[code]
    stored = np.frombuffer(data, o + kind, math.prod(shape), int(start)).reshape(shape, order="F")
    scaled = slope != 0 and math.isfinite(slope)
    values = (stored.astype("f8") * slope + inter if scaled else stored).astype("f4")
    affine = np.eye(4)
    if sform > 0:
        affine[:3] = np.reshape(rows, (3, 4))
    elif qform > 0:
        b, c, d = quaternion[:3]
        rest = 1 - (b * b + c * c + d * d)
        length = math.sqrt(b * b + c * c + d * d)
        a, b, c, d = (0.0, b / length, c / length, d / length) if rest < 1e-7 else (math.sqrt(rest), b, c, d)
        turn = np.array([
            [a * a + b * b - c * c - d * d, 2 * (b * c - a * d), 2 * (b * d + a * c)],
            [2 * (b * c + a * d), a * a + c * c - b * b - d * d, 2 * (c * d - a * b)],
            [2 * (b * d - a * c), 2 * (c * d + a * b), a * a + d * d - b * b - c * c],
        ])  # fmt: skip
        affine[:3, :3] = turn * (pixdim[1], pixdim[2], pixdim[3] * (-1 if pixdim[0] < 0 else 1))
        affine[:3, 3] = quaternion[3:]
    else:
        affine[:3, :3] = np.diag((-pixdim[1], pixdim[2], pixdim[3]))
        affine[:3, 3] = -affine[:3, :3] @ (np.array(shape) - 1) / 2
    return values, affine


def oriented(values: np.ndarray, affine: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """SP-11.12-5."""
    cosines = affine[:3, :3] / np.sqrt(np.square(affine[:3, :3]).sum(0))
    order = max(itertools.permutations(range(3)), key=lambda p: sum(abs(cosines[a, p[a]]) for a in range(3)))
    values, matrix, origin = values.transpose(order), affine[:3, [*order]], affine[:3, 3].copy()
    for a in range(3):
        if cosines[a, order[a]] < 0:
            origin += matrix[:, a] * (values.shape[a] - 1)
            matrix[:, a] *= -1
            values = np.flip(values, a)
    return values, np.vstack((np.column_stack((matrix, origin)), (0, 0, 0, 1)))


def resampled(values: np.ndarray, old: np.ndarray, new: tuple[float, ...], mask: bool) -> np.ndarray:
    """SP-11.12-7."""

    def fine(v: float) -> float:
        return round(v * 65536) / 65536

    result = values.astype("f8")
    for axis, (o, s) in enumerate(zip(old, new, strict=True)):
        n = result.shape[axis]
        lines = np.moveaxis(result, axis, 0)
        planes = []
        for k in range(round(fine((n - 1) * o / s)) + 1):
            p = min(fine(k * (s / o)), n - 1)
            u, v = lines[math.floor(p)], lines[min(math.floor(p) + 1, n - 1)]
            planes.append(lines[math.ceil(p - 0.5)] if mask else u + (v - u) * (p - math.floor(p)))
        result = np.moveaxis(np.array(planes), 0, axis)
    return result.astype("f4")


def normalised(values: np.ndarray, rule: str = "zscore-nonzero") -> np.ndarray:
    """SP-11.12-8, SP-11.12-10."""
    kind, _, numbers = rule.partition(":")
    if kind == "none":
        return values
    if kind in ("percentile", "window"):
        low, high = map(float, numbers.split(","))
        if kind == "percentile":
            low, high = (percentile(sorted(values.ravel().tolist()), p) for p in (low, high))
        clipped = np.minimum(np.maximum(values.astype("f8"), low), high)
        scaled: np.ndarray = ((clipped - low) / ((high - low) or 1.0)).astype("f4")
        return scaled
    filled = values != 0 if kind == "zscore-nonzero" else np.full(values.shape, True)
    chosen = values[filled].astype("f8")
    mean = chosen.mean()
    deviation = math.sqrt(np.square(chosen - mean).mean()) or 1.0
    result = np.zeros(values.shape, "f4")
    result[filled] = (chosen - mean) / deviation
    return result


def percentile(values: list[float], p: float) -> float:
    """SP-11.12-10, of ascending values."""
    place = (len(values) - 1) * p / 100
    low, high = values[math.floor(place)], values[math.ceil(place)]
    return low + (high - low) * (place - math.floor(place))


def window(values: np.ndarray, origin: tuple[int, ...], size: tuple[int, ...]) -> np.ndarray:
    """SP-11-23: voxel by voxel."""
    depth = (*size, 1)[:3]
    result = np.zeros(depth, "f4")
    for place in itertools.product(*map(range, depth)):
        there = tuple(o + p for o, p in zip(origin, place, strict=True))
        if all(0 <= t < n for t, n in zip(there, values.shape, strict=True)):
            result[place] = values[there]
    return result[..., 0] if len(size) == 2 else result


# Cases ----------------------------------------------------------------------------------------------------


def arranged(codes: str, **more: Any) -> Nifti:
    """The volume of `PLACE`, stored in the directions of `codes`."""
    stored, affine = stored_as(codes, voxels(), PLACE)
    return Nifti(stored, affine, **more)


def files() -> dict[str, Nifti]:
    """Every file that can be used."""
    oblique, mirrored = turned(15, 10), np.diag((-1.0, 1, 1, 1)) @ PLACE
    exact = Nifti(voxels() + 16_777_216, dtype="i4", slope=(1.0, -16_777_216.0))
    deep = np.where(voxels() > 0, 100 * voxels("deep", 3) + 7, 0)
    known = {
        "ras.nii": Nifti(),
        **{f"{codes.lower()}.nii": arranged(codes) for codes in ("LAS", "LPS", "PSR", "SAL", "IRP")},
        "oblique.nii": Nifti(affine=oblique),
        "oblique-ipl.nii": Nifti(*stored_as("IPL", voxels(), oblique)),
        "steep.nii": Nifti(affine=turned(0, 50)),
        "both-forms.nii": Nifti(qform=1, quaternion=(0.0, 1.0, 0.0), offset=(1.0, 2.0, 3.0)),
        "quaternion.nii": Nifti(sform=0, qform=1, quaternion=(0.0, 0.0, 0.5), offset=(4.0, -3.0, 2.0)),
        "quaternion-half-turn.nii": Nifti(sform=0, qform=2, quaternion=(0.0, 0.6, 0.8), offset=(4.0, -3.0, 2.0)),
        "quaternion-reversed.nii": Nifti(sform=0, qform=1, pixdim=(-1.0, 1.0, 1.25, 2.0), quaternion=(0.1, 0.2, 0.3)),
        "quaternion-zero.nii": Nifti(sform=0, qform=1, pixdim=(0.0, 1.0, 1.25, 2.0), quaternion=(0.1, 0.2, 0.3)),
        "no-form.nii": Nifti(sform=0, affine=mirrored),
        "micrometres.nii": Nifti(units=3),
        "scaled.nii": Nifti(slope=(0.1, -12.5)),
        "scaled-float64.nii": exact,
        "slope-zero.nii": Nifti(slope=(0.0, 5.0)),
        "slope-nan.nii": Nifti(slope=(math.nan, 5.0)),
        "big-endian.nii": Nifti(order=">", slope=(0.5, 3.0)),
        "nifti-2.nii": Nifti(version=2, slope=(0.5, 3.0)),
        "nifti-2-big-endian.nii": Nifti(version=2, order=">"),
        "packed.nii.gz": Nifti(packed=True),
        "packed-by-content.nii": Nifti(packed=True),
        "four-axes.nii": Nifti(dim=(*SHAPE, 1)),
        "constant.nii": Nifti(np.where(voxels() > 0, 5, 0)),
        "negative.nii": Nifti(voxels() - 500),
        "mask.nii": Nifti(voxels("mask", 4), dtype="u1"),
        "mask-lps.nii": Nifti(*stored_as("LPS", voxels("mask", 4), PLACE), dtype="u1"),
        "deep.nii": Nifti(deep),
    }  # fmt: skip
    few = np.minimum(voxels(), 100)
    # Beyond what a signed type of the same width holds, and below zero.
    wide = {"u1": 2 * few, "u2": 600 * few, "u4": few << 25, "u8": few.astype("u8") << 57}
    return known | {f"type-{name}.nii": Nifti(wide.get(name, few - 50), dtype=name) for name in TYPES}


def unusable() -> dict[str, tuple[str, Nifti]]:
    """Every file that must be refused, and why."""
    sheared, flat, small, wide, nowhere = (PLACE.copy() for _ in range(5))
    nowhere[1, 1] = math.nan
    sheared[0, 2] = 0.5
    flat[:3, 2] = flat[:3, 1]
    small[0, 0] = 0.01
    wide[2, 2] = 51.0
    holes = voxels().astype("f4")
    holes[4, 4, 3] = math.nan
    endless = voxels().astype("f4")
    endless[4, 4, 3] = math.inf
    return {
        "sheared.nii": ("SP-11.12-4: 2.5 mm over the stack", Nifti(affine=sheared)),
        "flat.nii": ("SP-11.12-4: two axes in one direction", Nifti(affine=flat)),
        "spacing-small.nii": ("SP-11.12-4: 0.01 mm", Nifti(affine=small)),
        "spacing-large.nii": ("SP-11.12-4: 51 mm", Nifti(affine=wide)),
        "affine-nan.nii": ("SP-11.12-4: not finite", Nifti(affine=nowhere)),
        "pixdim-zero.nii": ("SP-11.12-3: pixdim of 0, and no sform",
                            Nifti(sform=0, qform=1, pixdim=(1.0, 1.0, 0.0, 2.0))),
        "nan.nii": ("SP-11.12-2: a value is NaN", Nifti(holes, dtype="f4")),
        "infinity.nii": ("SP-11.12-2: a value is infinite", Nifti(endless, dtype="f4")),
        "zero.nii": ("SP-11.12-2: zero everywhere", Nifti(voxels() * 0)),
        "truncated.nii": ("SP-11.12-1: an octet is missing", Nifti(cut=1)),
        "truncated.nii.gz": ("SP-11.12-1: an octet is missing inside gzip", Nifti(cut=1, packed=True)),
        "two-axes.nii": ("SP-11.12-1: two axes", Nifti(dim=(72, 6))),
        "rgb.nii": ("SP-11.12-1: datatype 128", Nifti(code=128)),
        "complex.nii": ("SP-11.12-1: datatype 32", Nifti(code=32)),
    }  # fmt: skip


def volume(
    data: bytes, spacing: tuple[float, ...] | None, mask: bool, rule: str = "zscore-nonzero"
) -> tuple[np.ndarray, dict[str, Any]]:
    """A volume as windows are cut from it, and its grid (SP-11.12-6)."""
    values, affine = oriented(*read(data))
    own = np.sqrt(np.square(affine[:3, :3]).sum(0))
    new = own if spacing is None or np.abs(own - spacing).max() <= 0.001 else np.array(spacing)
    if new is not own:
        values = resampled(values, own, tuple(new), mask)
    grid = {
        "shape": list(values.shape),
        "spacing": new.tolist(),
        "directions": (affine[:3, :3] / own).T.ravel().tolist(),
        "origin": affine[:3, 3].tolist(),
        "stored": own.tolist(),
    }
    return values if mask else normalised(values, rule), grid


def shown(grid: dict[str, Any]) -> dict[str, Any]:
    """Nine digits are enough for a tolerance of 1e-5."""
    rounded = {key: [float(f"{n:.9g}") + 0.0 for n in numbers] for key, numbers in grid.items()}
    return {**rounded, "shape": grid["shape"]}


def images() -> Iterator[Case]:
    """A file -> grid and window, or the refusal; two grids -> whether they agree."""

    def case(
        name: str, file: str, notes: str, *, spacing: tuple[float, ...] | None = None,
        origin: tuple[int, int, int] = (1, 0, 2), size: tuple[int, ...] = (7, 7, 3),
        pose: tuple[int, int, str | None] | None = None, rule: str = "",
    ) -> Case:  # fmt: skip
        mask = file.startswith("mask")
        values, grid = volume(files()[file].octets(), spacing, mask, rule or "zscore-nonzero")
        result = window(values, origin, size)
        asked = dict(zip(("seed", "index", "modality"), pose or (None, None, None), strict=True))
        if pose is not None:
            result = augmented(result, augmentation(pose[0], pose[1], None if mask else pose[2]))
        return {
            "name": name, "operation": "window", "notes": notes, "file": file, "kind": "mask" if mask else "image",
            "spacing": spacing, "origin": list(origin), "window": list(size), **asked,
            **({"normalisation": rule} if rule else {}),
            "expect": {"grid": shown(grid), "shape": list(result.shape),
                       "values": result.astype("<f4").tobytes().hex()},
        }  # fmt: skip

    for file in files():
        yield case(file, file, "SP-11.12-1 to SP-11.12-8, SP-11-23")
    around = "SP-11-23: zero outside the volume"
    yield case("window-around", "ras.nii", around, origin=(-1, -2, -3), size=(12, 12, 12))
    yield case("window-beside", "ras.nii", "SP-11-23: nothing but zeros", origin=(9, 0, 0))
    yield case("window-negative", "las.nii", "SP-11-23", origin=(-4, 6, 4))
    for z in (0, 5, 6):
        yield case(f"slice-{z}", "lps.nii", "SP-11-23: one slice", origin=(0, -1, z), size=(8, 8))
    yield case("slice-not-square", "psr.nii", "SP-11-23: x, then y", origin=(0, 0, 3), size=(4, 6))
    for name, spacing in (
        ("finer", (0.5, 0.5, 0.5)), ("coarser", (2.0, 2.0, 3.0)), ("ties", (2.0, 2.5, 4.0)),
        ("uneven", (0.7, 1.1, 1.9)),
        ("one-axis", (1.0, 1.25, 1.0)), ("within-tolerance", (1.0009, 1.2509, 2.0009)),
        ("beyond-tolerance", (1.002, 1.25, 2.0)),
    ):  # fmt: skip
        for file in ("lps.nii", "deep.nii", "mask.nii", "oblique.nii"):
            yield case(f"resampled-{name}-{file[:-4]}", file, f"SP-11.12-7: to {spacing} mm", spacing=spacing,
                       origin=(0, 0, 0), size=(5, 5, 5))  # fmt: skip
    for seed, index in ((1, 0), (2, 1), (3, 2), (4, 3), (5, 0), (6, 1)):
        for file, modality in (("lps.nii", "t1"), ("mask.nii", None)):
            for size in ((6, 6), (5, 5, 4)):
                yield case(f"augmented-{seed}-{file[:-4]}-{len(size)}d", file, "SP-11.7 after SP-11-23",
                           origin=(1, 1, 1), size=size, pose=(seed, index, modality))  # fmt: skip
    for rule in (
        "zscore-nonzero",
        "zscore",
        "percentile:0.5,99.5",
        "percentile:5,80",
        "window:-100,300",
        "none",
    ):
        for file in ("negative.nii", "constant.nii"):
            yield case(f"rule-{rule}-{file[:-4]}", file, "SP-11.12-10", rule=rule, origin=(-1, 0, 2))
    yield case("rule-after-resampling", "lps.nii", "SP-11.12-10 after SP-11.12-7", rule="percentile:10,90",
               spacing=(2.0, 2.5, 4.0), origin=(0, 0, 0), size=(4, 4, 3))  # fmt: skip
    for file, (notes, _) in unusable().items():
        yield {
            "name": file,
            "operation": "unusable",
            "notes": notes,
            "file": file,
            "expect": refused("site-failed", "data"),
        }
    yield from grids()


def grids() -> Iterator[Case]:
    """SP-11.12-9."""
    _, base = volume(Nifti().octets(), None, False)

    def case(name: str, notes: str, error: str = "", **changes: Any) -> Case:
        expect = refused(error, "semantics") if error else {"agree": True}
        one, other = shown(base), {**shown(base), **changes}
        return {
            "name": f"grids-{name}",
            "operation": "grids",
            "notes": notes,
            "one": one,
            "other": other,
            "expect": expect,
        }

    def turn(degrees: float) -> dict[str, Any]:
        _, grid = volume(replace(Nifti(), affine=turned(0, degrees)).octets(), None, False)
        return {"directions": shown(grid)["directions"]}

    bad = "misaligned"
    x, y, z = base["origin"]
    yield case("equal", "SP-11.12-9")
    yield case("moved-little", "SP-11.12-9: 0.24 mm, a voxel is 1 mm", origin=[x + 0.24, y, z])
    yield case("moved", "SP-11.12-9: 0.26 mm, a voxel is 1 mm", bad, origin=[x + 0.26, y, z])
    yield case("moved-along-two", "SP-11.12-9: 0.2 mm along x and along z", bad, origin=[x + 0.2, y, z + 0.2])
    yield case("turned-little", "SP-11.12-9: half a degree", **turn(0.5))
    yield case("turned", "SP-11.12-9: ten degrees", bad, **turn(10))
    yield case("mirrored", "SP-11.12-9", bad, directions=[-1.0, 0.0, 0.0, *shown(base)["directions"][3:]])
    yield case(
        "spacing",
        "SP-11.12-9: 0.4 mm at the far corner",
        bad,
        spacing=[1.05, 1.25, 2.0],
        stored=[1.05, 1.25, 2.0],
    )
    yield case("spacing-little", "SP-11.12-9: 0.16 mm", spacing=[1.02, 1.25, 2.0], stored=[1.02, 1.25, 2.0])
    yield case("shape", "SP-11.12-9: one slice more", bad, shape=[9, 8, 7])
    coarse: dict[str, Any] = {"stored": [1.0, 1.25, 4.0]}
    yield case("shape-resampled", "SP-11.12-9: a slice less, of a stack of 4 mm", shape=[9, 8, 5], **coarse)
    yield case("shape-resampled-two", "SP-11.12-9: two slices less", shape=[9, 8, 4], **coarse)
    yield case("shape-resampled-three", "SP-11.12-9: three slices less", bad, shape=[9, 8, 3], **coarse)
