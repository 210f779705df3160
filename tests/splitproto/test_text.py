"""Printable text (SP-8.2-5): one table of code points, the same for every version of Unicode."""

from __future__ import annotations

import sys
import unicodedata

import pytest

from splitproto.text import UNPRINTABLE, is_printable, printable

STEER = {"Cc", "Zl", "Zp", "Cs"}
"""Controls, line and paragraph separators, surrogates: no version of Unicode changes these."""
DIRECTIONS = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}


def test_what_steers_a_terminal_or_turns_a_line_around_is_refused() -> None:
    for point in range(sys.maxunicode + 1):
        character = chr(point)
        if unicodedata.category(character) in STEER or unicodedata.bidirectional(character) in DIRECTIONS:
            assert not is_printable(character), f"U+{point:04X}"


def test_ranges_are_ascending_and_apart() -> None:
    ends = [end for first_last in sorted(UNPRINTABLE) for end in first_last]
    assert ends == sorted(ends)


@pytest.mark.parametrize(
    "text", ["\U0001fae8", "\U0001faea", "\u0378", "\ue000", "Charité", "\u00a0", "病院"]
)
def test_what_an_older_library_does_not_know_is_printable(text: str) -> None:
    assert printable(text) == text


def test_every_other_character_becomes_a_question_mark() -> None:
    assert printable("a\nb\u202ec\x9bd\ufeff\udc80") == "a?b?c?d??"
