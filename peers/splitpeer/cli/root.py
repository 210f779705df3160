"""The root command. Subcommands are imported when they are called, so that light ones never wait for torch."""

from __future__ import annotations

import sys

import click

import splitproto
from splitpeer.cli import early
from splitpeer.cli.loading import load
from splitpeer.errors import ConfigError

COMMANDS = {
    # name: (module:attribute, line in --help)
    "init": ("splitpeer.cli.init:init", "Write a commented peer.toml or job.toml."),
    "pki": ("splitpeer.cli.pki:pki", "Manage the federation's certificates."),
    "config": ("splitpeer.cli.config:config", "Check or show settings."),
    "doctor": ("splitpeer.cli.doctor:doctor", "Find what is wrong before a job, and dial the coordinator."),
    "data": ("splitpeer.cli.data:data", "Prepare a site's images from DICOM, check them, or make some."),
    "pretrain": ("splitpeer.cli.pretrain:pretrain", "Train first weights for this site's encoder, here."),
    "serve": ("splitpeer.cli.serve:serve", "Run this peer: a hospital's client, or the coordinator."),
    "segment": ("splitpeer.cli.segment:segment", "Segment patients with the other hospitals."),
    "evaluate": ("splitpeer.cli.evaluate:evaluate", "Compare segmentations with the masks that people drew."),
    "status": ("splitpeer.cli.status:status", "Show what this peer is doing and what it is waiting for."),
    "drain": ("splitpeer.cli.drain:drain", "Stop this peer cleanly."),
    "export": (
        "splitpeer.cli.export:export",
        "Write what this party holds of a run as a MONAI bundle, or join all of it.",
    ),
    "trail": ("splitpeer.cli.trail:trail", "Show and check this peer's audit trail."),
    "trace": ("splitpeer.cli.trace:trace", "Show where the time of a run's steps went, as a timeline."),
    "bank": (
        "splitpeer.cli.bank:bank",
        "List what frozen runs keep of patients at a coordinator, or delete it.",
    ),
    "privacy": (
        "splitpeer.cli.privacy:privacy",
        "Show how much of the privacy budget is spent, and what a study needs.",
    ),
    "defences": ("splitpeer.cli.defences:defences", "List what can be done to tensors before they leave."),
    "audit": ("splitpeer.cli.audit:audit", "Measure what would leak before a byte leaves; compare defences."),
    "replay": ("splitpeer.cli.replay:replay", "Inspect a capture, defend it, or play it to a live peer."),
    "attack": ("splitpeer.cli.attack:attack", "Attack what a peer recorded in a capture."),
    "report": ("splitpeer.cli.report:report", "Write the results of attacks as one HTML page."),
    "demo": ("splitpeer.cli.demo:demo", "Four hospitals and a coordinator on this machine."),
}


class LazyGroup(click.Group):
    """A group whose subcommands are names until one is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        module, _, attribute = COMMANDS[name][0].partition(":")
        try:
            load(module)
            command: click.Command = getattr(sys.modules[module], attribute)
        except ModuleNotFoundError as error:
            missing = str(error.name).partition(".")[0]
            if missing in ("splitpeer", "splitproto"):
                raise
            raise ConfigError(
                f"splitpeer {name} needs the package {missing}: in the clone, pip install '.[peer]' "
                f"(.[demo] for the demonstration)"
            ) from error
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, line) in COMMANDS.items()])


@click.group(
    cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}
)
@click.version_option(splitproto.__version__, prog_name="splitpeer", message="%(prog)s %(version)s")
@click.option("--debug", is_flag=True, help="Show tracebacks.")
def root(debug: bool) -> None:
    """Train one segmentation network with other hospitals; images stay here.

    Exit codes: 0 ok, 1 job failed, 2 connection or authentication, 3 time-out, 4 usage or configuration, 5 a
    bug, 130 interrupted.
    """
    early.over()
