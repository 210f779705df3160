from __future__ import annotations

from dataclasses import replace

import pytest

from splitpeer.data.geometry import Geometry, compare_geometry
from splitpeer.errors import DataError
from splitpeer.logs import handle

ONE = Geometry((240, 240, 155), (1.0, 1.0, 1.0), "LPS", (0.0, -239.0, 0.0))
KEY = bytes(range(16))


def test_sites_that_agree_pass_within_tolerance() -> None:
    near = replace(ONE, spacing=(1.0005, 1.0, 1.0), origin=(0.001, -239.0, 0.0))
    assert compare_geometry({"a": {KEY: ONE}, "b": {KEY: near}, "c": {b"x": ONE}}) is None


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"shape": (240, 240, 154)}, "shape 240x240x155 against 240x240x154"),
        ({"spacing": (1.0, 1.0, 1.002)}, "spacing 1x1x1 against 1x1x1.002 mm"),
        ({"spacing": (1.0, 1.0, float("nan"))}, "spacing"),
        ({"orientation": "RAS"}, "orientation LPS against RAS"),
        ({"origin": (0.0, -238.0, 0.0)}, "origin 0x-239x0 against 0x-238x0 mm"),
    ],
)
def test_a_difference_names_the_patient_the_sites_and_what(change: dict, said: str) -> None:
    with pytest.raises(DataError) as caught:
        compare_geometry({"t1": {KEY: ONE, b"y": ONE}, "t2": {KEY: ONE}, "zz": {KEY: replace(ONE, **change)}})
    assert f"patient {handle(KEY)}: t1 and zz differ in {said}" in str(caught.value)
