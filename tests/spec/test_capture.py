"""capture.md and its vectors against the library: what any reader must do, ours does."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

from splitproto import capture_records, messages, records
from splitproto.capture import (
    CaptureError,
    CaptureReader,
    CaptureWriter,
    End,
    Gap,
    Header,
    Record,
    Recorded,
)
from splitproto.fields import write_map
from tests.spec.reading import value_of

SPEC = Path(__file__).parents[2] / "spec"
TEXT = (SPEC / "capture.md").read_text()
STANDARD = (SPEC / "splitproto-1.md").read_text()
REGISTRY = tomllib.loads((SPEC / "registry.toml").read_text())
CASES = json.loads((SPEC / "vectors" / "capture.json").read_text())["cases"]
ID = r"SP-C-\d+"
DEFINED = re.findall(rf"^\*\*({ID})\.\*\*", TEXT, re.MULTILINE)
Case = dict[str, Any]


def plain(value: Any) -> Any:
    """Tuples as lists."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value


def listed(record: Record) -> dict[str, Any]:
    """A record as the vectors list it."""
    if not isinstance(record, Recorded):
        return {"kind": record.kind, **plain(write_map(record, record.kind))}
    tensors = getattr(record.message, "tensors", {})
    return {
        "kind": "message", "n": record.n, "time": record.time, "peer": record.peer,
        "direction": record.direction, "type": record.name,
        "tensors": {name: array.tobytes() for name, array in tensors.items()},
    }  # fmt: skip


def key_of(case: Case) -> bytes | None:
    return bytes.fromhex(case["key"]) if "key" in case else None


def in_memory(case: Case, found: list[dict[str, Any]]) -> CaptureReader:
    reader = CaptureReader(key_of(case))
    found.extend(map(listed, reader.over(bytes.fromhex(case["input"]))))
    return reader


def byte_by_byte(case: Case, found: list[dict[str, Any]]) -> CaptureReader:
    reader = CaptureReader(key_of(case))
    for octet in bytes.fromhex(case["input"]):
        found += map(listed, reader.receive_data(bytes([octet])))
    reader.close()
    return reader


@pytest.mark.parametrize("read", [in_memory, byte_by_byte])
@pytest.mark.parametrize("case", CASES, ids=[case["name"] for case in CASES])
def test_reading(case: Case, read: Any) -> None:
    expect, found = case["expect"], []
    if "error" in expect:
        with pytest.raises(CaptureError) as caught:
            read(case, found)
        assert caught.value.name == expect["error"], caught.value
        assert len(found) == case["intact"]
        assert "\n" not in str(caught.value)
        return
    reader = read(case, found)
    wanted = [value_of(item) for item in expect["records"]]
    # What may be absent has its default then.
    for one, other in zip(found, wanted, strict=True):
        assert one | other == one, "every field as it stands in the file"
        assert one["kind"] == "header" or set(one) == set(other)
    assert (reader.end is not None, reader.chain.hex()) == (expect["ended"], expect["chain"])


FORMER = capture_records.FORMER_MAGIC.hex()
WRITTEN = [
    case
    for case in CASES
    if "error" not in case["expect"]
    and case["name"] != "header-least"
    and not case["input"].startswith(FORMER)
]


@pytest.mark.parametrize("case", WRITTEN, ids=[case["name"] for case in WRITTEN])
def test_writing_gives_the_same_octets(case: Case) -> None:
    octets, key = bytes.fromhex(case["input"]), key_of(case)
    header, *records = CaptureReader(key).over(octets)
    assert isinstance(header, Header)
    writer = CaptureWriter(header, key, header.salt)
    written = [b"".join(writer.start())]
    for record in records:
        match record:
            case Recorded():
                buffers = writer.message(
                    record.message, time=record.time, peer=record.peer, direction=record.direction
                )
            case Gap():
                buffers = writer.gap(
                    time=record.time, reason=record.reason, records=record.records, octets=record.octets
                )
            case End():
                buffers = writer.end(time=record.time, reason=record.reason, text=record.text)
        written.append(b"".join(buffers))
    assert b"".join(written) == octets
    assert writer.chain.hex() == case["expect"]["chain"]


def test_without_the_key_an_encrypted_capture_is_verified() -> None:
    (case,) = (case for case in CASES if case["name"] == "encrypted")
    octets = bytes.fromhex(case["input"])
    reader = CaptureReader(blind=True)
    assert [type(record) for record in reader.over(octets)] == [Header]
    assert (reader.records, reader.chain) == (5, octets[-32:])
    with pytest.raises(CaptureError, match="does not fit the chain"):
        list(CaptureReader(blind=True).over(octets[:-40] + bytes([octets[-40] ^ 1]) + octets[-39:]))


# --- the text -----------------------------------------------------------------------------------------------


def test_ids_are_defined_once_and_without_gaps() -> None:
    assert [f"SP-C-{n}" for n in range(1, len(DEFINED) + 1)] == DEFINED


def test_quoted_ids_exist() -> None:
    root = SPEC.parent
    files = [SPEC / "capture.md", *root.glob("splitproto/*.py"), *root.glob("peers/splitpeer/**/*.py")]
    files += [*SPEC.glob("vectors/*.py"), SPEC / "vectors" / "capture.json", *root.glob("docs/*.md")]
    for file in files:
        text = file.read_text()
        assert set(re.findall(ID, text)) <= set(DEFINED), file
        for quoted in re.findall(r"SP-\d+(?:\.\d+)?-\d+", text) if file.name == "capture.md" else ():
            assert f"**{quoted}.**" in STANDARD, quoted


def test_quoted_sentences_are_in_their_requirement() -> None:
    paragraphs = dict(re.findall(rf"\*\*({ID})\.\*\* (.*?)(?=\n\n|\Z)", TEXT, re.DOTALL))
    quotes = [
        found
        for file in (SPEC.parent / "splitproto").glob("capture*.py")
        for found in re.findall(rf"({ID}): \"([^\"]+?)\.?\"", file.read_text())
    ]
    assert quotes
    for identifier, quote in quotes:
        assert quote in " ".join(paragraphs[identifier].split()), identifier


def test_every_rule_of_octets_has_a_vector_that_breaks_it() -> None:
    broken = {rule for case in CASES if "error" in case["expect"] for rule in re.findall(ID, case["notes"])}
    # Nothing to break by octets: what is recorded, files, what readers show, how keys are kept.
    free = {"SP-C-1", "SP-C-11", "SP-C-13", "SP-C-14", "SP-C-19", "SP-C-20", "SP-C-21"}
    assert set(DEFINED) - broken <= free, sorted(set(DEFINED) - broken - free)


def test_numbers_beside_constants_are_theirs() -> None:
    stated = dict(re.findall(r"`([A-Z][A-Z_]+)` \((\d+)\)", " ".join(TEXT.split())))
    numeric = {entry["name"]: entry["value"] for entry in REGISTRY["capture_constants"]}
    assert stated == {name: str(value) for name, value in numeric.items() if isinstance(value, int)}


def test_the_example_is_the_first_vector() -> None:
    (block,) = re.findall(r"^```hex capture\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
    octets = bytes.fromhex("".join(line.partition("#")[0] for line in block.splitlines()))
    (case,) = (case for case in CASES if case["name"] == "small")
    assert octets.hex() == case["input"]


def test_the_longest_header_fits_an_envelope_and_messages_do() -> None:
    """Limits agree with one another: a head of any size that the wire carries can be recorded."""
    assert capture_records.MAX_ENVELOPE > 2 * capture_records.MAX_FRAME_PAYLOAD
    samples = tuple(records.Sample(bytes(16), (-(1 << 31),) * 3) for _ in range(4096))
    forward = messages.Forward("train", 1, 0, samples, bytes(32))
    writer = CaptureWriter(Header("client", "a", "b", "c", 0.0))
    octets = b"".join([*writer.start(), *writer.message(forward, time=1.0, peer="hub", direction="in")])
    (_, record) = CaptureReader().over(octets)
    assert isinstance(record, Recorded)
    assert record.message == forward
