"""Negotiation as a pure function of two offers."""

from __future__ import annotations

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from splitproto.errors import FeatureMissing, SplitprotoError, VersionMismatch
from splitproto.messages import Hello, Welcome
from splitproto.negotiation import Agreement, Offer, confirm, negotiate

NAMES = ["dtype.f32", "dtype.bf16", "train", "evaluate"]
LIMITS = st.integers(1, 1 << 40)


def hello(offer: Offer) -> Hello:
    return Hello(offer.versions, offer.features, offer.requires, offer.max_message, offer.agent, bytes(32))


def welcome(agreement: Agreement, own: Offer) -> Welcome:
    return Welcome(
        agreement.version, tuple(sorted(agreement.features)), own.max_message, own.agent, bytes(32)
    )


@st.composite
def offers(draw: st.DrawFn) -> Offer:
    features = draw(st.lists(st.sampled_from(NAMES), unique=True))
    return Offer(
        versions=tuple(draw(st.lists(st.integers(1, 4), min_size=1, unique=True))),
        features=tuple(features),
        requires=tuple(draw(st.lists(st.sampled_from(features), unique=True))) if features else (),
        max_message=draw(LIMITS),
        agent=draw(st.sampled_from(["a", "b"])),
    )


@given(offers(), offers())
def test_both_sides_reach_the_same_agreement_or_none(client: Offer, coordinator: Offer) -> None:
    common = set(client.versions) & set(coordinator.versions)
    lacking = (set(client.requires) - set(coordinator.features)) | (
        set(coordinator.requires) - set(client.features)
    )
    if not common or lacking:
        with pytest.raises(FeatureMissing if common else VersionMismatch) as caught:
            negotiate(coordinator, hello(client))
        assert not common or any(name in str(caught.value) for name in lacking)
        return
    theirs = negotiate(coordinator, hello(client))
    ours = confirm(client, welcome(theirs, coordinator))
    assert ours.version == theirs.version == max(common)
    assert ours.features == theirs.features == set(client.features) & set(coordinator.features)
    assert (ours.send_limit, ours.receive_limit) == (theirs.receive_limit, theirs.send_limit)
    assert (ours.send_limit, theirs.send_limit) == (coordinator.max_message, client.max_message)
    assert (ours.peer_agent, theirs.peer_agent) == (coordinator.agent, client.agent)


@given(offers(), st.integers(1, 255))
def test_a_version_that_was_not_offered_is_refused(own: Offer, version: int) -> None:
    assume(version not in own.versions)
    with pytest.raises(VersionMismatch):
        confirm(own, Welcome(version, own.features, 1, "", bytes(32)))


def test_a_downgrade_of_features_is_refused() -> None:
    own = Offer(requires=("dtype.f32",))
    with pytest.raises(FeatureMissing):
        confirm(own, Welcome(1, ("train",), 1, "", bytes(32)))
    with pytest.raises(FeatureMissing):
        confirm(own, Welcome(1, ("dtype.f32", "org.example/x"), 1, "", bytes(32)))


def test_the_message_names_both_lists() -> None:
    with pytest.raises(VersionMismatch, match=r"client speaks 2, 3.*coordinator 1"):
        negotiate(Offer(), hello(Offer(versions=(3, 2))))


def test_names_from_a_peer_do_not_break_the_log_line() -> None:
    bad = "x\nINFO all is well\u202e"
    with pytest.raises(SplitprotoError) as caught:
        negotiate(Offer(), hello(Offer(features=("dtype.f32",), requires=(bad,))))
    assert str(caught.value).isprintable()
