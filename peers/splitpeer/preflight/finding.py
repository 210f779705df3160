"""What a check found: one line for people, one object for programs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Level = Literal["ok", "warning", "problem"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of a report."""

    check: str
    """What was checked, such as `certificate`."""
    level: Level
    text: str
    """What is the case; with a problem or a warning, the cause and then the fix."""
    connection: bool = False
    """A problem with the other side, or on the way to it, and not on this machine."""

    def line(self) -> str:
        """For a terminal."""
        return f"{self.level:<8} {self.check:<12} {self.text}"


def exit_code(findings: Iterable[Finding]) -> int:
    """0: no problem; 4: something here is wrong; 2: only the connection is."""
    problems = [finding for finding in findings if finding.level == "problem"]
    if not problems:
        return 0
    return 2 if all(finding.connection for finding in problems) else 4
