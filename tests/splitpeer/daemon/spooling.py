"""What tests of the spool share: a task, a request, and a result of it."""

from __future__ import annotations

import numpy as np

from splitpeer.daemon.spooled import Provenance, SpoolRequest, SpoolResult, TaskForm, now
from splitpeer.data.task import Region, Task

TASK = Task({1: "edema", 2: "core"}, (Region("whole", (1, 2)), Region("core", (2,))))


def request(patient: str = "P007", **fields: object) -> SpoolRequest:
    """A request, made now."""
    return SpoolRequest(patient=patient, created=now(), asker="anna", **fields)  # type: ignore[arg-type]


def provenance(asked: SpoolRequest, affine: np.ndarray | None = None, **fields: object) -> Provenance:
    """What a result of `asked` was made from: t1 took part, flair did not."""
    rows = np.eye(4) if affine is None else affine
    values: dict[str, object] = {
        "patient": asked.patient,
        "run": "ab" * 8,
        "job": "glioma",
        "step": 40,
        "digest": "cd" * 32,
        "used": ("t1",),
        "missing": ("flair",),
        "modalities": {"t1": ("t1",), "flair": ("flair",)},
        "task": TaskForm.of(TASK),
        "affine": tuple(tuple(float(value) for value in row) for row in rows),
        "asked": asked.created,
        "created": now(),
    }
    return Provenance(**{**values, **fields})  # type: ignore[arg-type]


def mask(asked: SpoolRequest, shape: tuple[int, int, int] = (6, 5, 4)) -> SpoolResult:
    """A result of `asked`: half of the volume is whole, a quarter is core."""
    values = np.zeros((2, *shape), np.uint8)
    values[0, : shape[0] // 2] = 1
    values[1, : shape[0] // 2, : shape[1] // 2] = 1
    return SpoolResult(provenance(asked), "mask", values)
