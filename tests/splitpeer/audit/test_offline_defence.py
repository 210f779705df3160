"""A defence tried offline: an attack sees the octets that `splitpeer replay --defence` writes, and no others."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from splitpeer.attacks.base import View
from splitpeer.audit.capture_audit import CaptureAudit
from splitpeer.audit.rehearsal import Rehearsed
from splitpeer.cli import main

WRITTEN = "dropout:0.3+gaussian:0.5"


def replayed(capture: Path, out: Path, seed: int) -> None:
    with pytest.raises(SystemExit) as left:
        main(["replay", str(capture), "--defence", WRITTEN, "--seed", str(seed), "--out", str(out)])
    assert not left.value.code


def octets(view: View) -> list[dict[str, bytes]]:
    return [
        {name: array.tobytes() for name, array in shot.activations.items()}
        for target in view.targets
        for shot in target.shots
    ]


@pytest.mark.parametrize("who", ["coordinator", "site"])
def test_an_attack_sees_what_replay_writes(clean: Rehearsed, tmp_path: Path, who: str) -> None:
    capture = clean.capture if who == "coordinator" else clean.site_capture("t1")
    out = tmp_path / "defended.cap"
    replayed(capture, out, 5)
    asked: dict[str, Any] = {"seat": "t1", "samples": 2}
    on_disk = CaptureAudit(out, **asked).experiment().view
    offline = CaptureAudit(capture, defence=WRITTEN, seed=5, **asked).experiment().view
    plain = CaptureAudit(capture, **asked).experiment().view
    assert octets(offline) == octets(on_disk) != octets(plain)
    assert offline.defences == on_disk.defences and len(offline.defences) == 2 and not plain.defences
    other = CaptureAudit(capture, defence=WRITTEN, seed=6, **asked).experiment().view
    assert octets(other) != octets(offline)


def test_further_views_are_fresh_and_the_first_is_that_of_replay(clean: Rehearsed) -> None:
    asked: dict[str, Any] = {"seat": "t1", "samples": 2, "defence": "gaussian:0.5", "seed": 5}
    one = CaptureAudit(clean.capture, **asked).experiment().view
    three = CaptureAudit(clean.capture, views=3, **asked).experiment().view
    for few, many in zip(one.targets, three.targets, strict=True):
        assert few.sample == many.sample and len(many.shots) == 3 * len(few.shots)
        drawn = [shot.activations["x0"] for shot in many.shots]
        assert {d.tobytes() for d in drawn} >= {shot.activations["x0"].tobytes() for shot in few.shots}
        assert len({d.tobytes() for d in drawn}) == len(drawn), "no noise is drawn twice"
        assert np.isfinite(drawn).all()


def test_captures_bring_no_torch() -> None:
    code = (
        "import sys, pkgutil, importlib, splitpeer.captures as room\n"
        "for found in pkgutil.walk_packages(room.__path__, 'splitpeer.captures.'):\n"
        "    importlib.import_module(found.name)\n"
        "print(sorted({'torch', 'monai'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == "[]"
