"""A request while one of the coordinator's ranks is lost."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from splitpeer.coordinator.inference.segmenting import PatientSegmenter
from splitpeer.errors import DataError, PeerError
from splitpeer.ranks.group import RankLost


@pytest.mark.parametrize("error", [RankLost("rank 1 ended"), DataError("torn")])
async def test_it_waits_for_the_next_start_instead_of_failing(error: PeerError) -> None:
    """All that wait would fail one after the other, until the process notices."""

    async def broken(*_: Any) -> None:
        raise error

    segmenter: Any = PatientSegmenter.__new__(PatientSegmenter)
    segmenter._run = SimpleNamespace(settings=SimpleNamespace(inference=None))
    segmenter._segment, segmenter._deadline = broken, lambda _: asyncio.timeout(60)
    request: Any = SimpleNamespace(site="site-t1", asked=SimpleNamespace(request=bytes(8)))
    if isinstance(error, RankLost):
        with pytest.raises(RankLost):
            await segmenter._in_time(request, print)
    else:
        assert (await segmenter._in_time(request, print)).code == "failed"
