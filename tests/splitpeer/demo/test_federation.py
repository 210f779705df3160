"""The demonstration's five real daemons, two of which are killed: it ends as if nothing had happened.

That the weights are then the same, bit for bit, is tested in tests/faults.
"""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from splitpeer.data.pseudonym import load_salt
from splitpeer.demo.federation import HUB, SITES, DemoJob, Federation
from splitpeer.demo.report import read_result
from splitpeer.errors import JobFailed
from tests.splitpeer.roles.scene import PATIENTS, write_patient

JOB = DemoJob(patients=6, validation=2, steps=16, batch=2, seed=3)


class Patients(Federation):
    """With patients that take no time to make."""

    def render(self, progress: object = None) -> None:
        for number, patient in enumerate(PATIENTS):
            write_patient(self.data, patient, number)


@pytest.fixture
def made(tmp_path: Path) -> Iterator[tuple[Federation, list[str]]]:
    told: list[str] = []
    federation = Patients(tmp_path / "demo", JOB, told.append)
    federation.render()
    federation.set_up()
    yield federation, told
    federation.stop()


def steps(federation: Federation) -> int:
    path = federation.results / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return max((json.loads(line)["step"] for line in lines), default=0)


@pytest.mark.timeout(300)
def test_kill_whom_you_like(made: tuple[Federation, list[str]]) -> None:
    federation, told = made
    pids = federation.start()
    assert pids.keys() == {HUB, *SITES}
    victims = ["hospital-t1", HUB]

    def kill() -> None:
        for name, step in zip(victims, (3, 8), strict=True):
            while steps(federation) < step:
                time.sleep(0.01)
            os.kill(federation.pids()[name], signal.SIGKILL)

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    federation.wait()
    killer.join(1)
    assert not federation.pids()
    result = read_result(federation.results)
    assert (result["step"], result["complete"], len(result["sites"])) == (JOB.steps, True, 4)
    assert [line.partition(" (pid")[0] for line in told] == victims
    assert all("was killed by SIGKILL: started again as pid" in line for line in told)


def test_a_demonstration_repeats(tmp_path: Path) -> None:
    """The salt orders the patients, and so decides every batch. Keys and certificates are new each time."""
    salts, keys = set(), set()
    for name in ("first", "second"):
        Patients(tmp_path / name, JOB).set_up()
        file = tmp_path / name / "pki" / "federation.salt"
        assert file.stat().st_mode & 0o777 == 0o600
        salts.add(load_salt(file))
        keys.add((tmp_path / name / "pki" / "ca.key").read_bytes())
    assert (len(salts), len(keys)) == (1, 2)


@pytest.mark.timeout(120)
def test_what_a_person_must_look_at_ends_it(made: tuple[Federation, list[str]]) -> None:
    federation, told = made
    (federation.folder / "hospital-t2" / "peer.toml").write_text("[peer]\n")
    federation.start()
    with pytest.raises(JobFailed, match=r"^hospital-t2 ended with exit code 4: .*peer.toml"):
        federation.wait()
    assert not told
    assert not federation.pids()


def test_nobody_waits_again_for_who_was_stopped(made: tuple[Federation, list[str]]) -> None:
    federation, _ = made
    ended: dict[str, int | None] = dict.fromkeys(SITES)
    federation._supervisor.ended = ended.__getitem__  # type: ignore[method-assign]
    assert federation._again(HUB, 3)
    ended["hospital-t1"] = 0
    assert not federation._again(HUB, 3)
    assert federation._again(HUB, -9)
    assert federation._again("hospital-t2", 3)
