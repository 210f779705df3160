"""Power fails, or the disk fills up, at every moment of a save: what was saved stays safe."""

from __future__ import annotations

import itertools
import logging
import random
import shutil
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

import pytest
import torch

from splitpeer.errors import DataError
from splitpeer.storage import checkpoint, durable

from .power_loss import Disk, Killed, State, found, lay_out

RUN = Path("state") / "try-0123"
TENSORS = {"model/weight": torch.arange(160, dtype=torch.float32), "optimiser/step": torch.tensor(7.0)}


def tensors(step: int) -> dict[str, torch.Tensor]:
    return {name: tensor + step for name, tensor in TENSORS.items()}


class Model:
    """Runs verbs of `checkpoint` on a disk, and knows what must be found whenever the power goes."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        root.mkdir()
        self.disk = Disk(root)
        self.folder = root / RUN
        self._patch, self._look = monkeypatch, root.parent / "look"
        self.seen = 0
        self.real: set[str] = set()
        """Digests of all that was ever whole."""

    def run(self, verb: Callable[[], object]) -> None:
        """`verb` on the disk that notes what is done to it."""
        with self._patch.context() as patched:
            for module in (durable, checkpoint):
                patched.setattr(module, "os", self.disk)
            try:
                verb()
            finally:
                self.real.update(self.held().values())
        assert self.disk.kept() == found(self.disk.root), "something went past the model"

    def save(self, step: int, keep: int | Collection[int] = 3) -> None:
        # No two saves are equal, even of the same step.
        meta = {"step": step, "calls": len(self.disk.calls)}
        self.run(lambda: checkpoint.save(self.folder, step, tensors(step), meta, keep))

    def held(self) -> dict[int, str]:
        """What is found if all stays as it is."""
        return checkpoint.available(self.folder)

    def after_a_power_cut(self, first: int) -> Iterator[tuple[bool, dict[int, str]]]:
        """For every moment from call `first` on and every outcome: (whether all had returned, what is found)."""
        for count in range(first, len(self.disk.calls) + 1):
            for state in self.disk.states(count):
                self.seen += 1
                yield count == len(self.disk.calls), self.look(state)

    def look(self, state: State) -> dict[int, str]:
        shutil.rmtree(self._look, ignore_errors=True)
        lay_out(state, self._look)
        return checkpoint.available(self._look / RUN)

    def repair(self) -> None:
        """On what the last power cut left, work goes on."""
        digest = checkpoint.save(self._look / RUN, 900, TENSORS, {"step": 900}, keep=9)
        assert checkpoint.available(self._look / RUN)[900] == digest
        assert not [*self._look.rglob("*.part")]


def check_a_save(model: Model, step: int, keep: int | Collection[int], stay: Collection[int]) -> None:
    """Whatever the moment: what is to stay is there, and nothing went for a new one that is not there."""
    before, first = model.held(), len(model.disk.calls)
    # A save that failed at its very last sync may have left a whole one that the next power cut takes.
    safe = set(before).intersection(*(model.look(state) for state in model.disk.states(first)))
    assert set(stay) <= safe
    model.save(step, keep)
    new = model.held()[step]
    for returned, whole in model.after_a_power_cut(first):
        assert model.real.issuperset(whole.values()), "neither the old nor the new one"
        assert set(stay) <= set(whole), "one that was to stay is lost"
        if not safe <= set(whole):
            assert whole.get(step) == new, "an old one went before the new one was safe"
        if returned:
            assert whole.get(step) == new, "saved, and lost"
        if random.Random(model.seen).random() < 0.1:
            model.repair()


def steps(*before: int) -> Callable[[Model], None]:
    return lambda model: [model.save(step, keep=9) for step in before] and None


def with_a_part(model: Model) -> None:
    """An earlier save was killed."""
    model.save(100)
    later = itertools.count(1)
    while not [*model.folder.glob("*.part")]:
        model.disk.killed_at = len(model.disk.calls) + next(later)
        with pytest.raises(Killed):
            model.save(200)
    model.disk.killed_at = None


CASES = {
    "the very first": (steps(), 0, 3, ()),
    "the fourth of three": (steps(100, 200, 300), 400, 3, (200, 300)),
    "the only one that stays": (steps(100), 200, 1, ()),
    "named ones stay": (steps(0, 100, 200, 300), 400, (100, 300), (100, 300)),
    "the same step again": (steps(100, 200), 200, 3, (100, 200)),
    "after a crash": (with_a_part, 200, 3, (100,)),
}


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Thousands of torn checkpoints are skipped, each with its warning."""
    before = checkpoint.log.level
    checkpoint.log.setLevel(logging.CRITICAL)
    yield
    checkpoint.log.setLevel(before)


@pytest.mark.parametrize("case", CASES)
def test_the_power_goes_in_a_save(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare, step, keep, stay = CASES[case]
    model = Model(tmp_path / "disk", monkeypatch)
    prepare(model)
    check_a_save(model, step, keep, stay)
    assert model.seen > 30, "the model has lost its teeth"


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("deaf", ["sync", "sync-folder"])
def test_without_either_fsync_it_is_seen(
    case: str, deaf: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare, step, keep, stay = CASES[case]
    model = Model(tmp_path / "disk", monkeypatch)
    prepare(model)
    model.disk.settle()
    model.disk.deaf = frozenset({deaf})
    with pytest.raises(AssertionError, match=r"saved, and lost|before the new one was safe|to stay is lost"):
        check_a_save(model, step, keep, stay)


def test_the_power_goes_in_a_rollback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once it is done, the void ones never come back; what is gone back to is never in danger."""
    model = Model(tmp_path / "disk", monkeypatch)
    steps(100, 200, 300)(model)
    before, first = model.held(), len(model.disk.calls)
    model.run(lambda: checkpoint.discard_after(model.folder, 100))
    for returned, whole in model.after_a_power_cut(first):
        assert whole.items() <= before.items()
        assert whole[100] == before[100]
        assert not returned or list(whole) == [100]
    check_a_save(model, 200, 3, (100,))


@pytest.mark.parametrize("case", CASES)
def test_the_disk_is_full_at_every_moment(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It fails with one line, nothing half-written stays, all that was there is whole, and with room it works."""
    prepare, step, keep, stay = CASES[case]
    for moment in range(1000):
        root = tmp_path / str(moment)
        root.mkdir()
        model = Model(root / "disk", monkeypatch)
        prepare(model)
        before, first = model.held(), len(model.disk.calls)
        model.disk.full_at = first + moment
        try:
            model.save(step, keep)
        except DataError as error:
            said = str(error)
        else:
            break
        assert f"step-{step:08d}.safetensors: checkpoint not written (No space left on device)" in said
        assert not [*model.disk.root.rglob("*.part")]
        held = model.held()
        assert {at: digest for at, digest in held.items() if at != step} == {
            at: digest for at, digest in before.items() if at != step
        }
        assert step in held or step not in before
        for _, whole in model.after_a_power_cut(first):
            assert set(before) <= set(whole)
        model.disk.full_at = None
        check_a_save(model, step, keep, stay)
    assert moment > 5, "only calls of a whole save were refused"


# --- torn at random ------------------------------------------------------------------------------------------


def torn(good: bytes, other: bytes, source: random.Random) -> bytes:
    """What disks and people make of a file."""
    kind = source.choice(("cut", "bits", "zeros", "mixed", "longer", "moved"))
    page = source.choice((16, 512, 4096))
    at = source.randrange(len(good))
    if kind == "cut":
        return good[:at]
    if kind == "longer":
        return good + source.randbytes(page)
    if kind == "moved":
        return good[:at] + good[at + 1 :] + bytes(1)
    data = bytearray(good)
    if kind == "bits":
        for _ in range(source.choice((1, 1, 2, 8, 64))):
            data[source.randrange(len(data))] ^= 1 << source.randrange(8)
        return bytes(data)
    for start in range(0, len(data), page):
        if source.random() < 0.5:
            end = min(start + page, len(data))
            data[start:end] = bytes(end - start) if kind == "zeros" else other[start:end]
    return bytes(data)


@pytest.mark.parametrize("seed", range(4))
def test_torn_at_random_is_never_taken_for_good(seed: int, tmp_path: Path) -> None:
    source = random.Random(seed)
    big = {"model/weight": torch.randn(5000, generator=torch.Generator().manual_seed(seed))}
    names = [tmp_path / f"step-{step:08d}.safetensors" for step in (100, 200)]
    checkpoint.save(tmp_path, 100, big, {"step": 100})
    checkpoint.save(tmp_path, 200, {"model/weight": big["model/weight"] + 1}, {"step": 200})
    other, good = (name.read_bytes() for name in names)
    refused = 0
    for _ in range(400):
        data = torn(good, other, source)
        names[1].write_bytes(data)
        try:
            loaded, meta, _ = checkpoint.load(tmp_path, 200)
        except DataError:
            refused += 1
            assert list(checkpoint.available(tmp_path)) == [100]
            continue
        # Only padding may change unseen: what is loaded is exactly what was saved.
        assert meta == {"step": 200}
        assert torch.equal(loaded["model/weight"], big["model/weight"] + 1)
    assert refused > 300
