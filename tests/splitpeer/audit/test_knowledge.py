"""What an adversary is granted: the coordinator's checkpoint of a task with any number of regions."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from splitpeer.attacks.base import Knowledge
from splitpeer.audit.knowledge import with_decoder
from splitpeer.errors import ConfigError
from splitpeer.models import build_decoder
from splitpeer.models.backbone import Fusion
from splitpeer.models.registry import NETWORKS, make_backbone
from splitpeer.storage import checkpoint
from splitproto.records import Seat
from tests.networks import SMALL

SITES = ("t1", "t2")
SEATS = tuple(Seat(name, (name,)) for name in SITES)


def saved(folder: Path, decoder: torch.nn.Module) -> Path:
    checkpoint.save(folder, 1, {f"model/{n}": t for n, t in decoder.state_dict().items()}, {"step": 1})
    (path,) = folder.glob("*.safetensors")
    return path


@pytest.mark.parametrize("network", sorted(NETWORKS))
@pytest.mark.parametrize("fusion", ["concat", "mean"])
@pytest.mark.parametrize("regions", [1, 3, 5])
def test_a_decoder_has_the_regions_of_its_checkpoint(
    tmp_path: Path, network: str, fusion: Fusion, regions: int
) -> None:
    backbone = make_backbone(network, 2, SMALL[network])
    decoder = build_decoder(backbone, SITES, fusion, regions, seed=3)
    view: Any = SimpleNamespace(backbone=backbone, seat=SEATS[0], seats=SEATS)
    known = with_decoder(Knowledge(), view, saved(tmp_path, decoder)).decoder
    assert known is not None and (known.out_channels, known.fusion) == (regions, fusion)
    assert all(torch.equal(t, known.state_dict()[n]) for n, t in decoder.state_dict().items())


def test_another_networks_decoder_is_refused_in_one_line(tmp_path: Path) -> None:
    ours, theirs = (make_backbone(network, 2, settings) for network, settings in sorted(SMALL.items())[:2])
    path = saved(tmp_path, build_decoder(theirs, SITES, out_channels=1, seed=3))
    view: Any = SimpleNamespace(backbone=ours, seat=SEATS[0], seats=SEATS)
    with pytest.raises(ConfigError, match="not the decoder of this capture's job") as refused:
        with_decoder(Knowledge(), view, path)
    assert "\n" not in str(refused.value)
