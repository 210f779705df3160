"""Which characters a text for people may hold (SP-8.2-5): fixed ranges, at every version of Unicode."""

from __future__ import annotations

import re

UNPRINTABLE = (
    (0x0000, 0x001F),  # C0 controls
    (0x007F, 0x009F),  # DEL and C1 controls
    (0x061C, 0x061C),  # Arabic letter mark: changes the direction of what follows
    (0x200B, 0x200F),  # zero width, and direction marks
    (0x2028, 0x202E),  # line and paragraph separator, direction embeddings and overrides
    (0x2060, 0x206F),  # invisible operators, direction isolates
    (0xD800, 0xDFFF),  # surrogates
    (0xFDD0, 0xFDEF),  # noncharacters
    (0xFEFF, 0xFEFF),  # byte order mark
    (0xFFF9, 0xFFFB),  # interlinear annotation
    (0xE0000, 0xE007F),  # tags: invisible text
    *((plane << 16 | 0xFFFE, plane << 16 | 0xFFFF) for plane in range(17)),  # noncharacters
)
"""First and last code point of each range that is refused. All others are printable, assigned or not."""

_FOUND = re.compile("[" + "".join(f"{chr(first)}-{chr(last)}" for first, last in UNPRINTABLE) + "]")


def is_printable(text: str) -> bool:
    """Whether `text` is one line that cannot steer a terminal, forge a line of a log or hide what it says."""
    return _FOUND.search(text) is None


def printable(text: str) -> str:
    """`text` with a question mark for every character that is not printable; peers choose some of it."""
    return _FOUND.sub("?", text)
