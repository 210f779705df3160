"""`splitpeer audit` of a job with frozen encoders: what would be read of each window, of one site or as a sum."""

from __future__ import annotations

import html
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from splitpeer.audit import release_audit
from splitpeer.audit.invited import OWN_PATIENTS
from splitpeer.audit.rehearsal import Protection
from splitpeer.audit.release_audit import ReleaseAudit
from splitpeer.audit.released import of_a_sum
from splitpeer.audit.stand_in_partners import StandIns
from splitpeer.cli import main
from splitpeer.report.store import load_run
from splitpeer.settings.job import JobConfig
from splitpeer.settings.peer import PeerConfig
from splitproto import codings
from splitproto.fusion import greatest

from .test_audit_command import site as site

SUM = """fusion = "secure-sum"
widths = [1, 1, 2, 2, 2]
"""
POLICY = """encoders = "frozen"
fusion = "secure-sum"
releases = "once"
partners = ["site-flair"]
min_partners = 1
"""


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as left:
        main([str(argument) for argument in arguments])
    return int(left.value.code or 0)


@pytest.fixture
def job(place: Any, tmp_path: Path) -> Path:
    """Two sites, of whose frozen encoders only the sum is read."""
    path = tmp_path / "job.toml"
    frozen = place.job.read_text().replace("[model]\n", f"[model]\n{SUM}")
    path.write_text(frozen.replace("[training]\n", '[training]\nencoders = "frozen"\n'))
    return path


@pytest.fixture
def private(site: Path) -> Path:
    """A site that takes part in nothing else."""
    site.write_text(site.read_text().replace('defences = ["dropout:0.3"]\n', POLICY))
    return site


def words_of(page: Path) -> str:
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", page.read_text().partition("</style>")[2])).split())


def test_a_site_reads_what_the_sum_would_show_before_it_joins(
    place: Any, private: Path, job: Path, tmp_path: Path, capsys: Any
) -> None:
    out = tmp_path / "audit"
    code = run("audit", "--config", private, "--job", job, "--partners", place.shadow,
 "--attack", "pca", "--attack", "whitebox:iterations=10",
               "--attack", "inverse:steps=20,width=8",
               "--attack", "sum-search:steps=5,width=8,iterations=2", "--samples", 2, "--budget", 1,
               "--quick", "--out", out)  # fmt: skip
    assert code == 0, capsys.readouterr().err
    assert "no byte left this machine" in capsys.readouterr().err
    runs = {path.parent.name: json.loads(path.read_text()) for path in out.glob("*/*/attack.json")}
    assert set(runs) == {"sum", "others-known"}
    for name, reads in (
        ("sum", "secure sum of 2 hospitals"),
        ("others-known", "secure sum of 2 hospitals, others known"),
    ):
        found = runs[name]
        assert (
            found["capture"]["rehearsal"] and found["capture"]["summed"] == 2 and found["capture"]["frozen"]
        )
        assert [level["precision"] for level in found["network"]["levels"]] == ["i16"] * 5
        assert {level["gradient_octets"] for level in found["network"]["levels"]} == {None}
        # This site's images alone are judged; the partner's are not its to see.
        entries = [(e["attack"], e["modality"], e["site"], e["defences"]) for e in found["entries"]]
        wanted = ("pca", "whitebox", "inverse", "sum-search")
        assert entries == [(a, "t1", "site-t1", [reads]) for a in wanted]
        assert all(e["scores"]["ssim"]["mean"] is not None for e in found["entries"])
        assert f"the weights of {'all 2 encoders' if name == 'sum' else 'the site'}" in str(
            found["entries"][1]
        )
    page = words_of(out / "report.html")
    for said in (
        "What can the coordinator see of our images?", "Nothing: no gradient is sent.",
        "What the coordinator cannot see",
        "In a secure sum of 2 hospitals, others known", "The partners are stand-ins", "other people", OWN_PATIENTS,
        "from one hospital, which is sent once", "Nothing has left the hospital", "The sum itself is not protected.",
    ):  # fmt: skip
        assert said in page or said.lower() in page.lower(), said
    said = json.loads((out / "report.json").read_text())
    assert {row["name"] for row in said["configurations"]} == {
        e["defences"][0] for r in runs.values() for e in r["entries"]
    }
    assert (out / "report.html").read_text().count("data:image/png;base64,") > 20


def audit_of(private: Path, job: Path, out: Path, **more: Any) -> ReleaseAudit:
    return ReleaseAudit(
        PeerConfig.load(private), JobConfig.load(job), out, samples=2, shadow_images=20, wider=(), **more
    )


def levels_of(audit: ReleaseAudit, monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, np.ndarray]]:
    """By adversary, what was attacked: {"x0": float32 [N, C, *spatial], ...}."""
    from splitpeer.audit import released

    found: dict[str, dict[str, np.ndarray]] = {}
    asked = released.Onlooker.experiment

    def noted(self: Any, samples: Any, levels: Any, *rest: Any) -> Any:
        found["sum" if len(self.parts) > 1 else "alone"] = levels
        return asked(self, samples, levels, *rest)

    monkeypatch.setattr(released.Onlooker, "experiment", noted)
    audit.run(["pca"], [Protection()])
    return found


def test_what_is_attacked_are_the_sites_integers(
    place: Any, private: Path, job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Partners of whom the same patients are known: the sum less the own part is the partner's, on the same grid."""
    shutil.copytree(place.data, tmp_path / "partners")
    audit = audit_of(private, job, tmp_path / "out", partners=tmp_path / "partners")
    monkeypatch.setattr(release_audit, "of_a_sum", list)
    found = levels_of(audit, monkeypatch)
    terms = audit_terms(job)
    scale = greatest(terms) / terms.range
    for name, total in found["sum"].items():
        for levels in (total, found["alone"][name], total - found["alone"][name]):
            assert np.abs(levels * scale - np.rint(levels * scale)).max() < 0.05, name
        assert np.abs(total - found["alone"][name]).max() > 0.01, "the partner says something"
    notes = load_run(tmp_path / "out" / "0-undefended" / "sum").run.notes
    assert any("the same patients" in note for note in notes)


def test_the_search_that_is_made_for_sums_runs_on_them_in_any_case() -> None:
    assert of_a_sum(["pca", "inverse:steps=2"]) == ["pca", "inverse:steps=2", "sum-search"]
    assert of_a_sum(["sum-search:steps=2"]) == ["sum-search:steps=2"]


def audit_terms(job: Path) -> Any:
    from splitpeer.federation.terms import job_on_wire

    return job_on_wire(JobConfig.load(job)).fusion


def test_stand_ins_are_as_high_in_the_head_and_nobody_changes(
    place: Any, private: Path, job: Path, tmp_path: Path
) -> None:
    config, settings = PeerConfig.load(private), JobConfig.load(job)
    stand_ins = StandIns.find(settings, config, "site-t1", place.shadow, tmp_path)
    own = place.cohort().images["t1"]
    keys = own.keys()
    from splitproto.records import Sample

    placed = [stand_ins._place(Sample(key, (0, 0, 9)), own, (32, 32, 1)) for key in (*keys, *keys)]
    assert [one.key for one in placed[: len(keys)]] == [one.key for one in placed[len(keys) :]]
    assert {one.origin for one in placed} == {(0, 0, 9)}
    # Ids of both folders are alike, and so are the first six patients; the salt is this site's.
    assert sum(one.key == key for one, key in zip(placed, keys, strict=False)) == 6 and stand_ins.strangers


def test_without_a_sum_each_site_is_read_by_itself(place: Any, site: Path, tmp_path: Path) -> None:
    path, out = tmp_path / "frozen.toml", tmp_path / "audit"
    path.write_text(place.job.read_text().replace("[training]\n", '[training]\nencoders = "frozen"\n'))
    code = run("audit", "--config", site, "--job", path, "--attack", "whitebox:iterations=5", "--samples", 1,
               "--budget", 1, "--quick", "--out", out)  # fmt: skip
    assert code == 0
    found = {
        name: json.loads((out / name / "attack.json").read_text()) for name in ("0-undefended", "1-defended")
    }
    assert [e["adaptive"] for e in found["1-defended"]["entries"]] == [True, False]
    assert found["0-undefended"]["capture"]["summed"] is None
    page = words_of(out / "report.html")
    assert "Nothing: no gradient is sent." in page and "What the coordinator cannot see" not in page


def test_what_is_attacked_is_what_is_read_of_a_coding(
    place: Any, site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SP-11.21-7. A coordinator of frozen encoders reads four bits a value, and not what they are rounded from."""
    site.write_text(site.read_text().replace('defences = ["dropout:0.3"]\n', ""))
    plain, coded = tmp_path / "plain.toml", tmp_path / "coded.toml"
    plain.write_text(place.job.read_text().replace("[training]\n", '[training]\nencoders = "frozen"\n'))
    coded.write_text(plain.read_text() + '[wire]\nactivations = "int4"\n')
    exact, found = (
        levels_of(audit_of(site, job, tmp_path / job.stem), monkeypatch)["alone"] for job in (plain, coded)
    )
    for name, values in exact.items():
        read = codings.decode(codings.encode(values, "int4"), "int4", values.shape[1:])
        assert np.array_equal(found[name], read) and not np.array_equal(read, values), name


def test_what_it_cannot_audit_is_one_line(
    place: Any, private: Path, job: Path, tmp_path: Path, capsys: Any
) -> None:
    def refused(said: str, *arguments: object) -> None:
        code = run("audit", "--config", private, "--out", tmp_path / "x", *arguments)
        line = capsys.readouterr().err.strip().splitlines()[-1]
        assert code == 4 and said in line and line.startswith("splitpeer: "), line

    refused("attack 'invrese' is unknown", "--job", place.job, "--wider", "invrese")
    (tmp_path / "empty").mkdir()
    assert (
        run(
            "audit",
            "--config",
            private,
            "--job",
            job,
            "--partners",
            tmp_path / "empty",
            "--out",
            tmp_path / "x",
        )
        == 4
    )
    private.write_text(private.read_text().replace('partners = ["site-flair"]', 'partners = ["other"]'))
    joint = tmp_path / "joint.toml"
    joint.write_text(job.read_text().replace('encoders = "frozen"\n', ""))
    refused("would be declined", "--job", joint)
