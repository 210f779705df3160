"""The cut is data: what follows from it, and which networks a job can name."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest

from splitpeer.models.cut import Cut, Level
from splitpeer.models.registry import backbone_of, encoder_parameters, make_backbone, on_wire, unet_backbone
from splitproto.records import Job, Setting

FEATURES = (4, 6, 8, 10, 12, 4)
PLAIN = (Level("fine", 3, (1, 2)), Level("coarse", 5, (4, 2)))


def job(**changes: object) -> Job:
    return Job(
        name="try", **{**on_wire(unet_backbone(2, FEATURES, (1, 4))), **changes}, precision="f32", window=(32, 32),
        spacing=(), augment=False, batch=1, steps=1, optimiser="sgd", learning_rate=1.0, weight_decay=0.0,
        schedule="constant", seconds_per_step=1.0,
    )  # fmt: skip


def test_figures_follow_from_the_levels() -> None:
    cut = Cut(PLAIN, (1,))
    assert (cut.dimensions, cut.bottleneck, cut.stride, cut.withheld) == (2, 1, (4, 2), (0,))
    assert (cut.names, cut.channels) == (("coarse",), {"coarse": 5})
    assert [cut.step(0), cut.step(1)] == [(1, 2), (4, 1)]
    assert cut.shapes(7, (8, 4)) == {"coarse": (7, 5, 2, 2)}
    assert cut.octets(7, (8, 4)) == 4 * 7 * (3 * 8 * 2 + 5 * 2 * 2), "of all levels, also of those that stay"


@pytest.mark.parametrize(
    ("levels", "sent", "text"),
    [
        (PLAIN, (0,), "level 1, the bottleneck, must leave"),
        (PLAIN, (1, 0), "ascend"),
        (PLAIN, (1, 1), "distinct"),
        (PLAIN, (1, 2), "of 0 to 1"),
        (PLAIN[::-1], (1,), "a multiple of"),
        ((PLAIN[0], PLAIN[0]), (1,), "distinct names"),
        ((), (), "1 to 16 levels"),
        ((Level("x", 1, (1,)),), (0,), "dimensions must be 2 or 3"),
        ((PLAIN[0], Level("x", 1, (2, 2, 2))), (1,), "a stride each"),
    ],
)
def test_impossible_cuts_say_why(levels, sent, text: str) -> None:
    """SP-11.8-1."""
    with pytest.raises(ValueError, match=text):
        Cut(levels, sent)


@pytest.mark.parametrize(
    ("window", "text"), [((8, 3), "divisible by \\[4, 2\\]"), ((4, 2), "one value"), ((8, 4, 4), "2 sizes")]
)
def test_windows_that_do_not_fit_say_why(window, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        Cut(PLAIN, (1,)).check_window(window)


def test_a_job_names_the_network_and_lists_its_cut() -> None:
    """SP-11.8-4."""
    assert backbone_of(job()) == unet_backbone(2, FEATURES, (1, 4))
    cut = job().cut
    for changes, text in (
        ({"network": "no-such-net"}, "unknown"),
        ({"settings": (Setting("depth", (3,)),)}, "no setting 'depth'"),
        ({"cut": (dataclasses.replace(cut[0], channels=5), *cut[1:])}, "is not that of a basic-unet"),
        ({"cut": (dataclasses.replace(cut[0], name="image"), *cut[1:])}, "is not that of a basic-unet"),
        ({"levels": (4, 1)}, "ascend"),
    ):
        with pytest.raises(ValueError, match=text):
            backbone_of(job(**changes))


def test_weights_are_counted_without_being_made() -> None:
    backbone = make_backbone("basic-unet", 3)
    assert encoder_parameters(backbone) == pytest.approx(4e6, rel=0.2)


def test_the_cut_needs_no_torch() -> None:
    code = (
        "import sys, splitpeer.models, splitpeer.settings.job; print({'torch', 'monai'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
