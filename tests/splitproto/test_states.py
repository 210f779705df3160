"""The state tables: every pair of states and every message; and no legal message is unexpected on arrival."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitproto.errors import UnexpectedMessage
from splitproto.messages import MESSAGES
from splitproto.states import SERVICES, TRANSITIONS, TRIGGERS, Conversation, Side, State

CLIENT, COORDINATOR = Side.CLIENT, Side.COORDINATOR
S = State

# Written down apart from the tables: (client, coordinator) before, who says what, (client, coordinator) after.
CLIENTS = ("activations", "withdraw", "revoked", "applied", "advanced", "saved", "unsaved", "rolled-back")
COORDINATORS = (
    "forward",
    "withdrawn",
    "gradients",
    "advance",
    "checkpoint",
    "rollback",
    "settled",
    "progress",
)
ASKED = ("segment", "cancel")
ANSWERED = ("segmenting", "segmented", "unsegmented")
STORY = [
    ((S.START, S.START), CLIENT, "hello", (S.GREETED, S.GREETED)),
    ((S.GREETED, S.GREETED), COORDINATOR, "welcome", (S.READY, S.READY)),
    ((S.READY, S.READY), COORDINATOR, "probe", (S.READY, S.READY)),
    ((S.READY, S.READY), CLIENT, "probed", (S.READY, S.READY)),
    ((S.READY, S.READY), COORDINATOR, "job-offer", (S.OFFERED, S.OFFERED)),
    ((S.OFFERED, S.OFFERED), CLIENT, "job-decline", (S.READY, S.READY)),
    ((S.OFFERED, S.OFFERED), CLIENT, "job-accept", (S.JOINED, S.JOINED)),
    ((S.JOINED, S.JOINED), CLIENT, "inventory", (S.JOINED, S.JOINED)),
    ((S.JOINED, S.JOINED), CLIENT, "fusion-key", (S.JOINED, S.JOINED)),
    ((S.JOINED, S.JOINED), COORDINATOR, "fusion-keys", (S.JOINED, S.JOINED)),
    ((S.JOINED, S.JOINED), COORDINATOR, "begin", (S.WORKING, S.WORKING)),
    *(
        ((S.WORKING, S.WORKING), CLIENT, name, (S.WORKING, S.WORKING))
        for name in (*CLIENTS, "shared", "averaged", *ASKED, "located", "loss-gradients", "scores")
    ),
    *(
        ((S.WORKING, S.WORKING), COORDINATOR, name, (S.WORKING, S.WORKING))
        for name in (
            *COORDINATORS,
            "share",
            "average",
            *ANSWERED,
            "locate",
            "logits",
            "prediction",
            "conclude",
        )
    ),
    *(
        ((state, state), CLIENT, "bye", (S.DONE, state))
        for state in (S.READY, S.OFFERED, S.JOINED, S.WORKING)
    ),
    *(
        ((state, state), COORDINATOR, "bye", (state, S.DONE))
        for state in (S.READY, S.OFFERED, S.JOINED, S.WORKING)
    ),
]


def conversation(
    client: State, coordinator: State, features: Collection[str] = tuple(SERVICES)
) -> Conversation:
    result = Conversation(features)
    result.states = {CLIENT: client, COORDINATOR: coordinator}
    result.unanswered = 1
    return result


def both(talk: Conversation) -> tuple[State, State]:
    return talk.states[CLIENT], talk.states[COORDINATOR]


@pytest.mark.parametrize(("before", "side", "message", "after"), STORY)
def test_the_story(before: tuple[State, State], side: Side, message: str, after: tuple[State, State]) -> None:
    talk = conversation(*before)
    talk.say(side, message)
    assert both(talk) == after


def test_while_both_are_in_one_state_nothing_but_the_story_is_allowed() -> None:
    told = {(before, side, message) for before, side, message, _ in STORY}
    for state, side, message in product(State, Side, MESSAGES):
        talk = conversation(state, state)
        allowed = ((state, state), side, message) in told or (message == "error" and state is not S.ERROR)
        if allowed:
            talk.say(side, message)
            continue
        with pytest.raises(UnexpectedMessage):
            talk.say(side, message)
        assert both(talk) == (state, state)


def test_every_pair_of_states_side_and_message_follows_the_tables_or_moves_nothing() -> None:
    for client, coordinator, side, message in product(State, State, Side, MESSAGES):
        talk = conversation(client, coordinator)
        own, other = talk.states[side], talk.states[side.other]
        if message == "error":
            legal, after = own is not S.ERROR, (S.ERROR, S.ERROR)
        else:
            target = TRANSITIONS[side][own].get(message)
            trigger = TRIGGERS.get(message, {state: state for state in State})
            answer = S.DONE if other is S.DONE else trigger.get(other)
            legal = target is not None and answer is not None
            after = (target, answer) if side is CLIENT else (answer, target)  # type: ignore[assignment]
        if legal:
            talk.say(side, message)
            assert both(talk) == after
        else:
            with pytest.raises(UnexpectedMessage, match=message):
                talk.say(side, message)
            assert both(talk) == (client, coordinator)


# Written down apart from the table: what each feature, and each mode of a message, lets pass.
EITHER = {"forward", "activations", "withdraw"}
TRAINING = {
    *("gradients", "applied", "advance", "advanced"),
    *("checkpoint", "saved", "unsaved", "rollback", "rolled-back"),
}
AVERAGING = {"share", "shared", "average", "averaged"}
INFERRING = {*ASKED, *ANSWERED, "locate", "located"}
FUSING = {"fusion-key", "fusion-keys", "settled"}
LABELLING = {"logits", "loss-gradients", "prediction", "conclude", "scores"}
PROBING = {"probe", "probed"}


def lets_pass(features: Collection[str], message: str, mode: str) -> bool:
    """Whether `message` belongs to no feature, or to one of these."""
    if message in TRAINING:
        return "train" in features and mode in ("", "train")
    if message in AVERAGING:
        return "average" in features and mode in ("", "average")
    if message in FUSING:
        return "fuse" in features and mode in ("", "fuse")
    if message in LABELLING:
        return "label" in features and mode in ("", "label")
    if message in PROBING:
        return "probe" in features and mode in ("", "probe")
    if message in INFERRING:
        return "infer" in features and mode in ("", "infer")
    if message in EITHER or message == "withdrawn":
        services = {"train", "evaluate", "release"} | ({"infer"} if message in EITHER else set())
        return mode in services & set(features) if mode else bool(services & set(features))
    return True


@pytest.mark.parametrize(
    "features",
    [
        (),
        ("dtype.f32",),
        ("train",),
        ("evaluate",),
        ("train", "evaluate"),
        ("average",),
        ("fuse",),
        ("label",),
        ("probe",),
        ("release",),
        ("release", "evaluate"),
        ("infer",),
        ("release", "infer"),
        ("example.org/train",),
    ],
    ids=lambda features: "+".join(features) or "none",
)
def test_a_message_whose_feature_was_not_agreed_is_unexpected_in_every_state(
    features: tuple[str, ...],
) -> None:
    """SP-9-8, over all states, messages and modes: it may never do more than with all features."""
    for client, coordinator, side, message in product(State, State, Side, MESSAGES):
        for mode in ("", "train", "evaluate", "infer", "release"):
            free = conversation(client, coordinator)
            talk = conversation(client, coordinator, features)
            try:
                free.say(side, message)
            except UnexpectedMessage:
                legal = False
            else:
                legal = lets_pass(features, message, mode)
            if legal:
                talk.say(side, message, mode)
                assert both(talk) == both(free)
            else:
                with pytest.raises(UnexpectedMessage, match=message):
                    talk.say(side, message, mode)
                assert both(talk) == (client, coordinator)


def test_a_mode_without_a_feature_of_the_tables_is_refused_whatever_was_agreed() -> None:
    """SP-10-6."""
    talk = conversation(S.WORKING, S.WORKING, ("train", "evaluate", "infer", "guess"))
    with pytest.raises(UnexpectedMessage, match="a forward of the feature guess, which was not agreed"):
        talk.say(COORDINATOR, "forward", "guess")


def test_every_service_speaks_of_messages_that_the_states_know() -> None:
    spoken = {m for table in TRANSITIONS.values() for row in table.values() for m in row}
    for words in SERVICES.values():
        assert set(words) <= spoken and len(set(words)) == len(words)
    assert not {"hello", "welcome", "bye", "error"} & {m for words in SERVICES.values() for m in words}


def test_the_tables_are_complete() -> None:
    for side in Side:
        assert TRANSITIONS[side].keys() == set(State)
    spoken = {side: {m for row in TRANSITIONS[side].values() for m in row} for side in Side}
    assert spoken[CLIENT] | spoken[COORDINATOR] | {"error"} == MESSAGES.keys()
    assert spoken[CLIENT] & spoken[COORDINATOR] == {"bye"}
    assert TRIGGERS.keys() <= MESSAGES.keys()


def test_after_bye_or_error_a_side_says_nothing() -> None:
    for side, state, message in product(Side, (S.DONE, S.ERROR), MESSAGES):
        assert message not in TRANSITIONS[side][state]


def test_finished_is_two_byes_or_an_error() -> None:
    for client, coordinator in product(State, State):
        ended = {S.DONE, S.ERROR}
        assert conversation(client, coordinator).finished == (client in ended and coordinator in ended)


@given(
    st.lists(
        st.tuples(st.sampled_from(["say", "hear"]), st.sampled_from(Side), st.integers(0, 99)), max_size=80
    )
)
def test_no_word_that_was_legal_when_said_is_unexpected_when_heard(
    acts: list[tuple[str, Side, int]],
) -> None:
    """Two parties, each with its own view of both machines, and words that cross on the way."""
    views = {side: Conversation(SERVICES) for side in Side}
    flying: dict[Side, deque[str]] = {side: deque() for side in Side}
    inventory_over = False
    unanswered = heard = 0
    for act, side, choice in acts:
        if act == "hear":
            if flying[side]:
                word = flying[side].popleft()
                views[side].say(side.other, word)
                heard += word == "probe"
                unanswered -= word == "probed"
            continue
        legal = []
        for message in MESSAGES:
            if message == "error":
                continue
            trial = conversation(*both(views[side]))
            try:
                trial.say(side, message)
            except UnexpectedMessage:
                continue
            # Above the tables: "begin" answers the last inventory.
            if message == "begin" and not (inventory_over and not flying[COORDINATOR]):
                continue
            if message == "inventory" and inventory_over:
                continue
            # SP-11.22-2: each probe is answered once, and waited for.
            if (message == "probed" and not heard) or (message in ("probe", "job-offer") and unanswered):
                continue
            legal.append(message)
        if legal:
            message = legal[choice % len(legal)]
            inventory_over = inventory_over or message == "inventory"
            unanswered, heard = unanswered + (message == "probe"), heard - (message == "probed")
            views[side].say(side, message)
            flying[side.other].append(message)
