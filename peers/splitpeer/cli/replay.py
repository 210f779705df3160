"""`splitpeer replay`: look into a capture, verify it, defend it afterwards, or drive a live peer with it again."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.table import Table

from splitpeer.cli.options import FILE, echo_json, first_modality, json_option, private_files
from splitpeer.cli.terminal import echo
from splitpeer.errors import ConfigError, DataError
from splitpeer.models.registry import backbone_of
from splitpeer.training.forms import in_words
from splitproto.records import Seat

if TYPE_CHECKING:
    from splitpeer.captures.reader import Capture, Verdict
    from splitpeer.captures.summary import Summary


@click.command()
@click.argument("capture_file", metavar="CAPTURE", type=FILE)
@click.option("--key", "key_file", type=FILE, help="Key of an encrypted capture.")
@click.option("--out", type=FILE, help="Write the capture again, defended by --defence.")
@click.option(
    "--defence",
    metavar="TEXT",
    help='Such as "dropout:0.5+gaussian:1.0"; see splitpeer defences. To the bit what a live site with the same '
    "defence key and weights would have sent.",
)
@click.option("--defence-key", type=FILE, help="The site's defence.key (in [peer] state); for one site only.")
@click.option(
    "--seed", type=click.IntRange(0), help="Seed of a demonstration: [runtime] initial_weights of the sites."
)
@click.option("--site", "sites", multiple=True, help="Defend only what this site sent; may be repeated.")
@click.option(
    "--drive",
    type=click.Choice(("coordinator", "client")),
    help="Play the capture to this live peer, over TLS on this machine, and compare; exit code 1: it differs.",
)
@click.option(
    "--config",
    "config_file",
    type=FILE,
    help="The peer's peer.toml, to drive it; with --defence for a site of several seats.",
)
@click.option("--job", "job_file", type=FILE, help="The live coordinator's job.toml.")
@json_option
@click.pass_context
def replay(
    ctx: click.Context,
    capture_file: Path,
    key_file: Path | None,
    out: Path | None,
    defence: str | None,
    defence_key: Path | None,
    seed: int | None,
    sites: tuple[str, ...],
    drive: str | None,
    config_file: Path | None,
    job_file: Path | None,
    as_json: bool,
) -> None:
    """Look into CAPTURE and verify it. With --defence and --out: defend it. With --drive: play it to a live peer."""
    private_files()
    from splitpeer.captures.reader import open_capture
    from splitpeer.captures.recorder import read_key

    _check(out, defence, drive, config_file, job_file)
    capture = open_capture(capture_file, read_key(key_file) if key_file is not None else None)
    if drive is not None and config_file is not None:
        ctx.exit(_drive(capture, drive, config_file, job_file, as_json))
    elif out is not None and defence is not None:
        _defend(capture, defence, out, defence_key, seed, sites, key_file, config_file, as_json)
    else:
        ctx.exit(_inspect(capture, as_json))


def _check(
    out: Path | None, defence: str | None, drive: str | None, config: Path | None, job: Path | None
) -> None:
    if (out is None) != (defence is None):
        raise ConfigError('a defended capture needs both: --defence "dropout:0.5" --out defended.cap')
    if drive is not None and out is not None:
        raise ConfigError("--drive and --defence are two things: defend into a file first")
    if drive is not None and config is None:
        raise ConfigError(f"--drive {drive} needs the peer's settings: add --config peer.toml")
    if drive == "coordinator" and job is None:
        raise ConfigError("--drive coordinator needs the job that was recorded: add --job job.toml")


# --- inspect -----------------------------------------------------------------------------------------------


def _inspect(capture: Capture, as_json: bool) -> int:
    from splitpeer.captures.summary import Summary, cut_off, summarise

    verdict = capture.verify()
    # Without the key, or where it was tampered with, only the header can be shown.
    readable = verdict.ended is not None and (verdict.whole or cut_off(capture))
    summary = summarise(capture) if readable else Summary()
    if as_json:
        echo_json(_plain(summary.as_json(capture, verdict)))
    else:
        _show(capture, summary, verdict)
    if verdict.ended is None and verdict.whole:
        raise DataError(f"{capture.parts[0].path}: encrypted: its messages need --key KEY")
    if not verdict.whole:
        raise DataError(f"{capture.parts[0].path}: {verdict.problem}")
    return 0


def _show(capture: Capture, summary: Summary, verdict: Verdict) -> None:
    header, console = capture.header, Console(soft_wrap=True)
    about = Table(show_header=False, box=None, pad_edge=False)
    for name, value in (
        ("recorded by", f"{header.role} {header.site}" + (f" ({_filled(header.seats)})" if header.seats else "")),
        ("federation", header.federation),
        ("begun", time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(header.created))),
        ("lasted", _lasted(summary)),
        ("job", _job(capture)),
        ("run", header.run.hex() if header.run else "none"),
        ("defends what it sends by", _said(header.defences)),
        *(
            (
                f"peer {p.site}",
                f"{_filled(p.seats) or 'coordinator'}; records: {_yes(p.recorded)}; does {_said(p.defences)}",
            )
            for p in header.peers
        ),
        ("kept", _kept(capture)),
        ("encryption", header.encryption),
        ("files", ", ".join(part.path.name for part in capture.parts)),
        ("training steps", str(summary.steps)),
        ("evaluation batches", str(summary.evaluations)),
        *([("releases of frozen encoders", str(summary.releases))] if summary.releases else []),
        ("patients", f"{summary.patients}" + (f" ({summary.withdrawn} withdrawn)" if summary.withdrawn else "")),
    ):  # fmt: skip
        about.add_row(name, value)
    console.print(about, highlight=False, markup=False)
    flows = Table(title="Messages", title_justify="left")
    for column in ("peer", "", "message", "number", "tensors", "steps"):
        flows.add_column(column, justify="right" if column in ("number", "tensors") else "left")
    for flow in summary.flows:
        steps = "" if flow.first_step is None else f"{flow.first_step}-{flow.last_step}"
        flows.add_row(flow.peer, {"in": "came from", "out": "sent to"}[flow.direction], flow.kind,
                      str(flow.messages), _size(flow.octets) if flow.octets else "", steps)  # fmt: skip
    levels = Table(title="Tensors of one sample", title_justify="left")
    for column in ("peer", "message", "level", "dtype", "shape", "size", "samples"):
        levels.add_column(column, justify="right" if column in ("size", "samples") else "left")
    for level in summary.levels:
        levels.add_row(level.peer, level.kind, level.name, level.dtype, " x ".join(map(str, level.shape)),
                       _size(level.octets_per_sample), str(level.samples))  # fmt: skip
    for table, rows in ((flows, summary.flows), (levels, summary.levels)):
        if rows:
            console.print(table, highlight=False)
    ended = {
        True: "closed cleanly",
        False: "without an end: a crash, or its end was cut off",
        None: "sealed",
    }
    lost = f"; {verdict.lost} messages are missing in {verdict.gaps} gaps" if verdict.gaps else ""
    state = "whole: every record fits the chain" if verdict.whole else f"NOT WHOLE: {verdict.problem}"
    console.print(f"{state}; {ended[verdict.ended]}{lost}", highlight=False, markup=False)
    console.print(f"last chain {verdict.last_chain.hex()}  (compare: splitpeer trail)", highlight=False)


def _job(capture: Capture) -> str:
    job = capture.header.job
    if job is None:
        return "none"
    levels = ",".join(backbone_of(job).cut.names)
    return (
        f"{job.name}: {job.dimensions}-D, levels {levels}, {in_words(job)}, {job.steps} steps of {job.batch}"
    )


def _filled(seats: Sequence[Seat]) -> str:
    """Such as "t1", or "mri (t2, flair)" of a seat with several channels."""
    return "; ".join(
        seat.name if seat.modalities == (seat.name,) else f"{seat.name} ({', '.join(seat.modalities)})"
        for seat in seats
    )


def _lasted(summary: Summary) -> str:
    if summary.first is None or summary.last is None:
        return ""
    return f"{summary.last - summary.first:.1f} s"


def _kept(capture: Capture) -> str:
    sampling = capture.header.sampling
    every = "all steps" if sampling.every == 1 else f"every {sampling.every}th step"
    return every + (f", batches with patients {', '.join(sampling.keys)}" if sampling.keys else "")


def _said(defences: tuple[str, ...]) -> str:
    return " + ".join(defences) or "nothing"


def _yes(said: bool | None) -> str:
    return {True: "yes", False: "no", None: "not said"}[said]


def _size(octets: int) -> str:
    for unit in ("B", "KiB", "MiB"):
        if octets < 1024:
            return f"{octets:.0f} {unit}" if unit == "B" else f"{octets:.1f} {unit}"
        octets /= 1024  # type: ignore[assignment]
    return f"{octets:.1f} GiB"


def _plain(value: Any) -> Any:
    """What JSON can hold: octets in hexadecimal, infinity as text."""
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, float) and value in (float("inf"), float("-inf")) else value


# --- defend, drive -----------------------------------------------------------------------------------------


def _defend(
    capture: Capture,
    defence: str,
    out: Path,
    defence_key: Path | None,
    seed: int | None,
    sites: tuple[str, ...],
    key_file: Path | None,
    config_file: Path | None,
    as_json: bool,
) -> None:
    import secrets

    from splitpeer.captures.recorder import read_key
    from splitpeer.captures.redefend import write_defended
    from splitpeer.defences.key import from_seed
    from splitpeer.defences.offline import offline_defences

    if (defence_key is None) == (seed is None):
        raise ConfigError(
            "a defence draws from a key: give --defence-key FILE, or --seed N for demonstrations"
        )
    secret = read_key(defence_key) if defence_key is not None else secrets.token_bytes(32)
    applied = offline_defences(
        capture.header,
        defence,
        (lambda site: secret) if seed is None else (lambda site: from_seed(seed, site)),
        sites,
        first_modality(config_file),
    )
    done = write_defended(capture, applied, out, key=read_key(key_file) if key_file is not None else None)
    if as_json:
        echo_json({"file": str(done.path), "defences": list(done.defences), "messages": done.messages,
                   "last_chain": done.last_chain.hex(), "repeats_live": done.repeats})  # fmt: skip
        return
    echo(f"{done.path}: {done.messages} messages of activations under {' + '.join(done.defences)}")
    echo("Gradients are those of the recorded run: live, the defence would also change what is learnt.")
    unsure = [site for site, one in applied.items() if not one.certain]
    if unsure:
        echo(f"{', '.join(unsure)}: fills several seats, and a capture does not tell which modality is the first of "
             "its peer.toml: without --config these are not a live site's bytes.")  # fmt: skip
    elif not done.repeats:
        echo("Noise of differential privacy is never the same twice: these are not a live site's bytes.")


def _drive(capture: Capture, role: str, config: Path, job: Path | None, as_json: bool) -> int:
    import asyncio
    import tempfile

    from splitpeer import logs
    from splitpeer.cli.progress import bar
    from splitpeer.replay.redrive import TOLERANCE, drive_client, drive_coordinator

    logs.setup("text", "warning")
    with tempfile.TemporaryDirectory(prefix="splitpeer-replay-") as name, bar("replay") as progress:
        task = progress.add_task("", total=None)

        def told(done: int, of: int) -> None:
            progress.update(task, completed=done, total=of)

        folder = Path(name)
        if role == "coordinator" and job is not None:
            found = asyncio.run(drive_coordinator(capture, config, job, folder, told))
        else:
            found = asyncio.run(drive_client(capture, config, folder, told))
    if as_json:
        echo_json(_plain(found.as_json()))
        return 0 if found.agrees else 1
    echo(f"{found.steps} of {found.of} steps driven, {found.tensors} tensors of {found.what} compared")
    if found.stopped:
        echo(f"stopped at {found.stopped}")
    echo(f"largest difference {found.largest:.3g} of the recorded tensor's largest value"
               + (f" ({found.where}; {found.absolute:.3g})" if found.where else ""))  # fmt: skip
    if found.figures:
        echo(f"{found.figures} losses and Dice compared, largest difference {found.largest_figure:.3g}")
    if not (found.tensors or found.figures):
        echo("nothing could be compared")
    echo("the live peer answers as recorded" if found.agrees else f"IT DIFFERS by more than {TOLERANCE:g}")
    return 0 if found.agrees else 1
