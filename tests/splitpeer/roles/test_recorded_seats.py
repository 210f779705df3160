"""What is recorded where two hospitals fill one seat and patients have gaps: whose data, and defences afterwards."""

from __future__ import annotations

import numpy as np

from splitpeer.attacks.base import View
from splitpeer.attacks.view import coordinator_view, site_view
from splitpeer.captures.reader import open_capture
from splitpeer.captures.redefend import defended
from splitpeer.captures.summary import summarise
from splitpeer.defences.key import from_seed
from splitpeer.defences.offline import offline_defences
from splitproto.records import Seat

from .gaps import WHERE, cast, names, who

T1 = Seat("t1", ("t1",))


def sent(view: View) -> dict[tuple[bytes, int, int], np.ndarray]:
    """By sample's patient, step and place in the whole batch."""
    return {
        (target.sample.key, shot.step, shot.index): shot.activations["x0"]
        for target in view.targets
        for shot in target.shots
    }


async def test_each_site_is_seen_with_its_own_patients_and_rows(scene) -> None:
    cast(scene, training={"steps": 12, "batch": 3})
    ran = await scene.together(only=who(), curious=("hub", "site-t1", "stranger"))
    assert ran.result is not None and ran.result.complete, ran
    capture = open_capture(scene.capture("hub"))
    assert capture.verify().whole
    assert {party.site: party.seats for party in capture.header.peers} == {
        site: tuple(Seat(modality, (modality,)) for modality in held) for site, held in WHERE.items()
    }
    every = [scene.key(name) for name in names(scene)]
    own = {"site-t1": {every[0], every[1]}, "stranger": {every[2]}}
    seen = {}
    for site, patients in own.items():
        view = coordinator_view(
            capture, "t1", site=site, mode="train", every_step=True, choose=lambda samples: samples
        )
        assert (view.site, view.seat, [seat.name for seat in view.seats]) == (site, T1, ["flair", "t1"])
        seen[site] = sent(view)
        assert {key for key, _, _ in seen[site]} == patients
        mine = site_view(open_capture(scene.capture(site)))
        assert mine.seat == T1 and all(shot.gradients for target in mine.targets for shot in target.shots)
        told = sent(mine)
        assert told.keys() == seen[site].keys()
        assert all(np.array_equal(array, told[place]) for place, array in seen[site].items())
    # No place of a batch is filled twice.
    places = [(step, place) for found in seen.values() for _, step, place in found]
    assert len(places) == len(set(places)) > 0
    assert {flow.peer for flow in summarise(capture).flows} == set(WHERE)

    applied = offline_defences(capture.header, "dropout:0.5", lambda site: from_seed(1, site), ["stranger"])
    tried = defended(capture, applied)
    for site, found in seen.items():
        view = coordinator_view(
            tried, "t1", site=site, mode="train", every_step=True, choose=lambda samples: samples
        )
        same = all(np.array_equal(array, found[place]) for place, array in sent(view).items())
        assert same == (site != "stranger") and bool(view.defences) == (site == "stranger")
