"""Messages among the ranks, on torch.distributed: each wait has a deadline, and each error is one line.

Rank 0 sends every other one an order, a map as JSON, and the tensors that belong to it. Tensors travel as they are by
gloo, and nothing is pickled. Gradients of weights are summed in a group of their own, by NCCL on GPUs.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from splitpeer.errors import ConfigError, DeadlinePassed
from splitpeer.ranks.torchrun import Rank
from splitproto.errors import printable

JOIN_S = 60.0
"""All ranks have met within so many seconds, or none works."""
END_S = 5.0
"""How long rank 0 waits until the others have heard that it ends."""
MAX_ORDER = 1 << 28
"""Bytes of an order: names and shapes of tensors, or the figures of a share of a sweep."""
AGAIN = "start all ranks again, and the work goes on from what is saved"
Made = TypeVar("Made")


class RankLost(DeadlinePassed):
    """Another rank ended, or does not answer: nothing can be computed any more."""

    hangs = False
    """A thread still waits in torch: the interpreter's own end would abort the process (`splitpeer.cli.outcome`)."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, while a thread waits in torch; see `RankLost.hangs`."""

    hangs = True


class Ranks:
    """All ranks, once they have met.

    Args:
        rank: this one.
        wait_s: seconds that a rank may take to answer an order, and for its part of a sum.
        cuda: whether gradients are on GPUs.
    """

    def __init__(self, rank: Rank, wait_s: float, *, cuda: bool = False) -> None:
        self.rank, self.wait_s, self._cuda = rank, wait_s, cuda
        self.octets = 0
        """Sent and received here, without the sums of gradients."""
        self.summing: Any = None
        """The process group in which gradients are summed; None before all have met."""
        self._sent: list[tuple[int, Any, Tensor]] = []
        self._lost = False

    @property
    def others(self) -> range:
        """All ranks but the first."""
        return range(1, self.rank.world)

    @contextmanager
    def met(self, terms: str) -> Iterator[Ranks]:
        """Within the block all ranks have met, and work on the same.

        Args:
            terms: a digest of what this rank works on.

        Raises:
            RankLost: not all came.
            ConfigError: another rank works on something else.
        """
        within(JOIN_S, self._meet, f"all {self.rank.world} ranks at {self.rank.address}: are all started?")
        try:
            self._agree(terms)
            yield self
        finally:
            with suppress(RuntimeError):  # of those who are gone nothing can be closed
                dist.destroy_process_group()

    # --- orders ----------------------------------------------------------------------------------------

    def order(self, to: int, what: dict[str, Any], tensors: Sequence[Tensor] = ()) -> None:
        """Send rank `to` an order and its tensors; returns before they have arrived.

        Args:
            tensors: on the CPU, contiguous; not to be changed until `flush`.
        """
        told = torch.frombuffer(bytearray(json.dumps(what).encode()), dtype=torch.uint8)
        self.send(to, (torch.tensor([len(told)]), told, *tensors))

    def ordered(self, timeout: float, of: int = 0) -> dict[str, Any]:
        """The next order of rank 0, or what another has to say. Raises RankLost."""
        length = torch.zeros(1, dtype=torch.int64)
        self.receive(of, (length,), timeout)
        if not 0 < (octets := int(length)) <= MAX_ORDER:
            raise ConfigError(f"an order of {octets} bytes: rank {of} runs another version of splitpeer")
        told = torch.empty(octets, dtype=torch.uint8)
        self.receive(of, (told,))
        order: dict[str, Any] = json.loads(told.numpy().tobytes())
        return order

    def send(self, to: int, tensors: Sequence[Tensor]) -> None:
        """Begin to send tensors, which are on the CPU and contiguous. Raises RankLost."""
        self._sent = [one for one in self._sent if not one[1].is_completed()]
        with self._heard(to, self.wait_s):
            self._sent += [(to, dist.isend(tensor, to), tensor) for tensor in tensors if tensor.numel()]
        self.octets += sum(map(_octets, tensors))

    def receive(self, of: int, into: Sequence[Tensor], timeout: float | None = None) -> None:
        """Fill tensors, which are on the CPU and contiguous, from rank `of`. Raises RankLost."""
        seconds = self.wait_s if timeout is None else timeout
        with self._heard(of, seconds):
            for work in [dist.irecv(tensor, of) for tensor in into if tensor.numel()]:
                if work is not None:  # as the stubs have it, of a rank outside the group
                    work.wait(timedelta(seconds=seconds))
        self.octets += sum(map(_octets, into))

    def flush(self, timeout: float | None = None) -> None:
        """Wait until what was sent has arrived. Raises RankLost."""
        seconds = self.wait_s if timeout is None else timeout
        sent, self._sent = self._sent, []
        for to, work, _ in sent:
            with self._heard(to, seconds):
                work.wait(timedelta(seconds=seconds))

    def end(self) -> None:
        """Tell the others that there is no more to do, if they can be told."""
        if self._lost:
            return
        with suppress(RankLost):
            for number in self.others:
                self.order(number, {"do": "end"})
            self.flush(END_S)

    @contextmanager
    def summed(self) -> Iterator[None]:
        """Within the block gradients are summed. Raises RankLost."""
        with self._heard(None, self.wait_s):
            yield

    # --- inside ----------------------------------------------------------------------------------------

    @contextmanager
    def _heard(self, other: int | None, seconds: float) -> Iterator[None]:
        """torch's errors about another rank, in one line; `other` None: it does not say which."""
        try:
            yield
        except RuntimeError as error:
            if not isinstance(error, dist.DistError) and "gloo" not in str(error):
                raise
            self._lost = True
            if other is None and self.rank.world == 2:
                other = 1 - self.rank.number
            who = "another rank" if other is None else f"rank {other}"
            slow = "imed out" in str(error)
            what = f"did not answer within {seconds:g} s" if slow else "ended: its last line says why"
            raise RankLost(f"{who} {what}; {AGAIN}") from error

    def _meet(self) -> None:
        limit = timedelta(seconds=JOIN_S)
        backend = "cpu:gloo,cuda:nccl" if self._cuda else "gloo"
        number, world = self.rank.number, self.rank.world
        store, *_ = next(rendezvous("env://", number, world, timeout=limit))
        # torchrun's store outlives ranks: those that it starts again must not find the addresses of the former ones.
        own = PrefixStore(f"attempt {self.rank.attempt}", store)
        dist.init_process_group(backend, store=own, timeout=limit, rank=number, world_size=world)
        self.summing = dist.new_group(backend=backend, timeout=timedelta(seconds=self.wait_s))

    def _agree(self, terms: str) -> None:
        """All work on the same; each side says so itself."""
        differs = ConfigError(
            "the ranks differ in job.toml, in [data] convention of peer.toml or in version: copy both files to every "
            "machine and install the same version"
        )
        if not self.rank.leads:
            same = self.ordered(JOIN_S).get("terms") == terms
            self.send(0, (torch.tensor([int(same)]),))
            self.flush()
            if not same:
                raise differs
            return
        for number in self.others:
            self.order(number, {"do": "agree", "terms": terms})
        answers = [torch.zeros(1, dtype=torch.int64) for _ in self.others]
        for number, answer in zip(self.others, answers, strict=True):
            self.receive(number, (answer,), JOIN_S)
        self.flush()
        if not all(map(int, answers)):
            raise differs


def within(seconds: float, function: Callable[[], Made], what: str) -> Made:
    """The result of `function`, which may wait below Python, where no signal reaches it.

    Raises:
        RankLost: the time is over, or torch found no other rank.
        Interrupted: by Ctrl-C.
    """
    made: list[Made] = []
    raised: list[BaseException] = []

    def run() -> None:
        try:
            made.append(function())
        except BaseException as error:
            raised.append(error)

    # A daemon: what hangs must not keep the process from ending.
    thread = threading.Thread(target=run, name="ranks", daemon=True)
    thread.start()
    try:
        thread.join(seconds)
    except KeyboardInterrupt:
        raise Interrupted from None
    if made:
        return made[0]
    if raised and not isinstance(raised[0], RuntimeError):
        raise raised[0]
    cause = f" ({printable(str(raised[0]).partition('. ')[0])[:200]})" if raised else ""
    lost = RankLost(f"waited {seconds:g} s at most for {what}{cause}")
    lost.hangs = thread.is_alive()
    raise lost from (raised[0] if raised else None)


def device_of(rank: Rank, name: str) -> str:
    """Of `[runtime] device`, this rank's own: a GPU each.

    Raises:
        ConfigError: there are too few, or one is named for several ranks.
    """
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return "cpu"
    if ":" in name and rank.local_world > 1:
        raise ConfigError(
            f'device "{name}" is one GPU for {rank.local_world} ranks: "cuda" gives each its own'
        )
    count = torch.cuda.device_count()
    if rank.local_world > count:
        raise ConfigError(f"{rank.local_world} ranks for {count} GPUs: --nproc-per-node {count or 1} at most")
    return name if ":" in name else f"cuda:{rank.local}"


def _octets(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
