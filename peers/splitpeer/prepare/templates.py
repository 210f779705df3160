"""What settings name: the atlas that is at hand, and command lines of outside programs."""

from __future__ import annotations

import shlex

MNI152 = "mni152"
"""ICBM 2009a, non-linear, symmetric, 1 mm, skull stripped (Fonov et al., NeuroImage 54, 2011), in nilearn's wheel."""
IN, OUT = "{in}", "{out}"


def checked(template: str) -> str:
    """`template`, if it is a command line with `IN` and `OUT` in it. Raises ValueError."""
    try:
        words = shlex.split(template)
    except ValueError as error:
        raise ValueError(f"{template!r} is no command line ({error}): mend the quotes") from None
    for mark in (IN, OUT):
        if not any(mark in word for word in words[1:]):
            raise ValueError(f"{template!r} does not say where {mark} goes: write a program, {IN} and {OUT}")
    return template
