"""Patients who have withdrawn their consent: a list of ids that may appear or grow while the daemon runs."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

from splitpeer.data.files import Case
from splitpeer.data.layouts import subject
from splitpeer.data.patients import patient_id
from splitpeer.data.pseudonym import pseudonym
from splitpeer.errors import DataError, PatientUnusable
from splitpeer.storage import durable, reading
from splitproto.causes import CONSENT

MAX_BYTES = 16 << 20
"""A longer list is refused: it would name more patients than an inventory may hold."""
TRIES, PAUSE_S = 4, 0.25
"""A list that cannot be read is read again, so often and after so many seconds."""


class Consent:
    """What `[data] withdrawn` says of this site's patients.

    One id a line, UTF-8; empty lines and those that begin with `#` are skipped. A person's id (`sub-01`) stands
    for all time points (`sub-01_ses-2`). Safe to use from several threads.

    Args:
        path: of the list; None: there is no list. It need not exist yet, but its folder must.
        cases: the patients, by key.
        mark: a file that is written once the list was there: from then on its absence is an error, after a restart and
            in the next run too. None: only this object remembers.
        earlier: patients whose files may be gone by now: the key of the person by that of the patient.
        salt: of these keys.
        note: whether `mark` is written; else it is only looked at.
        check: given the keys of all that the list withdraws, before they count; what it raises, `withdrawn` raises.
    """

    def __init__(
        self,
        path: Path | None,
        cases: Mapping[bytes, Case],
        mark: Path | None = None,
        earlier: Mapping[bytes, bytes] | None = None,
        salt: bytes = b"",
        *,
        note: bool = True,
        check: Callable[[Collection[bytes]], None] | None = None,
    ) -> None:
        self._path, self._mark, self._noting = path, mark, note
        self._check = check
        self._earlier, self._salt = earlier or {}, salt
        self._keys: dict[str, set[bytes]] = {}
        self._know(cases)
        self._content: bytes | None = b""  # as it counts; None: to be read again
        self._seen = False
        self._lock = threading.Lock()
        self._withdrawn: set[bytes] = set()
        self.unknown = 0
        """Ids of the list that are no patient's here: others hold them, or they are misspelt."""

    def withdrawn(self) -> set[bytes]:
        """The keys of all that have withdrawn; who has done so stays in it while this process runs.

        The list is read each time: it is short, and a change must count from the next batch on.

        Raises:
            DataError: the list cannot be read, or `check` refuses it. Then nothing may leave: it is unknown who has
                withdrawn.
        """
        with self._lock:
            if self._path is not None and (content := self._read(self._path)) != self._content:
                ids = self._ids(self._path, content)
                self.unknown = sum(one not in self._keys for one in ids)
                found = {key for one in ids for key in self._keys.get(one, ())}
                listed = {pseudonym(self._salt, one) for one in ids} if self._earlier else set()
                found |= {key for key, who in self._earlier.items() if listed & {key, who}}
                if self._check is not None:
                    self._check(found)
                self._withdrawn |= found
                self._content = content
            return set(self._withdrawn)

    def learn(self, cases: Mapping[bytes, Case]) -> None:
        """Patients who came after the start, by key: the list counts for them, too."""
        with self._lock:
            self._know(cases)
            self._content = None

    def _know(self, cases: Mapping[bytes, Case]) -> None:
        for key, case in cases.items():
            for name in {case.patient, subject(case.patient)}:
                self._keys.setdefault(name, set()).add(key)

    def findings(self) -> list[str]:
        """What the people here should have a look at, in one line."""
        if self._path is None:
            return []
        if not self._seen:
            return [f"{self._path}: does not exist yet: nobody has withdrawn consent"]
        if self.unknown:
            return [
                f"{self._path}: {self.unknown} of its ids belong to no patient here: compare the spelling"
            ]
        return []

    def refusal(self, key: bytes) -> PatientUnusable:
        """Why a patient who has withdrawn is not sent."""
        return PatientUnusable(key, CONSENT, f"{self._path}: the patient has withdrawn consent")

    def _read(self, path: Path) -> bytes:
        try:
            content = _patiently(path)
        except FileNotFoundError:
            if not self._was_there() and path.parent.is_dir():
                return b""
            raise DataError(
                f"{path}: the list of withdrawn patients is gone, so nothing is sent: put it back"
            ) from None
        except OSError as error:
            raise DataError(
                f"{path}: the list of withdrawn patients cannot be read ({error.strerror}), so nothing is sent: "
                "correct the file, or [data] withdrawn"
            ) from None
        if self._noting and not self._seen:
            self._note()
        self._seen = True
        return content

    def _was_there(self) -> bool:
        """Whether this process, or one before it, has read the list."""
        return self._seen or (self._mark is not None and os.path.lexists(self._mark))

    def _note(self) -> None:
        """Raises DataError: nothing would show after a restart that there was a list."""
        mark = self._mark
        if mark is None or os.path.lexists(mark):
            return
        try:
            durable.make_folder(mark.parent)
            durable.replace(mark, b"")
        except OSError as error:
            raise durable.refusal(error, f"{mark}:", "[peer] state") from None

    def _ids(self, path: Path, content: bytes) -> set[str]:
        try:
            lines = content.decode("utf-8-sig").splitlines()
        except UnicodeDecodeError:
            raise DataError(
                f"{path}: the list of withdrawn patients is not UTF-8, so nothing is sent: save it as UTF-8"
            ) from None
        return {patient_id(line) for line in lines if line.strip() and not line.lstrip().startswith("#")}


def _patiently(path: Path) -> bytes:
    """The file's content; tried again for a moment, since somebody may be writing it just now."""
    for _ in range(TRIES):
        try:
            return reading.read(path, MAX_BYTES, follow=True)
        except FileNotFoundError:
            raise
        except OSError:
            time.sleep(PAUSE_S)
    return reading.read(path, MAX_BYTES, follow=True)
