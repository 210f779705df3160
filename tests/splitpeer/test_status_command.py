"""`splitpeer status` and `splitpeer drain`: tables, exit codes, and who gets a signal."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from splitpeer.cli import main
from splitpeer.cli import status as command
from splitpeer.cli.drain import drain
from splitpeer.daemon.duty import Duty
from splitpeer.daemon.lock import Holder
from splitpeer.daemon.observe import PeerHead, Seen, look
from splitpeer.settings.peer import PeerConfig

DAEMON = """
import asyncio, os, signal, sys
from pathlib import Path
from splitpeer.settings.peer import PeerConfig
from splitpeer.errors import JobFailed
from splitpeer.daemon.duty import Duty

async def main(how):
    asked, duty = asyncio.Event(), Duty(PeerConfig.load(Path("peer.toml")))
    board = duty.board

    def stop():
        if asked.is_set():
            os._exit(130)
        asked.set()

    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop)
    async with duty.on_duty():
        board.ready()
        board.phase("training", step=5, steps=12)
        await asyncio.sleep(0.6)
        print("ready", flush=True)
        await asyncio.sleep(100) if how == "deaf" else await asked.wait()
        board.phase("draining")
        board.waits("step 6 to be applied", who="charite")
        await asyncio.sleep(100 if how == "slow" else 1.2)
        if how == "fails":
            raise JobFailed("the disk hangs")

asyncio.run(main(sys.argv[1]))
"""


@pytest.fixture
def start(peer_toml: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    started = []

    def call(how: str = "well", folder: Path = peer_toml.parent) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", DAEMON, how], cwd=folder, stdout=subprocess.PIPE, text=True
        )
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        return process

    yield call
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Exit code, standard output and standard error of `splitpeer ARGUMENTS`, in this process."""

    def call(*arguments: str | Path) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as left:
            main([str(argument) for argument in arguments])
        said = capsys.readouterr()
        return int(left.value.code or 0), said.out, said.err

    return call


Run = Callable[..., tuple[int, str, str]]
Start = Callable[..., subprocess.Popen[str]]


def coordinator(folder: Path) -> Path:
    path = folder / "hub" / "peer.toml"
    path.parent.mkdir()
    path.write_text('[peer]\nrole = "coordinator"\nsite = "hub"\nfederation = "test"\n')
    return path


def at_work(head: PeerHead, document: dict[str, Any]) -> Seen:
    """As `look` would find a coordinator in the middle of it."""

    def ago(seconds: float) -> dict[str, Any]:
        return {"at": "2026-11-21T12:00:00.000Z", "monotonic": 10_000 - seconds}

    whole = {
        "started": ago(900),
        "written": ago(0.2),
        "phase": "training",
        "phase_since": ago(720),
        "work": {"job": "glioma", "run": "3f2a9c1d00ff3f2a", "step": 120, "steps": 1000, "step_per_s": 4.1,
                 "loss": 0.43210987, "dice": {"WT": 0.81, "mean": 0.7},
                 "hd95": {"WT": 4.25, "mean": 4.25}, "volume_ml": {"WT": {"predicted": 40.5, "true": 42.0}},
                 "checkpoints": [0, 25, 50, 75, 100],
                 "absence": "skip", "address": "tcp://0.0.0.0:7443"},
        "sites": {
            "charite": {"seats": "t1", "state": "present", "state_since": ago(700), "applied": 120,
                        "octets_in_per_s": 3.1e6, "octets_out_per_s": 2.9e6},
            "uniklinik-dresden": {"seats": "t1ce", "state": "present", "state_since": ago(7000), "applied": 119},
            "ukm": {"seats": "flair", "state": "absent", "state_since": ago(40), "applied": 117},
        },
        "waits": [
            {"who": "ukm", "what": "to come back", "since": ago(10), "until": ago(-20)},
            {"who": "uniklinik-dresden", "what": "activations of step 120", "since": ago(0.4), "until": ago(-60)},
        ],
        "ended": None,
        **document,
    }  # fmt: skip
    held = Holder(4711, head.peer.state / "lock", 0.0)
    return replace(look(head), state="running", holder=held, document=whole, monotonic=10_000.0, now=0.0)


def shown(seen: list[Seen], width: int) -> str:
    console = Console(width=width, force_terminal=True, color_system=None)
    with console.capture() as capture:
        console.print(command.render(seen, terminal=True))
    return capture.get()


@pytest.mark.parametrize("width", [80, 120])
def test_the_tables_fit(peer_toml: Path, width: int) -> None:
    hub = at_work(PeerHead.load(coordinator(peer_toml.parent)), {})
    idle = look(PeerHead.load(peer_toml))
    one, several = shown([hub], width), shown([hub, idle], width)
    for text in (one, several):
        assert max(map(len, text.splitlines())) <= width
        assert "…" not in text, "a name was cut"
        table = " ".join(re.sub(r"[─\n]", " ", text).split())
        assert "charite t1 present 12 min 120 3.1 2.9" in table
        assert "flair absent 40 s 117" in table
    words = " ".join(one.split())
    assert "step 120 of 1000 (12 %), 4.1 steps/s, 4 min left" in words
    assert "loss 0.4321, dice WT 0.81 mean 0.7" in words
    assert "HD95 in mm WT 4.25 mean 4.25, volume in ml WT predicted 40.5 true 42" in words
    assert "checkpoints ... 25 50 75 100, absence skip" in words
    assert "10 s, 20 s left" in words
    assert re.search(r"ukm +never", several)


WHO_HAS_WHOM = {
    "used": 32, "held_out": 8, "held_out_complete": 6, "seats": ["flair", "t1"],
    "with_seats": {"2": 25, "1": 7},
    "fills": {"east": {"t1": 15}, "north": {"t1": 14, "flair": 3}, "south": {"flair": 0}},
}  # fmt: skip


def with_patients(head: PeerHead, patients: object) -> Seen:
    seen = at_work(head, {})
    seen.document["work"]["patients"] = patients
    return seen


def test_the_table_of_who_has_whom(peer_toml: Path) -> None:
    """A row for each site, a column for each seat: empty where a site does not fill it, 0 where it has nobody."""
    seen = with_patients(PeerHead.load(coordinator(peer_toml.parent)), WHO_HAS_WHOM)
    console = Console(width=200)
    with console.capture() as capture:
        console.print(command.render([seen], terminal=False))
    lines = [line.rstrip() for line in capture.get().rstrip().splitlines()]
    assert lines[-6:] == [
        "",
        "32 patients (2 of 2 seats: 25, 1 of 2 seats: 7), held out 8 (6 of them complete)",
        "patients filled by  flair  t1",
        "east                       15",
        "north               3      14",
        "south               0",
    ]
    on_a_terminal = " ".join(re.sub(r"[─\n]", " ", shown([seen], 80)).split())
    assert "patients filled by flair t1 east 15 north 3 14 south 0" in on_a_terminal


@pytest.mark.parametrize(
    "patients",
    [None, 3, {**WHO_HAS_WHOM, "used": "all"}, {**WHO_HAS_WHOM, "fills": {"east": 15}}, {"used": 32}],
)
def test_a_table_that_is_not_there_or_not_whole_is_left_out(peer_toml: Path, patients: object) -> None:
    seen = with_patients(PeerHead.load(coordinator(peer_toml.parent)), patients)
    text = shown([seen], 120)
    assert "filled by" not in text and "charite" in text


def ago(seconds: float) -> dict[str, Any]:
    return {"at": "2026-11-21T12:00:00.000Z", "monotonic": 10_000 - seconds}


def of(
    waiting: int, running: int, segmented: int, refused: int, cancelled: int, failed: int
) -> dict[str, int]:
    return {"waiting": waiting, "running": running, "segmented": segmented, "refused": refused,
            "cancelled": cancelled, "failed": failed}  # fmt: skip


SERVING = {
    "run": "3f2a9c1d00ff3f2a", "step": 1000, "serves": True, "last": ago(240),
    "waiting": 1, "running": 1, "finished": 16,
    "askers": {"charite": of(1, 1, 12, 0, 1, 0), "uniklinik-dresden": of(0, 0, 1, 1, 0, 1)},
}  # fmt: skip
INFERENCE = {
    "policy": "listed", "serves": True, "last": ago(30), "answered_last": ago(300),
    "waiting": 1, "running": 0, "segmented": 4, "cancelled": 0, "failed": 1,
    "askers": {"charite": {"answered": 3, "refused": 1, "unable": 0},
               "others": {"answered": 0, "refused": 2, "unable": 0}},
}  # fmt: skip


def in_plain_text(*seen: Seen) -> list[str]:
    console = Console(width=200)
    with console.capture() as capture:
        console.print(command.render(seen, terminal=False))
    return [line.rstrip() for line in capture.get().rstrip().splitlines()]


def with_inference(head: PeerHead, **work: object) -> Seen:
    seen = at_work(head, {"phase": "serving"})
    seen.document["work"].update(work)
    return seen


def test_requests_at_a_coordinator_by_site(peer_toml: Path) -> None:
    seen = with_inference(PeerHead.load(coordinator(peer_toml.parent)), serving=SERVING)
    assert in_plain_text(seen)[-5:] == [
        "",
        "inference: run 3f2a9c1d00ff is served with the weights of step 1000; "
        "1 waiting, 1 running, 16 ended, the last 4 min ago",
        "requests of        waiting  running  segmented  refused  cancelled  failed",
        "charite                  1        1         12        0          1       0",
        "uniklinik-dresden        0        0          1        1          0       1",
    ]
    assert "uniklinik-dresden" in (text := shown([seen], 80)) and "…" not in text
    seen.document["work"]["serving"] = {**SERVING, "serves": False, "finished": 0, "last": None, "askers": {}}
    seen.document["phase"] = "training"
    assert (
        in_plain_text(seen)[-1]
        == "inference: run 3f2a9c1d00ff is not served yet; 1 waiting, 1 running, 0 ended"
    )


def test_requests_at_a_site(peer_toml: Path) -> None:
    head = PeerHead.load(peer_toml)
    seen = with_inference(head, inference=INFERENCE)
    seen.document["sites"] = {}
    lines = in_plain_text(seen)
    assert lines[-3:] == [
        "  inference: listed",
        "  asked by charite: 3 answered, 1 refused; others: 2 refused, the last 5 min ago",
        "  asked for here: 1 waiting, 4 segmented, 1 failed, the last 30 s ago",
    ]
    other = with_inference(head, inference={
        **INFERENCE, "policy": "own", "serves": False, "askers": {}, "waiting": 0, "segmented": 0, "failed": 0,
        "last": None, "answered_last": None})  # fmt: skip
    other.document["sites"] = {}
    assert in_plain_text(other)[-3:] == [
        "  inference: own, the job has no [inference]",
        "  asked by nobody so far",
        "  asked for here: nothing so far",
    ]
    idle = look(head)
    assert in_plain_text(seen, other, idle)[-3:] == [
        "inference at  serves                           was asked              asked for here",
        "ukm           listed                           3 answered, 3 refused  1 waiting, 4 segmented, 1 failed",
        "ukm           own, the job has no [inference]",
    ]
    assert max(map(len, shown([seen, other, idle], 80).splitlines())) <= 80


@pytest.mark.parametrize(
    "told", [None, 3, {}, {**SERVING, "waiting": "all"}, {**SERVING, "askers": {"charite": 15}}]
)
def test_counts_that_are_not_whole_are_left_out(peer_toml: Path, told: object) -> None:
    seen = with_inference(PeerHead.load(coordinator(peer_toml.parent)), serving=told, inference=told)
    assert "inference" not in (text := shown([seen], 120)) and "charite" in text
    seen.document["work"]["serving"] = {
        **SERVING,
        "finished": "\x1b[2J",
        "askers": {"\x1b[2J": {"failed": "\x1b"}},
    }
    assert "\x1b" not in "".join(in_plain_text(seen))


@pytest.mark.parametrize("serves", [[], {}, "\x1b[2J", 7])
def test_whether_a_site_serves_may_be_anything(peer_toml: Path, serves: object) -> None:
    seen = with_inference(PeerHead.load(peer_toml), inference={**INFERENCE, "serves": serves})
    assert "inference: listed\n" in (text := shown([seen], 120)) and "\x1b" not in text


def test_plain_text_has_no_broken_lines(peer_toml: Path, run: Run) -> None:
    code, out, err = run("status", "--config", peer_toml)
    assert (code, err) == (1, "")
    assert out == f"ukm (client): not running, and no daemon has used {peer_toml} yet\n"
    console = Console(width=10_000)
    with console.capture() as capture:
        console.print(command.render([at_work(PeerHead.load(peer_toml), {})], terminal=False))
    assert "uniklinik-dresden  t1ce   present 1 h 57 min   119 " in capture.get()
    assert "\x1b" not in capture.get()


async def test_one_daemon_in_words_and_json(peer_toml: Path, run: Run) -> None:
    duty = Duty(PeerConfig.load(peer_toml, environ={}))
    board = duty.board
    async with duty.on_duty():
        board.phase("working", job="glioma", step=3, steps=12, tls="TLSv1.3", octets_in=0,
                    seats={"flair": 20, "mri (t2, adc)": 17})  # fmt: skip
        board.waits("gradients of step 4", deadline_s=3600)
        await asyncio.sleep(0.7)
        code, out, err = await asyncio.to_thread(run, "status", "--config", peer_toml)
        assert (code, err) == (0, "")
        assert re.search(rf"^ukm \(client\): working for \d s \(pid {os.getpid()}, up \d s\)$", out, re.M)
        assert "\n  step 3 of 12 (25 %)\n" in out
        assert "\n  patients by seat: flair 20 mri (t2, adc) 17\n" in out
        assert re.search(r"^  waits for gradients of step 4 \(\d s, 60 min left\)$", out, re.M)
        code, out, _ = await asyncio.to_thread(run, "status", "--json", peer_toml)
        (found,) = json.loads(out)
        assert (code, found["state"], found["pid"], found["work"]["step"]) == (0, "running", os.getpid(), 3)
        assert found["waits"][0]["until"]["age_s"] == pytest.approx(-3600, abs=10)
        assert "monotonic" not in out
    code, out, _ = await asyncio.to_thread(run, "status", peer_toml)
    assert code == 1
    assert out.startswith("ukm (client): not running: stopped 0 s ago (working, step 3 of 12)\n")


def test_one_that_hangs_and_one_that_died(peer_toml: Path, start: Start, run: Run, monkeypatch: Any) -> None:
    process = start("deaf")
    process.send_signal(signal.SIGSTOP)
    monkeypatch.setattr("splitpeer.daemon.observe.SILENT_S", 0.5)
    time.sleep(1.2)
    code, out, _ = run("status", peer_toml)
    assert code == 3
    assert re.search(rf"does not answer since \d+ s: .*\(pid {process.pid}; training, step 5 of 12\)", out)
    process.kill()
    process.wait()
    code, out, _ = run("status", peer_toml)
    assert code == 1
    assert "not running: died without reporting why, last seen" in out


def test_one_that_was_stopped_at_once_while_it_stopped(peer_toml: Path, start: Start, run: Run) -> None:
    """`drain --now`: nobody has to look for a crash."""
    process = start("slow")
    process.send_signal(signal.SIGTERM)
    ends = time.monotonic() + 20
    while "draining" not in run("status", peer_toml)[1]:
        assert time.monotonic() < ends
        time.sleep(0.1)
    process.kill()
    process.wait()
    code, out, _ = run("status", peer_toml)
    assert code == 1
    assert "not running: ended while it was draining, before it was done, last seen" in out


def test_watching_ends_with_ctrl_c(peer_toml: Path, start: Start) -> None:
    start()
    watching = subprocess.Popen(
        [sys.executable, "-m", "splitpeer.cli", "status", "--watch", "--json", "--config", str(peer_toml)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert watching.stdout is not None
    lines = [json.loads(watching.stdout.readline()) for _ in range(2)]
    assert [line[0]["state"] for line in lines] == ["running", "running"]
    watching.send_signal(signal.SIGINT)
    _, err = watching.communicate(timeout=60)
    assert (watching.returncode, err) == (0, "")


def test_looking_needs_no_torch(peer_toml: Path) -> None:
    peer_toml.write_text(peer_toml.read_text() + 'defences = ["dropout:0.5"]\n')
    code = (
        "import sys\nfrom splitpeer.cli import main\n"
        "try:\n    main(sys.argv[1:])\nexcept SystemExit as left:\n    print(left.code)\n"
        "print({'torch', 'monai', 'nibabel'} & set(sys.modules))\n"
    )
    for arguments in (("status",), ("drain",)):
        done = subprocess.run([sys.executable, "-c", code, *arguments], cwd=peer_toml.parent,
                              capture_output=True, text=True, timeout=60, check=True)  # fmt: skip
        assert done.stdout.splitlines()[-2:] == ["1", "set()"]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, ""), (-3, "0 s"), (89, "89 s"), (90, "2 min"), (3600, "60 min"), (5400, "1 h 30 min"),
     (7200, "2 h"), (36 * 3600, "1 d 12 h"), (48 * 3600, "2 d")],
)  # fmt: skip
def test_durations(seconds: float | None, text: str) -> None:
    assert command.duration(seconds) == text


# --- drain -----------------------------------------------------------------------------------------------------


def test_drain_waits_until_it_is_gone(peer_toml: Path, start: Start, run: Run) -> None:
    process = start()
    code, out, err = run("drain", "--config", peer_toml)
    assert (code, err) == (0, "")
    assert process.wait(10) == 0
    assert out.splitlines()[:2] == [
        f"ukm: asked to stop (pid {process.pid}); training, step 5 of 12",
        "ukm: draining, step 5 of 12; waits for charite step 6 to be applied",
    ]
    assert re.fullmatch(r"ukm: stopped at step 5 of 12 after \d+\.\d s", out.splitlines()[-1])
    code, out, err = run("drain", "--config", peer_toml)
    assert (code, out) == (1, "")
    assert re.fullmatch(r"splitpeer: ukm: not running: stopped \d s ago \(draining, step 5 of 12\)\n", err)


def test_drain_does_not_wait_for_ever_but_can_insist(peer_toml: Path, start: Start, run: Run) -> None:
    process = start("slow")
    code, _, err = run("drain", "--wait", "0.8", peer_toml)
    assert code == 3
    assert f"still running after 0.8 s: ukm (pid {process.pid}): draining, step 5 of 12; waits for" in err
    assert "splitpeer drain --now" in err
    assert len(err.splitlines()) == 1
    assert process.poll() is None
    code, out, err = run("drain", "--now", peer_toml)
    assert (code, err) == (0, "")
    assert process.wait(10) == 130
    assert "ukm: stopped at once while draining after" in out


def test_drain_now_of_one_that_works(peer_toml: Path, start: Start, run: Run) -> None:
    process = start("slow")
    code, out, _ = run("drain", "--now", peer_toml)
    assert (code, process.wait(10)) == (0, 130)
    assert "ukm: stopped at once while draining after" in out


def test_one_that_is_started_again_is_left_alone(
    peer_toml: Path, start: Start, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = start()
    followers: list[subprocess.Popen[str]] = []

    def follow() -> None:
        first.wait(60)
        followers.append(start())

    following = threading.Thread(target=follow)
    following.start()
    # It looks away while one ends and the next begins, as a service manager has it.
    monkeypatch.setattr("splitpeer.cli.drain.LOOK_S", 5.0)
    code, out, err = run("drain", peer_toml)
    following.join()
    assert (code, err) == (0, "")
    assert "ukm: stopped; another one runs after" in out
    assert followers[0].poll() is None


def test_one_that_fails_while_it_stops(peer_toml: Path, start: Start, run: Run) -> None:
    start("fails")
    code, _, err = run("drain", peer_toml)
    assert code == 1
    assert err == "splitpeer: ukm failed while it stopped: the disk hangs\n"


def test_drain_of_several_where_one_does_not_run(peer_toml: Path, start: Start, run: Run) -> None:
    other = peer_toml.parent / "other"
    other.mkdir()
    (other / "peer.toml").write_text(peer_toml.read_text().replace("ukm", "charite"))
    process = start()
    code, out, err = run("drain", peer_toml, other / "peer.toml")
    assert (code, process.wait(10)) == (1, 0)
    assert "ukm: stopped at step 5 of 12" in out
    assert re.match(r"splitpeer: charite: not running, and no daemon has used ", err)


def test_what_a_killed_daemon_left_signals_nobody(peer_toml: Path, start: Start, run: Run) -> None:
    """Its number may be anybody's by now: here, another daemon's."""
    dead = start()
    dead.kill()
    dead.wait()
    bystander = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"])
    try:
        (peer_toml.parent / "state" / "lock").write_text(f"{bystander.pid}\n")
        code, _, err = run("drain", peer_toml)
        assert code == 1
        assert "ukm: not running: died without reporting why" in err
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()


def test_its_help_says_what_a_second_signal_does(run: Run) -> None:
    assert "a second signal" in (next(p.help for p in drain.params if p.name == "now") or "")
