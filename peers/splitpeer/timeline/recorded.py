"""What parties wrote down of their steps, read from `metrics.jsonl`, on one clock."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from splitpeer.errors import ConfigError, DataError
from splitpeer.storage import reading
from splitpeer.timeline.parts import PARTS

NAME, OLDER = "metrics.jsonl", "metrics.older.jsonl"
DEPTH = 2
"""Folders below a given one in which the file is looked for: `[output] folder` or a run in `[peer] state`."""
MOST_OCTETS = 1 << 30
"""Bytes of one file."""
MOST_S = 1e10
"""Seconds: three centuries, so that each moment has a date."""
Item = TypeVar("Item")


@dataclass(frozen=True)
class Span:
    """Something that one thread did."""

    thread: str
    part: str
    began: float
    """Seconds since 1970, as `ended`."""
    ended: float


@dataclass(frozen=True)
class TimedStep:
    """One step at one party; a step that was made again after a rollback is another one."""

    number: int
    began: float
    """Seconds since 1970, as `ended`."""
    ended: float
    spans: tuple[Span, ...]
    """Also of what was done between the steps, or ahead of this one."""
    link: Mapping[str, float]
    """Seconds by name in `parts.LINK`."""
    answers: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """By part and site, when the answer was there, seconds since 1970."""

    @property
    def seconds(self) -> float:
        """From its beginning to its end."""
        return self.ended - self.began


@dataclass(frozen=True)
class PartySteps:
    """What one party recorded."""

    party: str
    path: Path
    steps: tuple[TimedStep, ...]
    torn: tuple[Path, ...] = ()
    """Files that end within a line, as after a crash; that line was ignored."""

    @property
    def began(self) -> float:
        """Of the first step, seconds since 1970."""
        return min(step.began for step in self.steps)

    @property
    def ended(self) -> float:
        """Of the last step."""
        return max(step.ended for step in self.steps)


def read_all(paths: Iterable[Path]) -> list[PartySteps]:
    """Of each folder or file.

    Raises:
        ConfigError: there is none, or they are not of one run.
        DataError: a file cannot be read, or holds something else.
    """
    found = [read(file_of(path)) for path in paths]
    by_party: dict[str, PartySteps] = {}
    for one in found:
        if (other := by_party.setdefault(one.party, one)) is not one:
            raise ConfigError(
                f"{other.path} and {one.path} were both written by {one.party}: name only one of them"
            )
        if one.began > found[0].ended or one.ended < found[0].began:
            raise ConfigError(
                f"{found[0].path} and {one.path} do not overlap in time: they are of different runs, or the "
                "clocks of the machines differ (NTP)"
            )
    return found


def file_of(path: Path) -> Path:
    """The newest `metrics.jsonl` in a folder, or the file itself. Raises ConfigError: there is none."""
    if path.is_dir():
        below = [file for depth in range(DEPTH + 1) for file in path.glob("*/" * depth + NAME)]
        if below:
            return max(below, key=lambda file: file.stat().st_mtime)
    elif path.exists():
        return path
    raise ConfigError(
        f"{path}: no {NAME} there: name the [output] folder of a coordinator, the [peer] state of a site, or a file"
    )


def read(path: Path) -> PartySteps:
    """The steps in a file, and in the older one next to it. Raises DataError."""
    steps: list[TimedStep] = []
    torn: list[Path] = []
    party = ""
    for file in (path.with_name(OLDER), path) if path.name == NAME else (path,):
        if file is not path and not file.exists():
            continue
        try:
            octets = reading.read(file, MOST_OCTETS, follow=True, growing=True)
        except (OSError, ValueError) as error:
            raise DataError(f"{file}: cannot be read: {error}") from None
        lines = octets.splitlines()
        if _ends_within_a_line(octets):
            torn.append(file)
            del lines[-1]
        for number, line in enumerate(lines, 1):
            try:
                row = reading.parse(line)
                if not isinstance(row, dict):
                    raise TypeError
                if "timing" not in row:
                    continue
                party = str(row["timing"]["party"])
                steps.append(_step(row))
            except (ValueError, TypeError, KeyError, AttributeError, OverflowError):
                raise DataError(
                    f"{file}, line {number}: not a row of splitpeer: remove the line, or name another file"
                ) from None
    if not steps:
        raise DataError(
            f"{path}: no step in it says where its time went: the run made none, or an older splitpeer wrote it"
        )
    return PartySteps(party, path, tuple(steps), tuple(torn))


def _ends_within_a_line(octets: bytes) -> bool:
    """Whether a crash tore the last line; a whole one may lack its line feed."""
    last = octets.rpartition(b"\n")[2]
    try:
        reading.parse(last or b"{}")
    except ValueError:
        return True
    return False


def _step(row: Mapping[str, Any]) -> TimedStep:
    """Raises ValueError, TypeError, KeyError, AttributeError or OverflowError."""
    timing = row["timing"]
    at, seconds = _number(timing["at"]), _number(row["seconds"])
    spans = [
        Span(str(thread), str(part), at + _number(began), at + _number(began) + max(0.0, _number(took)))
        for thread, parts in timing["spans"].items()
        for part, numbers in parts.items()
        for began, took in zip(numbers[::2], numbers[1::2], strict=True)
    ]
    link = {str(name): _number(value) for name, value in timing["link"].items()}
    answers = {
        str(part): {str(site): at + _number(there) for site, there in sites.items()}
        for part, sites in timing.get("answers", {}).items()
    }
    return TimedStep(int(row["step"]), at, at + max(0.0, seconds), tuple(spans), link, answers)


def _number(value: Any) -> float:
    if isinstance(value, bool) or not abs(number := float(value)) < MOST_S:
        raise ValueError("not a number")
    return number


def chosen(recorded: Sequence[PartySteps], first: int, last: int) -> list[PartySteps]:
    """These steps of all parties. Raises ConfigError: a party has none of them."""
    found = []
    for one in recorded:
        steps = tuple(step for step in one.steps if first <= step.number <= last)
        if not steps:
            numbers = [step.number for step in one.steps]
            raise ConfigError(
                f"{one.path}: no step from {first} to {last}: it holds {min(numbers)} to {max(numbers)}"
            )
        found.append(replace(one, steps=steps))
    return found


def in_lanes(items: Iterable[Item], when: Callable[[Item], tuple[float, float]]) -> list[list[Item]]:
    """As few rows as there can be, of which none holds two that overlap; each in order of beginning.

    Args:
        when: beginning and end of one.
    """
    lanes: list[list[Item]] = []
    # Rounding may let one begin two microseconds before the last has ended.
    slack = 4e-6
    for item in sorted(items, key=when):
        began = when(item)[0]
        free = next((lane for lane in lanes if when(lane[-1])[1] <= began + slack), None)
        if free is None:
            lanes.append([item])
        else:
            free.append(item)
    return lanes


def threads_of(steps: Iterable[TimedStep]) -> dict[str, list[list[Span]]]:
    """By thread, in order of its name, the spans of these steps in lanes: one, unless parts overlap."""
    by_thread: dict[str, list[Span]] = {}
    for step in steps:
        for span in step.spans:
            by_thread.setdefault(span.thread, []).append(span)
    return {
        thread: in_lanes(spans, lambda span: (span.began, span.ended))
        for thread, spans in sorted(by_thread.items(), key=lambda item: (item[0] != "loop", item[0]))
    }


def kind_of(part: str) -> str:
    """Of a part; "other" of one that this version does not know."""
    return PARTS[part].kind if part in PARTS else "other"
