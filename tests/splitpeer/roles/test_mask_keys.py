"""Keys of masks go when training is over, when a request is, and in any case in time (SP-11.18-16 to SP-11.18-19)."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from splitpeer.coordinator.frozen.trainer import BankTrainer
from splitpeer.daemon import happenings as h
from splitpeer.daemon.sinks.log import lines as log_lines
from splitpeer.daemon.sinks.trail import entry
from splitpeer.errors import DataError
from splitpeer.site import client
from splitpeer.site.answers import ANSWERS
from splitpeer.site.mask_keys import DAY_S, PUBLIC, MaskKeys, forget_keys
from splitpeer.site.run_folders import mark_complete
from splitpeer.site.secret import FUSION_KEY, SERVICE_KEY
from splitpeer.storage import durable
from splitproto import fusion
from splitproto.errors import FusionMismatch, PolicyRefused
from splitproto.fusion import MOST_EPOCHS, Asked
from splitproto.messages import Settled
from splitproto.records import Fusion

from .scene import Scene
from .served import comes, held_out, refused, segmented, serving, stop, until
from .test_late_consent import lines
from .test_private_inference import PRIVATE, SLOW, cast_sum
from .test_secure_sum import THREE, cast, folder, site

RUN, SITES, TERMS = bytes(range(16)), ("a", "b", "c"), Fusion(16, 4.0, 3)
ASKED = Asked("release", 0, 4, bytes(32))


class Three:
    """The keys of three sites, whose partners have proven themselves, and a clock."""

    def __init__(self, where: Path) -> None:
        self.now, self.told = 1000.0, list[h.Happening]()
        self.folders = {name: where / name / f"try-{RUN.hex()}" for name in SITES}
        self.keys: dict[str, MaskKeys] = {}
        for name in SITES:
            self.open(name)
        for name in SITES:
            self.agree(name)

    def open(self, name: str) -> None:
        """As a new process does."""
        report = h.Reporter(self.told.append)
        self.keys[name] = MaskKeys(self.folders[name], 30, report, lambda: self.now)

    def agree(self, name: str) -> None:
        others = {other: keys.public for other, keys in self.keys.items() if other != name}
        self.keys[name].agree(RUN, name, others)

    def settle(self, told: Settled, *names: str) -> None:
        for name in names or SITES:
            self.keys[name].settle(told)

    def sent(self, mode: str, *, of: tuple[str, ...] = SITES) -> dict[str, dict[str, np.ndarray]]:
        words = {"x0": np.arange(6, dtype=np.int16)}
        return {name: fusion.masked(self.keys[name].masking(mode), ASKED, words) for name in of}

    def total(self, mode: str) -> list[int]:
        read = fusion.totals(self.sent(mode), TERMS)["x0"]
        return [round(float(one)) for one in read * fusion.greatest(TERMS) / TERMS.range]

    def held(self, name: str) -> bytes:
        """All that is on its disk."""
        return b"".join(path.read_bytes() for path in sorted(self.folders[name].iterdir()))


@pytest.fixture
def three(tmp_path: Path) -> Three:
    return Three(tmp_path)


SUM = [0, 3, 6, 9, 12, 15]


def test_training_and_service_have_keys_of_their_own(three: Three) -> None:
    """SP-11.18-5, SP-11.18-17."""
    three.settle(Settled(False, 1))
    assert three.total("release") == three.total("infer") == SUM
    first = three.keys["a"]
    assert first.masking("train") is first.masking("evaluate") is first.masking("release")
    training, service = first.masking("train").shared["b"], first.masking("infer").shared["b"]
    assert training != service
    # The secret of the service has gone as soon as the epoch was there; neither key is made from the other.
    assert "secret" not in json.loads((three.folders["a"] / SERVICE_KEY).read_text())
    assert (three.folders["a"] / SERVICE_KEY).stat().st_mode & 0o777 == 0o600


def test_the_key_of_training_goes_when_training_is_over(three: Three) -> None:
    """SP-11.18-16: what was recorded is noise to whoever has the disk from then on; the service goes on."""
    three.settle(Settled(False, 1))
    before, secret = three.sent("release"), (three.folders["a"] / FUSION_KEY).read_bytes()
    shared = three.keys["a"].masking("release").shared["b"]
    three.settle(Settled(True, 1))
    assert all(not (one / FUSION_KEY).exists() for one in three.folders.values())
    assert secret not in three.held("a") and shared.hex().encode() not in three.held("a")
    assert [type(one).__name__ for one in three.told] == ["MaskKeyDeleted"] * 3
    with pytest.raises(PolicyRefused, match="key of the run's training was deleted at this site"):
        three.keys["a"].masking("train")
    # The same words, under other masks, and the same sum.
    after = three.sent("release")
    assert three.total("release") == SUM
    assert not np.array_equal(after["a"]["x0"], before["a"]["x0"])
    # A new process shows the same public keys, and has no more than this one.
    public = three.keys["a"].public
    three.open("a")
    three.agree("a")
    assert three.keys["a"].public == public
    three.settle(Settled(True, 1), "a")
    assert np.array_equal(three.sent("release")["a"]["x0"], after["a"]["x0"])
    # A coordinator that takes its word back gets nothing.
    three.settle(Settled(False, 1), "a")
    with pytest.raises(PolicyRefused, match="key of the run's training was deleted"):
        three.keys["a"].masking("release")


def test_each_epoch_has_a_key_and_there_is_no_way_back(three: Three) -> None:
    """SP-11.18-17, SP-11.18-18."""
    three.settle(Settled(True, 1))
    one, shared = three.sent("infer"), three.keys["a"].masking("infer").shared["b"]
    three.settle(Settled(True, 3))
    assert three.total("infer") == SUM
    assert shared.hex().encode() not in three.held("a")
    assert not np.array_equal(three.sent("infer")["a"]["x0"], one["a"]["x0"])
    # Who is behind, or was told another epoch than it is in, sends nothing that could be taken apart.
    three.settle(Settled(True, 2), "a")
    with pytest.raises(PolicyRefused, match="epoch of the run's inference was deleted"):
        three.keys["a"].masking("infer")
    three.settle(Settled(True, 4), "a")
    with pytest.raises(FusionMismatch, match="do not cancel"):
        three.total("infer")
    # A new process goes on in the epoch, and answers once it is told so on its link.
    three.settle(Settled(True, 4))
    again = three.sent("infer")
    three.open("b")
    three.agree("b")
    with pytest.raises(PolicyRefused, match="epoch of the run's inference was deleted"):
        three.keys["b"].masking("infer")
    three.settle(Settled(True, 4), "b")
    assert np.array_equal(three.sent("infer")["b"]["x0"], again["b"]["x0"])


def test_epochs_that_are_passed_over_are_limited(three: Three) -> None:
    with pytest.raises(PolicyRefused, match=f"epoch {MOST_EPOCHS + 2} of the service, where 1"):
        three.settle(Settled(True, MOST_EPOCHS + 2), "a")


def test_what_is_older_than_the_policy_allows_goes(three: Three) -> None:
    """SP-11.18-19: whatever the coordinator says, or does not."""
    three.settle(Settled(False, 1))
    three.now += 29 * DAY_S
    assert three.total("train") == SUM
    assert three.total("infer") == SUM
    three.open("b")  # its time is on the disk
    three.agree("b")
    three.settle(Settled(False, 1), "b")
    assert three.total("train") == SUM
    three.now += 2 * DAY_S
    for name in SITES:
        with pytest.raises(PolicyRefused, match="key of the run's training was deleted"):
            three.keys[name].masking("train")
        assert not (three.folders[name] / FUSION_KEY).exists()
    for name in SITES:
        with pytest.raises(PolicyRefused, match="epoch of the run's inference was deleted"):
            three.keys[name].masking("infer")
    three.settle(Settled(False, 2))
    assert three.total("infer") == SUM
    shared = three.keys["a"].masking("infer").shared["b"]
    three.now += 29 * DAY_S
    assert three.total("infer") == SUM
    three.now += 2 * DAY_S
    with pytest.raises(PolicyRefused, match="epoch of the run's inference was deleted"):
        three.keys["a"].masking("infer")
    assert shared.hex().encode() not in three.held("a")
    three.settle(Settled(False, 3))
    assert three.total("infer") == SUM


def test_keys_that_masked_nothing_here_age_as_well(three: Three, tmp_path: Path) -> None:
    """SP-11.18-19: with a site's keys its partners' answers can be read, whether or not it was asked itself."""
    three.settle(Settled(False, 1), "b", "c")
    recorded = three.sent("release", of=("b", "c"))
    assert recorded
    shared = json.loads((three.folders["a"] / SERVICE_KEY).read_text())["shared"]["b"]
    secret = (three.folders["a"] / FUSION_KEY).read_bytes()
    forget_keys(three.folders["a"].parent, 30, h.Reporter(), lambda: three.now + 31 * DAY_S)
    assert secret not in three.held("a") and shared.encode() not in three.held("a")
    # Partners may have the public half of a site to which they have not proven themselves.
    alone = tmp_path / "d" / f"try-{RUN.hex()}"
    MaskKeys(alone, 30, h.Reporter(), lambda: three.now)
    forget_keys(alone.parent, 30, h.Reporter(), lambda: three.now + 29 * DAY_S)
    assert (alone / FUSION_KEY).exists() and (alone / SERVICE_KEY).exists()
    forget_keys(alone.parent, 30, h.Reporter(), lambda: three.now + 31 * DAY_S)
    assert not (alone / FUSION_KEY).exists() and not (alone / SERVICE_KEY).exists()


def test_one_folder_that_cannot_be_looked_at_does_not_keep_the_keys_of_others(
    three: Three, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = three.folders["a"].parent
    for name in ("b", "c"):
        three.folders[name].rename(state / f"{name}-{three.folders[name].name}")
    broken = state / f"b-{three.folders['b'].name}"
    honest, told = durable.sync_folder, list[h.Happening]()

    def sync_folder(path: Path) -> None:
        if path == broken:
            raise PermissionError(13, "Permission denied")
        honest(path)

    monkeypatch.setattr(durable, "sync_folder", sync_folder)
    forget_keys(state, 30, h.Reporter(told.append), lambda: three.now + 31 * DAY_S)
    assert not list(state.glob(f"[!b]*/{FUSION_KEY}"))
    assert [type(one).__name__ for one in told].count("DataWarning") == 1


def test_what_was_proven_on_another_link_does_not_count(three: Three) -> None:
    three.settle(Settled(False, 1))
    assert three.total("train") == SUM
    three.keys["a"].begin_link()
    with pytest.raises(PolicyRefused):
        three.keys["a"].masking("train")
    with pytest.raises(PolicyRefused):
        three.keys["a"].masking("infer")
    three.agree("a")
    three.settle(Settled(False, 1), "a")
    assert three.total("train") == three.total("infer") == SUM


def test_runs_that_nobody_works_on_age_as_well(three: Three) -> None:
    """SP-11.18-19: "whether it is connected or not"."""
    three.settle(Settled(False, 1))
    three.total("train")
    three.total("infer")
    shared = three.keys["a"].masking("infer").shared["b"]
    state, report = three.folders["a"].parent, h.Reporter()
    forget_keys(state, 30, report, lambda: three.now + 29 * DAY_S)
    assert (three.folders["a"] / FUSION_KEY).exists()
    three.now += 31 * DAY_S
    forget_keys(state, 30, report, lambda: three.now)
    assert not (three.folders["a"] / FUSION_KEY).exists()
    assert shared.hex().encode() not in three.held("a")
    three.open("a")
    three.agree("a")
    three.settle(Settled(False, 2))
    assert three.total("infer") == SUM


def told_of(told: list[h.Happening]) -> list[tuple[str, ...]]:
    """Happenings with keys, by name, with what they say."""
    return [
        (type(one).__name__, *(str(said) for said in vars(one).values()))
        for one in told
        if "Key" in type(one).__name__
    ]


def test_each_key_that_goes_is_told_of_once(three: Three, tmp_path: Path) -> None:
    """With its run and why; and nothing of the key."""
    run, over = RUN.hex(), "it was made more than 30 days ago ([policy] max_key_days)"
    three.settle(Settled(True, 1), "a")
    three.settle(Settled(True, 1), "a")
    settled = "the coordinator does not need the one before"
    three.settle(Settled(True, 3), "a")
    assert told_of(three.told) == [
        ("MaskKeyDeleted", run, "the coordinator does not need it any more"),
        ("ServiceKeyReplaced", run, "3", settled),
    ]
    three.told.clear()
    three.now += 31 * DAY_S
    three.keys["a"].expire()
    three.keys["a"].expire()
    assert told_of(three.told) == [("ServiceKeyReplaced", run, "4", over)]
    three.told.clear()
    report = h.Reporter(three.told.append)
    for _ in range(2):
        forget_keys(three.folders["b"].parent, 30, report, lambda: three.now)
    assert told_of(three.told) == [("MaskKeyDeleted", run, over), ("ServiceKeyReplaced", run, "2", over)]
    # Of which no partner has proven itself; and when all is over.
    three.told.clear()
    alone = tmp_path / "d" / f"try-{run}"
    MaskKeys(alone, 30, report, lambda: three.now)
    forget_keys(alone.parent, 30, report, lambda: three.now + 31 * DAY_S)
    assert told_of(three.told) == [("MaskKeyDeleted", run, over), ("ServiceKeyDeleted", run, over)]
    three.told.clear()
    for _ in range(2):
        mark_complete(three.folders["c"], report)
    complete = "the run is complete"
    assert told_of(three.told) == [("MaskKeyDeleted", run, complete), ("ServiceKeyDeleted", run, complete)]


def test_log_and_trail_say_that_a_key_was_replaced_or_deleted() -> None:
    replaced, deleted = h.ServiceKeyReplaced("ab", 3, "so"), h.ServiceKeyDeleted("ab", "so")
    assert entry(replaced) == ("service.key_replaced", {"run": "ab", "epoch": 3, "cause": "so"})
    assert entry(deleted) == ("service.key_deleted", {"run": "ab", "cause": "so"})
    for one in (replaced, deleted):
        ((line),) = log_lines(one)
        assert (line.name, line.fields) == entry(one)


@pytest.mark.parametrize("since", [2 * DAY_S, 1e12, float("inf"), float("nan")])
def test_a_time_in_the_future_keeps_no_key(three: Three, since: float) -> None:
    """SP-11.18-19: a clock was wrong once, so nobody knows how old the key is."""
    three.settle(Settled(False, 1))
    secret, shared = (
        (three.folders["a"] / FUSION_KEY).read_bytes(),
        three.keys["a"].masking("infer").shared["b"],
    )
    for name in (PUBLIC, SERVICE_KEY):
        path = three.folders["a"] / name
        path.write_text(json.dumps({**json.loads(path.read_text()), "since": three.now + since}))
    for _ in range(2):
        forget_keys(three.folders["a"].parent, 30, h.Reporter(three.told.append), lambda: three.now)
    assert [one[0] for one in told_of(three.told)] == ["MaskKeyDeleted", "ServiceKeyReplaced"]
    assert all("the clock was wrong then or is now" in one[-1] for one in told_of(three.told))
    assert secret not in three.held("a") and shared.hex().encode() not in three.held("a")
    three.open("a")
    three.agree("a")
    three.settle(Settled(False, 2))
    assert three.total("infer") == SUM


def test_a_clock_that_goes_back_keeps_no_key_either(three: Three) -> None:
    """While the process lives; by less than a day, nothing happens."""
    three.settle(Settled(False, 1))
    three.now -= 0.9 * DAY_S
    assert three.total("train") == three.total("infer") == SUM
    assert told_of(three.told) == []
    three.now -= DAY_S
    three.keys["a"].expire()
    assert [one[0] for one in told_of(three.told)] == ["MaskKeyDeleted", "ServiceKeyReplaced"]
    three.settle(Settled(False, 2))
    assert three.total("infer") == SUM


def test_a_crash_between_the_files_costs_nothing(tmp_path: Path) -> None:
    """SP-11.18-5: until the public keys are written, nobody has seen them."""
    where = tmp_path / f"try-{RUN.hex()}"

    def opened() -> MaskKeys:
        return MaskKeys(where, 30, h.Reporter())

    first = opened().public
    assert opened().public == first
    (where / PUBLIC).unlink()
    assert opened().public.training == first.training
    assert opened().public == opened().public
    (where / ANSWERS).unlink()
    with pytest.raises(DataError, match="is missing, and only it tells"):
        opened()


@pytest.mark.parametrize("name", [PUBLIC, SERVICE_KEY])
@pytest.mark.parametrize(
    "wrong", [b"", b"[]", b"{}", b'{"epoch": 1, "keys": "00"}', b'{"secret": 7, "keys": []}']
)
def test_a_damaged_file_is_one_line(tmp_path: Path, name: str, wrong: bytes) -> None:
    three = Three(tmp_path)
    path = three.folders["a"] / name
    path.write_bytes(wrong)

    def taken_up() -> None:
        three.open("a")
        three.agree("a")

    with pytest.raises(DataError, match=r"begin a new run$") as error:
        taken_up()
    assert str(path) in str(error.value) and "\n" not in str(error.value)


# --- with real roles -----------------------------------------------------------------------------------


def keys_of(scene: Scene, modality: str) -> Callable[[str], Path]:
    (run,) = (scene.folder / f"site-{modality}" / "state").glob("try-*")
    return run.__truediv__


def epoch(scene: Scene, modality: str) -> int:
    return int(json.loads(keys_of(scene, modality)(SERVICE_KEY).read_text())["epoch"])


async def test_a_frozen_run_that_is_served_keeps_no_key_of_its_training(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SP-11.18-16, SP-11.18-18: the coordinator has said no `complete`, and a request takes its key with it."""
    honest = BankTrainer.train

    async def train(self: BankTrainer, *given: Any) -> None:
        # Not when the training ends, which may be long after.
        await until(lambda: not any(keys_of(scene, modality)(FUSION_KEY).exists() for modality in PRIVATE))
        await honest(self, *given)

    monkeypatch.setattr(BankTrainer, "train", train)
    any_encoder = {"min_encoder_noise": 0, "min_encoder_rate": 0}
    policy = {"preset": "private", "min_partners": 2, **any_encoder}
    cast_sum(scene, PRIVATE, policy, training={"encoders": "frozen", **SLOW})
    async with scene.running() as on:
        comes(scene, "NEW_Nora", 77)
        await segmented(scene, "t1ce", "NEW_Nora")
        for modality in PRIVATE:
            assert not keys_of(scene, modality)(FUSION_KEY).exists()
        await until(lambda: {epoch(scene, modality) for modality in PRIVATE} == {2})
        record = json.loads((scene.folder / "hub" / "state" / "try.run.json").read_text())
        assert (record["state"], record["trained"], record["epoch"]) == ("serving", True, 2)
        comes(scene, "NEW_Otto", 78)
        await stop(on, "hub", "site-t1")
        async with serving(scene, only=["hub", "site-t1"]):
            await segmented(scene, "t1ce", "NEW_Otto")
            # A new process of the coordinator, and one more request.
            await until(lambda: {epoch(scene, modality) for modality in PRIVATE} == {4})


async def test_a_coordinator_that_takes_too_long_is_answered_no_more(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SP-11.18-19."""
    monkeypatch.setattr("splitpeer.site.mask_keys.DAY_S", 1e-12)
    cast(scene)
    for modality in THREE:
        site(scene, modality, max_key_days=1 if modality == "flair" else 1e18)
    ran = await scene.together()
    assert "the key of the run's training was deleted at this site" in str(ran.clients["site-flair"])
    assert ran.error is not None
    assert not (folder(scene, "site-flair") / FUSION_KEY).exists()
    assert (folder(scene, "site-t1") / FUSION_KEY).exists()


async def test_a_coordinator_that_went_back_to_an_earlier_epoch_ends_nobody(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """SP-11.18-18: its record comes from a backup. What it asks in a key that was replaced is declined, and the sites
    stay; when it has come to their epoch, they answer. No key comes back."""
    monkeypatch.setattr(client, "REST_S", 0.05)
    cast_sum(scene, ("t1ce", "t2"), {"min_partners": 1}, training=SLOW)
    record = scene.folder / "hub" / "state" / "try.run.json"
    seen = list[int]()

    def epochs() -> set[int]:
        now = {epoch(scene, modality) for modality in scene.modalities}
        seen.append(min(now))
        return now

    async with scene.running() as on:
        comes(scene, "NEW_Nora", 77)
        for done in (2, 3, 4):
            await segmented(scene, "t1ce", "NEW_Nora")
            await until(lambda done=done: epochs() == {done})  # type: ignore[misc]
        await stop(on, "hub")
        record.write_text(json.dumps({**json.loads(record.read_text()), "epoch": 1}))
        async with serving(scene, only=["hub"]):
            # In epoch 2 and then 3, where the sites are in 4.
            for _ in range(2):
                status = await refused(scene, "t1ce", "NEW_Nora")
                assert status.cause == "lost", status
                assert epochs() == {4}
            await segmented(scene, "t1ce", "NEW_Nora")
            await until(lambda: epochs() == {5})
        assert not any(on.tasks[f"site-{modality}"].done() for modality in scene.modalities)
    assert seen == sorted(seen)
    said = {
        one["cause"]
        for modality in scene.modalities
        for one in lines(scene, f"site-{modality}", "policy.refused")
    }
    assert said and all("4" in one and "backup" in one and "\n" not in one for one in said), said
    pauses = [one.fields["pause_s"] for one in caplog.records if one.getMessage() == "policy.refused"]  # type: ignore[attr-defined]
    assert len(pauses) > 2 and set(pauses) == {0.05}


async def test_a_run_whose_encoders_learn_ends_its_key_of_training_when_it_is_complete(scene: Scene) -> None:
    """SP-11.18-16: in a run that goes on with inference; log and trail say it, of each key."""
    cast_sum(scene, ("t1ce", "t2"), {"min_partners": 1}, training=SLOW)
    record = scene.folder / "hub" / "state" / "try.run.json"
    async with scene.running() as on:
        await until(lambda: record.exists() and json.loads(record.read_text())["state"] == "serving")
        await until(lambda: not any(keys_of(scene, one)(FUSION_KEY).exists() for one in scene.modalities))
        await segmented(scene, "t1ce", held_out(scene)[0])
        await until(lambda: {epoch(scene, one) for one in scene.modalities} == {2})
        assert not any(task.done() for task in on.tasks.values())
    assert json.loads(record.read_text())["trained"]
    for modality in scene.modalities:
        (gone,) = lines(scene, f"site-{modality}", "fusion.key_deleted")
        assert gone["cause"] == "the coordinator does not need it any more"
        (replaced,) = lines(scene, f"site-{modality}", "service.key_replaced")
        assert (replaced["epoch"], replaced["run"]) == (2, gone["run"])
