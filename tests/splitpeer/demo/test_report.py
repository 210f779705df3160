"""The demo's table and pictures, also where a score is missing."""

from __future__ import annotations

import re
from io import StringIO

from rich.console import Console

from splitpeer.demo.report import dice_table


def table(rows: dict[str, dict[str, float | None]]) -> dict[str, tuple[list[str], bool]]:
    """{network: (its cells, whether they are bold)}."""
    console = Console(file=StringIO(), width=100, force_terminal=True, legacy_windows=False)
    console.print(dice_table(rows))
    shown = {}
    for line in console.file.getvalue().splitlines():
        name, *cells = [cell.strip() for cell in re.sub(r"\x1b\[[0-9;]*m", "", line).strip("│").split("│")]
        shown[name] = cells, "\x1b[1m" in line
    return {name: shown[name] for name in rows}


def test_the_best_mean_is_bold_and_a_missing_score_a_dash() -> None:
    scored = {"WT": 0.8, "TC": 0.7, "ET": None, "mean": 0.75}
    assert table({"split": scored, "alone": dict.fromkeys(scored), "all": {**scored, "mean": 0.7}}) == {
        "split": (["0.800", "0.700", "-", "0.750"], True),
        "alone": (["-", "-", "-", "-"], False),
        "all": (["0.800", "0.700", "-", "0.700"], False),
    }


def test_a_table_without_any_score() -> None:
    assert table({"split": dict.fromkeys(("WT", "TC", "ET", "mean"))}) == {"split": (["-"] * 4, False)}
