"""Checkpoints on disk: one safetensors file a step, which carries its own digest.

`step-00000300.safetensors` holds the tensors (model and optimiser, by name) and, in the header's metadata,
`meta` as JSON and the SHA-256 over all of it. One file means one rename, and a rename either happened or
did not: after a crash there is the old state, or the new one, or a `.part` that nobody reads. safetensors
holds no code, unlike a pickle.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from splitpeer.errors import DataError, DiskTrouble
from splitpeer.storage import descriptors, durable, reading

KEEP = 3
MAX_BYTES = 16 << 30
"""Largest checkpoint that is read: four billion float32 values."""
_NAME = re.compile(r"step-(\d{8})\.safetensors")
_DIGEST, _META = "splitpeer.sha256", "splitpeer.meta"
log = logging.getLogger(__name__)


def save(
    folder: Path,
    step: int,
    half_state: Mapping[str, Tensor],
    meta: Mapping[str, Any],
    keep: int | Collection[int] = KEEP,
) -> str:
    """Write the checkpoint of `step` durably, and only then remove older ones.

    Args:
        folder: created (mode 0700) if need be. It belongs to this party alone: a `.part` found here is
            removed.
        step: steps done, 0 to 99,999,999.
        half_state: tensors by name, on the CPU.
        meta: what JSON can hold.
        keep: how many stay in all, the new one included (the oldest others go); or which steps stay in
            addition to it (all others go).

    Returns:
        The digest, 64 hexadecimal digits: equal exactly if all tensors, their names and `meta` are equal.

    Raises:
        DataError: the folder cannot be written (`DiskTrouble` where the disk is full). Every earlier checkpoint is
            intact.
    """
    if not 0 <= step < 10**8:
        raise ValueError(f"step must be 0 to 99,999,999, not {step}")
    if isinstance(keep, int) and keep < 1:
        raise ValueError(f"at least one checkpoint must be kept, not {keep}")
    data, digest = encode(step, half_state, meta)
    path = _path(folder, step)
    try:
        # First, as it makes room.
        for left_over in descriptors.spared(lambda: list(folder.glob(f"*{durable.PART}"))):
            os.unlink(left_over)
        durable.make_folder(folder)
        durable.replace(path, data)
    except OSError as error:
        kind = DiskTrouble if error.errno in durable.TROUBLE else DataError
        fix = descriptors.FIX if error.errno in descriptors.EXHAUSTED else "free or change the folder"
        raise kind(f"{path}: checkpoint not written ({error.strerror}); {fix}") from error
    if isinstance(keep, int):
        others = [other for other in steps_in(folder) if other != step]
        keep = others[max(len(others) - (keep - 1), 0) :]
    prune(folder, {step, *keep})
    return digest


def encode(step: int, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> tuple[bytes, str]:
    """The bytes of a file that `read` takes, and its digest; arguments as for `save`."""
    held = {name: tensor.contiguous() for name, tensor in tensors.items()}
    described = json.dumps(dict(meta), sort_keys=True, allow_nan=False)
    digest = _digest(step, held, described)
    return safetensors.torch.save(held, {_DIGEST: digest, _META: described}), digest


def prune(folder: Path, keep: Collection[int]) -> None:
    """Remove the checkpoints of all steps but these. One that cannot be removed is a warning: it only takes room."""
    for step in steps_in(folder):
        if step not in keep:
            try:
                os.unlink(_path(folder, step))
            except OSError as error:
                log.warning("%s: old checkpoint not removed (%s)", _path(folder, step), error.strerror)


def load(folder: Path, step: int) -> tuple[dict[str, Tensor], dict[str, Any], str]:
    """(tensors, meta, digest) of the checkpoint of `step`, verified.

    Raises:
        DataError: there is none, or it is torn or altered.
    """
    path = _path(folder, step)
    if step not in (steps := steps_in(folder)):
        raise DataError(f"{path}: no such checkpoint; resume from one of {steps}")
    try:
        tensors, meta, digest = read(path, step)
    except DataError as error:
        raise DataError(f"{error}; resume from another step") from error
    return tensors, meta, digest


def read(path: Path, step: int | None = None) -> tuple[dict[str, Tensor], dict[str, Any], str]:
    """(tensors, meta, digest) of one checkpoint file, wherever it is, verified; `step` defaults to the file's own.

    Raises:
        DataError: it is not there, unreadable, torn or altered.
    """
    try:
        # Read, not mapped: a bad sector is an error here, and a SIGBUS that ends the process there.
        data = reading.read(path, MAX_BYTES, follow=True)
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    try:
        tensors = safetensors.torch.load(data)
        header = reading.parse(data[8 : 8 + int.from_bytes(data[:8], "little")]).get("__metadata__", {})
        described, digest = header.get(_META, ""), header.get(_DIGEST, "")
        meta = dict(reading.parse(described)) if described else {}
    except (ValueError, TypeError, LookupError, AttributeError, safetensors.SafetensorError) as error:
        raise DataError(f"{path}: torn or altered, not a whole safetensors file") from error
    if not described:
        raise DataError(
            f"{path}: torn or altered, or no checkpoint of splitpeer (they lie in a peer's state folder)"
        )
    if _digest(meta.get("step", 0) if step is None else step, tensors, described) != digest:
        raise DataError(f"{path}: torn or altered, the digest does not match")
    return tensors, meta, digest


def available(folder: Path) -> dict[int, str]:
    """{step: digest} of every whole checkpoint, oldest first; others are skipped with a logged warning.

    Every file is read completely, because these steps are reported to others as safe.

    Raises:
        DataError: the folder cannot be read.
    """
    whole = {}
    for step in steps_in(folder):
        try:
            whole[step] = load(folder, step)[2]
        except DataError as error:
            log.warning("checkpoint skipped: %s", error)
    return whole


def discard_after(folder: Path, step: int) -> None:
    """Remove the checkpoints of steps beyond `step`: after a rollback they belong to a run that no longer exists."""
    steps = steps_in(folder)
    try:
        for later in steps:
            if later > step:
                os.unlink(_path(folder, later))
        # Even if none was removed now: an earlier attempt may have died before it came here.
        if steps:
            durable.sync_folder(folder)
    except OSError as error:
        raise DataError(
            f"{folder}: a checkpoint cannot be removed ({error.strerror}); check the folder"
        ) from error


def _path(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}.safetensors"


def steps_in(folder: Path) -> list[int]:
    """Sorted. A folder that cannot be read is an error, as it is not the same as an empty one."""
    try:
        names = descriptors.spared(lambda: os.listdir(folder))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise DataError(
            f"{folder}: checkpoints cannot be read ({error.strerror}); check the folder and whose it is"
        ) from error
    return sorted(int(match[1]) for name in names if (match := _NAME.fullmatch(name)))


def _digest(step: int, tensors: Mapping[str, Tensor], described: str) -> str:
    """SHA-256 over the content, not the file: independent of how a writer orders or pads it."""
    shapes = {name: [str(tensor.dtype), list(tensor.shape)] for name, tensor in tensors.items()}
    digest = hashlib.sha256(json.dumps([1, step, described, shapes], sort_keys=True).encode())
    for name in sorted(tensors):
        digest.update(tensors[name].reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
