"""``[task]`` of job.toml: what it may contain, and the error for what it may not."""

from __future__ import annotations

from pathlib import Path

import pytest

from splitpeer.data.task import glioma
from splitpeer.errors import ConfigError
from splitpeer.settings.job import JobConfig
from splitpeer.settings.loading import to_toml

HEAD = '[job]\nname = "j"\n[sites]\na = "ct"\nb = "t1gd"\n'
LIVER = 'values = { liver = 1, lesion = 2 }\nregions = { organ = ["liver", "lesion"], lesion = ["lesion"] }\n'


def job(folder: Path, task: str = "") -> JobConfig:
    path = folder / "job.toml"
    path.write_text(HEAD + (f"[task]\n{task}" if task else ""))
    return JobConfig.load(path)


@pytest.mark.parametrize("written", ["", 'preset = "glioma"', 'normalisation = { t1ce = "zscore" }'])
def test_glioma_is_what_is_segmented_unless_the_job_says_otherwise(tmp_path: Path, written: str) -> None:
    section = job(tmp_path, written).task
    assert section.preset == "glioma"
    assert section.task("brats") == glioma("brats")
    with pytest.raises(ConfigError, match=r'masks follow a convention: write \[data\] convention = "msd"'):
        section.task("task")


def test_a_task_of_its_own(tmp_path: Path) -> None:
    section = job(tmp_path, LIVER).task
    task = section.task("task")
    assert task.names == {1: "liver", 2: "lesion"} and not task.convention and not task.exclusive
    assert [(r.name, r.values) for r in task.regions] == [("organ", (1, 2)), ("lesion", (2,))]
    with pytest.raises(ConfigError, match=r'write convention = "task"'):
        section.task("msd")


def test_each_value_is_a_region_where_none_are_named(tmp_path: Path) -> None:
    task = job(tmp_path, "values = { left = 3, right = 5 }\nexclusive = true").task.task("task")
    assert [(r.name, r.values) for r in task.regions] == [("left", (3,)), ("right", (5,))]
    assert task.channels == 3


def test_normalisation_by_modality_in_any_spelling(tmp_path: Path) -> None:
    section = job(tmp_path, 'normalisation = { CT = "window:-100,300", t1c = "none" }').task
    assert [str(section.rule(modality)) for modality in ("ct", "t1ce", "pet")] == [
        "window:-100.0,300.0",
        "none",
        "zscore-nonzero",
    ]


@pytest.mark.parametrize("written", ["", LIVER, LIVER + 'normalisation = { ct = "percentile" }'])
def test_what_is_written_out_is_read_again(tmp_path: Path, written: str) -> None:
    first = job(tmp_path, written)
    (tmp_path / "again.toml").write_text(to_toml(first.resolved()))
    assert JobConfig.load(tmp_path / "again.toml").task == first.task


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ('preset = "liver"', "[task] preset must be 'glioma'"),
        ("exclusive = true", "[task]: values are missing: add values = { lesion = 1 }"),
        ("values = {}", "[task]: values are missing"),
        ('preset = "glioma"\nvalues = { a = 1 }', "[task]: preset glioma says what is segmented"),
        ("values = { a = 0 }", "[task] values, a must be greater than or equal to 1, not 0"),
        ("values = { a = 1.5 }", "[task] values, a must be a valid integer, not 1.5"),
        ("values = { a = true }", "[task] values, a must be a valid integer, not True"),
        ("values = { a = 1, b = 1 }", "[task]: two names have the same value"),
        ('values = { "a/b" = 1 }', "[task]: 'a/b' is not a valid name"),
        (
            'values = { a = 1 }\nregions = { r = ["b"] }',
            "[task]: region r holds 'b', which is not one of values",
        ),
        ('values = { a = 1 }\nregions = { mean = ["a"] }', "[task]: a region cannot be called mean"),
        (
            LIVER + "exclusive = true",
            "[task]: lesion is in organ and in lesion, but classes exclude each other",
        ),
        ('normalisation = "zscore"', "[task]: normalisation is a table: write normalisation = {"),
        (
            'normalisation = { ct = "window" }',
            "[task] normalisation, ct: 'window': window needs two intensities",
        ),
        (
            'normalisation = { "c t" = "none" }',
            "[task] normalisation: 'c t' is not a valid name of a modality",
        ),
        ('normalisation = { t1c = "none", t1ce = "none" }', "[task] normalisation: t1ce is named twice"),
        ('normalisation = { pet = "none" }', "[task] normalisation: pet is at none of [sites]"),
        ("regoins = {}", "[task] regoins is unknown: did you mean regions?"),
    ],
)
def test_mistakes_in_one_line(tmp_path: Path, written: str, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        job(tmp_path, written)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)
