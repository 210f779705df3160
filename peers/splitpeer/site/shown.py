"""Whom a site has shown in which run, and with which encoders (SP-11.17-9, SP-11.17-11): a journal in [peer] state.

    {"run": "<hex>", "terms": "<hex>", "encoders": ["<hex>"], "people": ["<hex>"]}

A person has a line for each run, on the medium before the first answer about the person leaves. It outlives the
folders of runs. Lines of older versions have no terms, so they are of runs that do not continue.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from splitpeer.storage.journal import Journal
from splitproto.errors import PolicyRefused

NAME = "released.jsonl"


@dataclass(frozen=True)
class Showing:
    """One run, and how often its people may be shown."""

    run: bytes = b""
    terms: str = ""
    """Digest of the job's terms and the seats, see `run_folders.accepted_terms`: the coordinator chooses the run's
    id, so the same id with others is another run."""
    encoders: frozenset[str] = frozenset()
    """Digests of the encoders' weights, see `Encoders.identities`."""
    once: bool = False
    """[policy] releases: whether the encoders may show nobody whom they have shown in another run."""
    most_runs: int | None = None
    """[policy] max_runs_per_patient."""


class Shown:
    """People by account, see `People`.

    Args:
        journal: None: nothing is kept.
        showing: the present run.

    Raises:
        DataError: the journal cannot be read.
    """

    def __init__(self, journal: Journal | None, showing: Showing | None = None) -> None:
        self._journal, self._showing = journal, showing or Showing()
        self.here: set[str] = set()
        """In this run."""
        self._same_encoder: set[str] = set()
        """In another run, by one of the encoders."""
        self._others: dict[str, set[tuple[str, str]]] = {}
        """Run and terms of all other runs, by person."""
        if journal is not None:
            journal.read(self._take)

    def check(self, people: Collection[str]) -> None:
        """Whether people may be shown in this run. Raises PolicyRefused."""
        for person in people:
            if why := self._barred(person):
                raise PolicyRefused(f"the batch is of a patient {why}")

    def check_some(self, people: Collection[str]) -> None:
        """Whether anybody of these may be. Raises PolicyRefused: the run is declined instead of failing once begun."""
        found = [self._barred(person) for person in people]
        if found and all(found):
            raise PolicyRefused(f"every patient of this site is one {found[0]}")

    def bars(self, person: str) -> bool:
        """Whether `check` refuses this person."""
        return self._barred(person) is not None

    def note(self, people: Collection[str]) -> None:
        """They were checked, and are about to be shown; durable when this returns. Raises DataError."""
        if new := sorted(set(people) - self.here):
            showing = self._showing
            if self._journal is not None:
                self._journal.add(
                    run=showing.run.hex(),
                    terms=showing.terms,
                    encoders=sorted(showing.encoders),
                    people=new,
                )
            self.here.update(new)

    def _barred(self, person: str) -> str | None:
        """Why a person may not be shown."""
        # SP-11.17-9: of a patient and not of a window, which another run may cut otherwise.
        if self._showing.once and person in self._same_encoder:
            return "whom this encoder has shown in another run (policy releases = once)"
        # SP-11.17-11
        most = self._showing.most_runs
        if most is not None and len(self._others.get(person, ())) >= most:
            return (
                "who was shown in as many other runs as this site allows "
                f"(policy max_runs_per_patient = {most}); each run is another view"
            )
        return None

    def _take(self, said: Mapping[str, Any]) -> None:
        self.learn(
            str(said["run"]), str(said.get("terms", "")), texts(said["encoders"]), texts(said["people"])
        )

    def learn(self, run: str, terms: str, encoders: Collection[str], people: Collection[str]) -> None:
        """A run (hexadecimal) has shown people, in this process or an earlier one."""
        if (run, terms) == (self._showing.run.hex(), self._showing.terms):
            self.here.update(people)
            return
        if self._showing.encoders.intersection(encoders):
            self._same_encoder.update(people)
        for person in people:
            self._others.setdefault(person, set()).add((run, terms))


def shown_in(state: Path, showing: Showing, most_mib: int) -> Shown:
    """What [peer] state holds. Raises DataError."""
    return Shown(_journal(state, most_mib), showing)


def runs_in(state: Path, most_mib: int) -> set[str]:
    """All runs (hexadecimal) that have shown somebody. Raises DataError: it cannot be read."""
    found = set[str]()
    _journal(state, most_mib).read(lambda said: found.add(str(said["run"])))
    return found


def _journal(state: Path, most_mib: int) -> Journal:
    lost = "so nobody knows who was shown: this site shows nobody"
    return Journal(state / NAME, most_mib, lost)


def texts(shown: object) -> list[str]:
    """A list of them. Raises TypeError."""
    if not isinstance(shown, list):
        raise TypeError
    return [str(one) for one in shown]
