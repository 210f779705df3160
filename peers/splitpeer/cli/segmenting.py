"""What `segment` and `evaluate` share: options, and what a person sees while a daemon is asked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from splitpeer.cli.terminal import echo
from splitpeer.errors import JobFailed, PeerError
from splitproto.errors import printable

if TYPE_CHECKING:
    from splitpeer.daemon.asking import AnswerTold
    from splitpeer.daemon.spooled import Status


class _Least(click.ParamType[Any]):
    name = "least"

    def get_metavar(self, param: click.Parameter, ctx: click.Context | None = None) -> str:
        return "all|N"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value == "all" or isinstance(value, int):
            return value
        if str(value).isdecimal() and 1 <= int(value) <= 64:
            return int(value)
        self.fail(f"{value!r} is neither all nor a number of 1 to 64", param, ctx)


LEAST = _Least()
wait_option = click.option(
    "--wait",
    type=click.FloatRange(min=1, max=7 * 24 * 3600),
    default=3600.0,
    show_default=True,
    metavar="SECONDS",
    help="How long one patient may take.",
)


def all_in_one(errors: Mapping[str, PeerError], count: int, what: str) -> PeerError:
    """The error of several patients as one: its own where only one was asked for; the exit code if they have one."""
    first = next(iter(errors.values()))
    if count == 1:
        return first
    kind = type(first) if len({error.exit_code for error in errors.values()}) == 1 else JobFailed
    return kind(f"{len(errors)} of {count} {what}")


class Watched:
    """Shows how far some patients are, on standard error.

    Args:
        patients: all of them.
    """

    def __init__(self, patients: Sequence[str]) -> None:
        self._count, self._over = len(patients), 0
        console = Console(stderr=True)
        self._live = console.is_terminal
        self._bars = Progress(
            TextColumn("{task.fields[who]}", markup=False),
            BarColumn(),
            TextColumn("{task.fields[doing]}", markup=False),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            disable=not self._live,
        )
        self._tasks: dict[str, TaskID] = {}
        self._said: dict[str, str] = {}

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def show(self, told: AnswerTold) -> None:
        """What is new of a patient."""
        if not self._live:
            self._say(told)
            return
        if told.over:
            self._over += 1
            if (task := self._tasks.pop(told.patient, None)) is not None:
                self._bars.remove_task(task)
            return
        who = printable(told.patient)
        if self._count > 1:
            who += f" ({self._over} of {self._count} done)"
        if (task := self._tasks.get(told.patient)) is None:
            task = self._tasks[told.patient] = self._bars.add_task("", total=None, who=who, doing="")
        status = told.status
        self._bars.update(
            task, completed=status.done, total=status.total or None, who=who, doing=printable(doing(status))
        )

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Lines that are written meanwhile stand above the bars."""
        if self._live:
            self._bars.stop()
        try:
            yield
        finally:
            if self._live:
                self._bars.start()

    def _say(self, told: AnswerTold) -> None:
        """A line for each state, not for each window."""
        if told.over:
            return
        status = told.status
        line = status.state if status.state == "working" else doing(status)
        if self._said.get(told.patient) != line:
            self._said[told.patient] = line
            echo(f"{told.patient}: {line}", err=True)


def doing(status: Status) -> str:
    """A state in words: "queued, 3 before it", "working, 12 of 64 windows"."""
    if status.state == "queued":
        return f"queued, {status.ahead} before it" if status.ahead else "queued, the next one"
    if status.state == "working" and status.total:
        return f"working, {status.done} of {status.total} windows"
    return f"{status.state}: {status.reason}" if status.reason else status.state
