"""Writes the diagrams of architecture.md from the tables in the code: `python docs/diagrams.py` (`--check` compares).

A diagram stands between `<!-- diagram: name -->` and `<!-- end -->`.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from splitpeer.coordinator.standing import TRANSITIONS, Happening, Standing

TEXT = Path(__file__).with_name("architecture.md")
REGION = re.compile(r"(<!-- diagram: ([^>]+?) -->\n).*?(<!-- end -->)", re.DOTALL)


def standing() -> str:
    """The standings of a site: the changes as a picture, everything as a table."""
    names = {one: one.value.replace(" ", "_") for one in Standing}
    arrows: dict[tuple[Standing, Standing], list[str]] = {}
    for one, row in TRANSITIONS.items():
        for happening, then in row.items():
            if then is not one:
                arrows.setdefault((one, then), []).append(happening.value)
    lines = ["stateDiagram-v2", f"    [*] --> {names[Standing.AWAITED]}"]
    lines += [
        f"    {names[one]} --> {names[then]}: {', '.join(words)}" for (one, then), words in arrows.items()
    ]
    picture = "```mermaid\n" + "\n".join(lines) + "\n```\n"
    rows = [["", *(one.value for one in Standing)], ["---"] * (len(Standing) + 1)]
    for happening in Happening:
        ends = [TRANSITIONS[one].get(happening) for one in Standing]
        rows.append([happening.value, *("error" if end is None else end.value for end in ends)])
    return f"{picture}\n" + "".join("| " + " | ".join(row) + " |\n" for row in rows)


DIAGRAMS = {"standing of a site": standing}


def drawn(text: str) -> str:
    """`text` with all its diagrams as the code has them now."""
    return REGION.sub(lambda found: found[1] + DIAGRAMS[found[2]]() + found[3], text)


def main() -> int:
    """Write, or with `--check` compare; the exit code."""
    text = TEXT.read_text()
    if "--check" in sys.argv[1:]:
        return int(drawn(text) != text)
    TEXT.write_text(drawn(text))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
