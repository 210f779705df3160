"""Cases of messages, negotiation and states."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from common import DIALLER, INCARNATION, KEY, LISTENER, RUN, SALT, SEED, SMALL, TINY, Case, as_json, refused
from derive import FIRST, SCHEMA, WHOLE, batch_digest, binding, salt_check, schema_digest

from splitproto import codec, messages, records
from splitproto.probes import filling
from splitproto.records import Job, Level, Patient, Sample, Seat, Setting, Unusable

FEATURES = (
    "train", "evaluate", "average", "release", "fuse", "infer", "label", "probe",
    "dtype.f32", "dtype.bf16", "coding.f16", "coding.int8", "coding.int4", "coding.levels",
)  # fmt: skip
JOB = Job(
    name="brats-t1",
    dimensions=2,
    network="basic-unet",
    settings=(Setting("features", (32, 32, 64, 128, 256, 32)),),
    cut=tuple(Level(f"x{n}", width, (2**n, 2**n)) for n, width in enumerate((32, 32, 64, 128, 256))),
    levels=(0, 1, 2, 3, 4),
    precision="f32",
    window=(96, 96),
    spacing=(),
    augment=True,
    batch=1,
    steps=1000,
    optimiser="adam",
    learning_rate=0.005,
    weight_decay=0.0,
    schedule="one-cycle",
    seconds_per_step=120.0,
)

# Shorter than a real one, so that it can be shown: neither octets nor certificate mean anything.
OFFER = records.KeyOffer(
    bytes(range(0x50, 0x70)), bytes(range(0x70, 0x90)), bytes.fromhex("3003020101"), (bytes.fromhex("3000"),)
)


PATIENT = Patient(
    KEY,
    (240, 240, 155),
    (1.0, 1.0, 1.0),
    (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0),
    (-120.0, -119.0, 0.0),
    (1.0, 1.0, 1.0),
)
REQUEST = bytes(range(0x30, 0x40))

MESSAGES: dict[str, messages.Message] = {
    "hello": messages.Hello(
        (1,), FEATURES, ("dtype.f32",), 1 << 30, "splitpeer/0.1.0", binding(DIALLER, LISTENER)
    ),
    "welcome": messages.Welcome(
        1,
        tuple(sorted(FEATURES)),
        1 << 30,
        "splitpeer/0.1.0",
        binding(DIALLER, LISTENER),
    ),
    "probe": messages.Probe(2, 4194304, filling(4)),
    "probed": messages.Probed(2, filling(4)),
    "job-offer": messages.JobOffer(RUN, (Seat("t1", ("t1",)),), JOB, schema_digest(SCHEMA)),
    "job-accept": messages.JobAccept(INCARNATION, 0, (0,), 1),
    "job-decline": messages.JobDecline(0x0505, "level x0 may not leave this site"),
    "inventory": messages.Inventory(
        (PATIENT,),
        True,
        salt_check(SALT),
    ),
    "fusion-key": messages.FusionKey(OFFER),
    "fusion-keys": messages.FusionKeys((OFFER,)),
    "begin": messages.Begin(0, 1),
    "forward": messages.Forward(
        "train", 1, 0, (Sample(KEY, (72, 72, 80)),), batch_digest(1, SEED, FIRST), SEED
    ),
    "activations": messages.Activations("train", 1, 0, batch_digest(1, SEED, FIRST), {"x4": SMALL}),
    "withdraw": messages.Withdraw("train", 1, 0, batch_digest(1, SEED, FIRST), (Unusable(KEY, "truncated"),)),
    "revoked": messages.Revoked((KEY,)),
    "withdrawn": messages.Withdrawn(1, (Unusable(KEY, "truncated"),)),
    "gradients": messages.Gradients(1, {"x4": SMALL}),
    "applied": messages.Applied(1),
    "advance": messages.Advance(7),
    "advanced": messages.Advanced(7),
    "share": messages.Share(100, 0),
    "shared": messages.Shared(100, 0, {"conv_0.weight": SMALL}),
    "average": messages.Average(100, 0, {"conv_0.weight": SMALL}),
    "averaged": messages.Averaged(100, 0),
    "logits": messages.Logits(
        1, (Sample(KEY, (72, 72, 80)),), batch_digest(1, SEED, FIRST), SEED, {"logits": SMALL}
    ),
    "loss-gradients": messages.LossGradients(1, batch_digest(1, SEED, FIRST), 1.25, {"logits": SMALL}),
    "prediction": messages.Prediction(
        100, 0, Sample(KEY, (0, 0, 0)), batch_digest(100, None, WHOLE), ("t1",), None, {"mask": TINY}
    ),
    "conclude": messages.Conclude(100, 1),
    "scores": messages.Scores(100, 1, {"dice_WT": 0.875}),
    "checkpoint": messages.Checkpoint(100),
    "saved": messages.Saved(100, hashlib.sha256(b"a checkpoint").digest()),
    "unsaved": messages.Unsaved(100, "the disk is full"),
    "rollback": messages.Rollback(100),
    "rolled-back": messages.RolledBack(100),
    "settled": messages.Settled(True, 3),
    "progress": messages.Progress(
        100, {"loss": 1.25, "dice_WT": 0.875}, (records.Missing("t1", "its site is away"),)
    ),
    "segment": messages.Segment(REQUEST, KEY, "mask"),
    "cancel": messages.Cancel(REQUEST),
    "locate": messages.Locate(REQUEST, KEY, "charite"),
    "located": messages.Located(REQUEST, PATIENT),
    "segmenting": messages.Segmenting(REQUEST, "working", 32, 155, 0),
    "segmented": messages.Segmented(
        REQUEST,
        1000,
        hashlib.sha256(b"a decoder").digest(),
        (Seat("t1", ("t1",)), Seat("t2", ("t2",))),
        (records.Missing("t2", "no site has it"),),
        PATIENT,
        records.TaskTerms(
            (records.Label(1, "edema"), records.Label(2, "core")),
            (records.MaskRegion("WT", (1, 2), "whole tumour"),),
            False,
            "",
        ),
        {"mask": SMALL.astype("u1")},
    ),
    "unsegmented": messages.Unsegmented(REQUEST, "absent", "no image of the patient at this site"),
    "bye": messages.Bye("complete", ""),
    "error": messages.Error(0x0503, "batch of step 1: the digests differ"),
}


# --- messages ------------------------------------------------------------------------------------------------


def heads() -> Iterator[Case]:
    """Payload of a HEAD -> message."""
    maps: dict[str, dict[str, Any]] = {}
    for name, message in MESSAGES.items():
        octets, _ = messages.encode(message)
        fields = maps[name] = codec.decode(octets)
        expect = {"message": as_json({key: fields[key] for key in fields if key != "tensors"})}
        if "tensors" in fields:
            expect["tensors"] = fields["tensors"]
        yield {"name": name, "notes": "one of each type", "input": octets.hex(), "expect": expect}

    def case(name: str, value: Any, notes: str, error: str = "codec", layer: str = "messages") -> Case:
        octets = codec.encode(value).hex()
        return {"name": name, "notes": notes, "input": octets, "expect": refused(error, layer)}

    def fine(name: str, value: dict[str, Any], notes: str) -> Case:
        octets = codec.encode(value).hex()
        return {"name": name, "notes": notes, "input": octets, "expect": {"message": as_json(value)}}

    hello, forward, job = maps["hello"], maps["forward"], maps["job-offer"]
    extended = {**hello, "extensions": {"example.org/colour": ["blue", None]}}
    yield fine("hello-extensions", extended, "SP-13-1: unknown keys are ignored here, and only here")
    unseeded = {key: item for key, item in forward.items() if key != "seed"}
    yield fine("forward-unseeded", unseeded, "SP-8.2-3: an optional field is absent")
    evaluate = {**unseeded, "mode": "evaluate", "step": 100, "batch": 7}
    yield fine("forward-evaluate", evaluate, "SP-11-17")
    release = {**unseeded, "mode": "release", "step": 0, "batch": 3}
    yield fine("forward-release", release, "SP-11.17-3")
    lowest = {**unseeded, "samples": [{"key": KEY, "origin": [-(1 << 31), 0, (1 << 31) - 1]}]}
    yield fine("origin-extremes", lowest, "SP-8.4-2: 32 bits, as the batch digest needs")
    placed = {**forward, "places": [3]}
    yield fine("forward-places", placed, "SP-11-27: this site has one sample of the batch, the fourth")
    two_seats = [{"name": "mri", "modalities": ["t2", "flair"]}, {"name": "t1", "modalities": ["t1"]}]
    yield fine("job-offer-two-seats", {**job, "seats": two_seats}, "SP-11.8-5: one of two channels")
    every = {**job, "job": {**job["job"], "average_every": 50}}
    yield fine("job-offer-average", every, "SP-11.16-1: before steps 1, 51, 101 and so on")
    frozen = {**job, "job": {**job["job"], "encoders": "frozen"}}
    yield fine("job-offer-frozen", frozen, "SP-11.17-1: sites keep their encoders as they are")
    yield fine(
        "job-offer-joint", {**job, "job": {**job["job"], "encoders": "joint"}}, "SP-11.17-1: as if absent"
    )
    thawed = {**job, "job": {**job["job"], "encoders": "thawed"}}
    yield case("encoders-unknown", thawed, "SP-8.2-4: joint or frozen")
    yield from _codings(job, case, fine)
    labelled = {**maps["job-accept"], "weights": bytes(range(32))}
    yield fine("job-accept-frozen", labelled, "SP-11.17-6: the label of its encoders' weights")
    short = {**maps["job-accept"], "weights": bytes(range(20))}
    yield case("weights-short", short, "SP-8.2-4: 32 octets")
    never = {**job, "job": {**job["job"], "average_every": 0}}
    yield case("average-every-0", never, "SP-8.2-4: never is said by leaving it out")
    glioma = {
        "regions": [{"name": n, "values": []} for n in ("WT", "TC", "ET")],
        "values": [],
        "exclusive": False,
    }
    yield fine(
        "job-offer-masks", {**job, "masks": {**glioma, "preset": "glioma"}}, "SP-11.20-2: of a known task"
    )
    organs = [{"name": "liver", "values": [1]}, {"name": "lesion", "values": [2]}]
    masks = {"regions": organs, "values": [1, 2, 3], "exclusive": True}
    yield fine("job-offer-masks-alone", {**job, "seats": [], "masks": masks}, "SP-11.20-1: and no images")
    yield case("masks-of-nothing", {**job, "masks": {**masks, "regions": []}}, "SP-8.2-4: one region or more")
    background = {**masks, "regions": [{"name": "liver", "values": [0]}]}
    yield case("masks-of-background", {**job, "masks": background}, "SP-8.2-4: 0 is no value of a region")
    listed = maps["inventory"]["patients"][0]
    masked = {**listed, "seats": [], "mask": True, "person": KEY}
    yield fine("inventory-mask", {**maps["inventory"], "patients": [masked]}, "SP-11.20-3: a mask, no image")
    silent = {key: item for key, item in maps["loss-gradients"].items() if key not in ("loss", "tensors")}
    yield case("loss-gradients-without-tensors", silent, "SP-8.4-1: they are a message with tensors")
    alone = {**maps["conclude"], "batch": 0}
    yield case("conclude-nothing", alone, "SP-8.2-4: without a prediction there is nothing to conclude")
    terms = {"bits": 16, "range": 4.0, "parties": 3}
    fused = {**job, "job": {**job["job"], "fusion": terms}}
    yield fine("job-offer-fusion", fused, "SP-11.18-1: one sum of three sites")
    alone = {**job, "job": {**job["job"], "fusion": {**terms, "parties": 1}}}
    yield case("fusion-of-one", alone, "SP-11.18-1: a sum of one site is its values")
    yield case(
        "settled-before-the-first-epoch", {**maps["settled"], "epoch": 0}, "SP-11.18-17: they begin with 1"
    )
    yield from _probes(maps, case)
    yield case("revoked-nobody", {**maps["revoked"], "patients": []}, "SP-11.13-12: there is nothing to say")
    unproven = {**maps["fusion-key"], "offer": {**maps["fusion-key"]["offer"], "chain": []}}
    yield case("fusion-key-without-certificate", unproven, "SP-11.18-6")
    yield case("fusion-keys-of-nobody", {**maps["fusion-keys"], "partners": []}, "SP-11.18-7")
    patient = maps["inventory"]["patients"][0]
    partly = {**maps["inventory"], "patients": [{**patient, "seats": [1]}]}
    yield fine("inventory-seats", partly, "SP-11-4: the site can fill the second of its seats")
    backwards = dict(reversed(maps["saved"].items()))
    yield fine("keys-in-any-order", backwards, "SP-8.1-5")
    yield fine("inventory-empty", {**maps["inventory"], "patients": []}, "SP-11-4: a site without patients")
    keeping = maps["checkpoint"]
    yield fine("checkpoint-keeping", {**keeping, "keep": [60, 80]}, "SP-11-33: ascending, older than step")
    yield fine("checkpoint-keeping-none", {**keeping, "keep": []}, "SP-11-33: none but the new one")
    lost = {"key": KEY, "cause": "not-finite"}
    two = [lost, {"key": RUN, "cause": "missing"}]
    yield fine("withdraw-two", {**maps["withdraw"], "patients": two}, "SP-11.13-1: all of the batch at once")
    of_release = {**maps["withdraw"], "mode": "release", "step": 0, "batch": 3}
    yield fine("withdraw-release", of_release, "SP-11.17-7")
    infer = {**unseeded, "mode": "infer", "step": 100, "batch": 1 << 40}
    yield fine("forward-infer", infer, "SP-11.19-8: a number that the run never repeats")
    of_inference = {**maps["withdraw"], "mode": "infer", "step": 100, "batch": 1 << 40}
    yield fine("withdraw-infer", of_inference, "SP-11.19-9")
    yield fine("segment-require", {**maps["segment"], "want": "probabilities", "require": 3}, "SP-11.19-7")
    yield case("segment-require-none", {**maps["segment"], "require": 0}, "SP-8.2-4: at least one seat")
    yield case("segment-want-unknown", {**maps["segment"], "want": "meshes"}, "SP-8.2-4")
    unlocated = {key: item for key, item in maps["located"].items() if key != "patient"}
    for cause in ("absent", "refused", "consent"):
        yield fine(f"located-{cause}", {**unlocated, "cause": cause}, "SP-11.19-4")
    yield case("located-cause-unknown", {**unlocated, "cause": "disk-full"}, "SP-8.2-4: not a patient's")
    yield case("segmented-without-seats", {**maps["segmented"], "seats": []}, "SP-8.2-4: at least one seat")
    yield case("unsegmented-code-unknown", {**maps["unsegmented"], "code": "bored"}, "SP-8.2-4")
    of_evaluation = {**maps["withdraw"], "mode": "evaluate", "step": 100, "batch": 7}
    yield fine("withdraw-evaluate", of_evaluation, "SP-11.13-7")
    listed = {**maps["inventory"], "unusable": [lost]}
    yield fine("inventory-unusable", listed, "SP-11.13-9: whose header cannot be read")
    yield fine("unsaved-no-reason", {**maps["unsaved"], "reason": ""}, "SP-11-32: nothing need be told")
    accept, said = maps["job-accept"], {"recorded": True, "defences": ["dropout:0.5", "gaussian:1@0,1"]}
    yield fine("job-offer-announcing", {**job, "recorded": False, "defences": []}, "SP-11-29, SP-11-30")
    yield fine("job-accept-announcing", {**accept, **said}, "SP-11-29, SP-11-30")
    yield fine("job-offer-challenge", {**job, "challenge": bytes(range(32))}, "SP-11.14-2")
    proved = {**accept, "holder": bytes(range(32)), "proof": bytes(range(64))}
    yield fine("job-accept-proof", proved, "SP-11.14-2")

    of_run = {**maps["bye"], "run": RUN}
    yield fine("bye-run", of_run, "SP-11-20: in place of an offer")
    yield case("bye-run-short", {**of_run, "run": RUN[:8]}, "SP-8.2-4: 16 octets")

    yield case("not-a-map", ["hello"], "SP-8.4-1")
    yield case("no-type", {"step": 1}, "SP-8.4-1")
    yield case("type-not-text", {"type": 1, "step": 1}, "SP-8.4-1")
    yield case("type-unknown", {"type": "weights", "step": 1}, "SP-8.4-1: nothing else is part of version 1")
    for name in MESSAGES:
        fields = {key: item for key, item in maps[name].items() if key not in ("type", "tensors")}
        first = next(iter(fields))
        lacking = {key: item for key, item in maps[name].items() if key != first}
        yield case(f"{name}-lacks-{first}", lacking, "SP-8.2-1: a required field is missing")
        yield case(f"{name}-unknown-field", {**maps[name], "x": 1}, "SP-8.2-2: an unknown key")
        yield case(f"{name}-{first}-nil", {**maps[name], first: None}, "SP-8.2-3: nil is not absence")
    step = maps["applied"]
    yield case("int-negative", {**step, "step": -1}, "SP-8.2-4")
    yield case("int-too-large", {**step, "step": 1 << 53}, "SP-8.2-4: beyond 2^53-1")
    yield case("int-as-float", {**step, "step": 1.0}, "SP-8.2-4: no conversions")
    yield case("int-as-bool", {**step, "step": True}, "SP-8.2-4: no conversions")
    yield case("int-as-text", {**step, "step": "1"}, "SP-8.2-4: no conversions")
    yield case("real-as-int", {**job, "job": {**job["job"], "learning_rate": 1}}, "SP-8.2-4: 1, not 1.0")
    yield case("bool-as-int", {**maps["inventory"], "last": 1}, "SP-8.2-4")
    yield case("text-as-octets", {**hello, "agent": b"x"}, "SP-8.2-4")
    yield case("text-too-long", {**hello, "agent": "x" * 129}, "SP-8.2-4: 129 characters")
    yield from texts(hello, maps["bye"], case, fine)
    yield case("text-not-listed", {**maps["bye"], "reason": "bored"}, "SP-8.2-4: not one of the texts")
    yield case("octets-as-text", {**maps["saved"], "digest": "x" * 32}, "SP-8.2-4")
    yield case("octets-short", {**maps["saved"], "digest": bytes(31)}, "SP-8.2-4: 31 octets")
    yield case("list-as-map", {**hello, "versions": {"1": 1}}, "SP-8.2-4")
    yield case("list-empty", {**hello, "versions": []}, "SP-8.2-4: at least one version")
    yield case("list-too-long", {**hello, "versions": [1] * 17}, "SP-8.2-4: seventeen versions")
    yield case("places-none", {**forward, "places": []}, "SP-8.2-4: absent, or one place a sample")
    yield case("places-too-large", {**forward, "places": [4096]}, "SP-8.2-4: beyond the largest batch")
    yield case("seats-too-many", {**job, "seats": job["seats"] * 17}, "SP-8.2-4: seventeen seats")
    channels = [{"name": "x", "modalities": ["t1"] * 9}]
    yield case("seat-too-many-channels", {**job, "seats": channels}, "SP-8.2-4: nine modalities")
    yield case("seat-no-channels", {**job, "seats": [{"name": "x", "modalities": []}]}, "SP-8.2-4")
    yield case("samples-none", {**forward, "samples": []}, "SP-8.2-4: at least one sample")
    yield case("list-item", {**hello, "versions": [1, 256]}, "SP-8.2-4: an item out of range")
    sample = forward["samples"][0]
    yield case("record-lacks", {**forward, "samples": [{"key": KEY}]}, "SP-8.2-1: inside a record")
    yield case("record-unknown", {**forward, "samples": [{**sample, "x": 1}]}, "SP-8.2-2: inside a record")
    yield case("record-not-a-map", {**forward, "samples": [KEY]}, "SP-8.2-4")
    beyond = {**sample, "origin": [0, 0, 1 << 31]}
    yield case("origin-too-large", {**forward, "samples": [beyond]}, "SP-8.4-2: beyond 32 bits")
    yield case("seed-too-large", {**forward, "seed": -1}, "SP-8.2-4: seeds are unsigned")
    yield case("mode-unknown", {**forward, "mode": "guess"}, "SP-8.2-4")
    yield case("numbers-text", {**maps["progress"], "values": {"loss": "1"}}, "SP-8.2-4")
    yield case("numbers-int", {**maps["progress"], "values": {"loss": 1}}, "SP-8.2-4: no conversions")
    figures = {f"n{n}": 0.0 for n in range(65)}
    yield case("numbers-too-many", {**maps["progress"], "values": figures}, "SP-8.2-4: 65 figures")
    yield case("extensions-not-a-map", {**hello, "extensions": []}, "SP-8.2-4")
    sixteen = {f"example.org/{n}": n for n in range(17)}
    yield case("extensions-too-many", {**hello, "extensions": sixteen}, "SP-8.2-4: seventeen entries")
    yield case("recorded-nil", {**job, "recorded": None}, "SP-8.2-3: nil is not absence")
    yield case("recorded-as-int", {**accept, "recorded": 1}, "SP-8.2-4: no conversions")
    yield case("defences-too-many", {**accept, "defences": ["dropout:0.5"] * 33}, "SP-8.2-4: 33 texts")
    yield case("defence-too-long", {**accept, "defences": ["x" * 201]}, "SP-8.2-4: 201 characters")
    yield case("keep-nil", {**keeping, "keep": None}, "SP-8.2-3: nil is not absence")
    yield case("keep-too-many", {**keeping, "keep": list(range(65))}, "SP-8.2-4: 65 steps")
    yield case("keep-negative", {**keeping, "keep": [-1]}, "SP-8.2-4: an item out of range")
    yield case(
        "unsaved-reason-too-long", {**maps["unsaved"], "reason": "x" * 501}, "SP-8.2-4: 501 characters"
    )
    withdraw = maps["withdraw"]
    yield case("withdraw-nobody", {**withdraw, "patients": []}, "SP-8.2-4: at least one patient")
    for cause in ("disk-full", "bored"):
        other = [{"key": KEY, "cause": cause}]
        yield case(
            f"withdraw-{cause}", {**withdraw, "patients": other}, "SP-11.13-2: not a cause of a patient's"
        )
    named = [{**lost, "file": "MUELLER_Erika.nii.gz"}]
    yield case("withdraw-file", {**withdraw, "patients": named}, "SP-8.2-2: no name has a place here")
    yield case("unusable-nil", {**maps["inventory"], "unusable": None}, "SP-8.2-3: nil is not absence")
    many = [lost] * 1025
    yield case("unusable-too-many", {**maps["inventory"], "unusable": many}, "SP-8.2-4: 1025 patients")
    activations = maps["activations"]
    bare = {key: item for key, item in activations.items() if key != "tensors"}
    yield case("tensors-missing", bare, "SP-8.4-3: activations announce tensors")
    yield case("tensors-misplaced", {**step, "tensors": []}, "SP-8.4-3: applied has no tensors")
    wrong = {**activations, "tensors": [["x4", "f128", [2, 2]]]}
    yield case("tensors-malformed", wrong, "SP-8.3-3", "tensor", "tensors")


# SP-8.2-5: both ends of every range that is refused. Surrogates are refused by the codec already.
REFUSED = (
    *(0x00, 0x1F, 0x7F, 0x9F, 0x61C, 0x200B, 0x200F, 0x2028, 0x202E, 0x2060, 0x206F, 0xFDD0, 0xFDEF, 0xFEFF),
    *(0xFFF9, 0xFFFB, 0xFFFE, 0xFFFF, 0x1FFFE, 0x1FFFF, 0xE0000, 0xE007F, 0xFFFFE, 0x10FFFF),
    *(0x0A, 0x0D, 0x1B, 0x85, 0x200D, 0x2029, 0x202D, 0x2066),
)
# Their neighbours, and what libraries call unprintable: spaces, private use, what is not assigned, a soft hyphen.
ALLOWED = (
    *(0x20, 0x7E, 0xA0, 0xAD, 0x378, 0x61B, 0x61D, 0x200A, 0x2010, 0x2027, 0x202F, 0x205F, 0x2070, 0x3000),
    *(0xD7FF, 0xE000, 0xFDCF, 0xFDF0, 0xFEFE, 0xFF00, 0xFFF8, 0xFFFC, 0xFFFD, 0x10000, 0x1FFFD, 0x20000),
    *(0x1FAE8, 0x1FAFF, 0xDFFFD, 0xE0080, 0xE0100, 0xEFFFD, 0xF0000, 0x10FFFD),
)


def _codings(
    job: dict[str, Any], case: Callable[..., Case], fine: Callable[[str, dict[str, Any], str], Case]
) -> Iterator[Case]:
    """Of `heads`: how a job may say that tensors are coded."""

    def coded(**changes: object) -> dict[str, Any]:
        return {**job, "job": {**job["job"], **changes}}

    mixed = ["int4", "int4", "int8", "f16", "f32"]
    yield fine("job-offer-coded", coded(activations="int8", gradients="int4"), "SP-11.21-1")
    yield fine("job-offer-coded-levels", coded(activations=mixed, gradients=["int8"] * 5), "SP-11.21-8")
    yield fine(
        "job-offer-coded-either", coded(activations="f16", gradients=mixed), "SP-11.21-8: in one direction"
    )
    most = ["bf16"] * 16
    yield fine(
        "job-offer-coded-most", coded(activations=most), "SP-8.2-4: sixteen; SP-11.21-8 is judged later"
    )
    for name, value, notes in (
        ("alone-uncoded", "f32", "a single coding; that there is none is said by leaving it out"),
        ("unknown", "int5", "not one of the texts"),
        ("levels-none", [], "at least one entry"),
        ("levels-too-many", [*most, "int8"], "seventeen entries"),
        ("levels-unknown", [*mixed[:4], "int5"], "not one of the texts"),
        ("levels-dtype", [*mixed[:4], "f64"], "a dtype without a feature"),
        ("levels-nested", [mixed], "texts, not lists"),
        ("levels-as-map", {"x0": "int4"}, "neither a text nor a list"),
    ):
        for way in ("activations", "gradients"):
            yield case(f"coded-{name}-{way}", coded(**{way: value}), f"SP-8.2-4: {notes}")


def _probes(maps: dict[str, dict[str, Any]], case: Callable[..., Case]) -> Iterator[Case]:
    """Of `heads`: what probes may carry."""
    probe, probed = maps["probe"], maps["probed"]
    for name, carried, notes in (
        ("probe-of-nothing", [], "the round trip alone"),
        ("probe-longest", [["octets", "u8", [1 << 22]]], "the limit itself"),
    ):
        bare = {key: value for key, value in probe.items() if key != "tensors"}
        octets = codec.encode({**bare, "tensors": carried}).hex()
        expect = {"message": as_json(bare), "tensors": carried}
        yield {"name": name, "notes": f"SP-11.22-1: {notes}", "input": octets, "expect": expect}
    yield case("probe-answer-too-long", {**probe, "answer": (1 << 22) + 1}, "SP-11.22-1")
    yield case("probe-zeroth", {**probe, "number": 0}, "SP-11.22-2: they begin with 1")
    yield case("probe-ninth", {**probe, "number": 9}, "SP-11.22-2")
    for name, wrong, notes in (
        ("too-long", ["octets", "u8", [(1 << 22) + 1]], "before memory is taken"),
        ("of-two-dimensions", ["octets", "u8", [2, 2]], "one dimension"),
        ("of-another-dtype", ["octets", "f32", [4]], "octets are u8"),
        ("of-another-name", ["x0", "u8", [4]], "it is called octets"),
    ):
        for kind, value in (("probe", probe), ("probed", probed)):
            yield case(f"{kind}-{name}", {**value, "tensors": [wrong]}, f"SP-11.22-1: {notes}", "tensor")


def texts(
    hello: dict[str, Any], bye: dict[str, Any], case: Callable[..., Case], fine: Callable[..., Case]
) -> Iterator[Case]:
    """What a text may hold, and how its length is counted."""
    for point in REFUSED:
        said = {**bye, "text": f"a{chr(point)}b"}
        yield case(f"text-u+{point:04x}", said, f"SP-8.2-5: U+{point:04X} is not printable")
    for point in ALLOWED:
        yield fine(f"text-with-u+{point:04x}", {**bye, "text": f"a{chr(point)}b"}, f"SP-8.2-5: U+{point:04X}")
    for name, letter in (
        ("ascii", "x"),
        ("accents", "é"),
        ("astral", "\U0001f600"),
        ("decomposed", "\u0301"),
    ):
        notes = f"SP-8.1-3: {{}} code points, whatever their number in UTF-8 or UTF-16: {name}"
        yield fine(f"text-128-{name}", {**hello, "agent": letter * 128}, notes.format(128))
        yield case(f"text-129-{name}", {**hello, "agent": letter * 129}, notes.format(129) + "; SP-8.2-4")


# --- negotiation, states ------------------------------------------------------------------------------------


def agreements() -> Iterator[Case]:
    """Two offers -> what holds, or why not."""

    def offer(**changes: Any) -> dict[str, Any]:
        base = {
            "versions": [1],
            "features": list(FEATURES),
            "requires": ["dtype.f32"],
            "max_message": 1 << 30,
        }
        return {**base, **changes}

    def welcome(**changes: Any) -> dict[str, Any]:
        return {"version": 1, "features": list(FEATURES), "max_message": 1 << 20, **changes}

    def listener(name: str, hello: dict[str, Any], own: dict[str, Any], expect: Any, notes: str) -> Case:
        return {
            "name": name,
            "operation": "negotiate",
            "notes": notes,
            "hello": hello,
            "listener": own,
            "expect": expect,
        }

    def dialler(name: str, own: dict[str, Any], answer: dict[str, Any], expect: Any, notes: str) -> Case:
        return {
            "name": name,
            "operation": "confirm",
            "notes": notes,
            "dialler": own,
            "welcome": answer,
            "expect": expect,
        }

    def agreed(
        version: int, features: list[str], receive: int = 1 << 30, send: int = 1 << 30
    ) -> dict[str, Any]:
        return {
            "version": version,
            "features": sorted(features),
            "receive_limit": receive,
            "send_limit": send,
        }

    no_version = refused("protocol-version", "negotiation")
    no_feature = refused("feature-missing", "negotiation")
    every = list(FEATURES)
    yield listener("equal", offer(), offer(), agreed(1, every), "SP-10-1")
    newer = offer(versions=[2, 1, 3])
    yield listener("highest-common", newer, offer(versions=[1, 2]), agreed(2, every), "SP-10-1: in any order")
    rising = offer(versions=[1, 2, 3])
    yield listener(
        "highest-not-first", rising, offer(versions=[2, 1]), agreed(2, every), "SP-10-1: in any order"
    )
    few, fewer = offer(features=["train", "dtype.f32"]), offer(features=["dtype.f32", "evaluate"])
    yield listener("features-of-both", few, fewer, agreed(1, ["dtype.f32"]), "SP-10-1: the intersection")
    private = offer(features=[*every, "example.org/colour"])
    yield listener(
        "feature-unknown", private, offer(), agreed(1, every), "SP-13-2: unknown features are ignored"
    )
    limits = agreed(1, every, 1 << 20, 5)
    yield listener(
        "limits", offer(max_message=5), offer(max_message=1 << 20), limits, "SP-10-2: each side has its own"
    )
    small, large = offer(max_message=1 << 20), offer(max_message=5)
    yield listener(
        "limits-reversed", small, large, agreed(1, every, 5, 1 << 20), "SP-10-2: each side has its own"
    )
    yield listener("no-version", offer(versions=[2]), offer(), no_version, "SP-10-1")
    lacking = offer(features=["train"], requires=[])
    yield listener("listener-requires", lacking, offer(), no_feature, "SP-10-1: the dialler lacks dtype.f32")
    demanding = offer(requires=["dtype.f32", "example.org/x"])
    yield listener("dialler-requires", demanding, offer(), no_feature, "SP-10-1: the listener lacks it")

    yield dialler("accepted", offer(), welcome(), agreed(1, every, 1 << 30, 1 << 20), "SP-10-3")
    yield dialler("version-not-offered", offer(), welcome(version=2), no_version, "SP-10-3")
    strange = welcome(features=[*every, "example.org/x"])
    yield dialler("feature-not-offered", offer(), strange, no_feature, "SP-10-3")
    stripped = welcome(features=["train"])
    yield dialler(
        "feature-stripped", offer(), stripped, no_feature, "SP-10-3: a downgrade below what is required"
    )


def conversations() -> Iterator[Case]:
    """Who says what, in order -> states of both sides, or the error at the last word."""
    joined = "C hello|S welcome|S job-offer|C job-accept"
    working = f"{joined}|C inventory|C inventory|S begin"

    def case(name: str, script: str, expect: Any, notes: str, features: Sequence[str] = FEATURES) -> Case:
        sides = {"C": "client", "S": "coordinator"}
        words = []
        for line in filter(None, script.split("|")):
            message, _, mode = line[2:].partition(" ")
            words.append([sides[line[0]], message, mode])
        return {"name": name, "notes": notes, "features": list(features), "say": words, "expect": expect}

    def at(client: str, coordinator: str) -> dict[str, str]:
        return {"client": client, "coordinator": coordinator}

    bad = refused("unexpected-message", "states")
    yield case("nothing", "", at("start", "start"), "SP-9-1")
    yield case("admitted", "C hello|S welcome", at("ready", "ready"), "SP-9-1")
    yield case("joined", joined, at("joined", "joined"), "SP-9-1")
    step = "|S forward|S forward|C activations|S gradients|C applied"
    yield case("step", working + step, at("working", "working"), "SP-9-1")
    upkeep = "|S checkpoint|C saved|S rollback|C rolled-back|S progress"
    yield case("upkeep", working + upkeep, at("working", "working"), "SP-9-1")
    without = "|S forward|S advance|C advanced|C activations|S checkpoint|C unsaved"
    yield case("made-without-it", working + without, at("working", "working"), "SP-9-1")
    bad_file = "|S forward|S forward|C withdraw|S advance|C advanced|S withdrawn|S forward|C activations"
    yield case("withdrawn", working + bad_file, at("working", "working"), "SP-11.13-1, SP-11.13-4")
    declined = "C hello|S welcome|S job-offer|C job-decline|S job-offer|C job-accept"
    yield case(
        "declined-then-accepted", declined, at("joined", "joined"), "SP-9-1: the link outlives a decline"
    )
    yield case("byes", working + "|S bye|C bye", at("done", "done"), "SP-9-3")
    mean = "|S share|C shared|S average|C averaged|S forward|C activations"
    yield case("averaged", working + mean, at("working", "working"), "SP-11.16-2, SP-11.16-5")
    labels = "|S logits|C loss-gradients|S advance|C advanced|S prediction|C scores|S conclude|C scores"
    yield case("labels", working + labels, at("working", "working"), "SP-11.20-6, SP-11.20-9")
    yield case("labels-withdrawn", f"{working}|S logits|C withdraw", at("working", "working"), "SP-11.20-8")
    for side, word in (
        ("C", "logits"),
        ("S", "loss-gradients"),
        ("C", "prediction"),
        ("C", "conclude"),
        ("S", "scores"),
    ):
        yield case(f"{word}-from-the-other", f"{working}|{side} {word}", bad, "SP-9-1")
    yield case("logits-before-begin", f"{joined}|S logits", bad, "SP-9-1")
    revoked = (
        f"{working}|S forward|C revoked|C activations|C revoked|S advance|C revoked|C advanced|S withdrawn"
    )
    yield case("revoked", revoked, at("working", "working"), "SP-11.13-12: it answers nothing")
    yield case(
        "revoked-without-features", f"{working}|C revoked", at("working", "working"), "SP-11.13-12", []
    )
    yield case("revoked-before-begin", f"{joined}|C revoked", bad, "SP-9-1: an inventory says it then")
    yield case("revoked-from-coordinator", f"{working}|S revoked", bad, "SP-9-1")
    ready = "C hello|S welcome"
    measured = f"{ready}|S probe|C probed|S probe|C probed"
    yield case("probed", measured, at("ready", "ready"), "SP-11.22-1")
    yield case(
        "probed-then-offered", f"{measured}|S job-offer|C job-accept", at("joined", "joined"), "SP-9-1"
    )
    yield case("probed-unasked", f"{ready}|C probed", bad, "SP-11.22-2: it would pass for a fast link")
    yield case("probed-twice", f"{ready}|S probe|C probed|C probed", bad, "SP-11.22-2")
    yield case("probe-without-feature", f"{ready}|S probe", bad, "SP-9-8", ["train", "dtype.f32"])
    yield case("probed-without-feature", f"{ready}|C probed", bad, "SP-9-8", ["train", "dtype.f32"])
    yield case("probe-from-client", f"{ready}|C probe", bad, "SP-9-1: a site does not measure")
    yield case("probe-before-welcome", "C hello|S probe", bad, "SP-9-1")
    yield case("probe-with-an-offer", f"{ready}|S job-offer|S probe", bad, "SP-9-1: before an offer")
    yield case("probed-after-an-offer", f"{ready}|S probe|S job-offer|C probed", bad, "SP-11.22-2")
    yield case("probe-while-working", f"{working}|S probe", bad, "SP-9-1")
    settled = f"{working}|S settled|S forward|C activations"
    yield case("settled", settled, at("working", "working"), "SP-11.18-16")
    keys = f"{joined}|C fusion-key|C inventory|S fusion-keys|S begin|S forward|C activations"
    yield case("keys-exchanged", keys, at("working", "working"), "SP-11.18-7")
    yield case("crossing-bye", working + "|S bye|C activations|C applied|C bye", at("done", "done"), "SP-9-2")
    offered = "C hello|S welcome|C bye|S job-offer|S bye"
    yield case(
        "crossing-offer", offered, at("done", "done"), "SP-9-2: the trigger does not move a side in done"
    )
    yield case("error-first", "S error", at("error", "error"), "SP-9-4: allowed before hello")
    returned = f"{joined}|C inventory|S begin|S gradients|C applied|S forward|C activations"
    yield case(
        "gradients-without-forward", returned, at("working", "working"), "SP-11-16: a link came up between"
    )
    yield case("error-after-own-bye", working + "|C bye|C error", at("error", "error"), "SP-9-4")
    yield case("error-after-bye", working + "|C bye|S error", at("error", "error"), "SP-9-4")
    yield case("welcome-first", "S welcome", bad, "SP-9-1")
    yield case("hello-twice", "C hello|C hello", bad, "SP-9-1")
    yield case("work-before-welcome", "C hello|C activations", bad, "SP-9-1")
    yield case("bye-before-welcome", "C hello|C bye", bad, "SP-9-1: before welcome only error ends a link")
    yield case("accept-without-offer", "C hello|S welcome|C job-accept", bad, "SP-9-1")
    yield case("begin-without-accept", "C hello|S welcome|S job-offer|S begin", bad, "SP-9-1")
    yield case("forward-before-begin", joined + "|S forward", bad, "SP-9-1")
    yield case("inventory-after-begin", working + "|C inventory", bad, "SP-9-1")
    yield case("gradients-from-client", working + "|C gradients", bad, "SP-9-1")
    yield case("advance-before-begin", joined + "|S advance", bad, "SP-9-1")
    yield case("advance-from-client", working + "|C advance", bad, "SP-9-1")
    yield case("unsaved-from-coordinator", working + "|S unsaved", bad, "SP-9-1")
    yield case("withdraw-before-begin", joined + "|C withdraw", bad, "SP-9-1: an inventory says it then")
    yield case("withdraw-from-coordinator", working + "|S withdraw", bad, "SP-9-1")
    yield case("withdrawn-from-client", working + "|C withdrawn", bad, "SP-9-1")
    yield case("unknown", working + "|S weights", bad, "SP-9-1")
    yield case("share-before-begin", joined + "|S share", bad, "SP-9-1")
    yield case("share-from-client", working + "|C share", bad, "SP-9-1")
    yield case("average-from-client", working + "|C average", bad, "SP-9-1: a site does not ask for one")
    begun = "C hello|S welcome|S job-offer|C job-accept|C inventory|S begin"
    alone = ["train", "dtype.f32"]
    evaluating = ["evaluate", "dtype.f32"]
    yield case(
        "train-alone", begun + "|S forward train|C activations train|S gradients", at("working", "working"),
        "SP-9-8: each of these features is agreed", alone,
    )  # fmt: skip
    yield case(
        "evaluate-alone", begun + "|S forward evaluate|C activations evaluate", at("working", "working"),
        "SP-9-8: a message of two features needs one of them", evaluating,
    )  # fmt: skip
    releasing = ["release", "dtype.f32"]
    yield case(
        "release-alone",
        begun + "|S forward release|S forward release|C activations release|C withdraw release|S withdrawn|S bye",
        at("working", "done"), "SP-11.17-1: all that a frozen job needs", releasing,
    )  # fmt: skip
    for side, refused_word in (
        ("S", "gradients"), ("C", "applied"), ("S", "advance"), ("C", "advanced"), ("S", "checkpoint"),
        ("C", "saved"), ("S", "rollback"), ("C", "rolled-back"), ("S", "share"), ("C", "shared"),
        ("S", "average"), ("C", "averaged"), ("S", "forward train"), ("S", "forward evaluate"),
        ("C", "activations train"), ("C", "withdraw evaluate"),
    ):  # fmt: skip
        yield case(
            f"release-{refused_word.replace(' ', '-')}", f"{begun}|{side} {refused_word}", bad,
            "SP-9-8, SP-11.17-1: no such word in a frozen job", releasing,
        )  # fmt: skip
    yield case("release-not-agreed", begun + "|S forward release", bad, "SP-9-8", ["train", "evaluate"])
    yield case("core-alone", begun + "|S progress|S bye", at("working", "done"), "SP-9-8: no feature", [])
    yield case("mode-not-agreed", begun + "|S forward evaluate", bad, "SP-9-8, SP-10-6", alone)
    yield case(
        "answer-in-a-mode-not-agreed", begun + "|C activations evaluate", bad, "SP-9-8, SP-10-6", alone
    )
    yield case("mode-of-no-service", begun + "|S forward average", bad, "SP-9-8: average has no batches")
    inferring = ["train", "infer", "dtype.f32"]
    yield case(
        "infer",
        begun
        + "|C segment|S segmenting|S locate|C located|S forward infer|C activations infer|S forward infer"
        "|C withdraw infer|S segmented|C segment|S unsegmented|C cancel|S bye",
        at("working", "done"), "SP-11.19-1: all that inference needs", inferring,
    )  # fmt: skip
    yield case(
        "infer-frozen", begun + "|C segment|S locate|C located|S forward release|C activations release|S segmented",
        at("working", "working"), "SP-11.19-14", ["release", "infer"],
    )  # fmt: skip
    for side, refused_word in (
        ("C", "segment"), ("C", "cancel"), ("S", "locate"), ("C", "located"), ("S", "segmenting"),
        ("S", "segmented"), ("S", "unsegmented"), ("S", "forward infer"), ("C", "activations infer"),
        ("C", "withdraw infer"),
    ):  # fmt: skip
        yield case(
            f"{refused_word.replace(' ', '-')}-without-infer", f"{begun}|{side} {refused_word}", bad,
            "SP-9-8, SP-11.19-1", ["train", "evaluate", "dtype.f32"],
        )  # fmt: skip
    yield case("segment-before-begin", joined + "|C segment", bad, "SP-9-1", inferring)
    yield case("segment-from-coordinator", begun + "|S segment", bad, "SP-9-1", inferring)
    yield case("locate-from-client", begun + "|C locate", bad, "SP-9-1: a site asks by segment", inferring)
    yield case("segmented-from-client", begun + "|C segmented", bad, "SP-9-1", inferring)
    yield case("withdrawn-with-infer-alone", begun + "|S withdrawn", bad, "SP-9-8", ["infer"])
    yield case("withdraw-in-a-mode-not-agreed", begun + "|C withdraw train", bad, "SP-9-8", evaluating)
    yield case("gradients-without-train", begun + "|S gradients", bad, "SP-9-8", evaluating)
    yield case("checkpoint-without-train", begun + "|S checkpoint", bad, "SP-9-8", evaluating)
    yield case("fusion-key-without-fuse", f"{joined}|C fusion-key", bad, "SP-9-8", alone)
    yield case("fusion-keys-without-fuse", f"{joined}|S fusion-keys", bad, "SP-9-8", alone)
    yield case("settled-without-fuse", f"{begun}|S settled", bad, "SP-9-8", alone)
    yield case("settled-before-begin", f"{joined}|S settled", bad, "SP-9-1: `begin` comes first")
    yield case("settled-from-client", f"{begun}|C settled", bad, "SP-9-1")
    yield case("fusion-key-from-coordinator", f"{joined}|S fusion-key", bad, "SP-9-1")
    yield case(
        "fusion-keys-after-begin", f"{begun}|S fusion-keys", bad, "SP-11.18-7: never changed while it works"
    )
    for side, word in (
        ("S", "logits"),
        ("C", "loss-gradients"),
        ("S", "prediction"),
        ("S", "conclude"),
        ("C", "scores"),
    ):
        yield case(f"{word}-without-label", f"{begun}|{side} {word}", bad, "SP-9-8", ["train", "evaluate"])
    yield case("share-without-average", begun + "|S share", bad, "SP-9-8", alone)
    yield case("average-without-average", begun + "|S average", bad, "SP-9-8", alone)
    yield case("withdrawn-without-features", begun + "|S withdrawn", bad, "SP-9-8", ["dtype.f32"])
    yield case("after-bye", working + "|C bye|C applied", bad, "SP-9-3: bye is the last word")
    yield case("bye-twice", working + "|C bye|C bye", bad, "SP-9-3")
    yield case("error-twice", "S error|C error", bad, "SP-9-4: nothing follows")
