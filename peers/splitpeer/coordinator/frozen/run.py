"""A run with frozen encoders from its first site to its last step: collect, let the sites go, train (SP-11.17)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from splitpeer.coordinator.frozen.collector import Collector
from splitpeer.coordinator.frozen.exclusion import BankExclusion
from splitpeer.coordinator.frozen.features import Features
from splitpeer.coordinator.frozen.questions import contents, terms
from splitpeer.coordinator.frozen.trainer import BankTrainer
from splitpeer.coordinator.run import Run
from splitpeer.coordinator.savepoints import Savepoints
from splitpeer.daemon import happenings as h
from splitpeer.errors import DataError
from splitpeer.federation.batches import TrainingStream
from splitpeer.settings.peer import PeerConfig
from splitpeer.storage.bank import Bank, load_key

FOLDER = "bank"
"""In the run's folder."""
COLLECTED = "all releases are here; the training goes on without the sites"


class FrozenRun:
    """Of one run.

    Args:
        run: the run.
        config: the coordinator's `peer.toml`.

    Raises:
        ConfigError: the bank's key cannot be used.
    """

    def __init__(self, run: Run, config: PeerConfig) -> None:
        self._run, self._cache_mib = run, config.data.cache_mib
        self._key = load_key(config.bank.key) if config.bank.key is not None else b""
        self._exclusion = BankExclusion(run)
        self.savepoints = Savepoints(run, self._exclusion)
        self.collected = False
        """No site is needed any more."""
        self._bank: Bank | None = None

    @property
    def folder(self) -> Path:
        """Of the bank."""
        return self._run.files.checkpoints / FOLDER

    async def open(self, *, resumed: bool) -> None:
        """Look at what an earlier process left; whether sites are needed is known from here on.

        Raises:
            DataError, ConfigError: it cannot be used.
        """
        run = self._run
        bank = (
            await run.on_disk(Bank.open, self.folder, self._key, what="the feature bank") if resumed else None
        )
        if bank is None:
            return
        if (bank.contents.run, bank.contents.terms) != (
            run.files.run, terms(run.job, run.settings.evaluation.overlap),
        ):  # fmt: skip
            raise DataError(
                f"{self.folder}: the feature bank was made on other terms ([evaluation] overlap?): change job.toml "
                "back, or start a new run with --fresh"
            )
        self._bank = bank
        for site in run.team.sites:
            site.weights = bank.contents.weights.get(site.name, b"")
        out = self._exclusion.keys
        self.collected = not await run.on_disk(bank.missing, out, what="the feature bank")

    async def verify(self) -> None:
        """Read all that an earlier process left, so that what is spoilt is known before work depends on it.

        Raises:
            DataError: a release is torn or altered.
        """
        run, bank = self._run, self._bank
        if bank is None:
            return
        run.report(h.PhaseBegan("verifying"))
        missing = {(one.site, one.number) for one in await run.on_disk(bank.missing, what="the feature bank")}
        for one in bank.contents.releases:
            if (one.site, one.number) not in missing and one.key not in self._exclusion.keys:
                await run.on_disk(bank.get, one, what=f"release {one.number} of {one.site}")

    async def begin(self) -> None:
        """A new run: its beginning is a step to go back to. Raises DataError."""
        self.savepoints.ready = True
        await self.savepoints.save_own()

    async def restore(self) -> None:
        """A resumed one: from its newest step on, and without whom it is to do without.

        Raises:
            DataError: no checkpoint is left, or it cannot be read.
        """
        await self.savepoints.restore("the coordinator was restarted")
        self._exclusion.bank = self._bank
        await self._exclusion.heed()

    async def collect(self) -> None:
        """Have the bank complete, unless the run drains. Raises as `Collector.collect`."""
        run = self._run
        if self._bank is None:
            self._bank = await run.on_disk(self._created, what="the feature bank")
        self._exclusion.bank = self._bank
        await Collector(run, self._bank, self._exclusion).collect()
        self.collected = not run.draining

    async def train(self, stream: TrainingStream, validation: Sequence[bytes]) -> None:
        """Raises as `BankTrainer.train`."""
        run = self._run
        if self._bank is None:
            raise RuntimeError("there is no feature bank yet")
        features = Features(run.job, self._bank, run.seating, self._cache_mib)
        await BankTrainer(run, self._exclusion, self.savepoints).train(features, stream, validation)

    def _created(self) -> Bank:
        weights = {site.name: site.weights for site in self._run.team.sites}
        return Bank.create(self.folder, contents(self._run, weights), self._key)
