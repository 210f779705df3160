"""The file that `splitpeer pretrain` writes and `[model] weights` of `peer.toml` names: one encoder's weights.

safetensors, as a checkpoint is, with its own digest. Its metadata say what the encoder is (network, settings, cut),
what it expects (modalities, normalisation, spacing) and what it was trained on, in numbers: no patient, no file, no
folder.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from splitpeer.errors import DataError
from splitpeer.models.cut import Backbone
from splitpeer.storage import checkpoint, durable

KIND = "splitpeer encoder"
EDITION = 2
OWN = "own"
"""Whose images a stage was trained on: this site's own. Other names are those of public data."""


@dataclass(frozen=True)
class Past:
    """One stage of an encoder's training, as its file tells it."""

    data: str
    """`OWN`, or a name of other data."""
    labels: str
    """"regions" or "none"."""
    patients: int
    steps: int
    batch: int
    optimiser: str
    learning_rate: float
    seed: int | None
    """None: private entropy, or a secret."""
    loss: tuple[float, float]
    """At the first step, and averaged over the last ones."""
    encoders: int = 1
    """That were trained as one network; this one was kept."""
    secret: str | None = None
    """Fingerprint of the hospitals' secret from which all was drawn."""
    network: str | None = None
    """Of encoders trained together: eight hexadecimal digits, the same in all files of one network."""
    noise: float = 0.0
    """Through which what left had to pass, see `InformationBottleneck`; 0: none."""
    rate: float = 0.0
    """Price of what got through the noise; 0: none."""


@dataclass(frozen=True)
class EncoderFacts:
    """All that a file says besides the weights."""

    network: str
    settings: Mapping[str, Sequence[int]]
    levels: tuple[tuple[str, int, tuple[int, ...]], ...]
    """All levels of the cut, sent or not: name, channels, stride."""
    modalities: tuple[str, ...]
    """Channels of the image."""
    normalisation: tuple[str, ...]
    """One rule a channel."""
    spacing: tuple[float, ...]
    """Millimetres; (): as stored."""
    window: tuple[int, ...]
    stages: tuple[Past, ...] = ()

    @classmethod
    def of(
        cls,
        backbone: Backbone,
        modalities: Sequence[str],
        normalisation: Sequence[str],
        spacing: Sequence[float],
        window: Sequence[int],
        stages: Sequence[Past] = (),
    ) -> EncoderFacts:
        """What an encoder of this network for these images is."""
        levels = tuple((one.name, one.channels, tuple(one.stride)) for one in backbone.cut.levels)
        settings = {name: list(values) for name, values in sorted(backbone.settings.items())}
        return cls(
            backbone.network, settings, levels, tuple(modalities), tuple(normalisation), tuple(spacing),
            tuple(window), tuple(stages),
        )  # fmt: skip

    @property
    def saw_own_images(self) -> bool:
        """Whether weights depend on the images of a site's patients."""
        return any(stage.data == OWN for stage in self.stages)

    @property
    def noise(self) -> float:
        """Behind which it learned, and which a site is to add to what leaves: that of the last stage."""
        return self.stages[-1].noise if self.stages else 0.0

    @property
    def rate(self) -> float:
        """What it paid for what got through the noise."""
        return self.stages[-1].rate if self.stages else 0.0

    @property
    def began_from_a_seed(self) -> bool:
        """Whether anyone can compute where the training started, and so, from public data, where it ended."""
        return bool(self.stages) and self.stages[0].seed is not None

    @property
    def of_network(self) -> str | None:
        """Which network of all seats the encoder is a part of; None: it was trained alone."""
        return next((stage.network for stage in self.stages if stage.network is not None), None)


@dataclass(frozen=True)
class EncoderFile:
    """A file that was read."""

    path: Path
    described: EncoderFacts
    tensors: Mapping[str, Tensor]
    digest: str
    """SHA-256 of all of it, hexadecimal."""

    def refuse_misfit(self, wanted: EncoderFacts) -> None:
        """Raises DataError, one line, where the encoder is another than is `wanted`, or expects other images."""
        mine = self.described
        for what, has, wants in (
            ("network", mine.network, wanted.network),
            ("cut", _in_words(mine), _in_words(wanted)),
            ("settings", dict(mine.settings), dict(wanted.settings)),
            ("channels", ", ".join(mine.modalities), ", ".join(wanted.modalities)),
            ("normalisation", ", ".join(mine.normalisation), ", ".join(wanted.normalisation)),
        ):
            if has != wants:
                raise DataError(
                    f"{self.path}: does not fit this job: its {what}: {has}, the job's: {wants}; make one with "
                    "splitpeer pretrain --job job.toml"
                )

    def load_into(self, encoder: nn.Module) -> None:
        """Give an encoder these weights. Raises DataError: they are not those of this encoder, or not all finite."""
        try:
            load(encoder, self.tensors)
        except DataError as error:
            raise DataError(f"{self.path}: {error}") from None


def load(encoder: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """The same with tensors by name. Raises DataError; the encoder is then unchanged."""
    mine = encoder.state_dict()
    if mine.keys() != tensors.keys() or any(mine[name].shape != t.shape for name, t in tensors.items()):
        raise DataError("the weights are not those of this encoder: make them with the job's own settings")
    if not all(torch.isfinite(t).all() for t in tensors.values()):
        raise DataError("the weights hold numbers that are not finite: make them with a lower learning rate")
    encoder.load_state_dict(dict(tensors))


def write(path: Path, tensors: Mapping[str, Tensor], described: EncoderFacts) -> str:
    """Write the file whole or not at all, mode 0600; returns its digest.

    Args:
        path: replaced where it exists.
        tensors: the encoder's, by name, on the CPU.

    Raises:
        ConfigError, DiskTrouble: it cannot be written.
    """
    steps = sum(stage.steps for stage in described.stages)
    meta = {"kind": KIND, "edition": EDITION, "step": steps, **asdict(described)}
    data, digest = checkpoint.encode(steps, tensors, meta)
    try:
        durable.replace(path, data)
    except OSError as error:
        raise durable.refusal(error, f"{path}:", "--out") from None
    return digest


def read(path: Path) -> EncoderFile:
    """Raises DataError, one line: missing, torn, altered, or not such a file."""
    tensors, meta, digest = checkpoint.read(path)
    if meta.get("kind") != KIND:
        raise DataError(
            f"{path}: is no encoder of splitpeer pretrain, but a checkpoint of a run: name another file"
        )
    if meta.get("edition") != EDITION:
        raise DataError(
            f"{path}: is of edition {meta.get('edition')}, this program reads {EDITION}: make it again"
        )
    try:
        described = _parsed(meta)
    except (LookupError, TypeError, ValueError):
        raise DataError(
            f"{path}: its description is incomplete or contradicts itself: make it again with splitpeer pretrain"
        ) from None
    return EncoderFile(path, described, tensors, digest)


def _parsed(meta: Mapping[str, Any]) -> EncoderFacts:
    """Raises LookupError, TypeError, ValueError."""
    return EncoderFacts(
        network=str(meta["network"]),
        settings={str(name): [int(value) for value in values] for name, values in meta["settings"].items()},
        levels=tuple(
            (str(n), int(c), tuple(int(step) for step in stride)) for n, c, stride in meta["levels"]
        ),
        modalities=tuple(map(str, meta["modalities"])),
        normalisation=tuple(map(str, meta["normalisation"])),
        spacing=tuple(map(float, meta["spacing"])),
        window=tuple(map(int, meta["window"])),
        stages=_stages(meta["stages"]),
    )


def _stages(found: Sequence[Mapping[str, Any]]) -> tuple[Past, ...]:
    stages = tuple(map(_past, found))
    if any(before.noise and not after.noise for before, after in pairwise(stages)):
        raise ValueError("steps without the noise teach an encoder to show images again")
    return stages


def _past(stage: Mapping[str, Any]) -> Past:
    if stage.keys() != {field.name for field in fields(Past)}:
        raise ValueError("a default would be a claim that nobody made")
    first, last = stage["loss"]
    if not all(type(stage[name]) is float and 0 <= stage[name] < math.inf for name in ("noise", "rate")):
        raise ValueError("no figure of a recipe")
    return Past(**{**stage, "loss": (float(first), float(last))})


def _in_words(described: EncoderFacts) -> str:
    return " ".join(f"{channels}@{'x'.join(map(str, stride))}" for _, channels, stride in described.levels)
