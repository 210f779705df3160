"""`[model] widths`: what leaves a site is narrow and bounded, for every network, and the halves are still the whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError

from splitpeer.models import Backbone, build_encoder, encoder_parameters, make_backbone
from splitpeer.models.registry import NETWORKS, backbone_of, on_wire, own_backbone
from splitpeer.settings.job import Model
from splitproto.records import Job
from tests.networks import SMALL
from tests.splitpeer.models.halves import both_ways, window

ALL = pytest.mark.parametrize("name", list(NETWORKS))
BOTH = pytest.mark.parametrize("dimensions", [2, 3])


def narrow(name: str, dimensions: int = 2, **options: Any) -> Backbone:
    wide = make_backbone(name, dimensions, SMALL[name])
    widths = tuple(range(1, 1 + len(wide.cut.sent)))
    return make_backbone(name, dimensions, SMALL[name], widths=widths, **options)


def job_of(backbone: Backbone, **changes: Any) -> Job:
    fields = {
        "name": "n", "precision": "f32", "window": window(backbone), "spacing": (), "augment": False, "batch": 2,
        "steps": 1, "optimiser": "adam", "learning_rate": 0.1, "weight_decay": 0.0, "schedule": "constant",
        "seconds_per_step": 1.0,
    }  # fmt: skip
    return Job(**{**fields, **on_wire(backbone), **changes})


@BOTH
@ALL
@pytest.mark.parametrize("fusion", ["concat", "mean"])
def test_split_equals_whole_bit_for_bit(name: str, dimensions: int, fusion: str) -> None:
    sent, gradients = both_ways(narrow(name, dimensions), fusion)
    assert all(tensor.abs().max() <= 1 for tensor in sent)
    assert all(gradient.abs().max() > 0 for key, gradient in gradients.items() if "widen" in key)


@BOTH
@ALL
def test_weights_are_counted_without_making_them(name: str, dimensions: int) -> None:
    of = narrow(name, dimensions)
    made = build_encoder(of, 2, seed=0)
    assert encoder_parameters(of, 2) == sum(parameter.numel() for parameter in made.parameters())


@ALL
def test_a_job_tells_the_widths(name: str) -> None:
    """SP-11.8-6: the cut has the narrow channels, and the settings say why."""
    of = narrow(name)
    job = job_of(of)
    assert [level.channels for level in job.cut] == list(of.widths)
    assert backbone_of(job) == of
    other = tuple(s for s in job.settings if s.name != "widths")
    with pytest.raises(ValueError, match="not that of a"):
        backbone_of(job_of(of, settings=other))


def test_a_sites_own_network_is_narrowed_too() -> None:
    job = job_of(narrow("basic-unet"))
    own = own_backbone("residual-unet", {"features": (4, 4, 4, 4, 4)}, job)
    assert own.network == "residual-unet" and own.cut.levels == job.cut
    with pytest.raises(ValueError, match="residual-unet yields 4@1x1 4@2x2, the job wants 1@1x1"):
        own_backbone("residual-unet", {"features": (4, 4)}, job)


def test_only_levels_that_are_sent_have_widths() -> None:
    of = make_backbone("basic-unet", 2, SMALL["basic-unet"], (2, 4), (1, 3))
    assert of.cut.channels == {"x2": 1, "x4": 3}
    encoder = build_encoder(of, seed=0)
    assert {level: t.shape[1] for level, t in encoder(torch.zeros(2, 1, 32, 32)).items()} == {
        "x2": 1,
        "x4": 3,
    }


@pytest.mark.parametrize("widths", [(1, 2), (1, 1, 2, 4, 0), (1, 1, 2, 4, 5000)])
def test_widths_that_do_not_fit_are_refused(widths: tuple[int, ...]) -> None:
    with pytest.raises(ValidationError, match="widths"):
        Model(widths=widths)
    assert Model(widths=(1, 1, 2, 4, 8)).backbone().cut.channels["x4"] == 8
