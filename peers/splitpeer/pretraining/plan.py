"""The stages of a site's encoder, as its command line or the recipe of a job asks for them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from splitpeer.data.task import Task
from splitpeer.errors import ConfigError
from splitpeer.models.seeding import site_seed
from splitpeer.pretraining.course import Planned, stage_of
from splitpeer.pretraining.encoder_file import OWN
from splitpeer.pretraining.examples import ImageSource
from splitpeer.pretraining.information import InformationBottleneck
from splitpeer.pretraining.secret import SharedSecret
from splitpeer.pretraining.sources import PHANTOM, Preparation, phantom, public
from splitpeer.pretraining.stage import Stage, Together, same_everywhere
from splitpeer.settings.job import JobConfig, Pretraining
from splitproto.records import Fusion

OTHER = "other"
"""What the file says of images that are neither the site's own nor a recipe's."""
Own = Callable[[Path | None, Task | None], ImageSource]
"""This site's images, with the masks of a folder and what they mean, or without masks."""


@dataclass(frozen=True)
class GivenImages:
    """Images of other people, and what masks mean."""

    images: Path | None
    """None: the site's own are meant."""
    layout: str
    convention: str | None


@dataclass(frozen=True)
class EncoderPlan:
    """Plans the training of one seat's encoder."""

    job: JobConfig
    seat: str
    modalities: tuple[str, ...]
    grid: Preparation
    own: Own
    seed: int | None
    """`[runtime] initial_weights`; None: private entropy."""
    device: str
    terms: Fusion | None = None
    """Of the job's secure sum."""
    secret: SharedSecret | None = None
    """In place of a recipe's seed."""

    def by_labels(self, others: GivenImages, labels: Path | None, steps: int) -> list[Planned]:
        """One stage: the site's own images or others', with the masks of a folder or alone. Raises ConfigError."""
        task = self._task(others.convention) if labels is not None else None

        def source() -> ImageSource:
            if others.images is None:
                return self.own(labels, task)
            return public(others.images, others.layout, self._alone, self.grid, labels, task)

        data = OWN if others.images is None else OTHER
        return [Planned(self._stage(data, task, steps, self._own_seed()), source)]

    def by_recipe(
        self, others: GivenImages, out: Path, rendered: Callable[[int, int], None]
    ) -> list[Planned]:
        """`[pretraining]` of the job: public data first, then own images.

        Args:
            out: the file to be made; the phantom is rendered into a folder next to it.
            rendered: told of the phantom's patients.

        Raises:
            ConfigError: there is no recipe, or its images are not named.
        """
        recipe = self._recipe(others)
        drawn = recipe.data == PHANTOM
        task = self._task("msd" if drawn else others.convention) if recipe.labels == "regions" else None
        together = self._together() if recipe.encoders == "together" else None
        seats = self._alone if together is None else self.job.channels()
        # The same network at every site, or the same encoder at every site of these modalities.
        of = "+".join(self.modalities) if together is None else "together"
        seed = None if recipe.seed is None else site_seed(recipe.seed, of)
        narrow = InformationBottleneck(recipe.noise, recipe.rate) if recipe.noise else None
        stage = replace(self._stage(recipe.data, task, recipe.steps, seed, together), bottleneck=narrow)
        if self.secret is not None:
            drawing = json.dumps(
                [of, recipe.model_dump(mode="json", exclude={"seed"}), same_everywhere(stage)]
            )
            stage = replace(stage, seed=self.secret.entropy(drawing), secret=self.secret.fingerprint)

        def source() -> ImageSource:
            if drawn:
                folder = out.with_name(f"{PHANTOM}-{recipe.patients}-{recipe.cohort}")
                return phantom(folder, recipe.patients, recipe.cohort, seats, self.grid, task, rendered)
            images = others.images or Path()
            return public(images, others.layout, seats, self.grid, images if task else None, task)

        planned = [Planned(stage, source)]
        if recipe.own_steps:
            own = self._stage(OWN, None, recipe.own_steps, self._own_seed())
            planned.append(Planned(own, lambda: self.own(None, None)))
        return planned

    def _recipe(self, others: GivenImages) -> Pretraining:
        recipe = self.job.pretraining
        if recipe is None:
            raise ConfigError(f"{self.job.source}: has no [pretraining] to follow: use --labels instead")
        if recipe.data != PHANTOM and others.images is None:
            raise ConfigError(
                f"[pretraining] data is {recipe.data}: add --images and its folder, and --layout"
            )
        return recipe

    @property
    def _alone(self) -> dict[str, tuple[str, ...]]:
        return {self.seat: self.modalities}

    def _together(self) -> Together:
        """The job's network: of several sites at a seat, the first."""
        first: dict[str, str] = {}
        for site in self.job.sites:
            for seat in self.job.filled_by(site):
                first.setdefault(seat, site)
        held = self.job.channels()
        places = tuple((first[seat], seat, len(modalities)) for seat, modalities in held.items())
        return Together(places, self.seat, self.job.model.decoder_fusion, self.terms)

    def _stage(
        self, data: str, task: Task | None, steps: int, seed: int | None, together: Together | None = None
    ) -> Stage:
        channels = len(self.modalities) if task is None else task.channels
        return stage_of(
            self.job, data, labels=task is not None, steps=steps, seed=seed, channels=channels,
            exclusive=task is not None and task.exclusive, device=self.device, together=together,
        )  # fmt: skip

    def _own_seed(self) -> int | None:
        return None if self.seed is None else site_seed(self.seed, self.seat)

    def _task(self, convention: str | None) -> Task:
        if convention is None and self.job.task.preset is None:
            convention = "task"
        return self.job.task.task(convention)
