"""Hostile run folders: archives that unpack to gigabytes, figures nobody measured, JSON nested too deeply."""

from __future__ import annotations

import json
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from splitpeer.errors import DataError
from splitpeer.report import store
from splitpeer.report.build import write_report
from splitpeer.report.store import ARRAYS, ATTACK, load_run

DEEP = "[" * 100_000
DEEP_OBJECT = '{"a":' * 100_000
LITTLE = 8 << 20
"""Bytes that a refusal may take; every bomb here is many times larger."""


@pytest.fixture
def folder(run_folder: Path, tmp_path: Path) -> Path:
    """A run folder that a test may damage."""
    copy = tmp_path / "run"
    copy.mkdir()
    for name in (ATTACK, ARRAYS):
        (copy / name).write_bytes((run_folder / name).read_bytes())
    return copy


def zeros(path: Path, shape: tuple[int, ...], size: int, members: int = 1) -> None:
    """An .npz whose arrays say `shape` and hold `size` zero bytes each, packed a thousandfold."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for number in range(members):
            with archive.open(f"whitebox{number or ''}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array_header_1_0(
                    member, {"descr": "<f4", "fortran_order": False, "shape": shape}
                )
                for _ in range(size >> 20):
                    member.write(bytes(1 << 20))


@pytest.mark.parametrize(
    ("shape", "size", "members", "said"),
    [
        ((300 << 18,), 300 << 20, 4, "1 GiB unpacked"),  # 1.2 GB in 1.2 MB
        ((1 << 40,), 1 << 20, 1, "its header claims"),  # 4 TB claimed, 1 MB there
        ((1 << 31, 1 << 31), 1 << 20, 1, "its header claims"),
        ((2,), 1 << 20, 1, "its header claims"),
    ],
)
def test_an_archive_that_unpacks_to_more_than_it_may_or_than_it_has(
    folder: Path, shape: tuple[int, ...], size: int, members: int, said: str
) -> None:
    zeros(folder / ARRAYS, shape, size, members)

    def use() -> object:
        return load_run(folder).arrays["whitebox"]

    tracemalloc.start()
    try:
        with pytest.raises(DataError, match=said):
            use()
        assert tracemalloc.get_traced_memory()[1] < LITTLE
    finally:
        tracemalloc.stop()


def test_an_archive_within_its_limit_is_read(folder: Path) -> None:
    zeros(folder / ARRAYS, (1 << 18,), 1 << 20)
    assert load_run(folder).arrays["whitebox"].nbytes == 1 << 20


def set_figure(value: Any) -> Callable[[dict[str, Any]], None]:
    def change(run: dict[str, Any]) -> None:
        run["entries"][0]["scores"]["ssim"]["mean"] = value

    return change


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (set_figure(1e308), r"entries\.0\.scores\.ssim\.mean"),
        (set_figure(float("nan")), r"entries\.0\.scores\.ssim\.mean is nan"),
        (set_figure(float("-inf")), "is -inf"),
        (lambda run: run["privacy"].update(epsilon=1e300), r"privacy\.epsilon"),
        (lambda run: run["capture"].update(created=1e300), r"capture\.created"),
        (lambda run: run["entries"][0].update(views=10**40), r"entries\.0\.views"),
        (lambda run: run["entries"][0].update(settings={"a": [0, 1e200]}), r"settings\.a\.1"),
    ],
)
def test_a_report_of_figures_that_nobody_measured(folder: Path, change: Callable, said: str) -> None:
    run = json.loads((folder / ATTACK).read_text())
    change(run)
    (folder / ATTACK).write_text(json.dumps(run))
    with pytest.raises(DataError, match=said):
        write_report([folder], folder / "report.html")


@pytest.mark.parametrize("text", [DEEP, DEEP_OBJECT])
def test_a_deep_report_is_refused(folder: Path, text: str) -> None:
    (folder / ATTACK).write_text(text)
    with pytest.raises(DataError, match="nested too deeply"):
        load_run(folder)


def test_largest_figures_are_drawn(folder: Path) -> None:
    """What `load_run` lets through, the page can show."""
    run = json.loads((folder / ATTACK).read_text())
    for entry in run["entries"]:
        for score in entry["scores"].values():
            score.update(mean=store.LARGEST, low=-store.LARGEST, worst=store.LARGEST)
    run["privacy"].update(epsilon=store.LARGEST, limit=store.LARGEST)
    (folder / ATTACK).write_text(json.dumps(run))
    write_report([folder], folder / "report.html")
