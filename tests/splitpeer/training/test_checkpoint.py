"""A checkpoint is whole or it does not count, whatever happens to the process or the file."""

from __future__ import annotations

import errno
import logging
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from splitpeer.errors import DataError
from splitpeer.models import build_encoder, unet_backbone
from splitpeer.storage import checkpoint, reading
from splitpeer.training.optimiser import make_optimiser, make_schedule
from splitpeer.training.split_step import ClientHalf

if TYPE_CHECKING:
    from tests.conftest import SmallDisk

TENSORS = {
    "model/weight": torch.arange(24, dtype=torch.float32).reshape(2, 3, 4),
    "model/half": torch.full((5,), 1.5, dtype=torch.bfloat16),
    "optimiser/weight/step": torch.tensor(7.0),
    "model/strided": torch.arange(12.0).reshape(3, 4).T,
}
META = {"step": 300, "job": "j-1", "role": "client"}


def test_round_trip(tmp_path: Path) -> None:
    folder = tmp_path / "site" / "checkpoints"
    digest = checkpoint.save(folder, 300, TENSORS, META)
    tensors, meta, again = checkpoint.load(folder, 300)
    assert meta == META
    assert again == digest
    assert len(digest) == 64
    assert tensors.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert tensors[name].dtype == tensor.dtype
        assert tensors[name].shape == tensor.shape
        assert torch.equal(tensors[name], tensor)
    path = folder / "step-00000300.safetensors"
    assert [entry.name for entry in folder.iterdir()] == [path.name]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_the_digest_is_of_the_content(tmp_path: Path) -> None:
    first = checkpoint.save(tmp_path / "a", 1, TENSORS, META)
    assert checkpoint.save(tmp_path / "b", 1, dict(reversed(TENSORS.items())), META) == first
    changed = {**TENSORS, "model/weight": TENSORS["model/weight"] + 1e-3}
    others = [(2, TENSORS, META), (1, changed, META), (1, TENSORS, {**META, "job": "j-2"})]
    for number, arguments in enumerate(others):
        assert checkpoint.save(tmp_path / str(number), *arguments) != first


def test_a_training_half_survives_the_disk(tmp_path: Path) -> None:
    def half(seed: int) -> ClientHalf:
        encoder = build_encoder(unet_backbone(2, (2, 2, 2, 2, 2, 2)), seed=seed)
        optimiser = make_optimiser(encoder.parameters())
        return ClientHalf(encoder, optimiser, make_schedule(optimiser, "one-cycle", 10))

    client = half(seed=1)
    x = torch.randn(1, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    for _ in range(2):
        client.backward(client.forward(x))
    checkpoint.save(tmp_path, client.steps_done, *client.state())
    restored = half(seed=2)
    restored.load(*checkpoint.load(tmp_path, 2)[:2])
    for party in (client, restored):
        party.backward(party.forward(x))
    assert checkpoint.save(tmp_path / "a", 3, *client.state()) == checkpoint.save(
        tmp_path / "b", 3, *restored.state()
    )


def test_the_newest_are_kept(tmp_path: Path) -> None:
    for step in range(0, 600, 100):
        checkpoint.save(tmp_path, step, TENSORS, META, keep=2)
    assert list(checkpoint.available(tmp_path)) == [400, 500]
    checkpoint.save(tmp_path, 300, TENSORS, META, keep=1)
    assert list(checkpoint.available(tmp_path)) == [300], "what was just written stays, though not the newest"
    checkpoint.save(tmp_path, 400, TENSORS, META)
    checkpoint.discard_after(tmp_path, 300)
    assert list(checkpoint.available(tmp_path)) == [300]


def test_named_steps_are_kept(tmp_path: Path) -> None:
    """What all parties hold stays, however old (SP-11-33)."""
    for step in range(0, 600, 100):
        checkpoint.save(tmp_path, step, TENSORS, META, keep=10)
    checkpoint.save(tmp_path, 600, TENSORS, META, keep=(100, 400, 12345))
    assert list(checkpoint.available(tmp_path)) == [100, 400, 600]
    checkpoint.save(tmp_path, 700, TENSORS, META, keep={700})
    assert list(checkpoint.available(tmp_path)) == [700]
    checkpoint.save(tmp_path, 800, TENSORS, META, keep=frozenset())
    assert list(checkpoint.available(tmp_path)) == [800]


def test_an_old_one_that_stays_is_no_failure(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The new one is durable: to call it not written would be a lie."""
    checkpoint.save(tmp_path, 100, TENSORS, META)

    unlink = os.unlink

    def refuse(path: Path) -> None:
        if path.suffix == ".safetensors":
            raise PermissionError(errno.EPERM, "Operation not permitted", str(path))
        unlink(path)

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint.os, "unlink", refuse)
        checkpoint.save(tmp_path, 200, TENSORS, META, keep=1)
    assert "step-00000100.safetensors: old checkpoint not removed (Operation not permitted)" in caplog.text
    assert list(checkpoint.available(tmp_path)) == [100, 200]


def test_an_empty_folder(tmp_path: Path) -> None:
    assert checkpoint.available(tmp_path / "none") == {}
    checkpoint.discard_after(tmp_path / "none", 0)
    with pytest.raises(DataError, match="no such checkpoint"):
        checkpoint.load(tmp_path, 5)


def assert_recognised(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(DataError) as caught:
        checkpoint.load(folder, 200)
    message = str(caught.value)
    assert "step-00000200" in message
    assert "torn or altered" in message
    assert "\n" not in message
    with caplog.at_level(logging.WARNING):
        assert list(checkpoint.available(folder)) == [100]
    assert "step-00000200" in caplog.text


@pytest.fixture
def two(tmp_path: Path) -> Path:
    checkpoint.save(tmp_path, 100, TENSORS, META)
    checkpoint.save(tmp_path, 200, TENSORS, META)
    return tmp_path


@pytest.mark.parametrize("length", [0, 4, 8, 50, -40, -1])
def test_truncated(two: Path, length: int, caplog: pytest.LogCaptureFixture) -> None:
    path = two / "step-00000200.safetensors"
    path.write_bytes(path.read_bytes()[:length])
    assert_recognised(two, caplog)


def test_every_flipped_byte_of_content_is_seen(two: Path) -> None:
    path = two / "step-00000200.safetensors"
    good = path.read_bytes()
    header = 8 + int.from_bytes(good[:8], "little")
    unseen = []
    for place in range(len(good)):
        path.write_bytes(good[:place] + bytes([good[place] ^ 0x10]) + good[place + 1 :])
        try:
            tensors, meta, _ = checkpoint.load(two, 200)
        except DataError:
            continue
        unseen.append(place)
        # Only padding may change unnoticed: what is loaded is still exactly what was saved.
        assert meta == META
        assert all(torch.equal(tensors[name], TENSORS[name]) for name in TENSORS)
    assert all(place < header for place in unseen)
    assert len(unseen) < 10


def test_tampered_and_valid_safetensors(two: Path, caplog: pytest.LogCaptureFixture) -> None:
    import safetensors.torch

    path = two / "step-00000200.safetensors"
    safetensors.torch.save_file({name: t.contiguous() for name, t in TENSORS.items()}, path)
    assert_recognised(two, caplog)


def test_a_checkpoint_under_another_steps_name(two: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = (two / "step-00000100.safetensors").read_bytes()
    (two / "step-00000200.safetensors").write_bytes(data)
    assert_recognised(two, caplog)


KILLED = """
import os, signal, stat, sys
from pathlib import Path
import torch
from splitpeer.storage import checkpoint
def killed(what, *more):
    if not isinstance(what, int) or stat.S_ISREG(os.fstat(what).st_mode):
        os.kill(os.getpid(), signal.SIGKILL)
setattr(os, sys.argv[2], killed)
checkpoint.save(Path(sys.argv[1]), int(sys.argv[3]), {"model/weight": torch.zeros(4)}, {"step": 200})
"""


@pytest.mark.parametrize(("moment", "step"), [("replace", 200), ("replace", 100), ("fsync", 200)])
def test_killed_before_the_rename(tmp_path: Path, moment: str, step: int) -> None:
    """SP-11-13."""
    digest = checkpoint.save(tmp_path, 100, TENSORS, META)
    ended = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path), moment, str(step)], check=False)
    assert ended.returncode == -signal.SIGKILL
    assert len(list(tmp_path.iterdir())) == 2, "the part that was left behind"
    assert checkpoint.available(tmp_path) == {100: digest}
    checkpoint.save(tmp_path, 200, TENSORS, META)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "step-00000100.safetensors",
        "step-00000200.safetensors",
    ]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_without_rights(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(DataError, match="not written"):
        checkpoint.save(tmp_path / "x", 1, TENSORS, META)


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(DataError, match="not written"):
        checkpoint.save(tmp_path / "file", 1, TENSORS, META)


@pytest.mark.parametrize("room", [0, 4096, 65536])
def test_a_disk_that_is_full(small_disk: SmallDisk, room: int) -> None:
    """SP-11-32: the kernel's own word for it; what was there is whole, and with room all goes on."""
    folder = small_disk.folder / "state" / "run"
    big = {"model/weight": torch.arange(25_000, dtype=torch.float32)}
    digests = {step: checkpoint.save(folder, step, big, {"step": step}) for step in (100, 200)}
    for keep in (1, {100, 200}):
        small_disk.fill(but=room)
        with pytest.raises(
            DataError, match=r"not written \(No space left on device\); free or change the folder"
        ):
            checkpoint.save(folder, 300, big, {"step": 300}, keep)
        assert checkpoint.available(folder) == digests
        assert not [*folder.glob("*.part")]
        small_disk.make_room()
    checkpoint.save(folder, 300, big, {"step": 300}, keep=2)
    assert list(checkpoint.available(folder)) == [200, 300]


def test_a_folder_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No checkpoint, and none that can be read, are different: the second must not start the run over."""
    checkpoint.save(tmp_path, 100, TENSORS, META)
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(
        DataError, match=r"^[^\n]*file: checkpoints cannot be read \(Not a directory\)[^\n]*$"
    ):
        checkpoint.available(tmp_path / "file")

    def refuse(path: Path) -> list[str]:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(checkpoint.os, "listdir", refuse)
    with pytest.raises(DataError, match=r"checkpoints cannot be read \(Permission denied\)"):
        checkpoint.available(tmp_path)


def test_a_bad_sector(two: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """Skipped, and its cause is said; a file that is mapped would end the process with SIGBUS."""
    whole = reading.read

    def read(path: Path, *arguments: int, **options: bool) -> bytes:
        if path.name == "step-00000200.safetensors":
            raise OSError(errno.EIO, "Input/output error", str(path))
        return whole(path, *arguments, **options)

    monkeypatch.setattr(reading, "read", read)
    assert list(checkpoint.available(two)) == [100]
    assert "step-00000200.safetensors: cannot be read (Input/output error)" in caplog.text


def test_misuse(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="step must be"):
        checkpoint.save(tmp_path, -1, TENSORS, META)
    with pytest.raises(ValueError, match="kept"):
        checkpoint.save(tmp_path, 1, TENSORS, META, keep=0)
