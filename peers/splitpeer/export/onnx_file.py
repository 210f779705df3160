"""ONNX of what a bundle holds: a batch of any size, windows of the job's size, compared with PyTorch where
onnxruntime is installed."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from splitpeer.errors import DataError, needs
from splitpeer.export.half import DECODER, WHOLE, Half, built

OPSET = 18
FACTOR = 8
"""Of float32's rounding, by which an output may differ relative to its own largest value; see `tolerance`."""


@dataclass(frozen=True)
class Exported:
    """One file."""

    name: str
    data: bytes
    inputs: Mapping[str, Sequence[int]]
    """By name, the size of one sample."""
    outputs: tuple[str, ...]
    apart: float | None
    """Largest difference from PyTorch, relative to the output's largest value; None: not compared."""


class _Named(nn.Module):
    """Tensors by position to tensors by position, as ONNX has them."""

    def __init__(self, network: nn.Module, inputs: Sequence[str], outputs: Sequence[str]) -> None:
        super().__init__()
        self.network, self.inputs, self.outputs = network, tuple(inputs), tuple(outputs)

    def forward(self, *tensors: Tensor) -> Any:
        given = tensors[0] if self.inputs == ("image",) else dict(zip(self.inputs, tensors, strict=True))
        made = self.network(given)
        return made if isinstance(made, Tensor) else tuple(made[name] for name in self.outputs)


def exported(half: Half) -> list[Exported]:
    """All files: an encoder for each seat, a decoder, or the whole network.

    Raises:
        ConfigError: the packages are not installed.
        DataError: torch cannot export the network, or what it exported computes something else.
    """
    for package in ("onnx", "onnxscript"):
        if importlib.util.find_spec(package) is None:
            raise needs("--onnx", package, "onnx")
    return [_exported(name, network, inputs, outputs) for name, network, inputs, outputs in _parts(half)]


def _parts(half: Half) -> Iterator[tuple[str, nn.Module, dict[str, list[int]], list[str]]]:
    """File, network, sample sizes by input, names of the outputs."""
    facts, window = half.facts, list(half.facts["window"])
    levels = {name: [channels, *shape] for name, (channels, shape) in facts["cut"].items()}
    if facts["kind"] == DECODER:
        inputs = {
            f"{seat}/{name}": size for seat in facts["decoder"]["seats"] for name, size in levels.items()
        }
        yield "models/decoder.onnx", built(half), inputs, ["logits"]
        return
    channels = {seat: len(held) for seat, held in facts["seats"].items()}
    if facts["kind"] == WHOLE:
        yield "models/network.onnx", built(half), {"image": [sum(channels.values()), *window]}, ["logits"]
        return
    for seat, count in channels.items():
        outputs = [f"{seat}/{name}" for name in levels]
        yield f"models/encoder-{seat}.onnx", built(half, seat), {"image": [count, *window]}, outputs


def _exported(
    name: str, network: nn.Module, sizes: Mapping[str, Sequence[int]], outputs: Sequence[str]
) -> Exported:
    wrapped = _Named(network, list(sizes), outputs).eval()
    source = torch.Generator().manual_seed(0)
    # Two samples: a size of one would be taken for a constant.
    example = tuple(torch.randn(2, *size, generator=source) for size in sizes.values())
    batch = torch.export.Dim("batch")
    buffer = io.BytesIO()
    try:
        with _quiet(), torch.no_grad():
            program = torch.onnx.export(
                wrapped, example, input_names=list(sizes), output_names=list(outputs), opset_version=OPSET,
                dynamo=True, dynamic_shapes=(tuple({0: batch} for _ in sizes),), verbose=False,
            )  # fmt: skip
            if program is None:
                raise RuntimeError
            program.save(buffer)  # type: ignore[arg-type]
    except Exception as error:  # of many kinds, not all documented
        raise DataError(
            f"{name}: torch {torch.__version__} cannot export this network to ONNX ({type(error).__name__}): "
            "leave out --onnx"
        ) from error
    data = buffer.getvalue()
    return Exported(name, data, dict(sizes), tuple(outputs), _apart(name, data, wrapped, sizes, source))


def _apart(
    name: str, data: bytes, network: nn.Module, sizes: Mapping[str, Sequence[int]], source: torch.Generator
) -> float | None:
    """How far onnxruntime's results are from PyTorch's, with another batch than that of the export."""
    if importlib.util.find_spec("onnxruntime") is None:
        return None
    import onnxruntime

    given = {key: torch.randn(3, *size, generator=source) for key, size in sizes.items()}
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # what is wrong is told below
    try:
        session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
        found = session.run(None, {key: tensor.numpy() for key, tensor in given.items()})
    except Exception as error:  # of the library's own kinds
        raise DataError(f"{name}: onnxruntime cannot run what torch exported: leave out --onnx") from error
    with torch.no_grad():
        wanted = network(*given.values())
    pairs = zip((wanted,) if isinstance(wanted, Tensor) else wanted, found, strict=True)
    worst = max(float(np.abs(one.numpy() - other).max() / np.abs(one.numpy()).max()) for one, other in pairs)
    if worst > (allowed := tolerance(network)):
        raise DataError(
            f"{name}: differs from PyTorch by {worst:.2g} of its largest value, {allowed:.2g} is allowed"
        )
    return worst


def tolerance(network: nn.Module) -> float:
    """How far two correct implementations in float32 may be apart, relative to an output's largest value.

    Each convolution or product sums n values: in another order the sum is off by about sqrt(n) roundings of 2^-24
    relative to the terms (Higham, Accuracy and Stability of Numerical Algorithms, 2002, section 4.2); a normalisation
    behind it keeps that relative to its largest value. Layers one behind another add up; `FACTOR` covers what
    normalisation divides by.
    """
    sums = [
        module.weight[0].numel() ** 0.5
        for module in network.modules()
        if isinstance(module, (nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.Linear))
    ]
    return FACTOR * 2.0**-24 * float(np.sum(sums))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """torch's exporter tells of its own internals, in warnings, in its log and on the terminal."""
    noisy = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    before = [logger.level for logger in noisy]
    try:
        for logger in noisy:
            logger.setLevel(logging.CRITICAL)
        with (
            warnings.catch_warnings(action="ignore"),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            yield
    finally:
        for logger, level in zip(noisy, before, strict=True):
            logger.setLevel(level)
