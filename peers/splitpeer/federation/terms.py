"""The terms of a job: from the coordinator's file to the wire, and a site's policy check."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from splitpeer.data.geometry import Triple
from splitpeer.data.normalisation import DEFAULT, OF_A_SUM, Normaliser
from splitpeer.federation.masks import logits_octets, task_from_wire
from splitpeer.federation.seats import tensor_name
from splitpeer.models.cut import Backbone, level_name
from splitpeer.models.registry import backbone_of, cut_of, kept_values, on_wire, own_backbone, passing_values
from splitpeer.models.registry import encoder_parameters as parameters_of
from splitpeer.privacy.accounting import FARTHEST
from splitpeer.settings.bounds import Bounds
from splitpeer.settings.job import MAX_STEPS, JobConfig, Wire
from splitpeer.settings.peer import LEVELS, PeerConfig, Policy
from splitpeer.settings.values import AUTO
from splitpeer.training.forms import activations_form
from splitpeer.training.optimiser import OPTIMISERS, SCHEDULES
from splitproto import partners, records
from splitproto.codings import CODINGS, Coding, words
from splitproto.errors import IdentityError, PolicyRefused, SchemaMismatch
from splitproto.fusion import CHECK, CHECK_WORDS, dtype_of, greatest
from splitproto.fusion import check_terms as check_sum
from splitproto.identity import check_name
from splitproto.messages import JobOffer
from splitproto.negotiation import FEATURES
from splitproto.records import Job, Seat
from splitproto.tensors import Descriptor, schema_digest

PRECISIONS = ("f32", "bf16")
MAX_ENCODER_PARAMETERS = 200_000_000
"""About 2.4 GB with gradients and Adam's moments; a full-size 3-D BasicUNet encoder has 4 million."""

VOXEL_OCTETS = 60
"""Taken for a moment for each voxel of a volume that is resampled (measured)."""
PARAMETER_OCTETS = 16
"""Weight, gradient and two moments."""
MAPS = 3
"""Feature maps, their gradients, and what is sent."""
STEPS = 16
"""Least steps of a sum's integers in a site's own part of shared noise."""
READ_AHEAD = 4
"""Most batches read ahead; one more is being read, and one is computed."""


def normalisation_of(job: Job, modality: str) -> Normaliser:
    """SP-11.12-11: how images of a modality are normalised. Raises SchemaMismatch where the terms are in disorder."""
    named = {one.modality: one.rule for one in job.normalisation or ()}
    if len(named) < len(job.normalisation or ()):
        raise SchemaMismatch("the job names the normalisation of a modality twice")
    try:
        rules = {name: Normaliser.parse(rule) for name, rule in named.items()}
    except ValueError as error:
        raise SchemaMismatch(str(error)) from None
    return rules.get(modality, DEFAULT)


class Codings(NamedTuple):
    """Of a job's tensors in both directions; None: they travel as its precision says."""

    activations: Coding | None
    gradients: Coding | None


NOT_CODED = Codings(None, None)


def codings_of(wire: Wire, chosen: Codings = NOT_CODED) -> Codings:
    """Those that are written; `chosen` where it is left to the coordinator ("auto")."""
    return Codings(
        chosen.activations if wire.activations == AUTO else wire.activations,
        chosen.gradients if wire.gradients == AUTO else wire.gradients,
    )


def leads_to(wire: Wire, codings: Codings) -> bool:
    """Whether a run of `[wire]` may have these codings: "auto" chooses one for all levels, never a list."""
    return all(
        not isinstance(found, tuple) if written == AUTO else found == written
        for written, found in zip((wire.activations, wire.gradients), codings, strict=True)
    )


def job_on_wire(config: JobConfig, chosen: Codings = NOT_CODED) -> Job:
    """What sites must know of `job.toml`.

    Args:
        chosen: the codings that `[wire]` leaves to the coordinator ("auto").
    """
    codings = codings_of(config.wire, chosen)
    training, backbone = config.training, config.model.backbone()
    return Job(
        name=config.job.name,
        **on_wire(backbone),
        precision=training.precision,
        activations=codings.activations,
        gradients=codings.gradients,
        window=config.data.window,
        spacing=config.data.spacing or (),
        augment=config.data.augment and not training.frozen,
        batch=training.batch,
        steps=training.steps,
        optimiser=training.optimiser,
        learning_rate=training.learning_rate,
        weight_decay=training.weight_decay,
        schedule=training.schedule,
        seconds_per_step=config.deadlines.step_s,
        average_every=training.average_every or None,
        fusion=fusion_terms(config),
        encoders="frozen" if training.frozen else None,
        normalisation=tuple(
            records.Normalisation(modality, rule)
            for modality, rule in sorted(config.task.normalisation.items())
            if rule != str(DEFAULT)
        )
        or None,
    )


def fusion_terms(config: JobConfig) -> records.Fusion | None:
    """SP-11.18-1: what `[model] fusion = "secure-sum"` asks of the sites; None: the sites' values are not summed."""
    model = config.model
    if model.fusion != "secure-sum":
        return None
    return records.Fusion(model.sum_bits, model.sum_range, len(config.sites))


def services(*, frozen: bool) -> tuple[str, ...]:
    """SP-11.17-2: the features of a job with frozen encoders, or of any other."""
    others = ("train", "evaluate", "average", "label") if frozen else ("release",)
    return tuple(name for name in FEATURES if name not in others)


def run_folder(state: Path, job: str, run: bytes) -> Path:
    """Where a party keeps its half of one run; `job` has been checked to be a name.

    By the whole run id: the coordinator chooses it, and a run that borrowed another's folder would start from
    weights that the privacy ledger believes to depend on nobody.
    """
    return state / f"{job}-{run.hex()}"


def terms_digest(job: Job) -> str:
    """SHA-256 of a job's map on the wire, as sites of a secure sum sign it (SP-11.18-6), in hexadecimal."""
    return partners.terms_digest(job).hex()


def window_of(job: Job) -> Triple:
    """A sample's size in voxels (x, y, z); slices have depth 1."""
    x, y, z = (*job.window, 1)[:3]
    return x, y, z


def cut_descriptors(job: Job, batch: int | None = None) -> tuple[Descriptor, ...]:
    """The tensors that one encoder yields for a batch, as they travel (SP-11.8-1, SP-11.21-2).

    Raises:
        ValueError: the job's network is impossible.
    """
    form = activations_form(job)
    return tuple(form.described(name, batch or job.batch) for name in form.shapes)


def seat_descriptors(
    job: Job, seats: Sequence[Seat], rows: Mapping[str, int] | None = None
) -> tuple[Descriptor, ...]:
    """The tensors that a site which fills `seats` sends for a batch (SP-11.8-5).

    Args:
        rows: by seat, samples of the batch whose patients the site listed for it; a seat without any is left out.
            None: the job's batch at every seat, whose digest is the offer's schema.

    Raises:
        ValueError: the job's network is impossible.
    """
    counts = {seat.name: job.batch if rows is None else rows.get(seat.name, 0) for seat in seats}
    if job.fusion is not None:
        return _sum_descriptors(job, job.fusion, max(counts.values()))
    return tuple(
        replace(described, name=tensor_name(seat, described.name, seats))
        for seat, count in counts.items()
        if count
        for described in cut_descriptors(job, count)
    )


def _sum_descriptors(job: Job, terms: records.Fusion, samples: int) -> tuple[Descriptor, ...]:
    """SP-11.18-2: what a site sends where only a sum can be read, whatever its seats are."""
    dtype, shapes = dtype_of(terms), cut_of(job).shapes(samples, job.window)
    levels = [Descriptor(name, dtype, shape) for name, shape in shapes.items()]
    return (*levels, Descriptor(CHECK, dtype, (len(levels), CHECK_WORDS)))


def encoder_octets(job: Job, batch: int) -> int:
    """SP-11-28: octets of the feature maps (all levels, float32) that an encoder makes of a batch."""
    return cut_of(job).octets(batch, job.window)


def backbone_for(job: Job, config: PeerConfig) -> Backbone:
    """SP-11.8-4: the network whose encoder this site runs: its own, or the one that the job names.

    Raises:
        ValueError: it is unknown or impossible, or does not yield the job's cut.
    """
    own = config.model
    if own is None or own.network is None:
        return backbone_of(job)
    return own_backbone(own.network, own.given, job)


def encoder_parameters(backbone: Backbone, seats: Sequence[Seat]) -> int:
    """Parameters of an encoder for each of `seats`."""
    return sum(parameters_of(backbone, len(seat.modalities)) for seat in seats)


def checkpoint_octets(backbone: Backbone, seats: Sequence[Seat]) -> int:
    """Bytes of one checkpoint: weights and two moments of every encoder."""
    return 12 * encoder_parameters(backbone, seats)


def _fixed_octets(backbone: Backbone, seats: Sequence[Seat], voxels: int) -> int:
    """Memory that a job needs whatever its batches are: a volume of every channel, encoders and optimisers."""
    channels = sum(len(seat.modalities) for seat in seats)
    return VOXEL_OCTETS * voxels * channels + PARAMETER_OCTETS * encoder_parameters(backbone, seats)


def _batch_octets(
    job: Job, backbone: Backbone, seats: Sequence[Seat], rows: Mapping[str, int], *, train: bool
) -> int:
    """Memory of one batch while it is computed, and of the images of those that are read ahead.

    Args:
        rows: by seat, samples whose patients fill it.
        train: whether values are kept for `backward`.
    """
    inside = (kept_values if train else passing_values)(backbone, job.window)
    count = sum(rows.values())
    images = 4 * math.prod(job.window) * sum(len(one.modalities) * rows.get(one.name, 0) for one in seats)
    return MAPS * encoder_octets(job, 1) * count + 4 * inside * count + (READ_AHEAD + 2) * images


@dataclass(frozen=True)
class Room:
    """SP-11-28: what one batch of an accepted job may take at this site; an evaluation may ask for larger ones."""

    job: Job
    backbone: Backbone
    seats: tuple[Seat, ...]
    bounds: Bounds
    most_octets: int
    """Size of one batch's feature maps, float32."""
    voxels: int
    """Size of the site's largest volume on the job's grid."""

    @cached_property
    def _fixed_octets(self) -> int:
        # Cached: counting an encoder's weights may mean building it.
        return _fixed_octets(self.backbone, self.seats, self.voxels)

    def check(self, rows: Mapping[str, int], *, train: bool) -> None:
        """Raises PolicyRefused: a batch with so many rows at each seat is too large; the setting is named."""
        count = sum(rows.values())
        if encoder_octets(self.job, count) > self.most_octets:
            raise PolicyRefused(
                f"a batch of {count} samples is more than this site computes (max_message_mib)"
            )
        memory = self._fixed_octets + _batch_octets(self.job, self.backbone, self.seats, rows, train=train)
        if memory >> 20 > self.bounds.max_memory_mib:
            raise PolicyRefused(
                f"a batch of {count} samples needs {memory >> 20} MiB where this site allows "
                f"{self.bounds.max_memory_mib} (max_memory_mib)"
            )


def check_bounds(job: Job, backbone: Backbone, seats: Sequence[Seat], bounds: Bounds, voxels: int) -> None:
    """SP-11.15-7: what the terms cost this site, all its seats and channels together, before any of it is taken.

    Args:
        backbone: what this site runs.
        voxels: of its largest volume on the job's grid.

    Raises:
        PolicyRefused: more than the policy allows; the setting is named.
    """
    parameters, state = encoder_parameters(backbone, seats), 2 * checkpoint_octets(backbone, seats)
    rows = {seat.name: job.batch for seat in seats}
    memory = _fixed_octets(backbone, seats, voxels) + _batch_octets(
        job, backbone, seats, rows, train=not job.frozen
    )
    for name, asked, most in (
        ("max_voxels", voxels, bounds.max_voxels),
        ("max_parameters", parameters, bounds.max_parameters),
        ("max_memory_mib", memory >> 20, bounds.max_memory_mib),
        ("max_state_mib", state >> 20, bounds.max_state_mib),
    ):
        if asked > most:
            raise PolicyRefused(f"the job needs {asked} where this site allows {most} ({name})")


def _check_figures(job: Job, backbone: Backbone, seats: Sequence[Seat]) -> None:
    """SP-11-25, SP-11-26: figures that no optimiser, timer or folder name could use. Raises SchemaMismatch."""
    try:
        check_name("job", job.name)
    except IdentityError as error:
        raise SchemaMismatch(error.reason) from None
    fits = {
        "settings": encoder_parameters(backbone, seats) <= MAX_ENCODER_PARAMETERS,
        "learning_rate": 0 < job.learning_rate <= 100,
        "weight_decay": 0 <= job.weight_decay <= 100,
        "seconds_per_step": 1 <= job.seconds_per_step <= 86_400,
        "steps": job.steps <= MAX_STEPS,
        "spacing": len(job.spacing) in (0, 3) and all(0.01 <= mm <= 100 for mm in job.spacing),
    }
    if wrong := [name for name, right in fits.items() if not right]:
        raise SchemaMismatch(f"{', '.join(wrong)} of the job cannot be used here")


def _check_seats(seats: Sequence[Seat], config: PeerConfig) -> None:
    """SP-11.8-5: in order, each modality in one of them, and held here. Raises SchemaMismatch, PolicyRefused."""
    names = [seat.name.encode() for seat in seats]
    asked = [modality for seat in seats for modality in seat.modalities]
    if names != sorted(set(names)) or len(set(asked)) < len(asked):
        raise SchemaMismatch(
            "the seats that the job offers are in disorder, or two of them want one modality"
        )
    if not set(asked) <= set(config.peer.modalities):
        raise PolicyRefused(f"the job wants {', '.join(asked)} from us, this site holds {config.peer.held}")


def _check_averaging(job: Job, config: PeerConfig, policy: Policy) -> None:
    """SP-11.16-8. Raises PolicyRefused."""
    if job.average_every is None:
        return
    if not policy.share_encoder:
        raise PolicyRefused(
            "the job averages encoders, so the coordinator would have our weights; this site keeps them (share_encoder)"
        )
    if config.model is not None and config.model.network is not None:
        raise PolicyRefused("the job averages encoders, but this site runs its own ([model])")


def _check_fusion(job: Job, policy: Policy, agreed: Collection[str]) -> None:
    """SP-11.18-1. Raises PolicyRefused, SchemaMismatch."""
    terms = job.fusion
    if terms is None:
        if policy.fusion == "secure-sum":
            raise PolicyRefused(
                "the coordinator would read this site's own values; only a sum over sites may be read "
                "(policy fusion = secure-sum)"
            )
        return
    if "fuse" not in agreed:
        raise SchemaMismatch("the job wants a secure sum, but fuse was not agreed on this link")
    check_sum(terms)
    if job.precision != "f32" or job.average_every is not None:
        raise SchemaMismatch("a secure sum has gradients of f32, and encoders that are not averaged")
    others = terms.parties - 1
    if others < policy.min_partners:
        raise PolicyRefused(
            f"a secure sum with {others} other sites, where this site wants {policy.min_partners} (policy min_partners)"
        )
    if others > len(policy.partners):
        raise PolicyRefused(
            f"a secure sum with {others} other sites, of which this site knows {len(policy.partners)} (policy partners)"
        )


def _check_masks(offer: JobOffer, config: PeerConfig, policy: Policy, agreed: Collection[str]) -> None:
    """SP-11.20-1, SP-11.20-2. Raises PolicyRefused, SchemaMismatch."""
    job, masks = offer.job, offer.masks
    if masks is None:
        if not offer.seats:
            raise SchemaMismatch("the job asks for no images and no masks of this site")
        return
    if not policy.labels:
        raise PolicyRefused(
            "the job wants to train with this site's masks, and it keeps them (policy labels)"
        )
    if "label" not in agreed:
        raise SchemaMismatch("the job has its labels here, but label was not agreed on this link")
    if job.frozen or (job.fusion is not None and not offer.seats):
        raise SchemaMismatch("labels at a site are for a job that trains encoders, in whose sum the site is")
    task = task_from_wire(masks, config.data.convention)
    if (octets := logits_octets(job, task.channels)) > policy.max_message_bytes:
        raise PolicyRefused(
            f"the logits of a batch have {octets >> 20} MiB, {policy.max_message_mib} are allowed (max_message_mib)"
        )


def _check_shared_noise(job: Job, seats: int, policy: Policy) -> None:
    """Noise that others complete is worth what they add. Raises PolicyRefused."""
    for spec in policy.defences:
        sites = int(spec.values.get("shared", 1))
        if sites == 1:
            continue
        terms = job.fusion
        if terms is None or terms.parties < sites:
            found = f"of {terms.parties}" if terms else "no secure sum"
            raise PolicyRefused(
                f"{spec.brief} needs a secure sum of {sites} sites or more; the job has {found}"
            )
        if seats > 1:
            # Its seats add up: the record moves the sum twice as far, and the others' noise does not grow.
            raise PolicyRefused(f"{spec.brief} shares its noise, so this site can fill one seat, not {seats}")
        if spec is not policy.defences[-1]:
            raise PolicyRefused(
                f"{spec.brief} shares its noise: nothing may act on it afterwards, write it last"
            )
        clip = float(spec.values["clip"])
        sigma = clip * float(spec.values["noise"]) / math.sqrt(sites)
        least = clip + FARTHEST * sigma
        if terms.range < least:
            raise PolicyRefused(
                f"{spec.brief}: the sum's range of {terms.range:g} would clip noise, needed is {least:g} or more"
            )
        if terms.range / greatest(terms) > sigma / STEPS:
            raise PolicyRefused(
                f"{spec.brief}: the sum rounds to steps of {terms.range / greatest(terms):.3g}, of which this site's "
                f"noise of {sigma:.3g} needs {STEPS}: more bits, or a smaller range"
            )


def _check_encoders(job: Job, policy: Policy, agreed: Collection[str]) -> None:
    """SP-11.17-2. Raises PolicyRefused, SchemaMismatch."""
    if policy.encoders == "frozen" and not job.frozen:
        raise PolicyRefused(
            "the job trains the sites' encoders; this site keeps its own as it is (policy encoders = frozen)"
        )
    if policy.releases == "once" and not job.frozen:
        # SP-11.17-9: each step would be a view of the same windows under other weights.
        raise PolicyRefused(
            "the job asks for windows again in every epoch; this site releases each once (policy releases = once)"
        )
    kind = "frozen" if job.frozen else "joint"
    if strange := sorted(set(agreed).intersection(FEATURES).difference(services(frozen=job.frozen))):
        raise SchemaMismatch(f"{', '.join(strange)} was agreed on this link, and is not for {kind} encoders")
    if job.frozen and "release" not in agreed:
        raise SchemaMismatch("the job keeps encoders frozen, but release was not agreed on this link")
    if job.frozen and job.average_every is not None:
        raise SchemaMismatch("the job keeps encoders frozen and averages them: it cannot do both")


def _check_shared_size(job: Job, backbone: Backbone, seats: Sequence[Seat], policy: Policy) -> None:
    """The average of an encoder arrives in one message. Raises PolicyRefused."""
    octets = max((4 * encoder_parameters(backbone, (seat,)) for seat in seats), default=0)
    if job.average_every is not None and octets > policy.max_message_bytes:
        raise PolicyRefused(
            f"an averaged encoder has {-(-octets >> 20)} MiB, allowed are {policy.max_message_mib} (max_message_mib)"
        )


def _check_normalisation(offer: JobOffer, policy: Policy) -> None:
    """Check the rule of every channel; see `_check_noise`. Raises PolicyRefused, SchemaMismatch."""
    if offer.job.fusion is not None:
        # SP-11.18-1: with another rule a partner's image may be a constant, and the sum this site's own values.
        for one in offer.job.normalisation or ():
            if (rule := normalisation_of(offer.job, one.modality)).kind not in OF_A_SUM:
                accepted = " and ".join(OF_A_SUM)
                raise PolicyRefused(
                    f"normalisation {rule} of {one.modality}: in a secure sum only {accepted} are accepted"
                )
    for rule in [normalisation_of(offer.job, one) for seat in offer.seats for one in seat.modalities]:
        if rule.kind not in policy.normalisation:
            raise PolicyRefused(
                f"normalisation {rule} is not allowed here (policy normalisation: {', '.join(policy.normalisation)})"
            )
        _check_noise(rule, policy)


def _check_noise(rule: Normaliser, policy: Policy) -> None:
    """SP-11-2: voxel noise is a multiple of one deviation only of images whose deviation is one; and what was kept
    under one rule could be subtracted under another. Raises PolicyRefused."""
    if policy.image_defences and rule != DEFAULT:
        raise PolicyRefused(
            f"normalisation {rule} is not allowed with image_defences: their noise is measured against {DEFAULT}"
        )


def _check_strides(job: Job, policy: Policy) -> None:
    """SP-11-2: where a level's number is what limits resolution, level k is at least 2**k times coarser.

    Raises:
        PolicyRefused: a level that would be sent is finer than its number says.
    """
    limited = not set(LEVELS) <= set(policy.levels) or any(s.levels is not None for s in policy.defences)
    for level in job.levels if limited else ():
        stride = job.cut[level].stride
        if min(stride) < 2**level:
            raise PolicyRefused(
                f"level {level_name(level)} has stride {list(stride)}; a site that limits levels takes it "
                f"from {2**level} on every axis (policy levels, defences @levels)"
            )


def _check_levels(job: Job, policy: Policy) -> None:
    """Raises PolicyRefused."""
    if beyond := sorted(set(job.levels) - set(policy.levels)):
        names = ", ".join(level_name(level) for level in beyond)
        raise PolicyRefused(f"level {names} may not leave this site (policy levels: {list(policy.levels)})")


def _check_recorded(offer: JobOffer, policy: Policy) -> None:
    """SP-11-29: not to say is not to say no. Raises PolicyRefused."""
    if offer.recorded is not False and not policy.recorded_by_coordinator:
        says = "records what it receives" if offer.recorded else "does not say whether it records"
        raise PolicyRefused(
            f"the coordinator {says}; this site is not to be recorded (recorded_by_coordinator)"
        )


def _check_precision(job: Job, policy: Policy, agreed: Collection[str]) -> None:
    """Raises PolicyRefused, SchemaMismatch."""
    ways = (job.activations,) if job.frozen else (job.activations, job.gradients)
    for name in dict.fromkeys(name for way in ways for name in words(way) or (job.precision,)):
        if name not in policy.precision:
            raise PolicyRefused(
                f"precision {name} is not allowed here (policy: {', '.join(policy.precision)})"
            )
    if job.precision not in PRECISIONS or job.optimiser not in OPTIMISERS or job.schedule not in SCHEDULES:
        raise SchemaMismatch(
            f"precision {job.precision}, optimiser {job.optimiser} or schedule {job.schedule} is unknown here"
        )
    # SP-10-6.
    if f"dtype.{job.precision}" not in agreed:
        raise SchemaMismatch(f"precision {job.precision} was not agreed on this link")
    _check_codings(job, agreed)


def _check_codings(job: Job, agreed: Collection[str]) -> None:
    """SP-11.21-1, SP-11.21-8. Raises SchemaMismatch."""
    for feature in coding_features(job):
        if feature not in agreed:
            raise SchemaMismatch(f"the job codes tensors, but {feature} was not agreed on this link")
    for coding in (job.activations, job.gradients):
        if isinstance(coding, str) or coding is None:
            continue
        if len(coding) != len(job.levels):
            raise SchemaMismatch(
                f"the job lists {len(coding)} codings for the {len(job.levels)} levels that are sent"
            )
        if not {*coding} <= {job.precision, *CODINGS}:
            raise SchemaMismatch(f"the job lists another precision among its codings than {job.precision}")
    if (job.activations or job.gradients) and job.fusion is not None:
        raise SchemaMismatch("what travels of a secure sum is not coded")
    if job.gradients and job.frozen:
        raise SchemaMismatch("the job codes gradients, and with frozen encoders there are none")


def coding_features(job: Job) -> tuple[str, ...]:
    """SP-11.21-1, SP-11.21-8: features that a job's codings need."""
    ways = (job.activations, job.gradients)
    named = {name for way in ways for name in words(way)}
    listed = ("coding.levels",) if any(isinstance(way, tuple) for way in ways) else ()
    return (*(f"coding.{coding}" for coding in CODINGS if coding in named), *listed)


def _check_cut(offer: JobOffer, config: PeerConfig, policy: Policy) -> None:
    """The network, and what it sends. Raises PolicyRefused, SchemaMismatch."""
    job = offer.job
    try:
        described, backbone = seat_descriptors(job, offer.seats), backbone_for(job, config)
        encoder_parameters(backbone, offer.seats)
    except ValueError as error:
        raise SchemaMismatch(str(error)) from None
    _check_shared_size(job, backbone, offer.seats, policy)
    _check_strides(job, policy)
    _check_figures(job, backbone, offer.seats)
    if (size := len(offer.seats) * encoder_octets(job, job.batch)) > policy.max_message_bytes:
        raise PolicyRefused(
            f"a batch makes {size >> 20} MiB of feature maps, {policy.max_message_mib} are allowed (max_message_mib)"
        )
    if schema_digest(described) != offer.schema:
        raise SchemaMismatch("the cut that the job describes is not the one that this site would send")


def checks(
    offer: JobOffer, config: PeerConfig, agreed: Collection[str] | None = None
) -> Iterator[Callable[[], None]]:
    """What `judge` calls, one after the other; each raises PolicyRefused or SchemaMismatch."""
    job, policy = offer.job, config.policy
    if policy is None:
        raise PolicyRefused("this site has no policy")
    agreed = services(frozen=job.frozen) if agreed is None else agreed
    yield lambda: _check_seats(offer.seats, config)
    yield lambda: _check_masks(offer, config, policy, agreed)
    yield lambda: _check_levels(job, policy)
    yield lambda: _check_recorded(offer, policy)
    yield lambda: _check_encoders(job, policy, agreed)
    yield lambda: _check_averaging(job, config, policy)
    yield lambda: _check_fusion(job, policy, agreed)
    yield lambda: _check_shared_noise(job, len(offer.seats), policy)
    yield lambda: _check_precision(job, policy, agreed)
    yield lambda: _check_normalisation(offer, policy)
    yield lambda: _check_cut(offer, config, policy)


def judge(offer: JobOffer, config: PeerConfig, agreed: Collection[str] | None = None) -> None:
    """SP-11-2: a site's decision, by its own policy alone; nothing that arrives later can change it.

    Args:
        agreed: features of the link on which the job is offered; None: all that the job can use.

    Raises:
        PolicyRefused: the job asks for more than the policy allows.
        SchemaMismatch: the two sides would not understand each other's tensors.
    """
    for check in checks(offer, config, agreed):
        check()
