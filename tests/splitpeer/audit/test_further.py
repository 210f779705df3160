"""What an audit attacks besides the samples alone: slices around them, hospitals that help, and who was trained on."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from splitpeer.attacks.base import Result
from splitpeer.audit import release_audit, site_audit, together
from splitpeer.audit.cohort import Cohort
from splitpeer.audit.experiment import Order
from splitpeer.audit.judge import Outcome, drawn_from
from splitpeer.audit.rehearsal import Protection
from splitpeer.audit.release_audit import ReleaseAudit
from splitpeer.audit.site_audit import SiteAudit
from splitpeer.audit.stand_in_partners import StandIns, drawn_as
from splitpeer.audit.together import Complete
from splitpeer.audit.wider import WIDER, wider_orders
from splitpeer.errors import AttackImpossible
from splitpeer.leakage import own_image, synthesis
from splitpeer.leakage.tumour import train_segmenter
from splitpeer.report.words import NEIGHBOURS
from splitpeer.settings.job import JobConfig
from splitpeer.settings.peer import PeerConfig
from splitpeer.training.sums import fused
from splitproto import codings

from .test_audit_command import site as site
from .test_release_audit import POLICY, SUM, run, words_of

INVERSE = "inverse:steps=2,width=4"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Networks that judge are not trained well; none of this is about them."""
    for module in (release_audit, site_audit):
        monkeypatch.setattr(module, "make_judge", partial(module.make_judge, tumour=False))
    trained = synthesis.Synthesiser.train
    monkeypatch.setattr(
        synthesis.Synthesiser, "train", classmethod(lambda cls, *given: trained(*given, steps=4))
    )
    monkeypatch.setattr(
        own_image,
        "train_segmenter",
        lambda *given, **more: train_segmenter(*given, **more | {"steps": 2}),
    )


def renamed(folder: Path, out: Path) -> Path:
    """The same images of other people."""
    for path in folder.rglob("*.nii.gz"):
        (out / path.parent.name).mkdir(parents=True, exist_ok=True)
        shutil.copy(path, out / path.parent.name / path.name.replace("patient", "other"))
    return out


def test_a_site_reads_what_neighbours_helpers_and_its_training_show(
    place: Any, site: Path, tmp_path: Path, capsys: Any
) -> None:
    site.write_text(site.read_text().replace('defences = ["dropout:0.3"]\n', ""))
    out = tmp_path / "audit"
    code = run("audit", "--config", site, "--job", place.job, "--attack", INVERSE, "--wider", "inverse", "--budget", 1,
               "--labels", place.data / "labels", "--convention", "msd", "--shadow", place.shadow, "--partners",
               renamed(place.shadow, tmp_path / "others"), "--steps", 2, "--views", 1, "--samples", 2,
               "--out", out)  # fmt: skip
    assert code == 0, capsys.readouterr().err
    plain = json.loads((out / "0-undefended" / "attack.json").read_text())
    entries = {(e["attack"], e["reads"]): e for e in plain["entries"]}
    assert set(entries) == {("inverse", ""), ("inverse", NEIGHBOURS), ("membership", "")}
    near, member = entries["inverse", NEIGHBOURS], entries["membership", ""]
    # With the effort of the attack that reads the samples alone.
    assert near["settings"]["steps"] == 2 and near["settings"]["width"] == [4]
    assert near["scores"]["ssim"]["low"] is not None and near["scores"]["ssim"]["floors"]
    # Three held out, and as many who were trained on, of up to four slices each.
    assert member["scores"]["member_auc"]["patients"] == 6 and member["scores"]["member_auc"]["samples"] > 6
    # The job's own training is what reference encoders would repeat; six strangers are too few for any.
    assert (
        member["settings"] | {"steps": 2, "batch": 3, "rate": 5e-3, "poses": "any", "task": "masks"}
        == (member["settings"])
    )
    assert "6 people, 8 are needed" in member["notes"][-1] and "own half" in " ".join(member["assumptions"])
    assert member["scores"]["member_tpr"]["floors"] == {"guessing": 0.01}
    helped = json.loads((out / "0-undefended" / "others-collude" / "attack.json").read_text())
    assert [e["clear"] for e in helped["entries"]] == [["flair"]] and len(helped["patients"]) == 2
    scores = helped["entries"][0]["scores"]
    assert scores["ssim"]["floors"][drawn_from(("flair",))] is not None
    assert scores["advantage_ssim"]["mean"] == pytest.approx(
        scores["ssim"]["mean"] - scores["ssim"]["floors"][drawn_from(("flair",))]
    )
    page = words_of(out / "report.html")
    for said in (
        "each slice read together with those above and below it", "With hospitals that show it flair of the same",
        "what was sent adds", "Whom the network learned from", "the right one is named in", "false alarms",
        "was measured on people of whom all contrasts are at hand (others)",
    ):  # fmt: skip
        assert said in page, said
    assert "Parties that work together" not in page and "Membership inference: whether" not in page


def test_wider_views_are_of_what_is_read_of_a_coding(
    place: Any, site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SP-11.21-7. To code again what a coding has rounded changes nothing."""
    found: list[dict[str, np.ndarray]] = []
    made = release_audit.Onlooker.targets
    monkeypatch.setattr(
        release_audit.Onlooker,
        "targets",
        lambda self, samples, levels: (found.append(levels), made(self, samples, levels))[1],
    )
    job = tmp_path / "coded.toml"
    job.write_text(place.job.read_text() + '[wire]\nactivations = "int4"\n')
    site.write_text(site.read_text().replace('defences = ["dropout:0.3"]\n', ""))
    audit = SiteAudit(PeerConfig.load(site), JobConfig.load(job), tmp_path / "out", samples=2, shadow_images=20,
                      partners=renamed(place.shadow, tmp_path / "others"), wider=(INVERSE,), steps=1)  # fmt: skip
    audit.run(["pca"], [Protection()])
    assert len(found) == 3, "samples, slices around them, and people of whom helpers have images"
    for values in (array for levels in found for array in levels.values()):
        again = codings.decode(codings.encode(values, "int4"), "int4", values.shape[1:])
        assert np.array_equal(again, values)


def test_without_strangers_nobody_is_asked_who_was_trained_on(
    place: Any, site: Path, tmp_path: Path, capsys: Any
) -> None:
    out = tmp_path / "audit"
    (tmp_path / "flair").mkdir()
    shutil.copytree(place.shadow / "flair", tmp_path / "partners" / "flair")
    code = run("audit", "--config", site, "--job", place.job, "--attack", "pca", "--wider", INVERSE, "--budget", 1,
               "--partners", tmp_path / "partners", "--steps", 1, "--views", 1, "--samples", 2,
               "--set", "policy.defences=[]", "--out", out)  # fmt: skip
    assert code == 0, capsys.readouterr().err
    page = words_of(out / "report.html")
    assert "give --shadow DIR with labels/" in page
    assert "membership" not in {
        e["attack"] for e in json.loads((out / "0-undefended" / "attack.json").read_text())["entries"]
    }


def test_of_a_sum_whose_encoders_learn_it_is_asked_who_was_trained_on(
    place: Any, site: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(release_audit, "of_a_sum", list)
    job, out = tmp_path / "job.toml", tmp_path / "audit"
    job.write_text(place.job.read_text().replace("[model]\n", f"[model]\n{SUM}"))
    policy = POLICY.replace('encoders = "frozen"\n', "").replace('releases = "once"\n', "")
    site.write_text(site.read_text().replace('defences = ["dropout:0.3"]\n', policy))
    code = run("audit", "--config", site, "--job", job, "--shadow", place.shadow, "--partners", place.data,
               "--labels", place.data / "labels", "--convention", "msd", "--steps", 1, "--samples", 2,
               "--attack", "pca", "--wider", INVERSE, "--budget", 1, "--out", out)  # fmt: skip
    assert code == 0, capsys.readouterr().err
    for name, encoders in (("sum", "all 2 encoders"), ("others-known", "the site's encoder")):
        found = json.loads((out / "0-undefended" / name / "attack.json").read_text())
        assert [(e["attack"], e["reads"]) for e in found["entries"]] == [
            ("pca", ""), ("inverse", NEIGHBOURS), ("membership", ""),
        ]  # fmt: skip
        member = found["entries"][-1]
        assert (
            f"the weights of {encoders}" in member["assumptions"]
            and "the patients' labels" in member["assumptions"]
        )
        assert member["scores"]["member_auc"]["low"] < member["scores"]["member_auc"]["high"]
    together = json.loads(
        (out / "0-undefended" / "others-known" / "others-collude" / "attack.json").read_text()
    )
    assert together["entries"][0]["defences"] == ["secure sum of 2 hospitals, others known with their images"]


SITES = """[sites]
site-flair = "flair"
site-t1 = "t1"
site-t2 = "t2"
"""


def test_of_a_sum_one_partner_and_all_of_them_subtract_their_parts(
    place: Any, site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same patients at all hospitals: what is attacked are the sites' own integers, without the helpers'."""
    found: dict[str, dict[str, np.ndarray]] = {}
    asked = release_audit.Onlooker.experiment

    def noted(self: Any, samples: Any, levels: Any, *rest: Any) -> Any:
        found[self.summed] = levels
        return asked(self, samples, levels, *rest)

    monkeypatch.setattr(release_audit.Onlooker, "experiment", noted)
    monkeypatch.setattr(release_audit, "of_a_sum", list)
    parties = []
    made = together.Allies.experiments
    monkeypatch.setattr(
        together.Allies,
        "experiments",
        lambda self, *given: (parties.append((self, *given)), made(self, *given))[1],
    )
    job = tmp_path / "job.toml"
    text = (
        place.job.read_text()
        .replace("[model]\n", f"[model]\n{SUM}")
        .replace("validation = 3", "validation = 4")
    )
    text = text.replace("[training]\n", '[training]\nencoders = "frozen"\n')
    job.write_text(text.replace('[sites]\nsite-flair = "flair"\nsite-t1 = "t1"\n', SITES))
    site.write_text(site.read_text().replace('defences = ["dropout:0.3"]\n', POLICY).replace(
        'partners = ["site-flair"]', 'partners = ["site-flair", "site-t2"]'))  # fmt: skip
    partners = shutil.copytree(place.data, tmp_path / "partners")
    shutil.copytree(place.shadow / "flair", partners / "t2")
    audit = ReleaseAudit(PeerConfig.load(site), JobConfig.load(job), tmp_path / "out", partners=partners, samples=4,
                         shadow_images=20, wider=(INVERSE,))  # fmt: skip
    folders = audit.run([INVERSE], [Protection()])
    assert {folder.name for folder in folders} == {"others-known", "one-colludes", "others-collude", "sum"}
    name = "secure sum of 3 hospitals"
    assert set(found) == {
        name, f"{name}, others known", f"{name}, one known with its images", f"{name}, others known with their images",
    }  # fmt: skip
    (allies, people, _), *_ = parties
    assert people.source == "the same patients at all hospitals"
    samples = people.targets.samples
    parts = (*allies.alone.parts, *allies.parts)
    values = together.sent(parts, samples, people.shown(parts, "site-t1", {}))
    terms = allies.alone.job.fusion
    whole = fused({"site-t1": values["site-t1"]}, terms)
    assert whole.keys() == found[f"{name}, others known with their images"].keys()
    for level, array in found[f"{name}, others known with their images"].items():
        np.testing.assert_array_equal(array, whole[level])
    # Of the two partners one is left in the sum.
    lefts = [
        fused({s: of for s, of in values.items() if s != gone}, terms) for gone in ("site-flair", "site-t2")
    ]
    one = found[f"{name}, one known with its images"]
    assert any(all(np.array_equal(left[level], one[level]) for level in one) for left in lefts)


def partners_of(place: Any, folder: Path, tmp_path: Path, site: Path) -> StandIns:
    return StandIns.find(JobConfig.load(place.job), PeerConfig.load(site), "site-t1", folder, tmp_path)


def test_whose_contrasts_are_all_at_hand(place: Any, site: Path, tmp_path: Path) -> None:
    cohort = place.cohort()
    own, keys = Cohort({"t1": cohort.images["t1"]}), cohort.keys()
    from splitproto.records import Sample

    targets = [Sample(key, (0, 0, 4)) for key in keys[:3]]
    find = partial(
        Complete.find, own, targets=targets, training=keys[3:], window=(32, 32, 1), images=8, seed=0
    )
    same = find(partners_of(place, place.data, tmp_path, site))
    assert [one.key for one in same.targets.samples] == keys[:3]
    assert {one.key for one in same.others.samples} <= set(keys[3:])
    assert np.array_equal(
        same.targets.images["t1"][0, 0], own.images["t1"].window(keys[0], (0, 0, 4), (32, 32, 1))[0, ..., 0]
    )
    strangers = find(partners_of(place, renamed(place.shadow, tmp_path / "others"), tmp_path, site))
    assert len(strangers.targets.samples) == 2 and strangers.source == "others"
    assert not {s.key for s in strangers.targets.samples} & {s.key for s in strangers.others.samples}
    assert {"t1", "flair"} == set(strangers.others.images)
    shutil.rmtree(tmp_path / "others" / "t1")
    with pytest.raises(AttackImpossible, match="shows no patient in this hospital's contrasts"):
        find(partners_of(place, tmp_path / "others", tmp_path, site))


def test_an_attack_on_a_wider_view_has_the_effort_of_what_it_builds_on() -> None:
    settings = {
        "epochs": 80,
        "steps": None,
        "rate": 1e-3,
        "batch": 8,
        "width": (16,),
        "share": 1.0,
        "seed": 5,
    }
    done = [Outcome(None, Result("inverse", "image", np.zeros(1), True, (), settings), "t1")]
    carried = {k: v for k, v in settings.items() if k != "seed"}
    assert wider_orders(("inverse", "refined:epochs=2", "whitebox"), done) == [
        Order("inverse", carried), Order("refined", carried | {"epochs": "2"}), Order("whitebox"),
    ]  # fmt: skip
    assert [order.attack for order in wider_orders(WIDER, [])] == ["inverse", "refined"]


def test_two_contrasts_of_the_phantom_stand_for_two_modalities() -> None:
    assert drawn_as(["adc", "flair", "t2"]) == {"adc": "t1", "flair": "flair", "t2": "t2"}
    assert len(set(drawn_as(["adc", "dwi", "ct", "flair"]).values())) == 4
