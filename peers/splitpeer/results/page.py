"""The page that goes with a mask: what was found where, how much, by what, from what, and without what.

One file that needs nothing else: no script, no address of another host. Its style is that of the leakage report.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from splitpeer.errors import DataError
from splitpeer.report import text
from splitpeer.report.build import PAGE as REPORT
from splitpeer.results.palette import dash_of, hex_of
from splitpeer.results.pictures import Sheet, SlicePicture
from splitpeer.results.segmentation import NOT_A_DEVICE, Segmentation
from splitpeer.storage import durable

PAGE = Path(__file__).parent / "page"
MAX_ROWS = 8
"""Regions with pictures of their own, the largest ones: three pictures each, and a page must open on any machine."""
_PIECE = 1 << 20


@dataclass(frozen=True)
class VolumeRow:
    """Pictures at the slices that hold most of some regions."""

    names: tuple[str, ...]
    pictures: list[SlicePicture]


def write_page(
    segmentation: Segmentation,
    path: Path,
    *,
    image: np.ndarray | None = None,
    image_name: str = "",
    prepared: Sequence[float] | None = None,
    files: Sequence[Path] = (),
) -> None:
    """Write the page.

    Args:
        segmentation: what it shows.
        path: the file; an older one is replaced.
        image: one of the patient's own images [i, j, k] on the grid of the mask; None: contours on black.
        image_name: its modality.
        prepared: where the image is one that `data prepare` made, brought back: the voxel size, in mm, that it had.
        files: what was written of the same segmentation, for their digests.

    Raises:
        DataError: the image is on another grid, or a file is gone.
        ConfigError, DiskTrouble: it cannot be written; there is no half page.
    """
    if image is not None and image.shape != segmentation.shape:
        raise DataError(
            f"the image has {list(image.shape)} voxels, the mask {list(segmentation.shape)}: "
            "name the image that the segmentation was asked for"
        )
    page = rendered(segmentation, image, image_name, prepared, [(file.name, _digest(file)) for file in files])
    try:
        durable.replace(path, page.encode())
    except OSError as error:
        raise durable.refusal(error, str(path), "--report") from None


def rendered(
    segmentation: Segmentation,
    image: np.ndarray | None,
    image_name: str,
    prepared: Sequence[float] | None,
    files: Sequence[tuple[str, str]],
) -> str:
    """The whole HTML document; `files`: name and SHA-256 of what lies beside it."""
    sheet = Sheet(segmentation.masks, segmentation.affine, image)
    volumes, voxels = segmentation.volumes, segmentation.voxels
    rows, left_out = _rows(sheet, segmentation)
    style = (REPORT / "page.css").read_text(encoding="utf-8") + (PAGE / "page.css").read_text(
        encoding="utf-8"
    )
    return (
        environment()
        .get_template("page.html.jinja")
        .render(
            patient=segmentation.patient,
            origin=segmentation.origin,
            notice=NOT_A_DEVICE,
            style=Markup(style),  # noqa: S704 - our own files
            style_hash=style_hash(style),
            regions=[
                {
                    "name": region.name,
                    "title": str(region),
                    "ml": volumes[region.name],
                    "voxels": voxels[region.name],
                    "colour": hex_of(place),
                    "dash": dash_of(place),
                }
                for place, region in enumerate(segmentation.task.regions)
            ],
            overlapping=not segmentation.task.exclusive and len(segmentation.task.regions) > 1,
            found=bool(segmentation.masks.any()),
            rows=rows,
            left_out=left_out,
            image_name=image_name,
            on_image=image is not None,
            prepared=None if prepared is None else " x ".join(f"{mm:.3g}" for mm in prepared),
            counted=sheet.counted(),
            grid=segmentation.grid,
            files=files,
        )
    )


def _rows(sheet: Sheet, segmentation: Segmentation) -> tuple[list[VolumeRow], list[str]]:
    """The pictures, and the regions that have none of their own because there are too many."""
    regions = segmentation.task.regions
    sizes = [int(mask.sum()) for mask in segmentation.masks]
    ranked = [place for place in sorted(range(len(regions)), key=lambda place: -sizes[place]) if sizes[place]]
    shown = sorted(ranked[:MAX_ROWS])
    where: dict[tuple[int, int, int], list[int]] = {}
    for place in shown or [0]:
        levels = next((known for known in where if sheet.shows(place, known)), sheet.largest(place))
        where.setdefault(levels, []).append(place)
    rows = [
        VolumeRow(tuple(str(regions[place]) for place in places) if shown else (), sheet.pictures(levels))
        for levels, places in where.items()
    ]
    return rows, [str(regions[place]) for place in sorted(ranked[MAX_ROWS:])]


def listed(names: Sequence[str]) -> str:
    """Names as in a sentence: "a, b and c"."""
    *first, last = names
    return f"{', '.join(first)} and {last}" if first else last


def described(picture: SlicePicture, names: Sequence[str], image_name: str) -> str:
    """A picture in words, for those who cannot see it."""
    of = f" of {image_name}" if image_name else ""
    sides = "patient's right at the left" if picture.view.name != "sagittal" else "anterior at the left"
    what = f", with contours, where most of {listed(names)} lies" if names else ""
    return f"{text.upper_first(picture.view.name)} slice {picture.number} of {picture.of}{of}, {sides}{what}."


@lru_cache(maxsize=1)
def environment() -> Environment:
    """Of the templates in `PAGE`."""
    environment = Environment(
        loader=FileSystemLoader(PAGE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters: dict[str, Any] = {
        "figure": text.figure,
        "plural": text.plural,
        "upper_first": text.upper_first,
        "described": described,
        "listed": listed,
    }
    environment.filters |= filters
    return environment


def style_hash(style: str) -> str:
    """The source expression that lets a page's own style through its policy."""
    return "sha256-" + base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while piece := file.read(_PIECE):
                digest.update(piece)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}): write it again") from None
    return digest.hexdigest()
