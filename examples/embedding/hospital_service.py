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
import secrets
import signal
import sys
from collections import deque
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from splitproto import AllowList, Credentials, LocalError, Session, SplitprotoError, dial
from splitproto.errors import (
    Misaligned,
    PolicyRefused,
    SchemaMismatch,
    SiteFailed,
    StepMismatch,
    UnexpectedMessage,
)
from splitproto.messages import (
    Activations,
    Applied,
    Begin,
    Bye,
    Checkpoint,
    Forward,
    Gradients,
    Inventory,
    Job,
    JobAccept,
    JobDecline,
    JobOffer,
    Patient,
    Progress,
    Rollback,
    RolledBack,
    Sample,
    Saved,
)
from splitproto.tensors import Descriptor, matches, schema_digest

log = logging.getLogger("hospital")
IDLE_S = 600.0


# --- patients and batches: two derivations of the specification ------------------------------------------------


def pseudonym(salt: bytes, patient: str) -> bytes:
    """The only name of a patient that leaves: 16 octets."""
    return hmac.new(salt, b"splitproto patient v1\0" + patient.encode(), hashlib.sha256).digest()[:16]


def batch_digest(step: int, samples: tuple[Sample, ...], seed: int | None) -> bytes:
    """What all sites must agree on before they compute: which windows, in which order."""
    parts = [b"splitproto batch v1", step.to_bytes(8, "big")]
    parts.append(b"\0" if seed is None else b"\1" + seed.to_bytes(8, "big"))
    parts.append(len(samples).to_bytes(4, "big"))
    for sample in samples:
        parts += [len(sample.key).to_bytes(1, "big"), sample.key]
        parts += [voxel.to_bytes(4, "big", signed=True) for voxel in sample.origin]
    return hashlib.sha256(b"".join(parts)).digest()


# --- images -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Volume:
    """One patient's image: float32 [x, y, z] in RAS order, normalised."""

    voxels: np.ndarray
    spacing: tuple[float, float, float] = (1.0, 1.0, 1.0)
    orientation: str = "RAS"
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
        volumes[path.name.removesuffix(".nii.gz")] = Volume(
            voxels,
            tuple(float(mm) for mm in ras.header.get_zooms()[:3]),
            "".join(nib.aff2axcodes(image.affine)),
            tuple(float(mm) for mm in ras.affine[:3, 3]),
        )
    return volumes


# --- the encoder ------------------------------------------------------------------------------------------------


class Encoder:
    """Level n: average pooling by 2**n, 3x3 filters, ReLU, one learned gain per channel."""

    def __init__(self, job: Job) -> None:
        self.job = job
        rng = np.random.default_rng(secrets.randbits(128))  # weights that nobody else can guess
        self.filters = {n: rng.standard_normal((job.features[n], 3, 3), np.float32) / 3 for n in job.levels}
        self.gains = {n: np.ones(job.features[n], np.float32) for n in job.levels}
        self._kept: dict[int, np.ndarray] = {}

    def forward(self, x: np.ndarray, keep: bool) -> dict[str, np.ndarray]:
        """[batch, h, w] to {"x0": [batch, channels, h, w], "x1": [batch, channels, h/2, w/2], ...}."""
        batch, h, w = x.shape
        out = {}
        for n in self.job.levels:
            pooled = x.reshape(batch, h >> n, 1 << n, w >> n, 1 << n).mean((2, 4))
            patches = np.lib.stride_tricks.sliding_window_view(
                np.pad(pooled, ((0, 0), (1, 1), (1, 1))), (3, 3), (1, 2)
            )
            maps = np.maximum(np.einsum("bhwij,cij->bchw", patches, self.filters[n], optimize=True), 0)
            if keep:
                self._kept[n] = maps
            out[f"x{n}"] = np.ascontiguousarray(maps * self.gains[n][:, None, None])
        return out

    def backward(self, gradients: dict[str, np.ndarray]) -> None:
        """One step of gradient descent."""
        for n, gain in self.gains.items():
            gain -= self.job.learning_rate * (gradients[f"x{n}"] * self._kept[n]).sum((0, 2, 3))

    def save(self, path: Path) -> bytes:
        """Write the state so that a crash leaves the old file or the new one; returns its SHA-256."""
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        with open(temporary, "wb") as file:
            np.savez(
                file,
                **{f"f{n}": f for n, f in self.filters.items()},
                **{f"g{n}": g for n, g in self.gains.items()},
            )
        temporary.replace(path)
        return hashlib.sha256(path.read_bytes()).digest()

    def load(self, path: Path) -> None:
        with np.load(path, allow_pickle=False) as saved:
            self.filters = {n: saved[f"f{n}"] for n in self.job.levels}
            self.gains = {n: saved[f"g{n}"] for n in self.job.levels}


# --- the service ------------------------------------------------------------------------------------------------


@dataclass
class Service:
    """One site. `levels` is its policy: the U-Net levels that may leave, whatever a job asks."""

    modality: str
    levels: frozenset[int]
    salt: bytes
    volumes: dict[str, Volume]
    state: Path

    def judge(self, offer: JobOffer) -> None:
        """The hospital's decision. Raises the reason for which the job is declined."""
        job = offer.job
        if offer.modality != self.modality:
            raise PolicyRefused(f"the job wants {offer.modality} from us, this site holds {self.modality}")
        if beyond := sorted(set(job.levels) - self.levels):
            raise PolicyRefused(f"levels {beyond} may not leave this site")
        if job.dimensions != 2 or job.precision != "f32" or job.augment or job.spacing:
            raise PolicyRefused("this site takes 2-D jobs in f32 without augmentation and resampling")
        self.cut = [
            Descriptor(f"x{n}", "f32", (job.batch, job.features[n], *(size >> n for size in job.window)))
            for n in job.levels
        ]
        if schema_digest(self.cut) != offer.schema:
            raise SchemaMismatch("the cut layer that the job describes is not the one this site would send")

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

    def encode(self, forward: Forward) -> Activations:
        x = np.stack([self.window(sample, self.encoder.job.window) for sample in forward.samples])
        maps = self.encoder.forward(x, keep=forward.mode == "train")
        return Activations(forward.mode, forward.step, forward.batch, forward.digest, maps)

    async def join(self, session: Session) -> None:
        """Hear the job, judge it, say what this site holds."""
        offer = await session.receive(IDLE_S, "a job")
        if not isinstance(offer, JobOffer):
            raise UnexpectedMessage(f"a {offer.name} where a job was due")
        try:
            self.judge(offer)
        except LocalError as error:
            await session.send(JobDecline(error.code, error.reason))
            await session.close("failed", error.reason)
            raise
        self.encoder = Encoder(offer.job)
        self.by_key = {pseudonym(self.salt, name): volume for name, volume in self.volumes.items()}
        self.folder = self.state / offer.run.hex()
        self.applied = 0
        self.encoder.save(self.folder / "0.npz")
        saved = sorted(int(path.stem) for path in self.folder.glob("*.npz"))
        await session.send(JobAccept(secrets.token_bytes(16), 0, tuple(saved), len(self.by_key)))
        patients = [
            Patient(key, v.voxels.shape, v.spacing, v.orientation, v.origin)
            for key, v in sorted(self.by_key.items())
        ]
        await session.send(Inventory(tuple(patients), last=True))  # pieces of at most 1024
        begin = await session.receive(IDLE_S, "the other sites")
        if not isinstance(begin, Begin):
            raise UnexpectedMessage(f"a {begin.name} where begin was due")
        log.info("job %s begins with %d patients", offer.job.name, begin.patients)

    async def work(self, session: Session) -> Bye:
        """Batches, gradients and checkpoints until the coordinator says bye."""
        announced: deque[Forward] = deque()
        while True:
            # A batch is announced ahead; it is due when our weights are those it is meant for.
            while announced and announced[0].step == self.applied + (announced[0].mode == "train"):
                forward = announced.popleft()
                # In a thread, so that heartbeats are answered during a long computation.
                await session.send(await asyncio.to_thread(self.encode, forward))
            message = await session.receive(IDLE_S, "work")
            match message:
                case Forward():
                    if batch_digest(message.step, message.samples, message.seed) != message.digest:
                        raise Misaligned(f"batch of step {message.step}: its samples do not give its digest")
                    announced.append(message)
                case Gradients():
                    if message.step != self.applied + 1:
                        raise StepMismatch(f"gradients of step {message.step} after step {self.applied}")
                    if not matches(self.cut, message.tensors):
                        raise SchemaMismatch(f"the gradients of step {message.step} are not of our cut layer")
                    await asyncio.to_thread(self.encoder.backward, message.tensors)
                    self.applied = message.step
                    await session.send(Applied(message.step))
                case Checkpoint():
                    digest = await asyncio.to_thread(self.encoder.save, self.folder / f"{message.step}.npz")
                    await session.send(Saved(message.step, digest))
                case Rollback():
                    announced.clear()
                    self.encoder.load(self.folder / f"{message.step}.npz")
                    self.applied = message.step
                    await session.send(RolledBack(message.step))
                case Progress():
                    log.info("step %d: %s", message.step, message.values)
                case Bye():
                    return message
                case _:
                    raise UnexpectedMessage(f"a {message.name} where work was due")

    async def serve(self, address: str, credentials: Credentials, coordinators: set[str]) -> None:
        """One job, from dialling to bye."""
        session = await dial(address, credentials, AllowList({"coordinator": coordinators}, "our policy"))
        log.info("connected to %s, %s", session.peer.uri, session.tls)
        try:
            await self.join(session)
            bye = await self.work(session)
            await session.close(bye.reason)
        except LocalError as error:
            session.fail(error)  # the coordinator learns the code and the reason
            raise
        except Exception:
            session.fail(SiteFailed("the site failed; its own log has the cause"))
            raise
        finally:
            await session.close("drain", "the site was asked to stop")  # nothing, if the link is over
        log.info("bye: %s after step %d", bye.reason, self.applied)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--coordinator", required=True, help="tcp://host:port")
    parser.add_argument("--site", required=True)
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

    async def run() -> None:
        credentials = Credentials(
            given.pki / "ca.crt", given.pki / f"{given.site}.crt", given.pki / f"{given.site}.key"
        )
        task = asyncio.current_task()
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, lambda: task and task.cancel())
        while True:
            try:
                return await service.serve(given.coordinator, credentials, {"hub"})
            except SplitprotoError as error:
                if not error.retry:
                    raise
                log.warning("%s; trying again", error)
                await asyncio.sleep(1)

    try:
        asyncio.run(run())
    except asyncio.CancelledError:
        log.info("asked to stop")
    except SplitprotoError as error:
        print(f"hospital: {error}", file=sys.stderr)
        return 1
    if heavy := {"torch", "splitpeer"} & set(sys.modules):
        raise RuntimeError(f"this service is meant to do without {heavy}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
