"""What a bundle may say: whole, of the types that are read, and nothing that MONAI would call or evaluate."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from splitpeer.errors import DataError
from splitpeer.export import join, networks
from splitpeer.export.facts import safe, whole
from splitpeer.export.half import DECODER, DECODER_FILE, ENCODERS, MASKS, WHOLE, Half, encoder_file
from splitpeer.models.registry import make_backbone

BACKBONE = make_backbone("basic-unet", 2, {"features": [2, 4, 4, 8, 8, 4]}, levels=(0, 4))
CALL = {"_target_": "os.system", "command": "true"}


def facts_of(kind: str) -> dict[str, Any]:
    """As they are read again, of one site with one seat, in a secure sum."""
    facts: dict[str, Any] = {
        "kind": kind, "edition": 1, "federation": "test", "party": "hub", "job": "try", "run": "00" * 16,
        "terms": "11" * 32, "step": 2, "steps": 2, "frozen": False, "secret": False, "dimensions": 2,
        "precision": {"x0": "f32", "x4": "int8"}, "window": [32, 32], "spacing": [1.5, 2.0],
        "cut": {"x0": [2, [32, 32]], "x4": [8, [2, 2]]}, "defences": ["gaussian:1@0,1"],
        "seats": {"t1": ["t1"]}, "normalisation": {"t1": "window:-10,300"}, "weights": {},
        "sum": {"range": 4.0, "greatest": 127},
    }  # fmt: skip
    if kind in (ENCODERS, WHOLE):
        facts["encoders"] = {"t1": networks.encoder(BACKBONE, 1)}
        facts["weights"][encoder_file("t1")] = "22" * 32
    if kind in (DECODER, WHOLE):
        facts |= {
            "decoder": networks.decoder(BACKBONE, ("t1",), "concat", 1), "overlap": 0.25,
            "sites": {"site-t1": ["t1"], "site-masks": []},
            "task": {"values": {"tumour": 1}, "regions": {"WT": [1]}, "exclusive": False, "convention": ""},
        }  # fmt: skip
        facts["weights"][DECODER_FILE] = "33" * 32
    if kind == WHOLE:
        facts["sum"]["sites"] = {"site-t1": ["t1"]}
    if kind == MASKS:
        facts["seats"], facts["cut"], facts["precision"] = {}, {}, "f32"
    return facts


def changed(facts: dict[str, Any], path: str, value: object) -> dict[str, Any]:
    """A copy in which what is at `path` ("task/exclusive") is another."""
    found = copy.deepcopy(facts)
    *outer, last = path.split("/")
    inside = found
    for name in outer:
        inside = inside[name]
    inside[last] = value
    return found


@pytest.mark.parametrize("kind", [ENCODERS, DECODER, MASKS, WHOLE])
def test_facts_that_are_whole(kind: str) -> None:
    facts = facts_of(kind)
    assert whole(facts)
    for name in facts.keys() - {"kind", "defences"}:
        lacking = {other: value for other, value in facts.items() if other != name}
        assert not whole(lacking), name
    assert whole(facts | {"precision": "bf16"}) and whole(facts | {"sum": None})


@pytest.mark.parametrize("text", ["$__import__('os')", "@device", "%metadata.json", "a'b", "a\nb", "$"])
def test_what_a_config_would_evaluate_is_no_fact(text: str) -> None:
    assert safe({"party": "x", "defences": ["gaussian:1@0,1"], "_target_": "scripts.network.Narrow"})
    assert not safe({"seats": {"t1": [text]}})
    assert not safe({text: 1})
    assert not whole(facts_of(WHOLE) | {"later": [text]})


def test_what_cannot_be_signed_or_is_nested_deeply_is_no_fact() -> None:
    deep: Any = 1
    for _ in range(400):
        deep = [deep]
    for later in (float("nan"), float("inf"), [{"a": float("-inf")}], deep, {"a": deep}):
        assert not whole(facts_of(WHOLE) | {"later": later})
    assert whole(facts_of(WHOLE) | {"later": [[[{"a": 10**400}]]]})


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("precision", CALL), ("precision", {"x0": "f32"}), ("precision", {"x0": "f32", "x4": "int9"}),
        ("precision", {"x0": "f32", "x4": CALL}), ("precision", {"x0": "f32", "x4": "f32", "x2": "f32"}),
        ("precision", "int9"), ("precision", None), ("precision", ["f32"]),
        ("sum", CALL), ("sum", {**CALL, "range": 4.0, "greatest": 127, "sites": {"site-t1": ["t1"]}}),
        ("sum/greatest", CALL), ("sum/range", "4"), ("sum/sites", CALL), ("sum/sites/site-t1", CALL),
        ("window", [32, CALL]), ("window", [32, "32"]), ("spacing", [CALL, 1.0]), ("spacing", ["x", 1.0]),
        ("normalisation", CALL), ("normalisation/t1", CALL), ("defences", [CALL]),
        ("encoders", {"t1": CALL}), ("encoders", CALL), ("encoders", {}), ("encoders/t1/features", [2, CALL]),
        ("encoders/t1/sent", ["x0", {"x": [CALL]}]), ("encoders/t1/in_channels", CALL), ("decoder", CALL),
        ("decoder/network", CALL), ("decoder/levels", ["x0", CALL]), ("decoder/weights", CALL),
        ("task/values", CALL), ("task/values/tumour", "chr(1)"), ("task/regions", {"WT": [CALL]}),
        # Is written into a text that is evaluated.
        ("task/exclusive", "exec(chr(49))"),
        ("overlap", CALL), ("frozen", 1), ("step", True), ("cut", {"x0": [2, [CALL]]}), ("cut", {"x0": CALL}),
        ("later", CALL), ("later", [[CALL]]), ("later", {"_target_": "scripts.network.load"}),
    ],
)  # fmt: skip
def test_what_would_be_called_or_is_of_another_type_is_no_fact(path: str, value: object) -> None:
    assert not whole(changed(facts_of(WHOLE), path, value))


def test_names_of_seats_refer_to_nothing() -> None:
    """They are written into texts that are evaluated, in which "@device" is another part of the config."""
    for name, good in (("t1ce", True), ("t1@device", False), ("t1 or 1", False)):
        facts = facts_of(ENCODERS)
        facts |= {"seats": {name: ["t1"]}, "encoders": {name: facts["encoders"]["t1"]}}
        assert whole(facts | {"weights": {encoder_file(name): "22" * 32}}) == good


def test_a_seat_that_no_site_fills_is_named() -> None:
    seats = {"seats": {"t1": ["t1"], "flair": ["flair"]}}
    decoder, site = Half(facts_of(DECODER) | seats, {}), Half(facts_of(ENCODERS), {encoder_file("t1"): {}})
    with pytest.raises(DataError, match="no bundle has an encoder for seat flair"):
        join._sources(decoder, {"site-t1": site}, {})
