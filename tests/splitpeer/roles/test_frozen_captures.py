"""What is recorded of runs with frozen encoders: looked at, attacked, defended afterwards, played to live peers."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from splitpeer.attacks.view import coordinator_view, site_view
from splitpeer.audit.experiment import VerifiedCapture
from splitpeer.captures.reader import open_capture
from splitpeer.captures.redefend import defended
from splitpeer.captures.summary import summarise
from splitpeer.coordinator import record as runs
from splitpeer.errors import AttackImpossible, DataError
from splitproto.messages import Activations

from .scene import PATIENTS, SEED, Scene
from .test_replay import RUN, Run, cli, sent

__all__ = ["cli"]

KEPT = "laplace:0.5,kept=true"
FILLED = {"site-flair": ["flair", "t1"], "site-t2": ["t2"]}


def cast(scene: Scene, defences: list[str]) -> Scene:
    """One site has two seats."""
    scene.cast(
        "flair", "t2", sites=FILLED, training={"encoders": "frozen", "steps": 3, "batch": 2, "checkpoint_every": 3},
        evaluation={"batch": 16, "overlap": 0.0}, data={"window": [48, 48], "validation": 2, "augment": False},
    )  # fmt: skip
    policy = {"coordinators": ["hub"], "encoders": "frozen", "releases": "once", "defences": defences}
    state = {"state": "live" if defences else "clean"}
    scene.coordinator(peer=state)
    scene.client("t2", policy=policy, peer=state)
    scene.client(
        "flair", policy=policy, peer={"modality": FILLED["site-flair"], **state},
        data={"images": str(scene.federation.data)},
    )  # fmt: skip
    return scene


@pytest.fixture(scope="module")
def recorded(federation: Any, nursery: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    """Two runs of one id, the second with kept noise; its files, and both captures of hub and the site of two seats."""
    scene = Scene(federation, tmp_path_factory.mktemp("frozen"), nursery)
    drawn = runs.secrets.token_bytes
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs.secrets, "token_bytes", lambda count: RUN if count == len(RUN) else drawn(count))
        for name, defences in (("clean", []), ("live", [KEPT])):
            cast(scene, defences)
            ran = asyncio.run(scene.together(curious=("hub", "site-flair")))
            assert ran.error is None and ran.result.complete, ran
            for who in ("hub", "site-flair"):
                scene.capture(who).rename(scene.folder / f"{name}-{who}.cap")
    yield scene
    scene.clean_up()


def test_the_table_counts_releases(recorded: Scene, cli: Run) -> None:
    code, text, error = cli(recorded.folder / "clean-hub.cap")
    flat = " ".join(text.split())
    assert (code, error) == (0, "") and "training steps 0" in flat and "evaluation batches 0" in flat
    found = summarise(open_capture(recorded.folder / "clean-hub.cap"))
    assert found.releases > 0 and f"releases of frozen encoders {found.releases}" in flat
    assert found.patients == len(PATIENTS)


def test_what_was_released_is_attacked_and_no_site_has_a_gradient(recorded: Scene) -> None:
    opened = VerifiedCapture.open(recorded.folder / "clean-hub.cap")
    view = coordinator_view(opened.capture, "t1")
    assert (view.site, len(view.targets)) == ("site-flair", len(PATIENTS))
    assert {(shot.mode, len(target.shots)) for target in view.targets for shot in target.shots} == {
        ("release", 1)
    }
    with pytest.raises(AttackImpossible, match="frozen encoders: no gradient came back"):
        site_view(open_capture(recorded.folder / "clean-site-flair.cap"))
    with pytest.raises(DataError, match="each window leaves once: several views of it do not exist"):
        defended(opened.capture, {}, releases=2)


@pytest.mark.parametrize("who", ["hub", "site-flair"])
def test_kept_noise_that_is_added_afterwards_is_what_the_live_sites_sent(
    recorded: Scene, cli: Run, tmp_path: Path, who: str
) -> None:
    """At two seats of one site, which do not share their noise, and at another site."""
    out = tmp_path / "again.cap"
    code, _, error = cli(
        recorded.folder / f"clean-{who}.cap", "--defence", KEPT, "--seed", SEED, "--out", out,
        "--config", recorded.folder / "site-flair" / "peer.toml",
    )  # fmt: skip
    assert (code, error) == (0, "")
    again, live, clean = (
        open_capture(path)
        for path in (out, recorded.folder / f"live-{who}.cap", recorded.folder / f"clean-{who}.cap")
    )
    for site in ("site-flair", "site-t2") if who == "hub" else ("site-flair",):
        ours, theirs, plain = sent(again, site), sent(live, site), sent(clean, site)
        assert ours == theirs and {mode for mode, _, _ in ours} == {"release"}
        assert all(ours[place].keys() == plain[place].keys() for place in ours)
        assert all(ours[place][name] != plain[place][name] for place in ours for name in ours[place])


def test_a_live_site_answers_as_recorded_kept_noise_included(recorded: Scene, cli: Run) -> None:
    code, text, error = cli(
        recorded.folder / "live-site-flair.cap", "--json", "--drive", "client", "--config",
        recorded.folder / "site-flair" / "peer.toml",
    )  # fmt: skip
    assert code == 0, error + text
    found, capture = json.loads(text), open_capture(recorded.folder / "live-site-flair.cap")
    answers = [record for record in capture.records() if isinstance(record.head, Activations)]
    assert found["agrees"] and found["largest"] == 0 and not found["stopped"]
    assert found["tensors"] == 2 * 5 * len(answers) > 0


def test_a_live_coordinator_trains_the_same_decoder(recorded: Scene, cli: Run) -> None:
    """It sends no gradient that could be compared, so its losses and Dice are."""
    hub = recorded.folder / "hub"
    drive = ("--drive", "coordinator", "--config", hub / "peer.toml", "--job", hub / "job.toml", "--json")
    code, text, error = cli(recorded.folder / "live-hub.cap", *drive)
    assert code == 0, error + text
    found = json.loads(text)
    assert found["agrees"] and found["largest_figure"] == 0 and found["tensors"] == 0
    assert (found["steps"], found["figures"] >= 3) == (3, True)
    code, text, error = cli(recorded.folder / "clean-hub.cap", *drive)
    assert code == 1 and not json.loads(text)["agrees"], "without the noise, the losses are others"
