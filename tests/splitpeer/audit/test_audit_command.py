"""`splitpeer audit`: a site on its own, and a sweep that continues where it was stopped."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from splitpeer.attacks.view import coordinator_view
from splitpeer.captures.reader import open_capture
from splitpeer.cli import main
from splitpeer.training.forms import octets
from tests.splitpeer.roles.scene import free_port

SWEEP = """\
[sweep]
label_attacks = ["gradient-norm", "gradient-field"]
learned_label_attacks = []
budget = 1
seat = "t1"
attacks = ["pca", "whitebox:iterations=15"]
views = [1, 3]
targets = 2
shadow = 12
joint = ["whitebox:iterations=5"]
every = []
[data]
folder = "{data}"
shadow = "{shadow}"
[[configuration]]
name = "none"
[[configuration]]
name = "gaussian {{}}"
defences = ["gaussian:{{}}"]
strengths = [{strength}]
"""


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as left:
        main([str(argument) for argument in arguments])
    return int(left.value.code or 0)


@pytest.fixture
def site(place: Any, tmp_path: Path) -> Path:
    """A client's peer.toml; its certificates are never read, for nothing is sent."""
    path = tmp_path / "peer.toml"
    path.write_text(
        f"""
[peer]
role = "client"
site = "site-t1"
federation = "test"
modality = "t1"
[tls]
ca = "ca.crt"
certificate = "a.crt"
key = "a.key"
[network]
coordinator = "tcp://localhost:7443"
[data]
images = "{place.data / "t1"}"
salt = "{place.salt}"
[policy]
coordinators = ["hub"]
defences = ["dropout:0.3"]
levels = [0, 1, 2, 3, 4]
"""
    )
    return path


def test_a_site_rehearses_its_policy_and_reads_a_report(
    place: Any, site: Path, tmp_path: Path, capsys: Any
) -> None:
    out = tmp_path / "audit"
    code = run("audit", "--config", site, "--job", place.job, "--attack", "pca", "--attack", "whitebox:iterations=15",
               "--budget", 1, "--labels", place.data / "labels", "--convention", "msd", "--steps", 2, "--views", 2,
               "--samples", 2, "--quick", "--out", out)  # fmt: skip
    assert code == 0, capsys.readouterr().err
    page, said = (out / "report.html").read_text(), json.loads((out / "report.json").read_text())
    assert "dropout" in page and said
    runs = sorted(path.name for path in out.iterdir() if path.is_dir())
    assert runs == ["0-undefended", "1-defended"]
    found = json.loads((out / "1-defended" / "attack.json").read_text())
    assert found["capture"]["rehearsal"] and {e["attack"] for e in found["entries"]} == {"pca", "whitebox"}
    labels = json.loads((out / "1-defended" / "labels" / "attack.json").read_text())
    assert [(e["attack"], e["goal"]) for e in labels["entries"]] == [("gradient-norm", "mask")]
    every = json.loads((out / "1-defended" / "labels-all-steps" / "attack.json").read_text())
    assert [e["attack"] for e in every["entries"]] == [
        "gradient-norm",
        "gradient-field",
        "gradient-projector",
    ]
    assert "More than the own image" in page
    assert list(found["dice"]) == ["dropout:rate=0.3,kept=false,rescale=false"]


def test_without_masks_a_stand_in_is_trained_and_the_report_says_so(
    place: Any, site: Path, tmp_path: Path
) -> None:
    out = tmp_path / "audit"
    code = run("audit", "--config", site, "--job", place.job, "--attack", "pca", "--steps", 1, "--views", 1,
               "--samples", 2, "--quick", "--out", out)  # fmt: skip
    assert code == 0
    found = json.loads((out / "0-undefended" / "attack.json").read_text())
    assert any("stand-in" in note for note in found["notes"]) and not found["dice"]
    assert all(e["goal"] == "image" for e in found["entries"])


def test_what_a_site_cannot_audit_is_one_line(place: Any, site: Path, tmp_path: Path, capsys: Any) -> None:
    def refused(said: str, *arguments: object) -> None:
        code = run("audit", "--config", site, "--out", tmp_path / "x", *arguments)
        line = capsys.readouterr().err.strip().splitlines()[-1]
        assert code == 4 and said in line and line.startswith("splitpeer: "), line

    refused("--labels and --convention go together", "--job", place.job, "--labels", place.data / "labels")
    narrow = tmp_path / "narrow.toml"
    narrow.write_text(site.read_text().replace("levels = [0, 1, 2, 3, 4]", "levels = [1, 2, 3, 4]"))
    code = run("audit", "--config", narrow, "--job", place.job, "--out", tmp_path / "x")
    assert code == 4 and "the job would be declined" in capsys.readouterr().err
    elsewhere = tmp_path / "elsewhere.toml"
    elsewhere.write_text(place.job.read_text().replace('site-t1 = "t1"', 'site-t2 = "t2"'))
    refused("no site of this job holds t1", "--job", elsewhere)
    refused("is unknown", "--job", place.job, "--defence", "fog:1")


def test_a_guarantee_is_stated_in_figures(place: Any, site: Path, tmp_path: Path) -> None:
    out = tmp_path / "audit"
    private = site.read_text().replace('["dropout:0.3"]', '["dp-gaussian:clip=10,noise=1"]')
    site.write_text(private)
    code = run("audit", "--config", site, "--job", place.job, "--attack", "pca", "--steps", 2, "--views", 1,
               "--samples", 2, "--quick", "--out", out)  # fmt: skip
    assert code == 0
    assert json.loads((out / "0-undefended" / "attack.json").read_text())["privacy"] is None
    found = json.loads((out / "1-defended" / "attack.json").read_text())["privacy"]
    # Two steps of three windows while the encoder learns: six records count; mu = 2 sqrt(6) / 1.
    assert found["guarantee"] and found["releases"] == 6 and found["epsilon"] > 20
    # Phi(Phi^-1(.01) + 2 sqrt(6)) of a person's images are found with 1 % false alarms.
    assert found["alarms"] == 0.01 and found["finds"] == pytest.approx(0.995, abs=0.001)
    assert "with 1% false alarms finds 99.5% of them at most" in " ".join(
        re.sub(r"<[^>]+>", " ", (out / "report.html").read_text()).split()
    )


def test_a_sweep_is_resumed_and_only_what_changed_is_run_again(place: Any, tmp_path: Path) -> None:
    plan, out = tmp_path / "sweep.toml", tmp_path / "sweep"
    document = tmp_path / "privacy.md"
    document.write_text("<!-- sweep: begin -->\n<!-- sweep: end -->\n")

    def sweep(strength: float) -> dict[str, float]:
        plan.write_text(SWEEP.format(data=place.data, shadow=place.shadow, strength=strength))
        assert run("audit", "--sweep", plan, "--job", place.job, "--out", out, "--write", document) == 0
        return {path.parent.name: path.stat().st_mtime_ns for path in out.glob("*/point.json")}

    first = sweep(1)
    assert set(first) == {"none-seed7", "gaussian-1-seed7"}
    assert not list(out.glob("*/*.cap")), "captures are large and removed"
    points = {p["name"]: p for p in json.loads((out / "frontier.json").read_text())["points"]}
    assert points["none"]["leakage"] > points["gaussian 1"]["leakage"] > 0
    assert points["none"]["views"] == 1 and (out / "frontier.png").exists()
    figures = json.loads((out / "gaussian-1-seed7" / "point.json").read_text())["figures"]
    kinds = {(f["attack"], f["adaptive"], f["views"]) for f in figures if f["goal"] == "image"}
    assert {("whitebox", True, 1), ("whitebox", False, 1), ("whitebox", True, 3)} <= kinds
    assert ("whitebox", False, 3) not in kinds
    labels = [f for f in figures if f["goal"] == "mask"]
    assert {f["step"] for f in labels} == {1, 3, "all-steps"}
    assert {f["attack"] for f in labels} == {"gradient-norm", "gradient-field"}
    assert all("own image and other patients' labels" in f["scores"]["auc"]["floors"] for f in labels)
    assert points["none"]["each_worst"] >= points["none"]["leakage"] >= points["none"]["low"]
    assert "| gaussian 1 |" in document.read_text() or "**gaussian 1**" in document.read_text()

    assert sweep(1) == first, "nothing is done twice"
    again = sweep(2)
    assert again["none-seed7"] == first["none-seed7"] and "gaussian-2-seed7" in again


@pytest.mark.timeout(400)
def test_two_ranks_make_the_table_of_one(place: Any, tmp_path: Path) -> None:
    """Each in a folder of its own, as on two machines; the first has all figures, and each the runs of its share."""
    plan = tmp_path / "sweep.toml"
    text = SWEEP.format(data=place.data, shadow=place.shadow, strength=1)
    for written, less in (
        ("[1, 3]", "[1]"), ("joint =", "# joint ="), (', "whitebox:iterations=15"', ""), (', "gradient-field"', "")
    ):  # fmt: skip
        assert written in text
        text = text.replace(written, less)
    plan.write_text(text)
    assert run("audit", "--sweep", plan, "--job", place.job, "--out", tmp_path / "alone") == 0
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    shared |= {"MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "splitpeer.cli", "audit", "--sweep", plan, "--job", place.job, "--out",
             tmp_path / n],
            env={**os.environ, **shared, "RANK": n, "LOCAL_RANK": n},
            stderr=subprocess.PIPE,
            text=True,
        )
        for n in "01"
    ]  # fmt: skip
    said = [rank.communicate(timeout=300)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], said
    # Lines may be broken within a path.
    wrote = ["frontier.json" in "".join(one.split()) for one in said]
    assert wrote == [True, False], said
    for name in ("frontier.json", "table.md"):
        assert (tmp_path / "0" / name).read_text() == (tmp_path / "alone" / name).read_text()
        assert not (tmp_path / "1" / name).exists()
    parts = [{path.parent.name for path in (tmp_path / n).glob("*/point.json")} for n in "01"]
    assert parts == [{"none-seed7"}, {"gaussian-1-seed7"}]


def test_a_sweep_trains_and_attacks_under_the_codings_of_a_configuration(place: Any, tmp_path: Path) -> None:
    plan, out = tmp_path / "sweep.toml", tmp_path / "sweep"
    text = SWEEP.replace('joint = ["whitebox:iterations=5"]\n', "").replace("views = [1, 3]", "views = [1]")
    text = text.replace('"pca", "whitebox:iterations=15"', '"pca"').partition("[[configuration]]")[0]
    text += '[[configuration]]\nname = "four bits"\nwire = {{activations = "int4", gradients = "int8"}}\n'
    text += '[[configuration]]\nname = "by level"\nwire = {{activations = ["f32", "f16", "int8", "int4", "int4"]}}\n'
    plan.write_text(text.format(data=place.data, shadow=place.shadow))
    assert run("audit", "--sweep", plan, "--job", place.job, "--out", out, "--keep-captures") == 0
    capture = open_capture(out / "four-bits-seed7" / "coordinator.cap")
    assert capture.header.job.activations == "int4" and capture.header.job.gradients == "int8"
    view = coordinator_view(capture, "t1", choose=lambda found: found[:1])
    assert view.form == "int4" and len(np.unique(view.targets[0].shots[0].activations["x4"])) <= 15
    capture = open_capture(out / "by-level-seed7" / "coordinator.cap")
    assert capture.header.job.activations == ("f32", "f16", "int8", "int4", "int4")
    seen = coordinator_view(capture, "t1", choose=lambda found: found[:1]).targets[0].shots[0].activations
    assert len(np.unique(seen["x4"])) <= 15 < len(np.unique(seen["x0"]))
    told = json.loads((out / "by-level-seed7" / "attack.json").read_text())["network"]["levels"]
    assert [one["precision"] for one in told] == ["f32", "f16", "int8", "int4", "int4"]
    assert {one["gradient_precision"] for one in told} == {"f32"}
    values = [int(np.prod(one["shape"])) for one in told]
    assert [one["octets"] for one in told] == [
        octets(one["precision"], count) for one, count in zip(told, values, strict=True)
    ]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ('wire = {activations = ["int4", "f32"]}', "lists 2 codings"),
        ('levels = [4]\nwire = {gradients = ["int4", "f32"]}', "lists 2 codings"),
        ("levels = [1, 2]", "the bottleneck, must leave the site"),
        ("levels = [1, 9]", "must be distinct and of 0 to 4"),
    ],
)
def test_a_configuration_that_the_job_cannot_have_is_refused_in_one_line(
    place: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: str, said: str
) -> None:
    plan = tmp_path / "sweep.toml"
    plan.write_text(f'[[configuration]]\nname = "few"\n{more}\n')
    assert run("audit", "--sweep", plan, "--job", place.job, "--out", tmp_path / "sweep") == 4
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{plan}: [configuration] few: [" in line and said in line


def test_a_sweep_names_every_contrast_collusions_and_members(place: Any, tmp_path: Path) -> None:
    plan, out = tmp_path / "sweep.toml", tmp_path / "sweep"
    asked = 'every = ["pca"]\nneighbours = ["pca"]\ncollusion = ["inverse:steps=2,width=4"]\nmembers = 3'
    text = SWEEP.replace("every = []", asked).replace("views = [1, 3]", "views = [1]")
    text = text.replace(', "gradient-field"]', "]").partition('[[configuration]]\nname = "gau')[0]
    plan.write_text(text.format(data=place.data, shadow=place.shadow))
    assert run("audit", "--sweep", plan, "--job", place.job, "--out", out) == 0
    found = json.loads((out / "none-seed7" / "point.json").read_text())
    wider = found["wider"]
    assert set(wider["contrasts"]) == {"flair", "t1"} and wider["read_off"]["tumour_presence"] is not None
    assert [pair["with"] for pair in wider["together"]] == [["flair"]] and wider["together"][0]["floor"] > 0
    assert wider["members"]["member_auc"]["patients"] == 6
    assert {f["reads"] for f in found["figures"]} == {"", "all sites", "neighbouring slices"}
    assert found["by"].startswith("whitebox on ")
    assert "mean over contrasts" in (out / "table.md").read_text()
