"""Files as hospitals have them: what is read, what is refused, what is warned about (SP-11.12-1 to SP-11.12-4)."""

from __future__ import annotations

import gzip
import math
import subprocess
import sys
import tracemalloc
import warnings
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from nibabel import nifti1, nifti2

from splitpeer.data import nifti_header
from splitpeer.data.layouts import Case
from splitpeer.data.nifti import MOST_BEHIND, Rules, read_header, read_voxels
from splitpeer.errors import DataError

SHAPE = (60, 50, 20)
SPACING = np.diag([3.0, 3.0, 6.0, 1.0])


@pytest.fixture(autouse=True)
def nothing_on_stderr(capfd: pytest.CaptureFixture[str]):
    """No line of nibabel's, no RuntimeWarning: what is to be said is in the header or the error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield
    assert capfd.readouterr().err == ""


def head(shape: tuple[int, ...] = SHAPE, dtype: str = "f4") -> np.ndarray:
    voxels = np.zeros(shape, dtype)
    voxels[5:-5, 5:-5] = np.random.default_rng(0).integers(50, 120, voxels[5:-5, 5:-5].shape)
    return voxels


def write(path: Path, image: nib.Nifti1Image) -> Case:
    nib.save(image, path)
    return Case("p", path)


def patched(case: Case, **fields: object) -> Case:
    """The same file with fields of its header set to anything."""
    packed = case.path.name.endswith(".gz")
    content = bytearray(gzip.decompress(case.path.read_bytes()) if packed else case.path.read_bytes())
    raw = np.frombuffer(content, nib.nifti1.header_dtype, count=1)
    raw = raw.copy()
    for name, value in fields.items():
        raw[name] = value
    content[:348] = raw.tobytes()
    case.path.write_bytes(gzip.compress(content) if packed else content)
    return case


def refusal(case: Case, rules: Rules | None = None) -> str:
    with pytest.raises(DataError) as caught:
        read_voxels(case, rules)
    text = str(caught.value)
    assert text.startswith(f"{case.path}: ") and "\n" not in text
    return text.removeprefix(f"{case.path}: ")


# --- the file ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("dtype", ["u1", "i1", "i2", "u2", "i4", "u4", "i8", "u8", "f4", "f8"])
def test_every_number_type_reads_alike(tmp_path: Path, kind, order: str, dtype: str) -> None:
    """SP-11.12-1."""
    header = kind.header_class(endianness=order)
    header.set_data_dtype(np.dtype(dtype).newbyteorder(order))
    case = write(tmp_path / "p.nii.gz", kind(head(dtype=dtype), SPACING, header))
    voxels, header = read_voxels(case)
    np.testing.assert_array_equal(voxels, head())
    assert header.dtype == np.dtype(dtype).newbyteorder(order if dtype[1] != "1" else "|")
    assert header.warnings == () and voxels.dtype == np.float32 and voxels.flags.c_contiguous


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [(nifti_header.NIFTI1, nifti1.header_dtype), (nifti_header.NIFTI2, nifti2.header_dtype)],
)
def test_fields_are_where_nibabel_has_them(ours: np.dtype, theirs: np.dtype) -> None:
    assert ours.itemsize == theirs.itemsize
    for name in ours.names or ():
        assert ours.fields[name][:2] == theirs.fields[name][:2], name


@pytest.mark.parametrize("size", [3, 10, 300])
def test_a_tiny_file_is_shorter_than_the_longest_header(tmp_path: Path, size: int) -> None:
    voxels = np.arange(1, 1 + 2 * size, dtype=np.uint8 if size < 100 else np.int16).reshape(2, 1, size)
    np.testing.assert_array_equal(
        read_voxels(write(tmp_path / "p.nii", nib.Nifti1Image(voxels, SPACING)))[0], voxels
    )


def test_packed_or_not_is_seen_by_content(tmp_path: Path) -> None:
    """SP-11.12-1: plain bytes named .nii.gz, gzip bytes named .nii."""
    case = write(tmp_path / "good.nii", nib.Nifti1Image(head(), SPACING))
    plain = tmp_path / "plain.nii.gz"
    plain.write_bytes(case.path.read_bytes())
    packed = tmp_path / "packed.nii"
    packed.write_bytes(gzip.compress(case.path.read_bytes()))
    for path, said in ((plain, "named .gz but not compressed"), (packed, "compressed but not named .nii.gz")):
        voxels, header = read_voxels(Case("p", path))
        np.testing.assert_array_equal(voxels, head())
        assert said in header.warnings[0]


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (bytes(128) + b"DICM" + bytes(500), "DICOM"),
        (b"NRRD0004\ntype: float\n" + bytes(500), "NRRD"),
        (gzip.compress(b"\0\0\0\x01\0\0\0\x10" + bytes(500), mtime=0), "FreeSurfer MGH"),
        (b"\x89PNG\r\n\x1a\n" + bytes(500), "a PNG picture"),
        (b"PK\x03\x04" + bytes(500), "a ZIP archive"),
        (b"\x89HDF\r\n" + bytes(500), "HDF5 (perhaps MINC)"),
        (b"<!DOCTYPE html><html>404", "a web page or XML"),
        (gzip.compress(gzip.compress(bytes(500), mtime=0), mtime=0), "compressed twice"),
        (b"404 not found", "text"),
        ((348).to_bytes(4, "little") + bytes(500), "an ANALYZE header"),
        ((348).to_bytes(4, "little") + bytes(340) + b"ni1\0" + bytes(4), "the header of a .hdr/.img pair"),
        (bytes(500), "something unknown"),
    ],
)
def test_what_is_no_nifti_is_named(tmp_path: Path, content: bytes, kind: str) -> None:
    path = tmp_path / "p.nii.gz"
    path.write_bytes(content)
    said = f"not a NIfTI file but {kind}: convert it, for instance with dcm2niix"
    assert refusal(Case("p", path)) == said
    with pytest.raises(DataError, match="not a NIfTI file"):
        read_header(Case("p", path))


@pytest.mark.parametrize("extra", [(1,), (1, 1), (1, 1, 1, 1)])
def test_axes_of_one_voxel_behind_the_third_are_dropped(tmp_path: Path, extra: tuple[int, ...]) -> None:
    """SP-11.12-1: x, y, z, 1."""
    case = write(tmp_path / "p.nii", nib.Nifti1Image(head().reshape(*SHAPE, *extra), SPACING))
    np.testing.assert_array_equal(read_voxels(case)[0], head())


def test_one_slice_is_a_volume_and_a_picture_is_not(tmp_path: Path) -> None:
    case = write(tmp_path / "slice.nii", nib.Nifti1Image(head()[..., 9:10], SPACING))
    assert read_voxels(case)[0].shape == (60, 50, 1)
    case = write(tmp_path / "flat.nii", nib.Nifti1Image(head()[..., 9], SPACING))
    assert refusal(case) == "holds a picture of 2 axes, not a volume: export the whole series as one file"
    case = write(tmp_path / "four.nii", nib.Nifti1Image(np.stack([head()] * 2, -1), SPACING))
    assert refusal(case) == "has 4 axes, not 3: export one volume per file or fix the layout"
    one = Case("p", write(tmp_path / "one.nii", nib.Nifti1Image(head()[..., None, None], SPACING)).path, 0)
    np.testing.assert_array_equal(read_voxels(one)[0], head())


def test_a_channel_is_read_from_the_middle_of_a_packed_file(tmp_path: Path) -> None:
    volumes = np.stack([head() + n for n in range(3)], -1)
    write(tmp_path / "p.nii.gz", nib.Nifti1Image(volumes, SPACING))
    for channel in range(3):
        np.testing.assert_array_equal(
            read_voxels(Case("p", tmp_path / "p.nii.gz", channel))[0], head() + channel
        )
    (tmp_path / "p.nii.gz").write_bytes((tmp_path / "p.nii.gz").read_bytes()[:-2000])  # of the last channel
    assert "truncated or corrupt" in refusal(Case("p", tmp_path / "p.nii.gz", 0))


# --- values ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("slope", "intercept", "expected"),
    [
        (0.1, -7.3, "scaled"),
        (2.0, 0.0, "scaled"),
        (0.0, 5.0, "stored"),
        (math.nan, 5.0, "stored"),
        (math.inf, math.nan, "stored"),
    ],
)
def test_values_are_scaled_in_float64_and_rounded_once(tmp_path: Path, slope, intercept, expected) -> None:
    """SP-11.12-2."""
    stored = np.random.default_rng(0).integers(-30000, 30000, SHAPE, np.int16)
    case = patched(
        write(tmp_path / "p.nii", nib.Nifti1Image(stored, SPACING)), scl_slope=slope, scl_inter=intercept
    )
    wanted = stored.astype(np.float64)
    if expected == "scaled":
        wanted = wanted * float(np.float32(slope)) + float(np.float32(intercept))
    np.testing.assert_array_equal(read_voxels(case)[0], wanted.astype(np.float32))


def test_nan_and_infinity_are_refused(tmp_path: Path) -> None:
    """SP-11.12-2."""
    for name, value in (("nan", np.nan), ("inf", np.inf), ("huge", 1e300)):
        voxels = head(dtype="f8")
        voxels[7, 7, 7] = value
        case = write(tmp_path / f"{name}.nii", nib.Nifti1Image(voxels, SPACING))
        assert refusal(case).startswith("holds values that are not finite numbers")
    case = write(tmp_path / "slope.nii", nib.Nifti1Image(head(dtype="i2"), SPACING))
    assert "not finite" in refusal(patched(case, scl_slope=3e38, scl_inter=0))
    assert "adds NaN or infinity" in refusal(patched(case, scl_slope=1, scl_inter=np.inf))


# --- where it lies -----------------------------------------------------------------------------------------


def oblique() -> np.ndarray:
    a, b = math.radians(15), math.radians(10)
    x = np.array([[1, 0, 0], [0, math.cos(a), -math.sin(a)], [0, math.sin(a), math.cos(a)]])
    z = np.array([[math.cos(b), -math.sin(b), 0], [math.sin(b), math.cos(b), 0], [0, 0, 1]])
    affine = np.eye(4)
    affine[:3, :3] = x @ z @ SPACING[:3, :3]
    affine[:3, 3] = (-80, -60, -40)
    return affine


def placed(sform: np.ndarray | None, qform: np.ndarray | None) -> nib.Nifti1Image:
    image = nib.Nifti1Image(head(), SPACING)
    image.set_qform(qform, 1 if qform is not None else 0)
    image.set_sform(sform, 2 if sform is not None else 0)
    return image


@pytest.mark.parametrize("affine", [oblique(), np.diag([-1, -1, 1, 1]) @ oblique(), SPACING])
def test_sform_before_qform(tmp_path: Path, affine: np.ndarray) -> None:
    """SP-11.12-3."""
    for name, image in {
        "both": placed(affine, affine),
        "sform": placed(affine, None),
        "qform": placed(None, affine),
    }.items():
        header = read_header(write(tmp_path / f"{name}.nii", image))
        ras = nib.as_closest_canonical(image).affine
        np.testing.assert_allclose(header.affine, ras, atol=1e-4)
        assert header.warnings == ()
        assert header.orientation == "".join(nib.aff2axcodes(affine))


def mirrored() -> np.ndarray:
    return np.diag([-1.0, 1, 1, 1]) @ oblique()


def moved() -> np.ndarray:
    affine = oblique()
    affine[2, 3] += 20
    return affine


@pytest.mark.parametrize(
    ("qform", "words"),
    [
        (mirrored(), ["LAS from 80, -60, -40 mm against RAS from -80, -60, -40 mm", "mirrored"]),
        (moved(), ["from -80, -60, -20 mm against", "-40 mm; up to 20 mm apart"]),
        (SPACING, ["RAS from 0, 0, 0 mm", "turned by 18 degrees"]),
    ],
)
def test_forms_that_disagree_raise_a_warning_with_both(tmp_path: Path, qform, words: list[str]) -> None:
    header = read_header(write(tmp_path / "p.nii", placed(oblique(), qform)))
    (warning,) = header.warnings
    assert warning.startswith("qform and sform disagree (") and warning.endswith("the sform is used")
    for word in words:
        assert word in warning, warning
    np.testing.assert_allclose(header.affine, oblique(), atol=1e-4)
    assert read_header(write(tmp_path / "p.nii", placed(qform, qform))).warnings == ()


def test_an_unknown_orientation_is_warned_about_or_refused(tmp_path: Path) -> None:
    """SP-11.12-3: both codes 0."""
    case = write(tmp_path / "p.nii", placed(None, None))
    voxels, header = read_voxels(case)
    assert header.warnings == ("orientation unknown (qform and sform codes are 0): taken as LAS, centred",)
    assert header.orientation == "LAS"
    np.testing.assert_array_equal(voxels, head()[::-1])
    np.testing.assert_allclose(
        header.affine @ ((SHAPE[0] - 1) / 2, (SHAPE[1] - 1) / 2, (SHAPE[2] - 1) / 2, 1), (0, 0, 0, 1)
    )
    assert refusal(case, Rules(unknown_orientation="refuse")).startswith("orientation unknown")


@pytest.mark.parametrize("shift", [2.0, -2.0, 0.8])
def test_a_sheared_sform_is_refused(tmp_path: Path, shift: float) -> None:
    """SP-11.12-4: `shift` mm to anterior over the stack."""
    affine = SPACING.copy()
    affine[1, 2] = shift / SHAPE[2]
    text = refusal(write(tmp_path / "p.nii", placed(affine, None)))
    assert text.startswith("its axes are not at right angles (sheared by ")
    assert "0.75 mm is allowed" in text


@pytest.mark.parametrize("noise", [0.0, 1e-5, 5e-5])
def test_shear_of_rounding_is_noise(tmp_path: Path, noise: float) -> None:
    affine = oblique()
    affine[1, 2] += noise
    assert read_header(write(tmp_path / "p.nii", placed(affine, None))).warnings == ()


@pytest.mark.parametrize("bad", [0.0, -3.0, math.nan, math.inf])
def test_a_pixdim_that_is_no_length_is_a_warning_beside_an_sform_and_a_refusal_without(tmp_path, bad) -> None:
    pixdim = (1, 3, bad, 6, 0, 0, 0, 0)
    case = patched(write(tmp_path / "s.nii", placed(oblique(), None)), pixdim=pixdim)
    (warning,) = read_header(case).warnings
    assert warning.startswith("pixdim says 3x") and "is not a positive length: the sform is used" in warning
    for name, image in (("q", placed(None, oblique())), ("n", placed(None, None))):
        case = patched(write(tmp_path / f"{name}.nii", image), pixdim=pixdim)
        assert "which is not a positive length: export it again" in refusal(case)


@pytest.mark.parametrize(
    ("scale", "unit", "said"),
    [
        (
            2000,
            "micron",
            "a voxel of 6000x6000x1.2e+04 mm (its header counts in micrometres), not 0.02 to 50 mm",
        ),
        (1e-3, "meter", "a voxel of 0.003x0.003x0.006 mm (its header counts in metres), not 0.02 to 50 mm"),
        (100, "mm", "a voxel of 300x300x600 mm, not 0.02 to 50 mm"),
    ],
)
def test_sizes_in_other_units_are_refused(tmp_path: Path, scale: float, unit: str, said: str) -> None:
    """SP-11.12-4."""
    affine = SPACING.copy()
    affine[:3, :3] *= scale
    image = placed(affine, None)
    image.header.set_xyzt_units(unit)
    assert refusal(write(tmp_path / "p.nii", image)) == f"{said}: export it in millimetres"


@pytest.mark.parametrize("scale", [0.01, 5.0])
def test_a_head_of_another_size_is_warned_about(tmp_path: Path, scale: float) -> None:
    affine = SPACING.copy()
    affine[:3, :3] *= scale
    (warning,) = read_header(write(tmp_path / "p.nii", nib.Nifti1Image(head(), affine))).warnings
    assert warning == f"the volume is {180 * scale:.3g} mm long at most: is this a head, in millimetres?"


def test_pixdim_that_contradicts_the_sform_is_warned_about(tmp_path: Path) -> None:
    case = patched(
        write(tmp_path / "p.nii", placed(SPACING, None)), pixdim=(1, 1, 1, 1, 0, 0, 0, 0), qform_code=0
    )
    assert read_header(case).warnings == (
        "a voxel is 3x3x6 mm by the sform and 1x1x1 mm by pixdim: the sform is used",
    )


@pytest.mark.parametrize(
    "fields",
    [
        {"srow_x": (0, 0, 0, 0)},
        {"srow_x": (math.nan, 0, 0, 0)},
        {"srow_z": (0, 0, math.inf, 0)},
        {"srow_x": (3, 3, 0, 0), "srow_y": (3, 3, 0, 0)},
        {"srow_x": (0, 0, 0, 3e38), "srow_y": (0, 0, 0, 0)},
        {"sform_code": 0, "qform_code": 1, "quatern_b": math.nan},
        {"sform_code": 0, "qform_code": 1, "quatern_b": math.inf},
        {"sform_code": 0, "qform_code": 1, "qoffset_x": math.nan},
    ],
)
def test_an_affine_that_is_none_is_refused_without_a_word_of_numpy(tmp_path: Path, fields: dict) -> None:
    case = patched(write(tmp_path / "p.nii", placed(SPACING, None)), **fields)
    assert refusal(case) == "its header has no usable orientation (singular affine): export it again"


@pytest.mark.parametrize("fields", [{"quatern_b": math.nan}, {"qoffset_x": math.inf}, {"quatern_c": 5.0}])
def test_a_broken_qform_beside_a_good_sform_is_a_warning(tmp_path: Path, fields: dict) -> None:
    case = patched(write(tmp_path / "p.nii", placed(oblique(), oblique())), **fields)
    assert read_header(case).warnings[0].startswith("qform and sform disagree")


def test_header_fields_of_any_value_raise_nothing_else(tmp_path: Path) -> None:
    """A thousand headers with random octets in random places."""
    case = write(tmp_path / "p.nii", placed(oblique(), oblique()))
    good, source = case.path.read_bytes(), np.random.default_rng(1)
    refused = 0
    for _ in range(1000):
        content = bytearray(good)
        for place in source.integers(0, 344, source.integers(1, 12)):
            content[place] = source.integers(256)
        case.path.write_bytes(content)
        said = ""
        try:
            read_header(case)
        except DataError as error:
            said = str(error)
        refused += bool(said)
        assert not said or (said.startswith(f"{case.path}: ") and "\n" not in said)
    assert 100 < refused < 1000


# --- size --------------------------------------------------------------------------------------------------


def lying(path: Path, sizes: tuple[int, int, int], body: bytes = b"", channels: int = 1) -> Case:
    """A file whose header claims more than its body holds."""
    case = write(path, nib.Nifti1Image(np.zeros((1, 1, 1), np.uint8), SPACING))
    patched(case, dim=(4 if channels > 1 else 3, *sizes, channels, 1, 1, 1))
    content = case.path.read_bytes()
    content = gzip.decompress(content) if path.name.endswith(".gz") else content
    content = content[:352] + body
    path.write_bytes(gzip.compress(content) if path.name.endswith(".gz") else content)
    return case


def peak(call) -> int:
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", ["p.nii", "p.nii.gz"])
@pytest.mark.parametrize(
    ("sizes", "said"),
    [((1023, 1023, 1023), "more than 134217728"), ((500, 500, 500), "its header claims 125000352 bytes")],
)
def test_a_header_that_claims_too_much_costs_no_memory(tmp_path: Path, name: str, sizes, said: str) -> None:
    """1023^3 voxels in 1 KB took 4 GB."""
    case = lying(tmp_path / name, sizes)
    assert peak(lambda: refusal(case)) < 2**21
    assert said in refusal(case)
    with pytest.raises(DataError):
        read_header(case)


def test_the_limit_of_voxels_is_a_setting(tmp_path: Path) -> None:
    case = write(tmp_path / "p.nii", nib.Nifti1Image(head(), SPACING))
    assert read_voxels(case, Rules(max_voxels=60_000))[0].shape == SHAPE
    assert refusal(case, Rules(max_voxels=59_999)) == (
        "its header claims 60x50x20 voxels, more than 59999: export it again, or raise [data] max_voxels"
    )


def test_a_gzip_bomb_is_read_no_further_than_its_header_says(tmp_path: Path) -> None:
    """64 MB behind the last voxel: a small file on disk, refused after MOST_BEHIND."""
    case = lying(tmp_path / "p.nii.gz", SHAPE, bytes(60_000 + 2**26))
    assert case.path.stat().st_size < 100_000
    assert peak(lambda: refusal(case)) < 2**22
    assert (
        refusal(case)
        == f"holds more than {MOST_BEHIND} bytes that its header does not describe: export it again"
    )
    case = lying(tmp_path / "padded.nii.gz", SHAPE, bytes(60_000 + MOST_BEHIND))
    assert read_voxels(case)[0].shape == SHAPE


def test_no_file_of_endless_channels(tmp_path: Path) -> None:
    case = lying(tmp_path / "p.nii.gz", SHAPE, channels=30_000)
    assert refusal(Case("p", case.path, 0)) == "has 30000 channels, more than 64: export one volume per file"


def test_a_hostile_offset_is_refused(tmp_path: Path) -> None:
    case = write(tmp_path / "p.nii.gz", nib.Nifti1Image(head(), SPACING))
    for offset in (1e9, -5, 20, math.nan):
        assert refusal(patched(case, vox_offset=offset)).startswith("its header places the voxels at octet ")
    assert read_voxels(patched(case, vox_offset=0))[0].shape == SHAPE


def test_a_plausible_lie_takes_no_more_than_the_file_holds(tmp_path: Path) -> None:
    """Half a MiB that claims 125 MB, which deflate could do: memory follows what is there, not the claim."""
    source = np.random.default_rng(0)
    body = source.integers(0, 255, 2**19, np.uint8).tobytes()
    case = lying(tmp_path / "p.nii.gz", (500, 500, 500), body)
    script = (
        "import sys\n"
        "from pathlib import Path\n"
        "from splitpeer.data.layouts import Case\n"
        "from splitpeer.data.nifti import read_voxels\n"
        "from splitpeer.errors import DataError\n"
        "try:\n    read_voxels(Case('p', Path(sys.argv[1])))\n"
        "except DataError as error:\n    print(error)\n"
        "print(Path('/proc/self/status').read_text().partition('VmHWM:')[2].split()[0])\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", script, str(case.path)], capture_output=True, text=True, timeout=120
    )
    said, used = ran.stdout.strip().splitlines()
    assert "truncated or corrupt" in said
    assert int(used) < 200_000, "KiB: the interpreter and numpy take about 60 MiB, the lie 500"
