"""The trail of a role whose disk is full: it waits, in order, and what is dropped is counted."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import pytest

from splitpeer.daemon import clerk
from splitpeer.daemon.trail import entries, verify
from splitpeer.daemon.witness import Witness
from splitpeer.errors import DiskTrouble

if TYPE_CHECKING:
    from tests.conftest import SmallDisk

    from .scene import Scene


def made(scene: Scene, small_disk: SmallDisk) -> Witness:
    scene.coordinator(peer={"state": str(small_disk.folder / "state")})
    return Witness(scene.config("hub"))


async def test_it_waits_for_room(
    scene: Scene, small_disk: SmallDisk, caplog: pytest.LogCaptureFixture
) -> None:
    seen = made(scene, small_disk)
    path = small_disk.folder / "state" / "audit.jsonl"
    with caplog.at_level(logging.INFO, clerk.__name__):
        async with seen.on_duty():
            small_disk.fill(but=4096)
            for number in range(60):
                seen.note("link.up", number=number, peer="x" * 100)
            # The clerk does one thing after the other.
            seen._clerk._thread.submit(small_disk.make_room).result()
            assert verify(path).entries < 40
            seen.note("job.checkpoint", step=100)
    assert verify(path).whole
    found = entries(path)
    assert [e["event"] for e in found] == [
        "peer.start",
        *["link.up"] * 60,
        "job.checkpoint",
        "peer.stop",
    ]
    assert [e["number"] for e in found if e["event"] == "link.up"] == list(range(60))
    times = [str(e["time"]) for e in found]
    assert times == sorted(times), "each has the time at which it happened"
    assert [record.message for record in caplog.records] == ["trail.failed", "trail.written"]


async def test_a_start_on_a_full_disk_may_be_tried_again(scene: Scene, small_disk: SmallDisk) -> None:
    """Exit 3, which a service manager restarts; a setting that is wrong is 4, which it does not."""
    seen = made(scene, small_disk)
    small_disk.fill()
    with pytest.raises(DiskTrouble, match=r"audit trail cannot be written .* make room") as trouble:
        async with seen.on_duty():
            pass
    assert trouble.value.exit_code == 3
    small_disk.make_room()
    async with seen.on_duty():
        pass


async def test_what_is_given_up_is_counted(
    scene: Scene, small_disk: SmallDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = made(scene, small_disk)
    monkeypatch.setattr(seen._clerk._pending, "_most", 10)
    path = small_disk.folder / "state" / "audit.jsonl"
    async with seen.on_duty():
        small_disk.fill()
        for number in range(200):
            seen.note("link.up", number=number, peer="x" * 100)
        seen._clerk._thread.submit(small_disk.make_room).result()
    assert verify(path).whole
    found = entries(path)
    lost = next(at for at, e in enumerate(found) if e["event"] == "trail.lost")
    kept = [e["number"] for e in found if e["event"] == "link.up"]
    assert found[lost]["lines"] == 200 - len(kept)
    assert kept[lost - 1 :] == list(range(190, 200))
    assert found[-1]["event"] == "peer.stop"


async def test_no_start_without_a_trail(scene: Scene, small_disk: SmallDisk) -> None:
    seen = made(scene, small_disk)
    small_disk.fill()
    with pytest.raises(DiskTrouble, match=r"No space left on device.*make room"):
        async with seen.on_duty():
            pytest.fail("it began")


async def test_a_line_that_cannot_be_written_holds_up_no_other(
    scene: Scene, small_disk: SmallDisk, caplog: pytest.LogCaptureFixture
) -> None:
    """What JSON cannot hold is written as text; any other mistake of ours costs its own line."""
    seen = made(scene, small_disk)
    async with seen.on_duty():
        seen.note("job.loss", loss=float("nan"), shapes=[(1, 2)], what={"a": 1}, key=b"k")
        seen.note("job.step", at=0.0)  # a field that `Trail.note` itself has
        seen.note("job.checkpoint", step=100)
    path = small_disk.folder / "state" / "audit.jsonl"
    assert verify(path).whole
    assert [e["event"] for e in entries(path)] == ["peer.start", "job.loss", "job.checkpoint", "peer.stop"]
    loss = entries(path)[1]
    assert (loss["loss"], loss["shapes"], loss["what"]) == ("nan", ["(1, 2)"], "{'a': 1}")
    assert [r.message for r in caplog.records if r.name == clerk.__name__] == ["trail.line_failed"]
