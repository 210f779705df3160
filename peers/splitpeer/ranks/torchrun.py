"""What `torchrun` tells a process: which rank it is, and where the first one is. Read before torch is imported."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from splitpeer.errors import ConfigError

START = (
    "start it with torchrun --nproc-per-node N --master-port 29500 -m splitpeer.cli ..., or unset WORLD_SIZE"
)
STATIC = "none"
"""Of a run whose ranks meet at --master-addr and --master-port: torchrun draws or takes an id for all others."""
COUNT = "TORCHELASTIC_RESTART_COUNT"
MOST_RANKS = 1024
LOOPBACK = "lo"


@dataclass(frozen=True)
class Rank:
    """This process among the others."""

    number: int
    """0 leads: it alone has state folder, port, images and results."""
    world: int
    """Ranks in all."""
    local: int
    """Among those of this machine; that of its GPU."""
    local_world: int
    """Ranks on this machine."""
    address: str
    """Host and port at which all meet."""
    attempt: int = 0
    """How often torchrun has started all of them again."""

    @property
    def leads(self) -> bool:
        """Whether it is the first."""
        return self.number == 0

    def quieten(self) -> None:
        """Before torch is imported: one line of ours for an error, and no port beyond this machine if all are on it."""
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")
        if self.local_world == self.world:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", LOOPBACK)
            os.environ.setdefault("NCCL_SOCKET_IFNAME", LOOPBACK)


def own_rank(environ: Mapping[str, str] | None = None) -> Rank | None:
    """This process's rank; None: it is the only one.

    Args:
        environ: the process's own, if not given.

    Raises:
        ConfigError: WORLD_SIZE is set, and the rest is missing or impossible; or torchrun unpickles what it is sent.
    """
    given = os.environ if environ is None else environ
    if "WORLD_SIZE" not in given:
        return None
    if given.get("TORCHELASTIC_RUN_ID", STATIC) != STATIC:
        # Its c10d rendezvous keeps a pickle in a store that is open to every network, and reads it every few seconds.
        raise ConfigError(
            "torchrun runs whatever code somebody sends to its port when ranks meet by --standalone or --rdzv-...: "
            "give it --master-addr 127.0.0.1 --master-port 29500 instead, on several machines the first one's address"
        )
    world = _number(given, "WORLD_SIZE", 1, MOST_RANKS)
    if world == 1:
        return None
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        if not given.get(name):
            raise ConfigError(f"WORLD_SIZE is {world}, but {name} is not set: {START}")
    number = _number(given, "RANK", 0, world - 1)
    port = _number(given, "MASTER_PORT", 1, 65_535)
    here = _number(given, "LOCAL_WORLD_SIZE", 1, world) if "LOCAL_WORLD_SIZE" in given else 1
    local = _number(given, "LOCAL_RANK", 0, here - 1) if "LOCAL_RANK" in given else 0
    attempt = _number({COUNT: "0", **given}, COUNT, 0, 9_999_999)
    return Rank(number, world, local, here, f"{given['MASTER_ADDR']}:{port}", attempt)


def _number(given: Mapping[str, str], name: str, least: int, most: int) -> int:
    text = given[name]
    if not (text.isascii() and text.isdigit() and len(text) < 8 and least <= int(text) <= most):
        raise ConfigError(f"{name} is {text!r}, not a whole number from {least} to {most}: {START}")
    return int(text)
