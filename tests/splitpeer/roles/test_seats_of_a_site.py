"""One site fills several seats, and a seat has several channels: the same as the whole network in one process."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from splitpeer.daemon import happenings as h
from splitpeer.data.augment import augment
from splitpeer.data.loader import SiteData
from splitpeer.data.sampling import TrainingSchedule, batch_digest
from splitpeer.errors import DataError, JobFailed
from splitpeer.federation.seats import by_seat, joined
from splitpeer.federation.terms import (
    check_bounds,
    checkpoint_octets,
    encoder_parameters,
    job_on_wire,
    judge,
    seat_descriptors,
    window_of,
)
from splitpeer.models import SplitNetwork, build_decoder, build_encoder, site_seed
from splitpeer.models.registry import backbone_of
from splitpeer.settings.bounds import Bounds
from splitpeer.site.budgets import BudgetSpent
from splitpeer.site.job import SiteJob
from splitpeer.site.opening import open_job
from splitpeer.site.people import People
from splitpeer.storage import checkpoint
from splitpeer.training.loss import task_loss
from splitpeer.training.optimiser import make_optimiser, make_schedule
from splitpeer.training.split_step import CoordinatorHalf
from splitproto.errors import PolicyRefused, SchemaMismatch
from splitproto.messages import Forward, Gradients, JobOffer
from splitproto.records import Job, Sample, Seat
from splitproto.tensors import schema_digest

from .scene import PATIENTS, SEED, Scene

SEATS = (Seat("flair", ("flair",)), Seat("mri", ("t2", "t1")))
HELD = ("t1", "flair", "t2")
STEPS = 4


@pytest.fixture
def stage(scene: Scene) -> Scene:
    """A site that holds three of the four contrasts, in a folder of its own."""
    torch.set_num_threads(1)
    scene.cast("t1", training={"steps": STEPS, "batch": 3})
    for modality in HELD:
        shutil.copytree(scene.federation.data / modality, scene.folder / "images" / modality)
    own(scene)
    return scene


def own(scene: Scene, **over: Any) -> None:
    scene.client(
        "t1", **{**over, "peer": {"modality": list(HELD)}, "data": {"images": str(scene.folder / "images")}}
    )


def offer_of(job: Job, seats: tuple[Seat, ...] = SEATS) -> JobOffer:
    return JobOffer(bytes(range(16)), seats, job, schema_digest(seat_descriptors(job, seats)))


def opened(scene: Scene, seats: tuple[Seat, ...] = SEATS) -> SiteJob:
    config, offer = scene.config("site-t1"), offer_of(job_on_wire(scene.settings), seats)
    judge(offer, config)
    return open_job(offer, config, h.Reporter())


def test_a_job_whose_stacked_seat_nobody_fills_is_not_taken_up(stage: Scene) -> None:
    seat = next(seat for seat in SEATS if len(seat.modalities) > 1)
    for path in sorted((stage.folder / "images" / seat.modalities[0]).iterdir()):
        path.rename(path.with_name(f"x{path.name}"))
    with pytest.raises(DataError, match="no patient has all of"):
        opened(stage)


@pytest.fixture
def batch(stage: Scene) -> Callable[[int], Forward]:
    job = job_on_wire(stage.settings)
    drawn = TrainingSchedule(
        stage.patients()[0],
        stage.masks(),
        window=window_of(job),
        batch=job.batch,
        steps=job.steps,
        seed=SEED,
        positive_fraction=0.5,
    )

    def of(step: int) -> Forward:
        samples, seed = drawn.batch(step - 1)
        return Forward("train", step, 0, tuple(samples), batch_digest(step, samples, seed), seed)

    return of


def sent_by(site: SiteJob, asked: Forward) -> dict[str, np.ndarray]:
    site.announce(asked)
    due = site.due()
    assert due == asked
    return dict(site.forward(due).tensors)


class Whole:
    """The whole network in this process: encoders by seat, one decoder, one optimiser."""

    def __init__(self, scene: Scene, seats: tuple[Seat, ...]) -> None:
        job, task = job_on_wire(scene.settings), scene.task()
        backbone, names = backbone_of(job), [seat.name for seat in seats]
        self.scene, self.seats, self.task, self.job = scene, seats, task, job
        encoders = {
            s.name: build_encoder(backbone, len(s.modalities), seed=site_seed(SEED, s.name)) for s in seats
        }
        seed = site_seed(SEED, "coordinator")
        self.decoder = build_decoder(backbone, names, out_channels=task.channels, seed=seed)
        self.network = SplitNetwork(encoders, self.decoder)
        self.optimiser = make_optimiser(
            self.network.parameters(), job.optimiser, job.learning_rate, job.weight_decay
        )
        self.schedule = make_schedule(self.optimiser, job.schedule, job.steps)

    def images(self, asked: Forward) -> dict[str, np.ndarray]:
        """[B, channels, *spatial] by seat, channel by channel with nothing of the product but `SiteData`."""
        window = window_of(self.job)
        found = {}
        for seat in self.seats:
            plain = [SiteData(self.volumes(m)).batch(asked.samples, window, None, m) for m in seat.modalities]
            if asked.seed is not None:
                for channel, modality in zip(plain, seat.modalities, strict=True):
                    channel[:] = [augment(x, asked.seed, i, modality) for i, x in enumerate(channel)]
            found[seat.name] = np.concatenate(plain, axis=1)
        return found

    def volumes(self, modality: str) -> Any:
        config = self.scene.config("site-t1")
        from splitpeer.federation.images import find_cases, open_volumes

        return open_volumes(config, {modality: find_cases(config)[modality]})[modality]

    def target(self, asked: Forward) -> np.ndarray:
        return SiteData(self.scene.masks()).batch(asked.samples, window_of(self.job), asked.seed, None)

    def step(self, asked: Forward) -> float:
        images = {seat: torch.from_numpy(x) for seat, x in self.images(asked).items()}
        loss = task_loss(self.network(images), torch.from_numpy(self.target(asked)), exclusive=False)
        self.optimiser.zero_grad()
        loss.backward()
        self.optimiser.step()
        self.schedule.step()
        return loss.item()


def coordinator_of(whole: Whole) -> CoordinatorHalf:
    job = whole.job
    seed = site_seed(SEED, "coordinator")
    names = [seat.name for seat in whole.seats]
    decoder = build_decoder(backbone_of(job), names, out_channels=whole.task.channels, seed=seed)
    optimiser = make_optimiser(decoder.parameters(), job.optimiser, job.learning_rate, job.weight_decay)
    return CoordinatorHalf(decoder, optimiser, make_schedule(optimiser, job.schedule, job.steps))


@pytest.mark.parametrize(
    "seats",
    [(Seat("mri", ("t2", "t1")),), SEATS, (Seat("flair", ("flair",)), Seat("t1", ("t1",)))],
    ids=["two channels", "two seats, one with two channels", "two seats"],
)
def test_it_is_the_whole_network_bit_for_bit(stage: Scene, batch, seats: tuple[Seat, ...]) -> None:
    site, whole = opened(stage, seats), Whole(stage, seats)
    half = coordinator_of(whole)
    for step in range(1, STEPS + 1):
        asked = batch(step)
        sent = sent_by(site, asked)
        assert [*sent] == [d.name for d in seat_descriptors(whole.job, seats)]
        if len(seats) == 1:
            assert "/" not in "".join(sent)
        loss, gradients = half.step(by_seat(sent, seats), whole.target(asked))
        site.apply(Gradients(step, joined(gradients, seats)))
        assert loss == whole.step(asked)
    for seat in seats:
        mine, others = site.encoders.halves[seat.name].network, whole.network.encoders[seat.name]
        for name, tensor in others.state_dict().items():
            assert torch.equal(mine.state_dict()[name], tensor), (seat.name, name)
    site.close()


def test_a_patient_who_lacks_a_channel_has_no_row_at_that_seat(stage: Scene, batch) -> None:
    """SP-11.8-5, SP-11-4."""
    asked = batch(1)
    keys = {stage.key(patient): patient for patient in PATIENTS}
    gone = asked.samples[1].key
    (stage.folder / "images" / "t2" / f"{keys[gone]}.nii.gz").unlink()
    site, whole = opened(stage), Whole(stage, SEATS[:1])
    patients, unusable = site.inventory()
    assert {patient.key: patient.seats for patient in patients}[gone] == (0,)
    assert {patient.seats for patient in patients if patient.key != gone} == {None}
    assert unusable == []
    assert site.filled(patients) == {"flair": len(PATIENTS), "mri (t2, t1)": len(PATIENTS) - 1}
    rows = [number for number, sample in enumerate(asked.samples) if sample.key != gone]
    sent = sent_by(site, asked)
    described = seat_descriptors(whole.job, SEATS, {"flair": len(asked.samples), "mri": len(rows)})
    assert {name: array.shape for name, array in sent.items()} == {d.name: d.shape for d in described}
    images = site._read(asked)
    np.testing.assert_array_equal(images["flair"], whole.images(asked)["flair"])
    # Rows keep their place in the batch, by which they are augmented.
    of_t1 = Whole(stage, (Seat("t1", ("t1",)),)).images(asked)["t1"]
    np.testing.assert_array_equal(images["mri"][:, 1:], of_t1[rows])
    samples = tuple(asked.samples[row] for row in rows)
    share = dataclasses.replace(
        asked, samples=samples, places=tuple(rows), digest=batch_digest(1, samples, asked.seed, rows)
    )
    np.testing.assert_array_equal(images["mri"], site._read(share)["mri"])
    # A batch of nobody who fills a seat leaves it out.
    alone = (Sample(gone, asked.samples[1].origin),)
    site.forget_batches()
    asked = Forward("train", 1, 0, alone, batch_digest(1, alone, None))
    assert {name.partition("/")[0] for name in sent_by(site, asked)} == {"flair"}
    site.close()


def state(site: SiteJob, seat: str) -> dict[str, torch.Tensor]:
    return {name: t.clone() for name, t in site.encoders.halves[seat].network.state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


def small(sent: dict[str, np.ndarray], *seats: str) -> dict[str, np.ndarray]:
    return {
        name: np.full_like(array, 1e-3) for name, array in sent.items() if name.partition("/")[0] in seats
    }


def test_gradients_may_leave_a_seat_out_and_nothing_smaller(stage: Scene, batch) -> None:
    """SP-11-10: its encoder stays as it is, and counts on."""
    site = opened(stage)
    before = {seat.name: state(site, seat.name) for seat in SEATS}
    sent = sent_by(site, batch(1))
    with pytest.raises(SchemaMismatch, match="leave out a level"):
        site.apply(Gradients(1, dict([*small(sent, "flair", "mri").items()][:-1])))
    with pytest.raises(SchemaMismatch, match="shapes"):
        site.apply(Gradients(1, {}))
    site.apply(Gradients(1, small(sent, "mri")))
    assert [half.steps_done for half in site.encoders.halves.values()] == [1, 1]
    assert same(before["flair"], state(site, "flair"))
    assert not same(before["mri"], state(site, "mri"))
    site.apply(Gradients(2, small(sent_by(site, batch(2)), "flair", "mri")))
    assert not same(before["flair"], state(site, "flair"))
    site.close()


def test_a_step_is_made_at_all_seats_or_at_none(stage: Scene, batch) -> None:
    site = opened(stage)
    before = {seat.name: state(site, seat.name) for seat in SEATS}
    sent = sent_by(site, batch(1))
    bad = small(sent, "flair", "mri")
    bad["mri/x0"][0, 0, 0, 0] = np.inf
    with pytest.raises(JobFailed):
        site.apply(Gradients(1, bad))
    assert site.applied == 0
    assert all(same(before[seat.name], state(site, seat.name)) for seat in SEATS)
    site.close()


def test_a_step_that_was_refused_may_be_asked_for_again(stage: Scene, batch) -> None:
    """SP-11.15-8: the site stays up; the batch is computed again, and its gradients are checked again."""
    policy = {"coordinators": ["hub"], "max_gradient_norm": 1e-9, "beyond_norm": "refuse"}
    own(stage, policy=policy)
    site = opened(stage)
    sent = sent_by(site, batch(1))
    for _ in range(2):
        with pytest.raises(BudgetSpent, match="max_gradient_norm"):
            site.apply(Gradients(1, small(sent, "flair", "mri")))
        site.forget_batches()
        assert sent_by(site, batch(1)).keys() == sent.keys()
    site.close()


def test_one_checkpoint_holds_all_seats(stage: Scene, batch) -> None:
    site = opened(stage)
    for step in (1, 2):
        site.apply(Gradients(step, small(sent_by(site, batch(step)), "flair", "mri")))
        site.save(step, keep=(0, 1))
    after = {seat.name: state(site, seat.name) for seat in SEATS}
    tensors, _, _ = checkpoint.load(site.folder, 2)
    assert {name.partition("/")[0] for name in tensors} == {"flair", "mri"}
    site.rollback(1)
    assert site.applied == 1
    assert not same(after["mri"], state(site, "mri"))
    site.apply(Gradients(2, small(sent_by(site, batch(2)), "flair", "mri")))
    assert all(same(after[seat.name], state(site, seat.name)) for seat in SEATS)
    # Of other seats, it is refused before anything is changed.
    with pytest.raises(DataError, match="does not fit these seats"):
        site.encoders.load({**tensors, "pet/model/x": torch.zeros(1)}, {"step": 2})
    short = {name: t for name, t in tensors.items() if not name.startswith("mri/model")}
    with pytest.raises(DataError, match="does not fit this network"):
        site.encoders.load({**short, "flair/model/x": torch.zeros(1)}, {"step": 0})
    assert site.applied == 2
    site.close()


# --- policy ------------------------------------------------------------------------------------------------


def evaluated(site: SiteJob, asked: Forward) -> dict[str, np.ndarray]:
    return sent_by(
        site,
        dataclasses.replace(
            asked, mode="evaluate", step=0, digest=batch_digest(0, asked.samples, None), seed=None
        ),
    )


@pytest.mark.parametrize("written", ["gaussian:1.0", "laplace:1.0", "dp-gaussian:0.5,noise=1.0"])
def test_no_two_seats_share_their_noise(stage: Scene, batch, written: str) -> None:
    """Two seats that show the same, through the same weights, would show it by a difference."""
    for patient in PATIENTS:
        name = f"{patient}.nii.gz"
        shutil.copy(stage.folder / "images" / "t1" / name, stage.folder / "images" / "flair" / name)
    seats = (Seat("flair", ("flair",)), Seat("t1", ("t1",)))
    noise = {}
    for defences in ([], [written]):
        own(stage, policy={"coordinators": ["hub"], "defences": defences})
        site = opened(stage, seats)
        weights = site.encoders.halves["t1"].network.state_dict()
        site.encoders.halves["flair"].network.load_state_dict(weights)
        sent = evaluated(site, batch(1))
        noise[bool(defences)] = {seat: sent[f"{seat}/x4"] for seat in ("flair", "t1")}
        site.close()
        shutil.rmtree(site.folder)
    assert np.array_equal(noise[False]["flair"], noise[False]["t1"]), "the same image, the same weights"
    assert not np.isclose(noise[True]["flair"], noise[True]["t1"]).any()


def test_noise_of_an_image_belongs_to_its_modality(stage: Scene, batch) -> None:
    """Not to the seat, which the coordinator names: two runs show one image under one noise only."""
    own(stage, policy={"coordinators": ["hub"], "image_defences": ["voxel-noise:0.5"]})
    seen: dict[str, list[np.ndarray]] = {"t1": [], "t2": []}
    for seats in (SEATS, (Seat("other", ("t1",)), Seat("t2", ("t2",)))):
        site = opened(stage, seats)
        images = site._read(dataclasses.replace(batch(1), seed=None))
        for seat in seats:
            for number, modality in enumerate(seat.modalities):
                if modality in seen:
                    seen[modality].append(images[seat.name][:, number])
        site.close()
        shutil.rmtree(site.folder)
    assert all(np.array_equal(one, other) for one, other in seen.values())
    # The first of peer.toml has the noise of a site that holds nothing else.
    stage.client("t1", policy={"coordinators": ["hub"], "image_defences": ["voxel-noise:0.5"]})
    site = opened(stage, (Seat("t1", ("t1",)),))
    (alone,) = site._read(dataclasses.replace(batch(1), seed=None)).values()
    assert np.array_equal(alone[:, 0], seen["t1"][0])
    site.close()


def test_a_patient_who_leaves_at_two_seats_pays_twice(stage: Scene, batch) -> None:
    policy = {
        "coordinators": ["hub"], "defences": ["dp-gaussian:0.5,noise=10.0,frozen=true"],
        "epsilon": 100.0, "delta": 1e-5,
    }  # fmt: skip
    own(stage, policy=policy, runtime={"initial_weights": "private"})
    keys = {stage.key(patient): patient for patient in PATIENTS}
    asked = batch(1)
    gone = asked.samples[0].key
    (stage.folder / "images" / "flair" / f"{keys[gone]}.nii.gz").unlink()
    site = opened(stage)
    sent_by(site, asked)
    site.close()
    ledger = json.loads((stage.folder / "site-t1" / "state" / "privacy-ledger.json").read_text())
    paid = {key: sum(entry["paid"].values()) for key, entry in ledger["patients"].items()}
    people = People(stage.folder / "site-t1" / "state")
    times = {key: sum(sample.key == key for sample in asked.samples) for key in keys}
    assert paid == {
        people.account(keys[key]).hex(): count * (1 if key == gone else 2)
        for key, count in times.items()
        if count
    }


def test_what_all_seats_cost_together_is_bounded(stage: Scene) -> None:
    """SP-11.15-7."""
    job, one = job_on_wire(stage.settings), (Seat("t1", ("t1",)),)
    two, network = (*one, Seat("t2", ("t2",))), backbone_of(job)
    wide = (Seat("mri", ("t1", "t2")),)
    assert encoder_parameters(network, two) == 2 * encoder_parameters(network, one)
    # Two 3 x 3 filters: one more input channel for each of the first level's features.
    assert encoder_parameters(network, wide) - encoder_parameters(network, one) == 2 * 9
    assert checkpoint_octets(network, two) == 2 * checkpoint_octets(network, one)
    voxels = 500_000
    for seats in (two, wide):
        with pytest.raises(PolicyRefused, match="max_memory_mib"):
            check_bounds(job, network, seats, Bounds(max_memory_mib=40), voxels)
    check_bounds(job, network, one, Bounds(max_memory_mib=40), voxels)
    with pytest.raises(PolicyRefused, match="max_parameters"):
        check_bounds(job, network, two, Bounds(max_parameters=encoder_parameters(network, one)), voxels)


@pytest.mark.parametrize(
    ("seats", "error", "words"),
    [
        ((Seat("a", ("t1",)), Seat("b", ("pet",))), PolicyRefused, "wants t1, pet from us, this site holds t1, fl"),
        ((Seat("b", ("t1",)), Seat("a", ("t2",))), SchemaMismatch, "in disorder"),
        ((Seat("a", ("t1",)), Seat("a", ("t2",))), SchemaMismatch, "in disorder"),
        ((Seat("a", ("t1",)), Seat("b", ("t2", "t1"))), SchemaMismatch, "want one modality"),
        ((Seat("a", ("t1", "t1")),), SchemaMismatch, "want one modality"),
    ],
)  # fmt: skip
def test_seats_that_a_site_does_not_take(
    stage: Scene, seats: Any, error: type[Exception], words: str
) -> None:
    """SP-11.8-5."""
    with pytest.raises(error, match=words):
        judge(offer_of(job_on_wire(stage.settings), seats), stage.config("site-t1"))


# --- an encoder of the site's own --------------------------------------------------------------------------


OWN = {"network": "residual-unet", "features": [2, 4, 4, 8, 8], "strides": [1, 2, 2, 2, 2]}


def test_a_site_may_run_an_encoder_of_its_own(stage: Scene, batch) -> None:
    """SP-11.8-4: of another network that yields the job's cut; nobody else sees a difference."""
    sent = {}
    for own_model in ({}, {"model": OWN}):
        own(stage, **own_model)
        site = opened(stage)
        asked = batch(1)
        sent[bool(own_model)] = sent_by(site, asked)
        site.apply(Gradients(1, small(sent[bool(own_model)], "flair", "mri")))
        site.save(1)
        site.rollback(1)
        site.close()
        shutil.rmtree(site.folder)
    assert {n: t.shape for n, t in sent[True].items()} == {n: t.shape for n, t in sent[False].items()}
    assert type(site.encoders.halves["mri"].network).__module__.endswith("residual_unet")
    assert not np.isclose(sent[True]["mri/x4"], sent[False]["mri/x4"]).all()


def test_an_encoder_that_yields_another_cut_is_declined_in_one_line(stage: Scene) -> None:
    job = job_on_wire(stage.settings)
    own(stage, model={**OWN, "features": [2, 4, 4, 8, 16]})
    words = (
        "residual-unet yields 2@1x1 4@2x2 4@4x4 8@8x8 16@16x16, the job wants 2@1x1 4@2x2 4@4x4 8@8x8 8@16x16"
    )
    with pytest.raises(SchemaMismatch, match=words):
        judge(offer_of(job), stage.config("site-t1"))
    # A job may name a network that nobody here knows.
    strange = dataclasses.replace(job, network="vendor-net", settings=())
    own(stage, model=OWN)
    judge(offer_of(strange), stage.config("site-t1"))
    own(stage)
    with pytest.raises(SchemaMismatch, match="network 'vendor-net' is unknown"):
        judge(offer_of(strange), stage.config("site-t1"))
    own(stage, model=OWN, policy={"coordinators": ["hub"], "share_encoder": True})
    with pytest.raises(
        PolicyRefused, match=r"the job averages encoders, but this site runs its own \(\[model\]\)"
    ):
        judge(offer_of(dataclasses.replace(job, average_every=1)), stage.config("site-t1"))


def test_all_seats_together_fit_one_message(stage: Scene) -> None:
    """SP-11-28: feature maps of a batch, at all seats."""
    job = dataclasses.replace(job_on_wire(stage.settings), batch=256)
    own(stage, policy={"coordinators": ["hub"], "max_message_mib": 4})
    judge(offer_of(job, SEATS[:1]), stage.config("site-t1"))
    with pytest.raises(PolicyRefused, match="feature maps"):
        judge(offer_of(job, SEATS), stage.config("site-t1"))
