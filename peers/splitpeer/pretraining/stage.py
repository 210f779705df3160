"""One stage: steps of an encoder, or of those of all seats, with a decoder that is thrown away; with checkpoints.

The halves are those of a run, with nothing between them. Without labels, what the decoder gives is an image, and the
true one stands where labels at a site would.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from splitpeer.daemon.lock import StateLock
from splitpeer.defences.randomness import Release
from splitpeer.errors import ConfigError, JobFailed
from splitpeer.logs import event
from splitpeer.models.backbone import Encoder
from splitpeer.models.backbone import Fusion as DecoderFusion
from splitpeer.models.cut import Backbone
from splitpeer.models.registry import build_decoder, build_encoder
from splitpeer.models.seeding import PRIVATE_ENTROPY_BITS
from splitpeer.pretraining.encoder_file import EncoderFacts, Past, load
from splitpeer.pretraining.examples import Drawing, Examples
from splitpeer.pretraining.information import InformationBottleneck, PricedHalf
from splitpeer.storage import checkpoint
from splitpeer.training.optimiser import make_optimiser, make_schedule
from splitpeer.training.split_round import Parties, Place, split_round
from splitpeer.training.split_step import ClientHalf, CoordinatorHalf
from splitpeer.training.sums import SUM
from splitproto.records import Fusion

log = logging.getLogger(__name__)

KEEP = 2
"""Checkpoints of a stage."""
MEMORY = 0.98
"""Weight of the past in the average loss: about the last fifty steps count."""
ALONE = Place("", "seat")
FINGERPRINT_DIGITS = 8
"""Of a network: few enough to compare by telephone."""
_NUMBERS = "encoder", "decoder", "windows", "noise"
"""What is drawn, each from entropy of its own."""

Progress = Callable[[int, int, float], None]
"""Told the steps done, of how many, and the average loss."""


@dataclass(frozen=True)
class Together:
    """The network of a whole job, of which one encoder is kept: each learns what the others leave to it."""

    places: tuple[tuple[str, str, int], ...]
    """Sites, seats, and the channels of their images."""
    seat: str
    """Whose encoder is kept."""
    fusion: DecoderFusion
    """What the decoder does with the seats."""
    terms: Fusion | None
    """Of a secure sum."""


@dataclass(frozen=True)
class Stage:
    """What is done, on whose images."""

    data: str
    """Name of the data: `encoder_file.OWN`, or another."""
    channels: int
    """What the decoder yields: regions, or classes; without labels, the image's channels."""
    labels: bool
    exclusive: bool
    """Whether the regions exclude each other."""
    steps: int
    batch: int
    optimiser: str
    learning_rate: float
    weight_decay: float
    schedule: str
    augment: bool
    positive_fraction: float
    seed: int | None
    """None: private entropy."""
    secret: str | None = None
    """Fingerprint of the secret that `seed` comes from: the file tells this, and no seed."""
    every: int = 100
    """Steps from checkpoint to checkpoint."""
    device: str = "cpu"
    together: Together | None = None
    """With labels only; None: this encoder has a decoder of its own."""
    bottleneck: InformationBottleneck | None = None
    """With labels only."""


@dataclass(frozen=True)
class Trained:
    """What a stage came to."""

    tensors: dict[str, Tensor]
    """The encoder's, on the CPU."""
    others: dict[str, dict[str, Tensor]]
    """By seat, those of the other encoders that were trained with it."""
    past: Past


def train(
    stage: Stage,
    backbone: Backbone,
    described: EncoderFacts,
    make: Callable[[Drawing], Examples],
    folder: Path,
    *,
    start: Mapping[str, Tensor] | None = None,
    progress: Progress = lambda done, steps, loss: None,
) -> Trained:
    """Make all steps of a stage, from its last checkpoint if there is one.

    Args:
        described: the encoder, and the stages before this one.
        make: the examples, given how to draw them; not called where all steps are made.
        folder: this stage's own; checkpoints of another are refused.
        start: the encoder's first weights; None: drawn from the stage's seed.

    Raises:
        ConfigError: the folder holds another pretraining, or one that is under way.
        DataError: a file, or a checkpoint, cannot be read or written.
        JobFailed: the loss is no finite number, or no patient is left.
    """
    lock = StateLock(folder)
    if not lock.take():
        raise ConfigError(
            f"{folder}: another pretraining is at work here: wait for it, or name another --out"
        )
    try:
        run = _Halves(stage, backbone, described, folder, start)
        x, y, z = (*described.window, 1)[:3]
        draw = Drawing(
            (x, y, z),
            stage.batch,
            stage.steps,
            run.entropy("windows"),
            stage.augment,
            stage.positive_fraction,
        )
        examples = make(draw) if run.done < stage.steps else None
        while examples is not None and run.done < stage.steps:
            images, target = examples.batch(run.done)
            run.step(list(images.values()), target, examples.patients)
            progress(run.done, stage.steps, run.loss)
            if run.done % stage.every == 0 or run.done == stage.steps:
                run.save()
        return Trained(run.encoder(), run.others(), run.past())
    finally:
        lock.release()


class _Halves:
    """Both halves of a stage, and how far they are."""

    def __init__(
        self,
        stage: Stage,
        backbone: Backbone,
        described: EncoderFacts,
        folder: Path,
        start: Mapping[str, Tensor] | None,
    ) -> None:
        self._stage, self._folder = stage, folder
        self._plan = _plan(stage, described, start)
        last, meta = self._last()
        drawn = secrets.randbits(PRIVATE_ENTROPY_BITS) if stage.seed is None else stage.seed
        self._entropy = int(meta["entropy"], 16) if meta else drawn
        self.loss, self._first = (float(meta["loss"]), float(meta["first"])) if meta else (math.nan, math.nan)
        self._patients = int(meta["patients"]) if meta else 0
        encoders = self._encoders(backbone, len(described.modalities))
        sites = {place: self._half(place, encoder, len(encoders)) for place, encoder in encoders.items()}
        whole = stage.together
        self._terms = whole.terms if whole is not None else None
        self._site = next(half for place, half in sites.items() if whole is None or place.seat == whole.seat)
        if start is not None:
            load(self._site.network, start)
        decoder = build_decoder(
            backbone,
            (SUM,) if self._terms is not None else [place.seat for place in sites],
            whole.fusion if whole is not None else "concat",
            stage.channels,
            exclusive=stage.exclusive,
            seed=self.entropy("decoder"),
        )
        if not stage.labels and decoder.last.bias is not None:
            nn.init.zeros_(decoder.last.bias)  # an image is no rare foreground
        other = CoordinatorHalf(decoder, *self._stepping(decoder), stage.device, exclusive=stage.exclusive)
        self._parties = Parties(other, sites, threads=torch.get_num_threads())
        if last:
            for name, half in self._named():
                half.load(
                    {key.removeprefix(name): t for key, t in last.items() if key.startswith(name)}, meta
                )

    @property
    def done(self) -> int:
        """Steps made."""
        return self._site.steps_done

    def entropy(self, what: str, seat: str = "") -> int:
        """128 bits for one of `_NUMBERS`: SHA-256 of the stage's seed or entropy."""
        text = f"splitpeer pretraining\0{_NUMBERS.index(what)}\0{self._entropy}" + (
            f"\0{seat}" if seat else ""
        )
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:16], "big")

    def step(self, images: Sequence[np.ndarray], target: np.ndarray, patients: int) -> None:
        """Raises JobFailed: a number is not finite."""
        if self._stage.labels:
            shown = dict(zip(self._parties.sites, images, strict=True))
            release = Release(b"", "train", self.done + 1, 0, ())
            loss = split_round(self._parties, shown, target, release, terms=self._terms)
        else:
            loss = self._restore(images[0], target)
        self._patients = max(self._patients, patients)
        self._first = loss if math.isnan(self._first) else self._first
        self.loss = loss if math.isnan(self.loss) else MEMORY * self.loss + (1 - MEMORY) * loss

    def _restore(self, images: np.ndarray, true: np.ndarray) -> float:
        """A step towards the images as they were; returns the loss."""
        decoder = self._parties.coordinator
        loss, gradient = squared_error(decoder.decode({ALONE.seat: self._site.forward(images)}), true)
        if not math.isfinite(loss):
            raise JobFailed(f"the loss at step {self.done} is not a finite number; lower the learning rate")
        self._site.backward(decoder.apply(gradient)[ALONE.seat])
        return loss

    def save(self) -> None:
        """Raises DataError: it cannot be written."""
        _, meta = self._site.state()
        tensors: dict[str, Tensor] = {}
        for prefix, half in self._named():
            tensors |= {prefix + name: tensor for name, tensor in half.state()[0].items()}
        meta |= {"plan": self._plan, "entropy": f"{self._entropy:x}", "loss": self.loss, "first": self._first}
        meta["patients"] = self._patients
        checkpoint.save(self._folder, self.done, tensors, meta, KEEP)
        event(log, "pretraining.checkpoint", step=self.done, steps=self._stage.steps, loss=self.loss)

    def encoder(self) -> dict[str, Tensor]:
        """A copy of its weights."""
        return _weights(self._site)

    def others(self) -> dict[str, dict[str, Tensor]]:
        """Copies of the other encoders' weights, by seat."""
        return {
            place.seat: _weights(half)
            for place, half in self._parties.sites.items()
            if half is not self._site
        }

    def past(self) -> Past:
        """For the encoder's file."""
        s = self._stage
        return Past(
            s.data, "regions" if s.labels else "none", self._patients, s.steps, s.batch, s.optimiser, s.learning_rate,
            None if s.secret else s.seed, (self._first, self.loss), len(self._parties.sites), s.secret, self._network(),
            *((s.bottleneck.noise, s.bottleneck.rate) if s.bottleneck is not None else (0.0, 0.0)),
        )  # fmt: skip

    def _network(self) -> str | None:
        """First digits of a SHA-256 over all halves; None: this encoder was trained alone."""
        if self._stage.together is None:
            return None
        halves = {prefix + name: t for prefix, half in self._named() for name, t in _weights(half).items()}
        return checkpoint.encode(0, halves, {})[1][:FINGERPRINT_DIGITS]

    def _encoders(self, backbone: Backbone, channels: int) -> dict[Place, Encoder]:
        """Drawn from the stage's entropy."""
        if (whole := self._stage.together) is None:
            return {ALONE: build_encoder(backbone, channels, seed=self.entropy("encoder"))}
        return {
            Place(site, seat): build_encoder(backbone, shown, seed=self.entropy("encoder", seat))
            for site, seat, shown in whole.places
        }

    def _half(self, place: Place, encoder: Encoder, encoders: int) -> ClientHalf:
        stage, stepping = self._stage, self._stepping(encoder)
        if stage.bottleneck is None:
            return ClientHalf(encoder, *stepping, stage.device)
        return PricedHalf(
            encoder, *stepping, stage.device, bottleneck=stage.bottleneck, steps=stage.steps, encoders=encoders,
            entropy=self.entropy("noise", place.seat),
        )  # fmt: skip

    def _named(self) -> Iterator[tuple[str, ClientHalf | CoordinatorHalf]]:
        """All halves, and what their tensors are called in a checkpoint."""
        yield "decoder/", self._parties.coordinator
        for place, half in self._parties.sites.items():
            yield f"encoder/{place.seat}/", half

    def _last(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The last whole checkpoint; ({}, {}) where there is none. Raises ConfigError: it is of something else."""
        if not (whole := checkpoint.available(self._folder)):
            return {}, {}
        tensors, meta, _ = checkpoint.load(self._folder, max(whole))
        if meta.get("plan") != self._plan:
            raise ConfigError(
                f"{self._folder}: holds another pretraining (other settings, weights or edition): add --force to begin "
                "again, or name another --out"
            )
        event(log, "pretraining.resumed", step=meta["step"], steps=self._stage.steps)
        return tensors, meta

    def _stepping(self, part: nn.Module) -> tuple[torch.optim.Optimizer, Any]:
        s = self._stage
        optimiser = make_optimiser(part.parameters(), s.optimiser, s.learning_rate, s.weight_decay)
        return optimiser, make_schedule(optimiser, s.schedule, s.steps)


def same_everywhere(stage: Stage) -> str:
    """All that decides the steps of a stage at every site: neither whose encoder is kept, nor the machine."""
    whole = replace(stage.together, seat="") if stage.together is not None else None
    alike = replace(stage, every=1, device="cpu", seed=None, secret=None, together=whole)
    return json.dumps(asdict(alike), sort_keys=True)


def _weights(half: ClientHalf | CoordinatorHalf) -> dict[str, Tensor]:
    """Copies, on the CPU."""
    return {name: t.detach().to("cpu", copy=True) for name, t in half.network.state_dict().items()}


def squared_error(prediction: np.ndarray, true: np.ndarray) -> tuple[float, np.ndarray]:
    """The mean over all voxels, and its gradient by the prediction; both float32 [B, channels, *spatial]."""
    off = prediction - true
    return float(np.square(off, dtype=np.float64).mean()), (2 / off.size) * off


def _plan(stage: Stage, described: EncoderFacts, start: Mapping[str, Tensor] | None) -> str:
    """What a checkpoint must belong to: SHA-256 over all that decides the steps, but for the images."""
    # Neither changes a weight.
    settings = asdict(replace(stage, every=1, device="cpu"))
    first = checkpoint.encode(0, start, {})[1] if start is not None else ""
    text = json.dumps([settings, asdict(described), first], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
