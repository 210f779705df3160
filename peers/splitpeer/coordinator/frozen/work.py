"""A run with frozen encoders from its first site to its last step: collect, let the sites go, train (SP-11.17)."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection
from pathlib import Path

from splitpeer.coordinator.frozen.collector import Collector
from splitpeer.coordinator.frozen.exclusion import BankExclusion
from splitpeer.coordinator.frozen.features import Features
from splitpeer.coordinator.frozen.inference import BankSegmenter
from splitpeer.coordinator.frozen.questions import check_windows, contents, lists_of, terms
from splitpeer.coordinator.frozen.room import RequestRoom
from splitpeer.coordinator.frozen.trainer import BankTrainer
from splitpeer.coordinator.gathering import Gathering
from splitpeer.coordinator.remote_site import RemoteSite
from splitpeer.coordinator.run import Run
from splitpeer.coordinator.savepoints import Savepoints
from splitpeer.coordinator.settling import Settling
from splitpeer.coordinator.work import COLLECTED
from splitpeer.daemon import happenings as h
from splitpeer.data.task import Task
from splitpeer.errors import ConfigError, DataError
from splitpeer.settings.peer import PeerConfig
from splitpeer.storage.bank import FOLDER, Bank, load_key
from splitpeer.storage.request_banks import RequestBanks


class FrozenWork:
    """The work of one run; see `RunWork`.

    Args:
        run: the run.
        gathering: of its sites.
        config: the coordinator's `peer.toml`.
        stays: sites stay when all is collected, for inference.

    Raises:
        ConfigError: the bank's key cannot be used.
    """

    bytes_per_step = 0

    def __init__(self, run: Run, gathering: Gathering, config: PeerConfig, *, stays: bool = False) -> None:
        self._run, self._gathering, self._cache_mib = run, gathering, config.data.cache_mib
        self._key = load_key(config.bank.key) if config.bank.key is not None else b""
        self._exclusion = BankExclusion(run)
        self.savepoints = Savepoints(run, self._exclusion)
        self.needs_sites = True
        """Until all releases are here."""
        self._bank: Bank | None = None
        self._collecting = True
        self._stays = stays
        self._settling: Settling | None = None
        self._earlier = run.settings.training.bank
        """Of an earlier run, which is trained from where it lies."""

    def segmenter(
        self, run: Run, task: Task, reachable: Callable[[RemoteSite], Awaitable[str]]
    ) -> BankSegmenter:
        """What segments from the run's bank; see `BankSegmenter`."""
        made = BankSegmenter(run, task, reachable, bank=lambda: self._bank, key=self._key)
        self._settling = made.settling
        return made

    @property
    def folder(self) -> Path:
        """Where the bank is."""
        return self._earlier or self._run.files.checkpoints / FOLDER

    async def open(self, *, resumed: bool) -> None:
        """See `RunWork`."""
        run, earlier = self._run, self._earlier is not None
        if not self._stays:
            await RequestRoom(run, RequestBanks(run.files.checkpoints), run.report).clear_all()
        if not (resumed or earlier):
            return
        bank = await run.on_disk(Bank.open, self.folder, self._key, what="the feature bank")
        if bank is None:
            if earlier:
                raise ConfigError(f"{self.folder}: no feature bank is there ([training] bank)")
            return
        if bank.contents.terms != terms(run) or not (earlier or bank.contents.run == run.files.run):
            raise DataError(f"{self.folder}: the feature bank was made on other terms {self._other_terms}")
        self._bank = bank
        for site in run.team.sites:
            site.weights = bank.contents.weights.get(site.name, b"")
        out = self._exclusion.keys
        missing = await run.on_disk(bank.missing, out, what="the feature bank")
        if missing and earlier:
            raise DataError(
                f"{self.folder}: the feature bank is not complete, {len(missing)} releases are missing: let its "
                "own run finish collecting"
            )
        self._collecting = bool(missing)
        self.needs_sites = self._collecting or self._stays

    @property
    def _other_terms(self) -> str:
        """Which these may be, and what to do."""
        if self._earlier is None:
            return "([evaluation] overlap?): change job.toml back, or start a new run with --fresh"
        return (
            "([sites], [seats], [model], [data] window or spacing, [training] precision, [wire], [task] normalisation "
            "or [evaluation] overlap): write all of these as in the job.toml of its run"
        )

    async def do(self, held: Collection[int], *, resumed: bool) -> None:
        """See `RunWork`."""
        self._run.files.insist_on(held)
        await self._verify()
        gathering, needed = self._gathering, self._collecting
        lists = lists_of(self._run, self._bank) if self._earlier and self._bank is not None else None
        training, validation = await (gathering.with_sites() if needed else gathering.without_sites(lists))
        if self._bank is not None:
            await self._run.on_disk(check_windows, self._run, self._bank, what="the masks' headers")
        if not resumed:
            # Its beginning is a step to go back to.
            self.savepoints.ready = True
            await self.savepoints.save_own()
        gathering.open(validation, resumed=resumed)
        if self._earlier:
            # No site has heard of this run, and none needs to.
            self._run.files.record.note_told([site.name for site in self._run.team.sites])
        if resumed:
            await self._restore()
        if needed:
            await self._collect()
        if not self._collecting and self._bank is not None:
            features = Features(self._run.job, self._bank, self._run.seating, self._cache_mib)
            trainer = BankTrainer(self._run, self._exclusion, self.savepoints)
            await trainer.train(features, gathering.batches(training), validation)

    async def _verify(self) -> None:
        """Read all that an earlier process left, so that what is spoilt is known before work depends on it."""
        run, bank = self._run, self._bank
        if bank is None:
            return
        run.report(h.PhaseBegan("verifying"))
        out = {*self._exclusion.keys, *bank.dropped}
        missing = {(one.site, one.number) for one in await run.on_disk(bank.missing, what="the feature bank")}
        for one in bank.contents.releases:
            if (one.site, one.number) not in missing and one.key not in out:
                await run.on_disk(bank.get, one, what=f"release {one.number} of {one.site}")

    async def _restore(self) -> None:
        """Continue from the newest step, and without whom it is to do without."""
        await self.savepoints.restore("the coordinator was restarted")
        self._exclusion.bank = self._bank
        await self._exclusion.heed()

    async def _collect(self) -> None:
        """Have the bank complete, unless the run drains, and let the sites go."""
        run = self._run
        if self._bank is None:
            self._bank = await run.on_disk(self._created, what="the feature bank")
        self._exclusion.bank = self._bank
        await Collector(run, self._bank, self._exclusion).collect()
        if run.draining:
            return
        self._collecting = False
        run.result.released_bytes = run.octets()
        if self._settling is not None:
            # SP-11.18-16: not when the training ends, which may be long after.
            await self._settling.trained()
        if self._stays:
            return
        self.needs_sites = False
        here = [site for site in run.team.sites if site.here]
        told = await asyncio.gather(*(site.dismiss(COLLECTED) for site in here))
        run.files.record.note_told([site.name for site, heard in zip(here, told, strict=True) if heard])

    def _created(self) -> Bank:
        weights = {site.name: site.weights for site in self._run.team.sites}
        return Bank.create(self.folder, contents(self._run, weights), self._key)
