"""Forms: how float32 tensors travel in one direction of a job: a precision (SP-11.8-3) or a coding (SP-11.21)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np

from splitpeer.models.registry import cut_of
from splitproto import codings
from splitproto.codings import CODINGS
from splitproto.records import Job
from splitproto.tensors import DTYPES, Descriptor


@dataclass(frozen=True)
class WireForm:
    """What a tensor of each level is on the wire.

    Args:
        name: a precision ("f32" or "bf16"), or one of `CODINGS`.
        shapes: by level, of one sample; a coding needs them.
    """

    name: str
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    @property
    def coded(self) -> bool:
        """Whether it is a coding, which travels as octets [samples, octets]."""
        return self.name in CODINGS

    def described(self, tensor: str, samples: int) -> Descriptor:
        """A tensor as it travels, called `x0`, or `mri/x0` at a site with several seats."""
        shape = self._shape(tensor)
        if not self.coded:
            return Descriptor(tensor, self.name, (samples, *shape))
        return Descriptor(tensor, "u8", (samples, octets(self.name, math.prod(shape))))

    def to_wire(self, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Float32 arrays [samples, ...], by name, as they travel; bfloat16 (round to nearest even) as its 16 bits.

        Raises:
            TensorError: a value to be coded is not finite.
        """
        if self.name == "bf16":
            import torch  # here: who only names a form needs none

            return {
                name: torch.tensor(array).to(torch.bfloat16).view(torch.uint16).numpy()
                for name, array in arrays.items()
            }
        if self.coded:
            return {name: codings.encode(array, self.name) for name, array in arrays.items()}
        return dict(arrays)

    def from_wire(self, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """What is read of them, float32.

        Raises:
            SchemaMismatch, TensorError: see `splitproto.codings.decode`.
        """
        if self.name == "bf16":
            return {name: (bits.astype(np.uint32) << 16).view(np.float32) for name, bits in arrays.items()}
        if self.coded:
            return {
                name: codings.decode(array, self.name, self._shape(name)) for name, array in arrays.items()
            }
        return dict(arrays)

    def read(self, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """What the receiver reads of float32 arrays that are sent. Raises TensorError, see `to_wire`."""
        return self.from_wire(self.to_wire(arrays))

    def check(self, arrays: Mapping[str, np.ndarray]) -> None:
        """SP-11.21-5: scales, before memory is taken. Raises what `splitproto.codings.check` raises."""
        for name, array in arrays.items() if self.coded else ():
            codings.check(array, self.name, math.prod(self._shape(name)))

    def _shape(self, tensor: str) -> tuple[int, ...]:
        return self.shapes[tensor.rpartition("/")[2]]


def activations_form(job: Job) -> WireForm:
    """Of what sites send, in every mode. Its shapes raise ValueError where the job's network is impossible."""
    return _form(job, job.activations)


def gradients_form(job: Job) -> WireForm:
    """Of what they get back. Raises ValueError: the job's network is impossible."""
    return _form(job, job.gradients)


class Forms(NamedTuple):
    """How a job's tensors travel in both directions."""

    activations: WireForm
    gradients: WireForm

    @classmethod
    def of(cls, job: Job) -> Forms:
        """Raises ValueError: the job's network is impossible."""
        return cls(activations_form(job), gradients_form(job))


def octets(form: str, values: int) -> int:
    """Octets of so many values of one sample, in a form or a dtype of this name."""
    return codings.row_octets(form, values) if form in CODINGS else DTYPES[form].itemsize * values


def in_words(job: Job) -> str:
    """How a job's tensors travel: "bf16", or "int8, gradients int4"."""
    there, back = activations_form(job).name, gradients_form(job).name
    return there if there == back or job.frozen else f"{there}, gradients {back}"


def _form(job: Job, coding: str | None) -> WireForm:
    return WireForm(coding or job.precision, _CutShapes(job))


class _CutShapes(Mapping[str, tuple[int, ...]]):
    """By level, of one sample; worked out when one is asked for."""

    def __init__(self, job: Job) -> None:
        self._job = job

    @cached_property
    def _all(self) -> dict[str, tuple[int, ...]]:
        return {name: shape[1:] for name, shape in cut_of(self._job).shapes(1, self._job.window).items()}

    def __getitem__(self, name: str) -> tuple[int, ...]:
        return self._all[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._all)

    def __len__(self) -> int:
        return len(self._all)
