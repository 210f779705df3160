"""What `benchmarks/peers.py` compares: halves that train the same everywhere, and rows that say what was measured."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import numpy as np
import pytest
import tiny

import peers


def trained(kind: str, steps: int, *, resumed: bool) -> list[float]:
    """Losses of one process. `resumed`: each encoder is made anew for every step, as Flower's processes do."""
    sites = {site: tiny.Encoder(kind, site) for site in tiny.SITES}
    decoder, losses = tiny.Decoder(kind), []
    for _ in range(steps):
        loss, gradients = decoder.step({site: encoder.forward() for site, encoder in sites.items()})
        losses.append(loss)
        for site, encoder in list(sites.items()):
            if resumed:
                sites[site] = tiny.Encoder(kind, site)
                sites[site].resume(encoder.state())
                sites[site].forward()
            sites[site].backward(gradients[site])
    return losses


@pytest.mark.parametrize("kind", peers.KINDS)
def test_the_halves_learn_and_send_the_shapes_that_are_told(kind: str) -> None:
    sent = tiny.Encoder(kind, "site-1").forward()
    assert {name: array.shape for name, array in sent.items()} == tiny.SENT[kind]
    assert all(array.dtype == np.float32 for array in sent.values())
    losses = trained(kind, 4, resumed=False)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("kind", peers.KINDS)
def test_a_site_that_starts_anew_for_each_step_trains_the_same(kind: str) -> None:
    assert trained(kind, 4, resumed=True) == trained(kind, 4, resumed=False)


def found() -> dict[str, Any]:
    """As of a run of two rounds, in which NVFlare's `message` was its fastest way but for tensors of 8 MiB."""

    def rates(**by_way: list[float]) -> dict[str, Any]:
        return {name: {"rates": values, "costs": values, "losses": [4.0]} for name, values in by_way.items()}

    ways = {"tensors": [1.0, 1.0], "stream": [2.0, 2.0], "message": [4.0, 2.0]}
    return {
        "nvflare": {"nvflare": "2.9.0"},
        "flower": {"flwr": "1.42.0"},
        "tensors": {
            "1 MiB": rates(splitproto=[20.0, 14.0], **ways),
            "8 MiB": rates(splitproto=[20.0, 14.0], **ways | {"stream": [10.0, 10.0]}),
        },
        "requests": {
            "splitproto": {"p50": [0.2, 0.2], "p99": [1.0, 1.0]},
            "stream": {"p50": [2.0, 2.0], "p99": [5.0, 5.0]},
            "message": {"p50": [0.5, 0.4], "p99": [9.0, 9.0]},
        },
        "training": {
            "mlp": rates(splitproto=[20.0, 30.0], **ways, flower=[0.1, 0.3, 0.1]),
            "unet": rates(splitproto=[20.0, 30.0], **ways, flower=[0.1, 0.3, 0.1]),
        },
        "daemons": [12.0, 15.0, 9.0],
    }


def row(lines: dict[str, tuple[str, bool | None]], *words: str) -> tuple[str, bool | None]:
    """The one row whose name has all the words."""
    (name,) = [name for name in lines if all(word in name for word in words)]
    return lines[name]


def test_rows_judge_by_the_fastest_way_of_nvflare_and_by_rounds() -> None:
    lines = {line.what: (line.found, line.met) for line in peers.rows(found())}
    assert row(lines, "1 MiB: rate", "`message`") == ("6.00 (5.00-7.00)", True)
    assert row(lines, "8 MiB: rate", "`stream`") == ("1.70 (1.40-2.00)", False)
    # Waits: the lowest is the fastest.
    assert row(lines, "p50 / p50", "`message`") == ("0.45 (0.40-0.50)", True)
    assert row(lines, "MLP", "those of NVFlare", "`message`") == ("10.00 (5.00-15.00)", True)
    assert row(lines, "U-Net", "those of NVFlare", "`message`") == ("10.00 (5.00-15.00)", True)
    assert row(lines, "MLP", "those of Flower") == ("250 (200-300)", None), "links are not daemons"
    assert row(lines, "daemons / those of Flower") == ("120 (90-150)", True)


def test_a_peer_that_is_not_there_is_not_measured_and_the_rest_is() -> None:
    given = found()
    given |= {"nvflare": None, "flower": None}
    del given["tensors"], given["requests"]
    for kinds in given["training"].values():
        for name in (*peers.WAYS, "flower"):
            del kinds[name]
    lines = {line.what: (line.found, line.met) for line in peers.rows(given)}
    assert lines["NVFlare"] == lines["Flower"] == (peers.INSTALL, None)
    assert row(lines, "MLP", "links") == ("25.0 (20.0-30.0) steps/s", None)
    assert row(lines, "daemons") == ("12.0 (9.0-15.0) steps/s", None)


def test_another_loss_ends_the_program() -> None:
    given = deepcopy(found()["training"])
    peers.same_losses(given)
    given["mlp"]["stream"]["losses"] = [4.001]
    with pytest.raises(SystemExit, match=r"mlp over stream: loss 4\.001"):
        peers.same_losses(given)
