"""People as one encoder sends them: signs of having been seen, in units of people whom it has certainly not seen."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from splitpeer.attacks.member_signs import SampleSigns, distances, read_by, seen
from splitpeer.attacks.probe import LinearProbe, Sender, batches, outline

MOST = 8.0
"""Deviations that a sign counts at most."""
LEARNED = 5
"""Signs that something was learned for."""


@dataclass(frozen=True)
class Group:
    """Samples of people."""

    sender: Sender
    """What one encoder sends of them."""
    masks: np.ndarray | None
    """uint8 [N, regions, *spatial]; None: not known."""
    people: np.ndarray
    """int [N], from 0: whose each sample is."""

    @property
    def rows(self) -> np.ndarray:
        """All of them."""
        return np.arange(len(self.people))

    def of(self, rows: np.ndarray) -> Group:
        """Some of them, whose people are counted anew."""
        masks = None if self.masks is None else self.masks[rows]
        return Group(
            lambda batch: self.sender(rows[batch]),
            masks,
            np.unique(self.people[rows], return_inverse=True)[1],
        )


def signs_of(
    strangers: Group, asked: Group, decoder: nn.Module | None, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Signs of each of the strangers, float64 [people, signs], and of those who are asked for, in units of the former.

    What has to be learned first (the probe, what is near) is learned from half of the strangers, for the other half,
    and for every second of the asked: nobody is met by something that was learned from more people, or from themselves.
    Otherwise strangers would differ from the asked by how they were looked at.

    Args:
        strangers: with masks. Those of the asked decide whether masks, or what is read off the levels, count.
        decoder: behind this encoder, levels to logits; None: not known.
    """
    if strangers.masks is None:
        raise ValueError("strangers have masks")
    known = asked.masks is not None
    outlines = outline(strangers.masks)
    one, two = _looked_at(strangers, decoder, known), _looked_at(asked, decoder, known)
    met, met_asked = np.zeros((len(one.signs), LEARNED)), np.zeros((len(two.signs), LEARNED))
    for half in (0, 1):
        base = np.flatnonzero(strangers.people % 2 != half)
        probe = LinearProbe.learn(strangers.sender, outlines, base, seed + half)
        near = one.of(base)
        for group, looked, into in ((strangers, one, met), (asked, two, met_asked)):
            rows = np.flatnonzero(group.people % 2 == half)
            wanted = outline(group.masks) if known and group.masks is not None else None
            if len(rows):
                into[rows] = np.concatenate(
                    [_read(probe, group, wanted, rows), distances(looked.of(rows), near)], 1
                )
        # Two probes differ in how well they read: each half is told from the strangers in it.
        usual = met[strangers.people % 2 == half].mean(0)
        met[strangers.people % 2 == half] -= usual
        met_asked[asked.people % 2 == half] -= usual
    found = _of_people(np.concatenate([one.signs, met], 1), strangers.people)
    of_asked = _of_people(np.concatenate([two.signs, met_asked], 1), asked.people)
    centre, deviation = found.mean(0), np.maximum(found.std(0), 1e-6 + 1e-3 * np.abs(found.mean(0)))
    units = [np.clip((each - centre) / deviation, -MOST, MOST) for each in (found, of_asked)]
    return units[0], units[1]


def _looked_at(group: Group, decoder: nn.Module | None, known: bool) -> SampleSigns:
    found = []
    for batch in batches(group.rows):
        levels = group.sender(batch)
        one = seen(levels)
        if decoder is not None:
            masks = None if not known or group.masks is None else torch.from_numpy(group.masks[batch])
            with torch.no_grad():
                one = SampleSigns(
                    np.concatenate([one.signs, read_by(decoder(dict(levels)), masks)], 1), one.pooled
                )
        found.append(one)
    return SampleSigns(
        np.concatenate([one.signs for one in found]), np.concatenate([one.pooled for one in found])
    )


def _read(probe: LinearProbe, group: Group, outlines: np.ndarray | None, rows: np.ndarray) -> np.ndarray:
    """The probe's error and what makes samples hard, float64 [rows, 3]."""
    found = []
    for batch in batches(rows):
        errors, hardness = probe.errors(group.sender(batch), None if outlines is None else outlines[batch])
        found.append(np.concatenate([np.log(errors + 1e-6)[:, None], hardness[:, 1:]], 1))
    return np.concatenate(found)


def _of_people(values: np.ndarray, people: np.ndarray) -> np.ndarray:
    """Means over each one's samples."""
    return np.stack([values[people == number].mean(0) for number in range(int(people.max()) + 1)])
