"""What a run's encoders start from, where `[model] weights` of `peer.toml` names files of `splitpeer pretrain`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

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
from splitproto.records import Job, Seat

RECORD = "weights.json"
"""File in the run's folder: by seat, the `WeightsOrigin` of what its encoder started from."""
MAX_RECORD = 1 << 16
"""Bytes of it."""


@dataclass(frozen=True)
class WeightsOrigin:
    """What a policy must know of the weights that an encoder started from, in a resumed run too."""

    digest: str
    """Of the file, SHA-256, hexadecimal."""
    noise: float
    """Behind which it learned, in root mean squares of a level; 0: none."""
    rate: float
    """Price of what got through that noise."""
    own: bool
    """Whether it learned from this site's images."""
    seeded: bool
    """Whether anyone can compute where its training started."""

    @classmethod
    def of(cls, file: EncoderFile) -> WeightsOrigin:
        """As the file says."""
        said = file.described
        return cls(file.digest, said.noise, said.rate, said.saw_own_images, said.began_from_a_seed)

    @classmethod
    def parsed(cls, found: Mapping[str, Any]) -> WeightsOrigin:
        """Of a record. Raises ValueError: it is something else."""
        kinds = {"digest": str, "noise": float, "rate": float, "own": bool, "seeded": bool}
        if {name: type(value) for name, value in found.items()} != kinds:
            raise ValueError("not an origin")
        return cls(**found)


def start(
    encoders: Encoders, config: PeerConfig, job: Job, backbone: Backbone, seats: Sequence[Seat], folder: Path
) -> dict[str, str]:
    """Give the encoders of a new run their first weights, and note where they come from.

    A run that has checkpoints keeps to them, whatever the files hold by now; the policy of today judges them again.

    Returns:
        By seat, the digest of the file that the run started from; {}: of none.

    Raises:
        ConfigError: a seat is unknown, or the policy takes no such weights: see `refuse_against`.
        DataError: a file cannot be used, or does not fit the job.
    """
    if checkpoint.available(folder):
        origins = noted(folder)
        for seat in seats:
            refuse_against(config, seat, origins.get(seat.name), folder / RECORD)
    else:
        origins = load(encoders, config, job, backbone, seats)
        _note(folder, origins)
    return {seat: origin.digest for seat, origin in origins.items()}


def load(
    encoders: Encoders, config: PeerConfig, job: Job, backbone: Backbone, seats: Sequence[Seat]
) -> dict[str, WeightsOrigin]:
    """The same without a run: nothing is noted. Raises as `start`."""
    refuse_unknown(config, seats)
    origins = {}
    for seat in seats:
        if (file := fitting(config, job, backbone, seat)) is None:
            continue
        _into(encoders.halves[seat.name].network, file)
        origins[seat.name] = WeightsOrigin.of(file)
    return origins


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
        refuse_against(config, seat, None, config.source)
        return None
    file = _fits(path, job, backbone, seat)
    refuse_against(config, seat, WeightsOrigin.of(file), path)
    return file


def refuse_against(config: PeerConfig, seat: Seat, origin: WeightsOrigin | None, where: object) -> None:
    """What the policy says of a seat's first weights.

    Args:
        origin: None: they were drawn at random.
        where: it was read, for the error.

    Raises:
        ConfigError: weights of own images go with a privacy budget; others can compute them, or they want more noise
            than the site adds, with the preset private; or they learned behind less noise, or for less, than the
            policy demands.
    """
    policy = config.policy
    if policy is None:
        return
    if policy.epsilon is not None and origin is not None and origin.own:
        raise ConfigError(
            f"{config.source}: [policy] epsilon promises nothing about weights made from own images ({where}): make "
            "them from public data, or remove one of the two"
        )
    if policy.preset == "private" and origin is not None and origin.seeded:
        # SP-14-3: later steps on own images do not take them far from what anyone can compute.
        raise ConfigError(
            f'{config.source}: [policy] preset = "private" takes no weights that began from a seed ({where}): anyone '
            "who knows it can make them again: leave the seed out of the recipe, or pretrain with --secret"
        )
    for key, least, has in (
        ("min_encoder_noise", policy.min_encoder_noise, origin.noise if origin is not None else 0.0),
        ("min_encoder_rate", policy.min_encoder_rate, origin.rate if origin is not None else 0.0),
    ):
        if origin is None and least:
            raise ConfigError(
                f"{config.source}: [policy] {key} = {least:g} wants an encoder of splitpeer pretrain, and seat "
                f"{seat.name} starts from random weights ({where}): name its file in [model] weights"
            )
        if has < least:
            raise ConfigError(
                f"{config.source}: [policy] {key} = {least:g}, and the encoder of seat {seat.name} learned with "
                f"{has:g} ({where}): make another with a recipe whose {key.removeprefix('min_encoder_')} is as large"
            )
    strict = policy.preset == "private" or policy.min_encoder_noise > 0
    if origin is not None and strict and (added := _noise_of(policy)) < origin.noise:
        # Encoders that learned behind noise count on it: without it, the values show far more.
        raise ConfigError(
            f"{config.source}: {where}: seat {seat.name} learned behind noise of {origin.noise:g}, and [policy] "
            f'defences add {added:g}: write defences = ["gaussian:{origin.noise:g}"]'
        )


def _noise_of(policy: Policy) -> float:
    """Widest Gaussian noise on all levels, in root mean squares of a level."""
    scales = [
        float(spec.values["scale"])
        for spec in policy.defences
        if spec.kind is GAUSSIAN and spec.levels is None
    ]
    return max(scales, default=0.0)


def _note(folder: Path, origins: Mapping[str, WeightsOrigin]) -> None:
    path = folder / RECORD
    try:
        if origins:
            durable.make_folder(folder)
            said = {seat: asdict(origin) for seat, origin in origins.items()}
            durable.replace(path, json.dumps(said, sort_keys=True).encode())
        else:
            path.unlink(missing_ok=True)
    except OSError as error:
        raise durable.refusal(error, f"{path}:", "[peer] state") from None


def noted(folder: Path) -> dict[str, WeightsOrigin]:
    """By seat, what a run's encoders started from; {}: random weights. Raises DataError: it cannot be read."""
    path = folder / RECORD
    try:
        return {seat: WeightsOrigin.parsed(said) for seat, said in reading.document(path, MAX_RECORD).items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, AttributeError):
        raise DataError(f"{path}: cannot be read: put it back, or start a new run") from None
