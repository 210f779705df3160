"""`splitpeer pretrain` from end to end, on the phantom."""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from splitpeer.data.layouts import find, find_all
from splitpeer.data.loader import SiteData
from splitpeer.data.pseudonym import load_salt, pseudonym
from splitpeer.data.sampling import TrainingSchedule
from splitpeer.data.volumes import Volumes
from splitpeer.defences.randomness import Release
from splitpeer.federation.terms import job_on_wire, window_of
from splitpeer.models import build_decoder, build_encoder, site_seed
from splitpeer.models.registry import encoder_parameters
from splitpeer.pretraining import encoder_file
from splitpeer.pretraining.sources import PUBLIC_SALT
from splitpeer.settings.job import JobConfig
from splitpeer.storage import checkpoint
from splitpeer.training.optimiser import make_optimiser, make_schedule
from splitpeer.training.split_round import Parties, Place, split_round
from splitpeer.training.split_step import ClientHalf, CoordinatorHalf
from splitproto.records import Job

from .conftest import PATIENTS, STEPS, Desk


def names_nobody(desk: Desk, text: str) -> bool:
    """Neither an id, nor a key, nor a handle."""
    salt = load_salt(desk.folder / "federation.salt")
    ids = [f"phantom-{number + 1:03}" for number in range(PATIENTS)]
    return not any(word in text for one in ids for word in (one, pseudonym(salt, one).hex()[:8]))


def test_images_alone(desk: Desk) -> None:
    said = desk.run("--labels", "none")
    made = desk.made
    assert f"sha256 {made.digest}" in said
    assert 'weights = "encoder.safetensors"' in said
    assert stat.S_IMODE(desk.out.stat().st_mode) == 0o600
    assert not desk.out.with_name("encoder.safetensors.steps").exists()
    backbone = desk.settings.model.backbone()
    assert made.tensors.keys() == build_encoder(backbone, seed=0).state_dict().keys()
    assert sum(tensor.numel() for tensor in made.tensors.values()) == encoder_parameters(backbone)
    (past,) = made.described.stages
    assert (past.data, past.labels, past.patients, past.steps, past.batch) == (
        "own",
        "none",
        PATIENTS,
        STEPS,
        2,
    )
    assert made.described.modalities == ("t1",)
    assert names_nobody(desk, desk.log + said + desk.out.read_bytes().decode("latin-1"))


def test_it_has_learned(desk: Desk) -> None:
    desk.job(training={"steps": 80, "learning_rate": 0.02}, model={"features": [8, 8, 8, 8, 8, 8]})
    (past,) = desk.told("--labels", "none")["stages"]
    first, last = past["loss"]
    assert last < 0.8 * first
    (past,) = desk.told("--labels", str(desk.data / "labels"), "--convention", "msd", "--force")["stages"]
    first, last = past["loss"]
    assert last < 0.97 * first
    assert (past["labels"], past["data"]) == ("regions", "own")


def test_a_seed_repeats_and_private_entropy_does_not(desk: Desk) -> None:
    first = desk.told("--labels", "none")
    assert first["stages"][0]["seed"] == site_seed(7, "t1")
    again = desk.told("--labels", "none", "--force")
    assert first == again
    private = [
        desk.told("--labels", "none", "--force", "--set", "runtime.initial_weights=private") for _ in range(2)
    ]
    assert [one["stages"][0]["seed"] for one in private] == [None, None]
    assert len({one["digest"] for one in (first, *private)}) == 3


@pytest.mark.parametrize("labels", ["none", "masks"])
@pytest.mark.parametrize("at", [1, 2, 5])
def test_interrupted_it_continues_bit_for_bit(
    desk: Desk, ends_at: Callable[[int], None], labels: str, at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("secrets.randbits", lambda bits: 2**bits - 11)
    desk.peer(runtime={"initial_weights": "private"})
    masks = (str(desk.data / "labels"), "--convention", "msd")
    arguments = ("--labels", *(masks if labels == "masks" else (labels,)))
    whole = desk.told(*arguments)
    ends_at(at)
    assert desk.run(*arguments, "--force", code=130) == "splitpeer: interrupted"
    assert not desk.out.exists() or at  # the earlier file stays until there is another
    ends_at(-1)
    # Drawn by the first start; a second draw would be seen.
    if at >= 2:
        monkeypatch.setattr("secrets.randbits", lambda bits: 5)
    desk.out.unlink()
    assert desk.told(*arguments) == whole
    assert ("pretraining.resumed" in desk.log) == (at >= 2)


def test_an_interrupted_one_with_other_settings_is_refused(
    desk: Desk, ends_at: Callable[[int], None]
) -> None:
    ends_at(4)
    desk.run("--labels", "none", code=130)
    ends_at(-1)
    desk.job(training={"learning_rate": 0.001})
    assert "holds another pretraining" in desk.run("--labels", "none", code=4)
    desk.run("--labels", "none", "--force")


def test_two_at_once_are_refused(desk: Desk) -> None:
    from splitpeer.daemon.lock import StateLock

    lock = StateLock(desk.folder / "encoder.safetensors.steps" / "1")
    assert lock.take()
    assert "at work here" in desk.run("--labels", "none", code=4)
    lock.release()
    desk.run("--labels", "none")


def test_a_seat_of_two_channels(desk: Desk) -> None:
    desk.peer(["flair", "t2"])
    desk.job(seats={"mri": ["t2", "flair"]})
    desk.run("--labels", "none")
    assert desk.made.described.modalities == ("t2", "flair")
    desk.made.load_into(build_encoder(desk.settings.model.backbone(), 2, seed=0))


def test_a_site_of_several_seats_names_one(desk: Desk) -> None:
    desk.peer(["flair", "t2"])
    assert "south fills flair, t2 of this job: add --seat" in desk.run("--labels", "none", code=4)
    desk.run("--labels", "none", "--seat", "t2")
    assert desk.made.described.modalities == ("t2",)


def test_public_data_in_another_layout(desk: Desk, ends_at: Callable[[int], None]) -> None:
    """MSD: one 4-D file a patient; every site that follows the seed makes the same weights, whatever its salt."""
    where = ("--images", str(desk.data / "msd"), "--layout", "msd")
    desk.run("--labels", str(desk.data / "msd"), *where, "--convention", "msd")
    one = desk.made
    assert one.described.stages[0].data == "other"
    assert not one.described.saw_own_images
    (desk.folder / "federation.salt").write_text("cd" * 32)
    desk.run("--labels", str(desk.data / "msd"), *where, "--convention", "msd", "--force")
    assert desk.made.digest == one.digest


SUM = {"fusion": "secure-sum", "widths": [1, 1, 2, 2, 4]}


@pytest.mark.parametrize("model", [{}, SUM], ids=["concat", "sum"])
def test_sites_follow_a_recipe_together_and_keep_parts_of_one_network(
    desk: Desk, model: dict[str, object]
) -> None:
    recipe = {"data": "msd-task01", "steps": 4, "seed": 1, "encoders": "together"}
    frozen = {"encoders": "frozen"} if model else {}
    desk.job(pretraining=recipe, model=model, training=frozen)
    where = ("--recipe", "--images", str(desk.data / "msd"), "--layout", "msd", "--convention", "msd")
    made = {"t1": desk.told(*where)}
    tensors = {"t1": dict(desk.made.tensors)}
    desk.peer(["flair", "t2"])
    for seat in ("t2", "flair"):
        made[seat] = desk.told(*where, "--seat", seat, "--force")
        tensors[seat] = dict(desk.made.tensors)
    # One network: the loss is one, to the last bit, whoever trains it.
    assert len({tuple(one["stages"][0]["loss"]) for one in made.values()}) == 1
    assert [one["stages"][0]["encoders"] for one in made.values()] == [3, 3, 3]
    assert len({one["digest"] for one in made.values()}) == 3
    assert len({one["stages"][0]["network"] for one in made.values()}) == 1
    network = made["t2"]["stages"][0]["network"]
    assert f"one of 3 encoders of network {network}" in desk.run(*where, "--seat", "t2", "--force")

    settings = desk.settings
    job = job_on_wire(settings)
    assert (job.fusion is not None) == bool(model)
    plan = together(settings, job, desk.data / "msd")
    for seat, mine in tensors.items():
        assert plan[seat].keys() == mine.keys()
        assert all(torch.equal(plan[seat][name], tensor) for name, tensor in mine.items())
        assert not all(
            torch.equal(one, other)
            for one, other in zip(mine.values(), plan_at_start(settings, seat), strict=True)
        )


def entropy(what: int, seat: str = "") -> int:
    drawn = f"splitpeer pretraining\0{what}\0{site_seed(1, 'together')}" + (f"\0{seat}" if seat else "")
    return int.from_bytes(hashlib.sha256(drawn.encode()).digest()[:16], "big")


def plan_at_start(settings: JobConfig, seat: str) -> list[torch.Tensor]:
    return list(build_encoder(settings.model.backbone(), 1, seed=entropy(0, seat)).state_dict().values())


def together(settings: JobConfig, job: Job, folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    """The same four steps by hand: all halves of the job in one process."""
    task, window = settings.task.task("msd"), window_of(job)
    backbone = settings.model.backbone()
    labels = Volumes(find(folder, "msd", None).cases, salt=PUBLIC_SALT, labels=task)
    channels = {"t1": ("t1",), "t2": ("t2",), "flair": ("flair",)}
    images = {
        seat: SiteData(Volumes(found.cases, salt=PUBLIC_SALT))
        for seat, found in find_all(folder, "msd", list(channels)).items()
    }

    def stepping(part: torch.nn.Module) -> tuple[torch.optim.Optimizer, Any]:
        t = settings.training
        optimiser = make_optimiser(part.parameters(), t.optimiser, t.learning_rate, t.weight_decay)
        return optimiser, make_schedule(optimiser, t.schedule, 4)

    sites = {}
    for site, seat in (("south", "flair"), ("north", "t1"), ("south", "t2")):
        encoder = build_encoder(backbone, 1, seed=entropy(0, seat))
        sites[Place(site, seat)] = ClientHalf(encoder, *stepping(encoder), "cpu")
    seats = ("sum",) if job.fusion else [place.seat for place in sites]
    decoder = build_decoder(
        backbone,
        seats,
        settings.model.decoder_fusion,
        task.channels,
        exclusive=task.exclusive,
        seed=entropy(1),
    )
    other = CoordinatorHalf(decoder, *stepping(decoder), "cpu", exclusive=task.exclusive)
    schedule = TrainingSchedule(
        sorted(labels.keys()), labels, window=window, batch=settings.training.batch, steps=4, seed=entropy(2),
        positive_fraction=settings.data.positive_fraction,
    )  # fmt: skip
    for step in range(4):
        samples, drawn = schedule.batch(step)
        seed = drawn if settings.data.augment else None
        shown = {place: images[place.seat].batch(samples, window, seed, place.seat) for place in sites}
        target = SiteData(labels).batch(samples, window, seed, None)
        release = Release(b"", "train", step + 1, 0, ())
        split_round(Parties(other, sites), shown, target, release, terms=job.fusion)
    return {place.seat: dict(half.network.state_dict()) for place, half in sites.items()}


def test_encoders_together_are_continued_bit_for_bit(desk: Desk, ends_at: Callable[[int], None]) -> None:
    desk.job(pretraining={"data": "msd-task01", "steps": 6, "seed": 1, "encoders": "together"})
    where = ("--recipe", "--images", str(desk.data / "msd"), "--layout", "msd", "--convention", "msd")
    whole = desk.told(*where)
    ends_at(5)
    desk.run(*where, "--force", code=130)
    ends_at(-1)
    desk.out.unlink()
    assert desk.told(*where) == whole
    assert "pretraining.resumed" in desk.log


def test_encoders_together_want_masks_and_whole_patients(desk: Desk) -> None:
    desk.job(pretraining={"data": "phantom", "steps": 2, "labels": "none", "encoders": "together"})
    assert 'encoders = "together" learns from masks' in desk.run("--recipe", code=4)
    data = desk.folder / "public"
    shutil.copytree(desk.data, data)
    next((data / "flair").iterdir()).unlink()
    desk.job(pretraining={"data": "strangers", "steps": 2, "seed": 1, "encoders": "together"})
    told = desk.told("--recipe", "--images", str(data), "--layout", "folder", "--convention", "msd")
    assert told["stages"][0]["patients"] == PATIENTS - 1


def test_a_recipe(desk: Desk) -> None:
    """A public data set by its name, then own images with the site's own entropy."""
    desk.job(pretraining={"data": "msd-task01", "steps": 4, "seed": 1, "own_steps": 2})
    where = ("--images", str(desk.data / "msd"), "--layout", "msd", "--convention", "msd")
    desk.run("--recipe", *where, "--set", "runtime.initial_weights=private")
    public, own = desk.made.described.stages
    assert (public.data, public.labels, public.steps) == ("msd-task01", "regions", 4)
    assert public.seed == site_seed(1, "t1")
    assert (own.data, own.labels, own.steps, own.seed) == ("own", "none", 2, None)
    assert desk.made.described.saw_own_images


def test_a_recipe_of_public_data_alone_is_the_same_at_every_site(desk: Desk) -> None:
    desk.job(pretraining={"data": "msd-task01", "steps": 3, "seed": 1, "labels": "none"})
    where = ("--images", str(desk.data / "msd"), "--layout", "msd")
    desk.run("--recipe", *where, "--set", "runtime.initial_weights=private")
    first = desk.made.digest
    desk.run("--recipe", *where, "--set", "runtime.initial_weights=3", "--force")
    assert desk.made.digest == first


def test_a_private_site_follows_no_recipe_with_a_seed(desk: Desk) -> None:
    """Before any step: its policy would refuse the weights."""
    policy = {"preset": "private", "min_encoder_noise": 0, "min_encoder_rate": 0}
    desk.peer(policy=policy, runtime={"initial_weights": "private"})
    desk.job(pretraining={"data": "msd-task01", "steps": 3, "seed": 1, "labels": "none"})
    where = ("--recipe", "--images", str(desk.data / "msd"), "--layout", "msd")
    refused = desk.run(*where, code=4)
    assert "takes no weights that began from a seed" in refused and "pretrain with --secret" in refused
    desk.job(pretraining={"data": "msd-task01", "steps": 3, "labels": "none"})
    desk.run(*where)
    assert not desk.made.described.began_from_a_seed
    # The job itself is none that such a site takes.
    assert "this site would decline the job as it is: the job trains the sites' encoders" in desk.log


def test_a_site_makes_no_encoder_that_its_policy_refuses(desk: Desk) -> None:
    """Before any step: less noise than it demands, or a lower price, or masks and images without either."""
    recipe = {"data": "msd-task01", "steps": 2, "encoders": "together"}
    where = ("--recipe", "--images", str(desk.data / "msd"), "--layout", "msd", "--convention", "msd")
    desk.peer(policy={"min_encoder_noise": 0.2, "min_encoder_rate": 1, "defences": ["gaussian:0.2"]})
    for given, said in (
        ({"noise": 0.1, "rate": 1.0}, "min_encoder_noise = 0.2, and the encoder of seat t1 learned with 0.1"),
        ({"noise": 0.2, "rate": 0.5}, "min_encoder_rate = 1, and the encoder of seat t1 learned with 0.5"),
    ):
        desk.job(pretraining={**recipe, **given})
        assert said in desk.run(*where, code=4)
    assert "learned with 0 (--labels)" in desk.run("--labels", "none", code=4)
    assert not desk.out.exists()
    desk.job(pretraining={**recipe, "noise": 0.2, "rate": 1.0})
    desk.run(*where)
    assert (desk.made.described.noise, desk.made.described.rate) == (0.2, 1.0)


def test_a_recipe_that_stops_between_its_stages(desk: Desk, ends_at: Callable[[int], None]) -> None:
    desk.job(pretraining={"data": "msd-task01", "steps": 2, "seed": 1, "own_steps": 6})
    where = ("--images", str(desk.data / "msd"), "--layout", "msd", "--convention", "msd")
    desk.run("--recipe", *where)
    whole = desk.made.digest
    ends_at(3)  # the first stage has two steps
    desk.run("--recipe", *where, "--force", code=130)
    ends_at(-1)
    desk.run("--recipe", *where, code=4)  # the file of before is there
    desk.out.unlink()
    desk.run("--recipe", *where)
    assert desk.made.digest == whole


def test_the_phantom_of_a_recipe_is_rendered(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    def copy(folder: Path, patients: int, *, seed: int, progress: object) -> None:
        assert (patients, seed) == (PATIENTS, 42)
        shutil.copytree(desk.data, folder)

    monkeypatch.setattr("splitpeer.data.phantom.cohort.write_phantom", copy)
    desk.job(pretraining={"data": "phantom", "patients": PATIENTS, "cohort": 42, "steps": 2})
    desk.run("--recipe")
    (past,) = desk.made.described.stages
    assert (past.data, past.labels, past.patients) == ("phantom", "regions", PATIENTS)
    assert (desk.folder / f"phantom-{PATIENTS}-42" / "labels").is_dir()


def test_who_is_left_out_is_not_looked_at(desk: Desk) -> None:
    """Patients whom the job holds out, and those who have withdrawn consent."""
    held_out, gone = desk.folder / "held-out", desk.folder / "withdrawn"
    held_out.write_text("# the job's\nphantom-001\nphantom-002\n")
    gone.write_text("phantom-003\n")
    desk.peer(data={"withdrawn": str(gone)})
    images = desk.folder / "images" / "t1"
    shutil.copytree(desk.data / "t1", images)
    for number in (1, 2, 3):
        (images / f"phantom-00{number}.nii.gz").write_bytes(b"spoilt")
    desk.peer(data={"withdrawn": str(gone), "images": str(images)})
    assert desk.told("--labels", "none", "--leave-out", str(held_out))["stages"][0]["patients"] == 2
    assert "unusable" not in desk.log


def test_consent_that_is_withdrawn_meanwhile_counts_from_the_next_batch_on(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    from splitpeer.pretraining.examples import Examples

    gone, usual, seen = desk.folder / "withdrawn", Examples.batch, []
    desk.peer(data={"withdrawn": str(gone)})

    def batch(self: Examples, step: int) -> object:
        if step == 3:
            gone.write_text("phantom-001\n")
        made = usual(self, step)
        seen.append(self.patients)
        return made

    monkeypatch.setattr(Examples, "batch", batch)
    desk.run("--labels", "none")
    assert seen == [PATIENTS] * 3 + [PATIENTS - 1] * 3
    # Whom the weights were made from is not made fewer by that.
    assert desk.made.described.stages[0].patients == PATIENTS


def test_a_bad_file_costs_its_patient(desk: Desk) -> None:
    images = desk.folder / "images" / "t1"
    shutil.copytree(desk.data / "t1", images)
    (images / "phantom-002.nii.gz").write_bytes(b"spoilt")
    desk.peer(data={"images": str(images)})
    desk.run("--labels", "none")
    assert desk.made.described.stages[0].patients == PATIENTS - 1
    assert "pretraining.patients" in desk.log
    assert "unusable=1" in desk.log
    assert names_nobody(desk, desk.log)
    for path in images.iterdir():
        path.write_bytes(b"spoilt")
    said = desk.run("--labels", "none", "--force", code=4)
    assert "no patient is left to pretrain with" in said
    assert names_nobody(desk, said)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "say what to learn from"),
        (("--recipe",), "has no [pretraining] to follow"),
        (("--recipe", "--labels", "none"), "leave out --labels and --steps"),
        (("--labels", "MASKS"), "a convention"),
        (("--labels", "none", "--seat", "t2"), "add --seat with one of them"),
        (("--labels", "none", "--out", "gone/e.safetensors"), "no such folder"),
        (("--labels", "none", "--images", "gone"), "no such folder"),
        (("--labels", "none", "--leave-out", "gone"), "the list of patients cannot be read"),
        (("--labels", "none", "--set", "policy.max_parameters=10"), "max_parameters"),
        (("--labels", "none", "--set", "peer.modality=t2"), "[peer] modality lacks t1"),
        (("--labels", "none", "--set", "model.network=residual-unet"), "the job wants"),
        (("--labels", "none", "--set", "runtime.device=cuda"), "no CUDA device"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(desk: Desk, arguments: tuple[str, ...], said: str) -> None:
    given = [str(desk.data / "labels") if one == "MASKS" else one for one in arguments]
    if torch.cuda.is_available() and "cuda" in given[-1]:
        pytest.skip("this machine has one")
    policy = "max_parameters" in said
    line = desk.run(*given, code=1 if policy else 4)
    assert said in line
    assert line.startswith("splitpeer: ")
    assert not desk.out.exists()


def test_a_stranger_of_the_job(desk: Desk) -> None:
    desk.job(sites={"north": "t2"})
    assert "lacks t2" in desk.run("--labels", "none", code=4)
    desk.peer(peer={"site": "west"})
    assert "[sites] does not name west" in desk.run("--labels", "none", code=4)


def test_a_recipe_without_its_data(desk: Desk) -> None:
    desk.job(pretraining={"data": "msd-task01"})
    assert "[pretraining] data is msd-task01: add --images" in desk.run("--recipe", code=4)
    desk.job(pretraining={"data": "phantom"}, sites={"north": "adc", "south": ["t2", "flair"]})
    desk.peer(peer={"modality": "adc"})
    assert "the phantom shows" in desk.run("--recipe", code=4)


def test_numbers_that_are_not_finite_end_it(desk: Desk) -> None:
    desk.job(training={"learning_rate": 1e30, "optimiser": "sgd", "schedule": "constant"})
    assert "lower the learning rate" in desk.run("--labels", "none", code=1)
    assert not desk.out.exists()


def test_a_full_disk_costs_nothing_that_is_there(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    desk.run("--labels", "none")
    before = desk.out.read_bytes()

    def full(file: int, data: object) -> int:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr("splitpeer.storage.durable.os.write", full)
    assert "No space left" in desk.run("--labels", "none", "--force", code=3)
    assert desk.out.read_bytes() == before


def test_the_file_is_no_checkpoint_and_the_other_way_round(
    desk: Desk, ends_at: Callable[[int], None]
) -> None:
    ends_at(5)
    desk.run("--labels", "none", code=130)
    path = desk.folder / "encoder.safetensors.steps" / "1" / "step-00000004.safetensors"
    checkpoint.read(path)
    with pytest.raises(encoder_file.DataError, match="no encoder of splitpeer pretrain"):
        encoder_file.read(path)
