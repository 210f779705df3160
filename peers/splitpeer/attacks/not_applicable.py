"""Attacks that no capture can feed, and why.

A gradient on the wire has exactly the shape of the activations it answers: the derivative of the loss with respect
to what was sent, never to a weight. The gradients of a site's weights stay at the site, and so do the weights, unless
the job averages encoders (`average_every`): then the coordinator receives them every so many steps, and `whitebox`
needs nothing else. A site that shares gradients of weights by other means is exposed to the attacks that need them.
"""

from __future__ import annotations

from dataclasses import dataclass

from splitpeer.attacks.base import Goal


@dataclass(frozen=True)
class NotApplicable:
    """One attack, with the words of `Attack` that a report shows."""

    title: str
    source: str
    plain: str
    reason: str
    goal: Goal = "image"


_WIRE = "; no message carries gradients of weights, so no capture can feed it"
_STAYS = (
    "Not possible here: it needs the gradients of the hospital's weights, which never leave the hospital."
)

NOT_APPLICABLE: dict[str, NotApplicable] = {
    "fsha": NotApplicable(
        "Hijacked training (FSHA), simulated",
        "Pasquini, Ateniese, Bernaschi, CCS 2021 (arXiv 2012.02670)",
        "A cheating coordinator steers the hospital's network until it sends what can be turned into images.",
        "it changes the training it attacks, so no recording can feed it; splitpeer.attacks.hijack simulates it",
    ),
    "cafe": NotApplicable(
        "CAFE (not applicable)",
        "Jin et al. 2021 (arXiv 2110.15122)",
        _STAYS,
        f"needs the gradients of a fully connected layer of the site's network, and there is none{_WIRE}",
    ),
    "gradient-inversion": NotApplicable(
        "Gradient inversion (not applicable)",
        "Geiping et al. 2020 (arXiv 2003.14053); Yin et al. 2021 (arXiv 2104.07586)",
        _STAYS,
        f"needs the gradients of the site's parameters{_WIRE}",
    ),
}
"""By name, as in the catalogue."""
