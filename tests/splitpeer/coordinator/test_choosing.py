"""From what links carry to codings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from splitpeer.coordinator.choosing import FORMS, Fit, LinkRate, choose, in_words, least_lossy, step_octets
from splitpeer.errors import ConfigError
from splitpeer.federation.seats import seats_of
from splitpeer.federation.terms import Codings, job_on_wire
from splitpeer.settings.job import JobConfig, Wire
from splitpeer.settings.loading import to_toml
from splitproto import codings

SIZES: dict[str | None, dict[str, int]] = {None: {"a": 400, "b": 800}, "int8": {"a": 100, "b": 200}}


@pytest.mark.parametrize(
    ("within", "expected"),
    [(80.0, Fit(None, "b", 80.0)), (79.9, Fit("int8", "b", 20.0)), (1.0, Fit("int8", "b", 20.0))],
)
def test_the_slowest_site_decides_and_the_last_form_is_taken_where_none_is_fast_enough(
    within: float, expected: Fit
) -> None:
    assert least_lossy(SIZES, {"a": 10.0, "b": 10.0}, within) == expected
    slow_a = least_lossy(SIZES, {"a": 1.0, "b": 1e6}, 200.0)
    assert slow_a == Fit("int8", "a", 100.0), "less to send, over a slower link"


@pytest.fixture
def settings(tmp_path: Path) -> JobConfig:
    return job(tmp_path)


def job(folder: Path, **more: dict[str, Any]) -> JobConfig:
    path = folder / "job.toml"
    sections = {
        "job": {"name": "try"},
        "sites": {"a": "t1", "b": ["t2", "flair"]},
        "model": {"features": [2, 4, 4, 8, 8, 4]},
        "data": {"window": [32, 32]},
        "training": {"batch": 2},
        **more,
    }
    path.write_text(to_toml(sections))
    return JobConfig.load(path)


VALUES = [2 * 32**2, 4 * 16**2, 4 * 8**2, 8 * 4**2, 8 * 2**2]
"""Of one sample and seat, by level."""


def test_octets_are_those_that_travel(settings: JobConfig) -> None:
    """SP-8.3-2, SP-11.21-2: with the head of each tensor's bin."""
    on_wire, seats = job_on_wire(settings), seats_of(settings)
    for form in FORMS:
        one = [2 * (codings.row_octets(form, m) if form else 4 * m) for m in VALUES]
        heads = [2 if size < 1 << 8 else 3 if size < 1 << 16 else 5 for size in one]
        assert step_octets(on_wire, seats.of("a"), form) == sum(one) + sum(heads)
        assert step_octets(on_wire, seats.of("b"), form) == 2 * (sum(one) + sum(heads)), "two seats"


def test_each_direction_has_its_own_choice_and_what_is_written_stays(settings: JobConfig) -> None:
    on_wire, seats = job_on_wire(settings), seats_of(settings)
    filled = {site: seats.of(site) for site in seats.filled}
    whole = step_octets(on_wire, filled["b"], None)
    # Downwards 0.1 s are enough for float32, upwards for a quarter of it and no more.
    rates = {"a": LinkRate(0.01, 1e9, 1e9), "b": LinkRate(0.02, up=10 * whole / 3.7, down=10 * whole)}
    both = choose(Wire(activations="auto", gradients="auto"), on_wire, filled, rates)
    assert both.codings == Codings("int8", None)
    assert both.activations is not None and both.activations.slowest == "b"
    one = choose(Wire(activations="f16", gradients="auto", auto_s=1e-9), on_wire, filled, rates)
    assert one.activations is None and one.codings == Codings(None, "int4")
    assert str(both.gradients) == "none (0.1 s a step at b)"


def test_half_precision_is_no_step_down_from_bf16(tmp_path: Path) -> None:
    """It takes no fewer octets, so it is not chosen."""
    settings = job(tmp_path, training={"batch": 2, "precision": "bf16"})
    on_wire, seats = job_on_wire(settings), seats_of(settings)
    assert step_octets(on_wire, seats.of("a"), "f16") > step_octets(on_wire, seats.of("a"), None)


def test_rates_are_told_in_a_line() -> None:
    said = in_words({"a": LinkRate(0.0123, 1.25e8, 1e5), "b": LinkRate(2e-4, 1e9, 1e9)})
    assert said == "a 1000 Mb/s up, 0.8 Mb/s down, 12 ms; b 8000 Mb/s up, 8000 Mb/s down, 0.2 ms"


def test_what_sites_know_of_a_job_is_concrete(tmp_path: Path) -> None:
    left_open = job(tmp_path, wire={"activations": "auto", "gradients": "int8", "auto_s": 0.5})
    assert left_open.wire.auto
    for chosen, there in ((Codings("int4", "f16"), "int4"), (Codings(None, None), None)):
        on_wire = job_on_wire(left_open, chosen)
        assert (on_wire.activations, on_wire.gradients) == (there, "int8")
    assert not job(tmp_path, wire={"gradients": "int8"}).wire.auto


@pytest.mark.parametrize(
    ("more", "words"),
    [({"training": {"encoders": "frozen"}, "wire": {"gradients": "auto"}},
      r'\[wire\] gradients is not for a job with \[training\] encoders = "frozen"'),
     ({"training": {"encoders": "frozen", "bank": "bank"}, "wire": {"activations": "auto"}},
      r'\[wire\] activations = "auto" asks sites'),
     ({"model": {"fusion": "secure-sum"}, "data": {"window": [32, 32]}, "wire": {"activations": "auto"}},
      r"\[wire\]: what travels of a sum is not coded"),
     ({"wire": {"activations": "auto", "auto_s": 0.0}}, "auto_s"),
     ({"wire": {"activations": "int2"}}, "auto")],
)  # fmt: skip
def test_auto_is_refused_where_nothing_can_be_chosen(
    tmp_path: Path, more: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        job(tmp_path, **more)
