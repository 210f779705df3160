"""Whom the coordinator segments for, from what, and what a site is told: without networks and links."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from splitpeer.coordinator.frozen import inference as frozen
from splitpeer.coordinator.frozen.inference import BankSegmenter
from splitpeer.coordinator.inference import service as inference
from splitpeer.coordinator.inference.locating import AWAY, NO_PART, NoSegmentation, Sites, fitting
from splitpeer.coordinator.inference.requests import InferenceRequest, RequestState
from splitpeer.coordinator.inference.tally import RequestTally
from splitpeer.coordinator.remote_site import RemoteSite
from splitpeer.coordinator.settling import Settling
from splitpeer.data.geometry import Geometry
from splitproto.errors import DeadlineExceeded
from splitproto.messages import Segment, Unsegmented
from splitproto.records import Patient

KEY = bytes(range(16))
SOON = 20.0
_ids = itertools.count(1)


def asked() -> Segment:
    return Segment(next(_ids).to_bytes(16, "big"), KEY, "mask")


def patient(shape: tuple[int, int, int], seats: tuple[int, ...] | None = None) -> Patient:
    grid = Geometry.of(shape, np.eye(4))
    return Patient(KEY, shape, grid.spacing, grid.directions, grid.origin, grid.stored, seats)


class Named:
    """A site with one seat."""

    takes = 10**9

    def __init__(self, name: str) -> None:
        self.name, self.seats = name, (SimpleNamespace(name=name),)


def fits(located: dict[Any, Patient]) -> Patient:
    """What `a` asks for, where these have located the patient."""
    sites = Sites()
    sites.located = located
    return fitting(InferenceRequest("a", asked()), sites, 1)


def test_who_fills_no_seat_gets_no_mask() -> None:
    """SP-11.19-5: `located` with a grid is not an image."""
    assert fits({Named("a"): patient((8, 8, 8)), Named("b"): patient((8, 8, 8))}).shape == (8, 8, 8)
    with pytest.raises(NoSegmentation) as ended:
        fits({Named("a"): patient((8, 8, 8), seats=()), Named("b"): patient((8, 8, 8))})
    assert ended.value.code == "absent"


def test_a_grid_is_told_to_nobody_else(caplog: pytest.LogCaptureFixture) -> None:
    """SP-11.19-6: who asks with any grid does not learn that of the others."""
    with pytest.raises(NoSegmentation) as ended:
        fits({Named("a"): patient((8, 8, 8)), Named("b"): patient((8, 8, 31))})
    assert ended.value.code == "misaligned" and " b " in ended.value.reason
    assert "31" not in ended.value.reason and "31" in caplog.text
    assert KEY.hex() not in caplog.text


class Found(Exception):
    """The seats of each site by patient, instead of a segmentation."""

    def __init__(self, lists: Any) -> None:
        self.lists = lists


class Listing(BankSegmenter):
    """Of sites that have all released the patient for another request."""

    def _fits(self, *_: Any) -> bool:
        return True


async def test_what_was_released_for_another_is_not_used_where_the_site_refuses(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """SP-11.19-14: that of a site that is away is, if it is all there."""

    def seated(run: Any, key: bytes, lists: Any) -> Any:
        raise Found(lists)

    monkeypatch.setattr(frozen, "seated", seated)

    async def on_disk(function: Callable[..., Any], *args: Any, what: str) -> Any:
        return function(*args)

    def bank(*missing: Any) -> Any:
        contents = SimpleNamespace(releases=[SimpleNamespace(shapes={"level": (1,)})])
        return SimpleNamespace(contents=contents, dropped=frozenset(), missing=lambda: missing)

    seats = SimpleNamespace(of=lambda name: (SimpleNamespace(name=name),))
    segmenter = Listing.__new__(Listing)
    segmenter._run = SimpleNamespace(on_disk=on_disk, seating=SimpleNamespace(seats=seats))  # type: ignore[assignment]
    banks = {"b": bank(), "c": bank(), "d": bank(), "e": bank("a window")}
    segmenter._requested = SimpleNamespace(of=lambda key: banks)  # type: ignore[assignment]
    sites = Sites({"b": "refused", "c": AWAY, "d": NO_PART, "e": AWAY}, {Named("a"): patient((8, 8, 8))})  # type: ignore[dict-item]
    with pytest.raises(Found) as found:
        await segmenter._released(InferenceRequest("a", asked()), patient((8, 8, 8)), sites, {}, None)  # type: ignore[arg-type]
    assert found.value.lists == {"a": {KEY: ("a",)}, "c": {KEY: ("c",)}}


async def test_a_site_that_takes_nothing_in_time_has_no_link_any_more() -> None:
    """Or what it was sent would stay in memory."""
    failed: list[Exception] = []

    async def send(message: Any) -> None:
        raise DeadlineExceeded("waited 5 s for the peer to take a segmented")

    link = SimpleNamespace(begun=True, send=send, session=SimpleNamespace(fail=failed.append))
    mute = RemoteSite.__new__(RemoteSite)
    mute.name = "mute"
    mute._presence = SimpleNamespace(here=True, link=link)  # type: ignore[assignment]
    mute._report = lambda happening: None  # type: ignore[assignment]
    assert not await mute.tell(Unsegmented(bytes(16), "failed", ""))
    assert [type(error) for error in failed] == [DeadlineExceeded]


class Taking:
    """A site that is here, and takes what comes of a request when its gate is open."""

    absent, here, features = False, True, frozenset({"infer"})

    def __init__(self, name: str) -> None:
        self.name, self.gate = name, asyncio.Event()
        self.requests: Any = None

    def set_committed(self, step: int) -> None: ...

    async def bring(self, *_: Any, **__: Any) -> None: ...

    async def tell(self, message: Any) -> bool:
        if isinstance(message, Unsegmented):
            await self.gate.wait()
        return True


class Noting:
    """Takes the place of `PatientSegmenter`."""

    def __init__(self, run: Any, *_: Any) -> None:
        self.worked: list[str] = []
        self.settling = Settling(run)

    async def heed(self) -> None: ...

    async def clear_up(self) -> None: ...

    async def segment(self, request: InferenceRequest, progress: Any) -> Unsegmented:
        self.worked.append(request.site)
        return Unsegmented(request.asked.request, "failed", "")


class Quiet:
    """A reporter."""

    def __call__(self, happening: Any) -> None: ...

    def to(self, sink: Any) -> Quiet:
        return self


def run_of(folder: Path, *sites: Taking) -> Any:
    return SimpleNamespace(
        report=Quiet(), team=SimpleNamespace(sites=sites, all_needed=True), draining=False, committed=3,
        job=SimpleNamespace(name="job", frozen=False, fusion=None),
        files=SimpleNamespace(run=bytes(16), checkpoints=folder, record=SimpleNamespace(state="new")),
        seating=SimpleNamespace(seats=SimpleNamespace(names=()), filled={}),
        settings=SimpleNamespace(deadlines=SimpleNamespace(return_s=SOON)),
    )  # fmt: skip


SETTINGS: Any = SimpleNamespace(max_queue=9, serve="after", share=1.0)


async def test_requests_of_a_site_that_does_not_return_are_given_up(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """SP-11.19-13: what waits, and what was worked out for it; others stay, and so do its own if it returns in time."""
    monkeypatch.setattr(inference, "PatientSegmenter", Noting)
    gone, other = Taking("gone"), Taking("other")
    serves = inference.Service(run_of(tmp_path, gone, other), SETTINGS, None)  # type: ignore[arg-type]
    clock = [0.0]
    monkeypatch.setattr(serves, "_now", lambda: clock[0])

    def left(here: bool, now: float) -> list[tuple[str, RequestState]]:
        gone.here, clock[0] = here, now
        serves._tidy()
        return [(one.site, one.state) for one in serves._requests]

    for site in (gone, gone, other):
        await site.requests(asked())
    first = next(one for one in serves._requests if one.site == "gone")
    await serves._work(first)
    worked, waits, others = (
        ("gone", RequestState.ANSWERED),
        ("gone", RequestState.QUEUED),
        ("other", RequestState.QUEUED),
    )
    assert left(True, 5) == [worked, waits, others]
    # Away for as long as it may be, and here again.
    assert left(False, SOON) == [worked, waits, others]
    assert left(True, SOON) == [worked, waits, others]
    assert left(False, 2 * SOON) == [waits, others], "its answer had waited longer than that"
    assert left(False, 2 * SOON + 1) == [others]
    assert left(False, 9 * SOON) == [others]
    assert serves._tally.by_site["gone"] == {"segmented": 0, "refused": 0, "cancelled": 1, "failed": 1}
    for task in serves._sending:
        task.cancel()


async def test_a_site_gets_no_more_work_before_it_took_what_there_is(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(inference, "PatientSegmenter", Noting)
    mute, other = Taking("mute"), Taking("other")
    other.gate.set()
    run = run_of(tmp_path, mute, other)
    serves = inference.Service(run, SETTINGS, None)  # type: ignore[arg-type]
    worked = serves._segmenter.worked  # type: ignore[attr-defined]
    for one in (mute, mute, other, other):
        await one.requests(asked())

    async def until(sites: list[str]) -> None:
        async with asyncio.timeout(SOON):
            while len(worked) < len(sites):  # noqa: ASYNC110 (nobody would set an event)
                await asyncio.sleep(0)
        assert worked == sites

    task = asyncio.create_task(serves.serve())
    # The other's third shows that the loop has passed the mute one's second.
    await until(["mute", "other", "other"])
    await other.requests(asked())
    await until(["mute", "other", "other", "other"])
    mute.gate.set()
    await until(["mute", "other", "other", "other", "mute"])
    run.draining = True
    serves.wake()
    await task
    # Counted for the next process.
    assert {site: of["failed"] for site, of in RequestTally(tmp_path).by_site.items()} == {
        "mute": 2,
        "other": 3,
    }
