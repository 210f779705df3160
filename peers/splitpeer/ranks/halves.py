"""The coordinator's half of a step on several ranks: each computes the decoder on its own rows of the batch.

    rank 0                                         rank r
      decode  (its rows of the activations)  --->    forward
      joins the logits of all ranks          <---    logits
      loss, or the gradient from the site of the labels
      backward (its rows of the gradient)    --->    backward; gradients of weights are summed by DDP, as they are made
      joins what goes back to the sites      <---    gradients of the activations
      apply, or discard                      --->    the same step of the same optimiser

The loss is that of the whole batch, computed once where the masks are: a Dice over the batch is no sum over ranks, and
no mask leaves rank 0. All else is per sample: networks that normalise over the batch are refused (`models/seeding.py`).
Rank 0 alone draws, fuses, defends, saves and decides; the others do as ordered, and hold equal weights and moments.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from splitpeer.models.backbone import Decoder
from splitpeer.ranks.group import Ranks
from splitpeer.training.backward import backward
from splitpeer.training.optimiser import Schedule
from splitpeer.training.split_step import Activations, CoordinatorHalf

Levels = dict[str, dict[str, Tensor]]
DTYPES = {str(one): one for one in (torch.float32, torch.float64, torch.int64)}
"""Of what a checkpoint holds, by their names in an order."""
CPU = torch.device("cpu")


def rows_of(batch: int, world: int, number: int) -> slice:
    """A rank's rows of a batch; the first ones, who have other work too, have the fewer."""
    return slice(number * batch // world, (number + 1) * batch // world)


class _RankedHalf(CoordinatorHalf):
    """What all ranks do with their own rows.

    Args:
        group: all ranks.
        decoder, optimiser, schedule, device, exclusive: as in `CoordinatorHalf`.
    """

    def __init__(
        self,
        group: Ranks,
        decoder: Decoder,
        optimiser: Optimizer,
        schedule: Schedule,
        device: str = "cpu",
        *,
        exclusive: bool = False,
    ) -> None:
        super().__init__(decoder, optimiser, schedule, device, exclusive=exclusive)
        self._group = group
        self._parallel: DistributedDataParallel | None = None

    def _trained(
        self, leaves: Mapping[str, Mapping[str, Tensor]], absent: Collection[str], held: Mapping[str, Tensor]
    ) -> Tensor:
        with self._group.summed():
            if self._parallel is None:
                # The weights become those of rank 0. Decoders have no buffers to send before each step.
                self._parallel = DistributedDataParallel(self.network, process_group=self._group.summing)
                # DDP reads a hook's annotations, and must not find them as text.
                self._parallel.register_comm_hook(
                    self._group.summing, lambda group, bucket: _sum(group, bucket)
                )
            logits: Tensor = self._parallel(leaves, absent, held)
        return logits


class LeadingHalf(_RankedHalf):
    """Rank 0's: a `CoordinatorHalf` to its callers. All calls are made in one thread."""

    _own: Tensor | None = None
    """The logits of its own rows, with their graph; `_logits` are those of the batch."""

    def load(self, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
        """As in `CoordinatorHalf`, on all ranks."""
        super().load(tensors, meta)
        listed = [[name, list(tensor.shape), str(tensor.dtype)] for name, tensor in tensors.items()]
        told = {"do": "load", "tensors": listed, "meta": dict(meta)}
        self._order(lambda _: (told, [tensor.detach().to(CPU).contiguous() for tensor in tensors.values()]))
        self._group.flush()

    def advance(self, step: int) -> None:
        """As in `CoordinatorHalf`, on all ranks."""
        super().advance(step)
        self._order(lambda _: ({"do": "advance", "step": step}, []))

    def beat(self) -> None:
        """Tell the others that there will be more to do. Raises RankLost."""
        self._order(lambda _: ({"do": "beat"}, []))
        self._group.flush()

    def _order(self, made: Callable[[int], tuple[dict[str, Any], list[Tensor]]]) -> None:
        for number in self._group.others:
            what, tensors = made(number)
            self._group.order(number, what, tensors)

    def _rows(self, batch: int, number: int = 0) -> slice:
        return rows_of(batch, self._group.rank.world, number)

    def _handed_out(
        self,
        do: str,
        activations: Activations,
        absent: Collection[str],
        have: Mapping[str, np.ndarray] | None = None,
        *,
        inputs: bool = False,
    ) -> tuple[Levels, dict[str, np.ndarray], int]:
        """Send each rank its rows; returns this one's, which of its samples have a seat, and the batch."""
        whole = {
            seat: {name: _sendable(level) for name, level in levels.items()}
            for seat, levels in activations.items()
        }
        batch = _batch(whole)

        def made(number: int) -> tuple[dict[str, Any], list[Tensor]]:
            mine = self._rows(batch, number)
            shapes = {
                seat: {name: list(level[mine].shape) for name, level in levels.items()}
                for seat, levels in whole.items()
            }
            told = {
                "do": do,
                "shapes": shapes,
                "absent": sorted(absent),
                "have": {seat: rows[mine].tolist() for seat, rows in (have or {}).items()},
                "inputs": inputs,
            }
            return told, [level[mine] for levels in whole.values() for level in levels.values()]

        self._order(made)
        mine = self._rows(batch)
        own = {seat: {name: level[mine] for name, level in levels.items()} for seat, levels in whole.items()}
        return own, {seat: rows[mine] for seat, rows in (have or {}).items()}, batch

    def _joined(self, own: Tensor, batch: int) -> Tensor:
        """[B, ...] on the CPU, of what each rank sends of its rows; `own` is this one's."""
        whole = torch.empty(batch, *own.shape[1:])
        whole[self._rows(batch)] = own.detach().float().cpu()
        for number in self._group.others:
            self._group.receive(number, (whole[self._rows(batch, number)],))
        return whole

    def _evaluated(self, activations: Activations, absent: Collection[str]) -> Tensor:
        if _batch(activations) < self._group.rank.world:
            return super()._evaluated(activations, absent)
        own, _, batch = self._handed_out("evaluate", activations, absent)
        logits = self._joined(super()._evaluated(own, absent), batch)
        self._group.flush()
        return logits.to(self.device)

    def _decode(
        self,
        activations: Activations,
        absent: Collection[str],
        have: Mapping[str, np.ndarray] | None,
        *,
        inputs: bool = True,
    ) -> Tensor:
        self._forget()
        own, held, batch = self._handed_out("decode", activations, absent, have, inputs=inputs)
        logits = super()._decode(own, absent, held, inputs=inputs)
        whole = self._joined(logits, batch).to(self.device).requires_grad_()
        self._group.flush()
        self._own, self._logits = logits, whole
        return whole

    def _gradients(self) -> Levels:
        if self._own is None or self._logits is None or self._logits.grad is None:
            raise RuntimeError("a step without its logits' gradient")
        batch, seed = len(self._logits), _sendable(self._logits.grad)
        self._order(lambda number: ({"do": "backward"}, [seed[self._rows(batch, number)]]))
        with self._group.summed():
            backward([self._own], [seed[self._rows(batch)].to(self.device)])
        gradients = {
            seat: {name: torch.empty(batch, *own.shape[1:]) for name, own in levels.items()}
            for seat, levels in super()._gradients().items()
        }
        for seat, levels in super()._gradients().items():
            for name, own in levels.items():
                gradients[seat][name][self._rows(batch)] = own.cpu()
        for number in self._group.others:
            mine = self._rows(batch, number)
            into = [level[mine] for levels in gradients.values() for level in levels.values()]
            self._group.receive(number, into)
        self._group.flush()
        return gradients

    def _apply(self) -> None:
        self._order(lambda _: ({"do": "apply"}, []))
        super()._apply()

    def _discard(self) -> None:
        self._order(lambda _: ({"do": "discard"}, []))
        super()._discard()

    def _forget(self) -> None:
        self._own = None
        super()._forget()


class FollowingHalf(_RankedHalf):
    """Another rank's: it computes what rank 0 orders."""

    _inputs = False
    """The pending step's gradients by the activations are wanted."""

    def follow(self, patience_s: float) -> bool:
        """Wait for one order and carry it out; returns whether there will be more.

        Raises:
            RankLost: rank 0 ended, or said nothing for `patience_s`.
        """
        order = self._group.ordered(patience_s)
        if order["do"] == "end":
            return False
        match order["do"]:
            case "load":
                self._follow_load(order)
            case "advance":
                self.advance(order["step"])
            case "decode":
                self._follow_decode(order)
            case "evaluate":
                self._follow_evaluate(order)
            case "backward":
                self._follow_backward(order)
            case "apply":
                self._forget()
                self._apply()
            case "discard":
                self._forget()
                self._discard()
        self._group.flush()
        return True

    def _follow_load(self, order: Mapping[str, Any]) -> None:
        tensors = {name: torch.empty(shape, dtype=DTYPES[dtype]) for name, shape, dtype in order["tensors"]}
        self._group.receive(0, list(tensors.values()))
        self.load(tensors, order["meta"])

    def _follow_decode(self, order: Mapping[str, Any]) -> None:
        have = {seat: np.array(rows, bool) for seat, rows in order["have"].items()}
        self._inputs = order["inputs"]
        logits = self._decode(self._received(order), order["absent"], have, inputs=self._inputs)
        self._group.send(0, (_sendable(logits),))

    def _follow_evaluate(self, order: Mapping[str, Any]) -> None:
        self._group.send(0, (_sendable(self._evaluated(self._received(order), order["absent"])),))

    def _follow_backward(self, order: Mapping[str, Any]) -> None:
        if self._logits is None:
            raise RuntimeError("backward without a pending decode")
        seed = torch.empty(self._logits.shape)
        self._group.receive(0, (seed,))
        with self._group.summed():
            backward([self._logits], [seed.to(self.device)])
        if self._inputs:
            levels = self._gradients().values()
            self._group.send(0, [_sendable(one) for named in levels for one in named.values()])

    def _received(self, order: Mapping[str, Any]) -> Levels:
        arrived = {
            seat: {name: torch.empty(shape) for name, shape in levels.items()}
            for seat, levels in order["shapes"].items()
        }
        self._group.receive(0, [level for levels in arrived.values() for level in levels.values()])
        return arrived


def _sum(group: Any, bucket: Any) -> Any:
    """DDP's way to put gradients together: added, where its own is their mean. The loss is of the whole batch."""
    work = dist.all_reduce(bucket.buffer(), group=group, async_op=True)
    return work.get_future().then(lambda done: done.value()[0])


def _sendable(value: np.ndarray | Tensor) -> Tensor:
    """float32, on the CPU, contiguous; the same memory where it is so already."""
    if isinstance(value, np.ndarray):
        flags = value.flags
        if not (flags.writeable and flags.aligned and flags.c_contiguous and value.dtype == np.float32):
            value = np.array(value, np.float32, order="C")
        return torch.from_numpy(value)
    return value.detach().to(CPU, torch.float32).contiguous()


def _batch(activations: Activations) -> int:
    return next(len(level) for levels in activations.values() for level in levels.values())
