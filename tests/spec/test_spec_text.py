"""splitproto-1.md against registry, vectors, code and itself."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from splitpeer.models.registry import NETWORKS
from splitproto import codec, constants, envelope, errors, framing, messages, states
from splitproto.tensors import Descriptor, body_bytes

ROOT = Path(__file__).parents[2]
SPEC = ROOT / "spec"
TEXT = (SPEC / "splitproto-1.md").read_text()
FLAT = " ".join(TEXT.split())
REGISTRY = tomllib.loads((SPEC / "registry.toml").read_text())

ID = r"SP-\d+(?:\.\d+)?-\d+"
DEFINITIONS = re.findall(rf"^\*\*({ID})\.\*\*", TEXT, re.MULTILINE)
BLOCKS = re.findall(r"^```hex (\w+)([^\n]*)\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)


def sources() -> dict[Path, str]:
    """Everything that may quote the specification, without this file."""
    folders = (ROOT / name for name in ("splitproto", "peers", "tests", "examples", "docs", "benchmarks"))
    files = [file for folder in folders for ending in ("*.py", "*.md") for file in folder.rglob(ending)]
    files += [*SPEC.glob("vectors/*.py"), *SPEC.glob("vectors/*.json"), SPEC / "registry.toml"]
    files += [SPEC / "README.md", SPEC / "CHANGELOG.md", ROOT / "README.md"]
    return {file: file.read_text() for file in files if file != Path(__file__)}


def octets(block: str) -> bytes:
    """Octets of an example; `#` starts a remark."""
    return bytes.fromhex("".join(line.partition("#")[0] for line in block.splitlines()))


def test_tables_are_those_of_the_registry() -> None:
    done = subprocess.run(
        [sys.executable, "-B", SPEC / "tables.py", "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_registry_text_and_changes_name_one_draft() -> None:
    draft = REGISTRY["revision"]
    assert f"| Revision | {draft} |" in TEXT
    newest = re.search(r"^## (.*)$", (SPEC / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest is not None and newest[1] == f"{REGISTRY['version']}, {draft}"


# --- requirement ids --------------------------------------------------------------------------------------


def test_ids_are_defined_once() -> None:
    assert DEFINITIONS
    assert len(DEFINITIONS) == len(set(DEFINITIONS))


def test_ids_are_defined_in_their_section_without_gaps() -> None:
    section, numbers = "", dict[str, list[int]]()
    for line in TEXT.splitlines():
        if heading := re.match(r"#{2,3} (\d+(?:\.\d+)?) ", line):
            section = heading[1]
        if definition := re.match(rf"\*\*({ID})\.\*\*", line):
            where, _, number = definition[1].removeprefix("SP-").rpartition("-")
            assert section == where or section.startswith(f"{where}."), definition[1]
            numbers.setdefault(where, []).append(int(number))
    for where, found in numbers.items():
        assert sorted(found) == list(range(1, len(found) + 1)), where


def test_quoted_ids_exist() -> None:
    for file, text in {**sources(), SPEC / "splitproto-1.md": TEXT}.items():
        unknown = set(re.findall(ID, text)) - set(DEFINITIONS)
        assert not unknown, f"{file} quotes {sorted(unknown)}"


def test_every_rule_of_the_conversation_is_quoted_where_it_is_kept_and_where_it_is_shown() -> None:
    """Who changes one of them finds the code and the test that it binds."""
    here = {"code": ("splitproto", "peers"), "tests": ("tests",)}
    quoted = {
        where: {
            identifier
            for file, text in sources().items()
            if file.suffix == ".py" and file.relative_to(ROOT).parts[0] in folders
            for identifier in re.findall(ID, text)
        }
        for where, folders in here.items()
    }
    rules = {rule for rule in DEFINITIONS if rule.startswith(("SP-9-", "SP-11-", "SP-11."))}
    # What nobody need do.
    rules -= {"SP-11-18"}
    assert len(rules) > 50
    for where, found in quoted.items():
        assert rules <= found, f"no line of the {where} quotes {sorted(rules - found)}"


def test_quoted_sections_exist() -> None:
    headings = set(re.findall(r"^#{2,3} (\d+(?:\.\d+)?) ", TEXT, re.MULTILINE))
    for file, text in {**sources(), SPEC / "splitproto-1.md": TEXT}.items():
        quoted = set(re.findall(r"SP-(\d+(?:\.\d+)?)(?![-\d])", text))
        assert quoted <= headings, f"{file} quotes {sorted(quoted - headings)}"


def test_quoted_sentences_are_in_their_requirement() -> None:
    paragraphs = dict(re.findall(rf"\*\*({ID})\.\*\* (.*?)(?=\n\n|\Z)", TEXT, re.DOTALL))
    found = 0
    for file in (ROOT / "splitproto").rglob("*.py"):
        for identifier, quote in re.findall(rf"({ID}): \"([^\"]+?)\.?\"", file.read_text()):
            assert quote in " ".join(paragraphs[identifier].split()), f"{file.name}: {identifier}"
            found += 1
    assert found > 5


def test_every_rule_of_octets_has_a_vector_that_breaks_it() -> None:
    broken = set()
    for path in SPEC.glob("vectors/*.json"):
        for case in json.loads(path.read_text())["cases"]:
            if "error" in case["expect"]:
                broken |= set(re.findall(ID, case["notes"]))
    prefixes = ("SP-4-", "SP-7-", "SP-8.1-", "SP-8.2-", "SP-8.3-", "SP-8.4-", "SP-9-", "SP-10-")
    missing = {rule for rule in DEFINITIONS if rule.startswith(prefixes)} - broken
    # Nothing to break on one side alone: randomness, order, deadlines, ids of links, what is allowed.
    free = {"SP-4-4", "SP-4-6", "SP-4-7", "SP-4-8", "SP-7-6", "SP-7-7", "SP-7-12", "SP-8.1-5"}
    # What is said of links and jobs is shown by the tests of the roles.
    free |= {
        "SP-9-2",
        "SP-9-5",
        "SP-9-6",
        "SP-9-7",
        "SP-10-2",
        "SP-10-4",
        "SP-10-5",
        "SP-10-6",
        "SP-10-7",
        "SP-10-8",
    }
    assert missing <= free, sorted(missing - free)


# --- names and numbers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(messages.MESSAGES))
def test_messages_appear(name: str) -> None:
    (entry,) = (entry for entry in REGISTRY["message"] if entry["name"] == name)
    assert f"\n#### {name}\n" in TEXT, f"splitproto-1.md has no heading '#### {name}'"
    section = TEXT.split(f"\n#### {name}\n")[1].split("\n#### ")[0].split("\n## ")[0]
    for field in entry["fields"]:
        assert f"| `{field['name']}` |" in section
    assert f"```hex message {name}\n" in section
    assert TEXT.count(f"`{name}`") > 1, f"no requirement of splitproto-1.md says when `{name}` is used"


def test_errors_appear() -> None:
    for code, cls in errors.BY_CODE.items():
        assert f"| 0x{code:04x} | `{cls.name}` |" in TEXT
    for code, name in re.findall(r"(0x0\d{3}) `([a-z-]+)`", TEXT):
        assert errors.BY_CODE[int(code, 16)].name == name


def test_names_in_code_type_are_known() -> None:
    """A misspelt message, error or state in the prose is found here."""
    known = {entry["name"] for key, entries in REGISTRY.items() if isinstance(entries, list) for entry in entries
             if "name" in entry}  # fmt: skip
    known |= {
        field["name"] for key in ("message", "record") for entry in REGISTRY[key] for field in entry["fields"]
    }
    known |= {text for key in ("message", "record") for entry in REGISTRY[key] for field in entry["fields"]
              for text in field.get("one_of", ())}  # fmt: skip
    prose = re.sub(r"^```.*?^```$", "", TEXT, flags=re.MULTILINE | re.DOTALL)
    hyphenated = set(re.findall(r"`([a-z]+(?:-[a-z]+)+)`", prose))
    known |= {"one-cycle", "a-z", "tls-unique", "zscore-nonzero", *NETWORKS}
    assert hyphenated <= known, sorted(hyphenated - known)


def test_numbers_beside_constants_are_theirs() -> None:
    stated = re.findall(r"`([A-Z][A-Z_]+)` \(([\d.]+)\)", FLAT)
    assert len(stated) > 20
    for name, value in stated:
        assert float(value) == getattr(constants, name), name


def test_every_limit_is_stated_where_it_holds() -> None:
    stated = {name for name, _ in re.findall(r"`([A-Z][A-Z_]+)` \(([\d.]+)\)", FLAT)}
    numeric = {
        name for name, value in vars(constants).items() if name.isupper() and isinstance(value, int | float)
    }
    assert numeric - stated == {"CARRIER_VERSION"}


def test_a_zeromq_message_may_hold_the_longest_envelope() -> None:
    assert f"`MAXMSGSIZE` | {constants.ENVELOPE_HEADER + constants.MAX_ENVELOPE_BODY}:" in TEXT


# --- examples ---------------------------------------------------------------------------------------------


def test_all_examples_are_of_a_kind_that_is_checked() -> None:
    assert {kind for kind, _, _ in BLOCKS} == {"envelope", "message", "body", "frames"}
    assert TEXT.count("```hex ") == len(BLOCKS)


def test_examples_of_envelopes() -> None:
    kinds = [envelope.decode(octets(block)).kind.name for kind, _, block in BLOCKS if kind == "envelope"]
    assert kinds == ["OPEN", "RESET"]


def test_examples_of_messages() -> None:
    named = {name.strip(): octets(block) for kind, name, block in BLOCKS if kind == "message"}
    assert set(named) == set(messages.MESSAGES)
    for name, head in named.items():
        assert messages.decode_head(head)[0].name == name


def test_example_of_a_body() -> None:
    ((described, block),) = ((name.split(), block) for kind, name, block in BLOCKS if kind == "body")
    name, dtype, *shape = described
    descriptor = Descriptor(name, dtype, tuple(map(int, shape)))
    body = octets(block)
    assert len(body) == body_bytes([descriptor])
    assert body.startswith(codec.bin_header(descriptor.nbytes))


def test_examples_of_frames() -> None:
    whole = {name.strip(): octets(block) for kind, name, block in BLOCKS if kind == "message"}
    for block in (block for kind, _, block in BLOCKS if kind == "frames"):
        data = octets(block)
        while data:
            header = framing.decode_header(data[: constants.FRAME_HEADER])
            payload = data[constants.FRAME_HEADER :][: header.length]
            assert len(payload) == header.length
            if header.type is framing.FrameType.HEAD:
                assert payload == whole[messages.decode_head(payload)[0].name]
            data = data[constants.FRAME_HEADER + header.length :]


def test_the_conversation_follows_the_rules() -> None:
    appendix = TEXT.split("## Appendix A")[1]
    rows = re.findall(r"^\| \d+ \| (\w+) \| (\w+) \| `([0-9a-f ]+)` \| (.*?) \|$", appendix, re.MULTILINE)
    assert len(rows) > 10
    conversation, last = states.Conversation(states.SERVICES), dict.fromkeys(states.Side, 0)
    lengths = {name.strip(): len(octets(block)) for kind, name, block in BLOCKS if kind == "message"}
    for sender, kind, header, payload in rows:
        side = states.Side(sender)
        frame = framing.decode_header(bytes.fromhex(header))
        assert frame.type.name == kind
        named = re.fullmatch(r"the `([a-z-]+)` of SP-8.4", payload)
        assert frame.length == (lengths[named[1]] if named else len(payload.strip("`")) // 2)
        if named:
            conversation.say(side, named[1])
            assert frame.stream > last[side]
            assert frame.stream % 2 == (side is states.Side.CLIENT)
            last[side] = frame.stream
    assert conversation.finished
