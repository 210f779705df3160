"""What a party holds of one run, found on its disk: a site its encoders, the coordinator fusion and decoder.

A site that had masks alone holds nothing, but its word counts.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from splitpeer.coordinator.record import SUFFIX, codings_in, terms_of
from splitpeer.errors import ConfigError, DataError
from splitpeer.export import networks
from splitpeer.export.networks import Component
from splitpeer.export.scripts.network import Encoders, SplitNetwork
from splitpeer.federation.masks import convention_of
from splitpeer.federation.seats import seats_of
from splitpeer.federation.terms import (
    NOT_CODED,
    Codings,
    backbone_for,
    job_on_wire,
    leads_to,
    normalisation_of,
    run_folder,
    terms_digest,
)
from splitpeer.models.registry import backbone_of, cut_of
from splitpeer.settings.job import JobConfig
from splitpeer.settings.peer import PeerConfig
from splitpeer.site.run_folders import noted_terms
from splitpeer.storage import checkpoint, reading
from splitpeer.training.forms import activations_form
from splitpeer.training.sums import SUM
from splitproto.fusion import greatest
from splitproto.records import Job

EDITION = 1
ENCODERS, DECODER, MASKS, WHOLE = "encoders", "decoder", "masks", "whole"
"""What a bundle can hold; `MASKS`: the word of a site that had masks alone, and no weights."""
_FOLDER = re.compile(r"(.+)-([0-9a-f]{32})")


@dataclass(frozen=True)
class Half:
    """A party's part of a network, ready to be written; or all parts of one."""

    facts: Mapping[str, Any]
    """What it is, in values that JSON has; signed where parties agree to join."""
    weights: Mapping[str, Mapping[str, Tensor]]
    """By name of a file in `models/`, the tensors of one network."""
    missing: tuple[str, ...] = field(default=())
    """Lines on what the half is not, for people."""


def encoder_file(seat: str) -> str:
    """Where a bundle has the encoder of a seat."""
    return f"models/encoder-{seat}.safetensors"


DECODER_FILE = "models/decoder.safetensors"


def half_of(config: PeerConfig, run: str, job: JobConfig | None, step: int | None = None) -> Half:
    """What this party holds of a run.

    Args:
        config: peer.toml.
        run: the job's name, or the first digits of the run's id.
        job: job.toml, at a coordinator.
        step: of the checkpoint; None: the newest.

    Raises:
        ConfigError: no such run, or several; or job.toml is of another.
        DataError: a file of the run is missing or damaged.
    """
    folder = _folder(config.peer.state, run)
    if config.peer.role == "client":
        return _of_site(config, folder, step)
    if job is None:
        raise ConfigError("a coordinator's half is described by its job: add --job job.toml")
    return _of_coordinator(config, job, folder, step)


def _folder(state: Path, run: str) -> Path:
    """Of the one run that is named so. Raises ConfigError."""
    there = {
        path: (match[1], match[2])
        for path in sorted(state.glob("*-*"))
        if (match := _FOLDER.fullmatch(path.name)) and not path.is_symlink() and checkpoint.steps_in(path)
    }
    found = [path for path, (job, digits) in there.items() if run == job or (run and digits.startswith(run))]
    if len(found) == 1:
        return found[0]
    every = ", ".join(
        f"{job} {digits[:8]}" for path, (job, digits) in there.items() if not found or path in found
    )
    if found:
        raise ConfigError(f"{run!r} names {len(found)} runs: give the first digits of one: {every}")
    raise ConfigError(f"no run of {run!r} with a checkpoint in {state}; there is: {every or 'none'}")


def _state(folder: Path, step: int | None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A checkpoint's tensors, and what is known of it. Raises DataError."""
    at = checkpoint.steps_in(folder)[-1] if step is None else step
    tensors, _, digest = checkpoint.load(folder, at)
    return tensors, {"step": at, "checkpoint": digest}


def _common(config: PeerConfig, job: Job, folder: Path) -> dict[str, Any]:
    """What both halves of a run say alike."""
    cut = cut_of(job)
    return {
        "edition": EDITION,
        "federation": config.peer.federation,
        "party": config.peer.site,
        "job": job.name,
        "run": folder.name[-32:],
        # A deadline is no part of the weights: a coordinator may change it when it restarts.
        "terms": terms_digest(replace(job, seconds_per_step=1.0)),
        "steps": job.steps,
        "frozen": job.frozen,
        "precision": activations_form(job).form,
        "dimensions": job.dimensions,
        "window": list(job.window),
        "spacing": list(job.spacing),
        "cut": {
            cut.levels[level].name: [cut.levels[level].channels, list(cut.shape(level, job.window)[1:])]
            for level in cut.sent
        },
    }


def _rules(job: Job, seats: Mapping[str, Sequence[str]]) -> dict[str, str]:
    return {name: str(normalisation_of(job, name)) for held in seats.values() for name in held}


def _of_site(config: PeerConfig, folder: Path, step: int | None) -> Half:
    job, offered = noted_terms(folder)
    seats = {seat.name: list(seat.modalities) for seat in offered}
    backbone, policy = backbone_for(job, config), config.policy
    tensors, found = _state(folder, step)
    components = {seat: networks.encoder(backbone, len(held)) for seat, held in seats.items()}
    weights = {}
    for seat, component in components.items():
        prefix = f"{seat}/" if len(seats) > 1 else ""
        own = _model({n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)})
        weights[encoder_file(seat)] = _fitting(component, own, folder, ("", "encoder."))
    defences = [str(spec.brief) for spec in (*policy.image_defences, *policy.defences)] if policy else []
    facts = {
        "kind": ENCODERS if seats else MASKS, **_common(config, job, folder), **found, "seats": seats,
        "encoders": components,
        "normalisation": _rules(job, seats), "defences": defences,
        "secret": config.runtime.initial_weights == "private",
        "sum": None if job.fusion is None else {"range": job.fusion.range, "greatest": greatest(job.fusion)},
    }  # fmt: skip
    without = (
        [f"without this site's defences ({', '.join(defences)}): what leaves in a run is less than this"]
        if defences
        else []
    )
    return Half(facts, weights, tuple(without))


def _of_coordinator(config: PeerConfig, settings: JobConfig, folder: Path, step: int | None) -> Half:
    job, seats = job_on_wire(settings, _codings(config, settings, folder)), seats_of(settings)
    task = settings.task.task(convention_of(settings.task, config.data.convention))
    arriving = seats.names if job.fusion is None else (SUM,)
    component = networks.decoder(backbone_of(job), arriving, settings.model.decoder_fusion, task.channels)
    tensors, found = _state(folder, step)
    held = {seat.name: list(seat.modalities) for seat in seats.seats}
    facts = {
        "kind": DECODER, **_common(config, job, folder), **found, "seats": held,
        # Also the one that has masks alone: the decoder learned from them.
        "sites": {site: list(filled) for site, filled in seats.filled.items()},
        "decoder": component, "defences": [], "secret": False,
        "normalisation": _rules(job, held), "overlap": settings.evaluation.overlap,
        "task": {
            "values": {name: value for value, name in task.names.items()},
            "regions": {region.name: list(region.values) for region in task.regions},
            "exclusive": task.exclusive,
            "convention": task.convention,
        },
        "sum": None if job.fusion is None else {"range": job.fusion.range, "greatest": greatest(job.fusion)},
    }  # fmt: skip
    return Half(facts, {DECODER_FILE: _fitting(component["network"], _model(tensors), folder, ("",))})


def built(half: Half, seat: str | None = None) -> nn.Module:
    """The network that a bundle's inference.json makes, with its weights; of one seat's encoder, if one is named.

    Raises DataError: the weights are not those of the network.
    """
    facts = half.facts
    try:
        decoder = networks.make(facts["decoder"]) if "decoder" in facts else None
        if decoder is not None:
            decoder.network.load_state_dict(dict(half.weights[DECODER_FILE]))  # type: ignore[union-attr]
        if facts["kind"] == DECODER and decoder is not None:
            return decoder.eval()
        seats = list(facts["encoders"]) if seat is None else [seat]
        made = {}
        for name in seats:
            made[name] = networks.make(facts["encoders"][name])
            made[name].load_state_dict(dict(half.weights[encoder_file(name)]))
    except (RuntimeError, LookupError, TypeError, ValueError, AttributeError):
        raise DataError(
            f"the weights of {facts['party']} are not those of the network that its bundle describes"
        ) from None
    encoders = Encoders(made, {name: len(facts["seats"][name]) for name in seats})
    if facts["kind"] == ENCODERS:
        return encoders.eval()
    return SplitNetwork(encoders, decoder, facts["precision"], facts["sum"]).eval()  # type: ignore[arg-type]


def _codings(config: PeerConfig, settings: JobConfig, folder: Path) -> Codings:
    """Those that the run chose; job.toml is the run's. Raises ConfigError, DataError."""
    name, run = settings.job.name, folder.name[-32:]
    if folder != run_folder(config.peer.state, name, bytes.fromhex(run)):
        raise ConfigError(
            f"{settings.source}: is of job {name}, the run of {folder.name[:-33]}: name its job.toml"
        )
    for path in (config.peer.state / f"{name}{SUFFIX}", config.peer.state / f"{name}-{run}{SUFFIX}"):
        try:
            record = reading.document(path)
            codings = codings_in(record)
        except FileNotFoundError:
            continue
        except (OSError, ValueError, TypeError):
            raise DataError(f"{path}: cannot be read, or is damaged: copy it back from a backup") from None
        if record.get("run") != run:
            continue
        # A run of before codings were noted tells nothing of them.
        if record.get("terms") != terms_of(settings) or not (
            codings is None or leads_to(settings.wire, codings)
        ):
            raise ConfigError(
                f"{settings.source}: has changed since run {run[:8]} began: name the file as it was"
            )
        return codings or NOT_CODED
    raise DataError(
        f"{config.peer.state}: has no record of run {run[:8]} any more: only the newest run can be exported"
    )


def _model(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {n.removeprefix("model/"): t for n, t in tensors.items() if n.startswith("model/")}


def _fitting(
    component: Component, own: Mapping[str, Tensor], folder: Path, prefixes: Sequence[str]
) -> dict[str, Tensor]:
    """Those of a checkpoint's weights that a network has, under its names: a defended encoder has a prefix.

    Raises DataError: another network's.
    """
    wanted = networks.make(component).state_dict()
    for prefix in prefixes:
        found = {name: own[prefix + name] for name in wanted if prefix + name in own}
        if len(found) == len(wanted) and all(found[name].shape == wanted[name].shape for name in wanted):
            return found
    raise DataError(
        f"{folder}: the checkpoint is of another network than the job's, or than [model] of peer.toml"
    )


def digest_of(value: object) -> str:
    """SHA-256, hexadecimal, of a value that JSON has: the same for equal values."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()
