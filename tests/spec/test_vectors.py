"""The test vectors are what their generator writes, and the library agrees with every one of them."""

from __future__ import annotations

import importlib
import json
import ssl
import subprocess
import sys
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from splitproto import capture, codec, envelope, errors, framing, fusion, holder, messages, partners, tensors
from splitproto.channel import Channel
from splitproto.connection import Connection, binding
from splitproto.events import Closed, Received
from splitproto.fields import read_map, write_map
from splitproto.identity import AllowList, Credentials, Identity
from splitproto.messages import Hello, Welcome
from splitproto.negotiation import Agreement, Offer, confirm, negotiate
from splitproto.states import Conversation, Side
from splitproto.tensors import DTYPES, Descriptor

VECTORS = Path(__file__).parents[2] / "spec" / "vectors"
Case = dict[str, Any]
NAMES = {cls.name for cls in (*errors.BY_CODE.values(), *capture.CaptureError.__subclasses__())}


def of_the_peer(name: str) -> Any:
    """A module of splitpeer. The test is skipped where torch is missing, and fails where the module was moved."""
    for needed in ("torch", "pydantic", "nibabel"):
        pytest.importorskip(needed)
    return importlib.import_module(f"splitpeer.{name}")


def cases(family: str, operation: str | None = None) -> list[Any]:
    listed = json.loads((VECTORS / f"{family}.json").read_text())["cases"]
    chosen = [case for case in listed if operation is None or case["operation"] == operation]
    return [pytest.param(case, id=case["name"]) for case in chosen]


def value_of(shown: Any) -> Any:
    """The inverse of the vectors' notation of values."""
    if isinstance(shown, list):
        return [value_of(item) for item in shown]
    if not isinstance(shown, dict):
        return shown
    ((kind, inner),) = shown.items()
    if kind == "map":
        return {key: value_of(item) for key, item in inner.items()}
    return {"int": int, "float": float, "hex": bytes.fromhex}[kind](inner)


def octets_of(case: Case) -> bytes:
    """`input`, a piece that repeats, entries of a map with the keys 00000, 00001, ...; `tail`."""
    piece, times = case.get("repeat", ("", 0))
    entries = b"".join(b"\xa5%05x\x00" % number for number in range(case.get("entries", 0)))
    return (
        bytes.fromhex(case["input"])
        + bytes.fromhex(piece) * times
        + entries
        + bytes.fromhex(case.get("tail", ""))
    )


def same(one: Any, other: Any) -> bool:
    """Equal, and of one type throughout: 1 is not 1.0, and -0.0 is not 0.0."""
    return repr(one) == repr(other)


def check(case: Case, work: Callable[[], Any]) -> Any:
    """The result of `work`, or None after checking that it fails as the case expects."""
    if "error" not in case["expect"]:
        return work()
    with pytest.raises(errors.LocalError) as caught:
        work()
    assert caught.value.name == case["expect"]["error"], caught.value
    return None


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
    precision = of_the_peer("federation.precision")
    single = np.array([int(case["input"], 16)], "<u4").view("<f4")
    sent = precision.to_wire({"x": single}, "bf16")["x"]
    if "nan" in case["expect"]:
        assert sent[0] & 0x7FFF > 0x7F80
    else:
        assert f"{int(sent[0]):04x}" == case["expect"]["bits"]


@pytest.mark.parametrize("case", cases("tensors", "agreed"))
def test_tensors_that_were_agreed(case: Case) -> None:
    agreed = [Descriptor.from_wire(each) for each in case["agreed"]]
    sent = {name: np.zeros(shape, DTYPES[dtype]) for name, dtype, shape in case["sent"]}
    assert tensors.matches(agreed, sent) == ("error" not in case["expect"])


# --- messages -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", cases("messages"))
def test_message(case: Case) -> None:
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


def compare(case: Case, digest: str) -> None:
    """A negative case holds somebody's claim, which must differ from what is right."""
    if "error" in case["expect"]:
        assert digest != case["claimed"]
    else:
        assert digest in case["expect"].values()


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


def terms_of(case: Case) -> messages.Fusion:
    terms = case["terms"]
    return messages.Fusion(terms["bits"], terms["range"], terms["parties"])


def question_of(case: Case) -> fusion.Asked:
    asked = case["question"]
    digest, history = bytes.fromhex(asked["digest"]), bytes.fromhex(asked["history"])
    return fusion.Asked(asked["mode"], asked["step"], asked["batch"], digest, history)


def words_of(octets: str, bits: int) -> tensors.Array:
    return np.frombuffer(bytes.fromhex(octets), f"<i{bits // 8}")


@pytest.mark.parametrize("case", cases("fusion", "terms"))
def test_fusion_terms(case: Case) -> None:
    """SP-11.18-1, SP-11.18-6."""
    terms = terms_of(case)
    check(case, lambda: fusion.check_terms(terms))
    if "job" in case:
        agreed = read_map(messages.Job, codec.decode(bytes.fromhex(case["job"])), "job")
        job = messages.Job(**agreed)
        assert job.fusion == terms
        assert partners.terms_digest(job).hex() == case["expect"]["sha256"]


@pytest.mark.parametrize("case", cases("fusion", "quantise"))
def test_fusion_quantise(case: Case) -> None:
    """SP-11.18-3."""
    values = np.frombuffer(bytes.fromhex(case["values"]), "<f4")
    result = check(case, lambda: fusion.quantise(values, terms_of(case)))
    if result is not None:
        words, clipped = result
        assert {"words": words.tobytes().hex(), "clipped": clipped} == case["expect"]


@pytest.mark.parametrize("case", cases("fusion", "restore"))
def test_fusion_restore(case: Case) -> None:
    """SP-11.18-4."""
    words = words_of(case["words"], case["terms"]["bits"])
    assert fusion.restore(words, terms_of(case)).tobytes().hex() == case["expect"]["values"]


@pytest.mark.parametrize("case", cases("fusion", "history"))
def test_fusion_history(case: Case) -> None:
    """SP-11.18-12."""
    arrays = {one["name"]: np.frombuffer(bytes.fromhex(one["octets"]), "<f4") for one in case["gradients"]}
    history, batch = bytes.fromhex(case["history"]), bytes.fromhex(case["digest"])
    after = fusion.follow(history, case["step"], batch, arrays)
    assert after.hex() == case["expect"]["history"]


@pytest.mark.parametrize("case", cases("fusion", "key"))
def test_fusion_key(case: Case) -> None:
    """SP-11.18-10."""
    run, secret, public = (bytes.fromhex(case[name]) for name in ("run", "secret", "public"))

    def work() -> dict[str, str]:
        masks = fusion.Masking(run, case["site"], secret, {case["partner"]: public})
        key = masks.key(case["partner"], question_of(case), case["level"])
        return {"key": key.hex(), "public": fusion.public_of(secret).hex()}

    if (made := check(case, work)) is not None:
        assert made == case["expect"]


@pytest.mark.parametrize("case", cases("fusion", "mask"))
def test_fusion_mask(case: Case) -> None:
    """SP-11.18-11."""
    others = {site: bytes.fromhex(public) for site, public in case["partners"].items()}
    masks = fusion.Masking(bytes.fromhex(case["run"]), case["site"], bytes.fromhex(case["secret"]), others)
    words, checks = masks.conceal(question_of(case), case["level"], words_of(case["words"], case["bits"]))
    assert {"words": words.tobytes().hex(), "check": checks.tobytes().hex()} == case["expect"]


@pytest.mark.parametrize("case", cases("fusion", "sum"))
def test_fusion_sum(case: Case) -> None:
    """SP-11.18-4, SP-11.18-14."""
    bits = case["terms"]["bits"]
    answers = {
        site: {name: words_of(octets, bits) for name, octets in sent.items()}
        for site, sent in case["answers"].items()
    }
    if (read := check(case, lambda: fusion.totals(answers, terms_of(case)))) is not None:
        assert {name: array.tobytes().hex() for name, array in read.items()} == case["expect"]["values"]


@pytest.mark.parametrize("case", cases("fusion", "offer"))
def test_fusion_offer(case: Case) -> None:
    """SP-11.18-6, SP-11.18-8."""
    shown, run, terms = case["offer"], bytes.fromhex(case["run"]), bytes.fromhex(case["terms"])
    octets = (bytes.fromhex(shown[name]) for name in ("public", "signature"))
    offer = messages.KeyOffer(*octets, tuple(map(bytes.fromhex, shown["chain"])))
    crl = case["crl"].encode() if "crl" in case else None
    trust = partners.Trust.read(case["federation"], case["ca"].encode(), crl, case["partners"])
    now = datetime.fromisoformat(case["now"])
    identity = check(case, lambda: partners.verify(offer, run, terms, trust, now))
    if identity is not None:
        assert {"site": identity.site, "public": offer.public.hex()} == case["expect"]


@pytest.mark.parametrize("case", cases("releases"))
def test_releases(case: Case) -> None:
    """SP-11.17-3, SP-11.17-4, SP-11.17-5, SP-11.17-9, SP-11.17-10, SP-11.17-11."""
    once = case.get("once")
    shown, tiling = of_the_peer("site.shown"), of_the_peer("site.tiling")
    rule = tiling.Rule(tuple(once["window"]), lambda key: tuple(once["volume"]), 0.5) if once else None
    offers = {
        "run": {"run": bytes(16), "terms": "ours"},
        "other-run": {"run": bytes(range(16)), "terms": "ours"},
        "other-terms": {"run": bytes(16), "terms": "others"},
    }

    def showing(offer: str, weights: str) -> Any:
        most = case.get("most_runs")
        return shown.Showing(**offers[offer], encoders=frozenset({weights}), once=bool(once), most_runs=most)

    people = shown.Shown(None, showing("run", "ours"))
    for before in case.get("before", ()):
        earlier = showing(before["offer"], before["weights"])
        people.learn(earlier.run.hex(), earlier.terms, earlier.encoders, [before["key"]])
    released = of_the_peer("site.released").Released(None, people, rule=rule)

    def forward(asked: dict[str, Any]) -> messages.Forward:
        samples = tuple(
            messages.Sample(bytes.fromhex(s["key"]), tuple(s["origin"])) for s in asked["samples"]
        )
        places = tuple(asked["places"]) if asked["places"] is not None else None
        return messages.Forward(
            "release", asked["step"], asked["batch"], samples, bytes(32), value_of(asked["seed"]), places
        )

    def answer(asked: list[dict[str, Any]]) -> dict[str, int]:
        for question in map(forward, asked):
            released.check(question)
            released.note(question, {})
        return {"answered": released.windows}

    if "error" in case["expect"]:
        answer(case["asked"][:-1])
    assert check(case, lambda: answer(case["asked"])) in (None, case["expect"])


@pytest.mark.parametrize("case", cases("digests", "batch"))
def test_batch_digest(case: Case) -> None:
    pytest.importorskip("monai")
    sampling = of_the_peer("data.sampling")
    samples = [sampling.Sample(bytes.fromhex(s["key"]), tuple(s["origin"])) for s in case["samples"]]
    compare(
        case, sampling.batch_digest(case["step"], samples, value_of(case["seed"]), case.get("places")).hex()
    )


@pytest.mark.parametrize("case", cases("digests", "pseudonym"))
def test_pseudonym(case: Case) -> None:
    pseudonym = of_the_peer("data.pseudonym")
    compare(case, pseudonym.pseudonym(bytes.fromhex(case["salt"]), case["patient"]).hex())


@pytest.mark.parametrize("case", cases("digests", "salt-check"))
def test_salt_check(case: Case) -> None:
    pseudonym = of_the_peer("data.pseudonym")
    compare(case, pseudonym.salt_check(bytes.fromhex(case["salt"])).hex())


@pytest.mark.parametrize("case", cases("digests", "salt-file"))
def test_salt_file(case: Case) -> None:
    pseudonym = of_the_peer("data.pseudonym")
    try:
        found = {"salt": pseudonym.parse_salt(bytes.fromhex(case["content"])).hex()}
    except ValueError:
        found = {"refused": True}
    assert found == case["expect"]


@pytest.mark.parametrize("case", cases("digests", "augmentation"))
def test_augmentation(case: Case) -> None:
    augment = of_the_peer("data.augment")
    seed, expect = value_of(case["seed"]), case["expect"]
    plan = augment.derive(seed, case["index"], case["modality"])
    assert (list(plan.flips), plan.turns) == (expect["flips"], expect["turns"])
    if case["modality"] is not None:
        assert (plan.scale, plan.shift) == (expect["scale"], expect["shift"])
    image = np.frombuffer(bytes.fromhex(case["image"]), "<f4").reshape(1, *case["shape"])
    out = augment.augment(image, seed, case["index"], case["modality"])
    assert list(out.shape[1:]) == expect["shape"]
    assert out.tobytes().hex() == expect["image"]


# --- terms, learning --------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", cases("learning", "terms"))
def test_terms(case: Case) -> None:
    """SP-11-2."""
    judged(case)


@pytest.mark.parametrize("case", cases("learning", "kinds"))
def test_kinds_of_jobs(case: Case) -> None:
    """SP-11.17-1, SP-11.17-2, SP-11.17-9, SP-11.18-1, SP-11.18-2."""
    judged(case)


def judged(case: Case) -> None:
    """What a site without another policy against it makes of an offer whose schema it would compute itself."""
    terms = of_the_peer("federation.terms")
    job = messages.Job(**read_map(messages.Job, value_of(case["job"]), "job"))
    seats, wanted = (messages.Seat("t1", ("t1",)),), case.get("policy", ())

    def work() -> list[Descriptor]:
        try:
            described = terms.seat_descriptors(job, seats)
        except ValueError:
            described = ()
        policy = SimpleNamespace(
            levels=range(5),
            precision=tensors.DTYPES,
            recorded_by_coordinator=True,
            max_message_bytes=1 << 40,
            normalisation=("zscore-nonzero", "zscore", "percentile", "window", "none"),
            defences=(),
            image_defences=(),
            share_encoder=True,
            encoders="frozen" if "frozen" in wanted else "any",
            fusion="secure-sum" if "sum" in wanted else "any",
            releases="once" if "once" in wanted else "any",
            partners=tuple(case.get("partners", ())),
            min_partners=2,
        )
        offer = messages.JobOffer(bytes(16), seats, job, tensors.schema_digest(described))
        terms.judge(
            offer,
            SimpleNamespace(policy=policy, model=None, peer=SimpleNamespace(modalities=("t1",), held="t1")),
            # Every dtype: what is unknown to version 1 is refused even where it was agreed.
            [*case.get("agreed", ()), *(f"dtype.{name}" for name in tensors.DTYPES)],
        )
        return list(described)

    described = check(case, work)
    if described is not None:
        assert [d.to_wire() for d in described] == case["expect"]["descriptors"]
        assert tensors.schema_digest(described).hex() == case["expect"]["sha256"]


def learner(case: Case) -> tuple[Any, Any, Any]:
    """One float32 parameter, its optimiser and the schedule of it."""
    torch = pytest.importorskip("torch")
    optimiser = of_the_peer("training.optimiser")
    parameter = torch.nn.Parameter(torch.tensor(case.get("weights", [0.0])))
    made = optimiser.make_optimiser(
        [parameter],
        case.get("optimiser", "adam"),
        case.get("learning_rate", 1.0),
        case.get("weight_decay", 0.0),
    )
    return parameter, made, optimiser.make_schedule(made, case["schedule"], case["steps"])


@pytest.mark.parametrize("case", cases("learning", "schedule"))
@pytest.mark.parametrize("name", ["adam", "sgd"])
def test_learning_rate(case: Case, name: str) -> None:
    _, optimiser, schedule = learner({**case, "optimiser": name})
    schedule.seek(case["step"] - 1)
    (group,) = optimiser.param_groups
    momentum = group["betas"][0] if name == "adam" else group["momentum"]
    expect = {key: value_of(value) for key, value in case["expect"].items()}
    assert {"factor": group["lr"], "momentum": momentum} == pytest.approx(expect, rel=1e-12)


@pytest.mark.parametrize("case", cases("learning", "optimiser"))
def test_optimiser(case: Case) -> None:
    """SP-11.10-1."""
    parameter, optimiser, schedule = learner(case)
    for step, gradient, expected in zip(
        case["made"], case["gradients"], case["expect"]["weights"], strict=True
    ):
        schedule.seek(step - 1)
        parameter.grad = parameter.new_tensor(gradient)
        optimiser.step()
        assert parameter.tolist() == pytest.approx(expected, rel=0, abs=2e-6)


@pytest.mark.parametrize("case", cases("learning", "average"))
def test_average(case: Case) -> None:
    """SP-11.16-4."""
    averaging = of_the_peer("training.averaging")
    weights = [{"w": np.frombuffer(bytes.fromhex(one), "<f4")} for one in case["weights"]]
    found = averaging.average(weights, case["patients"])["w"]
    assert found.astype("<f4").tobytes().hex() == case["expect"]["average"]


@pytest.mark.parametrize("case", cases("learning", "weights"))
def test_weights_that_may_be_averaged(case: Case) -> None:
    """SP-11.16-3."""
    averaging = of_the_peer("training.averaging")
    found = averaging.flaw({"w": np.frombuffer(bytes.fromhex(case["weights"]), "<f4")})
    assert (found is None) is case["expect"]["averaged"]


# --- images -----------------------------------------------------------------------------------------------


def data_case(case: Case) -> tuple[Any, Any]:
    """The site's reader, and a file as one of its cases."""
    volumes, layouts = (of_the_peer(f"data.{name}") for name in ("volumes", "layouts"))
    return volumes, layouts.Case("p", VECTORS / "data" / case["file"])


@pytest.mark.parametrize("case", cases("data", "window"))
def test_window_of_a_file(case: Case) -> None:
    volumes, file = data_case(case)
    augment = of_the_peer("data.augment")
    spacing = None if case["spacing"] is None else tuple(case["spacing"])
    header = volumes.read_header(file)
    grid, expect = volumes.grid_of(file, header, spacing), case["expect"]
    found = {name: list(getattr(grid, name)) for name in expect["grid"]}
    assert found["shape"] == expect["grid"]["shape"]
    for name, numbers in found.items():
        assert numbers == pytest.approx(expect["grid"][name], rel=0, abs=1e-5)
    if case["kind"] == "image":
        rule = of_the_peer("data.normalisation").Normaliser.parse(case.get("normalisation", "zscore-nonzero"))
        held = volumes.Volumes([file], salt=bytes(32), spacing=spacing, normalisation=rule)
        out = held.window(held.keys()[0], tuple(case["origin"]), (*case["window"], 1)[:3])
    else:
        # The numbers of a mask; what they mean is its convention's affair.
        held = volumes.Volumes([file], salt=bytes(32), spacing=spacing)
        voxels, _ = volumes.read_voxels(file)
        held._volume = lambda key: volumes.resample(voxels, header.geometry, grid, nearest=True)[None]
        out = held.window(held.keys()[0], tuple(case["origin"]), (*case["window"], 1)[:3])
    if len(case["window"]) == 2:
        out = out[..., 0]
    if case["seed"] is not None:
        out = augment.augment(out, case["seed"], case["index"], case["modality"])
    assert list(out.shape[1:]) == expect["shape"]
    wanted = np.frombuffer(bytes.fromhex(expect["values"]), "<f4").reshape(out.shape)
    np.testing.assert_allclose(out, wanted, rtol=0, atol=1e-4 if case["kind"] == "image" else 0)


@pytest.mark.parametrize("case", cases("data", "unusable"))
def test_file_that_cannot_be_used(case: Case) -> None:
    volumes, file = data_case(case)
    errors_of = of_the_peer("errors")
    held = volumes.Volumes([file], salt=bytes(32))
    with pytest.raises(errors_of.DataError):
        held.window(held.keys()[0], (0, 0, 0), (1, 1, 1))


@pytest.mark.parametrize("case", cases("data", "grids"))
def test_grids_agree(case: Case) -> None:
    geometry = of_the_peer("data.geometry")
    one, other = (
        geometry.Geometry(**{name: tuple(numbers) for name, numbers in case[which].items()})
        for which in ("one", "other")
    )
    assert bool(geometry.differences(one, other)) == ("error" in case["expect"])
    assert bool(geometry.differences(other, one)) == ("error" in case["expect"])
