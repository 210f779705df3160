"""One thread that computes, so that heartbeats go on during a long step; and tensors to and from the wire."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
import torch

from splitpeer.config import PeerConfig
from splitpeer.defences import key as defence_keys
from splitpeer.errors import ConfigError

Result = TypeVar("Result")


def pick_device(name: str) -> str:
    """`auto` to a GPU if there is one.

    Raises:
        ConfigError: a GPU is named and this machine has none.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(f'[runtime] device = "{name}": no CUDA device on this machine; use "cpu" or "auto"')
    return name


def defence_key(config: PeerConfig) -> bytes:
    """The 32 octets that this peer's defences draw from: of its state folder, or of its seed if it has one.

    Raises:
        ConfigError: see `splitpeer.defences.key.load_or_make`.
    """
    seed = config.runtime.initial_weights
    if seed != "private":
        return defence_keys.from_seed(int(seed), config.peer.site)
    return defence_keys.load_or_make(config.peer.state)


class Compute:
    """Runs functions one after the other in a thread of its own."""

    def __init__(self, threads: int) -> None:
        # Also for the caller's thread: results depend on the thread count, so it is never left to chance.
        torch.set_num_threads(threads)
        self._pool = ThreadPoolExecutor(1, "compute", torch.set_num_threads, (threads,))

    async def run(self, function: Callable[..., Result], *args: Any, **kwargs: Any) -> Result:
        """The result of `function(*args, **kwargs)`."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._pool, lambda: function(*args, **kwargs))

    def close(self) -> None:
        """No more work; what runs is not waited for."""
        self._pool.shutdown(wait=False, cancel_futures=True)


def to_wire(arrays: Mapping[str, np.ndarray], precision: str) -> dict[str, np.ndarray]:
    """float32 arrays as they travel: unchanged, or bfloat16 as its 16 bits (round to nearest even)."""
    if precision != "bf16":
        return dict(arrays)
    return {
        name: torch.tensor(array).to(torch.bfloat16).view(torch.uint16).numpy()
        for name, array in arrays.items()
    }


def from_wire(arrays: Mapping[str, np.ndarray], precision: str) -> dict[str, np.ndarray]:
    """The inverse: float32 arrays."""
    if precision != "bf16":
        return dict(arrays)
    return {
        name: torch.from_numpy(bits).view(torch.bfloat16).float().numpy() for name, bits in arrays.items()
    }
