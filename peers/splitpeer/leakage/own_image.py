"""The floor of a label attack: what a site finds in its own image, with labelled strangers and no gradient at all.

A map that is recovered from gradients tells nothing of a patient that the site could not have drawn itself, unless it
beats a network trained on its own modality of other patients whose masks are public.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from splitpeer.leakage.floors import Others
from splitpeer.leakage.metrics import Image, brain_mask
from splitpeer.leakage.tumour import Segmenter, train_segmenter


@dataclass(frozen=True)
class OwnImage:
    """A site that has labelled strangers."""

    segmenter: Segmenter
    masks: Others
    """All that is segmented in the strangers, bool [M, *spatial]."""

    @classmethod
    def train(
        cls, images: Image, outlines: NDArray[Any], patients: Sequence[Any], z: Sequence[float] | None = None, *,
        steps: int = 150, seed: int = 0, device: str = "cpu",
    ) -> OwnImage:  # fmt: skip
        """Learn from strangers.

        Args:
            images: [M, channels, *spatial], the site's own modalities of the strangers, normalised.
            outlines: 0/1 [M, 1 + parts, *spatial], all that is segmented first.
            patients: [M].
            z: [M]; where each slice lies.

        Raises:
            ValueError: counts or shapes differ.
        """
        segmenter = train_segmenter(images, outlines, steps=steps, worn=False, seed=seed, device=device)
        return cls(segmenter, Others(np.asarray(outlines)[:, 0] != 0, patients, z))

    def maps(self, images: Image) -> NDArray[np.float32]:
        """The site's own images [N, channels, *spatial] to scores [N, *spatial], higher where the target is likely."""
        return self.segmenter.logits(images)[:, 0]


def foreground(images: Image) -> NDArray[np.bool_]:
    """Where any channel of [N, channels, *spatial] shows the body, bool [N, *spatial].

    A task whose images have no background of zeros has it everywhere; so does a window outside the body.
    """
    inside = np.stack([np.any([brain_mask(channel) for channel in image], axis=0) for image in images])
    inside[~inside.reshape(len(inside), -1).any(axis=1)] = True
    return inside
