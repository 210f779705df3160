"""All ranks together make the steps of one: as processes, by gloo, each with its own rows of the batch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from splitpeer.ranks.halves import rows_of
from tests.networks import SMALL
from tests.splitpeer.roles.scene import free_port

ROUNDINGS = 1e-6
"""Of the largest value: sixteen roundings of float32 (6e-8). A kernel may add up in another order for another size of
batch, and the ranks' sums of a weight's gradient are added at the end; each addition is wrong by one rounding at most.
Later steps make more of a rounding, on some processors more than sixteen. What they make of one rounding of each weight
is measured beside it; ranks round twice, in the forward pass and in the backward.
"""
SCRIPT = Path(__file__).with_name("stepping.py")


def compared(ranks: int, *arguments: str) -> tuple[dict[str, float], dict[str, float], int]:
    """By what it is of: the difference between all ranks and one, and what one rounding makes; octets between ranks."""
    shared = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1"}
    shared |= {"MASTER_PORT": str(free_port()), "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), *arguments],
            env={**os.environ, **shared, "RANK": str(n), "LOCAL_RANK": str(n)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for n in range(ranks)
    ]
    try:
        said = [process.communicate(timeout=100) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert [process.returncode for process in processes] == [0] * ranks, said
    found, moved, octets = json.loads(said[0][0])
    return found, moved, octets


@pytest.mark.parametrize(
    ("ranks", "network", "fusion"),
    [(2, "basic-unet", "concat"), (3, "residual-unet", "mean"), (2, "swin-unetr", "concat")],
)
def test_all_ranks_make_the_steps_of_one(ranks: int, network: str, fusion: str) -> None:
    """Steps with and without gradients for sites, seats that samples lack or all lack, a loss of NaN, labels
    elsewhere, predictions, a rollback; with `mean` in a task whose regions exclude each other."""
    found, moved, octets = compared(ranks, network, json.dumps(SMALL[network]), fusion)
    assert octets > 0
    assert set(found) == {"loss", "gradients of activations", "weights", "logits", "predictions"}
    assert {what: error for what, error in found.items() if error > max(ROUNDINGS, 2 * moved[what])} == {}
    assert max(moved.values()) < 10 * ROUNDINGS


def test_rows_are_dealt_out_once_and_evenly() -> None:
    for world in range(1, 9):
        for batch in range(world, 40):
            dealt = [rows_of(batch, world, number) for number in range(world)]
            assert [row for rows in dealt for row in range(batch)[rows]] == list(range(batch))
            sizes = [rows.stop - rows.start for rows in dealt]
            assert max(sizes) - min(sizes) <= 1
            assert sizes[0] == min(sizes) >= 1
