"""Attacks that this wire does not feed, and why: they need the gradients of a network's parameters.

What crosses the wire with tensors is `activations` and `gradients`, and a gradient has exactly the shape of the
activations it answers: the derivative of the loss by what was sent, never by a weight. A site's weights, their
gradients and their updates stay at the site. Whoever shares any of these beside this protocol is exposed to
these attacks.
"""

from __future__ import annotations

from typing import ClassVar, NoReturn

from splitpeer.attacks.base import Attack, Knowledge, Progress, View, silent
from splitpeer.errors import AttackImpossible


class _NeedsParameterGradients(Attack):
    goal = "image"
    role = "coordinator"
    lacks: ClassVar[str]
    """What is missing, in words."""

    def run(self, view: View, knowledge: Knowledge, progress: Progress = silent) -> NoReturn:
        """Raises AttackImpossible, always."""
        raise AttackImpossible(
            f"{self.name} needs {self.lacks}; the wire carries activations and their gradients only, so no "
            "capture can feed it"
        )


class GradientInversion(_NeedsParameterGradients):
    """Images from the gradients of a network's parameters, as federated averaging sends them."""

    name = "gradient-inversion"
    title = "Gradient inversion (not applicable)"
    source = "Geiping et al. 2020 (arXiv 2003.14053); Yin et al. 2021 (arXiv 2104.07586)"
    plain = (
        "Not possible here: it needs the changes of the hospital's network, which never leave the hospital."
    )
    lacks = "the gradients of the site's parameters"


class CAFE(_NeedsParameterGradients):
    """Images from the gradients of a fully connected layer's weights and biases."""

    name = "cafe"
    title = "CAFE (not applicable)"
    source = "Jin et al. 2021 (arXiv 2110.15122)"
    plain = (
        "Not possible here: it needs the changes of the hospital's network, which never leave the hospital."
    )
    lacks = "the gradients of a fully connected layer of the site's network, and there is none"
