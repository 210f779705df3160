"""A run is taken up at a site: what it costs is checked, then its images, encoders and counts are opened."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from splitpeer.daemon import happenings as h
from splitpeer.data.channels import Channels
from splitpeer.data.consent import Consent
from splitpeer.data.files import Found
from splitpeer.data.modalities import MASK
from splitpeer.data.pseudonym import load_salt
from splitpeer.defences.image.stack import ImageStack
from splitpeer.defences.key import for_peer, key_of
from splitpeer.defences.stack import make_stack
from splitpeer.federation.compute import defence_key, pick_device
from splitpeer.federation.files import check_seats, look
from splitpeer.federation.halves import announced, client_half, image_stacks
from splitpeer.federation.images import find_files, open_consent, open_masks, open_volumes
from splitpeer.federation.masks import task_from_wire
from splitpeer.federation.terms import (
    Room,
    backbone_for,
    check_bounds,
    checkpoint_octets,
    normalisation_of,
    run_folder,
)
from splitpeer.models.cut import Backbone
from splitpeer.privacy.ledger import Ledger, Spent
from splitpeer.settings.bounds import Bounds
from splitpeer.settings.peer import PeerConfig
from splitpeer.site import first_weights
from splitpeer.site.budgets import Budgets, new_run
from splitpeer.site.encoders import Encoders
from splitpeer.site.inference.answering import Terms
from splitpeer.site.job import Means, SiteJob
from splitpeer.site.labelling import DEFENDED, Labelling, LossTold
from splitpeer.site.leaving import Leaving
from splitpeer.site.named import Named
from splitpeer.site.people import People
from splitpeer.site.range_refusals import RangeRefusals
from splitpeer.site.run_folders import check_terms, make_room, note_terms
from splitpeer.site.secret import site_secret
from splitpeer.site.summing import Allowed, Summing
from splitpeer.timeline.spans import Spans
from splitpeer.training.guard import Guard
from splitpeer.training.split_step import ClientHalf
from splitproto.messages import JobOffer
from splitproto.records import Job, Seat


def open_job(
    offer: JobOffer,
    config: PeerConfig,
    report: h.Reporter,
    unusable: Mapping[str, Mapping[bytes, str]] | None = None,
) -> SiteJob:
    """Take up the run of an offer that was judged.

    Args:
        report: told by the thread that computes.
        unusable: by modality, patients whose files were found bad before there was a job, and why.

    Raises:
        PolicyRefused: it costs more than the policy allows.
        SchemaMismatch: this site accepted other terms or seats for the run.
        ConfigError, DataError: settings, images, keys or checkpoints cannot be used.
    """
    job, bounds = offer.job, config.policy or Bounds()
    state, folder = config.peer.state, run_folder(config.peer.state, job.name, offer.run)
    known = folder.exists()
    check_terms(folder, offer)
    found, named = _files(offer, config), Named(folder)
    consent = open_consent(config, found, named.people, check=Leaving(folder, named, config.data).check)
    key = _base_key(config)
    images = image_stacks(config.policy.image_defences if config.policy else (), key, config.peer.modalities)
    channels = _channels(offer, config, found, consent, images, named)
    bad, backbone = _bad(channels, unusable or {}), backbone_for(job, config)
    room = _room(offer, config, backbone, _largest(channels, bad, report))
    octets = checkpoint_octets(backbone, offer.seats)
    check_bounds(job, backbone, offer.seats, bounds, room.voxels)
    if not known:
        new_run(state, bounds)
    make_room(state, folder, bounds, 2 * octets, report)
    note_terms(folder, offer)
    encoders = Encoders({seat.name: _half(job, backbone, seat, config, key) for seat in offer.seats})
    budgets = Budgets(folder, bounds)
    means = Means(
        state=state,
        folder=folder,
        bounds=bounds,
        checkpoint_octets=octets,
        room=room,
        channels=channels,
        consent=consent,
        named=named,
        salt=load_salt(config.data.salt) if config.data.salt else b"",
        people=People(state),
        encoders=encoders,
        weights=first_weights.start(encoders, config, job, backbone, offer.seats, folder),
        labelling=(labels := _labelling(offer, config, channels, folder, budgets, key)),
        defences=(*announced(images, encoders.defences), *(labels.announced if labels else ())),
        private=config.runtime.initial_weights == "private",
        budgets=budgets,
        secret=site_secret(folder),
        summing=_summing(offer, config, folder, report),
        **_of_peer(config),
        ledger=open_ledger(config, report),
        report=report,
    )
    return _begun(SiteJob(offer, means, bad))


def _largest(channels: Channels, bad: Mapping[bytes, str], report: h.Reporter) -> int:
    """Voxels of the largest volume. Raises DataError: none can be used, or nobody fills a seat."""
    check_seats(channels, report)
    grids = look(channels, dict(bad), report).values()
    return max((math.prod(grid.shape) for grid in grids), default=0)


def _files(offer: JobOffer, config: PeerConfig) -> dict[str, Found]:
    """Images by modality, and the masks where the job asks for them. Raises DataError."""
    images, masks = find_files(config)
    return images if masks is None or offer.masks is None else {**images, MASK: masks}


def _of_peer(config: PeerConfig) -> dict[str, Any]:
    """Fields of `Means`."""
    policy = config.policy
    terms = Terms(policy.inference, policy.inference_for) if policy is not None else Terms()
    spans = Spans(config.peer.site)
    return {"look_again": partial(_images, config), "inference": terms, "spans": spans}


def _summing(offer: JobOffer, config: PeerConfig, folder: Path, report: h.Reporter) -> Summing | None:
    """Where the job has secure fusion."""
    if offer.job.fusion is None or config.policy is None:
        return None
    peer, policy = config.peer, config.policy
    allowed = Allowed(config.credentials(), peer.federation, policy.partners, policy.min_partners)
    refusals = RangeRefusals(peer.state, policy.max_range_refusals)
    return Summing(
        offer, folder, allowed, peer.site, report, policy.max_record_mib, refusals, policy.max_key_days
    )


def _labelling(
    offer: JobOffer, config: PeerConfig, channels: Channels, folder: Path, budgets: Budgets, key: bytes
) -> Labelling | None:
    """Where the labels are this site's."""
    masks, policy = channels.masks, config.policy
    if offer.masks is None or masks is None or policy is None:
        return None
    task = task_from_wire(offer.masks, config.data.convention)
    written, stack = policy.label_defences, None
    if written:
        stack = make_stack(
            written,
            key=for_peer(key, "labels"),
            channels={DEFENDED: task.channels},
            dimensions=offer.job.dimensions,
            place="gradients",
        )
    told = LossTold(policy.figures, policy.round_to, policy.min_scored)
    device = pick_device(config.runtime.device)
    return Labelling(offer.run, offer.job, masks, task, folder, told, stack, budgets, device)


def _images(config: PeerConfig) -> dict[str, Found]:
    """By modality; {}: this site holds masks only. Raises DataError."""
    return find_files(config)[0]


def _begun(site: SiteJob) -> SiteJob:
    """Raises what `SiteJob.begin` raises, with the site closed."""
    try:
        site.begin()
    except BaseException:
        site.close()
        raise
    return site


def _room(offer: JobOffer, config: PeerConfig, backbone: Backbone, voxels: int) -> Room:
    """What one batch may take under this site's policy."""
    policy = config.policy
    return Room(
        offer.job,
        backbone,
        offer.seats,
        policy or Bounds(),
        policy.max_message_bytes if policy else 0,
        voxels,
    )


def open_ledger(config: PeerConfig, report: h.Reporter) -> Ledger | None:
    """The site's privacy budget, if its policy sets one. Raises ConfigError or DataError: see `Ledger`."""
    policy = config.policy
    if policy is None or policy.epsilon is None or policy.delta is None:
        return None

    def spent(now: Spent) -> None:
        report(
            h.PrivacySpent(now.epsilon, now.alone, now.budget, now.delta, now.patients, now.half, now.full)
        )

    return Ledger(config.peer.state, policy.epsilon, policy.delta, spent)


def _base_key(config: PeerConfig) -> bytes:
    """What all defences of this site draw from, if there are any."""
    policy = config.policy
    drawing = policy and (policy.defences or policy.image_defences or policy.label_defences)
    return defence_key(config) if drawing else b""


def _channels(
    offer: JobOffer,
    config: PeerConfig,
    found: Mapping[str, Found],
    consent: Consent,
    defences: Mapping[str, ImageStack],
    named: Named,
) -> Channels:
    """The images of the job's seats.

    A patient who has withdrawn consent is not listed, unless the coordinator of this run knows the patient already.
    """
    asked = {modality: found[modality] for seat in offer.seats for modality in seat.modalities}
    without = consent.withdrawn().difference(named.people)
    volumes = open_volumes(
        config,
        asked,
        offer.job.spacing,
        lambda modality: normalisation_of(offer.job, modality),
        without=without,
    )
    masks = None
    if offer.masks is not None and MASK in found:
        task = task_from_wire(offer.masks, config.data.convention)
        masks = open_masks(config, found[MASK], offer.job.spacing, task, without)
    return Channels(volumes, {seat.name: seat.modalities for seat in offer.seats}, defences, masks)


def _bad(channels: Channels, unusable: Mapping[str, Mapping[bytes, str]]) -> dict[bytes, str]:
    """Patients who have a bad file among their channels, or a bad mask: the first of them."""
    found: dict[bytes, str] = {}
    for key in channels.keys():  # noqa: SIM118 (not a dict)
        kinds = [*channels.modalities(key), *([MASK] if channels.masked(key) else [])]
        causes = [c for kind in kinds if (c := unusable.get(kind, {}).get(key)) is not None]
        if causes:
            found[key] = causes[0]
    return found


def _half(job: Job, backbone: Backbone, seat: Seat, config: PeerConfig, key: bytes) -> ClientHalf:
    """One seat's encoder with its defences and its optimiser."""
    bounds, seed = config.policy or Bounds(), config.runtime.initial_weights
    return client_half(
        job,
        backbone,
        seat,
        config.policy.defences if config.policy else (),
        key=key_of(key, seat.modalities, config.peer.modalities),
        # SP-14-3: weights that others can compute are a white-box attack on the first step, so the default is private
        # entropy; a seed is a choice for demonstrations and tests.
        seed=None if seed == "private" else int(seed),
        device=pick_device(config.runtime.device),
        guard=Guard(bounds.max_gradient_norm, refuse=bounds.beyond_norm == "refuse"),
    )
