"""Writes diagrams and tables of architecture.md from the data that they show: `python docs/diagrams.py`.

Each is between `<!-- diagram: name -->` and `<!-- end -->`. `--check` only compares.
"""

from __future__ import annotations

import re
import runpy
import sys
from collections.abc import Iterable
from pathlib import Path

from splitpeer.coordinator.standing import TRANSITIONS, Change, Standing

ROOT = Path(__file__).resolve().parents[1]
TEXT = Path(__file__).with_name("architecture.md")
REGION = re.compile(r"(<!-- diagram: ([^>]+?) -->\n).*?(<!-- end -->)", re.DOTALL)


def standing() -> str:
    """The standings of a site: the changes as a picture, everything as a table."""
    names = {one: one.value.replace(" ", "_") for one in Standing}
    arrows: dict[tuple[Standing, Standing], list[str]] = {}
    for one, row in TRANSITIONS.items():
        for change, then in row.items():
            if then is not one:
                arrows.setdefault((one, then), []).append(change.value)
    lines = ["stateDiagram-v2", f"    [*] --> {names[Standing.AWAITED]}"]
    lines += [
        f"    {names[one]} --> {names[then]}: {', '.join(words)}" for (one, then), words in arrows.items()
    ]
    picture = "```mermaid\n" + "\n".join(lines) + "\n```\n"
    rows = [["", *(one.value for one in Standing)], ["---"] * (len(Standing) + 1)]
    for change in Change:
        ends = [TRANSITIONS[one].get(change) for one in Standing]
        rows.append([change.value, *("error" if end is None else end.value for end in ends)])
    return f"{picture}\n" + _table(rows)


def imports() -> str:
    """The groups of names, then what each part must not import."""
    rules = runpy.run_path(str(ROOT / "tests" / "splitproto" / "import_table.py"))
    known, table = rules["GROUPS"], rules["TABLE"]
    groups = [["group", "is"], ["---", "---"]]
    for name, members in reversed(known.items()):
        groups.append([f"*{name}*", _names(members, known, but=name)])
    merged: dict[object, list[str]] = {}
    for part, row in table.items():
        merged.setdefault(row, []).append(f"`{part.removesuffix('.__init__')}`" + (
            " itself" if part.endswith(".__init__") else ""))  # fmt: skip
    rows = [["part", "must not import", "why"], ["---", "---", "---"]]
    for row, parts in merged.items():
        words = [_names(row.never, known)] if row.never else []
        if row.at_import:
            words.append(f"{_names(row.at_import, known)} except inside a function")
        rows.append([", ".join(parts), "; ".join(words) or "no restriction", row.why])
    return f"{_table(groups)}\n{_table(rows)}"


def _names(members: frozenset[str], groups: dict[str, frozenset[str]], but: str = "") -> str:
    """`members` by as few names as the groups allow; `but` is the group that is being explained."""
    left, words = set(members), []
    for name, group in groups.items():
        if name != but and group <= members and group & left and (but == "" or group < groups[but]):
            words.append(f"*{name}*")
            left -= group
    return ", ".join([*words, *(f"`{name}`" for name in sorted(left))])


def _table(rows: Iterable[Iterable[str]]) -> str:
    return "".join("| " + " | ".join(row) + " |\n" for row in rows)


DIAGRAMS = {"standing of a site": standing, "who may import whom": imports}


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
