"""A hospital's own software takes part in split training: splitproto and numpy, no torch, no splitpeer.

The encoder here is a stand-in for the vendor's: 3x3 filters that stay as they are, and one gain per channel that
learns. Everything that touches the wire is what any embedding needs; README.md goes through it.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import hmac
import logging
import math
import os
import random
import secrets
import signal
import sys
import unicodedata
from collections import deque
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from splitproto import AllowList, Credentials, LocalError, Session, SplitprotoError, dial
from splitproto.errors import (
    IdentityError,
    Misaligned,
    PolicyRefused,
    SchemaMismatch,
    SiteFailed,
    StepMismatch,
    UnexpectedMessage,
)
from splitproto.identity import check_name
from splitproto.messages import (
    Activations,
    Advance,
    Advanced,
    Applied,
    Begin,
    Bye,
    Checkpoint,
    Forward,
    Gradients,
    Inventory,
    JobAccept,
    JobDecline,
    JobOffer,
    Progress,
    Rollback,
    RolledBack,
    Saved,
    Unsaved,
    Withdraw,
    Withdrawn,
)
from splitproto.records import Job, Level, Patient, Sample, Unusable
from splitproto.tensors import Descriptor, matches, schema_digest

log = logging.getLogger("hospital")
IDLE_S = 600.0
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 15.0
KEEP = 3
"""Checkpoints kept where the coordinator does not say which: the newest so many."""
LARGEST_BATCH = 256 << 20
"""Octets of activations, as float32, that this site computes for one batch."""


# --- patients and batches: two derivations of the specification ------------------------------------------------


def pseudonym(salt: bytes, patient: str) -> bytes:
    """The only name of a patient that leaves: 16 octets."""
    name = unicodedata.normalize("NFC", patient.strip("\t\n\v\f\r ")).encode()
    return hmac.new(salt, b"splitproto patient v1\0" + name, hashlib.sha256).digest()[:16]


def salt_check(salt: bytes) -> bytes:
    """8 octets that show a coordinator that this site has the same salt."""
    return hmac.new(salt, b"splitproto salt v1\0", hashlib.sha256).digest()[:8]


def batch_digest(
    step: int, samples: tuple[Sample, ...], seed: int | None, places: tuple[int, ...] | None = None
) -> bytes:
    """What all sites must agree on before they compute: which windows, in which order."""
    parts = [b"splitproto batch v1", step.to_bytes(8, "big")]
    parts.append(b"\0" if seed is None else b"\1" + seed.to_bytes(8, "big"))
    parts.append(len(samples).to_bytes(4, "big"))
    for sample in samples:
        parts += [len(sample.key).to_bytes(1, "big"), sample.key]
        parts += [voxel.to_bytes(4, "big", signed=True) for voxel in sample.origin]
    parts += [place.to_bytes(4, "big") for place in places or ()]
    return hashlib.sha256(b"".join(parts)).digest()


# --- images -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Volume:
    """One patient's image: float32 [x, y, z] in RAS order, normalised."""

    voxels: np.ndarray
    spacing: tuple[float, float, float] = (1.0, 1.0, 1.0)
    directions: tuple[float, ...] = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0)
    origin: tuple[float, float, float] = (0.0, 0.0, 0.0)


def invented(count: int = 6) -> dict[str, Volume]:
    """Images for trying this without any data."""
    rng = np.random.default_rng(0)
    return {f"patient-{n}": Volume(rng.standard_normal((48, 48, 8), np.float32)) for n in range(count)}


def from_nifti(folder: Path) -> dict[str, Volume]:
    """`<patient>.nii.gz` files, as a PACS export leaves them."""
    import nibabel as nib

    volumes = {}
    for path in sorted(folder.glob("*.nii.gz")):
        image = nib.load(path)
        ras = nib.as_closest_canonical(image)
        voxels = np.asarray(ras.dataobj, np.float32)
        brain = voxels[voxels != 0]
        voxels = np.where(voxels != 0, (voxels - brain.mean()) / brain.std(), 0).astype(np.float32)
        x, y, z = map(float, ras.header.get_zooms()[:3])
        right, anterior, superior = map(float, ras.affine[:3, 3])
        volumes[path.name.removesuffix(".nii.gz")] = Volume(
            voxels,
            (x, y, z),
            tuple(float(c) for c in (ras.affine[:3, :3] / (x, y, z)).T.ravel()),
            (right, anterior, superior),
        )
    return volumes


# --- the encoder ------------------------------------------------------------------------------------------------


class Encoder:
    """Each level: average pooling by its stride, 3x3 filters, ReLU, one learned gain per channel."""

    def __init__(self, job: Job) -> None:
        self.job = job
        rng = np.random.default_rng(secrets.randbits(128))  # weights that nobody else can guess
        self.filters = {
            n: rng.standard_normal((job.cut[n].channels, 3, 3), np.float32) / 3 for n in job.levels
        }
        self.gains = {n: np.ones(job.cut[n].channels, np.float32) for n in job.levels}
        self._kept: dict[int, np.ndarray] = {}

    def forward(self, x: np.ndarray, keep: bool) -> dict[str, np.ndarray]:
        """[batch, h, w] to {"x0": [batch, channels, h, w], "x1": [batch, channels, h/2, w/2], ...}."""
        batch, h, w = x.shape
        out = {}
        for n in self.job.levels:
            high, wide = self.job.cut[n].stride
            pooled = x.reshape(batch, h // high, high, w // wide, wide).mean((2, 4))
            patches = np.lib.stride_tricks.sliding_window_view(
                np.pad(pooled, ((0, 0), (1, 1), (1, 1))), (3, 3), (1, 2)
            )
            maps = np.maximum(np.einsum("bhwij,cij->bchw", patches, self.filters[n], optimize=True), 0)
            if keep:
                self._kept[n] = maps
            out[self.job.cut[n].name] = np.ascontiguousarray(maps * self.gains[n][:, None, None])
        return out

    def backward(self, gradients: Mapping[str, np.ndarray]) -> None:
        """One step of gradient descent."""
        for n, gain in self.gains.items():
            gain -= self.job.learning_rate * (gradients[self.job.cut[n].name] * self._kept[n]).sum((0, 2, 3))

    def save(self, path: Path) -> bytes:
        """Write the state so that a crash or a loss of power leaves it whole or not there; returns its SHA-256."""
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        try:
            with open(temporary, "wb") as file:
                arrays: dict[str, Any] = {f"f{n}": f for n, f in self.filters.items()}
                arrays |= {f"g{n}": g for n, g in self.gains.items()}
                np.savez(file, **arrays)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except OSError:
            temporary.unlink(missing_ok=True)  # half a file on a full disk helps nobody
            raise
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # a rename is on disk when its folder is
        finally:
            os.close(folder)
        return hashlib.sha256(path.read_bytes()).digest()

    def load(self, path: Path) -> None:
        with np.load(path, allow_pickle=False) as saved:
            self.filters = {n: saved[f"f{n}"] for n in self.job.levels}
            self.gains = {n: saved[f"g{n}"] for n in self.job.levels}


# --- what outlives a link ---------------------------------------------------------------------------------------


class Run:
    """One run of a job at this site. A link may be lost at any moment; the next one goes on with this."""

    def __init__(self, offer: JobOffer, state: Path) -> None:
        self.offer = offer
        self.encoder = Encoder(offer.job)
        self.incarnation = secrets.token_bytes(16)  # new with the encoder, so the coordinator sees a restart
        self.applied = 0
        self.pending: Activations | None = None  # sent, and waiting for gradients
        self.folder = state / offer.run.hex()
        if not self.saved():
            self.save(0)

    def path(self, step: int) -> Path:
        return self.folder / f"{step}.npz"

    def saved(self) -> list[int]:
        return sorted(int(path.stem) for path in self.folder.glob("*.npz"))

    def save(self, step: int, keep: Collection[int] | None = None) -> bytes:
        """Write a checkpoint; then, and only then, remove those that are not to be kept (SP-11-33)."""
        if step != self.applied:
            raise StepMismatch(f"asked to save step {step} after step {self.applied}")
        digest = self.encoder.save(self.path(step))
        kept = {step, *(self.saved()[-KEEP:] if keep is None else keep)}
        for old in self.saved():
            if old not in kept:
                self.path(old).unlink()
        return digest

    def advance(self, step: int) -> None:
        """The steps up to this one are made without us: count on, with the weights we have (SP-11-31)."""
        if not self.applied <= step <= self.offer.job.steps:
            raise StepMismatch(f"asked to advance to step {step} after step {self.applied}")
        self.applied, self.pending = step, None

    def rollback(self, step: int) -> None:
        self.encoder.load(self.path(step))
        self.applied, self.pending = step, None
        for later in self.saved():
            if later > step:
                self.path(later).unlink()

    def forward(self, forward: Forward, x: np.ndarray) -> Activations:
        """Encode a batch; one that was ordered again after a lost link has its answer already."""
        if self.pending and forward.mode == "train" and self.pending.digest == forward.digest:
            return self.pending
        maps = self.encoder.forward(x, keep=forward.mode == "train")
        sent = Activations(forward.mode, forward.step, forward.batch, forward.digest, maps)
        if forward.mode == "train":
            self.pending = sent
        return sent

    def apply(self, gradients: Gradients) -> None:
        if self.pending is None or gradients.step != self.applied + 1:
            raise StepMismatch(f"gradients of step {gradients.step} after step {self.applied}")
        if not matches(cut(self.offer.job), gradients.tensors):
            raise SchemaMismatch(f"the gradients of step {gradients.step} are not of our cut layer")
        self.encoder.backward(gradients.tensors)
        self.applied, self.pending = gradients.step, None


# --- the service ------------------------------------------------------------------------------------------------


def cut(job: Job) -> list[Descriptor]:
    """The tensors that one training batch sends."""
    return [Descriptor(job.cut[n].name, "f32", (job.batch, *shape(job, job.cut[n]))) for n in job.levels]


def shape(job: Job, level: Level) -> tuple[int, ...]:
    """The shape of one sample."""
    sizes = (size // step for size, step in zip(job.window, level.stride, strict=True))
    return (level.channels, *sizes)


def check_size(job: Job, samples: int) -> None:
    """A batch costs memory at all levels, also at those that stay here."""
    values = sum(math.prod(shape(job, level)) for level in job.cut)
    if 4 * samples * values > LARGEST_BATCH:
        raise PolicyRefused(f"a batch of {samples} samples is more than this site computes")


@dataclass
class Service:
    """One site. `levels` is its policy: the U-Net levels that may leave, whatever a job asks."""

    modality: str
    levels: frozenset[int]
    salt: bytes
    volumes: dict[str, Volume]
    state: Path
    run: Run | None = None
    joined: bool = False

    def __post_init__(self) -> None:
        self.by_key = {pseudonym(self.salt, name): volume for name, volume in self.volumes.items()}

    def judge(self, offer: JobOffer) -> None:
        """The hospital's decision. Raises the reason for which the job is declined."""
        job = offer.job
        wanted = [modality for seat in offer.seats for modality in seat.modalities]
        if wanted != [self.modality]:
            raise PolicyRefused(f"the job wants {', '.join(wanted)} from us, this site holds {self.modality}")
        if beyond := sorted(set(job.levels) - self.levels):
            raise PolicyRefused(f"levels {beyond} may not leave this site")
        if job.average_every is not None:
            raise PolicyRefused("the job averages encoders; this site's stays here")  # SP-11.16-8
        if job.frozen:
            raise SchemaMismatch("this site has no answer to a release")  # SP-11.17-2
        if job.dimensions != 2 or job.precision != "f32" or job.augment or job.spacing:
            raise PolicyRefused("this site takes 2-D jobs in f32 without augmentation and resampling")
        try:
            check_name("job", job.name)  # SP-11-25, and SP-11-26: what the rest of the software can rely on
        except IdentityError as error:
            raise SchemaMismatch(error.reason) from None
        if not (
            0 < job.learning_rate <= 100
            and 0 <= job.weight_decay <= 100
            and 1 <= job.seconds_per_step <= 86_400
            and job.steps <= 99_999_999
        ):
            raise SchemaMismatch("a learning rate, decay, deadline or number of steps that cannot be used")
        # SP-11.8-1: what index and division below rely on
        if max(job.levels) >= len(job.cut) or any(
            len(one.stride) != 2 or any(n % step for n, step in zip(job.window, one.stride, strict=False))
            for one in job.cut
        ):
            raise SchemaMismatch("a cut that no encoder could yield")
        check_size(job, job.batch)
        if schema_digest(cut(job)) != offer.schema:
            raise SchemaMismatch("the cut that the job describes is not the one that this site would send")

    def window(self, sample: Sample, size: tuple[int, ...]) -> np.ndarray:
        """[h, w] from `origin` on; zero outside the volume."""
        volume = self.by_key[sample.key].voxels
        x, y, z = sample.origin
        out = np.zeros(size, np.float32)
        inside = [(max(o, 0), min(o + s, n)) for o, s, n in zip((x, y), size, volume.shape, strict=False)]
        if 0 <= z < volume.shape[2] and all(low < high for low, high in inside):
            (x0, x1), (y0, y1) = inside
            out[x0 - x : x1 - x, y0 - y : y1 - y] = volume[x0:x1, y0:y1, z]
        return out

    def check(self, forward: Forward, job: Job) -> None:
        """Before anything is computed for a batch (SP-11-5, SP-11-27, SP-11-28)."""
        if batch_digest(forward.step, forward.samples, forward.seed, forward.places) != forward.digest:
            raise Misaligned(f"batch of step {forward.step}: its samples do not give its digest")
        if forward.mode == "train" and len(forward.samples) > job.batch:
            raise SchemaMismatch(f"a batch of {len(forward.samples)} samples, the job says {job.batch}")
        if (places := forward.places) is not None and (
            len(places) != len(forward.samples)
            or list(places) != sorted(set(places))
            or (forward.mode == "train" and places[-1] >= job.batch)
        ):
            raise SchemaMismatch(
                f"{len(forward.samples)} samples whose places in the batch are {list(places)}"
            )
        check_size(job, len(forward.samples))

    def trouble(self, key: bytes) -> str:
        """Why a patient's image cannot be used; empty if it can. Software that reads files finds more causes here."""
        voxels = self.by_key[key].voxels
        if not np.isfinite(voxels).all():
            return "not-finite"
        return "" if voxels.any() else "empty"

    def encode(self, run: Run, forward: Forward) -> Activations | Withdraw:
        """Activations; or patients whose images cannot be used: the run continues without them (SP-11.13-1)."""
        keys = dict.fromkeys(sample.key for sample in forward.samples)
        bad = tuple(Unusable(key, cause) for key in keys if (cause := self.trouble(key)))
        if bad:
            return Withdraw(forward.mode, forward.step, forward.batch, forward.digest, bad)
        x = np.stack([self.window(sample, run.offer.job.window) for sample in forward.samples])
        return run.forward(forward, x)

    async def join(self, session: Session) -> Run | Bye:
        """Hear the job, judge it, say what this site holds; or bye, if there is no job any more."""
        offer = await session.receive(IDLE_S, "a job")
        if isinstance(offer, Bye):
            return offer
        if not isinstance(offer, JobOffer):
            raise UnexpectedMessage(f"a {offer.name} where a job was due")
        try:
            self.judge(offer)
        except LocalError as error:
            await session.send(JobDecline(error.code, error.reason))
            await session.close("failed", error.reason)
            raise
        if self.run is None or self.run.offer != offer:
            self.run = Run(offer, self.state)
        run = self.run
        await session.send(JobAccept(run.incarnation, run.applied, tuple(run.saved()), len(self.by_key)))
        patients = [
            Patient(key, v.voxels.shape, v.spacing, v.directions, v.origin, v.spacing)
            for key, v in sorted(self.by_key.items())
        ]
        await session.send(Inventory(tuple(patients), True, salt_check(self.salt)))  # pieces of at most 1024
        self.joined = True
        return run

    async def work(self, session: Session, run: Run) -> Bye:
        """Batches, gradients and checkpoints until one side says bye."""
        announced: deque[Forward] = deque()
        withdrew = False  # until we hear where to go on, no batch counts
        while True:
            if session.rotation_due and not run.pending:
                return Bye("rotate", session.rotation_cause)
            # A batch is announced ahead; it is due when our weights are those it is meant for (SP-11-6).
            while announced and announced[0].step <= run.applied + (announced[0].mode == "train"):
                forward = announced.popleft()
                if forward.step < run.applied + (forward.mode == "train"):
                    raise StepMismatch(
                        f"asked for step {forward.step} ({forward.mode}) after step {run.applied}"
                    )
                # In a thread, so that heartbeats are answered during a long computation.
                answer = await asyncio.to_thread(self.encode, run, forward)
                await session.send(answer)
                if isinstance(answer, Withdraw):
                    log.warning("step %d: %d patients withdrawn", answer.step, len(answer.patients))
                    announced.clear()
                    withdrew = True
            message = await session.receive(IDLE_S, "work")
            match message:
                case Begin():
                    log.info("job %s begins with %d patients", run.offer.job.name, message.patients)
                case Forward():
                    self.check(message, run.offer.job)
                    if not withdrew:
                        announced.append(message)
                case Gradients():
                    await asyncio.to_thread(run.apply, message)
                    await session.send(Applied(message.step))
                case Checkpoint():
                    await session.send(await self.save(run, message))
                case Advance():
                    announced.clear()
                    withdrew = False
                    run.advance(message.step)
                    await session.send(Advanced(message.step))
                case Rollback():
                    announced.clear()
                    withdrew = False
                    await asyncio.to_thread(run.rollback, message.step)
                    await session.send(RolledBack(message.step))
                case Withdrawn():
                    log.warning(
                        "%d patients are withdrawn from step %d on", len(message.patients), message.step
                    )
                case Progress():
                    log.info("step %d: %s", message.step, message.values)
                case Bye():
                    return message
                case _:
                    raise UnexpectedMessage(f"a {message.name} where work was due")

    async def save(self, run: Run, asked: Checkpoint) -> Saved | Unsaved:
        """Write a checkpoint. After a failure, such as a full disk, the earlier ones stand and training continues."""
        try:
            return Saved(asked.step, await asyncio.to_thread(run.save, asked.step, asked.keep))
        except OSError as error:
            log.warning("checkpoint of step %d not written: %s", asked.step, error)
            return Unsaved(asked.step, error.strerror or "not written")

    async def link(self, address: str, credentials: Credentials, coordinator: str) -> Bye:
        """One link, from dialling to bye."""
        self.joined = False
        session = await dial(address, credentials, AllowList({"coordinator": {coordinator}}, "our policy"))
        log.info("connected to %s, %s", session.peer.uri, session.tls)
        try:
            joined = await self.join(session)
            bye = joined if isinstance(joined, Bye) else await self.work(session, joined)
            await session.close(bye.reason)
            bye = session.farewell or bye  # SP-11-20: the coordinator's may have crossed ours
        except LocalError as error:
            session.fail(error)  # the coordinator learns the code and the reason
            raise
        except Exception:
            session.fail(SiteFailed("the site failed; its own log has the cause"))
            raise
        finally:
            await session.close("drain", "the site was asked to stop")  # nothing, if the link is over
        log.info("bye: %s after step %d", bye.reason, self.run.applied if self.run else 0)
        return bye

    async def serve(
        self, address: str, credentials: Credentials, coordinator: str, patience: float = 600.0
    ) -> Bye:
        """The whole job over as many links as it takes; returns the last bye, `complete` or `failed`.

        Raises:
            SplitprotoError: what dialling again does not mend, or did not within `patience` seconds.
        """
        clock = asyncio.get_running_loop().time
        pause, deadline = FIRST_PAUSE_S, clock() + patience
        while True:
            try:
                bye = await self.link(address, credentials, coordinator)
                if bye.reason in ("complete", "failed"):
                    return bye
            except SplitprotoError as error:
                if not error.retry or (clock() + pause > deadline and not self.joined):
                    raise
                log.warning("%s; trying again", error)
            if self.joined:  # that link was a good one: the patience starts again
                pause, deadline = FIRST_PAUSE_S, clock() + patience
            # Random in part: not all sites at the same moment.
            await asyncio.sleep(pause * random.uniform(0.5, 1.0))
            pause = min(2 * pause, LONGEST_PAUSE_S)


def main() -> int:
    """Read the command line and serve; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--coordinator", required=True, help="tcp://host:port")
    parser.add_argument("--site", required=True)
    parser.add_argument("--coordinator-site", default="hub", help="the one coordinator that may answer")
    parser.add_argument("--patience", type=float, default=600.0, help="seconds without a link, then give up")
    parser.add_argument("--modality", default="flair")
    parser.add_argument(
        "--pki", type=Path, default=Path("pki"), help="ca.crt, <site>.crt, <site>.key, federation.salt"
    )
    parser.add_argument("--images", type=Path, help="folder of <patient>.nii.gz; default: invented images")
    parser.add_argument("--levels", type=int, nargs="+", default=[0, 1, 2, 3, 4], help="what may leave")
    parser.add_argument("--state", type=Path, default=Path("state"))
    given = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    service = Service(
        given.modality,
        frozenset(given.levels),
        bytes.fromhex((given.pki / "federation.salt").read_text()),
        from_nifti(given.images) if given.images else invented(),
        given.state,
    )

    async def run() -> Bye:
        credentials = Credentials(
            given.pki / "ca.crt", given.pki / f"{given.site}.crt", given.pki / f"{given.site}.key"
        )
        task = asyncio.current_task()
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, lambda: task and task.cancel())
        return await service.serve(given.coordinator, credentials, given.coordinator_site, given.patience)

    try:
        bye = asyncio.run(run())
    except asyncio.CancelledError:
        log.info("asked to stop")
    except SplitprotoError as error:
        print(f"hospital: {error}", file=sys.stderr)
        return 1
    else:
        if bye.reason == "failed":
            print(f"hospital: the coordinator ended the job: {bye.text}", file=sys.stderr)
            return 1
    if heavy := {"torch", "splitpeer"} & set(sys.modules):
        raise RuntimeError(f"this service is meant to do without {heavy}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
