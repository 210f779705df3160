"""Attacks on the private demo, in processes of their own, which prepare while the demo leaves a core free.

This module imports no torch: the demo's own process stays light, and its workers import `sum_leak`.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from multiprocessing.pool import AsyncResult, Pool
from multiprocessing.synchronize import Event
from pathlib import Path

from splitpeer.data.phantom.cohort import write_phantom
from splitpeer.demo.federation import STRANGERS, Federation
from splitpeer.demo.private import COLLUDE, KNOWN, SUM, PrivateJob
from splitpeer.errors import JobFailed

SHARED = ((KNOWN, COLLUDE), (SUM,))
"""The experiments of each process."""
NICE = 10
"""Added to the niceness of the attacks, so that the demo's own work goes first."""
ATTACK_S = 3600.0
"""Seconds that one process may take."""
PARENT_S = 5.0
"""Seconds between two looks at the demo's own process: a worker does not outlive it."""


@dataclass(frozen=True)
class AttackEffort:
    """How hard the sums are attacked."""

    attacks: Mapping[str, tuple[str, ...]] = field(
        default_factory=lambda: {
            # Searches of the sum (whitebox, sum-search) showed less at this size, in more time.
            SUM: ("pca", "inverse:steps=200,width=16"),
            KNOWN: ("pca", "whitebox:iterations=100"),
            COLLUDE: ("whitebox:iterations=100",),
        }
    )
    finder_steps: int = 100
    """Training steps of the networks that look for tumours in what was rebuilt; 0: there are none."""


EFFORT = AttackEffort()


class SumAttacks:
    """Attacks on a private demo: on the sums that were kept, and on what is left when all other hospitals subtract
    their parts.

    The adversary is stronger than a real one: it holds the encoders of all hospitals. It learns from its own images
    at once, and attacks during the training, as soon as the hospitals have stopped: two processes of one thread each.

    Args:
        federation: the demo's, already set up.
        job: the demo's settings.
        effort: how hard the adversary tries.
    """

    def __init__(self, federation: Federation, job: PrivateJob, effort: AttackEffort) -> None:
        folder, spawn = federation.folder, multiprocessing.get_context("spawn")
        write_phantom(federation.strangers, min(STRANGERS, job.strangers), seed=job.seed + 1000)
        self._stopped = spawn.Event()
        self._pool: Pool = spawn.Pool(len(SHARED), _worker, (self._stopped,))
        self._running: list[AsyncResult[tuple[list[Path], dict[str, float]]]] = [
            self._pool.apply_async(_attack, (folder, job, effort, names)) for names in SHARED
        ]

    def start(self) -> None:
        """Begin to attack: the hospitals have stopped, so the coordinator has all that it will ever have."""
        self._stopped.set()

    def stop(self) -> None:
        """End the processes, finished or not."""
        self._pool.terminate()
        self._pool.join()

    def report(self, page: Path) -> dict[str, float]:
        """Wait for all attacks, and write the page.

        Returns:
            A few figures for the terminal. For the sum: the figure of the contrast that shows most, and the mean over
            contrasts.

        Raises:
            JobFailed: there is no feature bank, or the attacks take too long.
        """
        self.start()
        folders: list[Path] = []
        figures: dict[str, float] = {}
        for one in self._running:
            try:
                done, found = one.get(ATTACK_S)
            except multiprocessing.TimeoutError:
                raise JobFailed(f"the attacks were not done in {ATTACK_S / 60:.0f} minutes") from None
            folders += done
            figures |= found
        self._pool.apply(_write, (folders, page))
        return figures


# --- in a worker ---------------------------------------------------------------------------------------------


_stopped: Event


def _worker(stopped: Event) -> None:
    global _stopped
    _stopped = stopped
    os.nice(NICE)


def _attack(
    folder: Path, job: PrivateJob, effort: AttackEffort, names: Collection[str]
) -> tuple[list[Path], dict[str, float]]:
    import torch

    from splitpeer.demo.sum_leak import SumLeak

    torch.set_num_threads(1)
    leak = SumLeak(
        Federation(folder, job), job, {name: effort.attacks[name] for name in names}, effort.finder_steps
    )
    while not _stopped.wait(PARENT_S):
        if (demo := multiprocessing.parent_process()) is None or not demo.is_alive():
            raise SystemExit(1)
    return leak.attack()


def _write(folders: list[Path], page: Path) -> None:
    from splitpeer.report.build import write_report

    write_report(folders, page)
