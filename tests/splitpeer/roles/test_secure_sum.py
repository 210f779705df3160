"""Secure fusion among real roles: the sum is exact, keys are proven, and nothing leaves before that."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from splitpeer.audit.experiment import VerifiedCapture
from splitpeer.captures.reader import open_capture
from splitpeer.captures.redefend import defended
from splitpeer.captures.summary import summarise
from splitpeer.coordinator.assembly import make_half
from splitpeer.daemon import happenings as h
from splitpeer.data.loader import SiteData
from splitpeer.data.sampling import TrainingSchedule, batch_digest
from splitpeer.defences.randomness import Release
from splitpeer.errors import AttackImpossible, DataError, JobFailed
from splitpeer.federation.seats import seats_of
from splitpeer.federation.terms import job_on_wire, seat_descriptors, services
from splitpeer.models import build_decoder, build_encoder, site_seed
from splitpeer.models.registry import backbone_of
from splitpeer.replay.redrive import _Recording
from splitpeer.site.answers import ANSWERS
from splitpeer.site.client import Client
from splitpeer.site.job import SiteJob
from splitpeer.site.mask_keys import forget_keys
from splitpeer.site.opening import open_job
from splitpeer.site.people import People
from splitpeer.site.range_refusals import NAME as REFUSALS
from splitpeer.site.run_folders import mark_complete, mark_run, note_coordinator
from splitpeer.site.secret import FUSION_KEY, SERVICE_KEY
from splitpeer.site.shown import NAME as SHOWN
from splitpeer.site.summing import PARTNERS, Summing
from splitpeer.storage.bank import ALL_SITES, Bank, BankEntry
from splitpeer.storage.journal import Journal
from splitpeer.training.optimiser import make_optimiser, make_schedule
from splitpeer.training.split_round import Parties, Place, split_round
from splitpeer.training.split_step import ClientHalf
from splitpeer.training.sums import SUM, fused
from splitproto import AllowList, Listener, fusion
from splitproto.errors import PolicyRefused, SiteFailed
from splitproto.messages import Forward, JobOffer
from splitproto.partners import Keys
from splitproto.records import Sample, Seat
from splitproto.tensors import schema_digest

from .scene import JOINT, PATIENTS, SEED, Scene
from .test_frozen import Whole, assert_same

THREE = ("flair", "t1", "t2")
SITES = tuple(f"site-{modality}" for modality in THREE)
MODEL = {"features": [2, 4, 4, 8, 8, 4], "fusion": "secure-sum", "widths": [1, 1, 2, 2, 4]}
BRISK = {"join_s": 40, "step_s": 20, "return_s": 40}


def cast(scene: Scene, *, steps: int = 6, every: int = 3, **job: Any) -> Scene:
    training = {"steps": steps, "batch": 3, "checkpoint_every": every}
    scene.cast(*THREE, **{"model": MODEL, "training": training, "deadlines": BRISK, **job})
    for modality in THREE:
        site(scene, modality)
    return scene


def site(scene: Scene, modality: str, **policy: Any) -> None:
    others = [name for name in SITES if name != f"site-{modality}"]
    scene.client(modality, policy={"coordinators": ["hub"], "partners": others, **policy})


def folder(scene: Scene, name: str) -> Path:
    (found,) = [path for path in (scene.folder / name / "state").iterdir() if path.is_dir()]
    return found


def in_one_process(scene: Scene) -> list[float]:
    """The losses of the same steps, with the same integers and without masks."""
    torch.set_num_threads(1)
    settings, job = scene.settings, job_on_wire(scene.settings)
    seats, backbone = seats_of(settings), backbone_of(job)
    sites = {}
    for name, filled in seats.filled.items():
        for seat in filled:
            encoder = build_encoder(backbone, seed=site_seed(SEED, seat))
            optimiser = make_optimiser(
                encoder.parameters(), job.optimiser, job.learning_rate, job.weight_decay
            )
            schedule = make_schedule(optimiser, job.schedule, job.steps)
            sites[Place(name, seat)] = ClientHalf(encoder, optimiser, schedule)
    parties = Parties(make_half(scene.config("hub"), settings, job, seats), sites)
    masks, window = scene.masks(), (*job.window, 1)[:3]
    drawn = TrainingSchedule(
        scene.patients()[0], masks, window=window, batch=job.batch, steps=job.steps, seed=settings.job.seed,
        positive_fraction=settings.data.positive_fraction,
    )  # fmt: skip
    losses = []
    for step in range(1, job.steps + 1):
        samples, seed = drawn.batch(step - 1)
        images = {
            place: SiteData(scene.images(place.seat)).batch(samples, window, seed, place.seat)
            for place in sites
        }
        target = SiteData(masks).batch(samples, window, seed, None)
        release = Release(bytes(16), "train", step, 0, tuple(samples))
        losses.append(split_round(parties, images, target, release, terms=job.fusion))
    return losses


# --- exactly the sum --------------------------------------------------------------------------------------


async def test_a_run_is_the_same_as_in_one_process_and_what_sites_keep_of_it(scene: Scene) -> None:
    """SP-11.18-2, SP-11.18-5, SP-11.18-7, SP-11.18-9."""
    ran = await cast(scene).together()
    assert ran.error is None and set(ran.clients.values()) == {None}
    assert ran.result.complete and ran.result.dice
    assert scene.losses() == in_one_process(scene)
    public: dict[str, str] = {}
    for name in SITES:
        public |= json.loads((folder(scene, name) / PARTNERS).read_text())
    assert public.keys() == set(SITES) and len(set(public.values())) == len(SITES)
    record = json.loads((scene.folder / "hub" / "state" / "try.run.json").read_text())
    assert record["fusion_keys"] == public
    for name in SITES:
        others = {other: key for other, key in public.items() if other != name}
        assert json.loads((folder(scene, name) / PARTNERS).read_text()) == others
        # "the site deletes them": a thief of the disk cannot take the masks off what somebody recorded.
        assert not any((folder(scene, name) / key).exists() for key in (FUSION_KEY, SERVICE_KEY))
        # Every batch that was answered, an evaluation's too.
        assert (folder(scene, name) / ANSWERS).read_text().count("\n") > scene.settings.training.steps


def test_a_run_survives_the_kill_of_each_party(scene: Scene) -> None:
    """SP-11.18-5, SP-11.18-12, SP-11.18-13: rolled back, the same questions get the same octets."""
    cast(scene, steps=24, every=4)
    hub, clients = scene.start_all()
    scene.until_step(6)
    kept = [folder(scene, name) / FUSION_KEY for name in SITES]
    assert all(one.stat().st_mode & 0o777 == 0o600 for one in kept)
    assert len({one.read_bytes() for one in kept}) == len(SITES)
    public = {name: fusion.public_of(one.read_bytes()).hex() for name, one in zip(SITES, kept, strict=True)}
    for name in SITES:
        others = {other: key for other, key in public.items() if other != name}
        found = json.loads((folder(scene, name) / PARTNERS).read_text())
        assert {other: keys[:64] for other, keys in found.items()} == others
    clients["t1"].signal(signal.SIGKILL)
    hub.until(r"site\.(left|lost) .*site-t1")
    again = scene.start("site-t1")
    scene.until_step(14)
    hub.signal(signal.SIGKILL)
    hub.code()
    hub = scene.start("hub", "--resume")
    assert hub.code() == 0, hub.said
    assert [one.code() for one in (clients["flair"], again, clients["t2"])] == [0, 0, 0]
    assert scene.losses() == in_one_process(scene)


# --- answers ------------------------------------------------------------------------------------------------


async def until(on: Any, name: str, happened: Callable[[], Any]) -> bool:
    """Until something happened; whether the peer ended before."""
    async with asyncio.timeout(60):
        while not happened():
            if on.tasks[name].done():
                return True
            await asyncio.sleep(0.01)
    return False


async def test_masks_that_do_not_cancel_are_not_trained_on(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SP-11.18-12, SP-11.18-14: one site was given other gradients, so its masks are others."""
    honest = Summing.follow

    def follow(self: Summing, step: int, batch: bytes, gradients: Mapping[str, Any]) -> None:
        honest(self, step + (self._site == "site-t1"), batch, gradients)

    monkeypatch.setattr(Summing, "follow", follow)
    ran = await cast(scene).together()
    assert isinstance(ran.error, JobFailed)
    assert "the masks of site-flair, site-t1, site-t2 do not cancel" in str(ran.error)
    assert len(scene.losses()) == 1


async def test_values_out_of_range_are_counted_and_told(
    scene: Scene, caplog: pytest.LogCaptureFixture
) -> None:
    """SP-11.18-3."""
    ran = await cast(scene, steps=24, every=24, model={**MODEL, "sum_range": 0.001}).together()
    assert ran.error is None
    told = [record for record in caplog.records if "fusion.clipped" in record.getMessage()]
    # The first, and whenever there are twice as many: not every batch.
    assert len(SITES) <= len(told) < len(SITES) * scene.settings.training.steps / 2


RANGES = [(1e-4, r"more than 50% of them .* larger sum_range"), (1e6, r"become 0 .* smaller sum_range")]


def refused_range(scene: Scene, number: int, most: float) -> PolicyRefused:
    """How a run with this range is refused, at the offer or at its first batch."""
    training = {"steps": 6, "batch": 3, "checkpoint_every": 3, "encoders": "frozen"}
    cast(scene, training=training, model={**MODEL, "sum_range": most})
    job, seat = job_on_wire(scene.settings), Seat("flair", ("flair",))
    offer = JobOffer(bytes([number]) * 16, (seat,), job, schema_digest(seat_descriptors(job, (seat,))))
    opened = open_job(offer, scene.config("site-flair"), h.Reporter())
    partners_of(opened)
    samples = (Sample(scene.key(PATIENTS[0]), (0, 0, 17)),)
    opened.announce(Forward("release", 0, 0, samples, batch_digest(0, samples, None)))
    try:
        with pytest.raises(PolicyRefused) as one:
            opened.forward(opened.due())
    finally:
        opened.close()
    assert not (opened.folder / ANSWERS).read_bytes()
    return one.value


@pytest.mark.parametrize(("most", "words"), RANGES)
def test_a_range_that_suits_nothing_uses_up_no_view(scene: Scene, most: float, words: str) -> None:
    """SP-11.18-3."""
    error = refused_range(scene, 1, most)
    assert re.search(words, str(error)) and "\n" not in str(error)
    assert not (scene.folder / "site-flair" / "state" / SHOWN).exists()


def test_a_refused_range_does_not_say_on_which_side_it_is_wrong(scene: Scene) -> None:
    """SP-11.18-15: what the coordinator is told differs in the range that it chose, and in nothing else."""
    told = [refused_range(scene, n, most).reason for n, (most, _) in enumerate(RANGES)]
    assert told[0].replace("0.0001", "R").replace("refusal 1", "N") == told[1].replace("1e+06", "R").replace(
        "refusal 2", "N"
    )


def test_ranges_are_refused_a_few_times_over_all_runs(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """SP-11.18-15: a coordinator that offers one range after the other would measure this site's values."""
    for number in range(3):
        assert f"this is refusal {number + 1}" in refused_range(scene, number, 1e-4).reason
    journal = scene.folder / "site-flair" / "state" / REFUSALS
    assert [json.loads(line)["range"] for line in journal.read_text().splitlines()] == [1e-4] * 3
    # Another process, run and range, and a range that would have suited: no value is looked at.
    monkeypatch.setattr(fusion, "quantise", lambda *given: pytest.fail("a value was looked at"))
    for number, most in ((8, 1e-4), (9, 8.0)):
        with pytest.raises(PolicyRefused, match=r"has refused the range of 3 sums .*max_range_refusals"):
            refused_range(scene, number, most)
    journal.write_text("{}\n")
    with pytest.raises(DataError, match="no sum is joined; restore the file"):
        refused_range(scene, 9, 8.0)


def test_a_refusal_counts_before_it_leaves(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """SP-11.18-15: one that cannot be written down is not told as one."""

    def full(*given: object, **said: object) -> None:
        raise DataError("no space")

    monkeypatch.setattr(Journal, "add", full)
    with pytest.raises(DataError, match="no space"):
        refused_range(scene, 1, 1e-4)


def partners_of(opened: SiteJob) -> None:
    """As if two partners had proven themselves."""
    assert opened.summing is not None
    keys = {
        f"site-{n}": Keys(fusion.public_of(bytes([n]) * 32), fusion.public_of(bytes([n + 8]) * 32))
        for n in (1, 2)
    }
    opened.summing.keys.agree(opened.run, "site-flair", keys)
    opened.summing._proven = True


async def test_a_second_answer_to_a_question_is_not_given(scene: Scene) -> None:
    """SP-11.18-13: another answer was given before, and the disk remembers."""
    cast(scene)
    async with scene.running() as on:
        await until(on, "site-flair", lambda: len(scene.losses()) >= 4)
    path = folder(scene, "site-flair") / ANSWERS
    lines = [json.dumps({**json.loads(line), "answer": "00" * 32}) for line in path.read_text().splitlines()]
    path.write_text("\n".join(lines) + "\nhalf a li")
    ran = await scene.together(resume=True)
    assert isinstance(ran.clients["site-flair"], SiteFailed)
    assert "is not the one that was given before" in str(ran.clients["site-flair"])
    assert isinstance(ran.error, JobFailed)


def test_what_stands_under_masks_is_known_or_nothing_is_sent(scene: Scene) -> None:
    """SP-11.18-5, SP-11.18-13: a key without its answers, a key that others may read, a run that is complete."""
    cast(scene)
    seat = Seat("flair", ("flair",))
    job = job_on_wire(scene.settings)
    offer = JobOffer(bytes(range(16)), (seat,), job, schema_digest(seat_descriptors(job, (seat,))))

    def opened() -> SiteJob:
        return open_job(offer, scene.config("site-flair"), h.Reporter())

    first = opened()
    key, kept = first.folder / FUSION_KEY, first.folder / ANSWERS
    assert (key.stat().st_mode & 0o777, kept.read_bytes()) == (0o600, b"")
    first.close()
    opened().close()
    key.chmod(0o640)
    with pytest.raises(DataError, match=r"fusion\.key: others on this machine may read .*: chmod 600") as one:
        opened()
    assert "\n" not in str(one.value)
    key.chmod(0o600)
    kept.unlink()
    with pytest.raises(
        DataError, match=r"answers\.jsonl: is missing, and only it tells what .*begin a new run"
    ) as one:
        opened()
    assert "\n" not in str(one.value)
    kept.write_bytes(b"")
    mark_complete(first.folder, h.Reporter())
    assert not key.exists()
    with pytest.raises(PolicyRefused, match="complete at this site, and the key of its masks was deleted"):
        opened()
    assert not key.exists()
    # A crash between the mark and the key.
    key.write_bytes(bytes(32))
    key.chmod(0o600)
    with pytest.raises(PolicyRefused, match="complete at this site, and the key of its masks was deleted"):
        opened()
    assert not key.exists()
    key.write_bytes(bytes(32))
    forget_keys(first.folder.parent, 30, h.Reporter())
    assert not key.exists()


async def test_a_site_that_was_restarted_after_its_last_answer_deletes_its_key(scene: Scene) -> None:
    """SP-11-20, SP-11.18-5: it is offered nothing, so only the bye says of which run."""
    cast(scene)
    config, seat, job = scene.config("site-flair"), Seat("flair", ("flair",)), job_on_wire(scene.settings)
    schema = schema_digest(seat_descriptors(job, (seat,)))
    here, other = (
        open_job(JobOffer(run, (seat,), job, schema), config, h.Reporter())
        for run in (bytes(range(16)), bytes(16))
    )
    for site_job in (here, other):
        note_coordinator(site_job.folder, "hub")
        site_job.close()
    # A coordinator speaks for its own runs only.
    mark_run(config.peer.state, here.run, "another", h.Reporter())
    assert (here.folder / FUSION_KEY).exists()
    hub, allowed = scene.config("hub"), AllowList({"client": ("site-flair",)}, "it")
    async with Listener(hub.network.listen, hub.credentials(), allowed, JOINT) as listener:
        client = asyncio.create_task(Client(config, asyncio.Event()).run())
        await (await listener.accept(30)).close("complete", run=here.run)
        await asyncio.wait_for(client, 30)
    assert not (here.folder / FUSION_KEY).exists() and (other.folder / FUSION_KEY).exists()
    with pytest.raises(PolicyRefused, match="complete at this site, and the key of its masks was deleted"):
        open_job(JobOffer(here.run, (seat,), job, schema), config, h.Reporter())
    open_job(JobOffer(other.run, (seat,), job, schema), config, h.Reporter()).close()


async def test_what_would_be_a_sum_without_this_site_is_refused(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SP-11.18-13: a part of a batch, and a step that others made."""
    seen: list[SiteJob] = []
    honest = SiteJob.announce

    def announce(self: SiteJob, forward: Forward) -> None:
        seen.append(self)
        part = replace(forward, places=tuple(range(len(forward.samples))))
        with pytest.raises(PolicyRefused, match="only a sum of all sites"):
            honest(self, part)
        if self.applied < forward.step:
            with pytest.raises(PolicyRefused, match="a step was made without this site"):
                self.advance(forward.step)
        honest(self, forward)

    monkeypatch.setattr(SiteJob, "announce", announce)
    ran = await cast(scene).together()
    assert ran.error is None and len(set(map(id, seen))) == len(SITES)


# --- what was recorded --------------------------------------------------------------------------------------


def assert_closed(capture_file: Path) -> None:
    """Not attacked, not defended afterwards, not played; in one line each. It may be looked at."""
    with pytest.raises(AttackImpossible, match="secure fusion"):
        VerifiedCapture.open(capture_file)
    capture = open_capture(capture_file)
    with pytest.raises(DataError, match="secure fusion"):
        defended(capture, {})
    with pytest.raises(DataError, match="secure fusion"):
        _Recording.of(capture)
    assert {level.dtype for level in summarise(capture).levels if level.kind == "activations"} == {"i16"}


async def test_a_capture_of_masked_values_is_read_as_such_by_nobody(scene: Scene) -> None:
    """A coordinator's and a site's."""
    ran = await cast(scene).together(curious=("hub", "site-t1"))
    assert ran.error is None
    for who in ("hub", "site-t1"):
        assert_closed(scene.capture(who))


# --- with frozen encoders: the private mode ---------------------------------------------------------------------


async def test_only_sums_are_kept_and_the_decoder_learns_from_them(scene) -> None:
    """SP-11.17, SP-11.18: bit for bit the integers of one process; no site's values are anywhere at the coordinator."""
    cast(scene)
    training = {"steps": 6, "batch": 3, "checkpoint_every": 3, "encoders": "frozen"}
    scene.job(
        model=MODEL, training=training, deadlines=BRISK, evaluation={"batch": 16, "overlap": 0.0},
    )  # fmt: skip
    ran = await scene.together(curious=("hub", "site-t1"))
    assert ran.error is None and ran.result.complete, ran
    assert set(ran.clients.values()) == {None}
    for who in ("hub", "site-t1"):
        assert_closed(scene.capture(who))
    assert_only_sums(scene)
    assert_same(scene, Summed(scene))


TO_KEEP = {"encoders": "frozen", "steps": 8, "batch": 3, "checkpoint_every": 4}


def sums_in_one_process(scene: Scene, bank: Bank) -> Iterator[tuple[BankEntry, Mapping[str, np.ndarray]]]:
    """What the bank must hold: the integers of all encoders, added up without masks."""
    torch.set_num_threads(1)
    job, sites = job_on_wire(scene.settings), seats_of(scene.settings).filled
    assert job.fusion is not None
    window, backbone = (*job.window, 1)[:3], backbone_of(job)
    data = {seat: SiteData(scene.images(seat)) for filled in sites.values() for seat in filled}
    halves = {}
    for seat in data:
        encoder = build_encoder(backbone, seed=site_seed(SEED, seat))
        optimiser = make_optimiser(encoder.parameters(), "sgd", 0.1, 0.0)
        halves[seat] = ClientHalf(encoder, optimiser, make_schedule(optimiser, "constant", 1))
    for one in bank.contents.releases:
        samples = [Sample(one.key, origin) for origin in one.origins]
        sent = {
            site: {
                seat: halves[seat].evaluate(data[seat].batch(samples, window, None, seat)) for seat in filled
            }
            for site, filled in sites.items()
        }
        yield one, fused(sent, job.fusion)


class Summed(Whole):
    """The decoder in this process, which learns from the integers of all encoders, added up without masks."""

    def __init__(self, scene: Scene) -> None:
        job = scene.settings
        backbone, self.sites = job.model.backbone(), seats_of(job).filled
        encoders = {
            seat: build_encoder(backbone, seed=site_seed(SEED, seat))
            for filled in self.sites.values()
            for seat in filled
        }
        decoder = build_decoder(
            backbone, (SUM,), "sum", scene.task().channels, seed=site_seed(SEED, "coordinator")
        )
        super().__init__(scene, SimpleNamespace(encoders=nn.ModuleDict(encoders), decoder=decoder))
        terms = job_on_wire(job).fusion
        assert terms is not None
        self.terms = terms

    def _encode(self, samples: list[Sample]) -> None:
        super()._encode(samples)
        for sample in samples:
            rows = self._encoded[sample]
            sent = {
                site: {seat: {name: level.numpy() for name, level in rows[seat].items()} for seat in filled}
                for site, filled in self.sites.items()
            }
            total = fused(sent, self.terms)
            self._encoded[sample] = {SUM: {name: torch.from_numpy(array) for name, array in total.items()}}


def the_bank(scene: Scene) -> Bank:
    (found,) = (scene.folder / "hub" / "state").glob("*/bank")
    opened = Bank.open(found)
    assert opened is not None
    return opened


def assert_only_sums(scene: Scene) -> None:
    bank = the_bank(scene)
    assert [path.name for path in bank.folder.iterdir() if path.is_dir()] == [ALL_SITES]
    assert bank.missing() == []
    for release, expected in sums_in_one_process(scene, bank):
        found = bank.get(release)
        assert found.keys() == expected.keys()
        assert all(np.array_equal(found[name], expected[name]) for name in expected)


LACKING = PATIENTS[2]


def two_seats(scene: Scene, **job: Any) -> None:
    """Site t1 fills two seats, and has only one of the two images of a patient."""
    cast(scene, sites={"site-flair": "flair", "site-t1": ["t1", "t1ce"], "site-t2": "t2"}, **job)
    images = scene.folder / "images"
    for modality in ("t1", "t1ce"):
        shutil.copytree(scene.federation.data / modality, images / modality)
    next((images / "t1ce").glob(f"{LACKING}*")).unlink()
    policy = {"coordinators": ["hub"], "partners": ["site-flair", "site-t2"]}
    scene.client("t1", peer={"modality": ["t1", "t1ce"]}, data={"images": str(images)}, policy=policy)
    scene.client("t1ce")  # nobody starts it; the reference reads its images


def of_the_run(scene: Scene) -> tuple[list[bytes], list[bytes]]:
    """Its training and held-out patients."""
    record = json.loads((scene.folder / "hub" / "state" / "try.run.json").read_text())
    held_out = sorted(map(bytes.fromhex, record["held_out"]))
    return sorted({bytes.fromhex(key) for key in record["patients"]}.difference(held_out)), held_out


@pytest.mark.parametrize("encoders", ["joint", "frozen"])
async def test_a_site_of_two_seats_adds_them_first(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, encoders: str
) -> None:
    """SP-11.18-2: a patient who does not fill both is in no batch, and the site answers none with such a patient."""
    training = {"steps": 6, "batch": 3, "checkpoint_every": 3, "encoders": encoders}
    two_seats(scene, training=training, evaluation={"batch": 16, "overlap": 0.0})
    gone, asked, honest = scene.key(LACKING), list[SiteJob](), SiteJob.announce

    def announce(self: SiteJob, forward: Forward) -> None:
        if len(self.seats) > 1:
            asked.append(self)
            first, *others = forward.samples
            with pytest.raises(PolicyRefused, match="does not fill all seats of this site"):
                honest(self, replace(forward, samples=(replace(first, key=gone), *others)))
        honest(self, forward)

    monkeypatch.setattr(SiteJob, "announce", announce)
    ran = await scene.together()
    assert ran.error is None and ran.result.complete and set(ran.clients.values()) == {None}, ran
    assert asked
    training_patients, held_out = patients = of_the_run(scene)
    assert {*training_patients, *held_out} == {scene.key(one) for one in PATIENTS if one != LACKING}
    monkeypatch.setattr(scene, "patients", lambda: patients)
    if encoders == "joint":
        assert scene.losses() == in_one_process(scene)
    else:
        assert_only_sums(scene)
        assert_same(scene, Summed(scene))


def test_a_bank_of_sums_survives_the_kill_of_each_party(scene: Scene) -> None:
    """SP-11.17-5, SP-11.18-13: what was not kept is asked again, and answered with the same octets."""
    cast(scene, training=TO_KEEP, evaluation={"overlap": 0.25, "batch": 4})
    hub, clients = scene.start_all()
    kept = scene.folder / "hub" / "state"
    _wait(lambda: len([*kept.glob(f"*/bank/{ALL_SITES}/*")]) > 10)
    clients["t1"].signal(signal.SIGKILL)
    hub.until(r"site\.(left|lost) .*site-t1")
    again = scene.start("site-t1")
    now = len([*kept.glob(f"*/bank/{ALL_SITES}/*")])
    _wait(lambda: len([*kept.glob(f"*/bank/{ALL_SITES}/*")]) > now + 10)
    hub.signal(signal.SIGKILL)
    hub.code()
    hub = scene.start("hub", "--resume")
    assert hub.code() == 0, hub.said
    assert [one.code() for one in (clients["flair"], again, clients["t2"])] == [0, 0, 0]
    assert_only_sums(scene)


def _wait(happened: Callable[[], bool]) -> None:
    ends = time.monotonic() + 60
    while not happened():
        assert time.monotonic() < ends
        time.sleep(0.01)


# --- patients whom other runs have shown -------------------------------------------------------------------


async def test_a_patient_shown_before_at_one_site_does_not_end_the_run(scene: Scene) -> None:
    """SP-11.17-12."""
    training = {"steps": 2, "batch": 3, "checkpoint_every": 2, "encoders": "frozen"}
    cast(scene, training=training, evaluation={"batch": 16, "overlap": 0.0})
    for modality in THREE:
        site(scene, modality, max_runs_per_patient=1)
    state = scene.folder / "site-t1" / "state"
    state.mkdir(exist_ok=True, mode=0o700)
    last = max(PATIENTS, key=scene.key)
    line = {"run": "aa" * 16, "terms": "", "encoders": [], "people": [People(state).account(last).hex()]}
    (state / SHOWN).write_text(json.dumps(line) + "\n")
    ran = await scene.together()
    assert ran.error is None and set(ran.clients.values()) == {None}
    assert ran.result.complete and ran.result.patients == len(PATIENTS) - 1 and not ran.result.withdrawn


# --- a run goes on under another deadline --------------------------------------------------------------------


async def test_a_site_that_kept_running_takes_a_changed_deadline(scene: Scene) -> None:
    """SP-11.18-6: it is among the signed terms, so the run is taken up again; other terms are declined."""
    cast(scene)
    job = job_on_wire(scene.settings)
    seats = (Seat("t1", ("t1",)),)
    offer = JobOffer(
        bytes(range(16)), seats, job, schema_digest(seat_descriptors(job, seats)), recorded=False
    )
    later, other = (
        replace(offer, job=replace(job, **one)) for one in ({"seconds_per_step": 7.0}, {"weight_decay": 0.5})
    )

    async def ignore(*args: object) -> None:
        pass

    session = SimpleNamespace(
        agreement=SimpleNamespace(features=services(frozen=False)), send=ignore, close=ignore
    )
    client = Client(scene.config("site-t1"), asyncio.Event())
    try:
        first = await client._judged(session, offer)
        assert await client._judged(session, offer) is first
        again = await client._judged(session, later)
        assert (again is first, again.job, again.folder) == (False, later.job, first.folder)
        with pytest.raises(JobFailed, match="the terms of a run cannot change"):
            await client._judged(session, other)
    finally:
        await client._close_job()
        client._compute.close()
