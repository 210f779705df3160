"""The terms of a job: what the coordinator's file asks, as it stands on the wire, and what a site's policy says."""

from __future__ import annotations

from splitpeer.config import JobConfig, PeerConfig
from splitpeer.data.volumes import Triple
from splitpeer.models import cut_shapes
from splitpeer.training.optimiser import OPTIMISERS, SCHEDULES
from splitproto.errors import PolicyRefused, SchemaMismatch
from splitproto.messages import Job, JobOffer
from splitproto.tensors import Descriptor, body_bytes, schema_digest

PRECISIONS = ("f32", "bf16")


def job_on_wire(config: JobConfig) -> Job:
    """What sites must know of `job.toml`."""
    training = config.training
    return Job(
        name=config.job.name,
        dimensions=config.model.dimensions,
        features=config.model.features,
        levels=config.model.levels,
        precision=training.precision,
        window=config.data.window,
        spacing=config.data.spacing or (),
        augment=config.data.augment,
        batch=training.batch,
        steps=training.steps,
        optimiser=training.optimiser,
        learning_rate=training.learning_rate,
        weight_decay=training.weight_decay,
        schedule=training.schedule,
        seconds_per_step=config.deadlines.step_s,
    )


def window_of(job: Job) -> Triple:
    """A sample's size in voxels (x, y, z); slices have depth 1."""
    return tuple((*job.window, 1)[:3])


def cut_descriptors(job: Job, batch: int | None = None) -> tuple[Descriptor, ...]:
    """The tensors that one site sends for a batch.

    Raises:
        ValueError: the job's network is impossible.
    """
    shapes = cut_shapes(job.dimensions, job.features, job.levels, batch or job.batch, job.window)
    return tuple(Descriptor(name, job.precision, shape) for name, shape in shapes.items())


def judge(offer: JobOffer, config: PeerConfig) -> None:
    """A site's decision, by its own policy alone; nothing that arrives later can change it.

    Raises:
        PolicyRefused: the job asks for more than the policy allows.
        SchemaMismatch: the two sides would not understand each other's tensors.
    """
    job, policy = offer.job, config.policy
    if policy is None:
        raise PolicyRefused("this site has no policy")
    if offer.modality != config.peer.modality:
        raise PolicyRefused(f"the job wants {offer.modality} from us, this site holds {config.peer.modality}")
    if beyond := sorted(set(job.levels) - set(policy.levels)):
        names = ", ".join(f"x{level}" for level in beyond)
        raise PolicyRefused(f"level {names} may not leave this site (policy levels: {list(policy.levels)})")
    if job.precision not in policy.precision:
        raise PolicyRefused(
            f"precision {job.precision} is not allowed here (policy: {', '.join(policy.precision)})"
        )
    if job.precision not in PRECISIONS or job.optimiser not in OPTIMISERS or job.schedule not in SCHEDULES:
        raise SchemaMismatch(
            f"precision {job.precision}, optimiser {job.optimiser} or schedule {job.schedule} is unknown here"
        )
    try:
        described = cut_descriptors(job)
    except ValueError as error:
        raise SchemaMismatch(str(error)) from None
    if (size := body_bytes(described)) > policy.max_message_bytes:
        raise PolicyRefused(
            f"a batch of gradients is {size >> 20} MiB, this site takes {policy.max_message_mib} (max_message_mib)"
        )
    if schema_digest(described) != offer.schema:
        raise SchemaMismatch("the cut layer that the job describes is not the one this site would send")
