"""The runner: what an attack declares is what is checked, and what its result says it relied on."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, fields, replace
from pathlib import Path

import numpy as np
import pytest

from splitpeer.attacks.base import EVERYTHING, Attack, Knowledge, Progress, Recovered, View
from splitpeer.attacks.catalogue import CATALOGUE, attack_class, make_attack
from splitpeer.attacks.not_applicable import NOT_APPLICABLE
from splitpeer.attacks.runner import NEEDS, check, run
from splitpeer.errors import AttackImpossible, ConfigError

from .image_attacks import encoder, heads, look

ROOT = Path(__file__).resolve().parents[3]
SHADOW = {"flair": heads(2, 8), "t1": heads(2, 9)}


class Blank(Attack):
    """Recovers nothing, quickly."""

    name, title, source, plain = "blank", "blank", "here", "Shows black."
    goal, role = "image", "coordinator"

    def recover(self, view: View, knowledge: Knowledge, progress: Progress) -> Recovered:
        images = np.zeros((len(view.targets), 1, *view.window), np.float32)
        return Recovered(images, 1, settings={"seen": len(view.targets)}, history={"loss": (1.0,)})


@pytest.mark.parametrize("name", CATALOGUE)
def test_every_attack_declares_what_exists_and_is_a_value(name: str) -> None:
    attack = make_attack(name, seed=3)
    assert attack.name == name and set(attack.needs) <= set(NEEDS) and attack.uses <= EVERYTHING
    assert attack.settings()["seed"] == 3 and "device" not in attack.settings()
    assert attack == make_attack(name, seed=3)
    with pytest.raises(FrozenInstanceError):
        attack.seed = 4  # type: ignore[misc]


@pytest.mark.parametrize("name", [*CATALOGUE, *NOT_APPLICABLE])
def test_every_attack_is_in_the_table_of_the_docs(name: str) -> None:
    rows = [
        line for line in (ROOT / "docs" / "privacy.md").read_text().splitlines() if line.startswith("| `")
    ]
    assert any(f"`{name}`" in row.split("|")[1] for row in rows)


def test_knowledge_has_the_fields_that_attacks_may_use() -> None:
    assert {one.name for one in fields(Knowledge)} == EVERYTHING | {
        "weights_step", "queries", "encoders", "trained",
    }  # fmt: skip


@pytest.mark.parametrize("need", NEEDS)
def test_each_need_is_asked_for_with_what_to_type(need: str) -> None:
    view, network = look(heads(2, 1), encoder()), encoder()
    everything = Knowledge(
        model=network, models={1: network, 2: network}, initial_model=network, shadow=SHADOW,
        shadow_masks=np.zeros((2, 3, 32, 32), np.uint8), decoder=network,  # type: ignore[arg-type]
    )  # fmt: skip
    asking = type("Asking", (Blank,), {"needs": (need,)})()
    check(asking, view, everything)
    with pytest.raises(AttackImpossible, match="blank needs") as caught:
        check(asking, view, Knowledge(architecture=False))
    assert NEEDS[need].how in str(caught.value) and "\n" not in str(caught.value)


def test_queries_are_no_weights_and_one_contrast_is_not_all() -> None:
    view = look(heads(2, 1), encoder())
    queries = Knowledge(model=encoder(), queries=True, shadow={"t1": SHADOW["t1"]})
    for need, refused in (("encoder", False), ("weights", True), ("shadow", False), ("shadow of all", True)):
        asking = type("Asking", (Blank,), {"needs": (need,)})()
        if refused:
            with pytest.raises(AttackImpossible, match=r"not only queries|flair images"):
                check(asking, view, queries)
        else:
            check(asking, view, queries)


def test_a_view_of_another_role_or_without_samples_is_refused() -> None:
    view = look(heads(2, 1), encoder())
    with pytest.raises(AttackImpossible, match="coordinator's capture, and a client recorded"):
        run(Blank(), replace(view, role="client"), Knowledge())
    with pytest.raises(AttackImpossible, match="no sample"):
        run(Blank(), replace(view, targets=()), Knowledge())


def test_a_result_says_only_what_the_attack_relied_on() -> None:
    view = look(heads(2, 1), encoder())
    knowledge = Knowledge(model=encoder(), shadow=SHADOW)
    result = run(Blank(seed=5), view, knowledge)
    assert result.assumptions == ("which defences run, with their parameters",)
    assert result.settings == {"seed": 5, "seen": 2} and result.history == {"loss": (1.0,)}
    assert result.adaptive and result.seconds >= 0
    naive = run(Blank(), view, replace(knowledge, adaptive=False))
    assert naive.assumptions == ("nothing of the defences",) and not naive.adaptive
    relying = type("Relying", (Blank,), {"uses": frozenset({"shadow"}), "evidence": "the weather"})()
    assert run(relying, view, knowledge).assumptions == ("the weather", "2 similar images of other patients")


def test_settings_are_read_by_the_type_of_their_field() -> None:
    assert make_attack("gradient-norm", levels="0+1", smooth="2").settings()["levels"] == (0, 1)
    assert make_attack("whitebox", schedules="joint+shallow").settings()["schedules"] == "joint,shallow"
    assert make_attack("pca", level="0").settings()["level"] == 0
    for name, key, value in (("pcat", "image_weight", "1"), ("gradient-norm", "levels", "a"),
                             ("whitebox", "schedules", "sideways")):  # fmt: skip
        with pytest.raises(ConfigError, match=f"attack {name}"):
            make_attack(name, **{key: value})
    assert attack_class("pca").name == "pca"
