"""The test vectors as values, and what an outcome is compared with."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from splitproto import capture, errors

VECTORS = Path(__file__).parents[2] / "spec" / "vectors"
Case = dict[str, Any]
NAMES = {cls.name for cls in (*errors.BY_CODE.values(), *capture.CaptureError.__subclasses__())}


def of_the_peer(name: str) -> Any:
    """A module of splitpeer. The test is skipped where torch is missing, and fails where the module was moved."""
    for needed in ("torch", "pydantic", "nibabel"):
        pytest.importorskip(needed)
    return importlib.import_module(f"splitpeer.{name}")


def cases(family: str, operation: str | None = None) -> list[Any]:
    listed = json.loads((VECTORS / f"{family}.json").read_text())["cases"]
    chosen = [case for case in listed if operation is None or case["operation"] == operation]
    return [pytest.param(case, id=case["name"]) for case in chosen]


def value_of(shown: Any) -> Any:
    """The inverse of the vectors' notation of values."""
    if isinstance(shown, list):
        return [value_of(item) for item in shown]
    if not isinstance(shown, dict):
        return shown
    ((kind, inner),) = shown.items()
    if kind == "map":
        return {key: value_of(item) for key, item in inner.items()}
    return {"int": int, "float": float, "hex": bytes.fromhex}[kind](inner)


def octets_of(case: Case) -> bytes:
    """`input`, a piece that repeats, entries of a map with the keys 00000, 00001, ...; `tail`."""
    piece, times = case.get("repeat", ("", 0))
    entries = b"".join(b"\xa5%05x\x00" % number for number in range(case.get("entries", 0)))
    return (
        bytes.fromhex(case["input"])
        + bytes.fromhex(piece) * times
        + entries
        + bytes.fromhex(case.get("tail", ""))
    )


def same(one: Any, other: Any) -> bool:
    """Equal, and of one type throughout: 1 is not 1.0, and -0.0 is not 0.0."""
    return repr(one) == repr(other)


def check(case: Case, work: Callable[[], Any]) -> Any:
    """The result of `work`, or None after checking that it fails as the case expects."""
    if "error" not in case["expect"]:
        return work()
    with pytest.raises(errors.LocalError) as caught:
        work()
    assert caught.value.name == case["expect"]["error"], caught.value
    return None


def compare(case: Case, digest: str) -> None:
    """A negative case holds somebody's claim, which must differ from what is right."""
    if "error" in case["expect"]:
        assert digest != case["claimed"]
    else:
        assert digest in case["expect"].values()
