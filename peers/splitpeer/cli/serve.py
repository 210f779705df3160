"""`splitpeer serve`: run this peer until its job is done or it is asked to stop."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import click

from splitpeer import logs
from splitpeer.cli import early
from splitpeer.cli.loading import load
from splitpeer.cli.options import (
    FILE,
    config_option,
    echo_json,
    json_option,
    load_peer,
    private_files,
    set_option,
)
from splitpeer.cli.terminal import echo
from splitpeer.daemon.duty import Duty
from splitpeer.errors import ConfigError
from splitpeer.logs import event
from splitpeer.preflight import notices
from splitpeer.ranks.torchrun import Rank, own_rank
from splitpeer.settings.job import JobConfig
from splitpeer.settings.peer import PeerConfig
from splitpeer.storage import descriptors
from splitproto.allocator import keep_freed_memory

if TYPE_CHECKING:
    from splitpeer.ranks.group import Ranks

FORCED = 130
log = logging.getLogger(__name__)


@click.command()
@click.option("--role", type=click.Choice(("client", "coordinator")), help="Must be what peer.toml says.")
@click.option(
    "--modality",
    "modalities",
    multiple=True,
    help="Must be what peer.toml says; once for each (clients).",
)
@click.option("--job", "job_file", type=FILE, help="job.toml (coordinators).")
@click.option(
    "--resume/--fresh",
    default=None,
    help="Continue the last run of this job, or start a new one (coordinators). Without either: continue if the last "
    "run is not complete.",
)
@click.option(
    "--readmit",
    multiple=True,
    metavar="SITE",
    help="Let SITE join the run again even though it lost its state folder (coordinators).",
)
@click.option("--device", help='Overrides [runtime] device: "cpu", "cuda", "cuda:0" or "auto".')
@click.option(
    "--curious",
    type=FILE,
    metavar="FILE",
    help="Record what this peer sends and receives, for an audit; [capture] says how. The others are told.",
)
@click.option(
    "--verify",
    is_flag=True,
    help="Read every image or mask in full before starting, not only its header.",
)
@click.option(
    "--curious-key", type=FILE, metavar="KEY", help="Encrypt the capture with the 32 bytes in the file KEY."
)
@config_option
@set_option
@json_option
def serve(
    role: str | None,
    modalities: tuple[str, ...],
    job_file: Path | None,
    resume: bool | None,
    readmit: tuple[str, ...],
    device: str | None,
    curious: Path | None,
    curious_key: Path | None,
    verify: bool,
    config_file: Path | None,
    settings: tuple[str, ...],
    as_json: bool,
) -> None:
    """Run this peer: a hospital's client, or the coordinator of a job.

    Ctrl-C (or SIGTERM) finishes the step under way and writes a checkpoint; a second one stops at once.
    """
    # Checkpoints, masks and logs of a hospital are for its own user only.
    private_files()
    overrides = {"runtime.device": device, "capture.key": curious_key and str(curious_key)}
    if curious_key is not None and curious is None:
        raise ConfigError("--curious-key is for a capture: add --curious FILE")
    config = load_peer(config_file, settings, overrides)
    _same("role", role, config.peer.role, config)
    if modalities:
        from splitpeer.data.modalities import canonical_modality

        given = sorted(map(canonical_modality, modalities))
        _same("modality", ", ".join(given), ", ".join(sorted(config.peer.modalities)) or None, config)
    logs.setup(config.log.format, config.log.level)
    job = _job(config, job_file, resume, readmit)
    rank = _own_rank(job)
    # Its home folder need not be writable; matplotlib reads this when it is imported.
    os.environ.setdefault("MPLCONFIGDIR", str(config.peer.state.absolute() / "matplotlib"))
    keep_freed_memory()
    if rank is not None and job is not None and not rank.leads:
        _follow(rank, config, job)
        return
    # The folder is taken and a line shown before torch is imported: that takes seconds on a slow machine.
    with early.signals(), Duty(config).held() as duty:
        event(log, "peer.starting", role=config.peer.role, site=config.peer.site, pid=os.getpid())
        for found in notices(config):
            event(log, "peer.notice", logging.WARNING, about=found.check, text=found.text)
        # Before the event loop runs: in it, a signal would have to wait until the import is over.
        if job is None:
            load("splitpeer.site.client")
            asyncio.run(_client(config, duty, curious, verify))
            return
        load("splitpeer.coordinator.coordinator", "splitpeer.daemon.console")
        with _others(rank, config, job) as group:
            result = asyncio.run(_coordinator(config, job, duty, resume, curious, verify, readmit, group))
    if as_json:
        echo_json(result)


def _job(
    config: PeerConfig, job_file: Path | None, resume: bool | None, readmit: tuple[str, ...]
) -> JobConfig | None:
    """The coordinator's; a client has none."""
    if config.peer.role == "client":
        if job_file is not None or resume is not None or readmit:
            raise ConfigError(
                "--job, --resume, --fresh and --readmit are for the coordinator, from which a client gets its job"
            )
        return None
    if job_file is None:
        raise ConfigError("a coordinator needs its job: add --job job.toml")
    return JobConfig.load(job_file)


def _own_rank(job: JobConfig | None) -> Rank | None:
    """This process's among those that torchrun started."""
    rank = own_rank()
    if rank is not None:
        if job is None:
            raise ConfigError(
                "WORLD_SIZE is set, but only a coordinator runs on several ranks: start the site without torchrun, "
                "or unset WORLD_SIZE"
            )
        rank.quieten()
    return rank


def _same(name: str, given: str | None, configured: str | None, config: PeerConfig) -> None:
    if given is not None and given != configured:
        raise ConfigError(
            f"--{name} {given}, but {config.source} says {configured}: use the peer.toml of that {name}"
        )


def _stop_on_signals(before_leaving: Callable[[], None] = lambda: None) -> asyncio.Event:
    """First signal: leave in good order. Second: leave now."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()

    def asked() -> None:
        if stop.is_set():
            before_leaving()
            echo("splitpeer: stopped at once", err=True)
            logging.shutdown()
            # Not SystemExit: the interpreter would wait for the thread that computes.
            os._exit(FORCED)
        stop.set()

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        # Under nohup a closed terminal is ignored.
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            loop.add_signal_handler(number, asked)
    return stop


def _others(rank: Rank | None, config: PeerConfig, job: JobConfig) -> AbstractContextManager[Ranks | None]:
    """The ranks that this process leads, once all have met."""
    if rank is None:
        return nullcontext()
    from splitpeer.coordinator.ranks import met

    return met(rank, config, job)


def _follow(rank: Rank, config: PeerConfig, job: JobConfig) -> None:
    """Another rank than the first: no port, no state folder, no results; it ends when rank 0 does."""

    async def until_told(group: Ranks) -> None:
        # torchrun passes signals on to every rank: the first one is for rank 0 to act on.
        _stop_on_signals()
        await follow(group, config, job)

    with early.signals():
        load("splitpeer.coordinator.ranks")
        from splitpeer.coordinator.ranks import follow, met

        with met(rank, config, job) as group:
            asyncio.run(until_told(group))


async def _client(config: PeerConfig, duty: Duty, curious: Path | None, verify: bool) -> None:
    from splitpeer.site.client import Client

    # In a thread: a folder on a network drive that hangs must not keep this from handling signals.
    stop = _stop_on_signals()
    client = await asyncio.to_thread(Client, config, stop, duty=duty, curious=curious, verify=verify)
    await client.run()


async def _coordinator(
    config: PeerConfig,
    job: JobConfig,
    duty: Duty,
    resume: bool | None,
    curious: Path | None,
    verify: bool,
    readmit: tuple[str, ...],
    group: Ranks | None,
) -> dict[str, object]:
    from dataclasses import asdict

    from splitpeer.coordinator.coordinator import Coordinator
    from splitpeer.daemon.console import dice_line, make_view

    # A stranger's connections must not use up the files that the job needs.
    descriptors.raise_limit()
    view = make_view()
    try:
        stop = _stop_on_signals(view.close)
        coordinator = await asyncio.to_thread(
            Coordinator,
            config,
            job,
            stop,
            view,
            resume=resume,
            duty=duty,
            curious=curious,
            verify=verify,
            readmit=readmit,
            group=group,
        )
    except BaseException:
        view.close()
        raise
    result = await coordinator.run()
    if result.complete:
        from splitpeer.report.charts import draw_curve

        draw_curve(job.output.folder)
        few = 0 < len(result.made_from) < len(result.seats)
        made_from = f" from {' '.join(result.made_from)} only" if few else ""
        echo(
            f"{result.job}: {result.step} steps, Dice {dice_line(result.dice)}{made_from}; {job.output.folder}",
            err=True,
        )
    else:
        told = f"stopped at step {result.step} of {result.steps}; started again, it resumes there"
        echo(
            f"{result.job}: {told if result.step else 'stopped before the first step'}",
            err=True,
        )
    return asdict(result)
