"""The test vectors are what their generator writes, and the library agrees with all of those about the wire."""

from __future__ import annotations

import json
import ssl
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from splitproto import codec, codings, envelope, framing, holder, messages, records, tensors
from splitproto.channel import Channel
from splitproto.connection import Connection, binding
from splitproto.events import Closed, Received
from splitproto.fields import read_map, write_map
from splitproto.identity import AllowList, Credentials, Identity
from splitproto.messages import Hello, Welcome
from splitproto.negotiation import Agreement, Offer, confirm, negotiate
from splitproto.states import Conversation, Side
from splitproto.tensors import DTYPES, Descriptor
from tests.spec.reading import (
    NAMES,
    VECTORS,
    Case,
    cases,
    check,
    compare,
    octets_of,
    of_the_peer,
    same,
    value_of,
)


def test_the_files_are_what_the_generator_writes() -> None:
    done = subprocess.run(
        [sys.executable, "-B", VECTORS / "generate.py", "--check"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("path", sorted(VECTORS.glob("*.json")), ids=lambda path: path.stem)
def test_every_file_has_one_form_and_both_outcomes(path: Path) -> None:
    content = json.loads(path.read_text())
    assert content["family"] == path.stem
    for case in content["cases"]:
        assert {"name", "notes", "expect"} <= case.keys(), case["name"]
        if "error" in case["expect"]:
            assert set(case["expect"]) == {"error", "layer"}, case["name"]
            assert case["expect"]["error"] in NAMES
    outcomes = ["error" in case["expect"] for case in content["cases"]]
    assert any(outcomes), "a family without a negative case"
    assert not all(outcomes), "a family without a positive case"


# --- octets ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", cases("envelope"))
def test_envelope(case: Case) -> None:
    def work() -> tuple[envelope.Envelope, envelope.Reset | None]:
        read = envelope.decode(octets_of(case))
        return read, envelope.decode_reset(read.body) if read.kind is envelope.Kind.RESET else None

    if (result := check(case, work)) is None:
        return
    read, reset = result
    expect = dict(case["expect"])
    assert (read.kind.name, read.link.hex()) == (expect["kind"], expect["link"])
    if reset is not None:
        found = (int(reset.reason), list(reset.versions), reset.text)
        assert found == (expect["reason"], expect["versions"], expect["text"])
        return
    assert read.sequence == value_of(expect["sequence"])
    assert len(read.body) == expect.get("body_octets", len(read.body))
    assert read.body.hex() == expect.get("body", read.body.hex())
    assert envelope.encode(read.kind, read.link, read.sequence, read.body) == octets_of(case)


@pytest.mark.parametrize("case", cases("framing"))
def test_frame_header(case: Case) -> None:
    octets = octets_of(case)
    header = check(case, lambda: framing.decode_header(octets))
    if header is not None:
        expect = {
            "type": header.type.name,
            "end": header.end,
            "stream": header.stream,
            "length": header.length,
        }
        assert expect == case["expect"]
        assert framing.encode_header(header.type, header.stream, header.length, end=header.end) == octets


@pytest.mark.parametrize("case", cases("codec"))
def test_value(case: Case) -> None:
    octets = octets_of(case)
    if "error" in case["expect"]:
        check(case, lambda: codec.decode(octets))
        return
    value = codec.decode(octets)
    # What is too long to be shown is only accepted.
    assert case["expect"] == {"accepted": True} or same(value, value_of(case["expect"]["value"]))
    assert codec.encode(value) == octets


# --- tensors --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", cases("tensors", "descriptors"))
def test_descriptors(case: Case) -> None:
    read = check(case, lambda: tensors.read_descriptors(codec.decode(octets_of(case))))
    if read is not None:
        shown = [{"name": d.name, "dtype": d.dtype, "shape": list(d.shape), "octets": d.nbytes} for d in read]
        assert shown == case["expect"]["tensors"]


@pytest.mark.parametrize("case", cases("tensors", "bin-head"))
def test_bin_head(case: Case) -> None:
    head = check(case, lambda: codec.bin_header(case["length"]))
    if head is not None:
        assert head.hex() == case["expect"]["head"]


@pytest.mark.parametrize("case", cases("tensors", "body"))
def test_body(case: Case) -> None:
    arrays = {
        t["name"]: np.frombuffer(bytes.fromhex(t["values"]), DTYPES[t["dtype"]]).reshape(t["shape"])
        for t in case["tensors"]
    }
    head, segments = messages.encode(messages.Gradients(1, arrays))
    assert b"".join(segments).hex() == case["expect"]["body"]
    described = [[t["name"], t["dtype"], t["shape"]] for t in case["tensors"]]
    assert codec.decode(head)["tensors"] == described
    assert tensors.body_bytes(map(Descriptor.from_wire, described)) == len(case["expect"]["body"]) // 2


@pytest.mark.parametrize("case", cases("tensors", "bf16"))
def test_bfloat16(case: Case) -> None:
    pytest.importorskip("torch")
    form = of_the_peer("training.forms").WireForm("bf16")
    single = np.array([int(case["input"], 16)], "<u4").view("<f4")
    sent = form.to_wire({"x": single})["x"]
    if "nan" in case["expect"]:
        assert sent[0] & 0x7FFF > 0x7F80
    else:
        assert f"{int(sent[0]):04x}" == case["expect"]["bits"]


@pytest.mark.parametrize("case", cases("tensors", "agreed"))
def test_tensors_that_were_agreed(case: Case) -> None:
    agreed = [Descriptor.from_wire(each) for each in case["agreed"]]
    sent = {name: np.zeros(shape, DTYPES[dtype]) for name, dtype, shape in case["sent"]}
    assert tensors.matches(agreed, sent) == ("error" not in case["expect"])


# --- codings --------------------------------------------------------------------------------------------


def rows_of(listed: list[str], dtype: str) -> np.ndarray:
    return np.stack([np.frombuffer(bytes.fromhex(row), dtype) for row in listed])


@pytest.mark.parametrize("case", cases("codings", "encode"))
def test_encoding(case: Case) -> None:
    """SP-11.21-2, SP-11.21-3, SP-11.21-4."""
    coded = check(case, lambda: codings.encode(rows_of(case["samples"], "<f4"), case["coding"]))
    if coded is not None:
        assert [row.tobytes().hex() for row in coded] == case["expect"]["coded"]


@pytest.mark.parametrize("case", cases("codings", "decode"))
def test_decoding(case: Case) -> None:
    """SP-11.21-3, SP-11.21-4, SP-11.21-5."""
    coded = rows_of(case["coded"], "u1")
    values = check(case, lambda: codings.decode(coded, case["coding"], (case["values"],)))
    if values is not None:
        np.testing.assert_array_equal(values, rows_of(case["expect"]["samples"], "<f4"))


@pytest.mark.parametrize("case", cases("codings", "levels"))
def test_coding_by_level(case: Case) -> None:
    """SP-11.21-8."""
    forms = of_the_peer("training.forms")
    job = records.Job(**read_map(records.Job, value_of(case["job"]), "job"))
    form, samples = forms.activations_form(job), rows_of(case["samples"], "<f4").reshape(-1, 1, 2, 2)
    sent = form.to_wire(dict.fromkeys(form.shapes, samples))
    rows = {name: [row.tobytes().hex() for row in array] for name, array in sent.items()}
    assert rows == case["expect"]["tensors"]
    for name, array in sent.items():
        described = form.described(name, len(samples))
        assert (described.shape, tensors.DTYPES[described.dtype]) == (array.shape, array.dtype)


# --- messages -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", cases("messages"))
def test_message(case: Case) -> None:
    """SP-11.20-1 to SP-11.20-10: SP-11.20-2, SP-11.20-3, SP-11.20-4, SP-11.20-5, SP-11.20-6, SP-11.20-7, SP-11.20-8,
    SP-11.20-9.
    """
    octets = octets_of(case)
    read = check(case, lambda: messages.decode_head(octets))
    if read is None:
        return
    message, described = read
    expect = value_of(case["expect"]["message"])
    assert message.name == expect.pop("type")
    fields = write_map(message, message.name)
    assert same({key: fields[key] for key in sorted(fields)}, {key: expect[key] for key in sorted(expect)})
    assert [d.to_wire() for d in described] == case["expect"].get("tensors", [])
    if case["name"] == message.name and not described:
        assert messages.encode(message)[0] == octets


def test_every_message_has_a_vector() -> None:
    named = {case.id for case in cases("messages")}
    assert set(messages.MESSAGES) <= named


# --- certificates -----------------------------------------------------------------------------------------

SHARED = json.loads((VECTORS / "certificates.json").read_text())["common"]


def shaken(verifier: Channel, peer: Channel) -> None:
    """Both sides of a handshake; raises what the verifier finds."""
    for _ in range(6):
        peer.handshake()
        while octets := peer.drain():
            verifier.feed(memoryview(octets))
        verifier.handshake()
        while octets := verifier.drain():
            peer.feed(memoryview(octets))


def handshake(case: Case, folder: Path) -> bytes:
    """The certificate that the verifier sees in a real handshake."""
    listens = case["dialled"] is not None
    own = SHARED["verifier"]["client" if listens else "coordinator"]
    files = {"ca": SHARED["ca"], "own": own, "key": SHARED["key"], "chain": case["chain"]}
    for name, content in {**files, "crl": case.get("crl", "")}.items():
        (folder / name).write_text(content)
    (folder / "key").chmod(0o600)
    crl = folder / "crl" if "crl" in case else None
    credentials = Credentials(folder / "ca", folder / "own", folder / "key", crl)
    shown = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if listens else ssl.PROTOCOL_TLS_CLIENT)
    shown.check_hostname, shown.verify_mode = False, ssl.CERT_NONE
    shown.load_cert_chain(folder / "chain", folder / "key")
    peer = Channel(shown, server_side=listens)
    if listens:
        verifier = Channel(credentials.client_context(), server_side=False, hostname=case["dialled"])
        verifier.handshake()
        peer.feed(memoryview(verifier.drain()))
    else:
        verifier = Channel(credentials.server_context(), server_side=True)
    shaken(verifier, peer)
    assert verifier.secure
    return verifier.peer_certificate


SEEN: dict[str, bytes] = {}
"""Certificates whose chain is good: what is wrong with them is found after the handshake, so one is enough."""


@pytest.mark.parametrize("case", cases("certificates"))
def test_certificate(case: Case, tmp_path: Path) -> None:
    def work() -> Identity:
        if case["operation"] == "chain" or case["name"] not in SEEN:
            SEEN[case["name"]] = handshake(case, tmp_path)
        identity = Identity.from_certificate(SEEN[case["name"]])
        wanted = "client" if case["dialled"] is None else "coordinator"
        AllowList({wanted: SHARED["allowed"][wanted]}, "the vector").check(identity, SHARED["federation"])
        return identity

    identity = check(case, work)
    if identity is not None:
        assert {name: getattr(identity, name) for name in case["expect"]} == case["expect"]


def _offer(shown: dict[str, Any]) -> Offer:
    listed = {key: tuple(item) if isinstance(item, list) else item for key, item in shown.items()}
    return Offer(**listed)


def _shown(agreement: Agreement) -> dict[str, Any]:
    return {
        "version": agreement.version,
        "features": sorted(agreement.features),
        "receive_limit": agreement.receive_limit,
        "send_limit": agreement.send_limit,
    }


@pytest.mark.parametrize("case", cases("negotiation"))
def test_negotiation(case: Case) -> None:
    def work() -> Agreement:
        if case["operation"] == "confirm":
            said = case["welcome"]
            answer = Welcome(said["version"], tuple(said["features"]), said["max_message"], "", bytes(32))
            return confirm(_offer(case["dialler"]), answer)
        said = {key: tuple(item) if isinstance(item, list) else item for key, item in case["hello"].items()}
        return negotiate(_offer(case["listener"]), Hello(**said, agent="", binding=bytes(32)))

    agreement = check(case, work)
    if agreement is not None:
        assert _shown(agreement) == case["expect"]


@pytest.mark.parametrize("case", cases("states"))
def test_states(case: Case) -> None:
    conversation = Conversation(case["features"])
    words = [(Side(side), message, mode) for side, message, mode in case["say"]]
    if "error" in case["expect"]:
        *words, last = words
    for word in words:
        conversation.say(*word)
    if "error" in case["expect"]:
        before = dict(conversation.states)
        check(case, lambda: conversation.say(*last))
        assert conversation.states == before
    else:
        assert {side.value: state.value for side, state in conversation.states.items()} == case["expect"]


# --- a whole link ---------------------------------------------------------------------------------------


class Link:
    """A client and a coordinator in state working, without sockets; TLS and certificates are real."""

    def __init__(self, credentials: dict[Side, Credentials], max_message: int) -> None:
        self.ends = {
            side: Connection(
                side,
                b"vectors-vectors-",
                own.client_context() if side is Side.CLIENT else own.server_context(),
                own.identity.sha256,
                lambda peer: None,
                Offer(max_message=max_message),
                0.0,
                hostname="localhost" if side is Side.CLIENT else None,
            )
            for side, own in credentials.items()
        }
        self.events: dict[Side, list[Any]] = {side: [] for side in Side}
        self.carry()
        examples = {case.id: messages.decode_head(octets_of(case.values[0]))[0] for case in cases("messages")
                    if "error" not in case.values[0]["expect"]}  # fmt: skip
        for side, name in (
            (Side.COORDINATOR, "job-offer"),
            (Side.CLIENT, "job-accept"),
            (Side.CLIENT, "inventory"),
            (Side.COORDINATOR, "begin"),
        ):
            self.ends[side].send(examples[name])
            self.carry()
        self.events = {side: [] for side in Side}

    def carry(self) -> None:
        """Move envelopes until both are silent."""
        for _ in range(8):
            for side, end in self.ends.items():
                while (data := end.next_envelope(0.0)) is not None:
                    self.ends[side.other].receive(data, 0.0)
                for each, connection in self.ends.items():
                    self.events[each] += connection.events()


@pytest.mark.parametrize("case", cases("streams"))
def test_stream(case: Case, credentials: dict[Side, Credentials]) -> None:
    link = Link(credentials, 8192)
    client, coordinator = link.ends[Side.CLIENT], link.ends[Side.COORDINATOR]
    written: list[bytes] = []
    write = coordinator._channel.write
    coordinator._channel.write = lambda data: (written.append(bytes(data)), write(data))[1]  # type: ignore[method-assign]
    client._channel.write(octets_of(case))
    link.carry()
    heard = link.events[Side.COORDINATOR]
    expect = case["expect"]
    closed = [event.error for event in heard if isinstance(event, Closed)]
    if "error" in expect:
        assert [error.name for error in closed] == [expect["error"]], heard
        (told,) = [event.error for event in link.events[Side.CLIENT] if isinstance(event, Closed)]
        assert told.name == expect["error"], "the peer is told the same code"
    elif "ended_by" in expect:
        assert [(error.code, error.retry) for error in closed] == [(expect["ended_by"], expect["retry"])]
    else:
        assert [event.message.name for event in heard if isinstance(event, Received)] == expect["messages"]
        assert not closed
        assert b"".join(written).hex() == expect["answer"]


# --- what both sides compute ------------------------------------------------------------------------------


@pytest.mark.parametrize("case", cases("digests", "schema"))
def test_schema_digest(case: Case) -> None:
    digest = tensors.schema_digest(map(Descriptor.from_wire, case["descriptors"])).hex()
    compare(case, digest)


@pytest.mark.parametrize("case", cases("digests", "binding"))
def test_binding(case: Case) -> None:
    compare(case, binding(bytes.fromhex(case["dialler"]), bytes.fromhex(case["listener"])).hex())


@pytest.mark.parametrize("case", cases("holder"))
def test_holder(case: Case) -> None:
    """SP-11.14-2, SP-11.14-3."""
    run, challenge, link = (bytes.fromhex(case[name]) for name in ("run", "challenge", "binding"))
    check(
        case,
        lambda: holder.check(
            bytes.fromhex(case["holder"]), bytes.fromhex(case["proof"]), run, challenge, link
        ),
    )
    if "secret" in case:
        secret = bytes.fromhex(case["secret"])
        made = {
            "statement": holder.statement(run, challenge, link).hex(),
            "holder": holder.public(secret).hex(),
            "proof": holder.prove(secret, run, challenge, link).hex(),
        }
        assert made == case["expect"]
