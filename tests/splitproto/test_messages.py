"""All messages: round trips, every field checked, nothing but the documented errors."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import msgpack
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitproto import codec, fields, messages, records
from splitproto.constants import MAX_FRAME_PAYLOAD
from splitproto.errors import CodecError, TensorError
from splitproto.messages import MESSAGES, WITH_TENSORS, Message

NAMES = sorted(MESSAGES)
Example = Callable[[str], Message]


def wire_of(message: Message) -> dict[str, Any]:
    value: dict[str, Any] = codec.decode(messages.encode(message)[0])
    return value


@pytest.mark.parametrize("name", NAMES)
def test_every_message_survives(name: str, example: Example) -> None:
    message = example(name)
    head, segments = messages.encode(message)
    assert msgpack.unpackb(head)["type"] == name
    back, described = messages.decode_head(head)
    if name not in WITH_TENSORS:
        assert back == message and described == () and segments == []
        return
    tensors: dict[str, Any] = message.tensors  # type: ignore[attr-defined]
    assert [d.name for d in described] == list(tensors)
    body = b"".join(segments)
    for array in tensors.values():
        one = msgpack.packb(array.tobytes())
        assert body.startswith(one)
        body = body[len(one) :]
    assert body == b""


@pytest.mark.parametrize("name", NAMES)
def test_messages_are_frozen(name: str, example: Example) -> None:
    message = example(name)
    first = dataclasses.fields(message)[0].name  # type: ignore[arg-type]
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(message, first, None)


@pytest.mark.parametrize("name", NAMES)
def test_each_required_field_is_required_and_none_is_added(name: str, example: Example) -> None:
    head = wire_of(example(name))
    kinds = fields.kinds_of(MESSAGES[name])
    for key, (_, required) in kinds.items():
        if key not in head:
            assert not required
            continue
        cut = {k: v for k, v in head.items() if k != key}
        if required:
            with pytest.raises(CodecError, match=key):
                messages.decode_head(codec.encode(cut))
        else:
            messages.decode_head(codec.encode(cut))
    with pytest.raises(CodecError, match="unknown field"):
        messages.decode_head(codec.encode({**head, "surplus": 1}))
    with pytest.raises(CodecError):
        messages.decode_head(codec.encode({k: v for k, v in head.items() if k != "type"}))


WRONG = [None, True, -1, 1 << 63, 1.5, "x" * 600, b"x", [], [[]], [None], {}, {"x": {}}, {"x": "y"}]


@pytest.mark.parametrize("name", NAMES)
def test_a_wrong_value_in_any_field_raises_the_documented_errors_naming_the_field(
    name: str, example: Example
) -> None:
    head = wire_of(example(name))
    for key in head.keys() - {"type"}:
        errors: list[Exception] = []
        for wrong in WRONG:
            try:
                messages.decode_head(codec.encode({**head, key: wrong}))
            except (CodecError, TensorError) as error:
                errors.append(error)
        assert len(errors) >= 8, f"{name}.{key} takes nearly anything"
        for error in errors:
            assert key in str(error) or isinstance(error, TensorError)
            assert "\n" not in str(error)


@given(st.sampled_from(NAMES), st.data())
def test_any_map_raises_nothing_but_the_documented_errors(name: str, data: st.DataObject) -> None:
    leaves = st.none() | st.booleans() | st.integers(-9, 9) | st.text(max_size=5) | st.binary(max_size=32)
    kinds = [*fields.kinds_of(MESSAGES[name]), "tensors"]
    value = st.recursive(
        leaves,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    )
    head = data.draw(st.dictionaries(st.sampled_from(kinds), value))
    try:
        messages.decode_head(codec.encode({"type": name, **head}))
    except (CodecError, TensorError):
        return


@pytest.mark.parametrize(
    "value", [None, 1, [], {}, {"type": 1}, {"type": "nonsense"}, {"type": "HELLO"}, {"type": None}], ids=str
)
def test_what_is_not_a_message(value: Any) -> None:
    with pytest.raises(CodecError):
        messages.decode_head(codec.encode(value))


@pytest.mark.parametrize("name", NAMES)
def test_tensors_belong_where_they_belong(name: str, example: Example) -> None:
    head = wire_of(example(name))
    if name in WITH_TENSORS:
        del head["tensors"]
    else:
        head["tensors"] = []
    with pytest.raises(CodecError, match="tensors"):
        messages.decode_head(codec.encode(head))


def test_hello_alone_ignores_unknown_keys_and_only_in_extensions(example: Example) -> None:
    head = wire_of(example("hello"))
    head["extensions"] = {"org.example/new": {"anything": [1, None]}}
    back, _ = messages.decode_head(codec.encode(head))
    assert back.extensions == head["extensions"]  # type: ignore[attr-defined]
    head["extensions"] = {str(n): 0 for n in range(17)}
    with pytest.raises(CodecError):
        messages.decode_head(codec.encode(head))


@pytest.mark.parametrize(
    "message",
    [
        pytest.param(messages.Begin(True, 0), id="bool for int"),
        pytest.param(messages.Begin(-1, 0), id="negative step"),
        pytest.param(messages.Begin(1 << 53, 0), id="step beyond JSON"),
        pytest.param(messages.Begin(np.int64(1), 0), id="numpy integer"),  # type: ignore[arg-type]
        pytest.param(messages.Begin("1", 0), id="text for int"),  # type: ignore[arg-type]
        pytest.param(messages.Begin(None, 0), id="None for a required field"),  # type: ignore[arg-type]
        pytest.param(messages.Bye("because", ""), id="unknown reason"),
        pytest.param(messages.Bye("complete", "x" * 501), id="long text"),
        pytest.param(messages.Bye("complete", "\udcff"), id="a file name's stray octet"),
        pytest.param(messages.Saved(1, bytes(31)), id="short digest"),
        pytest.param(messages.Saved(1, bytearray(32)), id="bytearray for bytes"),  # type: ignore[arg-type]
        pytest.param(messages.Progress(1, {"loss": float("nan")}), id="NaN"),
        pytest.param(messages.Progress(1, {"loss": "low"}), id="text for number"),  # type: ignore[dict-item]
        pytest.param(messages.Progress(1, None), id="no map of numbers"),  # type: ignore[arg-type]
        pytest.param(messages.JobAccept(bytes(16), 0, 5, 1), id="number for list"),  # type: ignore[arg-type]
        pytest.param(messages.JobAccept(bytes(16), 0, b"\1\2", 1), id="octets for list"),  # type: ignore[arg-type]
        pytest.param(messages.JobAccept(bytes(16), 0, "12", 1), id="text for list"),  # type: ignore[arg-type]
        pytest.param(messages.Inventory(({"key": 1},), True, bytes(8)), id="map for record"),  # type: ignore[arg-type]
        pytest.param(messages.Forward("train", 1, 0, (), bytes(32)), id="no samples"),
    ],
)
def test_a_message_that_the_peer_would_refuse_is_not_written(message: Message) -> None:
    with pytest.raises(CodecError):
        messages.encode(message)


def test_whole_numbers_travel_as_floats_where_floats_belong() -> None:
    head, _ = messages.encode(messages.Progress(1, {"loss": 2}))
    assert messages.decode_head(head)[0] == messages.Progress(1, {"loss": 2.0})


def test_a_head_fits_in_one_frame() -> None:
    text = {str(n): "x" * 3000 for n in range(16)}
    hello = messages.Hello((1,), (), (), 1, "", bytes(32), {**text, "0": "x" * (1 << 18)})
    with pytest.raises(CodecError, match="one frame"):
        messages.encode(hello)


def test_the_longest_inventory_fits_in_one_frame() -> None:
    patient = records.Patient(b"\xff" * 16, (1 << 16,) * 3, (1.0,) * 3, (0.5,) * 9, (-1.5,) * 3, (1.0,) * 3)
    head, _ = messages.encode(messages.Inventory((patient,) * 1024, False, b"\xff" * 8))
    assert len(head) <= MAX_FRAME_PAYLOAD


def test_the_longest_batch_fits_in_one_frame() -> None:
    sample = records.Sample(b"\xff" * 16, (-(1 << 31),) * 3)
    head, _ = messages.encode(messages.Forward("train", (1 << 53) - 1, 0, (sample,) * 4096, bytes(32), 1))
    assert len(head) <= MAX_FRAME_PAYLOAD


def test_bf16_and_float_tensors_may_share_a_message() -> None:
    tensors = {"bits": np.full(3, 0x3F80, np.uint16), "scale": np.ones(1, np.float32)}
    _, described = messages.decode_head(messages.encode(messages.Gradients(1, tensors))[0])
    assert [(d.name, d.dtype) for d in described] == [("bits", "bf16"), ("scale", "f32")]


def test_tensor_errors_surface_at_the_sender() -> None:
    with pytest.raises(TensorError):
        messages.encode(messages.Gradients(1, {"x 0": np.zeros(1, np.float32)}))
    with pytest.raises(TensorError):
        messages.encode(messages.Gradients(1, {"x": np.zeros(0, np.float32)}))
    many = {f"x{n}": np.zeros(1, np.float32) for n in range(257)}
    with pytest.raises(TensorError):
        messages.encode(messages.Gradients(1, many))
