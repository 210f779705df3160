"""Settings of a Swin UNETR, and its size. Data alone; needs no torch.

Its encoder cannot be made on torch's meta device, so its weights are counted by formula: a site must know the size of
what a coordinator asks for before it makes any of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

from splitpeer.models.cut import Backbone, level_name
from splitproto.records import Level

STAGES = 4
MAX_FEATURE_SIZE = 252
"""Keeps the bottleneck, sixteen times as wide, below 4096 channels."""
MAX_DEPTH = 24
MAX_TOKENS = 512
"""Most tokens of one attention window, which are all compared with each other."""
WIDTHS = (1, 1, 2, 4, 8, 16)
"""Channels of the levels, in multiples of `feature_size`."""
PLAIN = 4
"""The level that is sent as the transformer leaves it, without a convolution block."""


def levels(dimensions: int, settings: Mapping[str, tuple[int, ...]]) -> tuple[Level, ...]:
    """Six levels, each half the size of the one before.

    Raises:
        ValueError: settings that MONAI's network or this module's limits do not allow.
    """
    sizes, depths, heads = settings["feature_size"], settings["depths"], settings["num_heads"]
    if len(sizes) != 1 or not 12 <= sizes[0] <= MAX_FEATURE_SIZE or sizes[0] % 12:
        raise ValueError(
            f"feature_size must be one multiple of 12 up to {MAX_FEATURE_SIZE}, not {list(sizes)}"
        )
    if len(depths) != STAGES or not all(1 <= depth <= MAX_DEPTH for depth in depths):
        raise ValueError(f"depths must be {STAGES} numbers from 1 to {MAX_DEPTH}, not {list(depths)}")
    widths = [sizes[0] << stage for stage in range(STAGES)]
    if len(heads) != STAGES or any(
        head < 1 or width % head for head, width in zip(heads, widths, strict=False)
    ):
        raise ValueError(f"num_heads must be {STAGES} divisors of {widths}, not {list(heads)}")
    window = settings["window_size"]
    if (
        len(window) not in (1, dimensions)
        or min(window) < 2
        or math.prod(_window(dimensions, window)) > MAX_TOKENS
    ):
        raise ValueError(
            f"window_size must be one number, or {dimensions}, each at least 2 and their product at most {MAX_TOKENS}, "
            f"not {list(window)}"
        )
    return tuple(
        Level(level_name(level), sizes[0] * wide, (2**level,) * dimensions)
        for level, wide in enumerate(WIDTHS)
    )


def encoder_parameters(backbone: Backbone, in_channels: int = 1) -> int:
    """How many weights the encoder has: of the transformer, and of one convolution block per level that is sent."""
    dimensions, settings = backbone.dimensions, backbone.settings
    (size,), window = settings["feature_size"], attention_window(backbone)
    table = math.prod(2 * width - 1 for width in window)
    total: int = size * in_channels * 2**dimensions + size  # the patches
    for stage, (depth, heads) in enumerate(zip(settings["depths"], settings["num_heads"], strict=True)):
        width = size << stage
        block = (
            12 * width**2 + 13 * width + table * heads
        )  # attention, then two layers of four times the width
        merging = 2**dimensions * width * (2 * width + 2)
        total += depth * block + merging
    for level, one in enumerate(backbone.cut.levels):
        if level in backbone.levels and level != PLAIN:
            arriving = one.channels if level else in_channels
            total += 3**dimensions * one.channels * (arriving + one.channels)
            total += arriving * one.channels if arriving != one.channels else 0
    return total


def kept_values(backbone: Backbone, window: Sequence[int]) -> int:
    """About how many values of one sample the transformer keeps from forward to backward, besides the levels.

    For each token of each block 14 times its width (measured) and, from each head, its comparison with its window.
    """
    return sum(
        depth * tokens * (14 * width + comparisons)
        for depth, (tokens, width, comparisons) in zip(
            backbone.settings["depths"], _blocks(backbone, window), strict=True
        )
    )


def passing_values(backbone: Backbone, window: Sequence[int]) -> int:
    """About how many values of one sample the largest block holds at once where nothing is kept for backward.

    Comparisons count twice: their weights are made from them.
    """
    return max(
        tokens * (14 * width + 2 * comparisons) for tokens, width, comparisons in _blocks(backbone, window)
    )


def _blocks(backbone: Backbone, window: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """For a block of each stage: tokens of one sample, their width, comparisons of one token (all heads together)."""
    settings = backbone.settings
    for stage, heads in enumerate(settings["num_heads"]):
        tokens = compared = 1
        for size, most in zip(window, attention_window(backbone), strict=True):
            side = size >> (stage + 1)
            most = min(most, side)
            tokens *= -(-side // most) * most
            compared *= most
        yield tokens, settings["feature_size"][0] << stage, heads * compared


def attention_window(backbone: Backbone) -> tuple[int, ...]:
    """Sides of the windows in which tokens attend to each other, in tokens, one per axis."""
    return _window(backbone.dimensions, backbone.settings["window_size"])


def _window(dimensions: int, given: tuple[int, ...]) -> tuple[int, ...]:
    return given * dimensions if len(given) == 1 else given
