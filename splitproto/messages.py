"""All messages of version 1, and how they become octets (SP-8.4).

A message is a frozen dataclass; its map on the wire is `{"type": <name>, <fields>...}`. Those that carry
tensors add `"tensors": [descriptor...]`, and one msgpack bin per tensor follows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from . import codec, probes
from .causes import OF_A_PATIENT
from .constants import MAX_FRAME_PAYLOAD, MAX_PROBE, MAX_PROBES
from .errors import CodecError
from .fields import (
    Bool,
    Extensions,
    Int,
    ListOf,
    Numbers,
    Octets,
    Real,
    Record,
    Text,
    read_map,
    wire,
    write_map,
)
from .records import (
    KEY,
    MOST_SEATS,
    SEAT,
    Job,
    KeyOffer,
    Masks,
    Missing,
    Patient,
    Sample,
    Seat,
    TaskTerms,
    Unusable,
)
from .tensors import Array, Descriptor, read_descriptors, wire_view

U64 = (1 << 64) - 1
STEP = Int()
DIGEST = Octets(32)
MODES = ("train", "evaluate", "infer", "release")
WANTED = ("mask", "probabilities")
NOT_LOCATED = ("absent", "refused", *OF_A_PATIENT)
UNSEGMENTED = (
    "refused",
    "absent",
    "few-seats",
    "misaligned",
    "unusable",
    "site-lost",
    "too-large",
    "busy",
    "deadline",
    "cancelled",
    "failed",
)
"""Why a request ends without a segmentation (SP-11.19-12)."""
MOST_SEATS_OF_A_JOB = 64
DEFENCES = ListOf(Text(200), 32)
BYE_REASONS = ("complete", "failed", "drain", "rotate")


class Message:
    """Root of all messages."""

    __slots__ = ()
    name: ClassVar[str]


@dataclass(frozen=True, slots=True)
class Hello(Message):
    """Dialler, first: what it offers."""

    name = "hello"
    versions: tuple[int, ...] = wire(ListOf(Int(1, 255), 16, 1))
    features: tuple[str, ...] = wire(ListOf(Text(64), 64))
    requires: tuple[str, ...] = wire(ListOf(Text(64), 64))
    max_message: int = wire(Int(1))
    """Tensor octets of one message that the sender takes; also the credit it gives at first."""
    agent: str = wire(Text(128))
    """Software and version, for logs."""
    binding: bytes = wire(DIGEST)
    """SHA-256 of both certificates' SHA-256, dialler's first."""
    extensions: dict[str, Any] | None = wire(Extensions(), default=None)


@dataclass(frozen=True, slots=True)
class Welcome(Message):
    """Listener: the dialler is admitted, and this is what holds."""

    name = "welcome"
    version: int = wire(Int(1, 255))
    features: tuple[str, ...] = wire(ListOf(Text(64), 64))
    max_message: int = wire(Int(1))
    agent: str = wire(Text(128))
    binding: bytes = wire(DIGEST)
    extensions: dict[str, Any] | None = wire(Extensions(), default=None)


@dataclass(frozen=True, slots=True)
class Probe(Message):
    """Coordinator: octets to be answered with octets, by which it measures the link (SP-11.22)."""

    name = "probe"
    number: int = wire(Int(1, MAX_PROBES))
    """Of the probes of this link, from 1."""
    answer: int = wire(Int(0, MAX_PROBE))
    """Octets that the answer is to carry."""
    tensors: Mapping[str, Array] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Probed(Message):
    """Client: so many octets."""

    name = "probed"
    number: int = wire(Int(1, MAX_PROBES))
    """Of the probe that it answers."""
    tensors: Mapping[str, Array] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class JobOffer(Message):
    """Coordinator: take part in this job and fill these seats."""

    name = "job-offer"
    run: bytes = wire(Octets(16))
    """This run of the job; survives restarts of the coordinator (SP-11-1)."""
    seats: tuple[Seat, ...] = wire(ListOf(Record(Seat), MOST_SEATS))
    """Those that this site fills, ordered by name; none only where it is asked for masks."""
    job: Job = wire(Record(Job))
    schema: bytes = wire(DIGEST)
    """Digest of the cut layer's descriptors for one batch, all seats with all samples."""
    recorded: bool | None = wire(Bool(), default=None)
    """Whether the coordinator keeps a record of what it receives and sends; absent: it does not say."""
    defences: tuple[str, ...] | None = wire(DEFENCES, default=None)
    """What is done to the gradients before they are sent, in order; absent: not said."""
    challenge: bytes | None = wire(Octets(32), default=None)
    """Random, new for every offer: the site signs it (SP-11.14); absent: no proof is asked for."""
    masks: Masks | None = wire(Record(Masks), default=None)
    """The labels are this site's: it computes loss and scores (SP-11.20); absent: they are somebody else's."""


@dataclass(frozen=True, slots=True)
class JobAccept(Message):
    """Client: yes; and what it holds of this run."""

    name = "job-accept"
    incarnation: bytes = wire(Octets(16))
    """Random, new whenever a process takes up this run; a rollback keeps it: a new one means memory was lost."""
    applied: int = wire(STEP)
    """Last step whose gradients were applied; 0 for a new incarnation, whatever lies on its disk."""
    checkpoints: tuple[int, ...] = wire(ListOf(STEP, 1024))
    """Steps of this run that are safe on disk."""
    patients: int = wire(Int(0, 1 << 20))
    recorded: bool | None = wire(Bool(), default=None)
    """Whether this site keeps a record of what it receives and sends; absent: it does not say."""
    defences: tuple[str, ...] | None = wire(DEFENCES, default=None)
    """What is done to the activations before they are sent, in order; absent: not said."""
    holder: bytes | None = wire(Octets(32), default=None)
    """Ed25519 public key that the site made for this run; with `proof`."""
    proof: bytes | None = wire(Octets(64), default=None)
    """Signature with that key over run, challenge and binding."""
    weights: bytes | None = wire(Octets(32), default=None)
    """In a frozen job: a label that changes with the encoders' weights, and tells nothing of them (SP-11.17-6)."""


@dataclass(frozen=True, slots=True)
class JobDecline(Message):
    """Client: no, and why."""

    name = "job-decline"
    code: int = wire(Int(1, 0xFFFF))
    """From the error registry."""
    reason: str = wire(Text(500))


@dataclass(frozen=True, slots=True)
class Inventory(Message):
    """Client: the patients it has, in pieces."""

    name = "inventory"
    patients: tuple[Patient, ...] = wire(ListOf(Record(Patient), 1024))
    last: bool = wire(Bool())
    salt_check: bytes = wire(Octets(8))
    """Check value of the salt that the keys were made with: two sites with different salts share no patient."""
    unusable: tuple[Unusable, ...] | None = wire(ListOf(Record(Unusable), 1024), default=None)
    """Patients whose files it holds and cannot use; in the last piece only."""


@dataclass(frozen=True, slots=True)
class FusionKey(Message):
    """Client: the keys with which it masks what it sends in this run."""

    name = "fusion-key"
    offer: KeyOffer = wire(Record(KeyOffer))


@dataclass(frozen=True, slots=True)
class FusionKeys(Message):
    """Coordinator: those of all other sites of the sum, ordered by name."""

    name = "fusion-keys"
    partners: tuple[KeyOffer, ...] = wire(ListOf(Record(KeyOffer), 63, 1))


@dataclass(frozen=True, slots=True)
class Begin(Message):
    """Coordinator: all sites are here; work follows the given committed step."""

    name = "begin"
    step: int = wire(STEP)
    patients: int = wire(Int(0, 1 << 20))
    """How many patients all sites share."""


@dataclass(frozen=True, slots=True)
class Forward(Message):
    """Coordinator: a batch, sent ahead of need."""

    name = "forward"
    mode: str = wire(Text(16, MODES))
    step: int = wire(STEP)
    """train: the step this batch is; otherwise: the committed step whose weights are to be used, in a release 0."""
    batch: int = wire(Int())
    """train: 0; evaluate: number of the batch in this evaluation; infer: never repeated in a run; release: of the
    question to this site in this run."""
    samples: tuple[Sample, ...] = wire(ListOf(Record(Sample), 4096, 1))
    digest: bytes = wire(DIGEST)
    """Commitment to the ordered samples."""
    seed: int | None = wire(Int(0, U64), default=None)
    """Augmentation; absent: none."""
    places: tuple[int, ...] | None = wire(ListOf(Int(0, 4095), 4096, 1), default=None)
    """Places of the samples in the whole batch, ascending; absent: 0, 1, 2, ..."""


@dataclass(frozen=True, slots=True)
class Activations(Message):
    """Client: its levels for one batch."""

    name = "activations"
    mode: str = wire(Text(16, MODES))
    step: int = wire(STEP)
    batch: int = wire(Int())
    digest: bytes = wire(DIGEST)
    tensors: Mapping[str, Array] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Withdraw(Message):
    """Client, in place of activations: these patients of the batch cannot be used here, now or later in this run."""

    name = "withdraw"
    mode: str = wire(Text(16, MODES))
    step: int = wire(STEP)
    batch: int = wire(Int())
    digest: bytes = wire(DIGEST)
    patients: tuple[Unusable, ...] = wire(ListOf(Record(Unusable), 4096, 1))


@dataclass(frozen=True, slots=True)
class Revoked(Message):
    """Client: patients who have withdrawn consent since it joined, at once (SP-11.13-12)."""

    name = "revoked"
    patients: tuple[bytes, ...] = wire(ListOf(Octets(16), 1024, 1))
    """Pseudonyms."""


@dataclass(frozen=True, slots=True)
class Withdrawn(Message):
    """Coordinator: from this step on, the run is made without these patients."""

    name = "withdrawn"
    step: int = wire(STEP)
    patients: tuple[Unusable, ...] = wire(ListOf(Record(Unusable), 4096, 1))


@dataclass(frozen=True, slots=True)
class Gradients(Message):
    """Coordinator: the loss's gradient with respect to this site's activations of one step."""

    name = "gradients"
    step: int = wire(STEP)
    tensors: Mapping[str, Array] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Applied(Message):
    """Client: the step is applied here."""

    name = "applied"
    step: int = wire(STEP)


@dataclass(frozen=True, slots=True)
class Advance(Message):
    """Coordinator: the steps after your last, up to this one, are made without you."""

    name = "advance"
    step: int = wire(STEP)


@dataclass(frozen=True, slots=True)
class Advanced(Message):
    """Client: counts on from this step, with the weights it had."""

    name = "advanced"
    step: int = wire(STEP)


@dataclass(frozen=True, slots=True)
class Share(Message):
    """Coordinator: tell me an encoder's weights after this committed step; they are to be averaged."""

    name = "share"
    step: int = wire(STEP)
    seat: int = wire(SEAT)


@dataclass(frozen=True, slots=True)
class Shared(Message):
    """Client: the weights, f32, by name."""

    name = "shared"
    step: int = wire(STEP)
    seat: int = wire(SEAT)
    tensors: Mapping[str, Array] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Average(Message):
    """Coordinator: make the next step from these weights of an encoder."""

    name = "average"
    step: int = wire(STEP)
    seat: int = wire(SEAT)
    tensors: Mapping[str, Array] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Averaged(Message):
    """Client: done."""

    name = "averaged"
    step: int = wire(STEP)
    seat: int = wire(SEAT)


@dataclass(frozen=True, slots=True)
class Logits(Message):
    """Coordinator, to the site of the labels: what the network says of one training batch.

    SP-11.20-4, SP-11.20-5, SP-11.20-7.
    """

    name = "logits"
    step: int = wire(STEP)
    """The step that is being made."""
    samples: tuple[Sample, ...] = wire(ListOf(Record(Sample), 4096, 1))
    """Of the whole batch."""
    digest: bytes = wire(DIGEST)
    """Commitment to the ordered samples (SP-11.6)."""
    seed: int | None = wire(Int(0, U64), default=None)
    """Augmentation, which moves the masks as well; absent: none."""
    tensors: Mapping[str, Array] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class LossGradients(Message):
    """Client: the loss's gradient with respect to each tensor of the logits (SP-11.20-6).

    SP-11.20-8: or `withdraw`. SP-11.20-11: it tells the mask.
    """

    name = "loss-gradients"
    step: int = wire(STEP)
    digest: bytes = wire(DIGEST)
    loss: float | None = wire(Real(), default=None)
    """The loss, where the site's policy tells it."""
    tensors: Mapping[str, Array] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Prediction(Message):
    """Coordinator, to the site of the labels: the mask that the network makes of a patient who is held out."""

    name = "prediction"
    step: int = wire(STEP)
    """The committed step whose weights made it."""
    batch: int = wire(Int())
    """Number of the prediction in this evaluation."""
    sample: Sample = wire(Record(Sample))
    """The patient; the whole volume, from its first voxel."""
    digest: bytes = wire(DIGEST)
    """Commitment to step and sample (SP-11.6)."""
    seats: tuple[str, ...] = wire(ListOf(Text(32), 64))
    """Those that it was made from, by name."""
    without: str | None = wire(Text(32), default=None)
    """A seat that was left out, to see what it is worth; absent: none was."""
    tensors: Mapping[str, Array] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Conclude(Message):
    """Coordinator, to the site of the labels: an evaluation is over; what does it score?"""

    name = "conclude"
    step: int = wire(STEP)
    batch: int = wire(Int(1))
    """How many predictions there were."""


@dataclass(frozen=True, slots=True)
class Scores(Message):
    """Client: a prediction is scored; or, to `conclude`, the figures that the site's policy tells (SP-11.20-9).

    SP-11.20-10: means over several patients, rounded.
    """

    name = "scores"
    step: int = wire(STEP)
    batch: int = wire(Int())
    """Of what it answers."""
    values: dict[str, float] = wire(Numbers())
    """Such as dice_WT; none for a prediction."""


@dataclass(frozen=True, slots=True)
class Checkpoint(Message):
    """Coordinator: save your half at this committed step."""

    name = "checkpoint"
    step: int = wire(STEP)
    keep: tuple[int, ...] | None = wire(ListOf(STEP, 64), default=None)
    """Older steps that are to stay: once the new one is safe, others may go; absent: not said."""


@dataclass(frozen=True, slots=True)
class Saved(Message):
    """Client: saved, durable."""

    name = "saved"
    step: int = wire(STEP)
    digest: bytes = wire(DIGEST)


@dataclass(frozen=True, slots=True)
class Unsaved(Message):
    """Client: not saved, and why; earlier checkpoints are unchanged, and work continues."""

    name = "unsaved"
    step: int = wire(STEP)
    reason: str = wire(Text(500))


@dataclass(frozen=True, slots=True)
class Rollback(Message):
    """Coordinator: go back to your checkpoint of this step; 0 is the beginning."""

    name = "rollback"
    step: int = wire(STEP)


@dataclass(frozen=True, slots=True)
class RolledBack(Message):
    """Client: done."""

    name = "rolled-back"
    step: int = wire(STEP)


@dataclass(frozen=True, slots=True)
class Settled(Message):
    """Coordinator: what was asked before is over, and its keys are not needed any more (SP-11.18-16, SP-11.18-18)."""

    name = "settled"
    trained: bool = wire(Bool())
    """Whether the training is over, or all of its releases are there."""
    epoch: int = wire(Int(1, (1 << 32) - 1))
    """Of the keys of the service from now on."""


@dataclass(frozen=True, slots=True)
class Progress(Message):
    """Coordinator: figures for people at the sites."""

    name = "progress"
    step: int = wire(STEP)
    values: dict[str, float] = wire(Numbers())
    missing: tuple[Missing, ...] | None = wire(ListOf(Record(Missing), 64), default=None)
    """All seats that steps are made without from here on (SP-11-42); absent: as said before."""


@dataclass(frozen=True, slots=True)
class Segment(Message):
    """Client: segment this patient."""

    name = "segment"
    request: bytes = wire(Octets(16))
    """Random; the same when it is sent again (SP-11.19-2)."""
    key: bytes = wire(KEY)
    want: str = wire(Text(16, WANTED))
    require: int | None = wire(Int(1, MOST_SEATS_OF_A_JOB), default=None)
    """Least seats that it may be made from; absent: one."""


@dataclass(frozen=True, slots=True)
class Cancel(Message):
    """Client: the request is no longer wanted."""

    name = "cancel"
    request: bytes = wire(Octets(16))


@dataclass(frozen=True, slots=True)
class Locate(Message):
    """Coordinator: a request is about this patient; can it be used at your site?"""

    name = "locate"
    request: bytes = wire(Octets(16))
    key: bytes = wire(KEY)
    asker: str = wire(Text(63))
    """The site that asks: the coordinator's word (SP-11.19-4)."""


@dataclass(frozen=True, slots=True)
class Located(Message):
    """Client: the patient's grid and seats, or why not."""

    name = "located"
    request: bytes = wire(Octets(16))
    patient: Patient | None = wire(Record(Patient), default=None)
    cause: str | None = wire(Text(16, NOT_LOCATED), default=None)
    """Exactly one of the two is present."""


@dataclass(frozen=True, slots=True)
class Segmenting(Message):
    """Coordinator, to the site that asked: how far a request is, for people."""

    name = "segmenting"
    request: bytes = wire(Octets(16))
    state: str = wire(Text(16, ("queued", "working")))
    done: int = wire(Int())
    """Windows."""
    total: int = wire(Int())
    """0: not known yet."""
    ahead: int = wire(Int())
    """Requests that are worked on before it."""


@dataclass(frozen=True, slots=True)
class Segmented(Message):
    """Coordinator, to the site that asked: the segmentation, one tensor `mask` or `probabilities`."""

    name = "segmented"
    request: bytes = wire(Octets(16))
    step: int = wire(STEP)
    model: bytes = wire(DIGEST)
    """Of the coordinator's weights."""
    seats: tuple[Seat, ...] = wire(ListOf(Record(Seat), MOST_SEATS_OF_A_JOB, 1))
    """All of the job."""
    missing: tuple[Missing, ...] = wire(ListOf(Record(Missing), MOST_SEATS_OF_A_JOB - 1))
    """Those that it was not made from, and why."""
    grid: Patient = wire(Record(Patient))
    task: TaskTerms = wire(Record(TaskTerms))
    tensors: Mapping[str, Array] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Unsegmented(Message):
    """Coordinator, to the site that asked: there is no segmentation, and why."""

    name = "unsegmented"
    request: bytes = wire(Octets(16))
    code: str = wire(Text(16, UNSEGMENTED))
    reason: str = wire(Text(500))


@dataclass(frozen=True, slots=True)
class Bye(Message):
    """Either: no more from me; close when you are ready."""

    name = "bye"
    reason: str = wire(Text(16, BYE_REASONS))
    text: str = wire(Text(500))
    run: bytes | None = wire(Octets(16), default=None)
    """SP-11-20: the run that is complete; absent: that of the link's offer."""


@dataclass(frozen=True, slots=True)
class Error(Message):
    """Either: this link ends here."""

    name = "error"
    code: int = wire(Int(1, 0xFFFF))
    reason: str = wire(Text(500))


MESSAGES: dict[str, type[Message]] = {cls.name: cls for cls in Message.__subclasses__()}
WITH_TENSORS = frozenset(name for name, cls in MESSAGES.items() if "tensors" in cls.__annotations__)


def encode(message: Message) -> tuple[bytes, list[memoryview]]:
    """Head octets and body segments (bin head, values, bin head, values...); values are not copied.

    Raises:
        CodecError, TensorError: a field or tensor the wire does not carry.
    """
    head: dict[str, Any] = {"type": message.name, **write_map(message, message.name)}
    segments: list[memoryview] = []
    if message.name in WITH_TENSORS:
        tensors: Mapping[str, Array] = message.tensors  # type: ignore[attr-defined]
        described = [Descriptor.of(name, array) for name, array in tensors.items()]
        head["tensors"] = [d.to_wire() for d in described]
        read_descriptors(head["tensors"])
        probes.check(message.name, described)
        for d, array in zip(described, tensors.values(), strict=True):
            segments += [memoryview(codec.bin_header(d.nbytes)), wire_view(array)]
    octets = codec.encode(head)
    if len(octets) > MAX_FRAME_PAYLOAD:
        raise CodecError(f"the head of a {message.name} does not fit in one frame")
    return octets, segments


def decode_head(octets: bytes | bytearray | memoryview) -> tuple[Message, tuple[Descriptor, ...]]:
    """Check a head; the message's tensors are still empty, to be filled as the descriptors say.

    Raises:
        CodecError, TensorError: not a message of version 1.
    """
    head = codec.decode(octets)
    if type(head) is not dict or type(head.get("type")) is not str:
        raise CodecError("a message without a type")
    kind = head.pop("type")
    if kind not in MESSAGES:
        raise CodecError(f"an unknown message type {kind[:40]!r}")
    if (kind in WITH_TENSORS) != ("tensors" in head):
        raise CodecError(f"tensors are missing from, or do not belong in, a {kind}")
    described = read_descriptors(head.pop("tensors")) if kind in WITH_TENSORS else ()
    probes.check(kind, described)
    cls = MESSAGES[kind]
    return cls(**read_map(cls, head, kind)), described
