"""The page: pictures as radiologists hang them, whatever the order of a file's axes; what must be said is said."""

from __future__ import annotations

import base64
import errno
import hashlib
import io
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from splitpeer.data.task import Region, Task
from splitpeer.errors import DataError, DiskTrouble
from splitpeer.results.page import MAX_ROWS, described, listed, write_page
from splitpeer.results.pictures import VIEWS, Sheet, SlicePicture
from splitpeer.results.segmentation import NOT_A_DEVICE

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def pixels(picture: SlicePicture) -> np.ndarray:
    data = base64.b64decode(picture.address.partition(",")[2])
    return np.asarray(Image.open(io.BytesIO(data)))


def middle(picture: SlicePicture) -> tuple[float, float]:
    """Of the contour's points, as shares of the picture's width and height."""
    numbers = np.array(re.findall(r"(-?[\d.]+),(-?[\d.]+)", picture.contours[0].path), float)
    x, y = (numbers.min(0) + numbers.max(0)) / 2
    return x / picture.width, y / picture.height


def test_pictures_hang_as_in_a_reading_room() -> None:
    # A ball in the right, anterior, superior corner of a head of other size along each axis.
    image = np.ones((30, 40, 20))
    mask = np.zeros(image.shape, bool)
    mask[22:26, 30:34, 12:16] = True
    image[mask] = 5
    image[0, 0, 0] = 0
    affine = np.diag([2.0, 1.0, 3.0, 1.0])
    sheet = Sheet(mask[None], affine, image)
    levels = sheet.largest(0)
    axial, coronal, sagittal = sheet.pictures(levels)
    assert [(p.number, p.of) for p in (axial, coronal, sagittal)] == [(13, 20), (31, 40), (23, 30)]
    assert (axial.width, axial.height, coronal.height, sagittal.width) == (60, 40, 60, 40)
    assert middle(axial) == pytest.approx((1 - 24 / 30, 1 - 32 / 40))
    assert middle(coronal) == pytest.approx((1 - 24 / 30, 1 - 14 / 20))
    assert middle(sagittal) == pytest.approx((1 - 32 / 40, 1 - 14 / 20))
    # The bright voxels lie inside the contour.
    for picture in (axial, coronal, sagittal):
        bright = pixels(picture) > 200
        rows, columns = np.nonzero(bright)
        across, down = middle(picture)
        assert ((columns.min() + columns.max() + 1) / 2 / bright.shape[1]) == pytest.approx(across)
        assert ((rows.min() + rows.max() + 1) / 2 / bright.shape[0]) == pytest.approx(down)
        assert bright.sum() == 16


@pytest.mark.parametrize("number", range(8))
def test_the_order_of_the_files_axes_changes_nothing(patients: SimpleNamespace, number: int) -> None:
    plain, affine = (20, 24, 16), patients.affine("axial", (20, 24, 16))
    shape, turned = patients.stored(
        plain, affine, ((0, 1, 2), (2, 0, 1), (1, 2, 0))[number % 3], patients.turns[number]
    )
    drawn = []
    for size, place in ((plain, affine), (shape, turned)):
        points = patients.grid_points(size, place)
        sheet = Sheet(patients.inside(points), place, patients.image_at(points))
        drawn.append((sheet.largest(1), sheet.pictures(sheet.largest(1)), dict(sheet.counted())))
    (where, one, from_), (there, other, to) = drawn
    assert where == there
    for first, second in zip(one, other, strict=True):
        assert (first.width, first.height) == (second.width, second.height)
        # Counted as the file counts.
        same = from_[first.view.name] == to[first.view.name]
        assert second.number == (first.number if same else first.of + 1 - first.number)
        assert first.address == second.address
        assert len(first.contours) == 3 and first.contours == second.contours


@pytest.fixture
def written(patients: SimpleNamespace, tmp_path: Path) -> Any:
    def write(**more: Any) -> str:
        shape, affine = patients.stored(
            (26, 28, 20), patients.affine("oblique", (26, 28, 20)), (2, 0, 1), (True, False, True)
        )
        ours = patients.segmentation(
            shape, affine, **{k: v for k, v in more.items() if k in ("masks", "task", "origin")}
        )
        if "patient" in more:
            ours = replace(ours, patient=more["patient"])
        image = patients.image_at(patients.grid_points(shape, affine)) if more.get("image", True) else None
        about = {"image_name": "t2", "files": more.get("files", ()), "prepared": more.get("prepared")}
        write_page(ours, tmp_path / "page.html", image=image, **about)
        return (tmp_path / "page.html").read_text()

    return write


def test_what_must_be_said_is_said(written: Any, patients: SimpleNamespace, tmp_path: Path) -> None:
    (tmp_path / "mask.nii.gz").write_bytes(b"mask")
    page = written(files=[tmp_path / "mask.nii.gz"])
    assert page.count(NOT_A_DEVICE) == 2 and page.index(NOT_A_DEVICE) < page.index("<main>")
    assert "Made without t1ce: the network was trained with it." in page
    for said in (patients.MODEL, "run a1b2c3d4", "t1, t2, flair", "2026-03-04 05:06:07 UTC", "splitproto 0.1.0",
                 "20 x 26 x 28 voxels", hashlib.sha256(b"mask").hexdigest()):  # fmt: skip
        assert said in page
    # The ellipsoid's volume, but for the border's voxels (of 3.25 mm3): those of a shell half a voxel thick.
    true = 4 / 3 * np.pi * 6.1 * 8.3 * 9.7 / 1000
    shown = float(re.search(r"whole tumour \(WT\)</th><td class=\"number\">([\d.]+)<", page).group(1))  # type: ignore[union-attr]
    assert shown == pytest.approx(true, rel=0.03)
    assert page.count('role="img"') >= 3 and 'aria-label="Axial slice' in page
    assert (tmp_path / "page.html").stat().st_mode & 0o777 == 0o600


def test_it_needs_no_other_host_and_runs_no_script(written: Any) -> None:
    page = written()
    assert not re.search(r"(src|href)=\"(?!data:)", page)
    assert not re.search(r"https?://|<script|\bstyle=|\bon\w+=\"|@import|url\(", page)
    style = re.search(r"<style>(.*?)</style>", page, re.S).group(1)  # type: ignore[union-attr]
    expected = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert f"style-src 'sha256-{expected}'" in page and "default-src 'none'" in page


def test_hostile_names_are_shown(written: Any, patients: SimpleNamespace) -> None:
    page = written(
        patient="<script>x</script>",
        origin=replace(patients.ORIGIN, name='"><img src=//evil>', used=("<i>",)),
    )
    assert "<script" not in page and "<img" not in page and "<i>" not in page
    assert "Segmentation of &lt;script&gt;" in page


@pytest.mark.parametrize("signs", [(1, 1, 1), (-1, -1, 1), (1, -1, -1)])
def test_slices_are_counted_as_the_file_counts_them(signs: tuple[int, int, int]) -> None:
    """So that who opens the mask finds the slice; and the page says which way that is."""
    mask = np.zeros((9, 8, 7), bool)
    mask[1, 2, 3] = True
    sheet = Sheet(mask[None], np.diag([*signs, 1.0]))
    axial, coronal, sagittal = sheet.pictures(sheet.largest(0))
    assert (sagittal.number, coronal.number, axial.number) == (2, 3, 4)
    assert (sagittal.of, coronal.of, axial.of) == (9, 8, 7)
    x, y, z = signs
    assert dict(sheet.counted()) == {
        "sagittal": "right" if x > 0 else "left",
        "coronal": "front" if y > 0 else "back",
        "axial": "head" if z > 0 else "feet",
    }


def test_what_a_reader_needs_to_know_of_the_pictures(written: Any) -> None:
    page = written()
    assert "R right, L left, A anterior, P posterior, H head, F feet" in page
    letters = set(re.findall(r'<text class="side"[^>]*>(\w)</text>', page))
    assert letters == set("RLAPHF")
    assert re.search(
        r"Slices are counted from 1 in the order of the mask's file: axial ones towards the (head|feet), "
        r"coronal ones towards the (front|back), sagittal ones towards the patient's (left|right)\.", page
    )  # fmt: skip
    assert "not the scan itself" not in page and "On the patient's own t2" in page
    page = written(prepared=(2.0, 2.0, 2.0))
    assert "The grey image is not the scan itself." in page and "voxels of 2 x 2 x 2 mm" in page


def test_nothing_found_is_said_and_the_middle_is_shown(written: Any) -> None:
    page = written(masks=np.zeros((3, 20, 26, 28), bool))
    assert "No voxel of any region was found." in page and "The middle of the image" in page
    assert page.count("none found") == 3


def test_contours_without_an_image(written: Any) -> None:
    page = written(image=False)
    assert "data:image" not in page and page.count('class="contour"') >= 9


def test_many_regions_have_a_table_and_the_largest_have_pictures(written: Any) -> None:
    masks = np.zeros((12, 20, 26, 28), bool)
    for place in range(12):
        masks[place, place, 2 * place : 2 * place + 2, 2 : 4 + place] = True
    task = Task(
        {n + 1: f"part {n}" for n in range(12)}, tuple(Region(f"part{n}", (n + 1,)) for n in range(12)), True
    )
    page = written(masks=masks, task=task)
    assert page.count("<figure>") == 3 * MAX_ROWS
    assert "being the smallest: part0, part1, part2, part3." in page
    assert "do not add up" not in page


def test_pictures_are_shared_where_they_show_as_much(patients: SimpleNamespace) -> None:
    mask = np.zeros((2, 20, 20, 20), bool)
    mask[0, 5:15, 5:15, 5:15] = True
    mask[1, 8:12, 8:12, 8:12] = True
    sheet = Sheet(mask, np.eye(4))
    assert sheet.shows(0, sheet.largest(1)) and not sheet.shows(1, sheet.largest(0))


def test_words() -> None:
    assert listed(["a", "b", "c"]) == "a, b and c" and listed(["a"]) == "a"
    picture = SlicePicture(VIEWS[2], 3, 9, 1.0, 1.0, 1.0, "", (), 1)
    assert described(picture, ["WT"], "t2") == (
        "Sagittal slice 3 of 9 of t2, anterior at the left, with contours, where most of WT lies."
    )


def test_an_image_of_another_size_and_a_full_disk(
    patients: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = patients.segmentation((18, 15, 11), patients.affine("axial"))
    with pytest.raises(DataError, match=r"the image has \[3, 3, 3\] voxels"):
        write_page(ours, tmp_path / "page.html", image=np.zeros((3, 3, 3)))

    def full(*_: Any, **__: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.write", full)
    with pytest.raises(DiskTrouble, match=r"page.html cannot be written"):
        write_page(ours, tmp_path / "page.html")
    assert list(tmp_path.iterdir()) == []


def test_in_a_browser_it_is_quiet_and_fits(written: Any, tmp_path: Path) -> None:
    path = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if path is None:
        pytest.skip(f"no browser: none of {', '.join(BROWSERS)} is installed")
    from playwright.sync_api import sync_playwright

    written()
    address, noise, requests = (tmp_path / "page.html").as_uri(), [], []
    with sync_playwright() as playwright:
        arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
        browser = playwright.chromium.launch(executable_path=path, args=arguments)
        for width, scheme in ((1100, "light"), (400, "dark")):
            context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
            page = context.new_page()
            page.on("console", lambda message: noise.append(message.text))
            page.on("request", lambda one: requests.append(one.url))
            page.goto(address)
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            boxes = page.locator(".cuts svg").evaluate_all(
                "all => all.map(s => s.getBoundingClientRect().width)"
            )
            assert len(boxes) >= 3 and min(boxes) > 250
            # The page's own style is in force, so its policy lets it through.
            assert page.locator(".device").evaluate("one => getComputedStyle(one).fontWeight") == "650"
            context.close()
        browser.close()
    assert noise == []
    assert {url for url in requests if not url.startswith("data:")} == {address}
