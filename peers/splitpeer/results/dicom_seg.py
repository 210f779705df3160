"""A segmentation as DICOM SEG: one segment per region, on the frames of the series it was made from.

Patient and study are the series' own, so a PACS files it next to the images. A region that is empty is described,
and has no frames.
"""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from splitpeer.data.task import Region
from splitpeer.errors import DataError, needs
from splitpeer.results.codes import Concept, RegionCode, code_of
from splitpeer.results.dicom_source import SourceSeries
from splitpeer.results.palette import colour_of
from splitpeer.results.segmentation import NOT_A_DEVICE, SHORT_NOT_A_DEVICE, Segmentation
from splitpeer.storage import durable

SERIES_NUMBER = 9000
"""Added to the number of the series it belongs to: behind the scanner's own."""
LONG = 64
"""Characters of DICOM's LO."""
CREATOR = "splitproto^automatic"
_MAY_BE_EMPTY = (
    "PatientID", "PatientName", "PatientBirthDate", "PatientSex", "AccessionNumber", "StudyID", "StudyDate",
    "StudyTime", "ReferringPhysicianName",
)  # fmt: skip
"""Attributes that every image has, if only without a value; old and anonymised ones lack some."""


def write_dicom_seg(
    segmentation: Segmentation,
    series: SourceSeries,
    path: Path,
    *,
    codes: Mapping[str, RegionCode] | None = None,
) -> None:
    """Write the mask as one DICOM SEG.

    Args:
        segmentation: what is written.
        series: the images it belongs to, on its grid: `dicom_source.read_series`.
        path: the file; an older one is replaced.
        codes: the hospital's own codes, by region; others have a default.

    Raises:
        ConfigError: highdicom is not installed, the folder may not be written.
        DataError: the series is not on the grid of the mask, or lacks what a segmentation needs.
        DiskTrouble: full disk. There is no half file.
    """
    pixels = series.slices_of(segmentation.masks, segmentation.affine)
    try:
        import highdicom  # noqa: F401 - whether it is there
    except ImportError:
        raise needs("DICOM SEG", "highdicom", "dicom") from None
    with warnings.catch_warnings():
        # An empty mask, and names of patients that break a rule: neither is wrong here.
        warnings.simplefilter("ignore")
        made = _made(segmentation, series, pixels, codes)
        file = io.BytesIO()
        made.save_as(file)
    try:
        durable.replace(path, file.getvalue())
    except OSError as error:
        raise durable.refusal(error, str(path), "--dicom-seg") from None


def _made(
    segmentation: Segmentation,
    series: SourceSeries,
    pixels: np.ndarray,
    codes: Mapping[str, RegionCode] | None,
) -> Any:
    from highdicom import UID
    from highdicom.seg import Segmentation as DicomSegmentation
    from highdicom.seg import SegmentationTypeValues

    origin = segmentation.origin
    sources = [_complete(one) for one in series.datasets]
    if series.frames is None:
        for one in sources:
            # Rounded differently from slice to slice, as `dicom.stacks` allows; here they must be one.
            one.ImageOrientationPatient = sources[0].ImageOrientationPatient
    else:
        sources = [_only(sources[0], series.frames)]
    number = int(sources[0].get("SeriesNumber") or 0)
    try:
        made = DicomSegmentation(
            source_images=sources,
            pixel_array=pixels.astype(np.uint8),
            segmentation_type=SegmentationTypeValues.BINARY,
            segment_descriptions=[
                _described(segmentation, place, region, code_of(segmentation.task, region, codes))
                for place, region in enumerate(segmentation.task.regions, 1)
            ],
            series_instance_uid=UID(),
            series_number=SERIES_NUMBER + max(number, 0),
            series_description=_short(f"{origin.name} segmentation, {SHORT_NOT_A_DEVICE}"),
            sop_instance_uid=UID(),
            instance_number=1,
            manufacturer="splitproto",
            manufacturer_model_name="splitpeer",
            software_versions=_short(origin.software),
            device_serial_number=origin.model[:LONG] or "unknown",
            content_label="SEGMENTATION",
            content_description=_short(_what(segmentation)),
            content_creator_name=CREATOR,
            # Names are decoded; whatever they were written in, UTF-8 holds them and ours.
            specific_character_set="ISO_IR 192",
            omit_empty_frames=bool(pixels.any()),
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        cause = " ".join(str(error).split())[:160]
        raise DataError(
            f"the series cannot be segmented in DICOM ({cause}): export it again, as it left the scanner"
        ) from None
    if series.frames is not None:
        _renumber(made, series.frames)
    made.ImageComments = "\n".join(
        [
            NOT_A_DEVICE,
            *origin.cautions,
            f"Made from {', '.join(origin.used)} by the network of run {origin.run} ({origin.name}).",
            f"Model SHA-256 {origin.model}. {origin.software}. {origin.created:%Y-%m-%d %H:%M} UTC.",
        ]
    )[:10240]
    return made


def _described(segmentation: Segmentation, number: int, region: Region, code: RegionCode) -> Any:
    from highdicom import UID, AlgorithmIdentificationSequence
    from highdicom.color import CIELabColor
    from highdicom.seg import SegmentAlgorithmTypeValues, SegmentDescription
    from pydicom.sr.codedict import codes as known

    origin = segmentation.origin
    algorithm = AlgorithmIdentificationSequence(
        name="splitproto",
        family=known.cid7162.ArtificialIntelligence,
        version=_short(origin.software.removeprefix("splitproto ")),
        source="splitproto",
        parameters={"run": origin.run, "model": origin.model, "modalities": "+".join(origin.used)},
    )
    described = SegmentDescription(
        segment_number=number,
        segment_label=_short(str(region)),
        segmented_property_category=_code(code.category),
        segmented_property_type=_code(code.type),
        algorithm_type=SegmentAlgorithmTypeValues.AUTOMATIC,
        algorithm_identification=algorithm,
        tracking_uid=UID(),
        tracking_id=_short(f"{region.name} {origin.name} {origin.run}"),
        display_color=CIELabColor.from_rgb(*colour_of(number - 1)),
    )
    described.SegmentDescription = _short(_what(segmentation))
    return described


def _code(concept: Concept) -> Any:
    from pydicom.sr.coding import Code

    return Code(concept.value, concept.scheme, concept.meaning)


def _what(segmentation: Segmentation) -> str:
    """In a line: what is missing comes before what it was made from."""
    origin = segmentation.origin
    without = f"WITHOUT {', '.join(origin.missing)}; " if origin.missing else ""
    return f"{without}{SHORT_NOT_A_DEVICE}; from {', '.join(origin.used)}"


def _short(text: str) -> str:
    # A backslash separates values in DICOM.
    return text.replace("\\", "/")[:LONG].rstrip()


def _complete(source: Any) -> Any:
    """The source with the attributes that any image has; absent ones empty."""
    one = copy.copy(source)
    for name in _MAY_BE_EMPTY:
        if name not in one:
            setattr(one, name, "")
    return one


def _only(source: Any, frames: Sequence[int]) -> Any:
    """A multi-frame image with these frames alone, in this order, and what they share where all frames' is."""
    from pydicom import Dataset

    one, shared = copy.copy(source), Dataset()
    one.PerFrameFunctionalGroupsSequence = [
        source.PerFrameFunctionalGroupsSequence[frame] for frame in frames
    ]
    one.NumberOfFrames = len(frames)
    (everywhere,) = source.get("SharedFunctionalGroupsSequence") or (Dataset(),)
    shared.update(everywhere)
    for name in ("PlaneOrientationSequence", "PixelMeasuresSequence"):
        if name in (own := one.PerFrameFunctionalGroupsSequence[0]):
            setattr(shared, name, own[name].value)
    one.SharedFunctionalGroupsSequence = [shared]
    return one


def _renumber(made: Any, frames: Sequence[int]) -> None:
    """Frames are named by their numbers in the file, from 1; in `_only`'s copy they are counted from 1 again."""
    # Groups of several segments may share an item.
    images = {
        id(image): image
        for group in made.PerFrameFunctionalGroupsSequence
        for derived in group.DerivationImageSequence
        for image in derived.SourceImageSequence
    }
    for image in images.values():
        image.ReferencedFrameNumber = frames[int(image.ReferencedFrameNumber) - 1] + 1
