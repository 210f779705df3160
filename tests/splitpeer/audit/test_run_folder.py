"""What a run folder says of a network: which levels are sent, and in how many bytes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from splitpeer.audit.run_folder import network_of
from splitpeer.models.registry import make_backbone

VIEW: Any = SimpleNamespace(
    backbone=make_backbone("basic-unet", 2, {"features": [2, 4, 4, 8, 8, 4]}, levels=(1, 3, 4)),
    window=(32, 32), dimensions=2, fusion="concat", defences=("dropout:0.5",), gradient_defences=("gaussian:1",),
)  # fmt: skip
BY_LEVEL = {"x1": "int8", "x3": "f16", "x4": "f32"}


@pytest.mark.parametrize("back", [None, BY_LEVEL, "int8", ""])
def test_a_level_that_is_withheld_has_no_gradients(back: Any) -> None:
    network = network_of(VIEW, {"site-t1": "T1"}, BY_LEVEL, back=back)
    sent = {level.name: level for level in network.levels if level.sent}
    assert {name: level.precision for name, level in sent.items()} == BY_LEVEL
    assert [level.name for level in network.levels if not level.sent] == ["x0", "x2"]
    for level in network.levels:
        came = level.sent and back != ""
        assert (level.gradient_octets is not None) == bool(level.gradient_precision) == came
        assert level.gradient_defences == (("gaussian:1",) if level.sent else ())
    if back == "int8":
        assert {level.gradient_precision for level in sent.values()} == {"int8"}
