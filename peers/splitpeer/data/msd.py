"""Layout "msd": a task of the Medical Segmentation Decathlon, whatever it is; `dataset.json` says what it holds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from splitpeer.data.files import examples, in_folder, stem
from splitpeer.data.listing import Listing
from splitpeer.data.modalities import ANY, MASK, kind_of
from splitpeer.errors import DataError
from splitpeer.storage import reading

DESCRIPTION = "dataset.json"
MAX_BYTES = 16 << 20
"""Bytes of a description; a longer one names more patients than an inventory may hold."""


def msd(root: Path, wanted: str) -> Listing:
    """The `training` entries: each channel of an image is a modality, each label a mask of the image's patient.

    A problem: a file that is listed and not there, one patient twice, a name that is unclear.

    Raises:
        DataError: `dataset.json` cannot be read, or is none.
    """
    description = _description(root)
    listing = Listing(root)
    channels = _channels(root, description, listing, wanted)
    missing: dict[str, list[str]] = {}
    taken: set[Path] = set()
    for patient, images, masks in _entries(root, description, listing):
        for name, kinds in ((images, channels), (masks, [(MASK, None)])):
            path = root / name
            if path.name.startswith("."):
                continue
            if not _inside(name) or not path.is_file():
                for kind, _ in kinds:
                    missing.setdefault(kind, []).append(str(path))
                continue
            taken.add(path)
            for kind, channel in kinds:
                listing.add(kind, patient, path, channel)
    for kind, paths in missing.items():
        text = f"{examples(paths)}: listed in dataset.json but not in {root}: unpack the archive again"
        listing.problems.append((kind, text))
    listing.refuse_twins()
    _leave_unlisted(listing, taken)
    return listing


def label_names(root: Path) -> dict[int, str]:
    """The meaning of mask values from `dataset.json`; {} if it does not say. Raises DataError: see `msd`."""
    table = _description(root).get("labels")
    try:
        return {int(value): str(name) for value, name in table.items()} if isinstance(table, dict) else {}
    except ValueError:
        return {}


def _description(root: Path) -> dict[str, Any]:
    path = root / DESCRIPTION
    try:
        return reading.document(path, MAX_BYTES, follow=True)
    except FileNotFoundError:
        raise DataError(
            f"{path}: missing: layout 'msd' needs it; point to the folder that holds it"
        ) from None
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise DataError(f"{path}: not readable JSON ({why}): fetch the archive again") from None


def _channels(
    root: Path, description: dict[str, Any], listing: Listing, wanted: str
) -> list[tuple[str, int | None]]:
    """Modality and channel of an image file, or None where it holds one modality and no fourth axis."""
    path, table = root / DESCRIPTION, description.get("modality", [])
    try:
        names = {int(channel): str(name) for channel, name in table.items()}
    except (AttributeError, ValueError):
        raise DataError(f'{path}: no "modality" table of channel numbers: fetch it again') from None
    kinds = {channel: kind_of(name) for channel, name in sorted(names.items())}
    counts = Counter(kinds.values())
    for channel, kind in kinds.items():
        if kind in (None, MASK):
            text = f"{path}: channel {channel} is {names[channel]!r}, which is not a valid name of a modality"
            listing.problems.append((ANY, f"{text}: write it without spaces there"))
    for kind in dict.fromkeys((*kinds.values(), wanted or None)):
        if kind not in (None, MASK) and counts[kind] != 1:
            text = f"{path}: {counts[kind]} channels are {kind!r} (it lists {', '.join(names.values())})"
            listing.problems.append((kind, f"{text}: name a modality that is there once"))
    usable = [
        (kind, channel) for channel, kind in kinds.items() if kind not in (None, MASK) and counts[kind] == 1
    ]
    return [(kind, channel if len(names) > 1 else None) for kind, channel in usable if kind]


def _entries(root: Path, description: dict[str, Any], listing: Listing) -> Iterator[tuple[str, str, str]]:
    """Patient, image and mask of each entry; the patient is named by the image, so that its mask matches."""
    entries = description.get("training")
    for number, entry in enumerate(entries if isinstance(entries, list) else []):
        try:
            image, mask = entry["image"], entry["label"]
            if "\0" in image + mask:
                raise TypeError
        except (TypeError, KeyError):
            text = f'{root / DESCRIPTION}: "training" entry {number + 1} lacks "image" or "label"'
            listing.problems.append((ANY, f"{text}: fetch the archive again"))
            continue
        yield stem(Path(image)), image, mask


def _inside(name: str) -> bool:
    """Whether a path of the description stays below its folder."""
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts


def _leave_unlisted(listing: Listing, taken: set[Path]) -> None:
    """Files other than those that are listed."""
    for folder in sorted({path.parent for path in taken}):
        volumes, others = in_folder(folder)
        for path in volumes:
            if path not in taken:
                listing.leave(path, "not listed under training in dataset.json")
        listing.left_out += others
