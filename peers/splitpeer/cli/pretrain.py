"""`splitpeer pretrain`: first weights for a site's encoder, trained here, without a coordinator."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.progress import Progress, TaskID

from splitpeer import logs
from splitpeer.cli.loading import load
from splitpeer.cli.options import (
    FILE,
    LAYOUT,
    config_option,
    echo_json,
    json_option,
    load_peer,
    private_files,
    set_option,
)
from splitpeer.cli.progress import bar
from splitpeer.cli.terminal import echo
from splitpeer.errors import ConfigError
from splitpeer.settings.job import JobConfig
from splitpeer.settings.peer import PeerConfig

if TYPE_CHECKING:
    from splitpeer.data.task import Task
    from splitpeer.models.cut import Backbone
    from splitpeer.pretraining.course import Planned, Told
    from splitpeer.pretraining.encoder_file import EncoderFacts, EncoderFile, Past
    from splitpeer.pretraining.examples import ImageSource
    from splitpeer.pretraining.sources import Preparation
    from splitpeer.pretraining.stage import Stage

UNLABELLED = "none"


@click.command()
@config_option
@set_option
@click.option("--job", "job_file", type=FILE, required=True, help="The job.toml that the encoder is for.")
@click.option("--seat", help="Which of the job's seats; needed where this site fills several.")
@click.option("--labels", help='"none": learn from images alone; or the folder of their masks.')
@click.option("--images", type=FILE, help="Other people's images; default: this site's own, of peer.toml.")
@click.option("--layout", type=LAYOUT, help="Of --images; default: that of peer.toml.")
@click.option(
    "--convention", type=click.Choice(("msd", "brats", "brats2023", "nnunet", "task")), help="Of the masks."
)
@click.option(
    "--recipe", is_flag=True, help="Follow [pretraining] of the job; --images says where its data are."
)
@click.option(
    "--secret", type=FILE, help="With --recipe: what all hospitals draw from (splitpeer init secret)."
)
@click.option(
    "--for-partners",
    type=FILE,
    metavar="DIR",
    help="With --recipe, encoders trained together: also write each other seat's, for its hospital.",
)
@click.option("--steps", type=click.IntRange(1), help="Default: the job's; with --recipe, the recipe's.")
@click.option("--leave-out", type=FILE, help="File of own patients not to learn from, one id per line.")
@click.option("--out", type=FILE, default=Path("encoder.safetensors"), show_default=True)
@click.option("--force", is_flag=True, help="Replace --out; start over if interrupted before.")
@json_option
def pretrain(as_json: bool, **given: Any) -> None:
    """Train first weights for this site's encoder: for [model] weights of peer.toml.

    Nothing leaves this machine. Interrupted, the same command continues. List the patients
    whom the job will hold out in --leave-out; otherwise its scores are too high.
    """
    private_files()
    asked = _CommandLine(**given)
    if not (asked.recipe or asked.labels):
        raise ConfigError("say what to learn from: --labels none, --labels FOLDER, or --recipe")
    if asked.recipe and (asked.labels or asked.steps):
        raise ConfigError("--recipe says steps and labels itself: leave out --labels and --steps")
    if not asked.recipe and (asked.secret or asked.for_partners):
        raise ConfigError("--secret and --for-partners are for a job's recipe: add --recipe")
    work = _Errand(asked)
    partners = work.partners()
    from splitpeer.pretraining.course import pretrain as run

    with ExitStack() as stack:
        show = _Bars(stack.enter_context)
        planned = work.planned(show)
        work.refuse_what_no_run_takes(planned)
        for objection in work.objections():
            echo(f"splitpeer: this site would decline the job as it is: {objection}", err=True)
        made = run(
            planned, work.backbone, work.described, asked.out,
            force=asked.force, partners=partners, told=show.told(),
        )  # fmt: skip
    if as_json:
        echo_json({"file": str(made.path), "digest": made.digest, **asdict(made.described)})
        return
    for line in _summary(made):
        echo(line)
    echo(f'In peer.toml: [model] weights = "{made.path.name}"')
    for path, (seat, _) in partners.items():
        echo(f"{path}: for {' and '.join(work.job.fillers(seat))}, and for nobody else; then delete it here")


@dataclass(frozen=True)
class _CommandLine:
    """What was asked."""

    config_file: Path | None
    settings: tuple[str, ...]
    job_file: Path
    seat: str | None
    labels: str | None
    images: Path | None
    layout: str | None
    convention: str | None
    recipe: bool
    secret: Path | None
    for_partners: Path | None
    steps: int | None
    leave_out: Path | None
    out: Path
    force: bool


class _Errand:
    """What the files and the command line come to. Raises ConfigError, PolicyRefused."""

    def __init__(self, asked: _CommandLine) -> None:
        load("torch")
        import torch

        from splitpeer.federation.compute import pick_device
        from splitpeer.pretraining.sources import Preparation

        self.asked, self.job = asked, JobConfig.load(asked.job_file)
        self.config = load_peer(asked.config_file, asked.settings)
        logs.setup(self.config.log.format, self.config.log.level)
        self.seat, self.modalities = _seat(self.job, self.config, asked.seat)
        self.backbone = _backbone(self.job, self.config, self.seat, self.modalities)
        self.described = self._facts(self.modalities)
        self.grid: Preparation = Preparation(
            self.job.data.spacing or (),
            self.job.task.rule,
            self.config.data.rules(),
            self.config.data.cache_mib,
        )
        self.device = pick_device(self.config.runtime.device)
        torch.set_num_threads(self.config.runtime.threads)

    def planned(self, show: _Bars) -> list[Planned]:
        """The stages."""
        from splitpeer.federation.terms import job_on_wire
        from splitpeer.pretraining import secret
        from splitpeer.pretraining.plan import EncoderPlan, GivenImages

        asked, seed = self.asked, self.config.runtime.initial_weights
        plan = EncoderPlan(
            self.job,
            self.seat,
            self.modalities,
            self.grid,
            self._own,
            None if seed == "private" else int(seed),
            self.device,
            job_on_wire(self.job).fusion,
            secret.read(asked.secret) if asked.secret is not None else None,
        )
        others = GivenImages(asked.images, self._layout, asked.convention)
        if asked.recipe:
            self._warn_of_another_network()
            return plan.by_recipe(others, asked.out, show.rendered)
        labels = Path(asked.labels) if asked.labels and asked.labels != UNLABELLED else None
        return plan.by_labels(others, labels, asked.steps or self.job.training.steps)

    def refuse_what_no_run_takes(self, planned: Sequence[Planned]) -> None:
        """Before any step. Raises ConfigError: this site's policy would refuse the weights."""
        from splitpeer.pretraining.encoder_file import OWN
        from splitpeer.site.first_weights import WeightsOrigin, refuse_against
        from splitproto.records import Seat

        first, last = planned[0].stage, planned[-1].stage
        narrow = last.bottleneck
        origin = WeightsOrigin(
            "",
            narrow.noise if narrow is not None else 0.0,
            narrow.rate if narrow is not None else 0.0,
            any(one.stage.data == OWN for one in planned),
            first.seed is not None and first.secret is None,
        )
        where = f"{self.job.source}: [pretraining]" if self.asked.recipe else "--labels"
        refuse_against(self.config, Seat(self.seat, self.modalities), origin, where)

    def objections(self) -> list[str]:
        """For which this site would decline the job."""
        from splitpeer.site.invitation import objections

        return objections(self.job, self.config, weights=False) if self.config.policy is not None else []

    def partners(self) -> dict[Path, tuple[str, EncoderFacts]]:
        """By the file to make, the seats of the job but this one. Raises ConfigError: they are not trained here."""
        folder, recipe = self.asked.for_partners, self.job.pretraining
        if folder is None or recipe is None:
            return {}
        if recipe.encoders != "together":
            raise ConfigError(
                f'{self.job.source}: [pretraining] trains one encoder: --for-partners wants encoders = "together"'
            )
        seats = self.job.channels()
        return {
            folder / f"{seat}.safetensors": (seat, self._facts(held))
            for seat, held in seats.items()
            if seat != self.seat
        }

    def _facts(self, modalities: Sequence[str]) -> EncoderFacts:
        from splitpeer.pretraining.encoder_file import EncoderFacts

        rules, data = [str(self.job.task.rule(modality)) for modality in modalities], self.job.data
        return EncoderFacts.of(self.backbone, modalities, rules, data.spacing or (), data.window)

    def _warn_of_another_network(self) -> None:
        asked, recipe = self.asked, self.job.pretraining
        common = asked.secret is not None or asked.for_partners is not None
        if recipe is not None and recipe.encoders == "together" and recipe.seed is None and not common:
            echo(
                "splitpeer: from private entropy every site trains a network of its own, and their encoders were never "
                "trained for one sum: use --secret, or --for-partners at one site",
                err=True,
            )

    @property
    def _layout(self) -> str:
        return self.asked.layout or self.config.data.layout

    def _own(self, labels: Path | None, task: Task | None) -> ImageSource:
        """This site's images, without patients who have withdrawn consent."""
        from splitpeer.data.channels import Channels
        from splitpeer.data.pseudonym import load_salt
        from splitpeer.federation.images import find_cases, open_consent, open_volumes
        from splitpeer.pretraining.examples import ImageSource
        from splitpeer.pretraining.sources import left_out, open_masks

        config = self.config
        found = find_cases(config)
        consent = open_consent(config, found)
        asked = {modality: found[modality] for modality in self.modalities}
        volumes = open_volumes(config, asked, self.grid.spacing, self.grid.rule)
        salt = load_salt(config.data.salt) if config.data.salt else b""
        without = left_out(self.asked.leave_out, salt, list(volumes.values()))
        masks = None if labels is None else open_masks(labels, self._layout, salt, self.grid, task)
        return ImageSource(
            Channels(volumes, {self.seat: self.modalities}), masks, lambda: consent.withdrawn() | without
        )


class _Bars:
    """Bars on a terminal; the log has a line for each checkpoint."""

    def __init__(self, enter: Callable[[AbstractContextManager[Progress]], Progress]) -> None:
        self._enter = enter
        self._bars: dict[str, tuple[Progress, TaskID]] = {}
        self._number = 0

    def told(self) -> Told:
        """For `course.pretrain`."""
        from splitpeer.pretraining.course import Told

        def begins(number: int, stage: Stage) -> None:
            self._number = number + 1
            what = "with masks" if stage.labels else "images alone"
            Console(stderr=True).print(f"stage {self._number}: {stage.data}, {what}, {stage.steps} steps")

        return Told(begins, self.reads, self.steps)

    def rendered(self, done: int, total: int) -> None:
        """A phantom's patients."""
        self._show("phantom", done, total)

    def reads(self, done: int, total: int) -> None:
        """Patients read."""
        self._show("reading", done, total)

    def steps(self, done: int, total: int, loss: float) -> None:
        """Steps made."""
        self._show(f"stage {self._number}", done, total, f"loss {loss:.4g}")

    def _show(self, what: str, done: int, total: int, more: str = "") -> None:
        if what not in self._bars:
            for shown, _ in self._bars.values():
                shown.stop()
            progress = self._enter(bar(f"{what} {{task.description}}"))
            self._bars[what] = progress, progress.add_task("", total=total)
        progress, task = self._bars[what]
        progress.update(task, completed=done, total=total, description=more)


def _seat(job: JobConfig, config: PeerConfig, asked: str | None) -> tuple[str, tuple[str, ...]]:
    """The seat, and its modalities. Raises ConfigError."""
    site = config.peer.site
    if site not in job.sites:
        raise ConfigError(
            f"{job.source}: [sites] does not name {site}: ask the coordinator for the right job.toml"
        )
    fills = job.filled_by(site)
    if asked is None and len(fills) == 1:
        asked = fills[0]
    if asked not in fills:
        raise ConfigError(f"{site} fills {', '.join(fills)} of this job: add --seat with one of them")
    held = job.channels()[asked]
    if lacking := [modality for modality in held if modality not in config.peer.modalities]:
        raise ConfigError(
            f"{config.source}: [peer] modality lacks {', '.join(lacking)}, which seat {asked} shows"
        )
    return asked, held


def _backbone(job: JobConfig, config: PeerConfig, seat: str, modalities: tuple[str, ...]) -> Backbone:
    """The network, within the policy. Raises ConfigError, PolicyRefused."""
    from splitpeer.federation.terms import backbone_for, check_bounds, job_on_wire
    from splitpeer.settings.bounds import Bounds
    from splitproto.records import Seat

    wire = job_on_wire(job)
    try:
        backbone = backbone_for(wire, config)
    except ValueError as error:
        raise ConfigError(f"{config.source}: [model]: {error}") from None
    check_bounds(wire, backbone, (Seat(seat, modalities),), config.policy or Bounds(), 0)
    return backbone


def _network(past: Past) -> str:
    return f", one of {past.encoders} encoders of network {past.network}" if past.network else ""


def _origin(past: Past) -> str:
    if past.secret is not None:
        return f"from the hospitals' secret {past.secret}"
    return "private entropy" if past.seed is None else f"seed {past.seed}"


def _summary(made: EncoderFile) -> list[str]:
    """What was made, for a person."""
    described = made.described
    lines = [f"{made.path}: {described.network} for {', '.join(described.modalities)}, sha256 {made.digest}"]
    for number, past in enumerate(described.stages):
        lines.append(
            f"stage {number + 1}: {past.data}, labels {past.labels}, {past.patients} patients, {past.steps} steps of "
            f"{past.batch}{_network(past)}, loss {past.loss[0]:.4g} to {past.loss[1]:.4g}, {_origin(past)}"
        )
    return lines
