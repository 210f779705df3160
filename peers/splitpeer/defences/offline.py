"""A site's defences applied to what it sent already: to the bit what it would have sent with the same key."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from splitpeer.defences.randomness import Release
from splitpeer.defences.stack import Stack, defend, make_stack
from splitpeer.errors import ConfigError, DataError
from splitpeer.models.registry import backbone_of
from splitproto.capture import Header
from splitproto.messages import Forward


@dataclass(frozen=True)
class OfflineDefences:
    """The defences of one site; see `splitpeer.captures.redefend.SiteDefences`."""

    stack: Stack

    @property
    def specs(self) -> tuple[str, ...]:
        """As they are written, every parameter named."""
        return self.stack.specs

    @property
    def repeats(self) -> bool:
        """False for differential privacy, whose noise is never the same twice."""
        return not any(defence.kind.private for defence in self.stack.defences)

    def __call__(
        self, tensors: Mapping[str, np.ndarray], run: bytes, forward: Forward
    ) -> dict[str, np.ndarray]:
        """`tensors` (float32 [B, C, *spatial] by level), sent as the answer to `forward`, defended."""
        release = Release(
            run, forward.mode, forward.step, forward.batch, forward.samples, nonce=secrets.token_bytes(16)
        )
        return defend(self.stack, tensors, release)


def offline_defences(
    header: Header, written: str, key_of: Callable[[str], bytes], sites: Sequence[str] = ()
) -> dict[str, OfflineDefences]:
    """By name of each site whose activations a capture holds.

    Args:
        header: of the capture.
        written: defences joined by `+`, as in `dropout:0.5+gaussian:1`.
        key_of: a site's 32 octets of defence key, by its name.
        sites: only these; empty: all.

    Raises:
        ConfigError: no such defence, or one that only training can apply; no such site.
        DataError: the capture names no job, or no site.
    """
    holds = {header.site: header.defences} if header.role == "client" else {
        party.site: party.defences for party in header.peers}  # fmt: skip
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
        stack = make_stack(
            written, key=key_of(site), channels=channels, dimensions=job.dimensions, after=holds[site]
        )
        if not stack:
            raise ConfigError("no defence is named: write one, such as dropout:0.5+gaussian:1")
        if live := [d.kind.name for d in stack.defences if not d.kind.offline]:
            raise ConfigError(
                f"{', '.join(live)} changes the training, so it cannot be tried on recorded traffic: "
                "record a run with it, or rehearse it with splitpeer audit"
            )
        applied[site] = OfflineDefences(stack)
    return applied
