from __future__ import annotations

import threading
import time
from pathlib import Path

import numpy as np
import pytest

from splitpeer.data.augment import augment
from splitpeer.data.layouts import Case
from splitpeer.data.loader import Prefetcher, SiteData
from splitpeer.data.pseudonym import pseudonym
from splitpeer.data.sampling import Sample
from splitpeer.data.volumes import Volumes
from splitpeer.errors import DataError, DeadlinePassed


@pytest.fixture
def site(tmp_path: Path, files) -> SiteData:
    cases = [
        Case(name, files.save(tmp_path / f"{name}.nii.gz", files.head((10, 10, 9), seed=n)))
        for n, name in enumerate("ab")
    ]
    return SiteData(Volumes(cases, salt=files.SALT))


def samples(files) -> list[Sample]:
    return [Sample(pseudonym(files.SALT, n), o) for n, o in (("b", (1, 1, 4)), ("a", (-2, 0, 3)))]


def test_a_batch_keeps_the_order_of_its_samples(site: SiteData, files) -> None:
    out = site.batch(samples(files), (8, 8, 4), None, "t1")
    assert out.shape == (2, 1, 8, 8, 4) and out.dtype == np.float32
    for row, sample in zip(out, samples(files), strict=True):
        np.testing.assert_array_equal(row, site.volumes.window(sample.key, sample.origin, (8, 8, 4)))


def test_slices_lose_their_last_axis(site: SiteData, files) -> None:
    out = site.batch(samples(files), (8, 8, 1), None, "t1")
    assert out.shape == (2, 1, 8, 8)
    np.testing.assert_array_equal(out[..., None], site.batch(samples(files), (8, 8, 4), None, "t1")[..., :1])


def test_augmentation_follows_the_place_in_the_batch(site: SiteData, files) -> None:
    plain = site.batch(samples(files), (8, 8, 1), None, "t1")
    out = site.batch(samples(files), (8, 8, 1), 99, "t1")
    for index in range(2):
        np.testing.assert_array_equal(out[index], augment(plain[index], 99, index, "t1"))
    micro = site.batch(samples(files)[1:], (8, 8, 1), 99, "t1", places=[1])
    np.testing.assert_array_equal(micro, out[1:])


def test_images_and_masks_of_a_batch_move_together(tmp_path: Path, files) -> None:
    marks = np.random.default_rng(0).integers(0, 4, (8, 8, 8)).astype(np.uint8)
    path = files.save(tmp_path / "p.nii", marks)
    image, mask = (SiteData(Volumes([Case("p", path)], salt=files.SALT, labels=n)) for n in (None, "msd"))
    chosen = [Sample(pseudonym(files.SALT, "p"), (0, 0, z)) for z in range(6)]
    grey, regions = image.batch(chosen, (8, 8, 2), 3, "t2"), mask.batch(chosen, (8, 8, 2), 3, None)
    assert regions.shape == (6, 3, 8, 8, 2) and regions.dtype == np.uint8
    np.testing.assert_array_equal(grey[:, 0] != 0, regions[:, 0] == 1)


def test_results_come_in_order_and_ahead_by_depth() -> None:
    started, gate = [], threading.Event()

    def make(number: int) -> int:
        started.append(number)
        if number == 0:
            gate.wait(5)
        return number * 10

    with Prefetcher(make, depth=2) as ahead:
        for number in range(8):
            ahead.submit(number, 1)
        gate.set()
        deadline = time.monotonic() + 5
        while len(started) < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.05)
        assert started == [0, 1, 2]  # two ready, the third waits to be delivered, no more
        assert [ahead.get(5) for _ in range(8)] == [n * 10 for n in range(8)]


def test_an_error_is_raised_in_its_turn_and_the_next_batch_still_comes(tmp_path: Path, files) -> None:
    cases = [Case(n, files.save(tmp_path / f"{n}.nii.gz", files.head())) for n in "ab"]
    files.truncate(cases[0].path)
    site = SiteData(Volumes(cases, salt=files.SALT))
    a, b = ([Sample(pseudonym(files.SALT, n), (0, 0, 0))] for n in "ab")
    with Prefetcher(lambda wanted: site.batch(wanted, (4, 4, 4), None, "t1")) as ahead:
        for wanted in (b, a, b):
            ahead.submit(wanted, 1)
        assert ahead.get(5).shape == (1, 1, 4, 4, 4)
        with pytest.raises(DataError, match=r"a\.nii\.gz: truncated or corrupt"):
            ahead.get(5)
        assert ahead.get(5).shape == (1, 1, 4, 4, 4)


def test_every_wait_has_a_deadline() -> None:
    gate = threading.Event()
    with Prefetcher(lambda _: gate.wait(5), pending=1) as ahead:
        with pytest.raises(DeadlinePassed, match=r"no batch was read within 0\.05 s"):
            ahead.get(0.05)
        ahead.submit(0, 1)
        while not ahead._asked.empty():  # until the thread has taken it up
            time.sleep(0.01)
        ahead.submit(1, 1)
        with pytest.raises(DeadlinePassed, match="1 batches still wait"):
            ahead.submit(2, 0.05)
        gate.set()


@pytest.mark.parametrize("submitted", [0, 1, 5, 50])
def test_closing_ends_the_thread_whatever_it_waits_for(submitted: int) -> None:
    before = threading.active_count()
    ahead = Prefetcher(lambda n: n, depth=1, pending=64)
    for number in range(submitted):
        ahead.submit(number, 1)
    time.sleep(0.02)
    started = time.monotonic()
    ahead.close()
    ahead.close()
    assert time.monotonic() - started < 3 and threading.active_count() == before
    with pytest.raises(RuntimeError, match="closed"):
        ahead.get(1)


def test_closing_does_not_wait_for_a_read_that_hangs() -> None:
    gate = threading.Event()
    ahead = Prefetcher(lambda _: gate.wait(5))
    ahead.submit(0, 1)
    while not ahead._asked.empty():
        time.sleep(0.01)
    started = time.monotonic()
    ahead.close(0.1)
    assert time.monotonic() - started < 2 and ahead._thread.is_alive()
    gate.set()
    ahead._thread.join(5)
    assert not ahead._thread.is_alive()
