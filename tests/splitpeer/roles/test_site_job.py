"""A site's half of a run between two links: what it says of itself, what it keeps, what it goes back to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from splitpeer.daemon import happenings as h
from splitpeer.data.sampling import TrainingSchedule, batch_digest
from splitpeer.errors import DataError, JobFailed, PatientUnusable
from splitpeer.federation.terms import cut_descriptors, job_on_wire, window_of
from splitpeer.site.announced import MOST_WAITING
from splitpeer.site.budgets import BudgetSpent
from splitpeer.site.job import SiteJob
from splitpeer.site.opening import open_job
from splitpeer.storage import checkpoint
from splitproto.errors import Misaligned, SchemaMismatch, StepMismatch, UnexpectedMessage
from splitproto.messages import Activations, Average, Forward, Gradients, JobOffer, Share, Withdraw
from splitproto.records import Seat, Unusable
from splitproto.tensors import schema_digest

from .scene import Scene

RUN = bytes(range(16))


@pytest.fixture
def begin(scene: Scene, request: pytest.FixtureRequest) -> Callable[[], SiteJob]:
    """A process of one site that takes up the run; a parameter holds more of [training]."""
    scene.cast("t1", training={"steps": 20, **getattr(request, "param", {})})
    scene.client("t1", runtime={"initial_weights": "private"})
    job = job_on_wire(scene.settings)
    offer = JobOffer(RUN, (Seat("t1", ("t1",)),), job, schema_digest(cut_descriptors(job)))
    return lambda: open_job(offer, scene.config("site-t1"), h.Reporter())


@pytest.fixture
def batch(scene: Scene, begin: Callable[[], SiteJob]) -> Callable[..., Forward]:
    job = job_on_wire(scene.settings)
    drawn = TrainingSchedule(
        scene.patients()[0],
        scene.masks(),
        window=window_of(job),
        batch=job.batch,
        steps=job.steps,
        seed=1,
        positive_fraction=0.5,
    )

    def of(step: int, mode: str = "train") -> Forward:
        samples, seed = drawn.batch(step)
        seed = seed if job.augment and mode == "train" else None
        return Forward(mode, step, 0, tuple(samples), batch_digest(step, samples, seed), seed)

    return of


def work(site: SiteJob, asked: Forward) -> None:
    """One step with gradients that are all alike."""
    site.announce(asked)
    due = site.due()
    assert due == asked
    sent = site.forward(due)
    site.apply(Gradients(due.step, {name: np.full_like(t, 1e-3) for name, t in sent.tensors.items()}))


def weights(site: SiteJob) -> dict[str, Any]:
    return site.encoders.state()[0]


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_new_incarnation_says_0_whatever_lies_on_its_disk(begin, batch) -> None:
    """SP-11-3: and its weights of step 0 are those of the run, not others that were drawn later."""
    first = begin()
    assert (first.applied, first.checkpoints()) == (0, (0,)), "saved before it accepts"
    at_0, known = weights(first), first.incarnation
    for step in (1, 2):
        work(first, batch(step))
    first.save(2, keep=(0,))
    at_2 = weights(first)
    first.rollback(0)
    assert first.incarnation == known, "a rollback loses no memory"
    first.close()

    assert not same(at_0, at_2)
    second = begin()
    assert second.checkpoints() == (0,), "a rollback removes what came later"
    second.close()
    checkpoint.save(second.folder, 2, at_2, {"step": 2}, keep=(0,))
    third = begin()
    assert len({known, second.incarnation, third.incarnation}) == 3
    assert (third.applied, third.checkpoints()) == (0, (0, 2))
    assert same(weights(third), at_0)
    third.rollback(2)
    assert third.applied == 2
    assert same(weights(third), at_2)
    third.close()


class Flaky:
    """Reads of these patients' volumes fail; how often."""

    def __init__(self, site: SiteJob, monkeypatch: pytest.MonkeyPatch) -> None:
        self.left: dict[bytes, int] = {}
        (volumes,) = site.channels.volumes.values()
        really = volumes._volume

        def volume(key: bytes) -> np.ndarray:
            if self.left.get(key, 0) > 0:
                self.left[key] -= 1
                raise PatientUnusable(key, "unreadable", "/data/MUELLER_Erika.nii.gz: cannot be read")
            return really(key)

        monkeypatch.setattr(volumes, "_volume", volume)


def test_after_a_withdrawal_nothing_counts_until_it_is_told_where_to_go_on(begin, batch, monkeypatch) -> None:
    """SP-11.13-1, SP-11.13-3: also what was announced before the coordinator knew; and again when asked again."""
    site = begin()
    flaky = Flaky(site, monkeypatch)
    asked = batch(1)
    key = asked.samples[0].key
    flaky.left[key] = 99
    for _ in range(2):
        site.announce(asked)
        answer = site.forward(site.due())
        assert answer == Withdraw("train", 1, 0, asked.digest, (Unusable(key, "unreadable"),))
        site.announce(batch(0, "evaluate"))  # would be due
        assert site.due() is None
        site.advance(0)
        flaky.left[key] = 0  # repaired
    fit = next(b for b in map(batch, range(2, 20)) if key not in {sample.key for sample in b.samples})
    site.advance(fit.step - 1)
    work(site, fit)
    site.close()


@pytest.mark.parametrize("times", [1, 2])
def test_a_drive_that_falters_once_costs_nobody(begin, batch, monkeypatch, times: int) -> None:
    """SP-11.13-1: read again before the patient is given up; twice is too often."""
    site = begin()
    flaky = Flaky(site, monkeypatch)
    asked = batch(1)
    flaky.left[asked.samples[0].key] = times
    site.announce(asked)
    answer = site.forward(site.due())
    assert isinstance(answer, Activations if times == 1 else Withdraw)
    assert len(site.unusable) == times - 1
    site.close()


def test_activations_that_are_kept_are_sent_again_even_if_the_file_is_gone(begin, batch, monkeypatch) -> None:
    """SP-11.13-1, SP-11-16."""
    site = begin()
    flaky = Flaky(site, monkeypatch)
    asked = batch(1)
    site.announce(asked)
    sent = site.forward(site.due())
    site.forget_batches()  # a new link
    flaky.left = {sample.key: 99 for sample in asked.samples}
    site.announce(asked)
    assert site.forward(site.due()) is sent
    site.close()


def test_the_beginning_is_a_checkpoint_like_others(begin, batch) -> None:
    """SP-11-14, SP-11-33: not listed in `keep`, it goes; then nobody can go back to it."""
    site = begin()
    work(site, batch(1))
    site.save(1, keep=(0, 7))
    assert site.checkpoints() == (0, 1), "a step that it does not hold is passed over"
    work(site, batch(2))
    site.save(2, keep=(1,))
    assert site.checkpoints() == (1, 2)
    with pytest.raises(DataError, match="no such checkpoint"):
        site.rollback(0)
    with pytest.raises(StepMismatch):
        site.save(1)
    site.close()
    again = begin()
    assert (again.applied, again.checkpoints()) == (0, (1, 2))
    again.rollback(2)
    assert again.applied == 2
    again.close()


def test_batches_wait_for_their_turn_and_not_behind_it(begin, batch) -> None:
    """SP-11-6: gradients, or an `advance`, will come."""
    site = begin()
    site.announce(batch(3))
    assert site.due() is None
    site.advance(2)
    assert site.due() is None, "what was announced before an `advance` is void"
    site.announce(batch(3))
    assert site.due() == batch(3)
    site.announce(batch(2))
    with pytest.raises(StepMismatch, match=r"asked for step 2 \(train\) after step 2 was applied"):
        site.due()
    site.close()


def test_an_evaluation_is_due_when_its_step_is_the_last_applied(begin, batch) -> None:
    """SP-11-6, SP-11-17."""
    site = begin()
    site.announce(batch(1, "evaluate"))
    assert site.due() is None
    site.advance(1)
    before = weights(site)
    site.announce(batch(1, "evaluate"))
    due = site.due()
    assert due is not None and site.forward(due).mode == "evaluate"
    assert not site.waiting_for_gradients and same(weights(site), before)
    site.announce(batch(0, "evaluate"))
    with pytest.raises(StepMismatch):
        site.due()
    site.close()


def test_an_advance_keeps_weights_and_forgets_what_was_pending(begin, batch) -> None:
    """SP-11-31."""
    site = begin()
    work(site, batch(1))
    site.announce(batch(2))
    site.forward(site.due())
    assert site.waiting_for_gradients
    before = weights(site)
    site.advance(1)
    assert (site.applied, site.waiting_for_gradients) == (1, False)
    site.advance(5)
    assert site.applied == 5
    assert same(weights(site), before)
    for impossible in (4, 21):
        with pytest.raises(StepMismatch):
            site.advance(impossible)
    site.close()


def test_a_batch_asked_for_again_is_answered_again_and_applied_once(begin, batch) -> None:
    """SP-11-16, SP-11-11: after a lost link the same octets leave, and the same graph waits for its gradients."""
    site = begin()
    site.announce(batch(1))
    first = site.forward(site.due())
    site.forget_batches()
    site.announce(batch(1))
    assert site.forward(site.due()) is first
    gradients = Gradients(1, {name: np.full_like(t, 1e-3) for name, t in first.tensors.items()})
    site.apply(gradients)
    with pytest.raises(StepMismatch, match="gradients of step 1, but 1 was the last applied here"):
        site.apply(gradients)
    site.close()


def test_a_share_of_a_batch_is_augmented_as_in_the_whole(begin, batch) -> None:
    """SP-11-27, SP-11.7-1: the site has only the second sample of the batch."""
    site, whole = begin(), batch(1)
    assert whole.seed is not None
    chosen, places = whole.samples[1:2], (1,)
    share = replace(whole, samples=chosen, places=places, digest=batch_digest(1, chosen, whole.seed, places))
    site.announce(share)
    sent = site.forward(site.due())
    assert isinstance(sent, Activations) and {len(array) for array in sent.tensors.values()} == {1}
    np.testing.assert_array_equal(site._read(share)["t1"], site._read(whole)["t1"][1:2])
    assert not np.array_equal(site._read(replace(share, places=None))["t1"], site._read(share)["t1"])
    with pytest.raises(Misaligned):
        site.announce(replace(share, places=(0,)))


# --- averages ----------------------------------------------------------------------------------------------

averaging = pytest.mark.parametrize("begin", [{"average_every": 2}], indirect=True)


def shared(site: SiteJob, step: int) -> dict[str, np.ndarray]:
    told = site.share(Share(step, 0))
    assert (told.step, told.seat) == (step, 0)
    return dict(told.tensors)


def halved(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: array / 2 for name, array in tensors.items()}


def alike(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


@averaging
def test_a_step_is_made_from_the_average_and_a_checkpoint_before_it_is_of_ones_own(begin, batch) -> None:
    """SP-11.16-2, SP-11.16-5, SP-11.16-6."""
    site = begin()
    for step in (1, 2):
        work(site, batch(step))
    own, before = shared(site, 2), weights(site)
    mean = halved(own)
    taken = site.take_average(Average(2, 0, mean))
    assert (taken.step, taken.seat) == (2, 0)
    assert alike(shared(site, 2), own)
    site.save(2)
    site.advance(2)
    site.announce(batch(3))
    sent = site.forward(site.due())
    again = begin()
    again.rollback(2)
    assert same(weights(again), before)
    again.announce(batch(3))
    other = again.forward(again.due())
    assert not alike(dict(sent.tensors), dict(other.tensors)), "activations are those of the average"
    # SP-11.16-7: who forgot it gets it again.
    again.rollback(2)
    again.take_average(Average(2, 0, mean))
    again.announce(batch(3))
    assert alike(dict(sent.tensors), dict(again.forward(again.due()).tensors))


@averaging
def test_weights_are_told_only_when_an_average_is_due(begin, batch) -> None:
    """SP-11.16-2."""
    site = begin()
    own = shared(site, 0)
    work(site, batch(1))
    for step in (0, 1, 2):
        with pytest.raises(StepMismatch):
            site.share(Share(step, 0))
        with pytest.raises(StepMismatch):
            site.take_average(Average(step, 0, own))
    work(site, batch(2))
    assert not alike(shared(site, 2), own)
    with pytest.raises(UnexpectedMessage):
        site.share(Share(2, 1))
    with pytest.raises(UnexpectedMessage):
        site.take_average(Average(2, 1, own))
    site.announce(batch(3))
    site.forward(site.due())
    with pytest.raises(StepMismatch):
        site.share(Share(2, 0))
    with pytest.raises(StepMismatch):
        site.take_average(Average(2, 0, own))


@averaging
@pytest.mark.parametrize("announced_before", [True, False])
def test_no_evaluation_is_answered_between_an_average_and_its_step(
    begin, batch, announced_before: bool
) -> None:
    """SP-11.16-1: nor one that was announced before the average came."""
    site = begin()
    asked = batch(1, "evaluate")
    asked = replace(asked, step=0, digest=batch_digest(0, asked.samples, asked.seed))
    site.announce(asked)
    site.forward(site.due())
    if announced_before:
        site.announce(asked)
    site.take_average(Average(0, 0, halved(shared(site, 0))))
    if not announced_before:
        site.announce(asked)
    with pytest.raises(StepMismatch, match="between the average after step 0 and its step"):
        site.forward(site.due())
    work(site, batch(1))
    later = replace(asked, step=1, digest=batch_digest(1, asked.samples, asked.seed))
    site.announce(later)
    site.forward(site.due())


@averaging
def test_averages_of_one_step_are_counted_beyond_the_process(begin, scene) -> None:
    """SP-11.16-9."""
    scene.client("t1", runtime={"initial_weights": "private"}, policy={"max_step_repeats": 3})
    site = begin()
    own = shared(site, 0)
    for _ in range(2):
        site.take_average(Average(0, 0, own))
    site.close()
    site = begin()
    site.take_average(Average(0, 0, own))
    with pytest.raises(BudgetSpent, match=r"more than 3 times \(max_step_repeats\)"):
        site.take_average(Average(0, 0, own))
    site.close()


def test_a_job_that_does_not_average_is_told_no_weights(begin, batch) -> None:
    """SP-11.16-2."""
    site = begin()
    with pytest.raises(UnexpectedMessage):
        site.share(Share(0, 0))


@averaging
def test_an_average_of_another_encoder_is_not_taken(begin) -> None:
    """SP-11.16-3."""
    site = begin()
    own = shared(site, 0)
    first = next(iter(own))
    for wrong in (
        {name: array for name, array in own.items() if name != first},
        {**own, "more": own[first]},
        dict(reversed(own.items())),
        {**own, first: own[first][:1]},
        {**own, first: own[first].astype(np.float64)},
    ):
        with pytest.raises(SchemaMismatch):
            site.take_average(Average(0, 0, wrong))
    with pytest.raises(JobFailed, match="not finite"):
        site.take_average(Average(0, 0, {**own, first: np.full_like(own[first], np.nan)}))
    with pytest.raises(JobFailed, match="beyond 1024"):
        site.take_average(Average(0, 0, {**own, first: np.full_like(own[first], 3e38)}))
    assert alike(shared(site, 0), own)


@pytest.mark.parametrize(
    "other",
    [
        lambda offer: replace(offer, seats=(Seat("mri", ("t1",)),)),
        lambda offer: replace(offer, job=replace(offer.job, learning_rate=offer.job.learning_rate / 2)),
        lambda offer: replace(offer, job=replace(offer.job, steps=offer.job.steps + 1)),
    ],
    ids=["seat", "learning rate", "steps"],
)
def test_a_restarted_site_keeps_to_the_terms_of_a_run(
    scene: Scene, begin: Callable[[], SiteJob], other: Callable[[JobOffer], JobOffer]
) -> None:
    """SP-11-2: a checkpoint of one seat would be taken for another's."""
    begin().close()
    job = job_on_wire(scene.settings)
    offer = JobOffer(RUN, (Seat("t1", ("t1",)),), job, schema_digest(cut_descriptors(job)))
    with pytest.raises(SchemaMismatch, match="not those that this site accepted for the run"):
        open_job(other(offer), scene.config("site-t1"), h.Reporter())
    later = replace(offer, job=replace(job, seconds_per_step=job.seconds_per_step + 1))
    open_job(later, scene.config("site-t1"), h.Reporter()).close()


def test_so_many_batches_wait_and_no_more(begin, batch) -> None:
    """SP-11-6, SP-11.15-8: a refusal, not a wait in which the site hears nothing."""
    site = begin()
    later = [replace(batch(0, "evaluate"), batch=number) for number in range(MOST_WAITING + 1)]
    for forward in later[:-1]:
        site.announce(forward)
    with pytest.raises(BudgetSpent, match="more than 64 batches"):
        site.announce(later[-1])
    assert site.due() == later[0]
    site.announce(later[-1])
    with pytest.raises(BudgetSpent):
        site.announce(later[-1])
    site.close()
