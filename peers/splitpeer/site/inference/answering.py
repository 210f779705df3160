"""What a site says and refuses when its coordinator segments a patient (SP-11.19)."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

from splitpeer.settings.bounds import Bounds
from splitpeer.site.budgets import BudgetSpent, new_inference
from splitproto.errors import PolicyRefused
from splitproto.messages import Forward, Locate

Origin = tuple[int, int, int]
Owns = Callable[[bytes, bytes], bool]
"""Whether a request (its id, the patient's key) is one that this site made itself."""


@dataclass(frozen=True)
class Terms:
    """[policy] of inference."""

    whom: str = "none"
    """none, own or listed."""
    sites: Collection[str] = ()
    """Those that are listed."""


class Answering:
    """Whose patients may be asked for on the present link, and which windows were.

    Args:
        terms: of the policy.
        bounds: how many requests a day.
        state: [peer] state, where they are counted.
    """

    def __init__(self, terms: Terms, bounds: Bounds, state: Path) -> None:
        self._terms, self._bounds, self._state = terms, bounds, state
        self._asked: dict[bytes, set[Origin]] = {}

    @property
    def serves(self) -> bool:
        """Whether this site takes part at all."""
        return self._terms.whom != "none"

    def admit(self, asked: Locate, owns: Owns) -> bool:
        """Whether the policy lets this site take part; counted if it does.

        Raises:
            DataError: it cannot be counted.
        """
        # SP-11.19-4: "MUST compare `request` and `key` with those of its own"
        own = owns(asked.request, asked.key)
        if not self.serves or not (
            own or (self._terms.whom == "listed" and asked.asker in self._terms.sites)
        ):
            return False
        try:
            new_inference(self._state, self._bounds, asked.request, asked.key)
        except BudgetSpent:
            return False
        return True

    def open(self, key: bytes) -> None:
        """The patient is located: each window may be asked for once."""
        self._asked[key] = set()

    def close(self) -> None:
        """The link is new."""
        self._asked.clear()

    def unlocated(self, keys: Collection[bytes]) -> bool:
        """Whether one of these patients is not located on this link."""
        return not set(keys) <= self._asked.keys()

    def check(self, forward: Forward) -> None:
        """SP-11.19-8: a `forward` of mode infer; its windows count as asked for from now on.

        Raises:
            PolicyRefused: it is not what a `locate` allows.
        """
        if forward.seed is not None or forward.places is not None:
            raise PolicyRefused("inference has neither a seed nor places")
        keys = {sample.key for sample in forward.samples}
        if len(keys) > 1 or not keys <= self._asked.keys():
            raise PolicyRefused("inference was asked for of a patient who was not located on this link")
        asked = self._asked[keys.pop()]
        windows = {sample.origin for sample in forward.samples}
        if len(windows) < len(forward.samples) or windows & asked:
            raise PolicyRefused("inference was asked for twice of one window")
        asked |= windows
