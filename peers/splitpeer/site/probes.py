"""Answers to the probes by which a coordinator measures a link before it offers a job (SP-11.22)."""

from __future__ import annotations

from splitpeer.daemon import happenings as h
from splitproto.codec import bin_header
from splitproto.errors import MessageTooLarge, UnexpectedMessage
from splitproto.messages import Probe, Probed
from splitproto.probes import filling


class ProbeTooLarge(MessageTooLarge):
    """The coordinator asked for more octets than it takes; the site stays up and ends this link."""


class ProbeAnswers:
    """Those of one link.

    Args:
        coordinator: who asks.
        most: octets of one message that it takes.
    """

    def __init__(self, coordinator: str, most: int) -> None:
        self._coordinator, self._most = coordinator, most
        self._answered = self._down = self._up = 0

    def to(self, probe: Probe) -> Probed:
        """As many octets as were asked for.

        Raises:
            UnexpectedMessage: the probe is out of turn (SP-11.22-2).
            ProbeTooLarge: the answer would be beyond the coordinator's limit (SP-10-7).
        """
        if probe.number != self._answered + 1:
            raise UnexpectedMessage(f"probe {probe.number} where {self._answered + 1} was due")
        if probe.answer and probe.answer + len(bin_header(probe.answer)) > self._most:
            raise ProbeTooLarge(
                f"probe {probe.number} asks for an answer of {probe.answer} octets, but the coordinator takes "
                f"{self._most}: have its max_message_mib raised"
            )
        self._answered += 1
        self._down += sum(array.nbytes for array in probe.tensors.values())
        self._up += probe.answer
        return Probed(probe.number, filling(probe.answer))

    def told(self) -> h.LinkProbed | None:
        """What was answered on this link; None: nothing was asked."""
        if not self._answered:
            return None
        return h.LinkProbed(self._coordinator, self._answered, self._down, self._up)
