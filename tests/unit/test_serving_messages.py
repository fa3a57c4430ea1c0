"""Requests that the server accepts, and requests that it refuses before they reach a model."""

import msgpack
import numpy as np
import pytest

from torchpi.serving.messages import RequestError, count_encoded, read_request
from torchpi_client import pack, unpack

H, A = 4, 3
PREFIX = {"action_prefix": np.ones((2, 2), np.float32), "delay": 1, "execution_horizon": 2}


def read(request):
    return read_request(pack(request), noise_shape=(H, A))


def refusal(request):
    """Error message for a readable but invalid request."""
    with pytest.raises(RequestError) as caught:
        read(request)
    assert caught.value.code == "bad_observation"
    return str(caught.value)


def as_text_array(*codes, dtype="<U"):
    """Text with arbitrary 32-bit code points, as a client in another language may send it."""
    return np.array(codes, f"{dtype[0]}u4").view(f"{dtype}{len(codes)}").reshape(())


# ---- numbers ----


@pytest.mark.parametrize(
    "value",
    [
        np.array([0.0, 1e300]),
        np.array([0.0, -1e39]),
        np.array(1e300),
        np.array([[1e300]], ">f8"),
        1e300,
        [0.0, [-1e300]],
        np.array([np.nan, 1.0, 1e300])[1:],
    ],
)
def test_numbers_beyond_float32_are_refused_with_their_key(value):
    assert refusal({"prompt": "go", "robot": {"state": value}}).startswith("state is beyond float32: it reaches")


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("other", [1.0, 1e300])
def test_embodiment_refuses_nan_and_infinity_and_names_the_joint(bad, other):
    observation, _ = read({"state": np.array([other, bad]), "x": float(bad)})
    np.testing.assert_array_equal(observation["state"], [other, bad])


@pytest.mark.parametrize("dtype", ["<f2", "<f4", ">f4", "<f8", ">f8", "<i8", "<u8", "|b1"])
def test_readable_numbers_arrive_unchanged(dtype):
    state = np.array([0, 1, 1], dtype)
    observation, _ = read({"state": state, "none": np.zeros((0, 3), dtype), "list": [1, 2.5, True, None]})
    np.testing.assert_array_equal(observation["state"], state)
    assert observation["list"] == [1, 2.5, True, None]


def test_the_largest_float32_arrives():
    largest = float(np.finfo(np.float32).max)
    observation, _ = read({"state": np.array([largest, -largest]), "x": largest})
    assert observation["x"] == largest


@pytest.mark.skipif(np.dtype(np.longdouble).itemsize == 8, reason="long double is float64 here")
def test_floats_without_a_pytorch_dtype_are_refused():
    assert "state is float128; expected" in refusal({"state": np.zeros(4, np.longdouble)})
    assert "torchpi/noise is float128" in refusal({"torchpi/noise": np.zeros((H, A), np.longdouble)})
    assert "action_prefix is float128" in refusal(
        {"torchpi/rtc": {**PREFIX, "action_prefix": np.zeros((2, 2), np.longdouble)}}
    )
    # torchpi_client does not pack such a scalar.
    scalar = {b"__npgeneric__": True, b"data": 1.0, b"dtype": np.dtype(np.longdouble).str}
    assert isinstance(unpack(pack(scalar)), np.longdouble)
    assert "x is float128" in refusal({"x": scalar})


def test_jpeg_is_checked_by_its_decoder():
    deep = 0.0
    for _ in range(900):
        deep = [deep]
    for value in (deep, {b"x": 2}):
        assert count_encoded(read({"camera": {"torchpi/jpeg": value}})[0]) == 1


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"torchpi/deadline": True}, "torchpi/deadline is True; expected a positive number"),
        ({"torchpi/num_steps": 2.0}, "torchpi/num_steps is 2.0; expected a whole number"),
        ({"torchpi/rtc": {**PREFIX, "delay": True}}, "delay is True; expected an integer, 0 to 2"),
        (
            {"torchpi/rtc": {**PREFIX, "execution_horizon": 3}},
            "The action prefix has 2 actions; expected at least delay, 1",
        ),
    ],
)
def test_numbers_of_options_are_whole_and_within_the_chunk(value, message):
    assert refusal(value).startswith(message)


def test_numpys_integers_are_integers():
    rtc = {**PREFIX, "delay": np.uint8(1), "execution_horizon": np.int64(2)}
    _, options = read({"torchpi/rtc": rtc, "torchpi/num_steps": np.int16(3), "torchpi/deadline": np.int32(4)})
    assert (options.previous.delay, options.previous.execution_horizon) == (1, 2)
    assert (options.num_steps, options.deadline) == (3, 4.0)


@pytest.mark.parametrize(
    ("packed", "origin"),
    [
        ({b"nd": True, b"type": "<f4", b"kind": b"", b"shape": [1], b"data": b"1234"}, "the package msgpack-numpy"),
        ({b"nd": False, b"type": "<f4", b"data": b"1234"}, "the package msgpack-numpy"),
        ({"nd": True, "type": "<f4", "kind": "", "shape": [1], "data": b"1234"}, "the package msgpack-numpy"),
        ({"__ndarray__": True, "data": b"1234", "dtype": "<f4", "shape": [1]}, "turns the byte-string keys into text"),
        ({"__numpy__": "MTIzNA==", "dtype": "<f4", "shape": [1]}, "the package json-numpy"),
        ({"__ndarray_class__": True, "as_npy": b"..."}, "GR00T's client"),
    ],
)
def test_arrays_in_other_formats_are_refused_by_name(packed, origin):
    frame = msgpack.packb({"prompt": "go", "images": {"base": packed}})
    with pytest.raises(
        RequestError, match=f"{origin}.*expected msgpack as openpi_client.msgpack_numpy and torchpi_client"
    ):
        read_request(frame, noise_shape=(H, A))
    assert read_request(msgpack.packb({"nd": 1, "data": 2}), noise_shape=(H, A))[0] == {"nd": 1, "data": 2}


# ---- text ----


@pytest.mark.parametrize("dtype", ["<U", ">U"])
@pytest.mark.parametrize("code", [0xD800, 0xDFFF, 0x110000, 0xFFFFFFFF])
def test_text_that_is_not_unicode_is_refused(code, dtype):
    text = as_text_array(ord("g"), code, dtype=dtype)
    assert refusal({"prompt": text}) == f"prompt is text with the code point {code:#x}; expected Unicode characters."
    assert "torchpi/num_steps is text" in refusal({"torchpi/num_steps": text})


def test_surrogates_in_msgpack_text_are_malformed():
    with pytest.raises(RequestError, match="can't decode") as caught:
        read_request(b"\x81\xa6prompt\xa3\xed\xa0\x80", noise_shape=(H, A))
    assert caught.value.code == "malformed_message"


@pytest.mark.parametrize("text", ["go", "größer 机器人", "\ud7ff\ue000\U0010ffff", ""])
def test_unicode_text_arrives_unchanged(text):
    observation, _ = read({"prompt": np.array(text), "big": np.array(text, ">U12"), "str": text})
    assert observation["prompt"].item() == observation["big"].item() == observation["str"] == text
    assert read({"names": np.array(["a", "b"])})[0]["names"].tolist() == ["a", "b"]


# ---- options ----


@pytest.mark.parametrize("value", [np.float64(1e300), np.float32(3e38), np.float64(-1.1e6)])
def test_overflowing_noise_is_refused(value):
    message = refusal({"torchpi/noise": np.full((H, A), value)})
    assert message.startswith("torchpi/noise reaches a magnitude of")
    assert message.endswith("expected at most 1e+06: it is drawn from N(0, 1).")


@pytest.mark.parametrize("value", [np.float64(1e300), np.float32(3e38), np.float64(-1.1e12)])
def test_overflowing_action_prefix_is_refused(value):
    message = refusal({"torchpi/rtc": {**PREFIX, "action_prefix": np.full((2, 2), value)}})
    assert message.startswith("action_prefix of torchpi/rtc reaches a magnitude of")
    assert message.endswith("expected at most 1e+12: no robot's actions are that large.")


def test_options_within_their_limits_arrive():
    noise = np.linspace(-1e6, 1e6, H * A).reshape(H, A)
    _, options = read({"torchpi/noise": noise.astype(">f8"), "torchpi/rtc": PREFIX})
    np.testing.assert_array_equal(options.noise, noise.astype(np.float32))
    np.testing.assert_array_equal(options.previous.actions, PREFIX["action_prefix"])
    # An infinite deadline is allowed: it means that the client waits for ever.
    assert read({"torchpi/deadline": 1e300})[1].deadline == 1e300
