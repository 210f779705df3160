"""What a run's kind of work is: with sites in every step, or (`frozen/work.py`) from a feature bank."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Protocol

from splitpeer.coordinator.gathering import Gathering
from splitpeer.coordinator.inference.service import Service
from splitpeer.coordinator.run import Run
from splitpeer.coordinator.savepoints import Savepoints
from splitpeer.coordinator.trainer import Trainer
from splitpeer.defences.stack import Stack
from splitpeer.training.split_round import Place

COLLECTED = "all releases are here; the sites are no longer needed"


class RunWork(Protocol):
    """A run from its first site to its last step."""

    savepoints: Savepoints

    @property
    def needs_sites(self) -> bool:
        """Whether a site that dials has something to do."""
        ...

    @property
    def bytes_per_step(self) -> int:
        """Octets on the wire, all sites, per training step made by this process."""
        ...

    async def open(self, *, resumed: bool) -> None:
        """Look at what an earlier process left, before any site can dial.

        Raises:
            DataError, ConfigError: it cannot be used.
        """
        ...

    async def do(self, held: Collection[int], *, resumed: bool) -> None:
        """Go on until the last step is committed and scored, or the run is draining.

        Args:
            held: steps of the coordinator's own checkpoints.

        Raises:
            JobFailed, DeadlinePassed, DataError, ConfigError, DiskTrouble: the run cannot continue.
        """
        ...


class JointWork:
    """Encoders and decoder are trained together: sites are needed to the end.

    Args:
        run: the run.
        gathering: of its sites.
        gradient_stacks: what is done to gradients before they leave for a site's seat.
        service: of inference; None: the job has none.
    """

    needs_sites = True

    def __init__(
        self,
        run: Run,
        gathering: Gathering,
        gradient_stacks: Mapping[Place, Stack],
        service: Service | None = None,
    ) -> None:
        self._run, self._gathering = run, gathering
        self._trainer = Trainer(run, gradient_stacks, service)
        self.savepoints = self._trainer.savepoints

    @property
    def bytes_per_step(self) -> int:
        """See `RunWork`."""
        return self._trainer.bytes_per_step

    async def open(self, *, resumed: bool) -> None:
        """See `RunWork`: there is nothing."""

    async def do(self, held: Collection[int], *, resumed: bool) -> None:
        """See `RunWork`."""
        training, validation = await self._gathering.with_sites()
        self._run.files.insist_on(held)  # now that sites are here, they are told
        stream = self._gathering.batches(training)
        if not resumed:
            await self._trainer.start()
        self._gathering.open(validation, resumed=resumed)
        await self._trainer.train(stream, validation, held if resumed else ())
