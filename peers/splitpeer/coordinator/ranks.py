"""A coordinator on several ranks: rank 0 is what the other files here make of it, and the others compute for it.

Sites, door, masks, checkpoints, results and the decision about every step are rank 0's. A lane for each rank would
spread the sites' traffic too, but a site's link, its requests and what it has applied are known in one process.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from importlib.metadata import version
from typing import Any

from splitpeer.coordinator.assembly import make_half
from splitpeer.errors import ConfigError
from splitpeer.federation.compute import COMPUTE_S, Compute
from splitpeer.federation.seats import seats_of
from splitpeer.federation.terms import job_on_wire
from splitpeer.logs import event
from splitpeer.ranks.group import Ranks, device_of
from splitpeer.ranks.halves import FollowingHalf, LeadingHalf
from splitpeer.ranks.torchrun import Rank
from splitpeer.settings.job import JobConfig
from splitpeer.settings.peer import PeerConfig
from splitpeer.training.split_step import CoordinatorHalf

BEAT_S = 20.0
"""Rank 0 tells the others so often that there will be more to do."""
FIRST_S = 24 * 3600.0
"""Before the first order rank 0 may read every mask to its end (--verify); if it dies, that is seen at once."""
SHARE = 0.5
"""Of the deadline of a step: how long one rank waits for another, so that the error names the rank."""
_LATER = "torch._dynamo"
"""DistributedDataParallel imports it: seconds on a slow machine, which no step should take."""
log = logging.getLogger(__name__)


def longest(step_s: float) -> float:
    """Seconds for which rank 0 may have something else to do: a step, or a disk that is slow."""
    return 3 * max(COMPUTE_S, step_s)


@contextmanager
def met(rank: Rank, config: PeerConfig, job: JobConfig) -> Iterator[Ranks]:
    """Within the block all ranks have met; at its end rank 0 tells the others that it ends.

    Raises:
        ConfigError: a batch has too few samples, a machine too few GPUs, or the ranks have other settings.
        RankLost: not all came.
    """
    if job.training.batch < rank.world:
        raise ConfigError(
            f"{job.source}: [training] batch = {job.training.batch} for {rank.world} ranks, which need a sample each: "
            "raise it, or start fewer"
        )
    with suppress(ImportError):
        import_module(_LATER)
    cuda = device_of(rank, config.runtime.device) != "cpu"
    with Ranks(rank, SHARE * job.deadlines.step_s, cuda=cuda).met(_terms(config, job)) as group:
        event(log, "rank.met", rank=rank.number, ranks=rank.world, at=rank.address)
        try:
            yield group
        finally:
            if rank.leads:
                group.end()


async def follow(group: Ranks, config: PeerConfig, job: JobConfig) -> None:
    """Another rank's work: carry out what rank 0 orders, until it ends.

    Raises:
        RankLost: rank 0 ended without a word, or says nothing.
    """
    half = make_half(config, job, job_on_wire(job), seats_of(job), group)
    if not isinstance(half, FollowingHalf):
        raise TypeError("rank 0 follows nobody")
    compute, patience = Compute(config.runtime.threads), FIRST_S
    while await compute.run(half.follow, patience, what="an order of rank 0", timeout=2 * patience):
        patience = longest(job.deadlines.step_s)
    compute.close()
    event(log, "rank.done", rank=group.rank.number, steps=half.steps_done)


async def while_beating(
    work: Coroutine[Any, Any, None], half: CoordinatorHalf, compute: Compute, step_s: float
) -> None:
    """Do `work`; where there are other ranks, they are told meanwhile that rank 0 is there.

    Raises:
        RankLost: another rank ended, also while sites are waited for; or what `work` raises.
    """
    if not isinstance(half, LeadingHalf):
        await work
        return
    working = asyncio.create_task(work)
    beating = asyncio.create_task(_beat(half, compute, 2 * longest(step_s)))
    try:
        await asyncio.wait((working, beating), return_when=asyncio.FIRST_COMPLETED)
        (working if working.done() else beating).result()
    finally:
        working.cancel()
        beating.cancel()
        await asyncio.gather(working, beating, return_exceptions=True)


async def _beat(half: LeadingHalf, compute: Compute, timeout: float) -> None:
    while True:
        await asyncio.sleep(BEAT_S)
        await compute.run(half.beat, what="the other ranks", timeout=timeout)


def _terms(config: PeerConfig, job: JobConfig) -> str:
    """Digest of all that makes the ranks' halves alike."""
    settings = job.model_dump(mode="json", exclude={"output"})
    parts = (settings, config.data.convention, version("splitproto"))
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
