"""Answers to the probes by which a coordinator measures a link before it offers a job (SP-11.22)."""

from __future__ import annotations

from splitproto.errors import UnexpectedMessage
from splitproto.messages import Probe, Probed
from splitproto.probes import filling


class ProbeAnswers:
    """Those of one link."""

    def __init__(self) -> None:
        self._answered = 0

    def to(self, probe: Probe) -> Probed:
        """As many octets as were asked for. Raises UnexpectedMessage: the probe is out of turn (SP-11.22-2)."""
        if probe.number != self._answered + 1:
            raise UnexpectedMessage(f"probe {probe.number} where {self._answered + 1} was due")
        self._answered += 1
        return Probed(probe.number, filling(probe.answer))
