"""`splitpeer drain`: ask daemons on this machine to stop in good order, and wait until they have."""

from __future__ import annotations

import signal
import time
from collections.abc import Sequence
from pathlib import Path

import click

from splitpeer.cli.options import FILE, heads_option, load_heads, set_option
from splitpeer.cli.status import headline
from splitpeer.cli.terminal import echo
from splitpeer.daemon.observe import PeerHead, Seen, look
from splitpeer.errors import DeadlinePassed, JobFailed

LOOK_S = 0.2
AGAIN_S = 0.5
"""Between two signals: sent at once, they would arrive as one."""


@click.command()
@click.argument("files", nargs=-1, type=FILE, metavar="[PEER_TOML]...")
@heads_option
@set_option
@click.option(
    "--wait",
    type=click.FloatRange(min=0),
    default=120.0,
    show_default=True,
    metavar="SECONDS",
    help="How long it may take.",
)
@click.option("--now", is_flag=True, help="Stop at once, without a checkpoint: a second signal.")
def drain(
    files: tuple[Path, ...],
    config_files: tuple[Path, ...],
    settings: tuple[str, ...],
    wait: float,
    now: bool,
) -> None:
    """Make a daemon finish the current step, write a checkpoint and end; wait until it has.

    The same as SIGTERM or `systemctl stop`. Exit code 1: it did not run, or failed while it stopped; 3: it
    still runs after --wait, and continues to stop.
    """
    heads = load_heads((*config_files, *files), settings)
    seen = [look(head) for head in heads]
    asked = [(head, one) for head, one in zip(heads, seen, strict=True) if _ask(one)]
    failed = _wait(asked, wait, now)
    failed += [f"{one.site}: {headline(one)}" for one in seen if not one.runs]
    if failed:
        raise JobFailed("; ".join(failed))


def _ask(one: Seen) -> bool:
    """False: it does not run, or ended just now."""
    if one.holder is None or not one.holder.signal(signal.SIGTERM):
        return False
    echo(f"{one.site}: asked to stop (pid {one.pid}); {_state(one)}")
    return True


def _wait(asked: Sequence[tuple[PeerHead, Seen]], patience: float, now: bool) -> list[str]:
    """Until all have stopped; says what changes meanwhile. Returns who failed, and why.

    Raises:
        DeadlinePassed: one still runs.
    """
    began = signalled = time.monotonic()
    waiting, failed = list(asked), []
    while waiting:
        time.sleep(LOOK_S)
        again = now and time.monotonic() - signalled >= AGAIN_S
        if again:
            signalled = time.monotonic()
        still = []
        for head, before in waiting:
            one = look(head)
            if one.holder is None or one.holder != before.holder:
                echo(f"{one.site}: {_end(one)} after {time.monotonic() - began:.1f} s")
                if one.cause:
                    failed.append(f"{one.site} failed while it stopped: {one.cause}")
                continue
            still.append((head, one))
            # Until it reacts, steps continue: not worth a line each.
            if one.phase == "draining" and _state(one) != _state(before):
                echo(f"{one.site}: {_state(one)}")
            if again:
                one.holder.signal(signal.SIGTERM)
        waiting = still
        if waiting and time.monotonic() - began > patience:
            last = "; ".join(f"{one.site} (pid {one.pid}): {_state(one)}" for _, one in waiting)
            raise DeadlinePassed(
                f"still running after {patience:g} s: {last}: wait longer, or stop it at once with "
                "splitpeer drain --now, or, if that has no effect, with kill -KILL"
            )
    return failed


def _state(one: Seen) -> str:
    """What it does, without figures that change all the time."""
    if one.state == "silent":
        return "does not answer"
    doing = ", ".join(part for part in (one.phase or "starting", one.step) if part)
    waits = "; ".join(" ".join(filter(None, (str(w["who"] or ""), str(w["what"])))) for w in one.waits)
    return f"{doing}; waits for {waits}" if waits else doing


def _end(one: Seen) -> str:
    if one.runs:
        return "stopped; another one runs"
    if one.state == "died":
        return f"stopped at once while {one.phase}"
    return f"stopped at {one.step}" if one.step else "stopped"
