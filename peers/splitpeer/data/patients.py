"""Patient ids: the form in which all sites must agree, and ids that look wrong."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence

from splitpeer.data.files import examples
from splitpeer.errors import DataError

WHITE_SPACE = "\t\n\v\f\r "
"""SP-11.5-2: what is removed at both ends; a fixed list, as Unicode's grows."""


def patient_id(written: str) -> str:
    """SP-11.5-2: the identifier of a patient, without white space at its ends and in NFC.

    One file system writes "é" as one character, another as two; a space at the end is invisible. Case and spaces
    inside count.

    Raises:
        DataError: nothing is left, or the name is not valid Unicode.
    """
    name = unicodedata.normalize("NFC", written.strip(WHITE_SPACE))
    if not name:
        raise DataError(f"{written!r} names no patient: rename the file to the patient's id")
    try:
        name.encode()
    except UnicodeEncodeError:
        raise DataError(
            f"{written!a}: the file's name is not valid UTF-8: rename it, for instance with convmv"
        ) from None
    return name


_COPY = re.compile(
    r"""(?: [\s._-]* (?:
        \( \s* (?:copy|kopie|copie|copia|\d+) \s* \d* \s* \)             # (copy), (1): desktops
      | [\s._-] (?:copy|kopie|copie|copia|bak|backup|old|new|final) \s* \d*
      | _(?:eq|tilt|roi|ph|e|i)_?\d+ | _(?:ph|real|imaginary)             # what dcm2niix appends
    ))+ $""",
    re.VERBOSE,
)
_LETTER = re.compile(r"(.*\d)[a-z]")
_TAIL = re.compile(r"[-_. ][^-_. ]+$")
_TIME_POINT = re.compile(r"-\d{3}")  # of BraTS 2023
_CONTRASTS = re.compile(
    r"[-_. ](t1|t1w|t1n|t1c|t1ce|t1gd|t1post|t2|t2w|t2f|flair|seg|mask|adc|dwi|pet|ct)$", re.IGNORECASE
)


def near_duplicates(ids: Iterable[str]) -> list[tuple[str, ...]]:
    """Groups of ids that are probably one patient: case, punctuation, zeros, marks of a copy or of dcm2niix."""
    groups: dict[str, set[str]] = {}
    for one in ids:
        groups.setdefault(_folded(one), set()).add(one)
    for folded in list(groups):
        # dcm2niix appends a letter if a name is taken: p1a next to p1.
        if (match := _LETTER.fullmatch(folded)) and match[1] in groups:
            groups[match[1]] |= groups.pop(folded)
    return sorted(tuple(sorted(group)) for group in groups.values() if len(group) > 1)


def duplicate_warnings(ids: Iterable[str]) -> list[str]:
    """A line for each group of `near_duplicates`."""
    return [
        f"{' and '.join(repr(one) for one in group)} are taken for {len(group)} patients, and look like one: "
        "rename or remove the copy"
        for group in near_duplicates(ids)
    ]


def spelling_hints(ids: Sequence[str]) -> list[str]:
    """How other sites may write these ids differently: endings that name a modality, numbers without leading zeros."""
    hints = []
    contrast = [one for one in ids if _CONTRASTS.search(one)]
    tails = {match[0] if (match := _TAIL.search(one)) else "" for one in ids}
    if contrast:
        hints.append(
            f"{len(contrast)} of {len(ids)} ids end in the name of a modality ({examples(contrast)}): other sites "
            "name the patient without it, or with their own"
        )
    elif len(ids) > 1 and len(tails) == 1 and (tail := tails.pop()) and not _TIME_POINT.fullmatch(tail):
        hints.append(f"all ids end in {tail!r} ({examples(ids)}): other sites may not write it")
    numbers = {one: match[0] for one in ids if (match := re.search(r"\d+$", one))}
    widths = {len(number) for number in numbers.values()}
    if len(widths) > 1 and not any(number.startswith("0") for number in numbers.values()):
        short = [one for one, number in numbers.items() if len(number) == min(widths)]
        hints.append(
            f"numbers in ids are written without zeros in front ({examples(short)}): other sites may write "
            f"{_padded(short[0], max(widths))}"
        )
    if ids and all(one.startswith("sub-") for one in ids):
        hints.append(f"all ids begin with 'sub-' ({examples(ids)}): sites without BIDS may not write it")
    return hints


def _padded(one: str, width: int) -> str:
    return re.sub(r"\d+$", lambda match: match[0].zfill(max(width, 3)), one)


def _folded(one: str) -> str:
    """An id without everything that people and programs vary."""
    text = unicodedata.normalize("NFKC", one).casefold()
    text = "".join(c for c in text if unicodedata.category(c) != "Cf")
    text = _COPY.sub("", text).strip() or text
    text = re.sub(r"\d+", lambda match: match[0].lstrip("0") or "0", text)
    # Between two digits a mark counts: 1-12 is not 11-2.
    text = re.sub(r"[\W_]+", "-", text).strip("-")
    return re.sub(r"(?<!\d)-|-(?!\d)", "", text)
