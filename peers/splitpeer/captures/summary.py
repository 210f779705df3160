"""What a capture holds, counted from the heads of its messages: no tensor is read."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from splitpeer.captures.reader import Capture, Verdict
from splitproto.capture import CaptureTruncated, Recorded
from splitproto.messages import Activations, Forward, Gradients, Withdraw, Withdrawn


@dataclass
class Flow:
    """The messages of one kind to or from one peer."""

    peer: str
    direction: str
    """"in": from the peer; "out": to it."""
    kind: str
    messages: int = 0
    octets: int = 0
    """Bytes of tensors."""
    first_step: int | None = None
    last_step: int | None = None


@dataclass
class LevelSummary:
    """One tensor of activations or gradients."""

    peer: str
    kind: str
    name: str
    dtype: str
    shape: tuple[int, ...]
    """Without the batch's first dimension."""
    octets_per_sample: int
    samples: int = 0
    octets: int = 0
    """Bytes of all messages."""


@dataclass
class Summary:
    """What `splitpeer replay` shows; `as_json` is the same for machines."""

    flows: list[Flow] = field(default_factory=list)
    levels: list[LevelSummary] = field(default_factory=list)
    first: float | None = None
    """Time of the first and of the last message, seconds since 1970 by the recorder's clock."""
    last: float | None = None
    steps: int = 0
    """Training steps of which a batch was recorded."""
    evaluations: int = 0
    """Evaluation batches."""
    releases: int = 0
    """Batches that sites with frozen encoders released."""
    patients: int = 0
    """Different keys in the recorded batches."""
    withdrawn: int = 0
    """Different keys that a site withdrew."""

    def as_json(self, capture: Capture, verdict: Verdict) -> dict[str, Any]:
        """All of it, with header and verdict, as plain values."""
        header = capture.header
        return {
            "files": [str(part.path) for part in capture.parts],
            "recorded_by": {"role": header.role, "site": header.site, "seats": [asdict(seat) for seat in header.seats],
                            "federation": header.federation, "agent": header.agent},
            "created": header.created,
            "run": header.run.hex() if header.run else None,
            "job": asdict(header.job) if header.job else None,
            "schema": header.schema.hex() if header.schema else None,
            "peers": [asdict(party) for party in header.peers],
            "defences": list(header.defences),
            "features": list(header.features),
            "sampling": asdict(header.sampling),
            "encryption": header.encryption,
            "extensions": header.extensions or {},
            "verdict": {**asdict(verdict), "last_chain": verdict.last_chain.hex()},
            **asdict(self),
        }  # fmt: skip


def summarise(capture: Capture) -> Summary:
    """Count.

    Raises:
        DataError: the file is not a capture's, or it is encrypted and the key is missing.
    """
    summary = Summary()
    flows: dict[tuple[str, str, str], Flow] = {}
    levels: dict[tuple[str, str, str, str, tuple[int, ...]], LevelSummary] = {}
    batches: dict[str, set[tuple[int, int]]] = {}
    patients, withdrawn = set[bytes](), set[bytes]()
    for record in capture.records():
        head = record.head
        flow = flows.setdefault(
            (record.peer, record.direction, record.name), Flow(record.peer, record.direction, record.name)
        )
        flow.messages += 1
        flow.octets += sum(d.nbytes for d in record.descriptors)
        if isinstance(step := getattr(head, "step", None), int):
            flow.first_step = step if flow.first_step is None else min(flow.first_step, step)
            flow.last_step = max(step, flow.last_step or 0)
        summary.first = record.time if summary.first is None else summary.first
        summary.last = record.time
        if isinstance(head, Forward):
            patients.update(sample.key for sample in head.samples)
        if isinstance(head, Withdraw | Withdrawn):
            withdrawn.update(patient.key for patient in head.patients)
        if isinstance(head, Activations | Gradients):
            _count_levels(levels, record)
        if isinstance(head, Activations):
            batches.setdefault(head.mode, set()).add((head.step, head.batch))
    order = {name: number for number, name in enumerate(dict.fromkeys(flow[2] for flow in flows))}
    summary.flows = sorted(flows.values(), key=lambda flow: (flow.peer, order[flow.kind]))
    summary.levels = list(levels.values())
    summary.steps, summary.releases = len(batches.get("train", ())), len(batches.get("release", ()))
    summary.evaluations = sum(map(len, batches.values())) - summary.steps - summary.releases
    summary.patients, summary.withdrawn = len(patients), len(withdrawn)
    return summary


def cut_off(capture: Capture) -> bool:
    """Whether the last file ends within a record, as after a crash; the records before are good."""
    return isinstance(capture.parts[-1].checked()[1], CaptureTruncated)


def _count_levels(
    levels: dict[tuple[str, str, str, str, tuple[int, ...]], LevelSummary], record: Recorded
) -> None:
    for d in record.descriptors:
        key = (record.peer, record.name, d.name, d.dtype, d.shape[1:])
        level = levels.setdefault(
            key, LevelSummary(record.peer, record.name, d.name, d.dtype, d.shape[1:], d.nbytes // d.shape[0])
        )
        level.samples += d.shape[0]
        level.octets += d.nbytes
