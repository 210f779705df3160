"""What the loader sees in a folder, before a job depends on it: every file in full, every problem named."""

from __future__ import annotations

import json
import shlex
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from splitpeer.data import layouts
from splitpeer.data.files import Case, Found, below
from splitpeer.data.findings import naming_warnings
from splitpeer.data.geometry import Geometry, differences
from splitpeer.data.labels import shown, task_of
from splitpeer.data.mask_values import MaskCensus
from splitpeer.data.modalities import ANY, canonical_modality
from splitpeer.data.msd import label_names
from splitpeer.data.nifti import NiftiHeader, Rules, read_voxels
from splitpeer.data.normalisation import DEFAULT, Normaliser
from splitpeer.data.quality import image_warnings
from splitpeer.data.task import Task
from splitpeer.data.volumes import prepare
from splitpeer.errors import DataError

TELLING = ("patient-folders", "bids", "brats", "msd")
"""Layouts in which names always say what a file shows."""
SOMETHING = "image"
"""What is looked for where any image will do."""

MOST_NAMES = 4
"""Folders that a suggestion names as modalities."""

Progress = Callable[[int, int, Path], None]
"""Called before each file with its number (from 1), the number of files, and its path."""
RuleOf = Callable[[str], Normaliser]
"""How images of a modality are normalised."""


def by_default(modality: str) -> Normaliser:
    """The rule where no job says another."""
    return DEFAULT


@dataclass
class DataReport:
    """The findings. `counts`: patients per modality (or "images"), and "labels"; the others: value -> files.

    `problems` make data unusable; `warnings` deserve a second look.
    """

    root: str
    layout: str
    convention: str | None
    counts: dict[str, int] = field(default_factory=dict)
    shapes: Counter[str] = field(default_factory=Counter)
    spacings: Counter[str] = field(default_factory=Counter)
    orientations: Counter[str] = field(default_factory=Counter)
    label_values: Counter[str] = field(default_factory=Counter)
    label_names: dict[str, str] = field(default_factory=dict)
    """Mask value -> its meaning, from an MSD task's own description."""
    mask_voxels: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """True where no problem was found."""
        return not self.problems

    def lines(self) -> list[str]:
        """The report for a terminal, one string per line."""
        rows = [("folder", self.root), ("layout", self.layout)]
        if "labels" in self.counts:
            rows.append(("convention", self.convention or "not named"))
        rows += [(what, f"{count} patients") for what, count in self.counts.items()]
        for title, table in (
            ("shape", self.shapes),
            ("spacing mm", self.spacings),
            ("orientation", self.orientations),
            ("label values", self.label_values),
        ):
            rows += [(title, f"{value}  ({count} files)") for value, count in sorted(table.items())]
        rows += [("label", f"{value} {name}") for value, name in self.label_names.items()]
        rows += [("mask voxels", text) for text in self.mask_voxels]
        rows += [("problem", text) for text in self.problems] + [("warning", text) for text in self.warnings]
        rows.append(("result", "usable" if self.ok else f"{len(self.problems)} problem(s)"))
        return [f"{title:<13} {text}" for title, text in rows]

    def as_json(self) -> str:
        """The same as a JSON object, with `ok`."""
        return json.dumps({**vars(self), "ok": self.ok}, indent=2, sort_keys=True)


def check(
    root: Path | str,
    layout: str | None = None,
    modalities: Sequence[str] = (),
    convention: Task | str | None = None,
    progress: Progress | None = None,
    rules: Rules | None = None,
    rule: RuleOf = by_default,
) -> DataReport:
    """Read every volume under `root` in full, as training will (by the same code), and report.

    `layout` None: detected where only one fits. Without `modalities`: all that file names mention. If they
    mention none, all files are of one kind: images, or masks where `convention` is given without
    `modalities`. `convention`: what the masks mean, by its name, or the task itself. `rule`: the job's.
    Raises DataError only where there is nothing to report on (no such folder, no layout fits, an unknown
    name).
    """
    guessed, layout = layout is None, layout or layouts.detect_layout(root)
    task = task_of(convention) if convention is not None else None
    report = DataReport(str(root), layout, (task.convention or f"[task] ({task})") if task else None)
    kinds = _find(Path(root), report, [canonical_modality(one) for one in modalities])
    by_patient: dict[str, list[tuple[str, Case]]] = {}
    report.warnings += naming_warnings(Path(root), kinds.values())
    if layout == "msd":
        report.label_names = {str(value): name for value, name in label_names(Path(root)).items()}
    for kind, found in kinds.items():
        report.counts[kind] = len(found.cases)
        for case in found.cases:
            by_patient.setdefault(case.patient, []).append((kind, case))
    files = sum(len(found.cases) for found in kinds.values())
    inspection = _Inspection(report, files, progress, rules, task, rule)
    for patient in sorted(by_patient):
        inspection.patient(by_patient[patient])
        if missing := [kind for kind in kinds if kind not in dict(by_patient[patient])]:
            report.warnings.append(f"{patient}: no {', '.join(missing)}")
    inspection.finish()
    if not any(report.counts.values()) and report.ok:
        report.problems.append(_none(Path(root), layout, guessed))
    return report


def _find(root: Path, report: DataReport, wanted: Sequence[str]) -> dict[str, Found]:
    """The listing by kind; a kind that cannot be listed becomes a problem, unless none can."""
    layout, first = report.layout, next(iter(wanted), "")
    listed = layouts.listing(root, layout, first)
    kinds: dict[str, Found] = {}
    if len(wanted) > 1:
        for name in wanted:
            _look(root, report, name, kinds)
        _look(root, report, None, kinds)
        try:
            layouts.find_all(root, layout, wanted)
        except DataError as error:
            report.problems += [] if str(error) in report.problems else [str(error)]
    elif layout not in TELLING and all(kind == ANY for kind, _ in listed.kinds):
        # Names do not say what the files show: they are all of one kind.
        masks = report.convention is not None and not wanted
        found = layouts.look(root, layout, None if masks else first or SOMETHING)
        report.problems += found.problems
        kinds["labels" if masks else first or "images"] = found
    else:
        for name in wanted or listed.modalities():
            _look(root, report, name, kinds)
        _look(root, report, None, kinds)
    return layouts.without_taken(kinds)


def _none(root: Path, layout: str, guessed: bool) -> str:
    """Nothing was found, and what to try."""
    nothing = f"{root}: holds no image or mask that could be read"
    if not guessed:
        return f"{nothing}: name the folder that does"
    names = sorted({path.parent.name for path in below(root)[0] if path.parent.parent == root})
    options = " ".join(
        ("--layout folder", *(f"--modality {shlex.quote(name)}" for name in names[:MOST_NAMES]))
    )
    hint = f": if its folders are modalities, try {options}" if names else ": name the layout with --layout"
    return f"{nothing} as layout {layout!r}, which was guessed{hint}"


def _look(root: Path, report: DataReport, modality: str | None, kinds: dict[str, Found]) -> None:
    """Find one kind, None for the masks, with everything that is wrong with it."""
    found: Found | None = None
    try:
        found = layouts.look(root, report.layout, modality, layouts.taken(kinds))
        problems = found.problems
    except DataError as error:
        problems = (str(error),)
    # Most sites hold no masks; asked to check them, it is a problem.
    unasked = modality is None and report.convention is None and not (found and found.cases)
    known = report.warnings if unasked else report.problems
    known += [text for text in problems if text not in known]
    if found is not None and (found.cases or found.problems):
        kinds[modality or "labels"] = found


class _Inspection:
    """Reads the files of one patient after the other, so that only one patient is in memory."""

    def __init__(
        self,
        report: DataReport,
        files: int,
        progress: Progress | None,
        rules: Rules | None,
        task: Task | None,
        rule: RuleOf,
    ) -> None:
        self._report, self._files, self._progress, self._rules = report, files, progress, rules
        self._task, self._rule = task, rule
        self._done = 0
        self._dark_rims = self._rims = 0
        self._census = MaskCensus(task)

    def patient(self, cases: list[tuple[str, Case]]) -> None:
        first: tuple[Case, Geometry] | None = None
        contrast = mask = None
        for kind, case in cases:
            self._done += 1
            if self._progress:
                self._progress(self._done, self._files, case.path)
            try:
                voxels, header = read_voxels(case, self._rules)
            except DataError as error:
                self._report.problems.append(str(error))
                continue
            here = self._grid(case, header)
            if first is None:
                first = (case, here)
            elif found := differences(first[1], here):
                self._report.problems.append(
                    f"{case.path}: differs from {first[0].path} in {'; '.join(found)}"
                )
            trained = self._as_trained(kind, case, voxels, header)
            if kind == "labels":
                self._mask(case, voxels)
                mask = trained
            elif trained is not None:
                self._report.warnings += [
                    f"{case.path}: {text}" for text in image_warnings(voxels, self._rule(kind))
                ]
                contrast = voxels if kind == "t1ce" else contrast
        tumour = self._task is not None and self._task.convention
        if tumour and contrast is not None and mask is not None and contrast.shape == mask.shape[1:]:
            self._compare_rim(contrast, mask)

    def _grid(self, case: Case, header: NiftiHeader) -> Geometry:
        grid, report = header.geometry, self._report
        report.shapes["x".join(map(str, grid.shape))] += 1
        report.spacings["x".join(f"{mm:.3g}" for mm in grid.spacing)] += 1
        report.orientations[header.orientation] += 1
        report.warnings += [f"{case.path}: {text}" for text in header.warnings]
        return grid

    def _as_trained(
        self, kind: str, case: Case, voxels: np.ndarray, header: NiftiHeader
    ) -> np.ndarray | None:
        """The voxels that training gets; a problem if it would get none."""
        task = self._task if kind == "labels" else None
        if kind == "labels" and task is None:
            return None
        try:
            return prepare(case, voxels, header, labels=task, normalisation=self._rule(kind))
        except DataError as error:
            self._report.problems.append(str(error))
            return None

    def finish(self) -> None:
        report = self._report
        report.mask_voxels = self._census.lines()
        report.warnings += self._census.warnings()
        if self._rims and 2 * self._dark_rims > self._rims:
            report.warnings.append(
                f"enhancing tumour is darker than the rest of the tumour on T1ce in {self._dark_rims} of "
                f"{self._rims} patients: is {report.convention!r} the convention of these masks?"
            )
        if report.label_values and report.convention is None:
            report.warnings.append("masks found but no label convention named: name it to have them checked")

    def _mask(self, case: Case, voxels: np.ndarray) -> None:
        self._census.add(case.path, voxels)
        values = np.unique(voxels)
        named = ", ".join(map(shown, values[:8].tolist())) + (", ..." if values.size > 8 else "")
        self._report.label_values[named] += 1
        if values.size == 1 and values[0] == 0:
            self._report.warnings.append(f"{case.path}: an empty mask")

    def _compare_rim(self, contrast: np.ndarray, mask: np.ndarray) -> None:
        """Gadolinium brightens enhancing tumour: the only evidence in pixels of a wrong convention."""
        enhancing = mask[2].astype(bool)
        rest = mask[0].astype(bool) & ~enhancing
        if enhancing.any() and rest.any():
            self._rims += 1
            self._dark_rims += bool(contrast[enhancing].mean() <= contrast[rest].mean())
