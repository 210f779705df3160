"""`splitpeer export`: what this party holds of a run as a MONAI bundle, or the whole network where all agree."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from splitpeer.cli.options import (
    FILE,
    echo_json,
    load_peer,
    peer_options,
    private_files,
)
from splitpeer.cli.terminal import echo
from splitpeer.errors import ConfigError

if TYPE_CHECKING:
    from splitpeer.export.half import Half
    from splitpeer.export.onnx_file import Exported
    from splitpeer.settings.peer import PeerConfig


@click.command()
@click.argument("bundles", type=FILE, nargs=-1)
@click.option("--run", metavar="RUN", help="The run: its job's name, or its id's first digits.")
@click.option(
    "--join", is_flag=True, help="Make one bundle of BUNDLES, which all parties of a run agreed to join."
)
@click.option("--out", type=FILE, required=True, help="A new folder.")
@click.option("--job", "job_file", type=FILE, help="job.toml of the run (coordinators).")
@click.option("--step", type=click.IntRange(0), help="Of which checkpoint; default: the newest.")
@click.option("--onnx", is_flag=True, help="ONNX files too.")
@click.option("--agree", is_flag=True, help="Sign that this half may become part of the whole network.")
@click.option(
    "--holder", "holders", multiple=True, metavar="SITE",
    help="With --agree: who may hold the whole; may be given several times, the same at all parties.",
)  # fmt: skip
@click.option("--days", type=click.IntRange(1, 366), default=30, show_default=True, help="Of the agreement.")
@click.option(
    "--use", "chosen", multiple=True, metavar="SEAT=SITE",
    help="With --join: whose encoder, where several sites fill a seat.",
)  # fmt: skip
@peer_options
def export(config_file: Path | None, settings: tuple[str, ...], as_json: bool, **given: Any) -> None:
    """Write what this party holds of RUN as a MONAI bundle that needs no splitproto.

    A site has its encoders, the coordinator fusion and decoder. With --join, BUNDLES that all parties of a run exported
    with --agree become one whole network; this site must be among those that may hold it.

    Anyone who has an encoder can rebuild images from what it sent: a bundle's docs/README.md says what it gives away.
    """
    private_files()
    asked = _ExportAsked(**given)
    asked.check()
    config = load_peer(config_file, settings)
    from splitpeer.export import bundle

    bundle.refuse_existing(asked.out)
    half = asked.joined(config) if asked.join else asked.half(config)
    contents, facts = bundle.content(half)
    models = list["Exported"]()
    if asked.onnx:
        from splitpeer.export.onnx_file import exported

        models = exported(half)
        contents |= {one.name: one.data for one in models}
    if asked.agree:
        contents |= asked.agreement(config, facts)
    _note(config, asked, facts)
    bundle.write(asked.out, contents)
    if as_json:
        echo_json({"folder": str(asked.out), **facts, "onnx": {one.name: one.apart for one in models}})
        return
    _tell(asked, facts, half.missing, models)


@dataclass(frozen=True)
class _ExportAsked:
    """The command line."""

    bundles: tuple[Path, ...]
    run: str | None
    join: bool
    out: Path
    job_file: Path | None
    step: int | None
    onnx: bool
    agree: bool
    holders: tuple[str, ...]
    days: int
    chosen: tuple[str, ...]

    def check(self) -> None:
        """Raises ConfigError: what does not go together."""
        if self.join == (self.run is not None):
            raise ConfigError("name a run with --run, or bundles with --join")
        if self.join and len(self.bundles) < 2:
            raise ConfigError("--join wants the bundles of all parties: name their folders")
        if self.join and (self.agree or self.job_file or self.step is not None):
            raise ConfigError("--join takes --out, --use and --onnx: the bundles say run and step themselves")
        if not self.join and (self.bundles or self.chosen):
            raise ConfigError("bundles and --use are for --join: leave them out, or --run")
        if self.agree != bool(self.holders):
            raise ConfigError(
                "--agree and --holder go together: name each site that may hold the whole network"
            )

    def half(self, config: PeerConfig) -> Half:
        """What this party holds."""
        from splitpeer.export.half import MASKS, half_of
        from splitpeer.settings.job import JobConfig

        if config.peer.role == "client" and self.job_file is not None:
            raise ConfigError("--job is for a coordinator: a site keeps the terms of its runs itself")
        if self.agree:
            from splitpeer.export.agreement import refuse_by_policy

            refuse_by_policy(config)
        job = JobConfig.load(self.job_file) if self.job_file is not None else None
        half = half_of(config, self.run or "", job, self.step)
        if half.facts["kind"] == MASKS and (self.onnx or not self.agree):
            raise ConfigError(
                "this site had the masks of the run, and no part of its network: there is nothing to export but its "
                "word, with --agree and --holder"
            )
        return half

    def joined(self, config: PeerConfig) -> Half:
        """The whole network."""
        from splitpeer.export.join import joined
        from splitproto.errors import IdentityError
        from splitproto.partners import Trust

        chosen = {}
        for one in self.chosen:
            seat, sign, site = one.partition("=")
            if not sign:
                raise ConfigError(f"--use {one}: write SEAT=SITE")
            chosen[seat] = site
        try:
            trust = Trust.of(config.credentials(), config.peer.federation, ())
        except IdentityError as error:
            raise ConfigError(f"{config.source}: [tls]: {error}") from None
        return joined(self.bundles, config.peer.site, trust, datetime.now(UTC), chosen)

    def agreement(self, config: PeerConfig, facts: Mapping[str, Any]) -> dict[str, bytes]:
        """The signed agreement, by its place in the bundle."""
        from splitpeer.export import agreement, bundle

        signed = agreement.sign(config, facts, self.holders, datetime.now(UTC), self.days)
        return {bundle.AGREEMENT: signed}


def _note(config: PeerConfig, asked: _ExportAsked, facts: Mapping[str, Any]) -> None:
    """In the audit trail, before there is a folder to give away."""
    from splitpeer.daemon.trail import Trail

    event = "export.joined" if asked.join else "export.agreed" if asked.agree else "export.written"
    weights = [f"{name} {digest}" for name, digest in facts["weights"].items()]
    Trail(config.peer.state).note(
        event, time.time(), run=facts["run"], job=facts["job"], step=facts["step"], weights=weights,
        holders=sorted(set(asked.holders)) or facts.get("holders"), days=asked.days if asked.agree else None,
    )  # fmt: skip


def _tell(
    asked: _ExportAsked, facts: Mapping[str, Any], missing: Sequence[str], models: Sequence[Exported]
) -> None:
    from splitpeer.export.configs import TITLES
    from splitpeer.export.papers import given_away
    from splitpeer.results.segmentation import NOT_A_DEVICE

    echo(
        f"{asked.out}: {TITLES[facts['kind']]} of {facts['job']} {facts['run'][:8]}, step {facts['step']} of "
        f"{facts['steps']}"
    )
    for line in missing:
        echo(line)
    for one in models:
        compared = "not compared, onnxruntime is not installed" if one.apart is None else f"{one.apart:.1g}"
        echo(f"{one.name}: largest difference from PyTorch, relative: {compared}")
    if asked.agree:
        echo(
            f"agreed for {asked.days} days that {', '.join(sorted(set(asked.holders)))} may hold the whole network"
        )
    for line in given_away(facts) if asked.agree or asked.join else ():
        echo(line.replace("**", ""))
    echo(f"What it gives away: {asked.out / 'docs' / 'README.md'}. {NOT_A_DEVICE}")
