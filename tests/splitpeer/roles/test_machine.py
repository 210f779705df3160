"""A run that continues on another kind of machine says so once, naming both; on the same kind it says nothing."""

from __future__ import annotations

import logging
import signal

import pytest
import torch

from splitpeer.models import build_encoder, site_seed, unet_backbone
from splitpeer.training import machine
from splitpeer.training.optimiser import make_optimiser, make_schedule
from splitpeer.training.split_step import ClientHalf

WARNED = "run.other_machine"


@pytest.fixture
def half() -> ClientHalf:
    encoder = build_encoder(unet_backbone(2, (2, 2, 2, 2, 2, 2)), seed=site_seed(1, "t1"))
    optimiser = make_optimiser(encoder.parameters())
    return ClientHalf(encoder, optimiser, make_schedule(optimiser, "constant", 10))


@pytest.mark.timeout(300)
def test_a_run_that_is_resumed_with_other_kernels(scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """Real processes: the coordinator computes with torch's plain kernels, then with those of this machine."""
    scene.cast("t1", training={"steps": 40, "checkpoint_every": 10}, deadlines={"join_s": 200, "step_s": 60})
    scene.client("t1", network={"reconnect_s": 300})
    client = scene.start("site-t1")
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "default")
    hub = scene.start_python("hub")
    hub.until(r"peer\.start ", 200)
    scene.until_step(11)
    hub.signal(signal.SIGTERM)
    assert hub.code(100) == 0, hub.said
    assert WARNED not in hub.said
    monkeypatch.delenv("ATEN_CPU_CAPABILITY")
    here = machine.kind(torch.device("cpu")).split(", ")[1]
    again = scene.start("hub")
    assert again.code(200) == 0, again.said
    (line,) = [line for line in again.said.splitlines() if WARNED in line]
    assert "warning" in line
    assert ", DEFAULT, torch" in line.partition("computed_on=")[2].partition("here=")[0]
    assert f", {here}, torch" in line.partition("here=")[2]
    # The site's machine is what it was.
    assert client.code(100) == 0
    assert WARNED not in client.said


def test_the_same_machine_is_no_news(half: ClientHalf, caplog: pytest.LogCaptureFixture) -> None:
    half.load(*half.state())
    assert not caplog.records


def test_a_state_of_before_this_was_noted_is_no_news(
    half: ClientHalf, caplog: pytest.LogCaptureFixture
) -> None:
    tensors, meta = half.state()
    half.load(tensors, {"step": meta["step"]})
    assert not caplog.records


def warned(caplog: pytest.LogCaptureFixture) -> list[dict[str, str]]:
    return [r.fields for r in caplog.records if r.getMessage() == WARNED and r.levelno == logging.WARNING]


def test_another_version_of_torch(half: ClientHalf, caplog: pytest.LogCaptureFixture, monkeypatch) -> None:
    tensors, meta = half.state()
    monkeypatch.setattr(torch, "__version__", "2.6.0")
    half.load(tensors, meta)
    half.load(tensors, meta)
    (fields,) = warned(caplog)
    assert "torch 2.6.0" in fields["here"] and "torch 2.6.0" not in fields["computed_on"]


def test_another_number_of_threads(half: ClientHalf, caplog: pytest.LogCaptureFixture) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        state = half.state()
        torch.set_num_threads(2)
        half.load(*state)
    finally:
        torch.set_num_threads(before)
    (fields,) = warned(caplog)
    assert "1 thread" in fields["computed_on"] and "2 threads" in fields["here"]


def test_another_processor(half: ClientHalf, caplog: pytest.LogCaptureFixture, monkeypatch, tmp_path) -> None:
    state = half.state()
    monkeypatch.setattr(machine, "_CPUINFO", tmp_path / "cpuinfo")
    (tmp_path / "cpuinfo").write_text("processor : 0\nmodel name\t: Some  CPU @ 2 GHz\nmodel name : no\n")
    machine._model.cache_clear()
    try:
        half.load(*state)
    finally:
        machine._model.cache_clear()
    (fields,) = warned(caplog)
    assert " Some CPU @ 2 GHz, " in fields["here"]


def test_a_system_that_does_not_name_its_processor(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(machine, "_CPUINFO", tmp_path / "nothing")
    machine._model.cache_clear()
    try:
        assert machine.kind(torch.device("cpu")).startswith(f"{machine.platform.machine()}, ")
    finally:
        machine._model.cache_clear()
