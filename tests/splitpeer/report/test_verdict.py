"""Bands and answers: what they say follows from the figures, and they never reassure without grounds."""

from __future__ import annotations

from typing import Any

import pytest

from splitpeer.leakage.scores import Score
from splitpeer.report.bands import epsilon_words, image_band, mask_band, recognised, tumour_shows
from splitpeer.report.cards import Card
from splitpeer.report.findings import MemberFinding, configurations, pair
from splitpeer.report.model import AuditRun, Entry, Point, Source
from splitpeer.report.store import Folder
from splitpeer.report.tables import attack_rows
from splitpeer.report.verdict import answers
from splitpeer.report.words import NEIGHBOURS


def ssim(
    mean: float, low: float | None = None, high: float | None = None, floor: float = 0.2
) -> dict[str, Score]:
    return {"ssim": Score(mean, low, high, mean, 8, 8, {"mean image": floor, "other": floor / 2})}


@pytest.mark.parametrize(
    ("mean", "rank"), [(0.1, 0), (0.2, 0), (0.23, 0), (0.25, 1), (0.45, 2), (0.7, 3), (0.93, 4), (1.0, 4)]
)
def test_bands_go_by_the_way_from_floor_to_one(mean: float, rank: int) -> None:
    assert image_band(ssim(mean)).rank == rank


def test_uncertainty_is_no_comfort() -> None:
    assert image_band(ssim(0.2, 0.05, 0.4)).rank == 1
    assert image_band(ssim(0.2, 0.18, 0.21)).rank == 0


def test_without_truth_there_is_no_band() -> None:
    assert image_band({}) is None and mask_band({}) is None
    assert image_band({"ssim": Score(None)}) is None


@pytest.mark.parametrize(
    ("auc", "high", "dice", "rank"),
    [(0.8, 0.81, 0.3, 0), (0.79, 0.9, 0.3, 1), (0.9, 0.91, 0.9, 2), (0.96, 0.97, 0.5, 3), (0.99, 1, 0.8, 4)],
)
def test_bands_of_outlines(auc: float, high: float, dice: float, rank: int) -> None:
    scores = {"auc": Score(auc, auc, high, auc, 8, 8, {"usual": 0.8}), "dice_oracle": Score(dice)}
    assert mask_band(scores).rank == rank


def test_a_low_likeness_may_still_show_the_tumour_and_the_patient() -> None:
    scores = {
        "tumour_dice": Score(0.5, floors={"mean image": 0.1}, ceiling=0.7),
        "reidentification": Score(0.5, 0.3, 0.7, floors={"chance": 0.1}),
    }
    assert tumour_shows(scores) and recognised(scores)
    assert not tumour_shows({"tumour_dice": Score(0.3, floors={"mean image": 0.1}, ceiling=0.7)})
    assert not recognised({"reidentification": Score(0.2, 0.05, 0.4, floors={"chance": 0.1})})


def test_epsilon_in_words() -> None:
    said = [epsilon_words(value) for value in (0.5, 3, 8, 50)]
    assert len(set(said)) == 4 and "hardly" in said[-1]


def entry(name: str, mean: float | None, *, tumour: float = 0.1, **fields: Any) -> Entry:
    scores = (
        {} if mean is None else ssim(mean) | {"tumour_dice": Score(tumour, floors={"m": 0.1}, ceiling=0.7)}
    )
    return Entry(
        id=name,
        **{"attack": name, "title": name, "goal": "image", "modality": "T1", "scores": scores} | fields,
    )


def outline(name: str, auc: float, **fields: Any) -> Entry:
    scores = {"auc": Score(auc, auc, auc, auc, 8, 8, {"usual": 0.7}), "dice_otsu": Score(0.6)}
    return Entry(id=name, attack=name, title=name, goal="mask", modality="T2", scores=scores, **fields)


def answer(*entries: Entry, dice: dict[str, float] | None = None, points: tuple[Point, ...] = ()) -> tuple:
    run = AuditRun(
        capture=Source(role="coordinator"),
        entries=entries,
        dice={name: {"mean": value} for name, value in (dice or {}).items()},
    )
    folders = [Folder(path=None, run=run)]
    return answers(configurations(folders, pair(folders)), points)


def said(one: Any) -> str:
    return " ".join((one.short, *one.details))


def test_the_worst_attack_answers() -> None:
    images, labels, _ = answer(entry("weak", 0.3), entry("strong", 0.97, tumour=0.6), outline("norms", 0.99))
    assert images.band.rank == 4 and "strong" in said(images) and "weak" not in said(images)
    assert "target can be found" in said(images) and "0.60" in said(images)
    assert labels.band.rank == 3 and "norms" in said(labels)


def test_two_sites_of_one_modality_are_told_apart() -> None:
    images, labels, _ = answer(
        entry("strong", 0.97, site="north"),
        entry("weak", 0.3, site="south"),
        outline("norms", 0.99, site="west"),
    )
    assert "T1 at north: " in said(images) and "T1 at south: " in said(images)
    assert "The hospital with T2: " in said(labels)  # the only one
    images, _, _ = answer(entry("strong", 0.97, site="north"), entry("weak", 0.3, site="north"))
    assert "T1: " in said(images) and "north" not in said(images)


def test_nothing_tested_and_nothing_measured_are_said() -> None:
    assert "Not tested" in answer()[0].short and "Not tested" in answer()[1].short
    assert "Not measured" in answer(entry("blind", None))[0].short
    assert "No defence" in answer(entry("plain", 0.9))[2].short


def test_a_naive_attack_never_speaks_for_a_defence() -> None:
    naive = entry("naive", 0.21, defences=("dropout:0.5",), adaptive=False)
    images, _, defences = answer(naive, dice={"none": 0.8, "dropout:0.5": 0.79})
    assert images.band is None and "Not judged" in images.short
    assert "No defence was judged" in defences.short
    both = answer(naive, entry("naive2", 0.95, attack="naive", defences=("dropout:0.5",)))
    assert both[0].band.rank == 4


def test_where_the_naive_form_saw_more_it_counts() -> None:
    naive = entry("a", 0.95, defences=("dropout:0.5",), adaptive=False)
    adaptive = entry("b", 0.5, attack="a", defences=("dropout:0.5",))
    assert answer(naive, adaptive)[0].band.rank == 4


def test_what_a_defence_buys() -> None:
    entries = (
        entry("plain", 1.0),
        entry("useless", 0.98, defences=("dropout:0.5",)),
        entry("cheap", 0.7, defences=("gaussian:3",)),
        entry("dear", 0.3, defences=("gaussian:20",)),
    )
    dice = {"none": 0.8, "dropout:0.5": 0.79, "gaussian:3": 0.78, "gaussian:20": 0.5}
    *_, bought = answer(*entries, dice=dice)
    assert "0.70 instead of 1.00, by gaussian:3" in bought.short
    assert "The least leakage of all: gaussian:20" in said(bought) and "0.50" in said(bought)
    assert "Little or no gain against an adversary who knows the defence: dropout:0.5." in said(bought)
    *_, nothing = answer(*entries[:2], entries[3], dice={k: v for k, v in dice.items() if k != "gaussian:3"})
    assert "Nothing that was tried" in nothing.short
    *_, unknown = answer(*entries[:3])
    assert "not in these runs" in unknown.short


def test_a_sweep_answers_where_it_knows_more() -> None:
    points = (Point(name="none", dice=0.8, leakage=1.0), Point(name="image/noise", dice=0.79, leakage=0.5))
    *_, bought = answer(entry("plain", 1.0), dice={"none": 0.8}, points=points)
    assert "0.50 instead of 1.00, by image/noise" in bought.short


def test_order_of_defences_does_not_split_a_configuration() -> None:
    run = AuditRun(
        capture=Source(role="coordinator"),
        entries=(entry("a", 0.5, defences=("x", "y")), entry("b", 0.6, defences=("y", "x"))),
        dice={"y + x": {"WT": 0.5, "TC": 0.7, "ET": None}},
    )
    folders = [Folder(path=None, run=run)]
    (one,) = configurations(folders, pair(folders))
    assert len(one.images) == 2 and one.dice == pytest.approx(0.6)


def test_one_naive_attack_beside_two_adaptive_ones_is_listed_once() -> None:
    entries = (
        entry("one", 0.6, attack="a", defences=("dropout:0.5",)),
        entry("many", 0.9, attack="a", defences=("dropout:0.5",), views=100),
        entry("naive", 0.3, attack="a", defences=("dropout:0.5",), adaptive=False),
    )
    findings = pair([Folder(path=None, run=AuditRun(capture=Source(role="coordinator"), entries=entries))])
    assert [(f.entry.id, f.naive.id) for f in findings] == [("one", "naive"), ("many", "naive")]
    rows = attack_rows([Card(finding, number) for number, finding in enumerate(findings)])
    assert [row["entry"].id for row in rows] == ["one", "naive", "many"]


def test_what_hospitals_add_neither_answers_nor_reassures() -> None:
    """A high floor of their images must not make the coordinator's own result "no more than an average image"."""
    helped = entry("joined", 0.5, clear=("T2",), reads="with T2 in clear", defences=("secure sum, helped",))
    high = {"ssim": Score(0.5, None, None, 0.5, 8, 8, {"drawn from T2 of the same patient": 0.6})}
    images, *_ = answer(
        entry("alone", 0.4, defences=("secure sum",)), helped.model_copy(update={"scores": high})
    )
    assert images.band.rank > 0 and "alone" in said(images)
    assert "With hospitals that show it T2 of the same patient, T1 by joined" in said(images)
    assert "T2 alone show 0.60" in said(images) and "average image reaches 0.60" not in said(images)
    only, *_ = answer(helped)
    assert "T2 alone show" in said(only)


def test_neighbours_and_helpers_of_a_plain_job_have_sentences_of_their_own() -> None:
    gained = Score(0.05, 0.01, 0.09, None, 8, 8)
    helped = entry("joined", 0.7, clear=("T2",), reads="with T2 in clear")
    images, *_ = answer(
        entry("alone", 0.5), entry("near", 0.6, reads=NEIGHBOURS),
        helped.model_copy(update={"scores": {**helped.scores, "advantage_ssim": gained}}),
    )  # fmt: skip
    assert "T1, each slice read together with those above and below it, by near (likeness 0.60" in said(
        images
    )
    assert "With hospitals that show it T2 of the same patient, T1 by joined, without a defence" in said(
        images
    )
    assert "what was sent adds +0.05 [0.01 to 0.09]" in said(images)


def test_membership_is_said_with_what_its_interval_allows() -> None:
    def finding(low: float) -> MemberFinding:
        score = Score(0.7, low, 0.9, None, 20, 80, {"guessing": 0.5})
        return MemberFinding(entry("member", 0.0), "T1", score, Score(0.1, 0.0, 0.3, None, 20, 80))

    assert "named in 70 % [40 % to 90 %] of cases (guessing: 50 %), over 20 patients" in finding(0.4).sentence
    assert "does not tell who took part" in finding(0.4).sentence
    assert finding(0.55).sentence.endswith("So what was sent tells who took part.")
