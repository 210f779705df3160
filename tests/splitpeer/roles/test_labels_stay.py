"""Frozen jobs tell hospitals nothing of the labels: whatever the coordinator sends is the same for other tumours."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from splitproto import Side
from splitproto.connection import Connection
from splitproto.messages import Bye, Gradients, Message
from splitproto.records import KeyOffer

from .scene import PATIENTS, Federation, Scene, write_nifti
from .test_secure_sum import BRISK, MODEL, cast, site

DRAWN = {"run", "challenge", "public", "service", "signature"}
"""Fields that are random in every run."""
Heard = dict[str, list[Any]]
"""By site, all that it was sent, in order."""


def other_tumours(folder: Path, federation: Federation) -> Path:
    """For the same patients: each has that of the next one, mirrored; the last has none."""
    for patient, following in zip(PATIENTS, [*PATIENTS[1:], None], strict=True):
        mask = np.asarray(nib.load(federation.data / "labels" / f"{following or patient}.nii.gz").dataobj)
        mask = mask[::-1] if following else np.zeros_like(mask)
        write_nifti(folder / "labels" / f"{patient}.nii.gz", np.ascontiguousarray(mask))
    return folder / "labels"


def comparable(value: Any) -> Any:
    """A message without what is drawn."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return type(value).__name__, {
            one.name: comparable(getattr(value, one.name))
            for one in dataclasses.fields(value)
            if one.name not in DRAWN
        }
    if isinstance(value, np.ndarray):
        return value.dtype.str, value.shape, value.tobytes()
    if isinstance(value, Mapping):
        return {key: comparable(one) for key, one in value.items()}
    if isinstance(value, tuple | list):
        return [comparable(one) for one in value]
    return value


@pytest.fixture
def heard(monkeypatch: pytest.MonkeyPatch) -> Heard:
    told: Heard = defaultdict(list)
    send = Connection.send

    def noted(self: Connection, message: Message, **more: Any) -> None:
        # The answer to a site's own bye is sent or not: who says it first is chance.
        answer = isinstance(message, Bye) and not message.text
        if self.side is Side.COORDINATOR and self.peer is not None and not answer:
            told[self.peer.site].append(comparable(message))
        send(self, message, **more)

    monkeypatch.setattr(Connection, "send", noted)
    return told


async def test_what_a_hospital_is_sent_does_not_depend_on_the_labels(scene: Scene, heard: Heard) -> None:
    """SP-11.17, SP-11.18: the questions and their order, the figures, the farewell; to the octet, but for keys and
    numbers that are drawn."""
    cast(scene)
    training = {"steps": 3, "batch": 3, "checkpoint_every": 3, "encoders": "frozen"}
    scene.job(model=MODEL, training=training, deadlines=BRISK, evaluation={"batch": 16, "overlap": 0.0})
    runs, losses = [], []
    for labels in (None, other_tumours(scene.folder, scene.federation)):
        if labels is not None:
            scene.coordinator(data={"labels": str(labels)})
        for modality in scene.modalities:
            site(scene, modality)
        ran = await scene.together(resume=False)
        assert ran.error is None and ran.result.complete, ran
        assert set(ran.clients.values()) == {None}
        losses.append([line["loss"] for line in scene.metrics() if "loss" in line][-3:])
        runs.append(dict(heard))
        heard.clear()
    first, second = runs
    assert first.keys() == second.keys() == {f"site-{modality}" for modality in scene.modalities}
    for name, messages in first.items():
        kinds = [kind for kind, _ in messages]
        assert "Forward" in kinds and Gradients.__name__ not in kinds and KeyOffer.__name__ not in kinds
        assert messages == second[name]
    assert losses[0] != losses[1], "the labels did differ"
