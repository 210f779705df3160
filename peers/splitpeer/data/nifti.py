"""One NIfTI file: its grid from the header, its voxels in RAS order, and one clear line when it is broken."""

from __future__ import annotations

import errno
import gzip
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import nibabel as nib
import numpy as np
from nibabel import orientations
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError, HeaderTypeError
from nibabel.wrapstruct import WrapStructError

from splitpeer.data.layouts import Case
from splitpeer.errors import DataError

MAX_VOXELS = 2**30
"""More voxels than this in one file is a broken or hostile header: refused before anything is allocated."""

_UNREADABLE = (
    ImageFileError,
    HeaderDataError,
    HeaderTypeError,
    WrapStructError,
    OSError,
    EOFError,
    zlib.error,
    ValueError,
    OverflowError,
)


@dataclass(frozen=True)
class Header:
    """What the header says of a volume. `shape` and `affine` (4x4, mm) hold after reorientation to RAS."""

    shape: tuple[int, int, int]
    affine: np.ndarray
    orientation: str


def read_header(case: Case) -> Header:
    """The grid of a case, from the header alone. Raises DataError for a file that cannot be used."""
    return _header(case, _open(case))


def read_voxels(case: Case) -> tuple[np.ndarray, Header]:
    """Voxels float32 [x, y, z] in RAS order, scaled as the header asks. Reads the whole file.

    Raises DataError for a truncated or corrupt file (a gzip's check sum is verified), a value that is not
    finite, a number of axes other than the case needs, or a channel that is not there.
    """
    image = _open(case)
    header = _header(case, image)
    with _naming(case):
        if case.path.name.lower().endswith(".gz"):
            image = type(image).from_bytes(_unzip(case, image))
        # Slicing before casting: only the wanted channel is scaled and copied.
        data = image.dataobj if case.channel is None else image.dataobj[..., case.channel]
        voxels = np.asanyarray(data).astype(np.float32)
    if not np.isfinite(voxels).all():
        raise DataError(
            f"{case.path}: holds values that are not finite numbers: export it again without NaN or Inf",
            "not-finite",
        )
    ras = orientations.apply_orientation(voxels, orientations.io_orientation(image.affine))
    return np.ascontiguousarray(ras), header


def _open(case: Case) -> nib.Nifti1Image:
    with _naming(case):
        # Without mmap: a file that shrinks while mapped would kill the process.
        image = nib.load(case.path, mmap=False)
    if not isinstance(image, nib.Nifti1Image):  # NIfTI-2 derives from it
        raise DataError(f"{case.path}: not a NIfTI file: convert it, for instance with dcm2niix")
    return image


def _header(case: Case, image: nib.Nifti1Image) -> Header:
    shape, path = tuple(int(n) for n in image.shape), case.path
    expected = 3 if case.channel is None else 4
    if len(shape) != expected:
        raise DataError(
            f"{path}: has {len(shape)} axes, not {expected}: export one volume per file or fix the layout"
        )
    if case.channel is not None and not 0 <= case.channel < shape[3]:
        raise DataError(f"{path}: has {shape[3]} channels, no channel {case.channel}: check dataset.json")
    if min(shape) < 1 or np.prod(shape, dtype=float) > MAX_VOXELS:
        raise DataError(f"{path}: its header claims {'x'.join(map(str, shape))} voxels: export it again")
    if image.get_data_dtype().kind not in "iuf":
        raise DataError(f"{path}: voxels of type {image.get_data_dtype()}: export it as grey values")
    affine = np.asarray(image.affine, dtype=np.float64)
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-9:
        raise DataError(f"{path}: its header has no usable orientation (singular affine): export it again")
    turn = orientations.io_orientation(affine)
    ras_shape = [0, 0, 0]
    for axis, target in enumerate(turn[:, 0]):
        ras_shape[int(target)] = shape[axis]
    return Header(
        shape=tuple(ras_shape),
        affine=affine @ orientations.inv_ornt_aff(turn, shape[:3]),
        orientation="".join(orientations.ornt2axcodes(turn)),
    )


def _unzip(case: Case, image: nib.Nifti1Image) -> bytes:
    """The unpacked file, read to its end: only there is the check sum compared, and nibabel stops short."""
    due = int(image.dataobj.offset) + int(np.prod(image.shape)) * image.get_data_dtype().itemsize
    with gzip.open(case.path) as packed:
        content = packed.read(due)
        while packed.read(1 << 20):
            pass
    return content


@contextmanager
def _naming(case: Case) -> Iterator[None]:
    """Whatever a broken file makes nibabel or zlib raise becomes one line that names the file."""
    try:
        yield
    except FileNotFoundError:
        raise DataError(f"{case.path}: no such file: check the path", "missing") from None
    except _UNREADABLE as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise _unread(case, error) from None
        cause = " ".join(str(error).split())[:200] or type(error).__name__
        text = f"{case.path}: truncated or corrupt ({cause}): copy or export it again"
        raise DataError(text, "truncated") from None


def _unread(case: Case, error: OSError) -> DataError:
    """The system did not let us read: because of this file, or because of what we lack ourselves."""
    cause = {errno.EMFILE: "descriptors", errno.ENFILE: "descriptors", errno.ENOMEM: "memory"}
    return DataError(
        f"{case.path}: cannot be read ({error.strerror}): check the file and the disk",
        cause.get(error.errno or 0, "unreadable"),
    )
