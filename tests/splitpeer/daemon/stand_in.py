"""A daemon that only answers its spool, in a thread: what it says is up to the test."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from splitpeer.daemon.lock import StateLock
from splitpeer.daemon.spool import Spool, Waiting, folder_of
from splitpeer.daemon.spooled import Provenance, SpoolResult, Status
from splitpeer.data.geometry import Geometry
from splitpeer.data.task import Task
from tests.splitpeer.daemon.spooling import TASK, provenance

Answer = Callable[[Spool, Waiting], None]


def masks_of(grid: Geometry, task: Task = TASK) -> np.ndarray:
    """A segmentation on a grid, uint8 [regions, x, y, z], that is the same for the same grid, and not symmetric."""
    x, y, z = np.indices(grid.shape)
    whole = (x < 0.7 * grid.shape[0]) & (y > 0.3 * grid.shape[1]) & (z > 0)
    return np.stack([whole, whole & (x + y < 0.6 * sum(grid.shape[:2]))])[: len(task.regions)].astype(
        np.uint8
    )


def answers_on(
    grids: dict[str, Geometry], *, sure: tuple[float, float] = (0.1, 0.9), **made: object
) -> Answer:
    """Answers each request with `masks_of` on the grid of its patient; made of what `made` says.

    Args:
        sure: probability outside the masks, and inside.
    """
    outside, inside = map(np.float32, sure)

    def answer(spool: Spool, one: Waiting) -> None:
        asked = one.request
        grid = grids[asked.patient]
        spool.note(one.id, Status(state="queued", ahead=1))
        spool.note(one.id, Status(state="working", done=1, total=2))
        masks = masks_of(grid)
        found: Provenance = provenance(asked, grid.affine, **made)
        if asked.want == "mask":
            spool.deliver(one.id, SpoolResult(found, "mask", masks))
        else:
            spool.deliver(one.id, SpoolResult(found, "probabilities", np.where(masks, inside, outside)))

    return answer


@contextmanager
def daemon(state: Path, answer: Answer | None) -> Iterator[Spool]:
    """Holds `state` and answers what waits there, until the block is left; None: it makes no spool."""
    lock = StateLock(state)
    assert lock.take()
    spool, done = Spool(folder_of(state)), threading.Event()
    threads = []
    if answer is not None:
        spool.open()
        threads = [threading.Thread(target=_serve, args=(spool, answer, done))]
    for thread in threads:
        thread.start()
    try:
        yield spool
    finally:
        done.set()
        for thread in threads:
            thread.join()
        lock.release()


def _serve(spool: Spool, answer: Answer, done: threading.Event) -> None:
    while not done.wait(0.02):
        for one in spool.waiting():
            if one.given_up:
                spool.give_up(one)
            else:
                answer(spool, one)
