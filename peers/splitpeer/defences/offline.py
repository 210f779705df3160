"""A site's defences applied to what it sent already: to the bit what it would have sent with the same key."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from splitpeer.defences.key import key_of
from splitpeer.defences.randomness import Release
from splitpeer.defences.stack import Stack, defend, make_stack
from splitpeer.errors import ConfigError, DataError
from splitpeer.models.registry import backbone_of
from splitproto.capture import Header
from splitproto.messages import Forward


@dataclass(frozen=True)
class OfflineDefences:
    """The defences of one site; see `splitpeer.captures.redefend.SiteDefences`."""

    stacks: Mapping[str, Stack]
    """By seat: no two share their noise."""
    certain: bool = True
    """False: it is not known which seat has the peer's own key, so that no seat has it here."""

    @property
    def specs(self) -> tuple[str, ...]:
        """As they are written, every parameter named."""
        return next(iter(self.stacks.values())).specs

    @property
    def repeats(self) -> bool:
        """Whether a live site with the same key sends the same: not with differential privacy, nor with other keys."""
        return self.certain and not any(
            defence.kind.private for stack in self.stacks.values() for defence in stack.defences
        )

    def __call__(
        self, tensors: Mapping[str, np.ndarray], run: bytes, forward: Forward, seat: str
    ) -> dict[str, np.ndarray]:
        """`tensors` (float32 [B, C, *spatial] by level), sent for `seat` as the answer to `forward`, defended."""
        release = Release(
            run, forward.mode, forward.step, forward.batch, forward.samples, nonce=secrets.token_bytes(16)
        )
        return defend(self.stacks[seat], tensors, release)


def offline_defences(
    header: Header,
    written: str,
    key_of_site: Callable[[str], bytes],
    sites: Sequence[str] = (),
    first: Mapping[str, str] | None = None,
) -> dict[str, OfflineDefences]:
    """By name of each site whose activations a capture holds.

    The first modality of a site's peer.toml has the site's own key (see `key_of`). A capture does not tell which one
    that is where a site fills several seats: unless `first` says so, each of them gets a key of its own.

    Args:
        header: of the capture.
        written: defences joined by `+`, as in `dropout:0.5+gaussian:1`.
        key_of_site: a site's 32 octets of defence key, by its name.
        sites: only these; empty: all.
        first: by site, the first modality of its peer.toml.

    Raises:
        ConfigError: no such defence, or one that only training can apply; no such site.
        DataError: the capture names no job, or no site.
    """
    parties = [header] if header.role == "client" else header.peers
    holds = {party.site: party for party in parties}
    if not holds:
        raise DataError("the capture names no site whose activations it holds")
    if unknown := sorted(set(sites) - set(holds)):
        raise ConfigError(f"{', '.join(unknown)}: not in this capture; it has {', '.join(holds)}")
    job = header.job
    if job is None:
        raise DataError("the capture names no job: nothing was trained while it was recorded")
    channels = backbone_of(job).cut.channels
    applied = {}
    for site in [site for site in holds if not sites or site in sites]:
        party, stacks, told = holds[site], {}, (first or {}).get(site)
        certain = told is not None or len(party.seats) == 1
        held = (told,) if told is not None else party.seats[0].modalities if certain else ()
        for seat in party.seats:
            key = key_of(key_of_site(site), seat.modalities, held)
            stacks[seat.name] = make_stack(
                written, key=key, channels=channels, dimensions=job.dimensions, after=party.defences
            )
            _check(stacks[seat.name])
        applied[site] = OfflineDefences(stacks, certain)
    return applied


def _check(stack: Stack) -> None:
    """Raises ConfigError where nothing is written, or something that only training can apply."""
    if not stack:
        raise ConfigError("no defence is named: write one, such as dropout:0.5+gaussian:1")
    if live := [d.kind.name for d in stack.defences if not d.kind.offline]:
        raise ConfigError(
            f"{', '.join(live)} changes the training, so it cannot be tried on recorded traffic: "
            "record a run with it, or rehearse it with splitpeer audit"
        )
