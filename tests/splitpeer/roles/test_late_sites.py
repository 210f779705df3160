"""A site that keeps requests waiting (SP-11.19-12) is not cut off for it at once, and does not hold up all others."""

from __future__ import annotations

import asyncio
import threading

from splitpeer.coordinator.inference.late_sites import LEFT_OUT_S, TIMES, LateSites
from splitpeer.coordinator.inference.segmenting import PatientSegmenter
from splitpeer.site.job import SiteJob

from .served import LONG_S, asked, comes, ended, segmented, serving, until


def test_twice_in_a_row_and_once_more_after_a_while() -> None:
    late = LateSites()
    assert TIMES == 2
    assert not late.note_late("slow", 10.0)
    late.note_in_time("slow")
    assert not late.note_late("slow", 20.0)
    assert late.note_late("slow", 30.0)
    assert late.includes("slow", 30.0 + LEFT_OUT_S - 1) and not late.includes("other", 30.0)
    assert not late.includes("slow", 30.0 + LEFT_OUT_S)
    assert late.note_late("slow", 400.0)


async def test_a_slow_site_keeps_its_link_and_is_left_out_after_two_requests(
    frozen, monkeypatch, caplog
) -> None:
    """The answer that it still owes is waited for; the third request does without it, and is answered."""
    slow, gate = threading.Event(), threading.Event()
    honest, deadlines = SiteJob.forward, list[asyncio.Timeout]()

    def forward(self, asked):
        if self.seats[0].name == "t2" and asked.mode == "release" and not gate.is_set():
            slow.set()
            assert gate.wait(LONG_S)
        return honest(self, asked)

    def deadline(self, seconds):
        deadlines.append(asyncio.timeout(LONG_S))
        return deadlines[-1]

    monkeypatch.setattr(SiteJob, "forward", forward)
    monkeypatch.setattr(PatientSegmenter, "_deadline", deadline)
    comes(frozen, "NEW_Nora", 77)
    async with serving(frozen) as on:
        await until(lambda: on.coordinator is not None and all(site.here for site in on.coordinator.sites))
        links = [site.session for site in on.coordinator.sites]
        for _ in range(2):
            name = await asked(frozen, "t1ce", "NEW_Nora")
            await until(slow.is_set)
            deadlines[-1].reschedule(asyncio.get_running_loop().time())
            await asyncio.sleep(0)
            gate.set()
            status = await ended(frozen, "t1ce", name)
            assert (status.cause, status.exit) == ("deadline", 3)
            assert [site.session for site in on.coordinator.sites] == links
            slow.clear()
            gate.clear()
        assert (await segmented(frozen, "t1ce", "NEW_Nora")).provenance.missing == ("t2",)
        assert not slow.is_set()
        assert [site.session for site in on.coordinator.sites] == links
    assert "inference.site_left_out" in [record.message for record in caplog.records]
