"""What holds for every defence: it is read as it was written, repeats under its key and no other, keeps zeros
where there is nothing to send, and leaves gradients as they are."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from splitpeer.defences.base import Defence
from splitpeer.defences.kinds import KINDS, parse_all
from splitpeer.defences.randomness import Draw
from splitpeer.defences.specs import by_place, parse, placed
from splitpeer.defences.stack import make_stack
from splitpeer.errors import ConfigError

RANDOM = ("dropout:0.4", "gaussian:0.5", "laplace:0.5", "percentile:0.2", "shredder")
KEPT = tuple(f"{written},kept=true" for written in RANDOM[:4])
STILL = ("topk:0.1", "withhold@0,2", "clip:5", "quantise:4", "projection:0.5", "bottleneck:2")
EVERY = (*RANDOM, *KEPT, *STILL, "nopeek:0.5", "adversary:1,networks=2,width=4")


def test_every_class_says_what_it_is() -> None:
    for name, kind in KINDS.items():
        assert kind.name == name
        assert kind.title and kind.source, name
        assert kind.promise.startswith("Guaranteed" if kind.guarantee else "No guarantee"), name
        assert kind.places, name
        for parameter in kind.options.values():
            assert parameter.meaning, name
            assert isinstance(parameter.default, bool) or parameter.low <= parameter.default <= parameter.high


def test_every_kind_has_its_class_and_every_class_its_kind() -> None:
    classes = {name: kind.load() for name, kind in KINDS.items()}
    assert all(made.kind is KINDS[name] for name, made in classes.items())
    images = {name for name, kind in KINDS.items() if "image" in kind.places}
    assert {name for name, made in classes.items() if not issubclass(made, Defence)} == images
    # Whatever else the modules define (a base class) is not complete: it names no kind.
    waiting, defined = [Defence], set()
    while waiting:
        waiting += (below := waiting.pop().__subclasses__())
        defined |= {made for made in below if "kind" in vars(made)}
    assert {made for made in defined if made.__module__.startswith("splitpeer.")} <= set(classes.values())


def test_a_copy_is_the_same_defence() -> None:
    """Also one that was sent as text, which is how it reaches another process."""
    (spec,) = parse_all("gaussian:2,kept=true@0", "activations")
    (read,) = parse_all(str(spec), "activations")
    for again in (copy.deepcopy(spec), read):
        assert again == spec and hash(again) == hash(spec)


def test_traits_are_what_the_classes_do(flat) -> None:
    """Attackers read them: a wrong one would have them subtract noise that is not there, or spare what is."""
    offline = {n: k for n, k in KINDS.items() if "activations" in k.places and k.offline}
    for name, kind in offline.items():
        stack = flat.stack(f"{name}@0" if kind.needs_levels else name)
        with torch.no_grad():
            sent = stack(flat.tensors, flat.release())["x1"]
            again = stack(flat.tensors, flat.release(step=6))["x1"]
        # Noise is nearly everywhere and other at every step; of whatever else is done, one of these does not hold.
        changed = (sent != flat.tensors["x1"]).float().mean() > 0.9
        drawn = ((again - sent).abs() > 1e-3).float().mean() > 0.9
        assert bool(changed and drawn) == (kind.additive_noise is not None), name
        one = {n: torch.where(torch.arange(t.shape[1]).view(1, -1, *[1] * (t.ndim - 2)) == 0, t, 0.0)
               for n, t in flat.tensors.items()}  # fmt: skip
        with torch.no_grad():
            spread = stack(one, flat.release())["x1"][:, 1:].any()
        assert bool(spread) == (kind.channel_mixing or kind.additive_noise is not None), name
        size = flat.tensors["x1"].abs()
        large = (size > size.median()) & sent.flatten(2).any(2).view(*sent.shape[:2], *[1] * (sent.ndim - 2))
        assert bool((large & (sent == 0)).any()) == kind.sparse, name
        whole = stack({n: torch.ones_like(t) for n, t in flat.tensors.items()}, flat.release())["x1"]
        # Of equal values, top-k keeps a twentieth.
        assert (kind.sparse and bool((whole == 0).float().mean() < 0.9)) == bool(kind.drops), name
        values = max(len(channel.unique()) for channel in sent[0])
        assert (values < 2**8) == bool(kind.rounds) or kind.sparse, name
        assert {kind.drops, kind.rounds} - {""} <= kind.options.keys(), name
    kept = parse_all("gaussian:1,kept=true+gaussian:1+topk", "activations")
    assert [spec.kept for spec in kept] == [True, False, False]


def test_the_places_of_a_list_of_several() -> None:
    texts = ("dropout:0.5", "image/voxel-noise:1", "gradients/iso", "clip:2", "else/where")
    found = by_place(texts)
    assert found.activations == ("dropout:0.5", "clip:2", "else/where")
    assert found.image == ("voxel-noise:1",) and found.gradients == ("iso",)
    assert placed("image", found.image) == texts[1:2] and placed("gradients", found.gradients) == texts[2:3]
    with pytest.raises(ConfigError, match="'else/where' is not a defence"):
        parse_all(found.activations, "activations")


@pytest.mark.parametrize(
    ("written", "brief"),
    [
        ("gaussian:scale=1,kept=false@0,1", "gaussian:1@0,1"),
        ("gaussian:scale=0.5,kept=true", "gaussian:0.5,kept=true"),
        ("max-norm", "max-norm"),
        ("withhold@2", "withhold@2"),
    ],
)
def test_the_brief_form_reads_back(written: str, brief: str) -> None:
    place = "gradients" if written == "max-norm" else "activations"
    (spec,) = parse_all(written, place)
    assert spec.brief == brief and parse_all(brief, place) == (spec,)


def test_every_class_is_tested_here_or_is_about_gradients_or_has_a_test_of_its_own() -> None:
    elsewhere = {"voxel-noise", "dp-gaussian", "max-norm", "iso", "marvell"}
    covered = {written.partition(":")[0].partition("@")[0] for written in EVERY} | elsewhere
    assert covered == set(KINDS), (
        f"{covered ^ set(KINDS)}: RANDOM and STILL above hold an example of each kind"
    )


@pytest.mark.parametrize("written", EVERY)
def test_what_is_announced_reads_back(flat, same, written: str) -> None:
    stack = flat.stack(written)
    assert flat.stack("+".join(stack.specs)).specs == stack.specs


def test_numbers_read_back_to_the_last_bit() -> None:
    for written in ("clip:1000000000", "clip:0.1234567891", "topk:0.000001", "gaussian:2@0,3"):
        (defence,) = parse_all([written], "activations")
        (again,) = parse_all(str(defence), "activations")
        assert again.values == defence.values
        assert again.levels == defence.levels


@pytest.mark.parametrize("written", EVERY)
def test_the_same_release_gives_the_same_bits(bench, same, written: str) -> None:
    if written.startswith(("bottleneck", "shredder")):
        stack = bench.stack(written)
        with torch.no_grad():
            assert same(stack(bench.tensors, bench.release()), stack(bench.tensors, bench.release()))
    else:
        assert same(bench.sent(written), bench.sent(written))


@pytest.mark.parametrize("written", RANDOM)
def test_everything_that_differs_draws_anew(flat, same, written: str) -> None:
    release, first = flat.release(), flat.sent(written)
    samples = release.samples
    others = {
        "mode": flat.release(mode="evaluate"),
        "step": flat.release(step=6),
        "batch": flat.release(batch=1),
        "patient": flat.release(samples=tuple(replace(s, key=b"\x09" * 16) for s in samples)),
        "window": flat.release(samples=tuple(replace(s, origin=(1, 1, 1)) for s in samples)),
    }
    for what, other in others.items():
        again = flat.sent(written, other)
        for name, tensor in first.items():
            for index in range(3):
                assert not torch.equal(tensor[index], again[name][index]), (what, name)
    assert not same(first, flat.sent(written, key=bytes(32)))
    assert same(first, flat.sent(written, flat.release(run=b"s" * 16))), "demonstrations repeat"


@pytest.mark.parametrize("written", ["gaussian:0.5", "dropout:0.4"])
def test_samples_and_defences_of_the_same_kind_are_independent(flat, written: str) -> None:
    twins = {name: tensor[:1].expand(3, *tensor.shape[1:]).clone() for name, tensor in flat.tensors.items()}
    release = flat.release(samples=(flat.release().samples[0],) * 3)
    with torch.no_grad():
        once = flat.stack(written)(twins, release)
        twice = flat.stack(f"clip:1e8+{written}")(twins, release)
    for name, tensor in once.items():
        # Even the same window twice in a batch, and the same defence at another place of the stack.
        assert not torch.equal(tensor[0], tensor[1])
        assert not torch.equal(tensor, twice[name])


@pytest.mark.parametrize("written", KEPT)
def test_kept_is_drawn_once_per_sample(flat, same, written: str) -> None:
    first = flat.sent(written)
    assert same(first, flat.sent(written, flat.release(run=b"s" * 16, mode="evaluate", step=77, batch=3)))
    moved = flat.release(samples=tuple(reversed(flat.release().samples)))
    assert not torch.equal(first["x0"][0], flat.sent(written, moved)["x0"][0])
    assert torch.equal(first["x0"][1], flat.sent(written, moved)["x0"][1]), (
        "the place in the batch is no matter"
    )
    assert not same(first, flat.sent(written, key=bytes(32)))


def test_a_step_repeated_with_other_contents_meets_other_noise(flat) -> None:
    """Else a peer that has a step repeated, under another augmentation, subtracts the noise."""
    turned = {name: tensor.flip(-1) for name, tensor in flat.tensors.items()}
    with torch.no_grad():
        noise = flat.sent("gaussian:1")["x0"] - flat.tensors["x0"]
        other = flat.stack("gaussian:1")(turned, flat.release())["x0"] - turned["x0"]
    correlation = torch.corrcoef(torch.stack([noise.flatten(), other.flatten()]))[0, 1]
    assert abs(correlation) < 0.05


def test_one_samples_noise_does_not_depend_on_the_others(flat) -> None:
    changed = {name: torch.cat([tensor[:1], tensor[1:] * 2]) for name, tensor in flat.tensors.items()}
    with torch.no_grad():
        assert torch.equal(
            flat.sent("gaussian:1")["x1"][0], flat.stack("gaussian:1")(changed, flat.release())["x1"][0]
        )


@pytest.mark.parametrize("later", [*RANDOM, *KEPT, *STILL[:1], *STILL[2:5], "dp-gaussian:5,noise=1"])
@pytest.mark.parametrize("first", ["bottleneck:2", "projection:0.4", "withhold@0"])
def test_what_carries_nothing_stays_exactly_zero(flat, first: str, later: str) -> None:
    with torch.no_grad():
        sent = flat.stack(f"{first}+{later}")(flat.tensors, flat.release())
    empty = {name: flat.stack(first).defences[0].carried(flat.channels)[name] for name in flat.channels}
    assert any(empty[name] < flat.channels[name] for name in empty)
    for name, tensor in sent.items():
        assert tensor.shape == flat.tensors[name].shape
        assert not tensor[:, empty[name] :].any(), name
        assert tensor[:, : empty[name]].any() or empty[name] == 0


@pytest.mark.parametrize("written", EVERY)
def test_no_zero_keeps_its_sign(flat, written: str) -> None:
    """Minus zero on the wire would tell the sign of what was left out."""
    with torch.no_grad():
        for tensor in flat.stack(written)(flat.tensors, flat.release()).values():
            assert not (tensor.signbit() & (tensor == 0)).any()


@pytest.mark.parametrize(
    "written", ["gaussian:1", "dropout:0.5", "quantise:3", "clip:2", "topk:0.1", "withhold@0"]
)
def test_levels_that_are_not_named_pass(flat, written: str) -> None:
    sent = flat.sent(f"{written.partition('@')[0]}@0,4")
    assert [name for name in sent if not torch.equal(sent[name], flat.tensors[name])] == ["x0", "x4"]


def test_a_recorded_clean_batch_is_defended_as_the_live_one(flat, same) -> None:
    """The live stack went on after a bottleneck; offline, the bottleneck has been through already."""
    live = flat.stack("bottleneck:2+gaussian:1+dropout:0.3")
    with torch.no_grad():
        sent = live(flat.tensors, flat.release())
        recorded = live.structure(flat.tensors)
        offline = flat.stack("gaussian:1+dropout:0.3", after=["image/voxel-noise:1", *live.specs[:1]])
        assert same(sent, offline(recorded, flat.release()))
        naive = flat.stack("gaussian:1+dropout:0.3")
        assert not same(sent, naive(recorded, flat.release()))


SMOOTH = (
    "gaussian:0.3",
    "laplace:0.3",
    "dropout:0.4",
    "dropout:0.4,rescale=true",
    "clip:3",
    "projection:0.5",
)


@pytest.mark.parametrize("written", [*SMOOTH, "bottleneck:2"])
def test_gradients_are_those_of_finite_differences(flat, written: str) -> None:
    names = ("x3", "x4")
    inputs = tuple(flat.tensors[name].double().requires_grad_() for name in names)
    given = {name: tensor.detach().clone() for name, tensor in zip(names, inputs, strict=True)}
    (defence,) = flat.stack(written).double().defences
    if hasattr(defence, "widths"):
        # No gradient is to flow through the measured widths.
        widths = defence.widths(given)
        defence.widths = lambda _: widths

    def through(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        # Draws are bound to the content, which a difference changes: so they are taken for `given`.
        sent = defence(dict(zip(names, tensors, strict=True)), Draw(flat.key, flat.release(), given))
        return tuple(sent.values())

    assert torch.autograd.gradcheck(through, inputs, eps=1e-6, atol=1e-5, fast_mode=True)


@pytest.mark.parametrize(
    ("written", "text"),
    [
        ("blur:1", "defence 'blur' is unknown; known are"),
        ("dropout:2", "rate must be a number from 0 to 1, not '2'"),
        ("quantise:2.5", "bits must be a whole number from 2 to 16, not '2.5'"),
        ("gaussian:nan", "scale must be a number"),
        ("gaussian:1,kept=yes", "kept must be true or false"),
        ("gaussian:1,2", "write '2' as parameter=value"),
        ("gaussian:1,width=2", "has no parameter 'width' \\(known: scale, kept\\)"),
        ("gaussian:1@7", "level 7 is not sent; sent are x0, x1, x2, x3, x4"),
        ("gaussian:1@16", "is not a defence: write name:value"),
        ("withhold", "withhold needs levels: write withhold@0"),
        ("voxel-noise:1", "voxel-noise defends image, not activations"),
        ("marvell:0.3", "marvell defends gradients, not activations"),
        ("gaussian:1+bottleneck:2", "bottleneck is a part of the network: write it before gaussian"),
    ],
)
def test_one_line_says_what_is_wrong(flat, written: str, text: str) -> None:
    with pytest.raises(ConfigError, match=text) as caught:
        flat.stack(written)
    assert "\n" not in str(caught.value)


def test_a_level_that_is_not_sent() -> None:
    options = {"key": bytes(32), "channels": {"x1": 4, "x4": 8}, "dimensions": 2}
    with pytest.raises(ConfigError, match=r"gaussian.*: level 0 is not sent; sent are x1, x4"):
        make_stack("gaussian:1@0", **options)
    assert make_stack("gaussian:1@0", **options, strict=False).specs == ("gaussian:scale=1,kept=false@0",)


def test_a_release_of_another_batch_is_refused(flat) -> None:
    with pytest.raises(ValueError, match="the release names 2 samples"):
        flat.sent("gaussian:1", flat.release(samples=flat.release().samples[:2]))


def test_empty_text_is_no_defence(flat) -> None:
    assert not flat.stack("")
    assert not flat.stack([])
    assert parse("dropout", "activations", KINDS).values["rate"] == 0.5
    assert flat.stack("gaussian:1", after=["image/voxel-noise:1"]).specs == ("gaussian:scale=1,kept=false",)
