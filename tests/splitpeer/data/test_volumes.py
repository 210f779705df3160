import logging
import threading
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from monai.transforms import NormalizeIntensity

from splitpeer.data.geometry import compare_geometry
from splitpeer.data.layouts import Case, find_images, find_labels
from splitpeer.data.nifti import read_header, read_voxels
from splitpeer.data.pseudonym import pseudonym
from splitpeer.data.volumes import Volumes
from splitpeer.errors import DataError
from splitpeer.logs import handle


def normalised(voxels: np.ndarray) -> np.ndarray:
    out = voxels.astype(np.float64)
    inside = out != 0
    out[inside] = (out[inside] - out[inside].mean()) / out[inside].std()
    return out


def only(path: Path, files, **settings) -> tuple[Volumes, bytes]:
    volumes = Volumes([Case("p", path)], salt=files.SALT, **settings)
    return volumes, volumes.keys()[0]


def test_an_image_is_normalised_over_its_non_zero_voxels(tmp_path: Path, files) -> None:
    """SP-11-22."""
    voxels = files.head((13, 11, 9))
    volumes, key = only(files.save(tmp_path / "p.nii.gz", voxels), files)
    assert key == pseudonym(files.SALT, "p")
    out = volumes.window(key, (0, 0, 0), (13, 11, 9))
    assert out.dtype == np.float32 and out.shape == (1, 13, 11, 9)
    np.testing.assert_allclose(out[0], normalised(voxels), atol=1e-5)
    np.testing.assert_array_equal(out[0] == 0, voxels == 0)
    np.testing.assert_allclose(out, np.asarray(NormalizeIntensity(nonzero=True)(voxels[None])), atol=1e-5)


def test_one_patient_stored_as_lps_ras_or_turned_gives_the_same_arrays(tmp_path: Path, files) -> None:
    """SP-11-21."""
    voxels = files.head((13, 11, 9))
    cases = [
        Case(axes, files.save(tmp_path / f"{axes}.nii.gz", voxels, axes=axes))
        for axes in ("RAS", "LPS", "SRA")
    ]
    volumes = Volumes(cases, salt=files.SALT)
    grids = {axes: volumes.geometry(pseudonym(files.SALT, axes)) for axes in ("RAS", "LPS", "SRA")}
    arrays = {axes: volumes.window(pseudonym(files.SALT, axes), (0, 0, 0), (13, 11, 9)) for axes in grids}
    for axes, grid in grids.items():
        np.testing.assert_array_equal(arrays[axes], arrays["RAS"])
        assert grid.shape == (13, 11, 9) and grid.directions == (1, 0, 0, 0, 1, 0, 0, 0, 1)
        assert grid.origin == pytest.approx((-10, 20, 5)) and grid.spacing == (1, 1, 1)
    assert not np.array_equal(np.asarray(nib.load(cases[1].path).dataobj), voxels)


def test_geometry_reads_the_header_only(tmp_path: Path, files) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (240, 240, 155), np.uint8)
    path = files.save(tmp_path / "p.nii.gz", noise, axes="LPS", origin=(-239, 0, 0))
    files.truncate(path, 0.1)  # the voxels are gone, the header is there
    volumes, key = only(path, files)
    grid = volumes.geometry(key)
    assert (grid.shape, grid.spacing) == ((240, 240, 155), (1.0, 1.0, 1.0))
    assert read_header(volumes.case(key)).orientation == "LPS"
    assert grid.origin == (-239.0, 0.0, 0.0)
    with pytest.raises(DataError, match=r"p\.nii\.gz: truncated or corrupt"):
        volumes.window(key, (0, 0, 0), (1, 1, 1))


def test_msd_modality_is_the_last_axis(msd: Path, files) -> None:
    for channel, modality in enumerate(("flair", "t1", "t1ce", "t2")):
        volumes = Volumes(find_images(msd, "msd", modality), salt=files.SALT)
        got = volumes.window(pseudonym(files.SALT, "BRATS_002"), (0, 0, 0), (12, 10, 8))
        np.testing.assert_allclose(got[0], normalised(files.head(seed=20 + channel)), atol=1e-5)
    masks = Volumes(find_labels(msd, "msd"), salt=files.SALT, labels="msd")
    assert masks.keys() == volumes.keys()
    compare_geometry(
        {
            "a": {k: volumes.geometry(k) for k in sorted(volumes.keys())},
            "b": {k: masks.geometry(k) for k in sorted(masks.keys())},
        }
    )


def test_masks_become_regions(tmp_path: Path, files) -> None:
    marks = files.mask(values=(1, 2, 4))
    volumes, key = only(files.save(tmp_path / "p.nii.gz", marks, axes="LPS"), files, labels="brats")
    out = volumes.window(key, (0, 0, 0), marks.shape)
    assert out.dtype == np.uint8 and out.shape == (3, *marks.shape)
    np.testing.assert_array_equal(out[0], marks > 0)
    np.testing.assert_array_equal(out[1], (marks == 1) | (marks == 4))
    np.testing.assert_array_equal(out[2], marks == 4)


def test_a_mask_of_another_convention_names_the_file(tmp_path: Path, files) -> None:
    volumes, key = only(files.save(tmp_path / "p.nii.gz", files.mask(values=(1, 2, 4))), files, labels="msd")
    with pytest.raises(DataError, match=r"p\.nii\.gz: label value\(s\) 4 are not in convention 'msd'"):
        volumes.window(key, (0, 0, 0), (1, 1, 1))


@pytest.mark.parametrize("axes", ["RAS", "LPS"])
def test_two_millimetres_to_one_keeps_every_place_in_the_world(tmp_path: Path, files, axes: str) -> None:
    """SP-11-21."""
    # The intensity is the position, so a shift of the resampled grid by any part of a voxel shows.
    x, y, z = np.meshgrid(*(np.arange(n) * 2.0 for n in (12, 10, 8)), indexing="ij")
    path = files.save(
        tmp_path / "p.nii.gz", (x + 100 * y + 10000 * z + 1).astype(np.float32), spacing=(2, 2, 2), axes=axes
    )
    volumes, key = only(path, files, spacing=(1.0, 1.0, 1.0))
    grid = volumes.geometry(key)
    assert grid.shape == (23, 19, 15) and grid.spacing == pytest.approx((1, 1, 1))
    assert grid.origin == pytest.approx((-10, 20, 5)) and grid.stored == (2, 2, 2)
    out = volumes.window(key, (0, 0, 0), grid.shape)[0]
    assert volumes._volume(key).shape[1:] == grid.shape
    x, y, z = np.meshgrid(*(np.arange(n) * 1.0 for n in grid.shape), indexing="ij")
    np.testing.assert_allclose(out, normalised(x + 100 * y + 10000 * z + 1), atol=1e-4)


@pytest.mark.parametrize("shape", [(7, 12, 9), (8, 8, 8)])
@pytest.mark.parametrize("native", [(1.0, 1.0, 5.0), (0.7, 0.9, 1.3)])
def test_the_header_foretells_the_resampled_shape(tmp_path: Path, files, shape, native) -> None:
    volumes, key = only(
        files.save(tmp_path / "p.nii", files.head(shape), spacing=native), files, spacing=(1, 1, 1)
    )
    assert volumes._volume(key).shape[1:] == volumes.geometry(key).shape


def test_a_resampled_mask_holds_no_invented_labels(tmp_path: Path, files) -> None:
    path = files.save(tmp_path / "p.nii.gz", files.mask(values=(1, 2, 4)), spacing=(2, 2, 2))
    volumes, key = only(path, files, spacing=(1.0, 1.0, 1.0), labels="brats")
    out = volumes.window(key, (0, 0, 0), volumes.geometry(key).shape)
    assert 3 * 8 * 3 * 2 * 0.7 < out[0].sum() < 3 * 8 * 3 * 2 * 1.4  # eight small voxels for each


def test_the_same_spacing_is_not_resampled(tmp_path: Path, files) -> None:
    path = files.save(tmp_path / "p.nii.gz", files.head(), spacing=(1.0005, 1, 1))
    plain, key = only(path, files)
    asked, _ = only(path, files, spacing=(1.0, 1.0, 1.0))
    np.testing.assert_array_equal(plain._volume(key), asked._volume(key))
    assert plain.geometry(key) == asked.geometry(key)


@pytest.mark.parametrize(
    ("origin", "size"),
    [
        ((0, 0, 0), (12, 10, 8)),
        ((-3, 2, 5), (7, 30, 6)),
        ((-2, -3, -4), (16, 16, 16)),
        ((3, 3, 7), (2, 2, 1)),
    ],
)
def test_windows_are_zero_padded_outside(tmp_path: Path, files, origin, size) -> None:
    """SP-11-23."""
    volumes, key = only(files.save(tmp_path / "p.nii", files.head()), files)
    padded = np.pad(volumes._volume(key)[0], 40)
    expected = padded[tuple(slice(o + 40, o + 40 + n) for o, n in zip(origin, size, strict=True))]
    np.testing.assert_array_equal(volumes.window(key, origin, size)[0], expected)


@pytest.mark.parametrize("origin", [(-4, 0, 0), (12, 0, 0), (0, 0, 900), (0, -50, 0)])
def test_windows_wholly_outside_are_zero(tmp_path: Path, files, origin) -> None:
    volumes, key = only(files.save(tmp_path / "p.nii", files.head() + 1), files)
    assert not volumes.window(key, origin, (4, 4, 4)).any()


def test_a_window_is_a_copy(tmp_path: Path, files) -> None:
    volumes, key = only(files.save(tmp_path / "p.nii", files.head()), files)
    volumes.window(key, (0, 0, 0), (12, 10, 8))[...] = 7
    assert volumes.window(key, (0, 0, 0), (12, 10, 8)).max() != 7


def test_the_extent_is_the_box_around_the_head(tmp_path: Path, files) -> None:
    volumes, key = only(files.save(tmp_path / "p.nii", files.head()), files)
    assert volumes.extent(key) == ((2, 10), (2, 8), (2, 6))


def test_the_cache_is_bounded_and_forgets_the_oldest(tmp_path: Path, files, caplog) -> None:
    one = 4 * 64 * 64 * 50  # bytes: a little over 0.78 MiB, so two fit in 2 MiB and three do not
    cases = [Case(n, files.save(tmp_path / f"{n}.nii", files.head((64, 64, 50)))) for n in "abc"]
    volumes = Volumes(cases, salt=files.SALT, cache_mib=2)
    a, b, c = (pseudonym(files.SALT, n) for n in "abc")
    for key, held in ((a, 1), (b, 2), (a, 2), (c, 2)):
        volumes.window(key, (0, 0, 0), (1, 1, 1))
        assert volumes._cached_bytes == held * one
    assert set(volumes._cache) == {a, c}
    tiny = Volumes(cases, salt=files.SALT, cache_mib=0)
    with caplog.at_level(logging.WARNING):
        assert tiny.window(a, (9, 9, 9), (4, 4, 4)).any() and tiny._cached_bytes == 0
    assert "does not fit the cache" in caplog.text and str(tmp_path) not in caplog.text


def test_several_threads_see_the_same_voxels(tmp_path: Path, files) -> None:
    cases = [Case(str(n), files.save(tmp_path / f"{n}.nii.gz", files.head(seed=n))) for n in range(6)]
    volumes = Volumes(cases, salt=files.SALT, cache_mib=1)
    expected = {k: volumes.window(k, (0, 0, 0), (12, 10, 8)) for k in sorted(volumes.keys())}
    volumes, wrong = Volumes(cases, salt=files.SALT, cache_mib=1), []

    def read(seed: int) -> None:
        for key in np.random.default_rng(seed).permutation(volumes.keys() * 5):
            got = volumes.window(bytes(key), (0, 0, 0), (12, 10, 8))
            wrong.extend([key] if not np.array_equal(got, expected[bytes(key)]) else [])

    threads = [threading.Thread(target=read, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and volumes._cached_bytes == 6 * 12 * 10 * 8 * 4


def test_a_patient_the_site_does_not_hold(tmp_path: Path, files) -> None:
    volumes, _ = only(files.save(tmp_path / "p.nii", files.head()), files)
    with pytest.raises(DataError, match=f"patient {handle(bytes(16))}: not in this site's data"):
        volumes.geometry(bytes(16))


def test_corrupt_files_are_named(tmp_path: Path, files) -> None:
    def refused(path: Path, said: str, channel: int | None = None) -> None:
        with pytest.raises(DataError) as caught:
            read_voxels(Case("p", path, channel))
        line = str(caught.value)
        assert line.startswith(f"{path}: ") and said in line and "\n" not in line

    path = files.save(tmp_path / "short.nii.gz", files.head())
    files.truncate(path)
    refused(path, "truncated or corrupt")
    path = files.save(tmp_path / "tail.nii.gz", files.head())
    path.write_bytes(path.read_bytes()[:-6])  # every voxel is there, the check sum is not
    refused(path, "truncated or corrupt")
    path = files.save(tmp_path / "bit.nii.gz", files.head())
    files.flip_a_voxel_bit(path)
    refused(path, "truncated or corrupt (CRC check failed")
    path = files.save(tmp_path / "short.nii", files.head())
    files.truncate(path)
    refused(path, "truncated or corrupt")
    (tmp_path / "text.nii.gz").write_text("not an image")
    refused(tmp_path / "text.nii.gz", "not a NIfTI file but text")
    (tmp_path / "empty.nii").write_bytes(b"")
    refused(tmp_path / "empty.nii", "empty: copy it again")
    refused(tmp_path / "gone.nii", "no such file")


def test_files_of_the_wrong_kind_are_named(tmp_path: Path, files, msd: Path) -> None:
    voxels = files.head()
    for name, value in (("nan", np.nan), ("inf", np.inf)):
        voxels[5, 5, 5] = value
        with pytest.raises(DataError, match=rf"{name}\.nii: holds values that are not finite"):
            read_voxels(Case("p", files.save(tmp_path / f"{name}.nii", voxels)))
    four = msd / "imagesTr" / "BRATS_001.nii.gz"
    with pytest.raises(DataError, match=r"BRATS_001\.nii\.gz: has 4 axes, not 3"):
        read_header(Case("p", four))
    with pytest.raises(DataError, match="has 4 channels, no channel 4"):
        read_header(Case("p", four, 4))
    with pytest.raises(DataError, match="has 3 axes, not 4"):
        read_header(Case("p", files.save(tmp_path / "3d.nii", files.head()), 0))
    colours = np.zeros((4, 4, 4), dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")])
    with pytest.raises(DataError, match="export it as grey values"):
        read_header(Case("p", files.save(tmp_path / "rgb.nii", colours)))


def test_hostile_headers_are_refused_before_anything_is_allocated(tmp_path: Path, files) -> None:
    path = files.save(tmp_path / "huge.nii", files.head())
    content = bytearray(path.read_bytes())
    content[42:48] = np.array([30000, 30000, 30000], "<i2").tobytes()
    path.write_bytes(content)
    with pytest.raises(DataError, match="claims 30000x30000x30000 voxels"):
        read_header(Case("p", path))
    path = files.save(tmp_path / "flat.nii", files.head())
    image = nib.load(path)
    image.header.set_sform(np.zeros((4, 4)), 1)
    image.header.set_qform(None, 0)
    content = bytearray(path.read_bytes())
    content[: len(image.header.binaryblock)] = image.header.binaryblock
    path.write_bytes(content)
    with pytest.raises(DataError, match="singular affine"):
        read_header(Case("p", path))


def test_scaled_integers_are_read_as_the_header_says(tmp_path: Path, files) -> None:
    image = nib.Nifti1Image(np.arange(24, dtype=np.int16).reshape(2, 3, 4), np.eye(4))
    image.header.set_slope_inter(0.5, 10)
    nib.save(image, tmp_path / "p.nii.gz")
    voxels, _ = read_voxels(Case("p", tmp_path / "p.nii.gz"))
    np.testing.assert_allclose(voxels, np.asarray(nib.load(tmp_path / "p.nii.gz").dataobj))


def test_settings_that_cannot_be(files) -> None:
    with pytest.raises(DataError, match="unknown label convention 'auto'"):
        Volumes([], salt=files.SALT, labels="auto")
    with pytest.raises(DataError, match="three positive numbers"):
        Volumes([], salt=files.SALT, spacing=(1, 0, 1))
