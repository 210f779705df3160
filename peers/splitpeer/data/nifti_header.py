"""What a NIfTI header says: how the voxels are stored and where they lie (SP-11.12-1 to SP-11.12-4). No files here."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from splitpeer.data.geometry import GRID_TOLERANCE, Geometry, Triple, Turn, angle, apart, edges, shear
from splitpeer.data.rules import Rules
from splitpeer.errors import DataError

MAX_CHANNELS = 64
"""Most volumes in one 4-D file."""
MAX_OFFSET = 2**24
"""Octets before the voxels: the header and its extensions."""
LEAST_EDGE, GREATEST_EDGE = 0.02, 50.0
"""Millimetres of a voxel's edge; outside this range a header probably uses other units."""
LEAST_WIDTH, GREATEST_WIDTH = 40.0, 800.0
"""Millimetres of the longest side of a volume that shows a head; others raise a warning."""


def _layout(size: int, fields: dict[str, tuple[int, str]]) -> np.dtype:
    """Of a header of `size` octets: where the fields lie that are read, and of what type they are."""
    offsets, formats = zip(*fields.values(), strict=True)
    return np.dtype({"names": [*fields], "formats": formats, "offsets": offsets, "itemsize": size})


# A test compares them with nibabel's, whose import would cost every daemon a fifth of a second, as it brings pydicom.
NIFTI1 = _layout(
    348,
    {
        "sizeof_hdr": (0, "i4"), "dim": (40, "8i2"), "datatype": (70, "i2"), "pixdim": (76, "8f4"),
        "vox_offset": (108, "f4"), "scl_slope": (112, "f4"), "scl_inter": (116, "f4"), "xyzt_units": (123, "u1"),
        "qform_code": (252, "i2"), "sform_code": (254, "i2"),
        "quatern_b": (256, "f4"), "quatern_c": (260, "f4"), "quatern_d": (264, "f4"),
        "qoffset_x": (268, "f4"), "qoffset_y": (272, "f4"), "qoffset_z": (276, "f4"),
        "srow_x": (280, "4f4"), "srow_y": (296, "4f4"), "srow_z": (312, "4f4"),
    },
)  # fmt: skip
NIFTI2 = _layout(
    540,
    {
        "sizeof_hdr": (0, "i4"), "datatype": (12, "i2"), "dim": (16, "8i8"), "pixdim": (104, "8f8"),
        "vox_offset": (168, "i8"), "scl_slope": (176, "f8"), "scl_inter": (184, "f8"),
        "qform_code": (344, "i4"), "sform_code": (348, "i4"),
        "quatern_b": (352, "f8"), "quatern_c": (360, "f8"), "quatern_d": (368, "f8"),
        "qoffset_x": (376, "f8"), "qoffset_y": (384, "f8"), "qoffset_z": (392, "f8"),
        "srow_x": (400, "4f8"), "srow_y": (432, "4f8"), "srow_z": (464, "4f8"), "xyzt_units": (500, "i4"),
    },
)  # fmt: skip
HEADER_BYTES = max(NIFTI1.itemsize, NIFTI2.itemsize)

_TYPES = {
    2: "u1",
    4: "i2",
    8: "i4",
    16: "f4",
    64: "f8",
    256: "i1",
    512: "u2",
    768: "u4",
    1024: "i8",
    1280: "u8",
}
_OTHER_TYPES = {
    0: "unknown",
    1: "bit",
    32: "complex",
    128: "RGB",
    1536: "float128",
    1792: "complex",
    2304: "RGBA",
}
_UNITS = {1: "metres", 3: "micrometres"}
_NO_LENGTH = "is not a positive length"


@dataclass(frozen=True)
class NiftiHeader:
    """What the header says of a volume. `shape` and `affine` (4x4, mm) hold after reorientation to RAS."""

    shape: Triple
    affine: np.ndarray
    orientation: str
    """Axis codes of the file, such as "LPS"."""
    turn: Turn
    stored_shape: Triple
    channels: int
    dtype: np.dtype
    offset: int
    """Offset of the first voxel in the (unpacked) file."""
    slope: float
    intercept: float
    warnings: tuple[str, ...]
    """Warnings, to be preceded by the file's name."""

    @property
    def geometry(self) -> Geometry:
        """The grid as stored, in RAS order."""
        return Geometry.of(self.shape, self.affine)

    @property
    def volume_bytes(self) -> int:
        """Bytes of one channel, as stored."""
        return math.prod(self.stored_shape) * self.dtype.itemsize


def parse(block: bytes, channel: int | None, rules: Rules) -> NiftiHeader:
    """The header at the beginning of a NIfTI file. Raises DataError with the cause and the fix, without a name."""
    raw = _raw(block)
    dim = [int(n) for n in raw["dim"]]
    shape, channels = _shape(dim, channel, rules)
    dtype = _dtype(raw)
    offset, least = float(raw["vox_offset"]), _length(raw) + 4
    if not (offset == 0 or least <= offset <= MAX_OFFSET):
        raise DataError(f"its header places the voxels at octet {offset:g}: export it again")
    affine, warnings = _affine(raw, shape, rules)
    longest = float(max(edges(affine) * shape))
    if not LEAST_WIDTH <= longest <= GREATEST_WIDTH:
        warnings.append(f"the volume is {longest:.3g} mm long at most: is this a head, in millimetres?")
    turn = Turn.of(affine)
    ras_shape, ras_affine = turn.grid(shape, affine)
    slope, intercept = _scaling(raw)
    return NiftiHeader(
        ras_shape, ras_affine, turn.codes, turn, shape, channels, dtype, int(offset) or least, slope, intercept,
        tuple(warnings),
    )  # fmt: skip


def kind_of(block: bytes) -> str | None:
    """What the first octets of a file that is not NIfTI show it to be; None for NIfTI."""
    if not block:
        return "empty"
    if block[344:348] == b"n+1\0" or block[4:8] == b"n+2\0":
        return None
    if block[344:348] == b"ni1\0" or block[4:8] == b"ni2\0":
        return "the header of a .hdr/.img pair"
    if block[128:132] == b"DICM":
        return "DICOM"
    for start, name in _MAGIC.items():
        if block.startswith(start):
            return name
    if len(block) >= 348 and 348 in (int.from_bytes(block[:4], "little"), int.from_bytes(block[:4], "big")):
        return "an ANALYZE header"
    return "text" if all(octet in _TEXT for octet in block) else "something unknown"


_TEXT = frozenset(b"\t\n\r" + bytes(range(32, 127)))
_MAGIC = {
    b"NRRD": "NRRD",
    b"\x89PNG": "a PNG picture",
    b"\xff\xd8\xff": "a JPEG picture",
    b"\x89HDF": "HDF5 (perhaps MINC)",
    b"CDF": "MINC",
    b"PK\x03\x04": "a ZIP archive",
    b"\x1f\x8b": "compressed twice",
    b"\0\0\0\x01\0\0": "FreeSurfer MGH",
    b"<": "a web page or XML",
}


def _raw(block: bytes) -> np.void:
    layout = NIFTI2 if block[4:8] == b"n+2\0" else NIFTI1
    if len(block) < layout.itemsize:
        raise DataError(
            "truncated or corrupt (the file ends in its header): copy or export it again", "truncated"
        )
    orders: tuple[Literal["<", ">"], ...] = ("<", ">")
    for order in orders:
        raw: np.void = np.frombuffer(block, layout.newbyteorder(order), count=1)[0]
        if int(raw["sizeof_hdr"]) == layout.itemsize:
            return raw
    raise DataError(
        "truncated or corrupt (the length of its header is wrong): copy or export it again", "truncated"
    )


def _length(raw: np.void) -> int:
    return int(raw["sizeof_hdr"])


def _shape(dim: list[int], channel: int | None, rules: Rules) -> tuple[Triple, int]:
    if not 1 <= dim[0] <= 7:
        raise DataError(
            f"truncated or corrupt (its header claims {dim[0]} axes): copy or export it again", "truncated"
        )
    sizes = dim[1 : dim[0] + 1]
    if min(sizes) < 1:
        raise DataError(f"its header claims {'x'.join(map(str, sizes))} voxels: export it again")
    if len(sizes) < 3:
        raise DataError(
            f"holds a picture of {len(sizes)} axes, not a volume: export the whole series as one file"
        )
    needed = 3 if channel is None else 4
    while len(sizes) > needed and sizes[-1] == 1:
        sizes.pop()
    if len(sizes) != needed:
        raise DataError(f"has {len(sizes)} axes, not {needed}: export one volume per file or fix the layout")
    channels = sizes[3] if channel is not None else 1
    if channel is not None and not 0 <= channel < channels:
        raise DataError(f"has {channels} channels, no channel {channel}: check dataset.json")
    if channels > MAX_CHANNELS:
        raise DataError(
            f"has {channels} channels, more than {MAX_CHANNELS}: export one volume per file", "too-large"
        )
    if math.prod(sizes[:3]) > rules.max_voxels:
        raise DataError(
            f"its header claims {'x'.join(map(str, sizes[:3]))} voxels, more than {rules.max_voxels}: "
            "export it again, or raise [data] max_voxels",
            "too-large",
        )
    return (sizes[0], sizes[1], sizes[2]), channels


def _dtype(raw: np.void) -> np.dtype:
    code = int(raw["datatype"])
    if code not in _TYPES:
        raise DataError(f"voxels of type {_OTHER_TYPES.get(code, code)}: export it as grey values")
    return np.dtype(_TYPES[code]).newbyteorder("<" if raw.dtype["dim"].base.str[0] == "<" else ">")


def _scaling(raw: np.void) -> tuple[float, float]:
    """SP-11.12-2: a slope that is 0 or not finite means that the values are as stored."""
    slope, intercept = float(raw["scl_slope"]), float(raw["scl_inter"])
    if slope == 0 or not math.isfinite(slope):
        return 1.0, 0.0
    if not math.isfinite(intercept):
        raise DataError("its header adds NaN or infinity (scl_inter): export it again")
    return slope, intercept


# --- where the voxels lie ---------------------------------------------------------------------------------


def _affine(raw: np.void, shape: Triple, rules: Rules) -> tuple[np.ndarray, list[str]]:
    """SP-11.12-3: sform before qform; neither: centred, and a warning."""
    warnings = []
    pixdim = np.asarray(raw["pixdim"], np.float64)
    lengths = bool(np.all(np.isfinite(pixdim[1:4]) & (pixdim[1:4] > 0)))
    shown = "x".join(f"{mm:.4g}" for mm in pixdim[1:4])
    sform, qform = int(raw["sform_code"]) > 0, int(raw["qform_code"]) > 0
    if not sform and not lengths:
        raise DataError(
            f"its header gives a voxel as {shown} mm (pixdim), which {_NO_LENGTH}: export it again", "grid"
        )
    if not lengths:
        warnings.append(f"pixdim says {shown} mm, which {_NO_LENGTH}: the sform is used")
    if sform:
        affine = _checked(raw, shape, _sform(raw))
        if qform and lengths and (said := _disagreement(shape, affine, _qform(raw))):
            warnings.append(f"qform and sform disagree ({said}): the sform is used")
        elif lengths and np.any(
            np.abs(edges(affine) - pixdim[1:4]) * shape > GRID_TOLERANCE * pixdim[1:4].min()
        ):
            size = "x".join(f"{mm:.4g}" for mm in edges(affine))
            warnings.append(f"a voxel is {size} mm by the sform and {shown} mm by pixdim: the sform is used")
    elif qform:
        affine = _checked(raw, shape, _qform(raw))
    else:
        if rules.unknown_orientation == "refuse":
            raise DataError(
                "orientation unknown (qform and sform codes are 0), which [data] unknown_orientation refuses: "
                "export it with its orientation",
                "grid",
            )
        warnings.append("orientation unknown (qform and sform codes are 0): taken as LAS, centred")
        affine = np.diag([-pixdim[1], pixdim[2], pixdim[3], 1.0])
        affine[:3, 3] = -affine[:3, :3] @ ((np.array(shape) - 1) / 2)
        affine = _checked(raw, shape, affine)
    return affine, warnings


def _sform(raw: np.void) -> np.ndarray:
    rows = [np.asarray(raw[name], np.float64) for name in ("srow_x", "srow_y", "srow_z")]
    return np.array([*rows, [0.0, 0.0, 0.0, 1.0]])


def _qform(raw: np.void) -> np.ndarray:
    b, c, d = (float(raw[f"quatern_{name}"]) for name in "bcd")
    square = 1.0 - (b * b + c * c + d * d)
    if square < 1e-7:  # a half turn: the difference from 1 is rounding
        length = math.sqrt(b * b + c * c + d * d)
        a, b, c, d = 0.0, b / length, c / length, d / length
    else:
        a = math.sqrt(square)
    pixdim = np.asarray(raw["pixdim"], np.float64)
    affine = np.eye(4)
    affine[:3, :3] = [
        [a * a + b * b - c * c - d * d, 2 * (b * c - a * d), 2 * (b * d + a * c)],
        [2 * (b * c + a * d), a * a + c * c - b * b - d * d, 2 * (c * d - a * b)],
        [2 * (b * d - a * c), 2 * (c * d + a * b), a * a + d * d - b * b - c * c],
    ]
    affine[:3, :3] *= pixdim[1:4] * (1, 1, -1 if pixdim[0] < 0 else 1)
    affine[:3, 3] = [float(raw[f"qoffset_{name}"]) for name in "xyz"]
    return affine


def _disagreement(shape: Triple, sform: np.ndarray, qform: np.ndarray) -> str:
    """How two placements of one volume differ, in words; empty where they do not by more than the tolerance."""
    distance = apart(shape, sform, qform)
    if distance <= GRID_TOLERANCE * min(edges(sform)):
        return ""
    with np.errstate(all="ignore"):  # a qform may hold anything
        mirrored = np.linalg.det(sform[:3, :3]) * np.linalg.det(qform[:3, :3]) < 0
        turned = angle(sform, qform)
        how = "mirrored, " if mirrored else "" if turned < 0.01 else f"turned by {turned:.3g} degrees, "
        q, s = (
            f"{Turn.of(affine).codes} from {', '.join(f'{mm:.4g}' for mm in affine[:3, 3])} mm"
            for affine in (qform, sform)
        )
    return f"{q} against {s}; {how}up to {distance:.3g} mm apart"


def _checked(raw: np.void, shape: Triple, affine: np.ndarray) -> np.ndarray:
    """SP-11.12-4: `affine`, refused where it cannot be that of a scan."""
    spacing = edges(affine)
    with np.errstate(all="ignore"):
        flat = not np.isfinite(affine).all() or not abs(np.linalg.det(affine[:3, :3] / spacing)) > 1e-3
    if flat:
        raise DataError("its header has no usable orientation (singular affine): export it again", "grid")
    if min(spacing) < LEAST_EDGE or max(spacing) > GREATEST_EDGE:
        unit = _UNITS.get(int(raw["xyzt_units"]) & 7)
        raise DataError(
            f"a voxel of {'x'.join(f'{mm:.4g}' for mm in spacing)} mm"
            + (f" (its header counts in {unit})" if unit else "")
            + f", not {LEAST_EDGE:g} to {GREATEST_EDGE:g} mm: export it in millimetres",
            "grid",
        )
    if (shifted := shear(shape, affine)) > GRID_TOLERANCE * min(spacing):
        raise DataError(
            f"its axes are not at right angles (sheared by {shifted:.3g} mm over the volume, "
            f"{GRID_TOLERANCE * min(spacing):.3g} mm is allowed): resample it to a rectangular grid",
            "grid",
        )
    return affine
