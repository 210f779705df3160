"""Which side may send which message when: the tables from which diagrams and checks are made (SP-9).

Each link has two state machines, one per side. A message moves the machine of its sender, whether it
is being sent or received; some messages also move the other side's machine (TRIGGERS). What a table does
not list is an `UnexpectedMessage`; so is a message of a service whose feature was not agreed (SERVICES). `error` is
allowed in every state but ERROR and leads there.
"""

from __future__ import annotations

from collections.abc import Collection
from enum import Enum

from .errors import UnexpectedMessage


class Side(Enum):
    """In version 1 the client dials and the coordinator listens: hospitals never open a port."""

    CLIENT = "client"
    COORDINATOR = "coordinator"

    @property
    def other(self) -> Side:
        """The peer's side."""
        return Side.COORDINATOR if self is Side.CLIENT else Side.CLIENT


class State(Enum):
    """States of one side of a link."""

    START = "start"
    """Nothing said yet."""
    GREETED = "greeted"
    """The client has said hello; the next word is the coordinator's."""
    READY = "ready"
    """Admitted; no job yet."""
    OFFERED = "offered"
    """A job is on the table."""
    JOINED = "joined"
    """The job is accepted; inventories are compared."""
    WORKING = "working"
    """Batches flow."""
    DONE = "done"
    """Has said bye, and waits for the other's."""
    ERROR = "error"
    """Has sent or received error: nothing follows."""


S = State

TRANSITIONS: dict[Side, dict[State, dict[str, State]]] = {
    Side.CLIENT: {
        S.START: {"hello": S.GREETED},
        S.GREETED: {},
        S.READY: {"probed": S.READY, "bye": S.DONE},
        S.OFFERED: {"job-accept": S.JOINED, "job-decline": S.READY, "bye": S.DONE},
        S.JOINED: {"inventory": S.JOINED, "fusion-key": S.JOINED, "bye": S.DONE},
        S.WORKING: {
            "activations": S.WORKING,
            "withdraw": S.WORKING,
            "revoked": S.WORKING,
            "applied": S.WORKING,
            "advanced": S.WORKING,
            "shared": S.WORKING,
            "averaged": S.WORKING,
            "loss-gradients": S.WORKING,
            "scores": S.WORKING,
            "saved": S.WORKING,
            "unsaved": S.WORKING,
            "rolled-back": S.WORKING,
            "segment": S.WORKING,
            "cancel": S.WORKING,
            "located": S.WORKING,
            "bye": S.DONE,
        },
        S.DONE: {},
        S.ERROR: {},
    },
    Side.COORDINATOR: {
        S.START: {},
        S.GREETED: {"welcome": S.READY},
        S.READY: {"probe": S.READY, "job-offer": S.OFFERED, "bye": S.DONE},
        S.OFFERED: {"bye": S.DONE},
        # SP-11.18-7: "and only then `begin`", after which the keys never change
        S.JOINED: {"fusion-keys": S.JOINED, "begin": S.WORKING, "bye": S.DONE},
        S.WORKING: {
            "forward": S.WORKING,
            "withdrawn": S.WORKING,
            "gradients": S.WORKING,
            "advance": S.WORKING,
            "share": S.WORKING,
            "average": S.WORKING,
            "logits": S.WORKING,
            "prediction": S.WORKING,
            "conclude": S.WORKING,
            "checkpoint": S.WORKING,
            "rollback": S.WORKING,
            "settled": S.WORKING,
            "progress": S.WORKING,
            "locate": S.WORKING,
            "segmenting": S.WORKING,
            "segmented": S.WORKING,
            "unsegmented": S.WORKING,
            "bye": S.DONE,
        },
        S.DONE: {},
        S.ERROR: {},
    },
}

# message -> for the receiver: {state it may be in: state it goes to}. A side that has said bye stays
# in DONE whatever it receives: the other may not have read the bye yet.
TRIGGERS: dict[str, dict[State, State]] = {
    "hello": {S.START: S.GREETED},
    "welcome": {S.GREETED: S.READY},
    "job-offer": {S.READY: S.OFFERED},
    "job-accept": {S.OFFERED: S.JOINED},
    "job-decline": {S.OFFERED: S.READY},
    "begin": {S.JOINED: S.WORKING},
}


# feature -> its messages. One that is listed nowhere needs no feature; one that is listed more than once names its
# service in the field `mode`, or belongs to them all.
SERVICES: dict[str, tuple[str, ...]] = {
    "train": (
        "forward",
        "activations",
        "withdraw",
        "withdrawn",
        "gradients",
        "applied",
        "advance",
        "advanced",
        "checkpoint",
        "saved",
        "unsaved",
        "rollback",
        "rolled-back",
    ),
    "evaluate": ("forward", "activations", "withdraw", "withdrawn"),
    "average": ("share", "shared", "average", "averaged"),
    # SP-11.17-1: all of a job with frozen encoders, so no gradients, weights or checkpoints are spoken of in one.
    "release": ("forward", "activations", "withdraw", "withdrawn"),
    "fuse": ("fusion-key", "fusion-keys", "settled"),
    "infer": (
        "forward",
        "activations",
        "withdraw",
        "segment",
        "cancel",
        "locate",
        "located",
        "segmenting",
        "segmented",
        "unsegmented",
    ),
    "label": ("logits", "loss-gradients", "prediction", "conclude", "scores"),
    "probe": ("probe", "probed"),
}


class Conversation:
    """Both machines of one link.

    Args:
        features: those that were agreed; none before welcome.
    """

    def __init__(self, features: Collection[str] = ()) -> None:
        self.states: dict[Side, State] = dict.fromkeys(Side, S.START)
        self.features = features
        self.unanswered = 0
        """Probes that wait for their answers."""

    def say(self, side: Side, message: str, mode: str = "") -> None:
        """`side` says `message`: move its machine, and the other's if the message is a trigger.

        Args:
            mode: what the message's field `mode` says, if it has one.

        Raises:
            UnexpectedMessage: the tables do not allow it now, or its feature was not agreed; nothing has moved.
        """
        self.states = self.check(side, message, mode)
        self.unanswered += {"probe": 1, "probed": -1}.get(message, 0)

    def check(self, side: Side, message: str, mode: str = "") -> dict[Side, State]:
        """Where `say` would lead, without moving; raises what it raises."""
        own, other = self.states[side], self.states[side.other]
        if message == "error" and own is not S.ERROR:
            return {side: S.ERROR, side.other: S.ERROR}
        target = TRANSITIONS[side][own].get(message)
        trigger = TRIGGERS.get(message)
        # SP-9-2: "A side in DONE ignores what crosses its bye."
        answered = other if trigger is None or other is S.DONE else trigger.get(other)
        if target is None or answered is None:
            raise UnexpectedMessage(
                f"a {message} from the {side.value} while {own.value} (the other: {other.value})"
            )
        # SP-9-8: "It is allowed only where one of its features was agreed"
        serving = [feature for feature, words in SERVICES.items() if message in words]
        if serving and not any(one in self.features and mode in ("", one) for one in serving):
            wanted = mode or " or ".join(serving)
            raise UnexpectedMessage(f"a {message} of the feature {wanted}, which was not agreed on this link")
        # SP-11.22-2; before memory is taken for what nobody reads.
        if message == "probed" and not self.unanswered:
            raise UnexpectedMessage("a probed that no probe asked for")
        return {side: target, side.other: answered}

    @property
    def finished(self) -> bool:
        """Both sides have said bye, or one has said error."""
        return all(state in (S.DONE, S.ERROR) for state in self.states.values())
