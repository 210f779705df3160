"""What a party's half of a job's network is made of: decoder, encoders, defences; alike in a run and in a rehearsal."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from splitpeer.data.task import Task
from splitpeer.defences.image.stack import ImageStack, make_image_stack
from splitpeer.defences.key import for_peer, key_of
from splitpeer.defences.network import build_network
from splitpeer.defences.specs import Written
from splitpeer.defences.stack import Stack, make_stack
from splitpeer.errors import JobFailed
from splitpeer.federation.seats import Seats, by_seat, joined
from splitpeer.models import build_decoder, site_seed
from splitpeer.models.cut import Backbone
from splitpeer.models.registry import backbone_of, cut_of
from splitpeer.settings.job import COORDINATOR, JobConfig
from splitpeer.training.forms import activations_form, gradients_form
from splitpeer.training.guard import Guard
from splitpeer.training.optimiser import make_optimiser, make_schedule
from splitpeer.training.split_round import THE_SUM, Place
from splitpeer.training.split_step import Arrays, ClientHalf, CoordinatorHalf
from splitpeer.training.sums import SUM
from splitproto.errors import TensorError
from splitproto.records import Job, Seat
from splitproto.tensors import Array

# --- the coordinator's ---------------------------------------------------------------------------------------


def coordinator_half(
    settings: JobConfig,
    job: Job,
    seats: Sequence[str],
    task: Task,
    device: str,
    kind: Callable[..., CoordinatorHalf] = CoordinatorHalf,
) -> CoordinatorHalf:
    """Fusion and decoder, and what trains them.

    Args:
        kind: of the half; one of several ranks has its own.
    """
    decoder = build_decoder(
        backbone_of(job),
        seats if job.fusion is None else (SUM,),
        settings.model.decoder_fusion,
        task.channels,
        exclusive=task.exclusive,
        seed=site_seed(settings.job.seed, COORDINATOR),
    )
    optimiser = make_optimiser(decoder.parameters(), job.optimiser, job.learning_rate, job.weight_decay)
    schedule = make_schedule(optimiser, job.schedule, job.steps)
    return kind(decoder, optimiser, schedule, device, exclusive=task.exclusive)


def gradient_stacks(written: Written, job: Job, seats: Seats, key: bytes) -> dict[Place, Stack]:
    """What is done to the gradients that each site is sent for each seat, with a key of its own; none where nothing is
    written.

    Args:
        key: the coordinator's.

    Raises:
        ConfigError: see `make_stack`.
    """
    if not written:
        return {}
    channels = {name: shape[1] for name, shape in cut_of(job).shapes(job.batch, job.window).items()}
    receivers = {
        Place(site, seat): seats.receiver(site, seat)
        for site, filled in seats.filled.items()
        for seat in filled
    }
    if job.fusion is not None:
        receivers = {THE_SUM: SUM}  # SP-11.18-2: "the same octets for all sites"
    return {
        place: make_stack(
            written,
            key=for_peer(key, receiver),
            channels=channels,
            dimensions=job.dimensions,
            place="gradients",
        )
        for place, receiver in receivers.items()
    }


# --- a site's ------------------------------------------------------------------------------------------------


def client_half(
    job: Job,
    backbone: Backbone,
    seat: Seat,
    defences: Written,
    *,
    key: bytes,
    seed: int | None,
    device: str,
    guard: Guard | None = None,
) -> ClientHalf:
    """One seat's encoder with its defences, and what trains it.

    Args:
        key: of the defences at this seat.
        seed: of the site; None: weights that nobody else can compute.
    """
    encoder = build_network(
        backbone,
        defences,
        key=key,
        seed=None if seed is None else site_seed(seed, seat.name),
        strict=False,
        in_channels=len(seat.modalities),
    )
    optimiser = make_optimiser(encoder.parameters(), job.optimiser, job.learning_rate, job.weight_decay)
    schedule = make_schedule(optimiser, job.schedule, job.steps)
    return ClientHalf(encoder, optimiser, schedule, device, guard)


def image_stacks(written: Written, key: bytes, held: Sequence[str]) -> dict[str, ImageStack]:
    """Image defences by modality, each with noise of its own.

    Args:
        key: the site's.
        held: its modalities, in the order of its settings.
    """
    return {modality: make_image_stack(written, key_of(key, (modality,), held)) for modality in held}


def announced(images: Mapping[str, ImageStack], activations: Sequence[str]) -> tuple[str, ...]:
    """Defences of images and activations as a site announces them."""
    of_images = next((stack.specs for stack in images.values()), ())
    return (*of_images, *activations)


# --- what passes between them --------------------------------------------------------------------------------


def at_places(
    site: str, seats: Sequence[Seat], tensors: Mapping[str, Array], job: Job
) -> dict[Place, Arrays]:
    """A site's activations as they are read (SP-11.21-6), float32, by seat. Raises what `WireForm.from_wire` raises."""
    form = activations_form(job)
    return {Place(site, seat): form.from_wire(levels) for seat, levels in by_seat(tensors, seats).items()}


def for_site(
    site: str, seats: Sequence[Seat], gradients: Mapping[Place, Arrays], job: Job
) -> dict[str, Array]:
    """A site's own of all gradients, as they travel, or those of the sum; empty: it does not take part.

    Raises:
        JobFailed: NaN or infinity in gradients to be coded.
    """
    form = gradients_form(job)
    try:
        if THE_SUM in gradients:
            return form.to_wire(gradients[THE_SUM])
        own = {place.seat: form.to_wire(arrays) for place, arrays in gradients.items() if place.site == site}
    except TensorError:
        # SP-11.21-2: no coding has a form for it; uncoded, the site would find it (SP-11-10).
        raise JobFailed(
            f"the gradients for site {site} hold NaN or infinity: lower [training] learning_rate, or change the "
            "defence of gradients"
        ) from None
    return joined(own, seats)
