"""The spool's watcher at a site: nothing that fails on one request ends it for the others."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from splitpeer.daemon import happenings as h
from splitpeer.errors import PatientUnusable
from splitpeer.site.inference import asking
from splitpeer.site.inference.asking import InferenceAsker
from splitpeer.site.inference.tally import SiteTally
from splitproto.errors import LinkLost
from splitproto.messages import Cancel, Message, Segment, Segmented
from tests.splitpeer.daemon.spooling import request


class Link:
    """A coordinator that hears everything, until its wire is cut."""

    agreement = SimpleNamespace(features=("infer",))

    def __init__(self) -> None:
        self.heard: list[Message] = []
        self.cut = False

    async def send(self, message: Message) -> None:
        if self.cut:
            raise LinkLost("the wire is cut")
        self.heard.append(message)


class Compute:
    async def run(self, function: Callable[..., Any], *args: Any, **_: Any) -> Any:
        return function(*args)


def job(**more: Any) -> Any:
    channels = SimpleNamespace(listed=more.get("listed"))
    return SimpleNamespace(
        job=SimpleNamespace(name="j"), run=bytes(16), holds=lambda key: True, channels=channels
    )


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not holds():  # noqa: ASYNC110 (files have no events)
            await asyncio.sleep(0.01)


@pytest.fixture
def told() -> list[h.Happening]:
    return []


@pytest.fixture
def asker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: list[h.Happening]) -> InferenceAsker:
    monkeypatch.setattr(asking, "LOOK_S", 0.01)
    monkeypatch.setattr(asking, "REST_S", 0.01, raising=False)
    config: Any = SimpleNamespace(peer=SimpleNamespace(state=tmp_path), data=SimpleNamespace(salt=None))
    return InferenceAsker(config, told.append, SiteTally("own", {"a"}, told.append))


async def test_a_cancel_that_cannot_be_sent(asker: InferenceAsker) -> None:
    """The link is dead, and nobody has said so yet, when a request's asker goes."""
    async with asker:
        first, second = Link(), Link()
        asker.link(first, job(), Compute())  # type: ignore[arg-type]
        name = asker._spool.ask(request("P1"))
        await until(lambda: len(first.heard) == 1)
        first.cut = True
        asker._spool.forget(name)
        await until(lambda: not asker._asked)
        asker.link(second, job(), Compute())  # type: ignore[arg-type]
        later = asker._spool.ask(request("P2"))
        await until(lambda: len(second.heard) == 1)
        assert isinstance(second.heard[0], Segment)
        asker._spool.forget(later)
        await until(lambda: len(second.heard) == 2)
        assert second.heard[1] == Cancel(bytes.fromhex(later))


async def test_whatever_fails_is_told_and_the_others_are_attended_to(
    asker: InferenceAsker, told: list[h.Happening], monkeypatch: pytest.MonkeyPatch
) -> None:
    right, link = asker._is_here, Link()

    async def fails(on: Any, name: str, asked: Any) -> bool:
        if asked.request.patient == "P1":
            raise RuntimeError("P1: no such thing")
        return await right(on, name, asked)

    monkeypatch.setattr(asker, "_is_here", fails)
    async with asker:
        asker.link(link, job(), Compute())  # type: ignore[arg-type]
        asker._spool.ask(request("P1"))
        name = asker._spool.ask(request("P2"))
        await until(lambda: len(link.heard) == 1)
        assert link.heard[0].request.hex() == name  # type: ignore[attr-defined]
        real, broken = asker._spool.waiting, [True]

        def waiting() -> Any:
            if broken:
                broken.clear()
                raise ValueError("year 10000 is out of range")
            return real()

        monkeypatch.setattr(asker._spool, "waiting", waiting)
        await until(lambda: len(told) > 2)
        last = asker._spool.ask(request("P3"))
        await until(lambda: len(link.heard) == 2)
        assert link.heard[1].request.hex() == last  # type: ignore[attr-defined]
    causes = [one.cause for one in told if isinstance(one, h.DataWarning)]
    assert causes[:2] == [
        f"a request for a segmentation has to wait: {kind}Error" for kind in ("Runtime", "Value")
    ]


@pytest.mark.parametrize("forgotten", [False, True])
async def test_an_image_that_is_bad_by_now_fails_its_request_alone(
    asker: InferenceAsker, forgotten: bool
) -> None:
    """SP-11.15-8; and an answer to what was forgotten meanwhile is nobody's."""

    def listed(key: bytes) -> None:
        if forgotten:
            asker._asked.clear()
        raise PatientUnusable(key, "malformed", "P1.nii.gz: not NIfTI")

    async with asker:
        link = Link()
        asker.link(link, job(listed=listed), Compute())  # type: ignore[arg-type]
        name = asker._spool.ask(request("P1"))
        await until(lambda: len(link.heard) == 1)
        key = asker._asked[name].key
        grid = SimpleNamespace(key=key, shape=(2, 2, 2))
        came: Any = Segmented.__new__(Segmented)
        for field, value in {
            "request": bytes.fromhex(name),
            "grid": grid,
            "tensors": {"mask": np.zeros((1, 2, 2, 2), np.uint8)},
        }.items():
            object.__setattr__(came, field, value)
        await asker.hear(came)
        status = asker._spool.status(name)
        assert (status.state, status.cause) == ("failed", "unusable")
        assert name not in asker._asked
