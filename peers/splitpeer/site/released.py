"""What a site has released in a run with frozen encoders (SP-11.17): each window once, the same answer every time.

The answers are kept in the run's folder (`answers.py`), the people in [peer] state (`shown.py`): first the answer,
then the people, and only then does it leave. So people without answers are of a folder that was removed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np

from splitpeer.logs import handle
from splitpeer.site.shown import Shown, texts
from splitpeer.site.tiling import Rule, Tiling, Triple
from splitpeer.storage.journal import Journal
from splitproto.errors import PolicyRefused, SiteFailed
from splitproto.fusion import answer_digest
from splitproto.messages import Forward

Window = tuple[bytes, int, int, int]
"""Key and origin."""


class Released:
    """The questions that a run has answered.

    Args:
        answers: None: they are not kept.
        shown: None: whom other runs have shown does not matter.
        person: key of a patient -> the person at this site, whatever the federation.
        rule: how closely windows may lie.

    Raises:
        DataError: what was kept cannot be read.
    """

    def __init__(
        self,
        answers: Journal | None = None,
        shown: Shown | None = None,
        person: Callable[[bytes], str] = bytes.hex,
        rule: Rule | None = None,
    ) -> None:
        self._journal, self._shown, self._person = answers, shown or Shown(None), person
        self._rule, self._tiling = rule, Tiling(rule)
        self._questions: dict[int, str] = {}
        self._answers: dict[int, str] = {}
        self._numbers: dict[Window, int] = {}
        answered = set[str]()
        if answers is not None:
            answers.read(lambda said: self._read(said, answered))
        self._forgotten = self._shown.here - answered
        """People whom this run has shown, by answers that are not known any more."""

    @property
    def windows(self) -> int:
        """How many windows have left in this run."""
        return len(self._numbers)

    @property
    def patients(self) -> int:
        """Of how many patients."""
        return len({window[0] for window in self._numbers})

    def knows(self, forward: Forward) -> bool:
        """Whether this very question was answered before."""
        return self._questions.get(forward.batch) == _question(forward)

    def check(self, forward: Forward, unusable: Collection[bytes] = ()) -> None:
        """Whether a batch of mode `release` may be answered.

        Args:
            unusable: keys of patients who will be withdrawn in place of an answer.

        Raises:
            PolicyRefused: it may not, now or ever.
        """
        # SP-11.17-3.
        if forward.step != 0 or forward.seed is not None or forward.places is not None:
            raise PolicyRefused("a release is of step 0, without a seed and without places")
        # SP-11.17-4: a window in two batches, or twice in one, would be met in several contexts.
        windows = [(sample.key, *sample.origin) for sample in forward.samples]
        if len(set(windows)) < len(windows):
            raise PolicyRefused(f"release {forward.batch} asks for one window twice")
        if self.knows(forward):
            # A crash may have come between answer and people, and then another run.
            self._shown.check(set(self._people(forward, unusable)) - self._shown.here)
            return
        if forward.batch in self._questions:
            raise PolicyRefused(f"release {forward.batch} was answered for other windows before")
        if again := [w for w in windows if w in self._numbers]:
            first = self._numbers[again[0]]
            raise PolicyRefused(
                f"release {forward.batch} asks for {len(again)} windows that were released before, as of {first}"
            )
        self._check_views(forward, unusable)

    def note(self, forward: Forward, tensors: Mapping[str, np.ndarray]) -> None:
        """The batch was checked, and its answer is about to leave; durable when this returns.

        Raises:
            SiteFailed: another answer left before (SP-11.17-5).
            DataError: it cannot be written down.
        """
        answer, people = answer_digest(tensors), self._people(forward)
        if not self.knows(forward):
            asked, windows = _question(forward), _by_patient(forward)
            if self._journal is not None:
                shown = {key.hex(): [list(origin) for origin in some] for key, some in windows.items()}
                self._journal.add(
                    batch=forward.batch, windows=shown, people=people, asked=asked, answer=answer
                )
            self._take(forward.batch, windows, asked, answer)
        elif answer != self._answers[forward.batch]:
            patients = " ".join(f"--patient {handle(key)}" for key in _by_patient(forward))
            raise SiteFailed(
                f"the answer to release {forward.batch} is not the one that was given before, and a second one "
                "would show more: was this site's network, machine or data changed? To continue without, at the "
                f"coordinator: splitpeer bank drop RUN {patients}"
            )
        # Also of a question that is known: a crash may have come between the two.
        self._shown.note(people)

    # --- inside ----------------------------------------------------------------------------------------

    def _check_views(self, forward: Forward, unusable: Collection[bytes]) -> None:
        """How often a patient, and a place in a patient, may be seen. Raises PolicyRefused."""
        people = self._people(forward, unusable)
        if self._forgotten.intersection(people):
            # SP-11.17-4: "releases nothing more of them"
            raise PolicyRefused(
                f"release {forward.batch} is of a patient whom this run has shown, and which windows those were is "
                "unknown since the run's folder was removed: begin a new run"
            )
        self._shown.check(people)
        # SP-11.17-10
        for key, origins in _by_patient(forward).items():
            if not self._tiling.fits(key, origins):
                most = self._rule.overlap if self._rule is not None else 0
                raise PolicyRefused(
                    f"release {forward.batch} asks for windows of a patient that are closer to each other than an "
                    f"overlap of {most:g} allows (policy max_overlap): each would be another view of the same place"
                )

    def _people(self, forward: Forward, without: Collection[bytes] = ()) -> list[str]:
        return sorted({self._person(sample.key) for sample in forward.samples if sample.key not in without})

    def _take(self, number: int, windows: Mapping[bytes, list[Triple]], asked: str, answer: str) -> None:
        self._questions[number], self._answers[number] = asked, answer
        for key, origins in windows.items():
            self._numbers.update(((key, *origin), number) for origin in origins)
            self._tiling.add(key, origins)

    def _read(self, said: Mapping[str, Any], answered: set[str]) -> None:
        """Raises ValueError, TypeError or LookupError."""
        windows = {
            bytes.fromhex(key): [_origin(one) for one in some] for key, some in dict(said["windows"]).items()
        }
        answered.update(texts(said["people"]))
        self._take(int(said["batch"]), windows, str(said["asked"]), str(said["answer"]))


def _question(forward: Forward) -> str:
    """Digest of the windows, in their order."""
    windows = [[sample.key.hex(), *sample.origin] for sample in forward.samples]
    return hashlib.sha256(json.dumps(windows).encode()).hexdigest()


def _by_patient(forward: Forward) -> dict[bytes, list[Triple]]:
    found: dict[bytes, list[Triple]] = {}
    for sample in forward.samples:
        found.setdefault(sample.key, []).append(sample.origin)
    return found


def _origin(shown: Sequence[object]) -> Triple:
    """Raises ValueError or TypeError."""
    x, y, z = shown
    if not (isinstance(x, int) and isinstance(y, int) and isinstance(z, int)):
        raise TypeError
    return x, y, z
