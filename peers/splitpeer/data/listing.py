"""A layout's listing of a folder: the patient and modality of each file, files not taken, and problems."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from splitpeer.data.files import Case, Found, LeftOut, stem
from splitpeer.data.modalities import ANY, MASK
from splitpeer.data.patients import patient_id
from splitpeer.errors import DataError

CHOOSE = "choose one in a list (layout 'csv')"


@dataclass
class Listing:
    """The files below `root` by kind: a modality, `MASK` or `ANY`. Every layout fills one of these."""

    root: Path
    left_out: list[LeftOut] = field(default_factory=list)
    kinds: list[tuple[str, Case]] = field(default_factory=list)
    problems: list[tuple[str, str]] = field(default_factory=list)
    """What makes the files of a kind (of all, where it is `ANY`) unusable: the cause, then the fix."""
    _twins: set[tuple[str, str]] = field(default_factory=set)

    def add(self, kind: str, name: str, path: Path, channel: int | None = None) -> None:
        """Take `path`, or one channel of it, for the `kind` of the patient called `name`."""
        try:
            self.kinds.append((kind, Case(patient_id(name), path, channel)))
        except DataError as error:
            self.leave(path, str(error))

    def leave(self, path: Path, reason: str) -> None:
        """Do not take `path`."""
        self.left_out.append(LeftOut(path, reason))

    def refuse_twins(self) -> None:
        """A patient with two files of one kind is a problem, in layouts where a name says all there is to say."""
        twins: dict[tuple[str, str], list[Path]] = defaultdict(list)
        for kind, case in sorted(self.kinds):
            twins[kind, case.patient].append(case.path)
        for (kind, patient), paths in twins.items():
            if len(paths) > 1:
                self._twins.add((kind, patient))
                number = "two" if len(paths) == 2 else len(paths)
                text = f"{' and '.join(map(str, paths))} are the same patient: keep one of the {number} files"
                self.problems.append((kind, text + _why_one(paths)))

    def modalities(self) -> tuple[str, ...]:
        """The modalities that names tell of; () where names do not say what a file shows."""
        return tuple(sorted({kind for kind, _ in self.kinds} - {MASK, ANY}))

    def pick(self, wanted: str) -> Found:
        """The cases of one kind. A patient with two files of it is left out, since nothing says which one is meant."""
        fitting = sorted((case, kind) for kind, case in self.kinds if kind in (wanted, ANY))
        counts = Counter(case.patient for case, _ in fitting)
        left_out = list(self.left_out)
        for case, kind in fitting:
            if counts[case.patient] > 1 and (kind, case.patient) not in self._twins:
                what = "masks" if wanted == MASK else f"{wanted} images"
                left_out.append(LeftOut(case.path, f"one of several {what} of a patient: {CHOOSE}"))
        lacking = {case.patient for _, case in self.kinds if case.patient not in counts}
        return Found(
            tuple(case for case, _ in fitting if counts[case.patient] == 1),
            tuple(sorted(left_out)),
            tuple(sorted(lacking)),
            tuple(text for kind, text in self.problems if kind in (wanted, ANY)),
        )


def _why_one(paths: Iterable[Path]) -> str:
    """Two names that look alike are explained: what differs in them is not part of an id."""
    names = sorted({stem(path) for path in paths})
    if len(names) == 1:
        return ""
    shown = " and ".join(f"{name!a}" for name in names)
    return f" ({shown} differ only in Unicode form or in spaces at the ends)"
