"""Writes the tables of the texts from registry.toml and vectors/: `python spec/tables.py` (`--check` compares).

A table stands between `<!-- registry: what -->` and `<!-- end -->`; everything else in the text is prose.
"""

from __future__ import annotations

import json
import re
import sys
import textwrap
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
TEXTS = (HERE / "splitproto-1.md", HERE / "capture.md")
REGION = re.compile(r"(<!-- registry: ([^>]+?) -->\n).*?(<!-- end -->)", re.DOTALL)
_ROUND = {2**53 - 1: "2^53-1", 2**31 - 1: "2^31-1", -(2**31): "-2^31", 2**20: "2^20", "2^64-1": "2^64-1"}


def kind_of(field: dict[str, Any]) -> str:
    """A field's kind and limits in words (SP-8.2)."""
    match field["kind"]:
        case "int":
            low, high = (_ROUND.get(field[key], field[key]) for key in ("low", "high"))
            return f"int {low}..{high}"
        case "text":
            texts = field.get("one_of")
            return (
                "text: " + ", ".join(f"`{text}`" for text in texts) if texts else f"text ≤ {field['limit']}"
            )
        case "octets":
            return f"octets {field['length']}"
        case "octets-to":
            return f"octets ≤ {field['limit']}"
        case "list":
            low, high = field["low"], field["high"]
            return f"list {low if low == high else f'{low}..{high}'} of {kind_of(field['item'])}"
        case "one-or-list":
            return f"{kind_of(field['one'])}; or {kind_of(field['many'])}"
        case "record":
            return str(field["of"])
        case "numbers" | "extensions":
            return f"{field['kind']} ≤ {field['limit']}"
        case plain:
            return str(plain)


def table(heads: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    """A Markdown table."""
    heads = list(heads)
    lines = [heads, ["---"] * len(heads), *rows]
    return "".join("| " + " | ".join(str(cell) for cell in line) + " |\n" for line in lines)


def fields(entry: dict[str, Any]) -> str:
    """The table of one record's or message's fields."""
    rows = (
        (f"`{f['name']}`", kind_of(f), "yes" if f["required"] else "no", f["meaning"])
        for f in entry["fields"]
    )
    return table(("field", "kind and limit", "required", "meaning"), rows)


def senders(registry: dict[str, Any], name: str) -> str:
    """Who may send a message, and in which states of its own."""
    if name == "error":
        return "client, coordinator: in every state but `error`"
    states: dict[str, list[str]] = {}
    for step in registry["transitions"]:
        if step["message"] == name:
            states.setdefault(step["side"], []).append(f"`{step['from']}`")
    return "; ".join(f"{side}: {', '.join(names)}" for side, names in states.items())


def message(registry: dict[str, Any], vectors: dict[str, str], entry: dict[str, Any]) -> str:
    """One message: meaning, sender, fields, example."""
    name = entry["name"]
    if name not in vectors:
        sys.exit(
            f"{name} has no example: add one to MESSAGES in vectors/talk.py, then run vectors/generate.py"
        )
    body = " Tensors follow in BODY frames." if entry["tensors"] else ""
    example = "\n".join(textwrap.wrap(vectors[name], 64))
    return (
        f"{entry['meaning'][0].upper()}{entry['meaning'][1:]}.{body} Sent by {senders(registry, name)}.\n\n"
        f"{fields(entry)}\n```hex message {name}\n{example}\n```\n"
    )


def simple(entries: Iterable[dict[str, Any]], *keys: str) -> str:
    """A table of these keys and the meaning; names in code type."""
    rows = ([*(f"`{e[k]}`" if k == "name" else e.get(k, "") for k in keys), e["meaning"]] for e in entries)
    return table((*keys, "meaning"), rows)


def moves(registry: dict[str, Any], side: str) -> str:
    """The transitions of one side, a row per state."""
    states = [entry["name"] for entry in registry["states"]]
    rows = []
    for state in states:
        steps = [t for t in registry["transitions"] if (t["side"], t["from"]) == (side, state)]
        if steps:
            rows.append((f"`{state}`", ", ".join(f"`{t['message']}` → `{t['to']}`" for t in steps)))
    return table(("state", "may say → then is in"), rows)


# Appendix A: (sender, frame type, stream, what it carries: a message's name, or octets).
CONVERSATION = (
    ("client", 1, 1, "hello"),
    ("coordinator", 1, 2, "welcome"),
    ("coordinator", 1, 4, "job-offer"),
    ("client", 1, 3, "job-accept"),
    ("client", 1, 5, "inventory"),
    ("coordinator", 1, 6, "begin"),
    ("coordinator", 1, 8, "forward"),
    ("client", 1, 7, "activations"),
    ("client", 2, 7, "small"),
    ("coordinator", 3, 0, "0000000000000012"),
    ("coordinator", 1, 10, "gradients"),
    ("coordinator", 2, 10, "small"),
    ("client", 3, 0, "0000000000000012"),
    ("client", 1, 9, "applied"),
    ("client", 4, 0, "000000000000002a"),
    ("coordinator", 5, 0, "000000000000002a"),
    ("coordinator", 1, 12, "bye"),
    ("client", 1, 11, "bye"),
)


def conversation(registry: dict[str, Any], vectors: dict[str, str]) -> str:
    """Every frame of a small conversation: its twelve octets, and what follows them."""
    types = {entry["value"]: entry["name"] for entry in registry["frame_types"]}
    with_tensors = {entry["name"] for entry in registry["message"] if entry["tensors"]}
    rows = []
    for number, (sender, kind, stream, what) in enumerate(CONVERSATION, start=1):
        payload = vectors.get(what, what)
        end = kind == 2 or (kind == 1 and what not in with_tensors)
        header = f"{kind:02x} {end:02x} 0000 {stream:08x} {len(payload) // 2:08x}"
        shown = f"the `{what}` of SP-8.4" if kind == 1 else f"`{payload}`"
        rows.append((number, sender, types[kind], f"`{header}`", shown))
    return table(("", "sent by", "frame", "header", "payload"), rows)


def content(what: str, registry: dict[str, Any], vectors: dict[str, str]) -> str:
    """The table called `what`."""
    kind, _, name = what.partition(" ")
    rows: Iterable[tuple[str, ...]]
    match kind:
        case "constants" | "capture_constants":
            chosen = [c for c in registry[kind] if name in ("", c["section"].split(".")[0])]
            rows = ((f"`{c['name']}`", _shown(c["value"]), c.get("error", ""), c["meaning"]) for c in chosen)
            return table(("name", "value", "error", "meaning"), rows)
        case "envelope_kinds" | "reset_reasons" | "frame_types" | "frame_flags":
            return simple(registry[kind], "value", "name")
        case "dtypes" | "codings":
            return simple(registry[kind], "name", "octets")
        case "unprintable":
            # The noncharacters at the end of each plane share the last row.
            planes = [r for r in registry[kind] if r["last"] & 0xFFFF == 0xFFFF]
            listed = [(_points(r), r["meaning"]) for r in registry[kind] if r not in planes]
            last = f"{_points(planes[0])}, {_points(planes[1])}, and so on to {_points(planes[-1])}"
            return table(("code points", "meaning"), [*listed, (last, planes[0]["meaning"])])
        case "causes":
            return simple(registry[kind], "name", "of")
        case "states" | "capture_errors":
            return simple(registry[kind], "name")
        case "features":
            rows = (
                (
                    f"`{f['name']}`",
                    "yes" if f["required"] else "no",
                    ", ".join(f"`{message}`" for message in f["messages"]),
                    f["meaning"],
                )
                for f in registry[kind]
            )
            return table(("name", "every peer has it", "its messages (SP-9-8)", "meaning"), rows)
        case "errors":
            rows = (
                (
                    f"0x{e['code']:04x}",
                    f"`{e['name']}`",
                    "yes" if e["retry"] else "no",
                    e["told"],
                    e["meaning"],
                )
                for e in registry[kind]
            )
            return table(("code", "name", "retry", "told by", "meaning"), rows)
        case "messages":
            rows = (
                (f"`{m['name']}`", senders(registry, m["name"]), "yes" if m["tensors"] else "", m["meaning"])
                for m in registry[kind]
            )
            return table(("type", "sent by: in its states", "tensors", "meaning"), rows)
        case "transitions":
            return moves(registry, name)
        case "triggers":
            rows = ((f"`{t['message']}`", f"`{t['from']}`", f"`{t['to']}`") for t in registry[kind])
            return table(("message", "its receiver is in", "and goes to"), rows)
        case "conversation":
            return conversation(registry, vectors)
        case "record":
            return fields(next(r for r in registry["record"] if r["name"] == name))
        case "capture_example":
            return capture_example()
        case "capture":
            return fields(next(c for c in registry["capture"] if c["name"] == name))
        case "message":
            return message(registry, vectors, next(m for m in registry["message"] if m["name"] == name))
        case _:
            raise SystemExit(f"no table is called {what!r}")


def _points(entry: dict[str, Any]) -> str:
    """A range of code points."""
    first, last = (f"U+{entry[key]:04X}" for key in ("first", "last"))
    return first if first == last else f"{first} to {last}"


def capture_example() -> str:
    """The octets of the vector `small`, a piece a line, with what each is."""
    cases = json.loads((HERE / "vectors" / "capture.json").read_text())["cases"]
    data = bytes.fromhex(next(case["input"] for case in cases if case["name"] == "small"))
    pieces, at, number = [(data[:8], "magic")], 8, 0
    while at < len(data):
        envelope, body = (
            int.from_bytes(data[at : at + 4], "big"),
            int.from_bytes(data[at + 4 : at + 12], "big"),
        )
        for size, what in ((12, "lengths"), (envelope, "envelope"), (body, "body"), (32, "chain")):
            if size:
                pieces.append(
                    (data[at : at + size], f"record {number}: {what}" + f", {size} octets" * (size > 32))
                )
            at += size
        number += 1
    lines = []
    for octets, what in pieces:
        first, *rest = textwrap.wrap(octets.hex(), 64)
        lines += [f"{first:64}  # {what}", *rest]
    return "```hex capture\n" + "\n".join(lines) + "\n```\n"


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def render(text: str) -> str:
    """`text` with all its tables as the registry has them."""
    registry = tomllib.loads((HERE / "registry.toml").read_text())
    registry["messages"] = registry["message"]
    listed = json.loads((HERE / "vectors" / "messages.json").read_text())["cases"]
    vectors = {case["name"]: case["input"] for case in listed}
    bodies = json.loads((HERE / "vectors" / "tensors.json").read_text())["cases"]
    vectors["small"] = next(case["expect"]["body"] for case in bodies if case["name"] == "small")
    return REGION.sub(lambda m: m[1] + content(m[2], registry, vectors) + m[3], text)


def main() -> int:
    """Write the tables; with --check, only say whether they differ."""
    stale = []
    for path in TEXTS:
        text = path.read_text()
        new = render(text)
        if "--check" not in sys.argv[1:]:
            path.write_text(new)
        elif new != text:
            stale.append(path.name)
    if stale:
        print(f"{', '.join(stale)} differ from registry.toml or the vectors: run python spec/tables.py")
    return bool(stale)


if __name__ == "__main__":
    raise SystemExit(main())
