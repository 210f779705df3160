"""One training step in two halves, without sockets: numpy arrays go out, numpy arrays come in.

With nothing lossy in between, the two halves compute what the whole network computes, bit for bit (at equal
thread counts, on a CPU): the client's `backward` seeds `torch.autograd.backward` with exactly the gradients
that the whole network's own graph would have carried across the cut.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from splitpeer.defences.network import Defended
from splitpeer.defences.randomness import Release
from splitpeer.errors import DataError, JobFailed
from splitpeer.logs import event
from splitpeer.models.backbone import Decoder, Encoder
from splitpeer.training.backward import backward
from splitpeer.training.finite import all_finite
from splitpeer.training.guard import Guard
from splitpeer.training.loss import probabilities, task_loss
from splitpeer.training.machine import in_order, kind
from splitpeer.training.optimiser import Schedule

Arrays = dict[str, np.ndarray]
Activations = Mapping[str, Mapping[str, np.ndarray | Tensor]]
State = tuple[dict[str, Tensor], dict[str, Any]]
log = logging.getLogger(__name__)


class _Half:
    """What both halves are: a network, its optimiser and the number of steps done."""

    def __init__(self, network: nn.Module, optimiser: Optimizer, schedule: Schedule, device: str) -> None:
        self.device = torch.device(device)
        self.network = network.to(self.device)  # moves the parameters that the optimiser already holds
        self.optimiser = optimiser
        self.schedule = schedule
        self._strange = False
        """A state was loaded that another kind of machine computed, and it was said."""

    @property
    def steps_done(self) -> int:
        """Steps applied so far; the next one has this number."""
        return self.schedule.position

    def state(self) -> State:
        """A copy of all that the next step depends on: tensors by name (model, moments), and what tells them apart.

        That is {"step": done, "machine": the kind of machine that computed them}.
        """
        tensors = {f"model/{name}": _copy(tensor) for name, tensor in self.network.state_dict().items()}
        for name, parameter in self.network.named_parameters():
            for moment, value in self.optimiser.state.get(parameter, {}).items():
                if isinstance(value, Tensor):
                    tensors[f"optimiser/{name}/{moment}"] = _copy(value)
        return tensors, {"step": self.steps_done, "machine": kind(self.device)}

    def load(self, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
        """Go back to a `state()`; what was pending is forgotten. The first of another kind of machine is a warning.

        Raises:
            DataError: the state belongs to another network. Nothing is changed then.
        """
        model, moments = self._parsed(tensors)
        self.network.load_state_dict(model)
        groups = self.optimiser.state_dict()["param_groups"]
        self.optimiser.load_state_dict({"state": moments, "param_groups": groups})
        self.optimiser.zero_grad()
        self.schedule.seek(meta["step"])
        self._forget()
        self._compare(str(meta.get("machine", "")), kind(self.device))

    def check(self, tensors: Mapping[str, Tensor]) -> None:
        """Whether `load` would take these. Raises DataError: see there."""
        self._parsed(tensors)

    def _parsed(
        self, tensors: Mapping[str, Tensor]
    ) -> tuple[dict[str, Tensor], dict[int, dict[str, Tensor]]]:
        """The network's own tensors by name, and the optimiser's moments by number of the parameter."""
        mine = self.network.state_dict()
        model = {name.removeprefix("model/"): t for name, t in tensors.items() if name.startswith("model/")}
        for name in sorted(model.keys() | mine.keys()):
            if name not in model or name not in mine or model[name].shape != mine[name].shape:
                raise _foreign(name)
        names = {parameter: name for name, parameter in self.network.named_parameters()}
        order = [names[parameter] for group in self.optimiser.param_groups for parameter in group["params"]]
        moments: dict[int, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            what, _, path = key.partition("/")
            name, _, moment = path.rpartition("/")
            if what == "optimiser":
                if name not in order or tensor.shape not in (torch.Size(), mine[name].shape):
                    raise _foreign(name)
                moments.setdefault(order.index(name), {})[moment] = tensor.clone()
        return model, moments

    def _compare(self, computed_on: str, here: str) -> None:
        if computed_on and computed_on != here and not self._strange:
            self._strange = True
            event(log, "run.other_machine", logging.WARNING, computed_on=computed_on, here=here,
                  hint="the run continues, but repeats bit for bit on one kind of machine only")  # fmt: skip

    def advance(self, step: int) -> None:
        """Count on to `step`: those in between were made without this half. What was pending is forgotten.

        Weights and moments stay; the learning rate is that of the step that follows.

        Raises:
            ValueError: `step` is behind.
        """
        if step < self.steps_done:
            raise ValueError(f"cannot advance to step {step} from step {self.steps_done}")
        self.schedule.seek(step)
        self._forget()

    def _apply(self) -> None:
        self.optimiser.step()
        self.schedule.step()
        self.optimiser.zero_grad()

    def _forget(self) -> None:
        raise NotImplementedError

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.device.type == "cuda")

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        self.network.eval()
        try:
            with torch.no_grad(), self._autocast():
                yield
        finally:
            self.network.train()


class ClientHalf(_Half):
    """A site's half: forward through its encoder, then backward from the gradients that come back.

    A `Defended` encoder sends what its defences leave, in evaluation too, and trains through them.
    The arrays that leave share memory with the pending graph on a CPU, so they are read-only.
    """

    def __init__(
        self,
        encoder: Encoder | Defended,
        optimiser: Optimizer,
        schedule: Schedule,
        device: str = "cpu",
        guard: Guard | None = None,
    ) -> None:
        super().__init__(encoder, optimiser, schedule, device)
        self._guard = guard or Guard()
        self._image: Tensor | None = None
        self._pending: dict[str, Tensor] | None = None
        self._own: dict[str, Tensor] = {}
        """The encoder's weights from before an average that the next step is made from; empty: there is none."""

    @property
    def averaged(self) -> bool:
        """Whether the next step is to be made from an average."""
        return bool(self._own)

    def weights(self) -> Arrays:
        """SP-11.16-2: the encoder's own, float32 by name; not an average that was taken."""
        held = self._own or {name: _copy(tensor) for name, tensor in self._averaged().items()}
        return {name: tensor.float().numpy() for name, tensor in held.items()}

    def take(self, average: Mapping[str, np.ndarray]) -> None:
        """SP-11.16-5: make the next step from these weights, named and shaped as `weights()`.

        Until it is made, `state` and `weights` are still those of before (SP-11.16-6).
        """
        mine = self._averaged()
        self._own = self._own or {name: _copy(tensor) for name, tensor in mine.items()}
        with torch.no_grad():
            for name, tensor in mine.items():
                tensor.copy_(torch.from_numpy(np.array(average[name], np.float32)))

    def state(self) -> State:
        """As at the other half, with the encoder's own weights."""
        tensors, meta = super().state()
        prefix = "encoder." if isinstance(self.network, Defended) else ""
        tensors |= {f"model/{prefix}{name}": _copy(tensor) for name, tensor in self._own.items()}
        return tensors, meta

    def load(self, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
        """As at the other half; an average is forgotten."""
        super().load(tensors, meta)
        self._own = {}

    def advance(self, step: int) -> None:
        """As at the other half. An average whose step this half sat out stays; if activations of that step were made,
        and it was committed without them, the encoder's own weights are back (SP-11.16-6)."""
        if step > self.steps_done:
            if self._pending is not None:
                mine = self._averaged()
                with torch.no_grad():
                    for name, tensor in self._own.items():
                        mine[name].copy_(tensor)
            self._own = {}
        super().advance(step)

    def forward(self, x: np.ndarray | Tensor, release: Release | None = None) -> Arrays:
        """Image [B, channels, *spatial] to {"x0": float32 [B, C, *spatial], ...}; a step is then pending.

        A second forward replaces the first: the batch was ordered again.

        Args:
            x: the images.
            release: what this is; only needed with defences.

        Raises:
            ValueError: there are defences and no release.
        """
        self._image = _tensor(x, self.device)
        if isinstance(self.network, Defended) and release is not None:
            for parameter in self.network.stack.begin(release.step):
                self.optimiser.state.pop(parameter, None)
        with self._autocast():
            self._pending = self._run(self._image, release)
        return {name: _array(tensor) for name, tensor in self._pending.items()}

    def backward(self, gradients: Mapping[str, np.ndarray]) -> None:
        """Apply the loss's gradients by the tensors last sent (same names, same shapes) and end the step.

        Raises:
            RuntimeError: no forward is pending.
            ValueError: names or shapes are not those that were sent; the step stays pending.
            JobFailed: a gradient is not finite (SP-11-10); the encoder is unchanged and the step stays pending. Or what
                it makes of the encoder's gradients cannot be used (SP-11.15-1); the encoder is unchanged.
            PolicyRefused: their norm is beyond the policy's limit; the encoder is unchanged.
        """
        self.accumulate(gradients)
        self.finish()

    def accumulate(self, gradients: Mapping[str, np.ndarray]) -> None:
        """The first half of `backward`, which raises all that it raises: what `finish` will apply, or `discard` not."""
        if self._pending is None:
            raise RuntimeError("backward without a pending forward")
        if gradients.keys() != self._pending.keys():
            raise ValueError(f"gradients of {sorted(gradients)}, expected {sorted(self._pending)}")
        arrived = {}
        for name, sent in self._pending.items():
            if tuple(gradients[name].shape) != tuple(sent.shape):
                raise ValueError(
                    f"gradient of {name} is {gradients[name].shape}, expected {tuple(sent.shape)}"
                )
            arrived[name] = _tensor(gradients[name], self.device)
            if not all_finite(arrived[name]):
                raise _diverged(f"the gradient of {name}", self.steps_done)
        penalty = self._penalty()
        pending = self._pending
        self._forget()
        # A level that is withheld is a constant: there is nothing to train through it.
        roots = {name: tensor for name, tensor in pending.items() if tensor.requires_grad}
        tensors, seeds = list(roots.values()), [arrived[name].to(t.dtype) for name, t in roots.items()]
        if penalty is not None:
            tensors, seeds = [*tensors, penalty], [*seeds, torch.ones_like(penalty)]
        if tensors:
            with in_order() if self.device.type == "cpu" else nullcontext():
                backward(tensors, seeds)
        try:
            self._guard.check(self.network.parameters(), self.steps_done + 1)
        except Exception:
            self.discard()
            raise

    def finish(self) -> None:
        """Apply what was accumulated: the step is over."""
        self._apply()

    def discard(self) -> None:
        """Forget accumulated gradients and the pending step; the encoder is unchanged."""
        self.optimiser.zero_grad()
        self._forget()

    def evaluate(self, x: np.ndarray | Tensor, release: Release | None = None) -> Arrays:
        """As `forward`, without a graph; a pending step stays as it is (SP-11-17)."""
        with self._evaluating():
            sent = self._run(_tensor(x, self.device), release)
        return {name: _array(tensor) for name, tensor in sent.items()}

    def _run(self, image: Tensor, release: Release | None) -> dict[str, Tensor]:
        sent: dict[str, Tensor]
        if not isinstance(self.network, Defended):
            sent = self.network(image)
        elif release is None:
            raise ValueError("a network with defences sends nothing without a release")
        else:
            sent = self.network(image, release)
        return sent

    def _penalty(self) -> Tensor | None:
        """What the defences add to the loss that this site trains by."""
        if not isinstance(self.network, Defended) or self._image is None or self._pending is None:
            return None
        penalty = self.network.stack.penalty(self._image, self._pending)
        if penalty is not None and not torch.isfinite(penalty):
            raise _diverged("a defence's own loss", self.steps_done)
        return penalty

    def _averaged(self) -> dict[str, Tensor]:
        """SP-11.16-3: what an average is made of: no whole numbers, and nothing of the defences."""
        encoder = self.network.encoder if isinstance(self.network, Defended) else self.network
        return {name: t for name, t in encoder.state_dict().items() if t.is_floating_point()}

    def _apply(self) -> None:
        super()._apply()
        self._own = {}

    def _forget(self) -> None:
        self._image = self._pending = None


class CoordinatorHalf(_Half):
    """The coordinator's half: fusion, decoder and, if the labels are here, the loss of the task.

    In an exclusive task the network has one channel more than there are regions, the background (see `loss`).

    With labels at a site (U-shaped), that site turns `decode`'s logits into a gradient, and `apply` takes it from
    there. `step` is the three in a row.
    """

    def __init__(
        self,
        decoder: Decoder,
        optimiser: Optimizer,
        schedule: Schedule,
        device: str = "cpu",
        *,
        exclusive: bool = False,
    ) -> None:
        super().__init__(decoder, optimiser, schedule, device)
        self.seats: tuple[str, ...] = decoder.seats
        """Seats of the network, in order."""
        self._exclusive = exclusive
        self._leaves: dict[str, dict[str, Tensor]] = {}
        self._logits: Tensor | None = None

    def step(
        self,
        activations: Activations,
        target: np.ndarray | Tensor,
        absent: Collection[str] = (),
        have: Mapping[str, np.ndarray] | None = None,
    ) -> tuple[float, dict[str, Arrays]]:
        """Train the decoder on one batch; returns the loss and gradients {seat: {"x0": float32, ...}}.

        Args:
            activations: {seat: {"x0": float32 [B, C, *spatial], ...}}.
            target: [B, regions, *spatial], zeros and ones.
            absent: seats that no sample of the batch has.
            have: by seat that only some samples have, which (bool [B]); the others' rows are zeros.

        Raises:
            ValueError: seats, levels or the target's shape do not match.
            JobFailed: the loss or its gradient is not finite (SP-11-10); the decoder is unchanged.
        """
        value = self._lose(activations, target, absent, have, inputs=True)
        return value, self._finish()

    def learn(
        self,
        activations: Activations,
        target: np.ndarray | Tensor,
        absent: Collection[str] = (),
        have: Mapping[str, np.ndarray] | None = None,
    ) -> float:
        """As `step`, with no gradient for the sites: the decoder learns the same, and the loss is returned."""
        value = self._lose(activations, target, absent, have, inputs=False)
        self._finish()
        return value

    def _lose(
        self,
        activations: Activations,
        target: np.ndarray | Tensor,
        absent: Collection[str],
        have: Mapping[str, np.ndarray] | None,
        *,
        inputs: bool,
    ) -> float:
        """The loss of a batch, and backward through the decoder; through its inputs as well, if asked for."""
        logits = self._decode(activations, absent, have, inputs=inputs)
        target = _tensor(target, self.device)
        expected = (logits.shape[0], logits.shape[1] - self._exclusive, *logits.shape[2:])
        if target.shape != expected:
            self._forget()
            raise ValueError(f"target is {tuple(target.shape)}, expected {expected}")
        loss = task_loss(logits, target, exclusive=self._exclusive)
        value = loss.item()
        if not math.isfinite(value):
            self._forget()
            raise _diverged("the loss", self.steps_done)
        loss.backward()
        return value

    def decode(
        self,
        activations: Activations,
        absent: Collection[str] = (),
        have: Mapping[str, np.ndarray] | None = None,
    ) -> np.ndarray:
        """Logits float32 [B, channels, *spatial] for the holder of the labels; a step is then pending.

        Args:
            absent, have: as in `step`.

        Raises:
            JobFailed: the logits are not finite; nothing is pending then.
        """
        logits = self._decode(activations, absent, have)
        if not all_finite(logits):
            self._forget()
            raise _diverged("the prediction", self.steps_done)
        return _array(logits)

    def apply(self, gradient: np.ndarray) -> dict[str, Arrays]:
        """End a step begun with `decode`, given the loss's gradient by the logits: the sites' gradients.

        Raises:
            RuntimeError: no decode is pending.
            ValueError: the gradient's shape is not the logits'; the step stays pending.
            JobFailed: the gradient is not finite; the step stays pending.
        """
        if self._logits is None:
            raise RuntimeError("apply without a pending decode")
        if tuple(gradient.shape) != tuple(self._logits.shape):
            raise ValueError(
                f"gradient of the logits is {gradient.shape}, expected {tuple(self._logits.shape)}"
            )
        arrived = _tensor(gradient, self.device)
        if not all_finite(arrived):
            raise _diverged("the gradient of the logits", self.steps_done)
        self._logits.backward(arrived)
        return self._finish()

    def predict(self, activations: Activations, absent: Collection[str] = ()) -> np.ndarray:
        """Probabilities float32 [B, channels, *spatial]; no graph, and a pending step stays as it is."""
        logits = self._evaluated(activations, absent)
        return _array(probabilities(logits, exclusive=self._exclusive))

    def _evaluated(self, activations: Activations, absent: Collection[str]) -> Tensor:
        """Logits [B, channels, *spatial] without a graph."""
        with self._evaluating():
            logits: Tensor = self.network(self._tensors(activations), absent)
        return logits

    def _decode(
        self,
        activations: Activations,
        absent: Collection[str],
        have: Mapping[str, np.ndarray] | None,
        *,
        inputs: bool = True,
    ) -> Tensor:
        """`inputs`: whether gradients by the activations are wanted."""
        self._forget()
        leaves = self._tensors(activations)
        for levels in leaves.values() if inputs else ():
            for leaf in levels.values():
                leaf.requires_grad_()
        held = {seat: torch.from_numpy(rows).to(self.device) for seat, rows in (have or {}).items()}
        with self._autocast():
            logits = self._trained(leaves, absent, held)
        self._leaves, self._logits = leaves if inputs else {}, logits.float()
        return self._logits

    def _trained(
        self, leaves: Mapping[str, Mapping[str, Tensor]], absent: Collection[str], held: Mapping[str, Tensor]
    ) -> Tensor:
        """The network's logits, with a graph. With several ranks, their gradients are summed through it."""
        logits: Tensor = self.network(leaves, absent, held)
        return logits

    def _finish(self) -> dict[str, Arrays]:
        gradients = self._gradients()
        self._forget()
        for seat, levels in gradients.items():
            for name, gradient in levels.items():
                if not all_finite(gradient):
                    self._discard()
                    raise _diverged(f"the gradient of {seat}'s {name}", self.steps_done)
        self._apply()
        return {
            seat: {name: _array(gradient) for name, gradient in levels.items()}
            for seat, levels in gradients.items()
        }

    def _gradients(self) -> dict[str, dict[str, Tensor]]:
        """What came back to the inputs of the decoder."""
        return {
            seat: {name: _gradient(leaf) for name, leaf in levels.items()}
            for seat, levels in self._leaves.items()
        }

    def _discard(self) -> None:
        """Nothing is learned from the step."""
        self.optimiser.zero_grad()

    def _tensors(self, activations: Activations) -> dict[str, dict[str, Tensor]]:
        return {
            seat: {name: _tensor(array, self.device) for name, array in levels.items()}
            for seat, levels in activations.items()
        }

    def _forget(self) -> None:
        self._leaves, self._logits = {}, None


def _gradient(leaf: Tensor) -> Tensor:
    """What came back to an input of the decoder."""
    if leaf.grad is None:
        raise RuntimeError("a level takes no part in the loss")
    return leaf.grad


def _foreign(name: str) -> DataError:
    return DataError(
        f"checkpoint does not fit this network ({name} differs); take one made with the job's own settings"
    )


def _diverged(what: str, step: int) -> JobFailed:
    return JobFailed(f"{what} at step {step} is not a finite number; lower the learning rate")


def _tensor(source: np.ndarray | Tensor, device: torch.device) -> Tensor:
    """float32 on `device`; shares an array's memory where torch may (writable, aligned, contiguous)."""
    if isinstance(source, np.ndarray):
        flags = source.flags
        if not (flags.writeable and flags.aligned and flags.c_contiguous and source.dtype == np.float32):
            source = np.array(source, dtype=np.float32, order="C")
        source = torch.from_numpy(source)
    return source.detach().to(device, torch.float32)


def _array(tensor: Tensor) -> np.ndarray:
    """float32, C order, read-only: it may be the very memory that a graph still needs."""
    array = np.ascontiguousarray(tensor.detach().float().cpu().numpy())
    array.flags.writeable = False
    return array


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True)
