"""A coordinator small enough to read: one site, three steps, numpy. The loss pulls every activation towards 0.5."""

from __future__ import annotations

import argparse
import asyncio
import secrets
import sys
from pathlib import Path

import numpy as np
from hospital_service import batch_digest

from splitproto import AllowList, Credentials, Listener, LocalError, Session, SplitprotoError
from splitproto.errors import Misaligned, PolicyRefused, SchemaMismatch, UnexpectedMessage
from splitproto.messages import (
    Activations,
    Applied,
    Begin,
    Forward,
    Gradients,
    Inventory,
    JobAccept,
    JobDecline,
    JobOffer,
)
from splitproto.records import Job, Level, Sample, Seat
from splitproto.tensors import Descriptor, matches, schema_digest

WAIT_S = 60.0
JOB = Job(
    name="embedding",
    dimensions=2,
    network="example",  # the sites' own affair: they run what they like that yields this cut
    settings=(),
    cut=tuple(Level(f"x{n}", channels, (2**n, 2**n)) for n, channels in enumerate((8, 8, 16, 32, 64))),
    levels=(1, 2, 3, 4),
    precision="f32",
    window=(48, 48),
    spacing=(),
    augment=False,
    batch=4,
    steps=3,
    optimiser="sgd",
    learning_rate=0.5,
    weight_decay=0.0,
    schedule="constant",
    seconds_per_step=WAIT_S,
)
CUT = [
    Descriptor(one.name, JOB.precision, (JOB.batch, one.channels, *(48 // step for step in one.stride)))
    for one in (JOB.cut[n] for n in JOB.levels)
]


async def lead(session: Session, modality: str) -> None:
    """Offer the job and train with one site until its last step. Raises SplitprotoError."""
    await session.send(
        JobOffer(secrets.token_bytes(16), (Seat(modality, (modality,)),), JOB, schema_digest(CUT))
    )
    answer = await session.receive(WAIT_S, "the answer to the job")
    if isinstance(answer, JobDecline):
        await session.close("failed", "the job was declined")
        raise PolicyRefused(f"{session.peer.site} declined: {answer.reason}")
    if not isinstance(answer, JobAccept):
        raise UnexpectedMessage(f"a {answer.name} where job-accept was due")
    inventory = await session.receive(WAIT_S, "the list of patients")
    if not isinstance(inventory, Inventory):
        raise UnexpectedMessage(f"a {inventory.name} where inventory was due")
    await session.send(Begin(0, len(inventory.patients)))
    for step in range(1, JOB.steps + 1):
        chosen = [inventory.patients[(step + n) % len(inventory.patients)] for n in range(JOB.batch)]
        samples = tuple(Sample(patient.key, (0, 0, patient.shape[2] // 2)) for patient in chosen)
        digest = batch_digest(step, samples, None)
        await session.send(Forward("train", step, 0, samples, digest))
        activations = await session.receive(WAIT_S, "activations")
        if not isinstance(activations, Activations):
            raise UnexpectedMessage(f"a {activations.name} where activations were due")
        if activations.digest != digest:
            raise Misaligned(f"{session.peer.site} used other samples")
        if not matches(CUT, activations.tensors):
            raise SchemaMismatch(f"{session.peer.site} sent other tensors than the job describes")
        loss = sum(0.5 * float(np.mean((a - 0.5) ** 2)) for a in activations.tensors.values())
        gradients = {name: (a - 0.5) / np.float32(a.size) for name, a in activations.tensors.items()}
        await session.send(Gradients(step, gradients))
        applied = await session.receive(WAIT_S, "the step to be applied")
        if not isinstance(applied, Applied):
            raise UnexpectedMessage(f"a {applied.name} where applied was due")
        print(f"step {step}: loss {loss:.4f}")
    await session.close("complete", "three steps are done")


async def main() -> int:
    """Listen, take one site through the job, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--listen", default="tcp://127.0.0.1:7443")
    parser.add_argument("--pki", type=Path, default=Path("pki"))
    parser.add_argument("--site", default="north", help="the one client that may come")
    parser.add_argument("--modality", default="flair")
    given = parser.parse_args()
    credentials = Credentials(given.pki / "ca.crt", given.pki / "hub.crt", given.pki / "hub.key")
    try:
        async with Listener(
            given.listen, credentials, AllowList({"client": {given.site}}, "--site")
        ) as listener:
            print(f"listening at {listener.address}", flush=True)
            session = await listener.accept(WAIT_S)
            print(f"{session.peer.uri} is here, {session.tls}", flush=True)
            try:
                await lead(session, given.modality)
            except LocalError as error:
                session.fail(error)  # the site learns the code and the reason
                raise
    except SplitprotoError as error:
        print(f"coordinator: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
