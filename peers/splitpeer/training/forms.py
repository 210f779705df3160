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
from splitproto.codings import CODINGS, Coding, Form, form_at, words
from splitproto.records import Job
from splitproto.tensors import DTYPES, Descriptor


@dataclass(frozen=True)
class WireForm:
    """What a tensor of each level is on the wire.

    Args:
        form: of all levels, or by level.
        shapes: by level, of one sample; a coding needs them.
    """

    form: Form
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def described(self, tensor: str, samples: int) -> Descriptor:
        """A tensor as it travels, called `x0`, or `mri/x0` at a site with several seats."""
        form, shape = self._of(tensor), self._shape(tensor)
        if form not in CODINGS:
            return Descriptor(tensor, form, (samples, *shape))
        return Descriptor(tensor, "u8", (samples, octets(form, math.prod(shape))))

    def to_wire(self, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Float32 arrays [samples, ...], by name, as they travel; bfloat16 (round to nearest even) as its 16 bits.

        Raises:
            TensorError: a value to be coded is not finite.
        """
        return {name: _sent(array, self._of(name)) for name, array in arrays.items()}

    def from_wire(self, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """What is read of them, float32.

        Raises:
            SchemaMismatch, TensorError: see `splitproto.codings.decode`.
        """
        return {name: self._received(name, array) for name, array in arrays.items()}

    def read(self, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """What the receiver reads of float32 arrays that are sent. Raises TensorError, see `to_wire`."""
        return self.from_wire(self.to_wire(arrays))

    def check(self, arrays: Mapping[str, np.ndarray]) -> None:
        """SP-11.21-5: scales, before memory is taken. Raises what `splitproto.codings.check` raises."""
        for name, array in arrays.items():
            if (form := self._of(name)) in CODINGS:
                codings.check(array, form, math.prod(self._shape(name)))

    def _received(self, tensor: str, array: np.ndarray) -> np.ndarray:
        form = self._of(tensor)
        if form == "bf16":
            return (array.astype(np.uint32) << 16).view(np.float32)
        return codings.decode(array, form, self._shape(tensor)) if form in CODINGS else array

    def _of(self, tensor: str) -> str:
        return form_at(self.form, _level(tensor))

    def _shape(self, tensor: str) -> tuple[int, ...]:
        return self.shapes[_level(tensor)]


def activations_form(job: Job) -> WireForm:
    """Of what sites send, in every mode.

    Raises:
        ValueError: a list has not one form for each level that is sent; from its shapes: the job's network is
            impossible.
    """
    return _form(job, job.activations)


def gradients_form(job: Job) -> WireForm:
    """Of what they get back. Raises what `activations_form` raises."""
    return _form(job, job.gradients)


class Forms(NamedTuple):
    """How a job's tensors travel in both directions."""

    activations: WireForm
    gradients: WireForm

    @classmethod
    def of(cls, job: Job) -> Forms:
        """Raises ValueError, see `activations_form`."""
        return cls(activations_form(job), gradients_form(job))


def octets(form: str, values: int) -> int:
    """Octets of so many values of one sample, in a form or a dtype of this name."""
    return codings.row_octets(form, values) if form in CODINGS else DTYPES[form].itemsize * values


def shown(coding: Coding | None, otherwise: str = "none") -> str:
    """For people: "int8", or "int4 int4 int8 f16 f32"."""
    return " ".join(words(coding)) or otherwise


def in_words(job: Job) -> str:
    """How a job's tensors travel: "bf16", or "int8, gradients int4"."""
    there, back = (shown(coding, job.precision) for coding in (job.activations, job.gradients))
    return there if there == back or job.frozen else f"{there}, gradients {back}"


def _form(job: Job, coding: Coding | None) -> WireForm:
    shapes = _CutShapes(job)
    if coding is None or isinstance(coding, str):
        return WireForm(coding or job.precision, shapes)
    # SP-11.21-8: "in the order of `levels`".
    by_level = dict(zip(cut_of(job).names, coding, strict=True))
    return WireForm(coding[0] if len(set(coding)) == 1 else by_level, shapes)


def _sent(array: np.ndarray, form: str) -> np.ndarray:
    if form == "bf16":
        import torch  # here: who only names a form needs none

        return torch.tensor(array).to(torch.bfloat16).view(torch.uint16).numpy()
    return codings.encode(array, form) if form in CODINGS else array


def _level(tensor: str) -> str:
    return tensor.rpartition("/")[2]


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
