"""The reader: parts that belong together or do not, damage told apart, one line for each defect."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from splitpeer.captures.reader import Capture, open_capture
from splitpeer.captures.recorder import Limits, Recorder
from splitpeer.errors import DataError
from splitpeer.federation.terms import job_on_wire
from splitpeer.settings.job import JobConfig
from splitproto.capture import CaptureReader, Header
from splitproto.messages import Activations, Forward
from splitproto.records import Sample

HEADER = Header("coordinator", "hub", "fed", "test", 1.0, run=bytes(16))
KEY = bytes(range(32))
SAMPLE = Sample(bytes(16), (0, 0, 0))
STEPS = 8


@dataclass
class Made:
    """A capture in parts, and the key it was recorded with."""

    first: Path
    key: bytes | None

    @property
    def parts(self) -> list[Path]:
        return [self.first, *(self.first.with_name(f"a.{n}.cap") for n in (1, 2, 3))]

    def open(self) -> Capture:
        return open_capture(self.first, self.key)


@pytest.fixture(params=[None, KEY], ids=["plain", "encrypted"])
def made(tmp_path: Path, request: pytest.FixtureRequest) -> Made:
    path = tmp_path / "a.cap"
    recorder = Recorder(path, limits=Limits(part=38_000), key=request.param)
    recorder.open(HEADER)
    for step in range(1, STEPS + 1):
        array = {"x0": np.full((1, 1000), step, "<f4")}
        recorder.tap("charite", "out", Forward("train", step, 0, (SAMPLE,), bytes(32)))
        recorder.tap("charite", "in", Activations("train", step, 0, bytes(32), array))
    recorder.close()
    assert len(list(tmp_path.iterdir())) == 4
    return Made(path, request.param)


def changed(path: Path, at: int) -> None:
    octets = bytearray(path.read_bytes())
    octets[at] ^= 1
    path.write_bytes(octets)


def test_reading_is_lazy(made: Made) -> None:
    capture = made.open()
    assert capture.encrypted == (made.key is not None)
    assert capture.header.run == bytes(16)
    found = [one for one in capture.records() if one.name == "activations"]
    assert [one.octets for one in found] == [4003] * STEPS
    assert all("message" not in vars(one) for one in found)
    assert [float(one.message.tensors["x0"][0, 0]) for one in found] == list(range(1, STEPS + 1))  # type: ignore[attr-defined]
    assert found[0].message is found[0].message


def test_a_later_part_alone(made: Made) -> None:
    capture = open_capture(made.parts[2], made.key)
    assert [part.header.part for part in capture.parts] == [2, 3]
    assert capture.verify().whole


@pytest.mark.parametrize("part", [0, 1, 3])
@pytest.mark.parametrize("at", [4500, -5000, -1])
def test_one_octet_changed(made: Made, part: int, at: int) -> None:
    changed(made.parts[part], at)
    verdict = made.open().verify()
    assert not verdict.whole
    assert verdict.problem is not None
    assert made.parts[part].name in verdict.problem
    assert "\n" not in verdict.problem
    assert verdict.records < 2 * STEPS or at == -1


def test_a_header_changed(made: Made) -> None:
    changed(made.first, 60)
    with pytest.raises(DataError, match=r"a\.cap: "):
        made.open()


@pytest.mark.parametrize("gone", [1, 2])
def test_a_part_in_between_is_missing(made: Made, gone: int) -> None:
    made.parts[gone].unlink()
    capture = made.open()
    assert len(capture.parts) == gone
    verdict = capture.verify()
    assert (verdict.whole, verdict.problem) == (
        False, f"a.{gone}.cap is missing, though later parts exist: put it next to them",
    )  # fmt: skip


def test_the_last_part_is_missing(made: Made) -> None:
    made.parts[3].unlink()
    verdict = made.open().verify()
    assert not verdict.whole
    assert verdict.problem == "the file after a.2.cap is missing: put it next to that one"
    # Without the key nobody can know that another one follows.
    if made.key:
        assert open_capture(made.first).verify().ended is None


def test_parts_swapped(made: Made) -> None:
    one, other = (made.parts[n].read_bytes() for n in (1, 2))
    made.parts[1].write_bytes(other)
    made.parts[2].write_bytes(one)
    verdict = made.open().verify()
    assert "does not continue where a.cap ends" in (verdict.problem or "")


def test_cut_off_between_records_only_the_end_is_missing(made: Made) -> None:
    last = made.parts[3]
    reader = CaptureReader(made.key)
    places = [reader.octets for _ in reader.over(last.read_bytes())]
    last.write_bytes(last.read_bytes()[: places[-2]])
    before = made.open().verify()
    assert (before.whole, before.ended) == (True, False)
    assert before.records == 2 * STEPS


def test_cut_off_within_a_record(made: Made) -> None:
    last = made.parts[3]
    last.write_bytes(last.read_bytes()[:-6000])
    capture = made.open()
    verdict = capture.verify()
    assert (verdict.whole, verdict.ended) == (False, False)
    assert "the recording was cut off" in (verdict.problem or "")
    assert len(list(capture.records())) == verdict.records < 2 * STEPS
    assert capture.end is None


def test_without_the_key(made: Made) -> None:
    capture = open_capture(made.first)
    verdict, full = capture.verify(), made.open().verify()
    assert verdict.whole
    assert verdict.last_chain == full.last_chain
    if made.key is None:
        assert verdict == full
        return
    assert (verdict.ended, full.ended) == (None, True)
    with pytest.raises(DataError, match="give the key"):
        next(capture.records())
    with pytest.raises(DataError, match="another key"):
        open_capture(made.first, bytes(32))


@pytest.mark.parametrize(
    ("make", "cause"),
    [
        (lambda path: None, "No such file"),
        (lambda path: path.mkdir(), "Is a directory"),
        (lambda path: path.write_bytes(b""), "nothing can be read"),
        (lambda path: path.write_bytes(b"SPLT"), "nothing can be read"),
        (lambda path: path.write_bytes(b"\x89PNG" + bytes(100)), "not a capture"),
        (lambda path: path.write_bytes(b"SPLTCAP9" + bytes(100)), "another format version"),
        (lambda path: path.write_bytes(b"SPLTCAP2" + b"\xff" * 100), "more than allowed"),
        (lambda path: path.write_bytes(b"SPLTCAP2" + bytes(100)), "record 0"),
        (lambda path: path.write_bytes(b"SPLTCAP3" + bytes(100)), "record 0"),
    ],
)
def test_not_a_capture(tmp_path: Path, make: Callable[[Path], object], cause: str) -> None:
    path = tmp_path / "a.cap"
    make(path)
    with pytest.raises(DataError, match=cause) as caught:
        open_capture(path)
    assert "a.cap" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 4


def test_a_capture_may_be_read_while_it_grows(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "a.cap")
    recorder.open(HEADER)
    recorder.tap("charite", "out", Forward("train", 1, 0, (SAMPLE,), bytes(32)))
    while recorder.state.records < 1:
        pass
    capture = open_capture(tmp_path / "a.cap")
    assert (capture.verify().records, capture.verify().ended) == (1, False)
    recorder.close()
    assert open_capture(tmp_path / "a.cap").verify().ended


def test_a_list_of_codings_that_does_not_fit_the_levels(tmp_path: Path) -> None:
    """SP-11.21-8."""
    (path := tmp_path / "job.toml").write_text(
        '[job]\nname = "try"\n[sites]\na = "t1"\n[model]\nlevels = [0, 1, 4]\n'
    )
    job = job_on_wire(JobConfig.load(path))
    for number, coding in enumerate((None, "int8", ("int8", "f16", "f32"), ("int8", "f16"), ("int8",) * 5)):
        for field in ("activations", "gradients"):
            path = tmp_path / f"{field}{number}.cap"
            recorder = Recorder(path)
            recorder.open(replace(HEADER, job=replace(job, **{field: coding})))
            recorder.close()
            if not isinstance(coding, tuple) or len(coding) == 3:
                assert open_capture(path).header.job is not None
                continue
            with pytest.raises(
                DataError, match=f"{path.name}: its job lists {len(coding)} codings for 3 levels"
            ):
                open_capture(path)
