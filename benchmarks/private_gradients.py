"""What came back to the sites of a joint run over a secure sum: one gradient for all, kept for those who attack it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np
from safetensors.numpy import load, save

from splitpeer.attacks.base import Shot, Target
from splitpeer.storage import durable
from splitproto.records import Sample

EARLY_STEPS = 6
"""Whose gradients are kept whatever the window: those of a network that has learned nothing."""
MOST_RELEASED = 48
"""Windows of which all gradients are kept."""


@dataclass
class Noted:
    """Gradients by window, in order of time.

    Args:
        followed: the windows of which all are kept.
    """

    followed: frozenset[Sample]
    shots: dict[Sample, list[Shot]] = field(default_factory=dict)

    @classmethod
    def of(cls, batches: Sequence[Sequence[Sample]], holds: Callable[[Sample], bool]) -> Noted:
        """Those with tumour that a run trains on most often are followed.

        Args:
            batches: of all steps.
            holds: whether a window shows any tumour.
        """
        counts = Counter(sample for batch in batches for sample in batch)
        ordered = (sample for sample, _ in counts.most_common() if holds(sample))
        return cls(frozenset(islice(ordered, MOST_RELEASED)))

    def note(self, step: int, samples: Sequence[Sample], back: Mapping[str, np.ndarray]) -> None:
        """What came back of one step (from 1), float32 [B, C, *spatial] by level."""
        for row, sample in enumerate(samples):
            if sample in self.followed or (step <= EARLY_STEPS and sample not in self.shots):
                gradients = {name: np.array(array[row]) for name, array in back.items()}
                self.shots.setdefault(sample, []).append(Shot("train", step, row, None, {}, gradients))

    def early(self) -> tuple[Target, ...]:
        """The windows of the first steps, each with its first gradient."""
        first = {sample: shots[0] for sample, shots in self.shots.items()}
        return tuple(Target(sample, (shot,)) for sample, shot in first.items() if shot.step <= EARLY_STEPS)

    def all(self) -> tuple[Target, ...]:
        """The windows that are followed, with all gradients."""
        return tuple(
            Target(sample, tuple(shots)) for sample, shots in self.shots.items() if sample in self.followed
        )

    def keep(self, path: Path) -> None:
        """Write it."""
        rows = [(sample, shot) for sample, shots in self.shots.items() for shot in shots]
        names = rows[0][1].gradients
        tensors = {f"gradient/{name}": np.stack([shot.gradients[name] for _, shot in rows]) for name in names}
        tensors |= {
            "key": np.stack([np.frombuffer(sample.key, np.uint8) for sample, _ in rows]),
            "origin": np.array([sample.origin for sample, _ in rows], np.int32),
            "step": np.array([(shot.step, shot.index) for _, shot in rows], np.int32),
            "followed": np.array([sample in self.followed for sample, _ in rows]),
        }
        durable.replace(path, save(tensors))

    @classmethod
    def read(cls, path: Path) -> Noted:
        """As `keep` left it."""
        tensors = load(path.read_bytes())
        levels = {
            name.removeprefix("gradient/"): t for name, t in tensors.items() if name.startswith("gradient/")
        }
        places = zip(tensors["key"], tensors["origin"].tolist(), strict=True)
        samples = [Sample(key.tobytes(), (x, y, z)) for key, (x, y, z) in places]
        made = cls(frozenset(s for s, out in zip(samples, tensors["followed"], strict=True) if out))
        for row, (sample, (step, index)) in enumerate(zip(samples, tensors["step"].tolist(), strict=True)):
            gradients = {name: array[row] for name, array in levels.items()}
            made.shots.setdefault(sample, []).append(Shot("train", step, index, None, {}, gradients))
        return made
