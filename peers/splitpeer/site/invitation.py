"""A job.toml that a site is invited to, against its own policy, before anyone joins."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from splitpeer.errors import ConfigError, DataError
from splitpeer.federation.seats import seats_of
from splitpeer.federation.terms import backbone_for, check_bounds, checks, job_on_wire, seat_descriptors
from splitpeer.models.cut import Backbone
from splitpeer.pretraining import encoder_file
from splitpeer.settings.bounds import Bounds
from splitpeer.settings.job import JobConfig
from splitpeer.settings.peer import PeerConfig
from splitpeer.site import first_weights
from splitproto.codings import CODINGS
from splitproto.errors import PolicyRefused, SchemaMismatch
from splitproto.messages import JobOffer
from splitproto.tensors import schema_digest


def offer_to(job: JobConfig, site: str) -> JobOffer:
    """What a coordinator that does not record would offer to one of [sites]."""
    on_wire, seats = job_on_wire(job), seats_of(job).of(site)
    return JobOffer(
        bytes(16), seats, on_wire, schema_digest(seat_descriptors(on_wire, seats)), recorded=False
    )


def objections(
    job: JobConfig, config: PeerConfig, site: str | None = None, *, weights: bool = True
) -> list[str]:
    """Everything for which this site would decline the job, one line each; [] where it would accept it.

    What only a link or an image can show is not among it: who the coordinator is, whether it records, the sizes of
    images.

    Args:
        site: whose place in the job it takes; None: its own.
        weights: whether [model] weights are judged too, which may not be made yet.

    Raises:
        ConfigError: the job has nothing for this site.
    """
    site = site or config.peer.site
    if site not in job.sites:
        raise ConfigError(
            f"{job.source}: [sites] does not name {site}: ask the coordinator for the right job.toml"
        )
    offer = offer_to(job, site)
    more: tuple[Callable[[], None], ...] = (
        lambda: _cost(offer, config),
        lambda: _strangers(job, config, site),
        *([lambda: _weights(offer, config)] if weights else []),
    )
    found = []
    for check in (*checks(offer, config), *more):
        try:
            check()
        except (PolicyRefused, SchemaMismatch) as error:
            found.append(error.reason)
        except (ConfigError, DataError) as error:
            found.append(str(error))
    return list(dict.fromkeys(found))


def reservations(job: JobConfig, config: PeerConfig) -> list[str]:
    """What may be offered and would be declined, one line each: it is chosen when the run is started."""
    taken = config.policy.precision if config.policy is not None else ()
    if not job.wire.auto or not (declined := [coding for coding in CODINGS if coding not in taken]):
        return []
    return [
        f'{job.source}: [wire] "auto" may choose {", ".join(declined)}, which this site declines (policy precision)'
    ]


def networks(config: PeerConfig) -> list[str]:
    """The files of [model] weights that are parts of a network, one line each, to compare by telephone."""
    weights = config.model.weights if config.model is not None else None
    if weights is None:
        return []
    found = []
    for path in weights.values() if isinstance(weights, Mapping) else (weights,):
        file = encoder_file.read(path)
        if (network := file.described.of_network) is not None:
            found.append(f"{path}: part of network {network}: the others' encoders must be as well")
    return found


def _cost(offer: JobOffer, config: PeerConfig) -> None:
    """As far as it is known without images. Raises PolicyRefused."""
    if (backbone := _backbone(offer, config)) is not None:
        check_bounds(offer.job, backbone, offer.seats, config.policy or Bounds(), 0)


def _weights(offer: JobOffer, config: PeerConfig) -> None:
    """Whether [model] weights fit. Raises ConfigError, DataError."""
    first_weights.refuse_unknown(config, offer.seats)
    if (backbone := _backbone(offer, config)) is not None:
        for seat in offer.seats:
            first_weights.fitting(config, offer.job, backbone, seat)


def _backbone(offer: JobOffer, config: PeerConfig) -> Backbone | None:
    """None: it is impossible, as `checks` has said."""
    try:
        return backbone_for(offer.job, config)
    except ValueError:
        return None


def _strangers(job: JobConfig, config: PeerConfig, site: str) -> None:
    """SP-11.18-8: sites of the sum whose keys would be refused. Raises PolicyRefused."""
    partners = config.policy.partners if config.policy is not None else ()
    strange = sorted(job.sites.keys() - {site, *partners})
    if job.model.fusion == "secure-sum" and strange:
        raise PolicyRefused(
            f"{', '.join(strange)} {'is' if len(strange) == 1 else 'are'} in the sum and not among those whom this "
            f"site accepts (policy partners: {', '.join(partners) or 'none'})"
        )
