"""What a site refuses in a job and its batches, no matter who asks: figures, names, sizes, windows."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from splitpeer.data.normalisation import KINDS
from splitpeer.data.sampling import batch_digest
from splitpeer.defences.kinds import parse_all
from splitpeer.federation import terms
from splitpeer.federation.terms import (
    Room,
    _check_normalisation,
    _check_shared_noise,
    check_bounds,
    cut_descriptors,
    judge,
    seat_descriptors,
)
from splitpeer.models.registry import backbone_of, make_backbone, on_wire
from splitpeer.settings.bounds import Bounds
from splitpeer.site.announced import Announced
from splitproto.errors import PolicyRefused, SchemaMismatch
from splitproto.messages import Forward, JobOffer
from splitproto.records import Fusion, Job, Normalisation, Sample, Seat, Setting
from splitproto.tensors import schema_digest
from tests.cuts import unet

JOB = Job(
    name="glioma",
    dimensions=2,
    **unet((4, 4, 8, 8, 8, 4)),
    levels=(0, 1, 2, 3, 4),
    precision="f32",
    window=(32, 32),
    spacing=(),
    augment=False,
    batch=2,
    steps=10,
    optimiser="adam",
    learning_rate=1e-3,
    weight_decay=0.0,
    schedule="constant",
    seconds_per_step=30.0,
)
MIB = 2**20
SEATS = (Seat("t1", ("t1",)),)


def site(
    max_message_mib: int = 64,
    recorded_by_coordinator: bool = True,
    normalisation: tuple[str, ...] = KINDS,
    levels: tuple[int, ...] = (0, 1, 2, 3, 4),
    defences: tuple[str, ...] = (),
    image_defences: tuple[str, ...] = (),
    share_encoder: bool = False,
    precision: tuple[str, ...] = ("f32",),
) -> Any:
    policy = SimpleNamespace(
        levels=levels,
        defences=parse_all(defences, "activations"),
        image_defences=parse_all(image_defences, "image"),
        precision=precision,
        max_message_mib=max_message_mib,
        max_message_bytes=max_message_mib * MIB,
        recorded_by_coordinator=recorded_by_coordinator,
        normalisation=normalisation,
        share_encoder=share_encoder,
        encoders="any",
        fusion="any",
        releases="any",
    )
    return SimpleNamespace(
        policy=policy,
        model=None,
        peer=SimpleNamespace(modalities=("t1",), held="t1", state=Path("state")),
    )


def offer(**changes: Any) -> JobOffer:
    job = dataclasses.replace(JOB, **changes)
    try:
        schema = schema_digest(cut_descriptors(job))
    except ValueError:
        schema = bytes(32)
    return JobOffer(bytes(16), SEATS, job, schema)


def test_a_fair_job_is_accepted() -> None:
    judge(offer(), site())


def test_an_encoder_is_shared_only_where_the_policy_says_so() -> None:
    """SP-11.16-8."""
    judge(offer(average_every=2), site(share_encoder=True))
    judge(offer(), site(share_encoder=False))
    with pytest.raises(PolicyRefused, match=r"the job averages encoders.*\(share_encoder\)") as refused:
        judge(offer(average_every=2), site(share_encoder=False))
    assert "\n" not in refused.value.reason
    # The average must fit in one message that this site takes.
    wide = on_wire(make_backbone("basic-unet", 2, {"features": (32, 32, 64, 128, 256, 32)}))
    judge(offer(average_every=2, **wide), site(5, share_encoder=True))
    judge(offer(**wide), site(4))
    with pytest.raises(
        PolicyRefused, match=r"an averaged encoder has 5 MiB, allowed are 4 \(max_message_mib\)"
    ):
        judge(offer(average_every=2, **wide), site(4, share_encoder=True))


@pytest.mark.parametrize("precision", ["f32", "bf16"])
def test_a_precision_that_was_not_agreed_is_not_sent(precision: str) -> None:
    """SP-10-5, SP-10-6: whatever the policy allows, and whatever a coordinator forgot to require."""
    features = ("train", "evaluate", "dtype.f32", "dtype.bf16")
    allowed = site(precision=("f32", "bf16"))
    judge(offer(precision=precision), allowed, features)
    fewer = [one for one in features if one != f"dtype.{precision}"]
    with pytest.raises(SchemaMismatch, match=f"precision {precision} was not agreed on this link"):
        judge(offer(precision=precision), allowed, fewer)


@pytest.mark.parametrize("rule", ["zscore", "percentile:1,99", "window:-100,300", "none"])
def test_a_policy_says_which_normalisation_a_job_may_ask_for(rule: str) -> None:
    """SP-11.12-11: of its own modality; what other sites do is theirs to judge."""
    for modality in ("t1", "ct"):
        asked = offer(normalisation=(Normalisation(modality, rule),))
        judge(asked, site())
        if modality == "ct":
            judge(asked, site(normalisation=("zscore-nonzero",)))
            continue
        with pytest.raises(PolicyRefused, match=f"normalisation {rule.split(':')[0]}"):
            judge(asked, site(normalisation=("zscore-nonzero",)))


@pytest.mark.parametrize("rule", ["zscore", "percentile:1,99", "window:-100,300", "none"])
def test_noise_on_images_wants_the_deviation_it_is_a_multiple_of(rule: str) -> None:
    """SP-11-2: the same kept noise under two rules could be subtracted; other modalities are theirs to judge."""
    noisy = site(image_defences=("voxel-noise:0.5",))
    judge(offer(), noisy)
    judge(offer(normalisation=(Normalisation("ct", rule),)), noisy)
    with pytest.raises(PolicyRefused, match=r"image_defences.*zscore-nonzero") as refused:
        judge(offer(normalisation=(Normalisation("t1", rule),)), noisy)
    assert "\n" not in refused.value.reason and rule.split(":")[0] in refused.value.reason


def residual(strides: tuple[int, ...], levels: tuple[int, ...]) -> dict[str, Any]:
    settings = {"features": (4, 4, 8, 8, 8), "strides": strides}
    return {**on_wire(make_backbone("residual-unet", 2, settings, levels)), "levels": levels}


FULL, HALF, ONE_AXIS = (1, 1, 1, 1, 1), (1, 2, 2, 2, 2), (1, 1, 2, 2, 2, 2, 2, 2, 2, 1)


@pytest.mark.parametrize(
    "limits", [{"levels": (4,)}, {"levels": (3, 4)}, {"defences": ("gaussian:1@0,1",)}], ids=str
)
def test_a_level_is_as_coarse_as_its_number_where_a_site_limits_levels(limits: dict[str, Any]) -> None:
    """SP-11-2: a network may not call full resolution level 4."""
    judge(offer(levels=(4,)), site(**limits))
    judge(offer(**residual(HALF, (4,))), site(**limits))
    for strides, stride in ((FULL, "1, 1"), (ONE_AXIS, "16, 8")):
        with pytest.raises(PolicyRefused, match=rf"level x4 has stride \[{stride}\]") as refused:
            judge(offer(**residual(strides, (4,))), site(**limits))
        assert "\n" not in refused.value.reason


def test_a_site_that_limits_no_level_takes_any_stride() -> None:
    """SP-11.8-1."""
    for taken in ({}, {"defences": ("gaussian:1",)}, {"levels": tuple(range(8))}):
        judge(offer(**residual(FULL, (0, 4))), site(**taken))


@pytest.mark.parametrize("step", [3, 4])
def test_a_step_that_the_library_cannot_make_is_a_mismatch(step: int) -> None:
    """SP-11.8-4."""
    asked = offer(**residual(FULL, (1, 4)))
    strides = Setting("strides", (1, step, 1, 1, 1))
    settings = tuple(strides if one.name == "strides" else one for one in asked.job.settings)
    levels = asked.job.cut
    cut = (levels[0], *(dataclasses.replace(one, stride=(step, step)) for one in levels[1:]))
    job = dataclasses.replace(asked.job, settings=settings, cut=cut, window=(48, 48))
    schema = schema_digest(cut_descriptors(job))
    with pytest.raises(SchemaMismatch, match="strides must be 1 or 2"):
        judge(dataclasses.replace(asked, job=job, schema=schema), site())


@pytest.mark.parametrize("error", [AssertionError, RuntimeError])
def test_an_encoder_that_the_library_refuses_is_a_mismatch(
    monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    """SP-11.8-4: settings come from others, so whatever the library says of them is an answer."""
    from splitpeer.models import residual_unet

    def refused(*_: object) -> None:
        raise error("not like this")

    monkeypatch.setattr(residual_unet, "Encoder", refused)
    with pytest.raises(
        SchemaMismatch, match="residual-unet cannot be made with these settings: not like this"
    ):
        judge(offer(**residual(FULL, (0, 4))), site())


def test_images_read_ahead_count() -> None:
    """SP-11.15-7: few features, many voxels: what is read ahead is the larger part."""
    of = make_backbone("residual-unet", 3, {"features": (1, 1), "strides": (2, 2)})
    job = dataclasses.replace(JOB, **on_wire(of), window=(128, 128, 128), batch=900)
    eight = (Seat("m", tuple(f"m{n}" for n in range(8))),)
    with pytest.raises(PolicyRefused, match="max_memory_mib"):
        check_bounds(job, of, eight, Bounds(), 10**6)
    check_bounds(dataclasses.replace(job, batch=4), of, eight, Bounds(), 10**6)


def test_a_batch_of_an_evaluation_stays_within_the_memory_of_the_policy() -> None:
    """SP-11-28: however little of it is sent."""
    heavy = {"feature_size": (12,), "num_heads": (12, 24, 48, 96), "window_size": (8,)}
    job = dataclasses.replace(offer(**swin(**heavy)).job, window=(96, 96, 96))
    check_bounds(job, backbone_of(job), SEATS, Bounds(), 10**6)
    room = Room(job, backbone_of(job), SEATS, Bounds(), 1024 * MIB, 10**6)
    room.check({"t1": 1}, train=False)
    room.check({"t1": 1}, train=True)
    with pytest.raises(PolicyRefused, match=r"21 samples needs .* allows 8192 \(max_memory_mib\)"):
        room.check({"t1": 21}, train=False)
    usual = dataclasses.replace(offer(**swin()).job, window=(96, 96, 96))
    Room(usual, backbone_of(usual), SEATS, Bounds(), 1024 * MIB, 240 * 240 * 155).check(
        {"t1": 4}, train=False
    )


def test_weights_are_counted_once_and_not_for_every_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counting them builds the encoder: it took a site a twentieth of a step."""
    counted = []
    monkeypatch.setattr(terms, "parameters_of", lambda *of: counted.append(of) or 1000)
    room = Room(JOB, backbone_of(JOB), SEATS, Bounds(), 1024 * MIB, 10**6)
    for _ in range(3):
        room.check({"t1": 1}, train=True)
    assert len(counted) == len(SEATS)


def test_an_evaluation_of_few_features_is_bounded_by_its_images(announced: Announced) -> None:
    """SP-11-28: of every forward, and where each seat has rows of its own."""
    of = make_backbone("residual-unet", 3, {"features": (1, 1), "strides": (2, 2)})
    job = dataclasses.replace(JOB, **on_wire(of), window=(128, 128, 128), batch=1)
    seats = (Seat("a", ("t1", "t2")), Seat("b", ("flair",)))
    announced._job, announced._window = job, (128, 128, 128)
    announced._room = Room(job, of, seats, Bounds(max_memory_mib=512), 1024 * MIB, 10**6)
    shape = SimpleNamespace(shape=(128, 128, 128))
    announced._channels = SimpleNamespace(  # type: ignore[assignment]
        geometry=lambda key: shape, rows=lambda samples: {"b": list(range(len(samples)))}
    )
    whole = (0, 0, 0)
    announced.check(forward(whole, whole, mode="evaluate"), {})
    with pytest.raises(PolicyRefused, match="max_memory_mib"):
        announced.check(forward(*[whole] * 16, mode="evaluate"), {})


def swin(**settings: tuple[int, ...]) -> dict[str, Any]:
    of = make_backbone("swin-unetr", 3, settings)
    return {**on_wire(of), "window": (64, 64, 64), "batch": 1}


def test_a_swin_unetr_is_judged_by_its_size_before_any_of_it_is_made() -> None:
    """SP-11.8-4, SP-11.15-7."""
    six = tuple(range(6))
    with pytest.raises(PolicyRefused, match="level x5 may not leave"):
        judge(offer(**swin()), site())
    fair, broad = offer(**swin()).job, offer(**swin(feature_size=(96,))).job
    judge(offer(**swin()), site(levels=six))
    check_bounds(fair, backbone_of(fair), SEATS, Bounds(), 10**6)
    with pytest.raises(PolicyRefused, match="max_parameters"):
        check_bounds(broad, backbone_of(broad), SEATS, Bounds(), 10**6)
    wide = dataclasses.replace(fair, window=(192, 192, 192))
    with pytest.raises(PolicyRefused, match="max_memory_mib"):
        check_bounds(wide, backbone_of(wide), SEATS, Bounds(), 10**6)
    beyond = dataclasses.replace(fair, settings=(Setting("window_size", (9,)),))
    with pytest.raises(SchemaMismatch, match="product at most 512"):
        judge(JobOffer(bytes(16), (Seat("t1", ("t1",)),), beyond, bytes(32)), site(levels=six))


@pytest.mark.parametrize(
    "named", [[("t1", "none"), ("t1", "none")], [("t1", "window")], [("ct", "windows:1,2")]]
)
def test_terms_with_a_normalisation_that_is_none_are_refused(named: list[tuple[str, str]]) -> None:
    """SP-11.12-11."""
    with pytest.raises(SchemaMismatch):
        judge(offer(normalisation=tuple(Normalisation(*one) for one in named)), site())


@pytest.mark.parametrize("recorded", [True, False, None])
def test_a_site_that_is_not_to_be_recorded_takes_a_clear_no_only(recorded: bool | None) -> None:
    """SP-11-29."""
    said = dataclasses.replace(offer(), recorded=recorded)
    judge(said, site())
    if recorded is False:
        judge(said, site(recorded_by_coordinator=False))
        return
    with pytest.raises(PolicyRefused, match=r"recorded_by_coordinator") as refused:
        judge(said, site(recorded_by_coordinator=False))
    assert ("does not say" in refused.value.reason) == (recorded is None)


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "../../escaped"},
        {"name": "/tmp/absolute"},
        {"name": "a\0b"},
        {"name": ""},
        {"learning_rate": -1.0},
        {"learning_rate": 0.0},
        {"learning_rate": float("nan")},
        {"weight_decay": -1.0},
        {"seconds_per_step": -1.0},
        {"seconds_per_step": 1e300},
        {"steps": 10**8},
        {"spacing": (1.0, 1.0)},
        {"spacing": (0.001, 1.0, 1.0)},
        unet((4096, 4096, 4096, 4096, 4096, 4096)),
        unet((4, 4, 7, 8, 8, 4)),
        {"window": (33, 32)},
        {"optimiser": "magic"},
    ],
    ids=str,
)
def test_terms_that_nobody_could_work_with(changes: dict[str, Any]) -> None:
    """SP-11-2, SP-11-25, SP-11-26."""
    with pytest.raises(SchemaMismatch):
        judge(offer(**changes), site())


def test_feature_maps_count_whether_they_leave_or_not() -> None:
    """SP-11-28."""
    large = offer(levels=(4,), window=(1024, 1024), batch=64)
    with pytest.raises(PolicyRefused, match="MiB of feature maps"):
        judge(large, site())


def test_an_evaluation_has_no_seed(announced: Announced) -> None:
    """SP-11-17, even where the job augments its training batches."""
    announced._job = dataclasses.replace(JOB, augment=True)
    announced.check(forward(FAIR, seed=7), {})
    announced.check(forward(FAIR, mode="evaluate"), {})
    with pytest.raises(PolicyRefused, match="an evaluation has no seed"):
        announced.check(forward(FAIR, seed=7, mode="evaluate"), {})


@pytest.fixture
def announced() -> Announced:
    """What a site was asked for, without its files: one seat, which every patient fills."""
    channels = SimpleNamespace(
        geometry=lambda key: SimpleNamespace(shape=(40, 20, 24)),
        rows=lambda samples: {"t1": list(range(len(samples)))},
    )
    room = Room(JOB, backbone_of(JOB), SEATS, Bounds(), MIB, 40 * 20 * 24)
    return Announced(JOB, channels, room, lambda forward: {})  # type: ignore[arg-type]


def forward(
    *origins: tuple[int, int, int],
    mode: str = "train",
    step: int = 1,
    seed: int | None = None,
    places: tuple[int, ...] | None = None,
) -> Forward:
    samples = tuple(Sample(bytes(16), origin) for origin in origins)
    return Forward(mode, step, 0, samples, batch_digest(step, samples, seed, places), seed, places)


FAIR = (4, -6, 3)


@pytest.mark.parametrize(
    ("asked", "error"),
    [
        (forward(FAIR, FAIR, FAIR), SchemaMismatch),
        (forward(FAIR, FAIR, places=(1,)), SchemaMismatch),
        (forward(FAIR, places=(0, 1)), SchemaMismatch),
        (forward(FAIR, FAIR, places=(1, 0)), SchemaMismatch),
        (forward(FAIR, FAIR, places=(1, 1)), SchemaMismatch),
        (forward(FAIR, places=(2,)), SchemaMismatch),
        (forward(FAIR, FAIR, places=(1, 0), mode="evaluate"), SchemaMismatch),
        (forward(*[FAIR] * 200, mode="evaluate"), PolicyRefused),
        (forward(FAIR, FAIR, mode="infer"), PolicyRefused),
        (forward(FAIR, FAIR, step=11), PolicyRefused),
        (forward(FAIR, FAIR, seed=7), PolicyRefused),
        (forward(FAIR, (-1, -6, 3)), PolicyRefused),
        (forward(FAIR, (9, -6, 3)), PolicyRefused),
        (forward(FAIR, (4, 1, 3)), PolicyRefused),
        (forward(FAIR, (4, -6, 24)), PolicyRefused),
        (forward(FAIR, (2**31 - 1, -6, 3)), PolicyRefused),
    ],
    ids=[
        "long",
        "a place too few",
        "a place too many",
        "places descend",
        "a place twice",
        "a place beyond the batch",
        "places descend in an evaluation",
        "large",
        "infer",
        "beyond",
        "augmented",
        "cut low",
        "cut high",
        "single voxels",
        "outside",
        "far",
    ],
)
def test_batches_that_an_accepted_job_does_not_cover(
    announced: Announced, asked: Forward, error: type[Exception]
) -> None:
    """SP-11-27, SP-11-28."""
    with pytest.raises(error):
        announced.check(asked, {})


SUM = Fusion(16, 4.0, 3)


def in_a_sum(partners: tuple[str, ...] = ("a", "b"), least: int = 2) -> Any:
    here = site()
    here.policy.partners, here.policy.min_partners = partners, least
    return here


def summed(**changes: Any) -> JobOffer:
    job = dataclasses.replace(JOB, **{"fusion": SUM, **changes})
    return JobOffer(bytes(16), SEATS, job, schema_digest(seat_descriptors(job, SEATS)))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"fusion": dataclasses.replace(SUM, bits=24)}, "words of 24 bits"),
        ({"fusion": dataclasses.replace(SUM, range=0.0)}, "range 0"),
        ({"precision": "bf16"}, "gradients of f32"),
        ({"average_every": 2}, "not averaged"),
    ],
)
def test_a_secure_sum_that_cannot_be_is_not_accepted(changes: dict[str, Any], words: str) -> None:
    """SP-11.18-1."""
    judge(summed(), in_a_sum())
    here = in_a_sum()
    here.policy.precision, here.policy.share_encoder = ("f32", "bf16"), True
    with pytest.raises(SchemaMismatch, match=words):
        judge(summed(**changes), here)


def test_a_partners_image_is_not_made_a_constant() -> None:
    """SP-11.18-1: of any modality, not only of this site's own."""
    terms = dataclasses.replace(JOB, fusion=Fusion(16, 4.0, 3), precision="f32")
    for rule, refused in (("zscore", False), ("window:1e6,2e6", True), ("percentile", True)):
        asked = (Normalisation("flair", rule),)
        summed = offer(
            **{f.name: getattr(terms, f.name) for f in dataclasses.fields(terms)} | {"normalisation": asked}
        )
        if refused:
            with pytest.raises(
                PolicyRefused, match="in a secure sum only zscore and zscore-nonzero are accepted"
            ):
                _check_normalisation(summed, site().policy)
        else:
            _check_normalisation(summed, site().policy)


def test_a_secure_sum_needs_its_feature_and_as_many_partners_as_the_policy_wants() -> None:
    """SP-11.18-1."""
    with pytest.raises(SchemaMismatch, match="fuse was not agreed"):
        judge(summed(), in_a_sum(), ("train", "evaluate", "dtype.f32"))
    with pytest.raises(
        PolicyRefused, match=r"2 other sites, where this site wants 3 \(policy min_partners\)"
    ):
        judge(summed(), in_a_sum(least=3))
    with pytest.raises(PolicyRefused, match=r"2 other sites, of which this site knows 1 \(policy partners\)"):
        judge(summed(), in_a_sum(("a",)))


@pytest.mark.parametrize(
    ("written", "terms", "words"),
    [
        ("dp-gaussian:clip=1,noise=4,shared=3", Fusion(16, 32.0, 3), None),
        (
            "dp-gaussian:clip=1,noise=4,shared=3",
            None,
            "a secure sum of 3 sites or more; the job has no secure sum",
        ),
        ("dp-gaussian:clip=1,noise=4,shared=4", Fusion(16, 32.0, 3), "the job has of 3"),
        (
            "dp-gaussian:clip=1,noise=4,shared=3",
            Fusion(16, 20.0, 3),
            "the sum's range of 20 would clip noise",
        ),
        ("dp-gaussian:clip=1,noise=4,shared=3", Fusion(16, 2000.0, 3), "rounds to steps"),
        ("dp-gaussian:clip=1,noise=4,shared=3+clip:9", Fusion(16, 32.0, 3), "write it last"),
    ],
)
def test_shared_noise_is_for_a_sum_that_completes_it(
    written: str, terms: Fusion | None, words: str | None
) -> None:
    job = dataclasses.replace(JOB, fusion=terms)
    policy = SimpleNamespace(defences=parse_all(written, "activations"))
    if words is None:
        _check_shared_noise(job, 1, policy)
        return
    with pytest.raises(PolicyRefused, match=words):
        _check_shared_noise(job, 1, policy)


def test_shared_noise_is_for_one_seat() -> None:
    policy = SimpleNamespace(defences=parse_all("dp-gaussian:clip=1,noise=4,shared=3", "activations"))
    with pytest.raises(PolicyRefused, match="one seat, not 2"):
        _check_shared_noise(dataclasses.replace(JOB, fusion=Fusion(16, 32.0, 3)), 2, policy)


def test_whoever_judges_a_job_looks_at_shared_noise() -> None:
    with pytest.raises(PolicyRefused, match="no secure sum"):
        judge(offer(), site(defences=("dp-gaussian:shared=3",)))


def test_a_site_of_two_seats_sends_one_sum() -> None:
    """SP-11.18-2."""
    two = (Seat("t1", ("t1",)), Seat("t2", ("t2",)))
    job = dataclasses.replace(JOB, fusion=SUM)
    one = [(d.name, d.dtype, d.shape) for d in seat_descriptors(job, two)]
    assert one == [(d.name, d.dtype, d.shape) for d in seat_descriptors(job, SEATS)]
    assert one[0] == ("x0", "i16", (2, 4, 32, 32)) and one[-1] == ("check", "i16", (5, 8))
