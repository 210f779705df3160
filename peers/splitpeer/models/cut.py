"""The cut: which tensors an encoder yields, and which of them leave the site. Data alone; needs no torch.

A network is whatever produces and consumes a cut. A job's description of it on the wire, the size of a batch
and the windows that fit follow from it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from splitproto.records import Level

MAX_LEVELS = 16
OUT_CHANNELS = 3
"""Default of a decoder: the regions of a glioma."""


def level_name(level: int) -> str:
    """The name under which a level's tensor travels: "x0" is the finest."""
    return f"x{level}"


def level_number(name: str) -> int:
    """The inverse of `level_name`."""
    return int(name[1:])


@dataclass(frozen=True)
class Cut:
    """SP-11.8-1: all levels of an encoder, finest first, and which of them are sent.

    Raises:
        ValueError: no network could have this cut.
    """

    levels: tuple[Level, ...]
    sent: tuple[int, ...]
    """Ascending; the last level, the bottleneck, is among them."""

    def __post_init__(self) -> None:
        count, sent = len(self.levels), self.sent
        if not 0 < count <= MAX_LEVELS or len({level.name for level in self.levels}) < count:
            raise ValueError(f"a cut has 1 to {MAX_LEVELS} levels with distinct names")
        if not set(sent) <= set(range(count)) or len(set(sent)) < len(sent):
            raise ValueError(f"levels must be distinct and of 0 to {self.bottleneck}, not {list(sent)}")
        if self.bottleneck not in sent:
            raise ValueError(
                f"level {self.bottleneck}, the bottleneck, must leave the site: "
                "without it there is nothing to decode"
            )
        if list(sent) != sorted(sent):
            raise ValueError(f"levels must ascend: {list(sent)}")
        finer = (1,) * self.dimensions
        for level in self.levels:
            if self.dimensions not in (2, 3) or len(level.stride) != self.dimensions:
                raise ValueError(f"dimensions must be 2 or 3, a stride each: not {list(level.stride)}")
            if level.channels < 1 or any(s < 1 or s % f for s, f in zip(level.stride, finer, strict=True)):
                raise ValueError(
                    f"level {level.name}: channels must be positive, its stride {list(level.stride)} a multiple of "
                    f"the finer level's {list(finer)}"
                )
            finer = level.stride

    @property
    def dimensions(self) -> int:
        """2 (slices) or 3 (volumes)."""
        return len(self.levels[0].stride)

    @property
    def bottleneck(self) -> int:
        """The number of the coarsest level."""
        return len(self.levels) - 1

    @property
    def stride(self) -> tuple[int, ...]:
        """The bottleneck's stride, of which a window's sizes are multiples."""
        return self.levels[-1].stride

    def step(self, level: int) -> tuple[int, ...]:
        """How much coarser a level is than the one before it (the first: than the image), along each axis."""
        finer = self.levels[level - 1].stride if level else (1,) * self.dimensions
        return tuple(s // f for s, f in zip(self.levels[level].stride, finer, strict=True))

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the levels that are sent."""
        return tuple(self.levels[level].name for level in self.sent)

    @property
    def withheld(self) -> tuple[int, ...]:
        """The levels that are not sent."""
        return tuple(level for level in range(len(self.levels)) if level not in self.sent)

    @property
    def channels(self) -> dict[str, int]:
        """Name to channels of the levels that are sent."""
        return {self.levels[level].name: self.levels[level].channels for level in self.sent}

    def shape(self, level: int, window: Sequence[int]) -> tuple[int, ...]:
        """[channels, *spatial] of one sample."""
        one = self.levels[level]
        return (one.channels, *(size // step for size, step in zip(window, one.stride, strict=True)))

    def shapes(self, batch: int, window: Sequence[int]) -> dict[str, tuple[int, ...]]:
        """[batch, channels, *spatial] of the tensors that are sent.

        Raises:
            ValueError: the window does not fit the network.
        """
        self.check_window(window)
        return {self.levels[level].name: (batch, *self.shape(level, window)) for level in self.sent}

    def octets(self, batch: int, window: Sequence[int]) -> int:
        """SP-11-28: bytes of all levels as float32, whether they are sent or not."""
        return 4 * batch * sum(math.prod(self.shape(level, window)) for level in range(len(self.levels)))

    def check_window(self, window: Sequence[int]) -> None:
        """Raises ValueError: the bottleneck would not be whole, or a single value, which nothing normalises."""
        sizes, stride = list(window), self.stride
        rule = str(stride[0]) if len(set(stride)) == 1 else str(list(stride))
        if len(sizes) != self.dimensions or any(
            size < step or size % step for size, step in zip(sizes, stride, strict=True)
        ):
            raise ValueError(f"window {sizes} must have {self.dimensions} sizes, each divisible by {rule}")
        if sizes == list(stride):
            raise ValueError(
                f"window {sizes} leaves one value at level {self.bottleneck}, too few to normalise: "
                f"use {2 * max(stride)} or more"
            )


@dataclass(frozen=True)
class Backbone:
    """Which network, with which settings, and the cut that follows: all that is needed to build either half."""

    network: str
    """A name of `registry.NETWORKS`."""
    settings: Mapping[str, tuple[int, ...]]
    cut: Cut
    widths: tuple[int, ...] = ()
    """Channels that the encoder's levels are narrowed to, for each that is sent; empty: as the network yields them."""

    @property
    def dimensions(self) -> int:
        """2 (slices) or 3 (volumes)."""
        return self.cut.dimensions

    @property
    def levels(self) -> tuple[int, ...]:
        """The levels that are sent."""
        return self.cut.sent
