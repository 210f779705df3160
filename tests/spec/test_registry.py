"""registry.toml and the library list the same things: neither has an entry that the other lacks."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest

from splitproto import (
    capture_records,
    causes,
    codings,
    constants,
    envelope,
    errors,
    fields,
    framing,
    messages,
    negotiation,
    records,
    states,
    tensors,
    text,
)

SPEC = Path(__file__).parents[2] / "spec"
REGISTRY = tomllib.loads((SPEC / "registry.toml").read_text())


def bare(entries: list[dict[str, Any]], *drop: str) -> list[dict[str, Any]]:
    """Entries without what only people read."""
    return [{key: item for key, item in entry.items() if key not in ("meaning", *drop)} for entry in entries]


def plain(value: Any) -> Any:
    """A value as the registry writes it."""
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, tuple):
        return list(value)
    if isinstance(value, int) and value == 2**64 - 1:
        return "2^64-1"
    return value


def kind(of: fields.FieldKind) -> dict[str, Any]:
    """A field's kind as the registry writes it."""
    match of:
        case fields.Int(low, high):
            return {"kind": "int", "low": plain(low), "high": plain(high)}
        case fields.Real():
            return {"kind": "real"}
        case fields.Bool():
            return {"kind": "bool"}
        case fields.Text(limit, one_of):
            return {"kind": "text", "limit": limit, **({"one_of": list(one_of)} if one_of else {})}
        case fields.Octets(length):
            return {"kind": "octets", "length": length}
        case fields.OctetsUpTo(limit):
            return {"kind": "octets-to", "limit": limit}
        case fields.ListOf(item, high, low):
            return {"kind": "list", "low": low, "high": high, "item": kind(item)}
        case fields.OneOrList(one, many):
            return {"kind": "one-or-list", "one": kind(one), "many": kind(many)}
        case fields.Record(cls):
            return {"kind": "record", "of": cls.__name__}
        case fields.Numbers(limit):
            return {"kind": "numbers", "limit": limit}
        case fields.Extensions(limit):
            return {"kind": "extensions", "limit": limit}
    raise AssertionError(f"the registry has no word for {of!r}")


def fields_of(cls: type) -> list[dict[str, Any]]:
    return [
        {"name": name, "required": required, **kind(of)}
        for name, (of, required) in fields.kinds_of(cls).items()
    ]


def numbers(enumeration: Any) -> list[dict[str, Any]]:
    return [{"name": member.name, "value": int(member)} for member in enumeration]


def test_constants() -> None:
    ours = [{"name": n, "value": plain(v)} for n, v in vars(constants).items() if n.isupper()]
    assert bare(REGISTRY["constants"], "section", "error") == ours


@pytest.mark.parametrize(
    ("name", "enumeration"),
    [
        ("envelope_kinds", envelope.Kind),
        ("reset_reasons", envelope.ResetReason),
        ("frame_types", framing.FrameType),
    ],
)
def test_numbers(name: str, enumeration: Any) -> None:
    assert bare(REGISTRY[name]) == numbers(enumeration)


def test_flags() -> None:
    assert bare(REGISTRY["frame_flags"]) == [{"name": "END", "value": framing.END}]


def test_what_is_not_printable() -> None:
    assert [(entry["first"], entry["last"]) for entry in REGISTRY["unprintable"]] == list(text.UNPRINTABLE)


def test_dtypes() -> None:
    ours = [{"name": name, "octets": dtype.itemsize} for name, dtype in tensors.DTYPES.items()]
    assert bare(REGISTRY["dtypes"]) == ours


def test_codings() -> None:
    assert [entry["name"] for entry in REGISTRY["codings"]] == list(codings.CODINGS)


def test_features() -> None:
    required = negotiation.Offer().requires
    assert bare(REGISTRY["features"]) == [
        {"name": n, "required": n in required, "messages": list(states.SERVICES.get(n, ()))}
        for n in negotiation.FEATURES
    ]
    assert states.SERVICES.keys() <= set(negotiation.FEATURES)


def test_errors() -> None:
    ours = [{"code": code, "name": cls.name, "retry": cls.retry} for code, cls in errors.BY_CODE.items()]
    assert bare(REGISTRY["errors"], "told") == ours
    assert {entry["told"] for entry in REGISTRY["errors"]} == {"error", "reset", "alert", "local"}


def test_errors_that_constants_name_exist() -> None:
    known = {cls.name for cls in errors.BY_CODE.values()}
    assert {entry["error"] for entry in REGISTRY["constants"] if "error" in entry} <= known


def test_causes() -> None:
    """SP-11.13-2."""
    ours = [("patient", causes.OF_A_PATIENT), ("side", causes.OF_A_SIDE)]
    assert REGISTRY["causes"] == [
        {"name": name, "of": of, "meaning": phrase} for of, table in ours for name, phrase in table.items()
    ]


def test_states() -> None:
    assert bare(REGISTRY["states"]) == [{"name": state.value} for state in states.State]


def test_transitions() -> None:
    ours = [
        {"side": side.value, "from": state.value, "message": message, "to": target.value}
        for side, table in states.TRANSITIONS.items()
        for state, steps in table.items()
        for message, target in steps.items()
    ]
    assert REGISTRY["transitions"] == ours


def test_triggers() -> None:
    ours = [
        {"message": message, "from": state.value, "to": target.value}
        for message, steps in states.TRIGGERS.items()
        for state, target in steps.items()
    ]
    assert REGISTRY["triggers"] == ours


def test_records() -> None:
    used = {
        item["of"]
        for entry in (*REGISTRY["message"], *REGISTRY["record"])
        for field in entry["fields"]
        for item in (field, field.get("item", {}))
        if "of" in item
    }
    assert used == {entry["name"] for entry in REGISTRY["record"]}
    for entry in REGISTRY["record"]:
        assert bare(entry["fields"]) == fields_of(getattr(records, entry["name"]))


def test_messages() -> None:
    assert [entry["name"] for entry in REGISTRY["message"]] == list(messages.MESSAGES)
    for entry in REGISTRY["message"]:
        assert entry["tensors"] == (entry["name"] in messages.WITH_TENSORS)
        assert bare(entry["fields"]) == fields_of(messages.MESSAGES[entry["name"]]), entry["name"]


def test_every_message_can_be_said() -> None:
    said = {step["message"] for step in REGISTRY["transitions"]} | {"error"}
    assert said == {entry["name"] for entry in REGISTRY["message"]}


def test_captures() -> None:
    ours = [{"name": n, "value": plain(v)} for n, v in vars(capture_records).items()
            if n.isupper() and isinstance(v, int | bytes) and n != "MAX_FRAME_PAYLOAD"]  # fmt: skip
    assert bare(REGISTRY["capture_constants"], "section", "error") == ours
    found = {cls.name for cls in capture_records.CaptureError.__subclasses__()}
    assert {entry["name"] for entry in REGISTRY["capture_errors"]} == found
    assert [entry["name"] for entry in REGISTRY["capture"]] == ["Party", "Sampling", *capture_records.KINDS]
    for entry in REGISTRY["capture"]:
        name = entry["name"]
        cls = capture_records.KINDS.get(name) or getattr(capture_records, name)
        assert bare(entry["fields"]) == fields_of(cls), name


def test_everything_says_what_it_means() -> None:
    lists = [entries for entries in REGISTRY.values() if isinstance(entries, list)]
    lists += [entry["fields"] for name in ("message", "record", "capture") for entry in REGISTRY[name]]
    for entries in lists:
        if entries not in (REGISTRY["transitions"], REGISTRY["triggers"]):
            assert all(entry["meaning"] for entry in entries)
