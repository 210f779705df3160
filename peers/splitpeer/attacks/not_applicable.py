"""Attacks that no capture can feed, and why.

What crosses the wire with tensors is `activations` and `gradients`, and a gradient has exactly the shape of the
activations it answers: the derivative of the loss with respect to what was sent, never to a weight. A site's
weights, their gradients and their updates stay at the site; a site that shares any of these by other means is
exposed to the attacks that need them.
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


_WIRE = "; the wire carries activations and their gradients only, so no capture can feed it"
_STAYS = "Not possible here: it needs the changes of the hospital's network, which never leave the hospital."

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
