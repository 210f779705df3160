"""What a coordinator is made of, from its `peer.toml` and its `job.toml`: masks, half, defences, sites."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial

from splitpeer.coordinator.inference.segmenting import PatientSegmenter
from splitpeer.coordinator.inference.service import Service
from splitpeer.coordinator.labels import LabelsAtSite, OwnLabels, RunLabels
from splitpeer.coordinator.relay import Relay
from splitpeer.coordinator.remote_site import RemoteSite
from splitpeer.coordinator.run import Run
from splitpeer.coordinator.run_files import RunFiles
from splitpeer.daemon import happenings as h
from splitpeer.daemon.witness import Witness
from splitpeer.data.findings import naming_warnings
from splitpeer.data.geometry import spacing_of
from splitpeer.data.layouts import find
from splitpeer.data.mask_values import MaskCensus
from splitpeer.data.pseudonym import load_salt, salt_check
from splitpeer.data.volumes import Volumes
from splitpeer.defences.stack import Stack
from splitpeer.errors import ConfigError
from splitpeer.federation.compute import defence_key, pick_device
from splitpeer.federation.files import look
from splitpeer.federation.halves import coordinator_half, gradient_stacks
from splitpeer.federation.masks import convention_of, logits_octets, masks_on_wire, task_of
from splitpeer.federation.seats import Seats
from splitpeer.federation.terms import seat_descriptors
from splitpeer.ranks.group import Ranks, device_of
from splitpeer.ranks.halves import FollowingHalf, LeadingHalf
from splitpeer.settings.job import JobConfig
from splitpeer.settings.peer import PeerConfig
from splitpeer.training.split_round import Place
from splitpeer.training.split_step import CoordinatorHalf
from splitproto.messages import JobOffer
from splitproto.partners import Trust
from splitproto.records import Job
from splitproto.tensors import body_bytes, schema_digest


@dataclass(frozen=True)
class MaskFiles:
    """The coordinator's own data."""

    volumes: Volumes
    unusable: dict[bytes, str]
    """Patients whose masks cannot be used, and why."""
    findings: list[str]
    """What wants a second look. May name files."""


def open_masks(config: PeerConfig, job: JobConfig, report: h.Reporter, *, verify: bool) -> MaskFiles | None:
    """Find the masks and look at each. None: they are at a site.

    Args:
        report: told of those that cannot be used.
        verify: read every one to its end, not only its header.

    Raises:
        ConfigError, DataError: they cannot be used.
    """
    if job.labels.at is not None:
        return None
    if config.data.labels is None or config.data.salt is None:
        raise ConfigError(
            f"{config.source}: a coordinator needs [data] labels: name the folder of masks, or write [labels] at in "
            "job.toml where a site holds them"
        )
    found = find(config.data.labels, config.data.layout, None)
    findings = naming_warnings(config.data.labels, [found])
    task = job.task.task(config.data.convention)
    census = MaskCensus(task) if verify else None
    volumes = Volumes(
        found.cases,
        salt=load_salt(config.data.salt),
        spacing=spacing_of(job.data.spacing),
        labels=task,
        cache_mib=config.data.cache_mib,
        census=census,
        rules=config.data.rules(),
    )
    unusable: dict[bytes, str] = {}
    look(volumes, unusable, report, voxels=verify)
    return MaskFiles(volumes, unusable, [*findings, *(census.warnings() if census is not None else [])])


def labels_of(masks: MaskFiles | None, sites: Sequence[RemoteSite]) -> RunLabels:
    """Of whom a run has masks; `masks` are the coordinator's own, if it has any."""
    if masks is not None:
        return OwnLabels(masks.volumes, masks.unusable)
    return LabelsAtSite(next(site for site in sites if site.holds_masks))


def salt_check_of(config: PeerConfig) -> bytes:
    """Of the salt with which patients' keys are made. Raises ConfigError, DataError."""
    if config.data.salt is None:
        raise ConfigError(f"{config.source}: a coordinator needs [data] salt")
    return salt_check(load_salt(config.data.salt))


def make_half(
    config: PeerConfig, settings: JobConfig, job: Job, seats: Seats, group: Ranks | None = None
) -> CoordinatorHalf:
    """Fusion and decoder, and what trains them.

    Args:
        group: of which this process is a rank; None: it is alone.
    """
    at_site = settings.labels.at is not None
    task = task_of(settings.task) if at_site else settings.task.task(config.data.convention)
    if group is None:
        return coordinator_half(settings, job, seats.names, task, pick_device(config.runtime.device))
    kind = partial(LeadingHalf if group.rank.leads else FollowingHalf, group)
    return coordinator_half(
        settings, job, seats.names, task, device_of(group.rank, config.runtime.device), kind
    )


def make_service(
    config: PeerConfig,
    settings: JobConfig,
    run: Run,
    make: Callable[..., PatientSegmenter] | None = None,
) -> Service | None:
    """Inference, where the job has it; `make`: see `Service`."""
    if settings.inference is None:
        return None
    task = settings.task.task(convention_of(settings.task, config.data.convention))
    return Service(run, settings.inference, task, make)


def make_gradient_stacks(
    config: PeerConfig, settings: JobConfig, job: Job, seats: Seats
) -> dict[Place, Stack]:
    """For each site at each seat, with a key of its own; none where the job names no defences.

    Raises:
        ConfigError: a defence of a level that the job does not send; or see `defence_key`.
    """
    written = settings.defences.gradients
    if not written:
        return {}
    key = defence_key(config)
    try:
        return gradient_stacks(written, job, seats, key)
    except ConfigError as error:
        raise ConfigError(f"{settings.source}: [defences] gradients: {error}") from None


def make_sites(
    config: PeerConfig,
    settings: JobConfig,
    job: Job,
    seats: Seats,
    files: RunFiles,
    witness: Witness,
    report: h.Reporter,
    bind: Callable[[str, bytes], None],
    *,
    salt_check: bytes,
    defences: tuple[str, ...],
) -> list[RemoteSite]:
    """All sites, in the order of their seats, then of their names (SP-11-35).

    Args:
        bind: told who holds a site's part in the run.
        salt_check: of the coordinator's salt.
        defences: of gradients, as sites are told.
    """
    sites = []
    relay = None if job.fusion is None else _relay(config, settings, job, files)
    for name, _ in sorted(seats.filled.items(), key=lambda one: (not one[1], one[1], one[0])):
        offered = seats.of(name)
        schema = schema_digest(seat_descriptors(job, offered))
        masks = masks_on_wire(settings.task) if name == settings.labels.at else None
        offer = JobOffer(files.run, offered, job, schema, defences=defences, masks=masks)
        patience_s = settings.absence.per_site_s.get(name, settings.deadlines.return_s)
        site = RemoteSite(name, offer, patience_s, witness, report, salt_check, relay)
        site.holding.restore(files.record.holders.get(name), bind)
        sites.append(site)
    return sites


def _relay(config: PeerConfig, settings: JobConfig, job: Job, files: RunFiles) -> Relay:
    """Passes on the keys of a secure sum."""
    credentials, federation = config.credentials(), config.peer.federation
    return Relay(
        files.run, job, lambda: Trust.of(credentials, federation, settings.sites), files.record.fusion_keys
    )


def admit_again(files: RunFiles, settings: JobConfig, names: Collection[str]) -> None:
    """SP-11.14-5. Raises ConfigError."""
    for name in names:
        if name not in settings.sites:
            raise ConfigError(f"--readmit {name}: {settings.source} [sites] names no such site")
        files.record.readmit(name)


def largest_message(settings: JobConfig, job: Job, seats: Seats) -> int:
    """Octets of the largest body the job itself makes sites send."""
    batch = max(job.batch, settings.evaluation.batch)
    logits = logits_octets(job, task_of(settings.task).channels) if settings.labels.at is not None else 0
    return logits + max(
        body_bytes(seat_descriptors(job, seats.of(site), dict.fromkeys(filled, batch)))
        for site, filled in seats.filled.items()
    )
