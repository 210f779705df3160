"""The demo's table and pictures, also where a score is missing."""

from __future__ import annotations

import re
from io import StringIO
from typing import Any

from rich.console import Console

from splitpeer.demo.report import dice_table, distance_table, volume_line


def table(
    rows: dict[str, dict[str, float | None]], made: Any = dice_table
) -> dict[str, tuple[list[str], bool]]:
    """{network: (its cells, whether they are bold)}."""
    console = Console(file=StringIO(), width=100, force_terminal=True, legacy_windows=False)
    console.print(made(rows))
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


def test_the_least_distance_is_bold_and_volumes_are_one_line() -> None:
    near = {"WT": 3.21, "TC": 4.0, "ET": None, "mean": 3.6}
    assert table({"split": {**near, "mean": 9.0}, "all": near}, distance_table) == {
        "split": (["3.2", "4.0", "-", "9.0"], False),
        "all": (["3.2", "4.0", "-", "3.6"], True),
    }
    assert volume_line({"WT": {"predicted": 40.53, "true": 42.0}}) == "WT 40.5 ml of 42.0"


def test_a_table_without_any_score() -> None:
    assert table({"split": dict.fromkeys(("WT", "TC", "ET", "mean"))}) == {"split": (["-"] * 4, False)}
