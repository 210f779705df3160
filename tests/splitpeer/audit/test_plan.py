"""sweep.toml, the front, and the table."""

from __future__ import annotations

from pathlib import Path

import pytest

from splitpeer.audit.breadth import breadth_table
from splitpeer.audit.frontier import FrontierPoint, pareto, save
from splitpeer.audit.plan import SweepPlan
from splitpeer.audit.table import BEGIN, END, efforts, markdown, write_into
from splitpeer.defences.kinds import KINDS
from splitpeer.errors import ConfigError
from splitpeer.settings.job import Wire
from splitproto.codings import CODINGS

ROOT = Path(__file__).resolve().parents[3]


def plan(tmp_path: Path, text: str) -> SweepPlan:
    path = tmp_path / "sweep.toml"
    path.write_text(text)
    return SweepPlan.load(path)


def test_strengths_are_spelled_out(tmp_path: Path) -> None:
    found = plan(
        tmp_path, '[[configuration]]\nname = "g {}"\ndefences = ["gaussian:{}"]\nstrengths = [0.5, 3]\n'
    ).all()
    assert [(c.name, c.defences, c.slug) for c in found] == [
        ("g 0.5", ("gaussian:0.5",), "g-0.5"), ("g 3", ("gaussian:3",), "g-3"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "configuration"),
        ('[[configuration]]\nname = "a"\n[[configuration]]\nname = "A"\n', "twice"),
        ('[[configuration]]\nname = "a"\ndefenses = []\n', "defenses"),
        ('[[configuration]]\nname = "a"\nwire = {activations = "auto"}\n', "name a coding"),
        ('[[configuration]]\nname = "a"\nwire = {activations = ["int4", "auto"]}\n', "write it alone"),
        ('[sweep]\nviews = []\n[[configuration]]\nname = "a"\n', "views"),
    ],
)
def test_a_plan_that_cannot_be_is_refused_in_one_line(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        plan(tmp_path, text)
    assert said in str(caught.value) and "\n" not in str(caught.value) and "sweep.toml" in str(caught.value)


def test_a_configuration_may_name_codings(tmp_path: Path) -> None:
    shipped = SweepPlan.load(ROOT / "examples/privacy/codings.toml").all()
    said = {one.name: (one.wire.activations, one.wire.gradients) for one in shipped if one.wire is not None}
    assert said == {name: (name, name) for name in CODINGS} and shipped[0].wire is None
    (found,) = plan(
        tmp_path, '[[configuration]]\nname = "g {}"\nwire = {gradients = "int8"}\nstrengths = [1]\n'
    ).all()
    assert found.wire == Wire(gradients="int8")
    (found,) = plan(tmp_path, '[[configuration]]\nname = "g"\nwire = {activations = ["int4", "f32"]}\n').all()
    assert found.wire == Wire(activations=("int4", "f32"))


def test_the_plan_that_is_shipped_loads_and_has_every_defence() -> None:

    written = " ".join(
        text
        for c in SweepPlan.load(ROOT / "examples/privacy/sweep.toml").all()
        for text in (*c.defences, *c.image, *c.gradients)
    )
    # Leaving a level out of the job says what `withhold` says.
    missing = [name for name in KINDS if name not in written and name != "withhold"]
    assert not missing


def point(name: str, dice: float, leakage: float) -> FrontierPoint:
    return FrontierPoint(name, dice, leakage, by="whitebox", views=1, floor=0.3)


def test_the_front_is_what_nobody_beats(tmp_path: Path) -> None:
    points = [
        point("a", 0.8, 1.0),
        point("b", 0.7, 0.5),
        point("c", 0.6, 0.6),
        point("d", 0.8, 0.9),
        point("e", 0.5, 0.4),
    ]
    assert [p.name for p in pareto(points)] == ["b", "d", "e"]
    save(points, tmp_path)
    assert (tmp_path / "frontier.png").read_bytes()[:4] == b"\x89PNG"


def figure(
    views: int, ssim: float, *, adaptive: bool = True, goal: str = "image", step: int | None = None
) -> dict:
    key = "ssim" if goal == "image" else "auc"
    return {
        "attack": "x",
        "goal": goal,
        "adaptive": adaptive,
        "views": views,
        "step": step,
        "scores": {key: {"mean": ssim}},
    }


def test_the_table_says_how_sure_it_is_and_what_is_known_without_gradients() -> None:
    mask = figure(1, 0.97, goal="mask", step=1)
    mask["scores"]["auc"]["floors"] = {"inside the body": 0.5, "own image and other patients' labels": 0.934}
    mask["scores"]["auc_window"] = {"mean": 0.99, "floors": {"inside the body": 0.8}}
    image = figure(1, 0.7)
    image["scores"]["reidentification"] = {"mean": 1.0, "low": 0.63, "high": 1.0, "patients": 8}
    text = markdown([{
        "name": "none", "dice": 0.7, "leakage": 0.7, "by": "inverse", "views": 1, "floor": 0.12, "tumour": None,
        "mask_auc": 0.98, "defences": "none", "low": 0.61, "high": 0.79, "patients": 8, "each_worst": 0.74,
        "worst_tenth": 0.9, "advantage_auc": 0.036, "advantage_dice": -0.01,
        "figures": [image, mask, figure(3, 0.98, goal="mask", step="all-steps")],
    }])  # fmt: skip
    assert (
        "| 0.70 (0.61-0.79) | inverse | 0.74 | 0.90 | 8 of 8 (0.63-1.00) | - | 0.970 / 0.980 | +0.036 / -0.010 |"
        in text
    )
    assert "Of mask AUC: inside the body 0.500, own image and other patients' labels 0.934." in text
    assert "Over the whole window: inside the body 0.800." in text and "Patients under attack: 8." in text


def test_the_table_averages_seeds_and_takes_the_stronger_form(tmp_path: Path) -> None:
    rows = [
        {
            "name": "dropout", "dice": dice, "leakage": 0.9, "by": "inverse", "views": 100, "floor": 0.3, "tumour": 0.5,
            "mask_auc": 0.99, "defences": "dropout:0.5",
            "figures": [figure(1, 0.5, adaptive=False), figure(1, 0.7), figure(100, 0.9),
                        figure(1, 0.99, goal="mask", step=1), figure(1, 0.95, goal="mask", step=9)],
        }
        for dice in (0.7, 0.8)
    ]  # fmt: skip
    text = markdown(rows)
    row = "| **dropout** | 0.750 | 0.50 | 0.70 | 0.90 | 0.90 | inverse | - | - | - | 0.50 | 0.990 / 0.950 | - / - |"
    assert row in text
    document = tmp_path / "privacy.md"
    document.write_text(f"before\n{BEGIN}\nstale\n{END}\nafter\n")
    write_into(document, text)
    new = document.read_text()
    assert new.startswith("before\n") and new.endswith("after\n") and "stale" not in new and text in new
    write_into(document, text)
    assert document.read_text() == new
    document.write_text("no marks")
    with pytest.raises(ConfigError, match="no lines"):
        write_into(document, text)


def test_the_table_says_how_hard_each_attack_was_tried() -> None:
    def spent(times: int, stopped: str) -> dict:
        return {
            "effort": f"iterations {200 * times}", "times": times, "stopped": stopped, "published": "5000 iterations",
            "curve": [],
        }  # fmt: skip

    found = [figure(1, 0.5) | {"spent": spent(2, "converged")}, figure(9, 0.6) | {"spent": spent(16, "limit")},
             figure(1, 0.4, adaptive=False) | {"spent": spent(1, "fixed")},
             figure(1, 0.2) | {"spent": None}]  # fmt: skip
    row = (
        "| x | iterations 400 to iterations 3200 | 1 where more gained less than .01, 1 at the limit, where more may "
        "gain | 5000 iterations |"
    )
    assert efforts([{"figures": found}])[-1] == row
    assert efforts([{"figures": [figure(1, 0.2)]}]) == []


def test_a_table_of_its_own_names_every_contrast_collusions_and_members() -> None:
    share = {"mean": 0.6, "low": 0.4, "high": 0.8}
    pair = {"attack": "inverse", "ssim": 0.7, "floor": 0.5}
    wider = {
        "contrasts": {"t1": 0.5, "flair": 0.8},
        "read_off": {"tumour_presence": 0.9, "tumour_volume": 0.6, "tumour_side": 1.0},
        "together": [pair | {"with": ["t2"]}, pair | {"with": ["flair", "t2"], "ssim": 0.9}],
        "members": {"member_auc": share, "member_tpr": share},
    }
    row = (
        "| none | flair 0.80 | 0.65 | 0.90 / 0.60 / 1.00 | t2: 0.70 (0.50) | flair, t2: 0.90 (0.50) | "
        "0.60 (0.40-0.80) | 0.60 (0.40-0.80) |"
    )
    assert breadth_table([{"name": "none", "wider": wider}])[3] == row
    assert breadth_table([{"name": "none"}]) == []


def test_the_effort_of_attacks_is_doubled_unless_the_plan_fixes_it(tmp_path: Path) -> None:
    one = '[[configuration]]\nname = "a"\n'
    assert plan(tmp_path, one).sweep.budget == "auto"
    assert plan(tmp_path, f"[sweep]\nbudget = 4\n{one}").sweep.budget == 4
    with pytest.raises(ConfigError, match="budget"):
        plan(tmp_path, f"[sweep]\nbudget = 0\n{one}")


def test_the_network_on_gradients_runs_once_and_the_shipped_plan_has_the_strongest_attacks() -> None:
    head = SweepPlan.load(ROOT / "examples/privacy/sweep.toml", {"sweep.budget": "2"}).sweep
    assert (
        head.learned_label_attacks == ("gradient-network",) and "gradient-network" not in head.label_attacks
    )
    assert "refined" in head.attacks and "refined" in head.many and head.budget == 2
