"""A task for a site that has no masks: brightness bands of its own images, in place of regions.

How far activations can be inverted depends on the encoder, and an encoder is shaped by its task. A hospital that
only holds images rehearses with this one: segment the brightest 20 %, 8 % and 2 % of the body. The Dice of such
a rehearsal says nothing about the job's task, and the report says so.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from splitpeer.data.files import Case
from splitpeer.data.geometry import Geometry, Triple
from splitpeer.data.layouts import subject
from splitpeer.data.task import Region, Task
from splitpeer.data.volumes import Volumes, not_held

SHARES = (0.20, 0.08, 0.02)
"""The brightest of the body's voxels: nested, like tumour regions."""
BANDS = Task(
    names={1: "bright", 2: "brighter", 3: "brightest"},
    regions=(Region("bright", (1, 2, 3)), Region("brighter", (2, 3)), Region("brightest", (3,))),
)


class StandInTask(Volumes):
    """`Volumes` of masks, made from the images of one site.

    Args:
        images: of each modality; a patient's mask is made from the first that holds the patient.
    """

    def __init__(self, images: Iterable[Volumes]) -> None:
        # Not initialised as a reader of files: everything is asked of `images`.
        self._images: dict[bytes, Volumes] = {}
        for volumes in images:
            self._images |= {key: volumes for key in volumes.keys() if key not in self._images}  # noqa: SIM118
        self.labels = BANDS
        self._bounds: dict[bytes, tuple[float, ...]] = {}

    def keys(self) -> list[bytes]:
        return sorted(self._images)

    def case(self, key: bytes) -> Case:
        return self._of(key).case(key)

    def subjects(self) -> dict[bytes, str]:
        return {key: subject(volumes.case(key).patient) for key, volumes in self._images.items()}

    def geometry(self, key: bytes) -> Geometry:
        return self._of(key).geometry(key)

    def window(self, key: bytes, origin: Triple, size: Triple) -> np.ndarray:
        """uint8 [3, *size]: nested bands of brightness."""
        voxels = self._of(key).window(key, origin, size)[0]
        return np.stack([(voxels > bound) & (voxels != 0) for bound in self._limits(key)]).astype(np.uint8)

    def _of(self, key: bytes) -> Volumes:
        """The images of a patient. Raises DataError for a key this site lacks."""
        try:
            return self._images[key]
        except KeyError:
            raise not_held(key) from None

    def _limits(self, key: bytes) -> Sequence[float]:
        if key not in self._bounds:
            volume = self._of(key).window(key, (0, 0, 0), self.geometry(key).shape)
            head = volume[volume != 0]
            bounds = np.quantile(head, [1 - share for share in SHARES]) if head.size else [0.0] * 3
            self._bounds[key] = tuple(float(b) for b in bounds)
        return self._bounds[key]
