"""Audits and attacks of sites that fill several seats, and of a seat with two channels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from splitpeer.attacks.view import coordinator_view, site_view
from splitpeer.audit.capture_audit import CaptureAudit
from splitpeer.audit.cohort import most_tumour
from splitpeer.audit.rehearsal import Protection, Recording, Rehearsal, Rehearsed
from splitpeer.captures.reader import open_capture
from splitpeer.cli import main
from splitpeer.data.pseudonym import load_salt, pseudonym
from splitpeer.data.volumes import Volumes
from splitpeer.federation import images
from splitpeer.federation.images import LIST_SEEN
from splitpeer.report.store import load_run
from splitpeer.settings.job import JobConfig
from splitproto.records import Seat

BOTH = 'clinic = ["flair", "t1"]'
SITES = 'site-flair = "flair"\nsite-t1 = "t1"'
STACKED = f'{BOTH}\n[seats]\nmri = ["flair", "t1"]'


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as left:
        main([str(argument) for argument in arguments])
    return int(left.value.code or 0)


def rehearsed(place: Any, folder: Path, sites: str) -> tuple[Path, Rehearsed]:
    folder.mkdir()
    job = folder / "job.toml"
    job.write_text(place.job.read_text().replace(SITES, sites))
    cohort = place.cohort()
    rehearsal = Rehearsal(JobConfig.load(job), cohort, Protection(), folder / "played", seed=3)
    targets = most_tumour(cohort, rehearsal.validation, rehearsal.window)
    return job, rehearsal.play(Recording(targets=tuple(targets), views=1))


@pytest.fixture(scope="module")
def stacked(place: Any, tmp_path_factory: pytest.TempPathFactory) -> Rehearsed:
    """One seat of two channels."""
    return rehearsed(place, tmp_path_factory.mktemp("seats") / "stacked", STACKED)[1]


@pytest.fixture(scope="module")
def several(place: Any, tmp_path_factory: pytest.TempPathFactory) -> Rehearsed:
    """Two seats at one site."""
    return rehearsed(place, tmp_path_factory.mktemp("seats") / "several", BOTH)[1]


def attack(place: Any, capture: Path, out: Path, *more: object) -> Any:
    code = run("attack", capture, "--samples", 2, "--budget", 1, "--out", out, "--truth", place.data,
               "--salt", place.salt, "--convention", "msd", *more)  # fmt: skip
    assert code == 0
    return load_run(out)


def test_every_channel_of_a_seat_is_recovered_and_scored(
    place: Any, stacked: Rehearsed, tmp_path: Path
) -> None:
    asked = ("pca", "whitebox:iterations=40", "inverse:steps=4", "unsplit:rounds=1", "fora:steps=2,inverse_steps=2",
             "pcat:steps=2", "sdar:steps=2", "query-free:steps=2,iterations=2")  # fmt: skip
    orders = [part for name in asked for part in ("--attack", name)]
    folder = attack(place, stacked.capture, tmp_path / "run", "--seat", "mri", *orders,
                    "--knows", f"weights={stacked.weights('mri')}", "--knows", f"shadow={place.shadow}",
                    "--knows", f"decoder={stacked.weights('coordinator')}", "--shadow-images", 12)  # fmt: skip
    entries = folder.run.entries
    assert {e.status for e in entries} == {"done"}, [e.reason for e in entries]
    names = [name.partition(":")[0] for name in asked]
    assert [(e.attack, e.modality) for e in entries] == [(n, m) for n in names for m in ("flair", "t1")]
    for entry in entries:
        assert folder.arrays[entry.id].shape == (2, 1, 32, 32)
        assert entry.scores["ssim"].mean is not None and "tumour_dice" in entry.scores
    assert {"truth_flair", "truth_t1", "floor_flair", "floor_t1"} <= set(folder.arrays)
    assert folder.run.network.sites == {"clinic": "flair, t1"}
    known = [e.scores["ssim"].mean for e in entries if e.attack == "whitebox"]
    blind = [e.scores["ssim"].mean for e in entries if e.attack == "pca"]
    assert max(known) > max(blind)


def test_a_defence_tried_on_two_channels(place: Any, stacked: Rehearsed, tmp_path: Path) -> None:
    folder = attack(place, stacked.capture, tmp_path / "run", "--seat", "mri", "--defence", "dropout:0.5",
                    "--attack", "whitebox:iterations=5", "--knows", f"weights={stacked.weights('mri')}")  # fmt: skip
    assert [(e.modality, e.adaptive) for e in folder.run.entries] == [
        (modality, adaptive) for adaptive in (True, False) for modality in ("flair", "t1")
    ]


def test_several_seats_of_a_site_are_attacked_one_by_one(
    place: Any, several: Rehearsed, tmp_path: Path
) -> None:
    capture = open_capture(several.capture)
    assert [party.seats for party in capture.header.peers] == [
        (Seat("flair", ("flair",)), Seat("t1", ("t1",)))
    ]
    for seat in ("flair", "t1"):
        view = coordinator_view(capture, seat)
        assert set(view.targets[0].shots[0].activations) == {f"x{n}" for n in range(5)}
        folder = attack(place, several.capture, tmp_path / seat, "--seat", seat, "--attack", "whitebox:iterations=60",
                        "--knows", f"weights={several.weights(seat)}")  # fmt: skip
        (entry,) = folder.run.entries
        assert (entry.modality, entry.site) == (seat, "clinic")
        score = entry.scores["ssim"]
        assert score.mean > max(f for f in score.floors.values() if f is not None)
        own = site_view(open_capture(several.site_capture(seat)), seat, steps=(1,))
        assert own.seat.name == seat and all(shot.gradients for t in own.targets for shot in t.shots)


def test_each_seat_has_noise_of_its_own_in_replay_as_in_attacks(several: Rehearsed, tmp_path: Path) -> None:
    written, out = "gaussian:0.5", tmp_path / "defended.cap"
    assert run("replay", several.capture, "--defence", written, "--seed", 5, "--out", out) == 0
    asked: dict[str, Any] = {"samples": 1}
    noise = {}
    for seat in ("flair", "t1"):
        plain, offline, on_disk = (
            CaptureAudit(path, seat=seat, defence=defence, seed=5, **asked).experiment().view
            for path, defence in ((several.capture, None), (several.capture, written), (out, None))
        )
        clean, tried, stored = (
            view.targets[0].shots[0].activations["x0"] for view in (plain, offline, on_disk)
        )
        assert (tried == stored).all() and on_disk.defences
        drawn = stored - clean
        noise[seat] = drawn / drawn.std()
    assert abs((noise["flair"] * noise["t1"]).mean()) < 0.2


def test_an_attack_takes_the_order_of_the_modalities_from_peer_toml(
    place: Any, several: Rehearsed, tmp_path: Path, capsys: Any
) -> None:
    """The first has the site's own key, as `splitpeer replay` has it."""
    peer, written = tmp_path / "peer.toml", "gaussian:0.5"
    found = {}
    for order in ('["flair", "t1"]', '["t1", "flair"]'):
        told = PEER.replace('["flair", "t1"]', order).format(data=place.data, salt=place.salt)
        peer.write_text(told)
        out = tmp_path / f"{order}.cap"
        assert (
            run("replay", several.capture, "--defence", written, "--seed", 5, "--config", peer, "--out", out)
            == 0
        )
        attacked = {}
        for name, capture, more in (
            ("told", several.capture, ("--defence", written, "--config", peer)),
            ("replayed", out, ()),
            ("untold", several.capture, ("--defence", written)),
        ):
            folder = attack(place, capture, tmp_path / f"{order}-{name}", "--seat", "flair", "--attack", "pca",
                            "--seed", 5, *more)  # fmt: skip
            attacked[name] = np.asarray(folder.arrays[folder.run.entries[0].id])
        assert np.array_equal(attacked["told"], attacked["replayed"])
        assert not np.array_equal(attacked["told"], attacked["untold"]) or order.startswith('["t1"')
        found[order] = attacked["told"]
    one, other = found.values()
    assert not np.array_equal(one, other)
    capsys.readouterr()
    assert run("attack", several.capture, "--attack", "pca", "--config", peer, "--out", tmp_path / "x") == 4
    assert "add --defence, or leave it out" in capsys.readouterr().err


def test_a_site_audits_all_its_seats(place: Any, tmp_path: Path) -> None:
    peer = tmp_path / "peer.toml"
    peer.write_text(PEER.format(data=place.data, salt=place.salt))
    job = tmp_path / "job.toml"
    job.write_text(place.job.read_text().replace(SITES, BOTH))
    out = tmp_path / "audit"
    code = run("audit", "--quick", "--config", peer, "--job", job, "--attack", "pca", "--labels", place.data / "labels",
               "--convention", "msd", "--steps", 2, "--views", 1, "--samples", 2, "--out", out)  # fmt: skip
    assert code == 0
    found = {
        path.parent.relative_to(out).as_posix(): json.loads(path.read_text())["entries"][0]
        for path in out.glob("**/attack.json")
    }
    assert {name: (entry["modality"], entry["goal"]) for name, entry in found.items()} == {
        "0-undefended/flair": ("flair", "image"), "0-undefended/flair/labels": ("flair", "mask"),
        "0-undefended/flair/labels-all-steps": ("flair", "mask"),
        "0-undefended/t1": ("t1", "image"), "0-undefended/t1/labels": ("t1", "mask"),
        "0-undefended/t1/labels-all-steps": ("t1", "mask"),
    }  # fmt: skip
    assert "flair, t1" in (out / "report.html").read_text()


def audited(
    place: Any, folder: Path, sites: str, data: Path, *, peer: str | None = None, steps: int = 1, validation: int = 3
) -> tuple[int, dict[str, Any]]:  # fmt: skip
    """`splitpeer audit` of the clinic without masks; its exit code and run folders by their path."""
    path, job, out = folder / "peer.toml", folder / "job.toml", folder / "audit"
    path.write_text((peer or PEER).format(data=data, salt=place.salt))
    text = place.job.read_text().replace("validation = 3", f"validation = {validation}")
    job.write_text(text.replace(SITES, sites))
    code = run("audit", "--quick", "--config", path, "--job", job, "--attack", "pca", "--steps", steps, "--views", 1,
               "--samples", validation, "--out", out)  # fmt: skip
    found = {
        path.parent.relative_to(out).as_posix(): json.loads(path.read_text())
        for path in out.glob("**/attack.json")
    }
    return code, found


def test_an_audit_rehearses_the_seats_that_the_site_is_offered(place: Any, tmp_path: Path) -> None:
    """Its t1 counts only together with t2, which another site holds."""
    sites = f'{BOTH}\nother = ["t1", "t2"]\n[seats]\nmr = ["t1", "t2"]'
    code, found = audited(place, tmp_path, sites, place.data)
    assert code == 0
    assert {name: one["entries"][0]["modality"] for name, one in found.items()} == {"0-undefended": "flair"}


def with_gaps(place: Any, folder: Path, flair: range, t1: range) -> Path:
    for modality, numbers in (("flair", flair), ("t1", t1)):
        (folder / modality).mkdir(parents=True)
        for number in numbers:
            name = f"patient-{number}.nii.gz"
            (folder / modality / name).symlink_to(place.data / modality / name)
    return folder


def keys(place: Any, numbers: range) -> set[bytes]:
    """Of the patients with these numbers."""
    salt = load_salt(place.salt)
    return {pseudonym(salt, f"patient-{number}") for number in numbers}


@pytest.mark.parametrize(("flair", "t1"), [(range(7), range(2, 8)), (range(4), range(4, 8))])
def test_an_audit_covers_whoever_fills_a_seat(place: Any, tmp_path: Path, flair: range, t1: range) -> None:
    """As live: also a patient who lacks the other seat, even where nobody has both."""
    code, found = audited(
        place, tmp_path, BOTH, with_gaps(place, tmp_path / "data", flair, t1), steps=12, validation=4
    )
    assert code == 0 and found.keys() == {"0-undefended/flair", "0-undefended/t1"}
    some = len({*flair} ^ {*t1})
    note = f"{some} of 8 patients fill only some of flair, t1."
    capture = open_capture(tmp_path / "audit" / "0-undefended" / "coordinator.cap")
    for seat, numbers in (("flair", flair), ("t1", t1)):
        assert note in found[f"0-undefended/{seat}"]["notes"]
        trained = coordinator_view(capture, seat, mode="train", every_step=True, choose=lambda every: every)
        attacked = coordinator_view(capture, seat, mode="evaluate", choose=lambda every: every)
        for view in (trained, attacked):
            assert {target.sample.key for target in view.targets} <= keys(place, numbers)
        alone = keys(place, numbers) - keys(place, t1 if seat == "flair" else flair)
        assert alone & {target.sample.key for view in (trained, attacked) for target in view.targets}


def test_an_audit_of_a_seat_that_nobody_fills_says_why(place: Any, tmp_path: Path, capsys: Any) -> None:
    code, found = audited(
        place, tmp_path, STACKED, with_gaps(place, tmp_path / "data", range(4), range(4, 8))
    )
    assert code != 0 and not found
    assert "no patient has all of flair, t1 (seat mri)" in capsys.readouterr().err


def test_an_audit_without_a_patient_to_attack_says_why(place: Any, tmp_path: Path, capsys: Any) -> None:
    code, found = audited(
        place, tmp_path, BOTH, with_gaps(place, tmp_path / "data", range(8), range(1)), validation=1
    )
    assert code != 0 and not found
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert "who fills t1: set [data] validation" in line


def test_who_has_withdrawn_consent_is_not_audited(place: Any, tmp_path: Path, capsys: Any) -> None:
    """The list is the site's own, and the audit leaves no trace of its own in [peer] state."""
    (tmp_path / "withdrawn.txt").write_text("patient-0\n")
    listed = f'[data]\nwithdrawn = "{tmp_path / "withdrawn.txt"}"'
    state = tmp_path / "state"
    told = PEER.replace("[data]", listed).replace("[tls]", f'state = "{state}"\n[tls]')
    code, found = audited(place, tmp_path, BOTH, place.data, peer=told, steps=3, validation=3)
    assert code == 0 and found and not state.exists()
    records = open_capture(tmp_path / "audit" / "0-undefended" / "coordinator.cap").records()
    (inventory,) = (record.message for record in records if record.name == "inventory")
    assert {patient.key for patient in inventory.patients} == keys(place, range(1, 8))

    # The daemon has seen a list that is gone now: nobody knows who is on it.
    state.mkdir()
    (state / LIST_SEEN).touch()
    (tmp_path / "withdrawn.txt").unlink()
    code, _ = audited(place, tmp_path, BOTH, place.data, peer=told)
    assert code != 0 and "the list of withdrawn patients is gone" in capsys.readouterr().err


def test_the_cache_of_an_audit_is_shared_by_its_modalities(
    place: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []

    class Watched(Volumes):
        def __init__(self, *args: Any, cache_mib: int, **named: Any) -> None:
            made.append(cache_mib)
            super().__init__(*args, cache_mib=cache_mib, **named)

    monkeypatch.setattr(images, "Volumes", Watched)
    told = PEER.replace("[data]", "[data]\ncache_mib = 64")
    assert audited(place, tmp_path, BOTH, place.data, peer=told)[0] == 0
    assert made == [32, 32]


PEER = """\
[peer]
role = "client"
site = "clinic"
federation = "test"
modality = ["flair", "t1"]
[tls]
ca = "ca.crt"
certificate = "a.crt"
key = "a.key"
[network]
coordinator = "tcp://localhost:7443"
[data]
images = "{data}"
salt = "{salt}"
[policy]
coordinators = ["hub"]
"""
