"""Releases from the sites into the bank: each site at its own pace, only what is missing, each answer safe at once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

import numpy as np

from splitpeer.coordinator.exclusion import told_apart
from splitpeer.coordinator.frozen.exclusion import BankExclusion
from splitpeer.coordinator.frozen.questions import part_of
from splitpeer.coordinator.remote_site import RemoteSite, Sent, Unable
from splitpeer.coordinator.run import Run
from splitpeer.daemon import happenings as h
from splitpeer.errors import JobFailed
from splitpeer.federation.seating import Part
from splitpeer.storage.bank import FILE_OCTETS, Bank, BankEntry
from splitpeer.training.forms import activations_form
from splitpeer.training.split_round import THE_SUM
from splitproto.messages import Withdraw
from splitproto.tensors import Array


class Collector:
    """Collects the releases of one run.

    Args:
        run: the run; its patients are matched.
        bank: of the run.
        exclusion: of patients whose files turn out to be bad.
    """

    def __init__(self, run: Run, bank: Bank, exclusion: BankExclusion) -> None:
        self._run, self._bank, self._exclusion = run, bank, exclusion
        self._form = activations_form(run.job)
        self._kept = self._octets = self._due = self._due_octets = 0

    async def collect(self) -> None:
        """Ask every site for what is missing, but of nobody who has withdrawn consent.

        Raises:
            JobFailed, DeadlinePassed: a site failed, or did not come back.
            DiskTrouble, ConfigError: the bank cannot be written.
        """
        run, bank = self._run, self._bank
        run.report(h.PhaseBegan("collecting"))
        await self._exclusion.listed()
        missing = await self._count()
        await run.on_disk(bank.check_room, self._exclusion.keys, what="the feature bank")
        run.report(h.BankPlanned(str(bank.folder), self._due, self._due_octets, self._kept, bank.encrypted))
        if run.job.fusion is None:
            queues = {
                s: _Queue(run, s, [one for one in missing if one.site == s.name]) for s in run.team.present
            }
            asked = [site for site, queue in queues.items() if queue.parts]
            await run.team.ask_all(lambda site: self._of_site(site, queues[site]), asked)
        else:
            await self._of_all({site: _Queue(run, site, missing) for site in run.team.present})
        # Those as well whom a site has listed that came back meanwhile.
        await self._exclusion.listed()
        await self._count()
        run.report(h.BankComplete(self._kept, self._octets))

    async def _of_site(self, site: RemoteSite, queue: _Queue) -> None:
        run, place = self._run, 0
        await site.begin(0, self._exclusion.patients, even_restarted=True)
        while await self._more([queue], place) and not run.draining:
            until = min(place + run.settings.training.ahead, len(queue.parts))
            queue.announced = max(queue.announced, until)
            release, answer = queue.releases[place], await site.release(queue.parts, place, until)
            place += 1
            if isinstance(answer, Sent):
                await self._keep(site.name, release, answer.tensors)
            elif isinstance(answer, Withdraw):
                # SP-11.17-7.
                await self._exclusion.drop({site: answer.patients})
                await self._count()

    async def _of_all(self, queues: Mapping[RemoteSite, _Queue]) -> None:
        """SP-11.18: one question after the other to all sites, since only their sum can be read."""
        run, place, first = self._run, 0, next(iter(queues.values()))
        patients = self._exclusion.patients
        await run.team.ask_all(lambda site: site.begin(0, patients, even_restarted=True))
        while await self._more(queues.values(), place) and not run.draining:
            until = min(place + run.settings.training.ahead, len(first.parts))
            for queue in queues.values():
                queue.announced = max(queue.announced, until)
            entry = first.releases[place]
            arrived, unusable = told_apart(await self._ask_all(queues, place, until))
            place += 1
            if unusable:
                await self._exclusion.drop(unusable)
                await self._count()
            else:
                arrays, _ = await run.computed(
                    run.at_places, arrived, what=f"the sum of release {entry.number}"
                )
                await self._keep("all sites", entry, arrays[THE_SUM])

    async def _more(self, queues: Iterable[_Queue], place: int) -> bool:
        """Whether there is a question `place`; none of them asks for patients who are out."""
        if await self._exclusion.listed():
            await self._count()
        left = [queue.trim(place, self._exclusion.keys) for queue in queues]
        return all(left)

    async def _ask_all(
        self, queues: Mapping[RemoteSite, _Queue], place: int, until: int
    ) -> dict[RemoteSite, Sent | Withdraw | Unable]:
        return await self._run.team.ask_all(lambda site: site.release(queues[site].parts, place, until))

    async def _keep(self, site: str, release: BankEntry, tensors: Mapping[str, Array]) -> None:
        run = self._run
        if release.key in self._exclusion.keys:
            return
        kept = {name: tensors[name] for name in release.shapes}
        await run.on_disk(self._put, site, release, kept, what=f"release {release.number} of {site}")
        self._kept += len(release.origins)
        self._octets += release.octets(self._form.form) + FILE_OCTETS
        self._tell()

    def _put(self, site: str, release: BankEntry, tensors: Mapping[str, Array]) -> None:
        """Keep a release's activations. Raises JobFailed: NaN or infinity in them."""
        for name, array in self._form.from_wire(tensors).items():
            if not np.isfinite(array).all():
                raise JobFailed(
                    f"site {site} released activations ({name}) that are not finite: check its images"
                )
        self._bank.put(release, tensors)

    async def _count(self) -> list[BankEntry]:
        """What is due, of patients who are in the run, and is kept; returns what is missing."""
        bank, out = self._bank, self._exclusion.keys
        missing: list[BankEntry] = await self._run.on_disk(bank.missing, out, what="the feature bank")
        out = out.union(bank.dropped)
        due = replace(
            bank.contents, releases=tuple(one for one in bank.contents.releases if one.key not in out)
        )
        lacking = replace(due, releases=tuple(missing))
        self._due, self._due_octets = due.windows, due.octets
        self._kept, self._octets = due.windows - lacking.windows, due.octets - lacking.octets
        self._tell()
        return missing

    def _tell(self) -> None:
        self._run.report(h.BankGrew(self._kept, self._due, self._octets, self._due_octets))


class _Queue:
    """What one site is still to be asked.

    Args:
        releases: in the order in which they are asked.
    """

    def __init__(self, run: Run, site: RemoteSite, releases: list[BankEntry]) -> None:
        self.releases = list(releases)
        self.parts: list[Part] = [part_of(run, site.name, site.lists, one) for one in releases]
        self.announced = 0
        """How many of them the site may know of."""

    def trim(self, place: int, out: frozenset[bytes]) -> bool:
        """Do not ask for patients who are out, where the site was not asked yet; whether there is more from `place`."""
        ahead = [n for n in range(self.announced, len(self.parts)) if self.releases[n].key in out]
        for n in reversed(ahead):
            del self.releases[n], self.parts[n]
        return place < len(self.parts)
