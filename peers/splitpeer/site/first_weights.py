"""What a run's encoders start from, where `[model] weights` of `peer.toml` names files of `splitpeer pretrain`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import nn

from splitpeer.defences.kinds import GAUSSIAN
from splitpeer.defences.network import Defended
from splitpeer.errors import ConfigError, DataError
from splitpeer.federation.terms import normalisation_of
from splitpeer.models.cut import Backbone
from splitpeer.pretraining import encoder_file
from splitpeer.pretraining.encoder_file import EncoderFacts, EncoderFile
from splitpeer.settings.peer import PeerConfig, Policy
from splitpeer.site.encoders import Encoders
from splitpeer.storage import checkpoint, durable, reading
from splitproto.messages import Job, Seat

RECORD = "weights.json"
"""File in the run's folder: by seat, the digest of what its encoder started from."""
MAX_RECORD = 1 << 16
"""Bytes of it."""


def start(
    encoders: Encoders, config: PeerConfig, job: Job, backbone: Backbone, seats: Sequence[Seat], folder: Path
) -> dict[str, str]:
    """Give the encoders of a new run their first weights, and note it.

    A run that has checkpoints keeps to them, whatever the files hold by now.

    Returns:
        By seat, the digest of the file that the run started from; {}: of none.

    Raises:
        ConfigError: a seat is unknown, weights of own images go with a privacy budget, or weights that others can
            compute, or that want more noise than the site adds, with the preset private.
        DataError: a file cannot be used, or does not fit the job.
    """
    if checkpoint.available(folder):
        return _noted(folder)
    digests = load(encoders, config, job, backbone, seats)
    _note(folder, digests)
    return digests


def load(
    encoders: Encoders, config: PeerConfig, job: Job, backbone: Backbone, seats: Sequence[Seat]
) -> dict[str, str]:
    """The same without a run: nothing is noted. Raises as `start`."""
    refuse_unknown(config, seats)
    digests = {}
    for seat in seats:
        if (file := fitting(config, job, backbone, seat)) is None:
            continue
        _into(encoders.halves[seat.name].network, file)
        digests[seat.name] = file.digest
    return digests


def give(network: nn.Module, path: Path, job: Job, backbone: Backbone, seat: Seat) -> None:
    """Give another site's encoder the weights of a file. Raises DataError: it cannot be used, or does not fit."""
    _into(network, _fits(path, job, backbone, seat))


def _into(network: nn.Module, file: EncoderFile) -> None:
    file.load_into(network.encoder if isinstance(network, Defended) else network)


def _fits(path: Path, job: Job, backbone: Backbone, seat: Seat) -> EncoderFile:
    rules = [str(normalisation_of(job, modality)) for modality in seat.modalities]
    file = encoder_file.read(path)
    file.refuse_misfit(EncoderFacts.of(backbone, seat.modalities, rules, job.spacing, job.window))
    return file


def refuse_unknown(config: PeerConfig, seats: Sequence[Seat]) -> None:
    """Raises ConfigError: a misspelt seat would start from random weights in silence."""
    weights = config.model.weights if config.model is not None else None
    names = [seat.name for seat in seats]
    if isinstance(weights, Mapping) and (strange := sorted(weights.keys() - set(names))):
        raise ConfigError(
            f"{config.source}: [model] weights names seat {strange[0]}, this site fills {', '.join(names)}"
        )


def fitting(config: PeerConfig, job: Job, backbone: Backbone, seat: Seat) -> EncoderFile | None:
    """What a seat's encoder starts from; None: no file is named. Raises ConfigError, DataError: see `start`."""
    path = config.model.weights_of(seat.name) if config.model is not None else None
    if path is None:
        return None
    file, policy = _fits(path, job, backbone, seat), config.policy
    if policy is not None and policy.epsilon is not None and file.described.saw_own_images:
        raise ConfigError(
            f"{config.source}: [policy] epsilon promises nothing about weights made from own images ({path}): make "
            "them from public data, or remove one of the two"
        )
    if policy is not None and policy.preset == "private" and file.described.began_from_a_seed:
        # SP-14-3: later steps on own images do not take them far from what anyone can compute.
        raise ConfigError(
            f'{config.source}: [policy] preset = "private" takes no weights that began from a seed ({path}): anyone '
            "who knows it can make them again: leave the seed out of the recipe, and initial_weights private"
        )
    if policy is not None and policy.preset == "private":
        wanted, added = file.described.noise, _noise_of(policy)
        if added < wanted:
            # Encoders that learned behind noise count on it: without it, the values show far more.
            raise ConfigError(
                f"{config.source}: {path} learned behind noise of {wanted:g}, and [policy] defences add "
                f'{added:g}: write defences = ["gaussian:{wanted:g}"]'
            )
    return file


def _noise_of(policy: Policy) -> float:
    """Widest Gaussian noise on all levels, in root mean squares of a level."""
    scales = [
        float(spec.values["scale"])
        for spec in policy.defences
        if spec.kind is GAUSSIAN and spec.levels is None
    ]
    return max(scales, default=0.0)


def _note(folder: Path, digests: Mapping[str, str]) -> None:
    path = folder / RECORD
    try:
        if digests:
            durable.make_folder(folder)
            durable.replace(path, json.dumps(digests, sort_keys=True).encode())
        else:
            path.unlink(missing_ok=True)
    except OSError as error:
        raise durable.refusal(error, f"{path}:", "[peer] state") from None


def _noted(folder: Path) -> dict[str, str]:
    path = folder / RECORD
    try:
        return {str(seat): str(digest) for seat, digest in reading.document(path, MAX_RECORD).items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError):
        raise DataError(f"{path}: cannot be read: put it back, or start a new run") from None
